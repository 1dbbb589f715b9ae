"""The tiles drawn are the tiles read; the weights of attention are those that the model uses."""
import itertools
import random

import pytest
import torch
from PIL import Image, ImageChops
from published import answered_pages
from reference import page_prompt, reference_model, reference_pixels

from data import Page, PageDataset
from extras.explain import token_colors
from extras.pictures import EDGE, attention, draw_attention, draw_tiles, runs_of_tokens, show_example
from model import InternVL
from model.tiny.pages import CELL, SHAPES, write_page


def test_the_tiles_drawn_are_the_tiles_read(tiny):
    chat = tiny.chat()
    chat.add_image(Image.effect_noise((300, 200), 90))
    [picture] = chat.pictures
    drawn = draw_tiles(chat.pictures, 64)
    assert picture.grid == (3, 2) and len(picture.tiles) == 7 and drawn.size == (4 * 128 + 5 * EDGE, 2 * 128 + 4 * EDGE)
    for i, (column, row) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]):
        x, y = EDGE + (128 + EDGE) * column, EDGE + (128 + EDGE) * row
        inside, read = drawn.crop((x, y, x + 128, y + 128)), Image.fromarray(picture.tiles[i].transpose(1, 2, 0))
        assert ImageChops.difference(inside, read).getbbox() is None


def test_several_images_are_drawn_below_each_other(tiny):
    chat = tiny.chat()
    for size in ((300, 200), (128, 128)):
        chat.add_image(Image.effect_noise(size, 90))
    whole, parts = draw_tiles(chat.pictures, 64), [draw_tiles([picture], 64) for picture in chat.pictures]
    assert whole.size == (parts[0].width, parts[0].height + parts[1].height)
    assert whole.crop((0, parts[0].height, parts[1].width, whole.height)).tobytes() == parts[1].tobytes()


def test_tokens_in_the_loss_stand_in_brackets_and_on_a_terminal_in_color(tiny, monkeypatch):
    prompt, _ = page_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [1], ["What?\x1b[2J"], ["你\u202e!"])
    at = range(len(prompt.ids))
    text = "|".join(runs_of_tokens(prompt, at, tiny.tokenizer))
    assert f"<IMG_CONTEXT> x {tiny.config.tokens_per_tile}" in text and text.count("[") == 2 and text.endswith("[你|\N{REPLACEMENT CHARACTER}|!|<|im_end|>]")
    assert "\x1b" not in text and "?|\N{REPLACEMENT CHARACTER}|[|2|J" in text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "|".join(runs_of_tokens(prompt, at, tiny.tokenizer)) == text.replace("[你", "\033[1;32m[你").replace("|>]", "|>]\033[0m")


def test_turns_that_follow_each_other_are_shown_as_one_conversation(tiny, tmp_path, capsys):
    dataset = PageDataset(tiny)
    show_example(dataset[Page("p", [], ["A?", "B?"], ["a", "b"], follows={1})], dataset, tmp_path / "none.png")
    out = capsys.readouterr().out
    assert "\nconversation 1 of 1: " in out and "[a|<|im_end|>]" in out and "[b|<|im_end|>]" in out


def test_attention_is_what_the_reference_tells(tiny):
    chat = tiny.chat(max_new_tokens=6)
    chat.ask("What is it?", Image.effect_noise((200, 100), 90))
    reference = reference_model(tiny)
    reference.set_attn_implementation("eager")
    ids = [key if isinstance(key, int) else reference.config.image_token_id for key in chat.held]
    with torch.no_grad():
        weights = reference(input_ids=torch.tensor([ids]), pixel_values=reference_pixels(chat.pictures[0].tiles), output_attentions=True).attentions
    places = [i for i, key in enumerate(chat.held) if not isinstance(key, int)]
    expected = torch.stack(weights)[:, 0].mean(dim=(0, 1))[-6:].mean(dim=0)[places]
    torch.testing.assert_close(attention(chat), expected, rtol=1e-4, atol=1e-6)
    tokens = chat.report["tokens"]
    chat.ask("And now?")                                                    # looking changed nothing in the cache
    assert len(tokens) == 6 and chat.read < 60


@pytest.mark.official
def test_the_embedded_model_looks_where_the_answer_stands(published):
    """Over pages of one tile that it answers, the value's row is looked at more than the mean row."""
    chat, more = InternVL.from_pretrained("tiny", "cpu").chat(), []
    side = SHAPES[0][0] // CELL
    for seed, page, _, [(question, answer), *_] in itertools.islice(answered_pages(chat.model, SHAPES[0]), 8):
        sheet, _ = write_page(random.Random(f"test {seed}"), "plain", SHAPES[0], unseen=True)
        chat.clear()
        assert chat.ask(question, page) == answer
        heat = attention(chat).reshape(side, side).sum(dim=1)
        [(y, size), *_] = [(y, size) for _, y, text, _, size in sheet.runs if answer in text]
        more.append((heat[int((y - 0.33 * size) // CELL)] / heat.mean()).item())
    assert len(more) == 8 and sum(more) / len(more) > 1.5


def test_the_heat_lies_on_the_page(tiny):
    page = Image.new("L", (256, 128), 255)
    chat = tiny.chat(max_new_tokens=4)
    chat.ask("What?", page, Image.new("L", (128, 128), 255))
    drawn = draw_attention(chat)
    assert drawn.size == (256, 256) and drawn.mode == "RGB" and CELL * 8 == 128
    red, _, blue = drawn.crop((0, 0, 256, 128)).split()
    assert ImageChops.subtract(red, blue).getbbox()


def test_image_tokens_need_not_form_a_square(tiny):
    page = Image.new("L", (256, 128), 255)
    chat = tiny.chat(max_new_tokens=2)
    chat.ask("What?", page)
    for grid in ((4, 16), (1, 1)):                                      # (1, 1): tokens without places, the tile is one cell
        tiny.projector.token_grid = grid
        assert draw_attention(chat).size == page.size
        assert token_colors(chat.pictures[0].tokens[:64], grid[0]).size == (64 // grid[0], grid[0])
