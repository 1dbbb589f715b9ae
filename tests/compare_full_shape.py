"""The whole InternVL2-1B shape, 24 + 24 layers, beside transformers' own InternVL on the same random weights, in float32.

    python tests/compare_full_shape.py --model OpenGVLab/InternVL2-1B --data zhangfaen/DocumentVQA --max-tiles 6

Prints the largest difference of the logits at the answers, of the loss and of the projector's gradient, the time and the
peak memory. About 10 GB of memory and some minutes on two cores; not collected by pytest. --model is read for its
config.json and tokenizer only.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import torch.nn.functional as F
import transformers
from reference import accumulate_gradients, page_prompt, randomise, reference_model, reference_pixels

from data import PageDataset, page_blocks
from extras.sources import open_rows
from model import InternVL
from train import choose_parts, make_optimizer


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="OpenGVLab/InternVL2-1B")
    parser.add_argument("--data", default="zhangfaen/DocumentVQA")
    parser.add_argument("--max-tiles", type=int, default=6)
    settings = parser.parse_args()

    model = randomise(InternVL.from_scratch(settings.model, seed=0, device="cpu", dtype=torch.float32))
    choose_parts(model, "projector")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters in {len(model.state_dict())} tensors")
    page = next(page_blocks(open_rows(settings.data, "train"), shuffle=False))[0]
    page.questions, page.answers = page.questions[:1], page.answers[:1]             # the reference reads one a row
    example = PageDataset(model, settings.max_tiles)[page]
    print(f"page {page.name}: {len(example.tiles)} tiles, {len(example.prompt.ids)} tokens, {example.answer_tokens} learned")

    loaded, started = peak_gb(), time.perf_counter()
    loss = accumulate_gradients(model, [example], 1).item()
    print(f"ours: forward and backward {time.perf_counter() - started:.1f} s, peak {peak_gb() - loaded:.1f} GB above the weights, loss {loss:.6f}")
    batch = model.pack([(example.tiles, example.prompt)])
    with torch.no_grad():
        ours = model(batch)

    reference = reference_model(model, whole=True).requires_grad_(False)
    reference.model.multi_modal_projector.requires_grad_(True)
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(example.tiles)], page.questions, page.answers)
    labels, started = torch.tensor(prompt.labels[1:]), time.perf_counter()
    logits = reference(input_ids=torch.tensor([prompt.ids]), pixel_values=reference_pixels(example.tiles)).logits[0, :-1]
    expected = F.cross_entropy(logits, labels)
    expected.backward()
    print(f"reference: forward and backward {time.perf_counter() - started:.1f} s, peak {peak_gb() - loaded:.1f} GB above the weights, "
          f"loss {expected.item():.6f}")
    print(f"largest |logit difference| {(ours - logits[labels != -100]).abs().max().item():.2e} of logits up to {ours.abs().max().item():.1f}; "
          f"|loss difference| {abs(loss - expected.item()):.2e}")
    for (name, a), (_, b) in zip(model.projector.named_parameters(), reference.model.multi_modal_projector.named_parameters()):
        print(f"projector.{name:<12} relative gradient difference {((a.grad - b.grad).norm() / b.grad.norm()).item():.2e}")

    del reference, logits, expected
    optimizer = make_optimizer(model, argparse.Namespace(lr=4e-5, weight_decay=0.01, beta2=0.999, device="cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("vision")}
    started = time.perf_counter()
    model.zero_grad()
    accumulate_gradients(model, [example], 1)
    optimizer.step()
    moved = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, model.state_dict()[name])}
    print(f"one real step: {time.perf_counter() - started:.1f} s, moved: {', '.join(sorted(moved))}")


if __name__ == "__main__":
    main()
