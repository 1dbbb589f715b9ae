"""Logits, loss and gradients are transformers'; a page equals separate samples; accumulation equals a large batch."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import real
from reference import accumulate_gradients, all_logits, loss_of, page_prompt, reference_model, reference_pixels
from small_data import mixed_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import PageDataset, group_rows_into_pages
from extras.sources import open_rows
from model.vision import normalize
from train import choose_parts, make_optimizer

PROJECTOR = {"norm": "layer_norm", "up": "linear_1", "out": "linear_2"}


def examples_of(model, rows, pages, max_tiles):
    """The first pages of some rows as the model reads them."""
    prepared = PageDataset(model, max_tiles)
    return [prepared[page] for page, _ in zip(group_rows_into_pages(rows), range(pages))]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def reference_loss(reference, model, example, tokens):
    """One question a row, full logits; adds to the reference's gradients. Returns (loss, logits at the answers)."""
    pixels, loss, seen = reference_pixels(example.tiles).to(reference.dtype), 0.0, []
    for question, answer in zip(example.page.questions, example.page.answers):
        prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(example.tiles)],
                                [question + example.page.instruction], [answer])
        logits = reference(input_ids=torch.tensor([prompt.ids]), pixel_values=pixels).logits[0, :-1]
        labels = torch.tensor(prompt.labels[1:])
        part = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / tokens
        part.backward()
        loss += part.item()
        seen.append(logits[labels != -100].detach())
    return loss, torch.cat(seen)


def assert_like_the_reference(model, reference, examples, names):
    """Logits, loss and the projector's gradient; `names`: {ours: the reference's} of its layers."""
    reference.requires_grad_(False)
    theirs = dict(reference.model.multi_modal_projector.requires_grad_(True).named_parameters())
    choose_parts(model, "projector")
    for example in examples:
        batch = model.pack([(example.tiles, example.prompt)])
        ours = model(batch).detach()
        loss = accumulate_gradients(model, [example], 1).item()
        expected_loss, expected = reference_loss(reference, model, example, example.answer_tokens)
        assert (ours - expected).abs().max() < 1e-3
        each, each_expected = (F.cross_entropy(x, batch.targets, reduction="none") for x in (ours, expected))
        assert (each - each_expected).abs().max() < 1e-5 and abs(loss - expected_loss) < 1e-5
    for name, parameter in model.projector.named_parameters():
        layer, _, kind = name.rpartition(".")
        assert relative(parameter.grad, theirs[f"{names.get(layer, layer)}.{kind}".lstrip(".")].grad) < 1e-4, name


def test_logits_loss_and_gradients_equal_the_reference_around_the_projector(tiny):
    """Whatever its class: the reference has a copy of it."""
    assert_like_the_reference(tiny, reference_model(tiny), examples_of(tiny, mixed_rows(2), pages=2, max_tiles=4), {})


@pytest.mark.official
@pytest.mark.parametrize("source", ["receipts", "drawn pages"])
def test_logits_loss_and_gradients_equal_the_reference_at_1b_widths(wide, source):
    model = copy.deepcopy(wide)
    rows = open_rows(str(real("receipts")), "train") if source == "receipts" else mixed_rows(2)
    tiles = 2 if source == "receipts" else 1
    assert_like_the_reference(model, reference_model(model, whole=True), examples_of(model, rows, pages=1, max_tiles=tiles), PROJECTOR)


@pytest.fixture
def double(tiny):
    tiny.double()
    tiny.dtype = torch.float64
    choose_parts(tiny, "projector")
    tiny.double()
    return tiny


def gradient(model, pages):
    """(loss sum, projector gradient as one vector) of some (tiles, prompt) pages in one row."""
    model.zero_grad()
    loss = loss_of(model, pages)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.projector.parameters()])


