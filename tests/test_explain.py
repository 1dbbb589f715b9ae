"""The explanation tells this run's own numbers, in one file that fetches nothing."""
import base64
import html.parser
import io
import random
import re

import pytest
import torch
from PIL import Image

from commands import call, infer, refuses
from model import InternVL
from model.explain import explain
from model.prompt import NOT_LEARNED, page_prompt
from model.tiling import tile_page
from model.tiny.pages import SHAPES, draw_page


class Reader(html.parser.HTMLParser):
    """Collects tags, their attributes and the text of tokens; notes tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tokens, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["small"] and re.fullmatch(r"\d+, \d+(-\d+)?", data):
            self.tokens.append(data)


@pytest.fixture(scope="module")
def explained():
    model = InternVL.from_pretrained("tiny", "cpu")
    page, asked = draw_page(random.Random("test 3"), shape=SHAPES[2])
    return model, page, asked[0], *explain(model, page, asked[0][0])


def test_it_is_one_file_that_fetches_nothing(explained):
    reader = Reader(explained[3])
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe")
        assert all(value.startswith("data:image/png;base64,") for name, value in attributes.items() if name in ("src", "href"))
    pictures = [attributes["src"].partition(",")[2] for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 1 + 5 + 2                                           # page, tiles with thumbnail, patches and image tokens
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).size > (0, 0) for picture in pictures)


def test_its_tokens_are_the_prompts(explained):
    model, page, (question, truth), text, answer = explained
    assert answer == truth
    prompt, _ = page_prompt(model.tokenizer, 64, [5], [question], [answer])
    told = [re.match(r"(\d+), (\d+)", token).groups() for token in Reader(text).tokens]
    first_of_images = prompt.ids.index(261)
    expected = [(str(i), str(p)) for n, (i, p) in enumerate(zip(prompt.ids, prompt.positions)) if i != 261 or n == first_of_images]
    assert told == expected
    assert text.count("class='token learned'") == 1 + sum(label != NOT_LEARNED for label in prompt.labels)


def test_its_probabilities_are_the_models(explained):
    model, page, (question, _), text, answer = explained
    tiles = torch.from_numpy(tile_page(page, tile_pixels=128))
    prompt, _ = page_prompt(model.tokenizer, 64, [5], [question], [answer])
    with torch.no_grad():
        logits = model.language.head(model.read(model.pack([(tiles, prompt)])))
    places = [i - 1 for i, label in enumerate(prompt.labels) if label != NOT_LEARNED]
    expected = [f"{100 * p:5.1f} %" for place in places for p in logits[place].softmax(-1).topk(5).values.tolist()]
    assert re.findall(r"<td>([ \d.]+ %)</td>", text) == expected


def test_the_command_writes_it(tmp_path, capsys, monkeypatch):
    page, asked = draw_page(random.Random("test 4"), shape=SHAPES[0])
    page.save(tmp_path / "page.png")
    flags = "--tiny", "--image", tmp_path / "page.png", "--explain"
    assert call(infer, capsys, monkeypatch, *flags, tmp_path / "out.html", asked[0][0])[:2] == (0, asked[0][1] + "\n")
    assert Reader((tmp_path / "out.html").read_text(encoding="utf-8")).tokens
    assert "cannot be written" in refuses(infer, capsys, monkeypatch, *flags, tmp_path / "no" / "out.html", "What?")
    assert "about one --image" in refuses(infer, capsys, monkeypatch, "--tiny", "--explain", "x.html", "What?")


def test_what_a_user_typed_is_text(explained):
    model, page, *_ = explained
    text, _ = explain(model, page, "<script>alert(1)</script><img src=x>", max_new_tokens=2)
    assert all(tag != "script" for tag, _ in Reader(text).tags) and "&lt;script&gt;" in text
