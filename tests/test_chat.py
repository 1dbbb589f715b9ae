"""A conversation whose past is kept answers as one that is read anew each time; nothing is read or seen twice."""
import random

import pytest
import torch
from PIL import Image
from reference import conversation_prompt, reference_model
from test_generate import reference_answer

from model import InputError
from model.chat import decode
from model.generate import generate
from model.tiling import tile_page


def noise(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def anew(model, pictures, turns, count, images=None):
    """The answer's tokens when the whole conversation is read in one piece."""
    tiles = [tile_page(picture, 12, 128) for picture in pictures]
    prompt = conversation_prompt(model.tokenizer, model.config.tokens_per_tile, [len(t) for t in tiles], turns, images)
    stacked = torch.cat([torch.from_numpy(t) for t in tiles]) if tiles else []
    return [step[0] for step in generate(model, [(stacked, prompt)], count)]


def test_every_turn_equals_reading_the_conversation_anew(tiny):
    page, other = noise(256, 256), noise(128, 384, 1)
    chat, turns = tiny.chat(max_new_tokens=9), []
    for question, images in (("What is it?", [page]), ("这是什么？", []), ("And this?", [other]), ("Which <image> is it?", [])):
        chat.ask(question, *images)
        placed = ("<image>\n" if not turns else "Image-2: <image>\n") * len(images) + question
        assert chat.report["tokens"] == anew(tiny, [page, other][:len(chat.pictures)], [*turns, (placed, None)], 9,
                                             [1, 0, 1, 0][:len(turns) + 1])
        turns.append((placed, chat.report["answer"]))
    assert chat.report["tiles"] == [5, 4] and [turn.question for turn in chat.turns] == [question for question, _ in turns]


def test_turn_3_equals_the_reference_token_by_token(wide):
    """At InternVL2-1B's widths; the reference reads the whole conversation."""
    chat, page = wide.chat(max_new_tokens=8, max_tiles=2), noise(300, 200)
    reference = reference_model(wide)
    for question in ("What is the total amount?", "And the date?", "还有什么？"):
        chat.ask(question, *([] if chat.turns else [page]))
    tiles = torch.from_numpy(tile_page(page, 2))
    turns = [(turn.question, turn.answer) for turn in chat.turns]
    prompt = conversation_prompt(wide.tokenizer, wide.config.tokens_per_tile, [len(tiles)], [*turns[:2], (turns[2][0], None)], [1, 0, 0])
    assert chat.report["tokens"] == reference_answer(reference, wide, tiles, prompt, 8)


def test_a_turn_reads_its_own_tokens_only_and_sees_no_tile_twice(tiny, monkeypatch):
    seen = []
    see = tiny.encode_images
    monkeypatch.setattr(tiny, "encode_images", lambda tiles: seen.append(len(tiles)) or see(tiles))
    chat = tiny.chat(max_new_tokens=5)
    chat.ask("What?", noise(256, 256))
    first = chat.read
    chat.ask("And the other?")
    assert first > 5 * tiny.config.tokens_per_tile and chat.read < 64 and seen == [5]
    chat.undo()
    chat.undo()
    chat.ask("Which?")                              # the image waited for this question; its prefix is in the cache
    assert chat.read < 40 and seen == [5] and chat.report["tiles"] == [5]


def test_undo_takes_one_turn_back_and_its_images_wait(tiny):
    chat, page = tiny.chat(max_new_tokens=6), noise(128, 128)
    first = chat.ask("A?", page)
    for question, images in (("B?", ()), ("C?", (noise(128, 128, 1),))):
        chat.ask(question, *images)
        chat.undo()
    assert len(chat.waiting) == 1 and [turn.answer for turn in chat.turns] == [first]
    chat.undo()
    assert len(chat.waiting) == 2 and not chat.turns
    with pytest.raises(InputError, match="no question to take back"):
        chat.undo()
    chat.clear()
    assert not chat.pictures
    chat.ask("A?", page)
    assert chat.turns[0].answer == first


@pytest.mark.parametrize("asked_for", [0, 1, 3])
def test_an_answer_that_was_stopped_is_part_of_the_conversation(tiny, asked_for):
    page = noise(128, 128)
    chat = tiny.chat(max_new_tokens=40)
    pieces = chat.stream("Say something long", page)
    for _ in range(asked_for):
        next(pieces)
    pieces.close()
    assert len(chat.turns) == (asked_for > 0)
    said = [(turn.question, turn.answer) for turn in chat.turns]
    if not asked_for:
        chat.add_image(page)                        # nothing was answered: the image was not taken either
    chat.ask("And now?", max_new_tokens=7)
    assert chat.report["tokens"] == anew(tiny, [page], [*said, (chat.turns[-1].question, None)], 7)


def test_an_interruption_inside_a_layer_leaves_the_conversation_whole(tiny, monkeypatch):
    page = noise(128, 128)
    chat = tiny.chat(max_new_tokens=7)
    first = chat.ask("A?", page)
    block, calls = tiny.language.blocks[-1].forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return block(*arguments)
    monkeypatch.setattr(tiny.language.blocks[-1], "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("B?")
    assert len(chat.turns) == 2 and len(chat.report["tokens"]) == 3
    chat.ask("C?")
    assert chat.report["tokens"] == anew(tiny, [page], [("<image>\nA?", first), ("B?", chat.turns[1].answer), ("C?", None)], 7)


def test_text_is_shown_when_its_characters_are_whole(tiny, monkeypatch):
    tokens = tiny.tokenizer("你 é😀").input_ids                        # one token a byte
    monkeypatch.setattr("model.chat.generate", lambda *_, **__: ([token] for token in tokens))
    chat = tiny.chat()
    assert list(chat.stream("?")) == ["你", " é", "😀"]
    assert chat.report["answer"] == decode(tiny, tokens) == "你 é😀"
    monkeypatch.setattr("model.chat.generate", lambda *_, **__: ([token] for token in tokens[:-1]))
    assert list(chat.stream("?"))[-1] == "\N{REPLACEMENT CHARACTER}"        # cut off inside a character: said at the end


def test_settings_are_the_conversations_or_one_questions(tiny):
    chat = tiny.chat(max_new_tokens=3, temperature=1.0, seed=1)
    chat.ask("A?")
    drawn = chat.report["tokens"]
    chat.undo()
    chat.ask("A?", seed=2, max_new_tokens=4)
    assert len(chat.report["tokens"]) == 4 and chat.report["tokens"][:3] != drawn
    chat.undo()
    chat.ask("A?")
    assert chat.report["tokens"] == drawn


@pytest.mark.parametrize("question, images, message", [
    ("", 0, "the question is empty"), (" \n", 1, "the question is empty"),
    ("word " * 10_000, 0, "exceed the model's 2048"), ("What?", None, "exceed the model's 2048"),
    ("<image>?", 2, "2 images, but 1 <image>")])
def test_a_question_that_cannot_be_asked_changes_nothing(tiny, question, images, message):
    chat = tiny.chat(max_new_tokens=5)
    images = 2048 // tiny.config.tokens_per_tile + 1 if images is None else images
    chat.ask("A?")
    with pytest.raises(InputError, match=message):
        chat.ask(question, *[noise(128, 128)] * images)
    assert len(chat.turns) == 1 and not chat.waiting