def test_a_label_is_predicted_by_the_token_before_it_in_its_branch(tiny):
    example = examples_of(tiny, mixed_rows(1), pages=1, max_tiles=1)[0]
    batch = tiny.pack([(example.tiles, example.prompt)] * 2)
    branches = torch.cat(batch.branches)
    assert torch.equal(batch.ids[batch.answer_index + 1], batch.targets) and len(batch.targets) == 2 * example.answer_tokens
    assert torch.equal(branches[batch.answer_index], branches[batch.answer_index + 1])


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (7,), (3, 5), (1, 7, 2)])
def test_a_page_equals_separate_samples_in_float64(double, sizes):
    torch.manual_seed(sum(sizes))
    pages, singles = [], []
    for n in sizes:
        tiles = torch.randint(256, (1 + n % 3, 3, 128, 128), dtype=torch.uint8)
        asked = [(f"Question {'x' * (i * 5)}?", "answer " * (1 + i * i)) for i in range(n)]
        questions, answers = zip(*asked)
        pages.append((tiles, page_prompt(double.tokenizer, double.config.tokens_per_tile, [len(tiles)], questions, answers)[0]))
        singles += [(tiles, page_prompt(double.tokenizer, double.config.tokens_per_tile, [len(tiles)], [q], [a])[0]) for q, a in asked]
    loss, grad = gradient(double, pages)
    expected = [gradient(double, [single]) for single in singles]
    assert loss == pytest.approx(sum(l for l, _ in expected), rel=1e-10)
    assert relative(grad, sum(g for _, g in expected)) < 1e-10


def test_accumulation_equals_a_large_batch(tiny):
    choose_parts(tiny, "projector")
    rows = mixed_rows(16)
    for i, row in enumerate(rows):
        row["answers"] = ["long answer " * (i % 9) + "x"]                           # answers of very different lengths
    examples = examples_of(tiny, rows, pages=16, max_tiles=4)
    results = []
    for batch_pages in (1, 4, 16):
        tiny.zero_grad()
        loss = accumulate_gradients(tiny, examples, batch_pages).item()
        results.append((loss, torch.cat([p.grad.flatten() for p in tiny.projector.parameters()])))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert relative(grad, results[0][1]) < 1e-6
    tokens = sum(example.answer_tokens for example in examples)
    sums = [accumulate_gradients(tiny, [e], 1).item() * e.answer_tokens for e in examples]
    assert results[0][0] == pytest.approx(sum(sums) / tokens, rel=1e-6)             # of tokens, not of micro-batch means


@pytest.mark.parametrize("train, moved", [("projector", {"projector"}), ("llm", {"language"}), ("vision", {"vision"}),
                                          ("projector,llm", {"projector", "language"}),
                                          ("projector,llm,vision", {"projector", "language", "vision"})])
def test_only_what_trains_moves(tiny, train, moved):
    from argparse import Namespace
    choose_parts(tiny, train)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    optimizer = make_optimizer(tiny, Namespace(lr=1e-3, weight_decay=0.01, beta2=0.999, device="cpu"))
    for example in examples_of(tiny, mixed_rows(2), pages=2, max_tiles=4):
        accumulate_gradients(tiny, [example], 1)
        optimizer.step()
    changed = {name for name, tensor in tiny.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} == moved
    # every trained tensor moved, but the rows of words that did not occur, and key biases: softmax does not feel them
    assert all(name in changed for name in before if name.split(".")[0] in moved and not name.endswith("key.bias"))


def test_the_update_is_torchs_adamw_on_float32_weights(tiny):
    from argparse import Namespace
    tiny.to(torch.bfloat16)
    tiny.dtype = torch.bfloat16
    choose_parts(tiny, "projector")
    assert {p.dtype for p in tiny.projector.parameters()} == {torch.float32}
    assert {p.dtype for p in tiny.language.parameters()} == {torch.bfloat16}
    twin = copy.deepcopy(tiny.projector)
    ours = make_optimizer(tiny, Namespace(lr=1e-3, weight_decay=0.1, beta2=0.999, device="cpu"))
    theirs = torch.optim.AdamW([{"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.1},
                                {"params": [p for p in twin.parameters() if p.ndim == 1], "weight_decay": 0}], lr=1e-3)
    for example in examples_of(tiny, mixed_rows(2), pages=2, max_tiles=1):
        tiny.zero_grad()
        accumulate_gradients(tiny, [example], 1)
        for a, b in zip(tiny.projector.parameters(), twin.parameters()):
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(tiny.projector.parameters(), twin.parameters()))


