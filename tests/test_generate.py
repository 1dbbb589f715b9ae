"""Greedy answers are the reference's, token by token; questions answered together are answered as if alone."""
import itertools

import pytest
import torch
from conftest import SHARED, real
from published import answered_pages
from reference import all_logits, conversation_prompt, page_prompt, reference_model, reference_pixels

from model import InternVL
from model.generate import generate, sample
from model.images import load_image
from model.tiling import tile_page
from model.tiny.pages import SHAPES


def answers(model, pages, count, **sampling):
    """The tokens of each open question."""
    return [[t for t in column if t is not None] for column in zip(*generate(model, pages, count, **sampling))]


def tiles_of(*numbers):
    generator = torch.Generator().manual_seed(sum(numbers))
    return [torch.randint(256, (n, 3, 128, 128), dtype=torch.uint8, generator=generator) for n in numbers]


def pages_of(model, questions, *numbers):
    """(tiles, prompt) of one page, every question a branch; and of the same questions asked alone."""
    tiles = torch.cat(tiles_of(*numbers))
    together = tiles, page_prompt(model.tokenizer, model.config.tokens_per_tile, numbers, questions)[0]
    alone = [(tiles, page_prompt(model.tokenizer, model.config.tokens_per_tile, numbers, [question])[0]) for question in questions]
    return together, alone


def reference_answer(reference, model, tiles, prompt, count):
    images = {"pixel_values": reference_pixels(tiles)} if len(tiles) else {}
    ids = torch.tensor([prompt.ids])
    out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                             eos_token_id=model.tokenizer.eos_token_id, pad_token_id=0, **images)
    return out[0, len(prompt.ids):].tolist()


@pytest.fixture(scope="module")
def wide_reference(wide):
    return reference_model(wide)


@pytest.mark.parametrize("case", ["one image", "12 tiles", "two images", "Chinese", "no image"])
def test_16_greedy_tokens_equal_the_reference_at_1b_widths(wide, wide_reference, case):
    if SHARED.exists():
        from data import group_rows_into_pages
        from extras.sources import open_rows
        images = [load_image(page.images[0]) for page, _ in zip(group_rows_into_pages(open_rows(str(real("receipts")), "validation")), range(2))]
    else:
        from PIL import Image
        images = [Image.effect_noise(size, 90) for size in ((619, 1475), (900, 1200))]
    question = "这张收据的总金额是多少？" if case == "Chinese" else "What is the total amount?"
    images = {"no image": [], "two images": images}.get(case, images[:1])
    tiles = [tile_page(image, 12 if case == "12 tiles" else 1) for image in images]
    if case == "12 tiles":
        tiles = [tile_page(images[0].resize((1200, 900)), 12)]
        assert len(tiles[0]) == 13
    prompt = conversation_prompt(wide.tokenizer, wide.config.tokens_per_tile, [len(t) for t in tiles], [(question, None)])
    stacked = torch.cat([torch.from_numpy(t) for t in tiles]) if tiles else []
    assert answers(wide, [(stacked, prompt)], 16) == [reference_answer(wide_reference, wide, stacked, prompt, 16)]


def test_a_batch_of_8_pages_of_different_sizes_equals_the_reference(tiny):
    """Each page alone in the reference, all together here; also two images, and none."""
    sizes = [[1], [3], [5], [2, 1], [], [4], [7], [1, 1]]
    pages = [(torch.cat(tiles_of(*numbers)) if numbers else [],
              conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, numbers, [("What is " + "it, " * i + "then?", None)])) for i, numbers in enumerate(sizes)]
    reference, end = reference_model(tiny), tiny.tokenizer.eos_token_id
    expected = [reference_answer(reference, tiny, tiles, prompt, 12) for tiles, prompt in pages]
    assert answers(tiny, pages, 12) == [answer[:answer.index(end) + 1] if end in answer else answer for answer in expected]


def test_branches_answered_together_equal_each_alone(tiny):
    together, alone = pages_of(tiny, ["A?", "Which of them is it?", "<img>?"], 2)
    assert answers(tiny, [together], 12) == [answers(tiny, [page], 12)[0] for page in alone]


def test_a_batch_of_pages_equals_each_alone(tiny):
    pages = [pages_of(tiny, ["A?", "And B?"], 1)[0], pages_of(tiny, ["What?"], 3)[0]]
    pages.append(([], conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [], [("No image?", None)])))
    assert answers(tiny, pages, 12) == [answer for page in pages for answer in answers(tiny, [page], 12)]


