"""The explanation tells this run's own numbers, in one file that fetches nothing."""
import base64
import html
import html.parser
import io
import math
import random
import re

import draw_explain
import pytest
import torch
from commands import call, infer, refuses
from conftest import ROOT
from PIL import Image, ImageChops, ImageStat
from published import answered_pages
from reference import all_logits, page_prompt

from extras.explain import explain, follow
from model import InternVL
from model.prompt import IGNORE_INDEX
from model.tiling import tile_page
from model.tiny.pages import SHAPES, TILE, draw_page


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
    page, [(question, _), *_] = draw_page(random.Random("test 0"), shape=SHAPES[1])
    return model, page, question, *explain(model, page, question, max_new_tokens=12)


def test_it_is_one_file_that_fetches_nothing(explained):
    reader = Reader(explained[3])
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe")
        assert all(value.startswith("data:image/png;base64,") for name, value in attributes.items() if name in ("src", "href"))
    pictures = [attributes["src"].partition(",")[2] for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 5                               # page, tiles with thumbnail, patches, image tokens, where it looked
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).size > (0, 0) for picture in pictures)


@pytest.mark.official
def test_its_tokens_are_the_prompts(explained):
    model, page, question, text, answer = explained
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [3], [question], [answer])
    told = [re.match(r"(\d+), (\d+)", token).groups() for token in Reader(text).tokens]
    first_of_images = prompt.ids.index(261)
    expected = [(str(token), str(position)) for i, (token, position) in enumerate(zip(prompt.ids, prompt.positions))
                if token != 261 or i == first_of_images]
    assert told == expected
    assert text.count("class='token loss'") == 1 + sum(label != IGNORE_INDEX for label in prompt.labels)


def test_its_probabilities_are_the_models(explained):
    model, page, question, text, answer = explained
    tiles = torch.from_numpy(tile_page(page, tile_pixels=TILE))
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [3], [question], [answer])
    with torch.no_grad():
        logits = all_logits(model, model.pack([(tiles, prompt)]))
    places = [i - 1 for i, label in enumerate(prompt.labels) if label != IGNORE_INDEX]
    likely = logits[places].softmax(-1)
    best = likely.topk(5).values.flatten().tolist()
    bars, told = zip(*re.findall(r"width='([\d.]+)' height='11' fill='#\w+'/><text class='p'[^>]*>([^<]+)<", text))
    assert [float(bar) for bar in bars] == pytest.approx([220 * p for p in best], abs=0.06)
    assert [html.unescape(p) for p in told] == ["< 0.1 %" if p < 0.0005 else "> 99.9 %" if p >= 0.9995 else f"{100 * p:.1f} %"
                                               for p in best]
    loss = -likely[range(len(places)), [prompt.ids[i + 1] for i in places]].log().mean().item()
    assert float(re.search(r"here ([\d.]+)\.</p>", text)[1]) == pytest.approx(loss, abs=1e-4)


@pytest.mark.official
def test_every_step_tells_its_shapes_and_its_file(explained):
    model, page, question, text, answer = explained
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [3], [question], [answer])
    tokens, length, answered = model.config.tokens_per_tile, len(prompt.ids), sum(label != IGNORE_INDEX for label in prompt.labels)
    side, wide, seen = math.isqrt(tokens), model.config.language.width, model.config.vision.width
    translation = ("You are Shusheng, a multimodal large model developed by Shanghai AI Laboratory and SenseTime; your English name is InternVL, "
                   "and you are a helpful and harmless AI assistant.")        # of the Chinese system sentence
    assert translation in " ".join(text.split())
    told = re.findall(r"<code>\(([\d, ]+)\)</code>", text)
    assert told == [f"3, 3, {TILE}, {TILE}"] * 2 + [f"3, {4 * tokens}, {seen}"] * 2 + [f"3, {tokens}, {wide}", f"{length}, {wide}", f"{answered}, {wide}", f"{answered}, 288"]
    assert f"2 x 2 neighboring patches are joined to {4 * seen} numbers" in text and f"shows the {side} x {side} tokens of" in text
    files = [re.findall(r"<code>([\w/]+\.py)</code>", where) for where in re.findall(r"<p class='where'>(.*?)</p>", text)]
    assert len(files) == text.count("<h2>") and all(files)
    assert all((ROOT / name).exists() for names in files for name in names)