def test_one_batch_overfits(tiny):
    from argparse import Namespace
    choose_parts(tiny, "projector,llm,vision")
    optimizer = make_optimizer(tiny, Namespace(lr=2e-3, weight_decay=0.0, beta2=0.999, device="cpu"))
    [example] = examples_of(tiny, mixed_rows(1), pages=1, max_tiles=1)
    for _ in range(60):
        loss = accumulate_gradients(tiny, [example], 1).item()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_image_tokens_and_tiles_must_agree(tiny):
    per_tile = tiny.config.tokens_per_tile
    prompt, _ = page_prompt(tiny.tokenizer, per_tile, [2], ["What?"], ["x"])
    with pytest.raises(ValueError, match=f"3 tiles make {3 * per_tile} image tokens, but the prompt has {2 * per_tile}"):
        tiny.pack([(torch.zeros(3, 3, 128, 128, dtype=torch.uint8), prompt)])


def test_a_page_without_images_is_read(tiny):
    prompt, _ = page_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [], ["What?", "Who?"], ["x", "y"])
    reference = reference_model(tiny)
    batch = tiny.pack([([], prompt)])
    with torch.no_grad():
        first = [i for i, b in enumerate(prompt.branches) if b < 2]
        expected = reference(input_ids=torch.tensor([prompt.ids])[:, first]).logits[0]
        torch.testing.assert_close(all_logits(tiny, batch)[first], expected, rtol=1e-4, atol=1e-4)


def test_a_page_is_seen_once_whatever_it_is_asked(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(type(tiny), "encode_images", lambda self, tiles, see=type(tiny).encode_images: seen.append(len(tiles)) or see(self, tiles))
    [example] = examples_of(tiny, mixed_rows(1), pages=1, max_tiles=4)
    loss_of(tiny, [(example.tiles, example.prompt)])
    assert seen == [len(example.tiles)] and len(example.page.questions) > 1


class Operations(TorchDispatchMode):
    """Notes the operations whose result the host reads, and the copies from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.read, self.copied = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.__name__.split(".")[0], function(*args, **(kwargs or {}))
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.read.append(name)
        sources = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        if isinstance(result, torch.Tensor) and any(tensor.device != result.device for tensor in sources):
            self.copied.append(sources[0].dtype)
        return result


@pytest.fixture
def light_examples(tiny):
    """Examples of 1, 3 and 2 tiles as a worker sends them."""
    choose_parts(tiny, "projector")
    dataset = PageDataset(tiny, 4)
    return [dataset.light(dataset[page]) for page in group_rows_into_pages(mixed_rows(3))]


def test_a_step_reads_nothing_from_the_device(tiny, light_examples):
    with Operations() as operations:
        accumulate_gradients(tiny, light_examples, 2)
    assert operations.read == []


def test_a_page_is_two_copies_its_tiles_and_its_numbers(tiny, light_examples):
    model = tiny.to("meta")                                     # a device whose tensors cannot be read: they have no contents
    normalize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device="meta"), torch.float32)     # constants are made once
    with Operations() as operations:
        accumulate_gradients(model, light_examples, 2)
    assert operations.read == [] and operations.copied == [torch.int64, torch.int64, torch.uint8, torch.uint8, torch.int64, torch.uint8]


def test_prompts_as_tensors_make_the_same_row(tiny):
    dataset = PageDataset(tiny, 4)
    examples = [dataset[page] for page in group_rows_into_pages(mixed_rows(3))]
    row, light = (tiny.pack([(e.tiles, e.prompt) for e in way]) for way in (examples, map(dataset.light, examples)))
    for name, value in vars(row).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: all(map(torch.equal, a, b)) if name == "branches" else a == b
        assert same(value, getattr(light, name)), name
    assert row.spans == [(e.prompt.branches.count(0), len(e.kept_questions)) for e in examples]
    assert [e.answer_tokens for e in examples] == [dataset.light(e).answer_tokens for e in examples]


def test_tiles_are_encoded_in_equal_parts(tiny, monkeypatch):
    sizes, encode = [], tiny.vision.forward
    monkeypatch.setattr(tiny.vision, "forward", lambda part, dtype: sizes.append(len(part)) or encode(part, dtype))
    tiles = torch.randint(256, (52, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        tokens = tiny.encode_images(tiles)
        assert sizes == [13, 13, 13, 13]
        torch.testing.assert_close(tokens[-64:], tiny.encode_images(tiles[-1:]), rtol=1e-4, atol=1e-5)