def test_cached_decoding_equals_reading_everything_again(tiny):
    tiles, prompt = tiles_of(2)[0], conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [2], [("What?", None)])
    [tokens] = answers(tiny, [(tiles, prompt)], 10)
    again = []
    with torch.no_grad():
        for _ in tokens:
            logits = all_logits(tiny, tiny.pack([(tiles, prompt)]))[-1]
            again.append(logits.argmax().item())
            for column, value in zip((prompt.ids, prompt.labels, prompt.positions, prompt.branches),
                                     (again[-1], -100, len(prompt.ids), 0)):
                column.append(value)
    assert tokens == again


def test_generation_ends_with_the_end_of_turn(tiny, monkeypatch):
    end = tiny.tokenizer.eos_token_id
    together, _ = pages_of(tiny, ["A?", "B?"], 1)
    monkeypatch.setattr("model.generate.sample", lambda logits, *_: torch.zeros(len(logits), dtype=torch.int64))
    assert answers(tiny, [together], 5) == [[0] * 5] * 2
    steps = iter([[end, 0], [end]])
    monkeypatch.setattr("model.generate.sample", lambda *_: torch.tensor(next(steps)))
    assert list(generate(tiny, [together], 5)) == [[end, 0], [None, end]]


def test_sampling_draws_from_the_likeliest_tokens_of_probability_top_p():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).log_softmax(-1).expand(4000, 4)
    generators = [torch.Generator().manual_seed(0)] * 4000
    everything = sample(logits, 1.0, 1.0, generators).bincount(minlength=4) / 4000
    torch.testing.assert_close(everything, logits[0].exp(), atol=0.03, rtol=0)
    two = sample(logits, 1.0, 0.8, generators).bincount(minlength=4)         # 0.64 + 0.24 reach 0.8
    assert two[2:].sum() == 0 and two[1] > 0
    assert sample(logits, 1.0, 0.01, generators).unique().tolist() == [0]
    hot = sample(logits, 100.0, 1.0, generators).bincount(minlength=4) / 4000
    assert (hot - 0.25).abs().max() < 0.03


def test_answers_are_the_same_when_the_tiles_were_seen_before(tiny):
    together, _ = pages_of(tiny, ["A?", "Which?"], 2)
    with torch.no_grad():
        seen = tiny.encode_images(together[0])
    assert answers(tiny, [together], 8, image_tokens=seen) == answers(tiny, [together], 8)


def test_a_seed_gives_the_same_draw_again(tiny):
    together, _ = pages_of(tiny, ["A?", "B?"], 1)
    first = answers(tiny, [together], 8, temperature=1.0, seed=3)
    assert first == answers(tiny, [together], 8, temperature=1.0, seed=3)
    assert first != answers(tiny, [together], 8, temperature=1.0, seed=4)


def test_a_drawn_answer_does_not_depend_on_its_company(tiny):
    together, alone = pages_of(tiny, ["A?", "Which?", "And B?"], 1)
    assert answers(tiny, [together], 8, temperature=1.0, seed=5) == [answers(tiny, [page], 8, temperature=1.0, seed=5)[0] for page in alone]


@pytest.mark.official
def test_a_model_that_reads_answers_like_the_reference_rightly_and_ends(published):
    """With trained weights an answer has a meaning and an end; each of several pages' questions is right and its own."""
    model = InternVL.from_pretrained("tiny", "cpu")
    reference, pages, truths = reference_model(model, whole=True), [], []
    for _, _, tiles, asked in itertools.islice(answered_pages(model, SHAPES[0]), 5):
        pages.append((tiles, page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [question for question, _ in asked])[0]))
        truths += [truth for _, truth in asked]
        for question, truth in asked[:2]:
            alone = page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [question])[0]
            expected = reference_answer(reference, model, tiles, alone, 30)
            assert answers(model, [(tiles, alone)], 30) == [expected] and expected[-1] == model.tokenizer.eos_token_id
    found = answers(model, pages, 30)
    texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
    assert sum(text == truth for text, truth in zip(texts, truths)) >= len(truths) - 1 and len(truths) > 8
    assert all(tokens[-1] == model.tokenizer.eos_token_id for tokens in found)