def test_what_is_explained_is_what_the_chat_read(explained):
    """Also where the question says itself where the image belongs."""
    model, page, question, *_ = explained
    for asked in (question, f"See <image> and tell: {question}"):
        run = follow(model, page, asked, max_new_tokens=8)
        read = [key if isinstance(key, int) else 261 for key in run.chat.held]
        assert run.prompt.ids[:len(read)] == read and 0 < run.looked.sum() < 1


@pytest.mark.official
def test_an_answer_that_is_right_can_be_followed(published):
    """About a page with a thumbnail if the weights answer one of a few, else about one of a single tile."""
    model = InternVL.from_pretrained("tiny", "cpu")
    found = (page for shape in (SHAPES[1], SHAPES[0]) for page in answered_pages(model, shape, most=8))
    _, page, tiles, [(question, truth), *_] = next(found)
    text, answer = explain(model, page, question)
    assert answer == truth and f"<code>({len(tiles)}, 3, {TILE}, {TILE})</code>" in text


@pytest.mark.official
def test_the_readmes_pictures_are_drawn_anew(published, tmp_path):
    """Sizes are exact. Pixels are not: Pillow's builds smooth text differently, and processors differ in a sum's last bits,
    which `byte()` can turn into a step of colour and rounding into another digit of a percentage."""
    run = draw_explain.draw(tmp_path)
    section = (ROOT / "model" / "README.md").read_text(encoding="utf-8").split("## One page, followed")[1].split("\n## ")[0]
    start = run.prompt.branches.index(1)
    tiles = len(run.picture.tiles)
    for told in (run.chat.turns[0].answer, f"{tiles} tiles", f"tile {run.tile + 1} in", f"{tiles * run.chat.model.config.vision.grid ** 2:,} patches",
                 f"{tiles * run.chat.model.config.tokens_per_tile} image tokens", f"{len(run.prompt.ids)} tokens in a row", f"0 to {start - 1}",
                 f"{len(run.in_loss)} of the"):
        assert told in section, told
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "assets").glob("explain_*"))
    for name in drawn:
        if name.endswith(".png"):
            new, old = Image.open(tmp_path / name), Image.open(ROOT / "assets" / name)
            assert (new.size, new.mode) == (old.size, old.mode), name
            assert max(ImageStat.Stat(ImageChops.difference(new, old)).mean) < 2, name      # of 255
    new, old = ((folder / "explain_answer.svg").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "assets"))
    assert re.match("<svg[^>]*>", new)[0] == re.match("<svg[^>]*>", old)[0]
    assert re.findall("position [^<]*", new) == re.findall("position [^<]*", old)
    bars = [re.findall(r"'>([^<]*)</text><rect[^>]* width='([\d.]+)'", text) for text in (new, old)]
    for (token, bar), (old_token, old_bar) in zip(*bars, strict=True):
        assert float(bar) == pytest.approx(float(old_bar), abs=2.2)                     # one of a hundred
        assert token == old_token or float(old_bar) < 2.2                               # unlikely ones may change places


@pytest.mark.official
def test_the_command_writes_it(published, tmp_path, capsys, monkeypatch):
    _, page, _, [(question, truth), *_] = next(answered_pages(InternVL.from_pretrained("tiny", "cpu"), SHAPES[0]))
    page.save(tmp_path / "page.png")
    flags = "--tiny", "--image", tmp_path / "page.png", "--explain"
    assert call(infer, capsys, monkeypatch, *flags, tmp_path / "out.html", question)[:2] == (0, truth + "\n")
    assert Reader((tmp_path / "out.html").read_text(encoding="utf-8")).tokens
    assert "there is no folder" in refuses(infer, capsys, monkeypatch, *flags, tmp_path / "no" / "out.html", "What?")
    assert "about one --image" in refuses(infer, capsys, monkeypatch, "--tiny", "--explain", "x.html", "What?")


def test_what_a_user_typed_is_text(explained):
    model, page, *_ = explained
    text, _ = explain(model, page, "<script>alert(1)</script><img src=x>", max_new_tokens=2)
    assert all(tag != "script" for tag, _ in Reader(text).tags) and "&lt;script&gt;" in text
