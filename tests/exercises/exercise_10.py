"""10. Add another projector, and train it

InternVL2 puts four patches side by side and lets an MLP make a token of them. Write another bridge, an average of the four
and one Linear layer for instance, put it into the embedded model and train it alone: how far does it get?

Hint: same shapes in and out as `Projector` in model/projector.py, (N, 1024, 96) -> (N, 256, 256) for the embedded model. Parameters
must be float32 and the layers those of model/layers.py, so that it also runs under a bfloat16 model. Start small: nothing
that it makes is known to the decoder yet.
"""
from torch import nn


class MyProjector(nn.Module):
    """Any bridge but the original one."""

    def __init__(self, config):
        super().__init__()
        raise NotImplementedError("write me: config.vision.width, config.vision.grid, config.language.width, config.shuffle")

    def forward(self, patches):
        raise NotImplementedError("write me")


def test_it_learns(published):
    import random

    import torch

    from model import InternVL
    from model.prompt import write_page
    from model.tiling import tile_page
    from model.tiny.pages import SHAPES, TILE, draw_page
    from train import answer_loss
    torch.manual_seed(0)
    model = InternVL.from_pretrained("tiny", "cpu")
    model.projector = MyProjector(model.config)
    assert model.encode_images(torch.zeros(2, 3, TILE, TILE, dtype=torch.uint8)).shape == (2 * model.config.tokens_per_tile, model.config.language.width)
    optimizer, losses = torch.optim.AdamW(model.projector.parameters(), lr=5e-3), []
    for step in range(20):
        pages, tokens = [], 0
        for i in range(2):
            page, asked = draw_page(random.Random(f"exercise {step} {i}"), shape=SHAPES[0])
            prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [1], [[turn] for turn in asked])
            tokens += sum(label >= 0 for label in prompt.labels)
            pages.append((torch.from_numpy(tile_page(page, tile_pixels=TILE)), prompt))
        batch = model.pack(pages)
        loss = answer_loss(model(batch), batch.targets) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:3]) / 3, losses[::10]
