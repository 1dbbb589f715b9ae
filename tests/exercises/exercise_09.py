"""9. Break the accumulation, and see the test fail

Most training loops average each micro-batch, then average the averages. Write that, and watch the promise of this
repository, "1 x 4 pages = 4 x 1 pages", break.

Hint: copy the loop over micro-batches from the optimizer step in train.py; divide each micro-batch's loss by its own answer
tokens, and by the number of micro-batches. Return the step's loss. Nothing looks wrong: the loss is finite and falls. Whose tokens now weigh more?
"""
import torch


def broken(model, examples, batch_pages):
    """As the optimizer step in train.py up to the gradients, but with the mean of means."""
    raise NotImplementedError("write me")


def test_it_is_the_mean_of_means_and_the_promise_is_broken():
    import random

    from reference import accumulate_gradients

    from model import InternVL
    from model.prompt import write_page
    from model.tiling import tile_page
    from model.tiny.pages import SHAPES, TILE, draw_page
    from train import choose_parts

    class Example:
        def __init__(self, tiles, prompt):
            self.tiles, self.prompt, self.answer_tokens = tiles, prompt, sum(label >= 0 for label in prompt.labels)

    model, examples = InternVL.from_pretrained("tiny", "cpu"), []
    choose_parts(model, "projector")
    for i in range(4):
        page, asked = draw_page(random.Random(i), "negative", SHAPES[0], unseen=i < 2)     # two of them ask for a whole page: many tokens
        tiles = torch.from_numpy(tile_page(page, tile_pixels=TILE))
        asked = asked if i % 2 else asked[:1]
        examples.append(Example(tiles, write_page(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [[turn] for turn in asked])[0]))

    def gradient(accumulate, batch_pages):
        model.zero_grad()
        loss = float(accumulate(model, examples, batch_pages))
        return loss, torch.cat([p.grad.flatten() for p in model.projector.parameters()])

    exact = [gradient(accumulate_gradients, n) for n in (1, 2, 4)]
    assert all(torch.allclose(exact[0][1], other, rtol=1e-3, atol=1e-5) for _, other in exact)
    wrong = [gradient(broken, n) for n in (1, 4)]
    means = [gradient(lambda model, _, size: accumulate_gradients(model, [one], size), 1)[0] for one in examples]
    assert abs(wrong[0][0] - sum(means) / 4) < 1e-4                             # plausible, and another number
    assert (wrong[0][1] - wrong[1][1]).norm() > 0.05 * wrong[1][1].norm()
    torch.testing.assert_close(wrong[1][1], exact[0][1], rtol=1e-3, atol=1e-5)  # with one micro-batch nobody notices
