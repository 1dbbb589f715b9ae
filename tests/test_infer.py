"""The answer, alone, on standard output; the same answer one by one and many at once; one line for every mistake."""
import errno
import http.server
import json
import random
import subprocess
import sys
import threading

import pytest
from commands import call, infer, refuses
from conftest import ROOT
from PIL import Image
from reference import conversation_prompt
from small_data import mixed_rows, write_dataset, write_split

from data import group_rows_into_pages
from extras import evaluate
from extras.score import SCORES
from extras.video import load_images
from model.chat import decode
from model.generate import generate
from model.images import load_image
from model.tiling import tile_page
from model.tiny.pages import draw_page


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def page(tmp_path):
    """A drawn page of 2 x 2 tiles in a file."""
    draw_page(random.Random(0), shape=(256, 256))[0].save(tmp_path / "page.png")
    return tmp_path / "page.png"


@pytest.fixture
def ask(folder, capsys, monkeypatch):
    def run(*flags, stdin=""):
        status, out, err = call(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", "--max-new-tokens", 6, *flags, stdin=stdin)
        assert status == 0, err
        return out
    return run


def test_json_says_what_was_read_and_answered(ask, page, tiny):
    result = json.loads(ask("--image", page, "--json", "What is the total?"))
    assert list(result)[:7] == ["question", "answer", "tokens", "tiles", "prompt_tokens", "prefill_seconds", "decode_tokens_per_second"]
    tiles = tile_page(load_image(str(page)), 12, 128)
    prompt = conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [5], [("What is the total?", None)])
    tokens = [step[0] for step in generate(tiny, [(tiles, prompt)], 6)]
    assert result["tokens"] == tokens and result["tiles"] == [5] and result["prompt_tokens"] == len(prompt.ids)
    assert result["answer"] == tiny.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert result["question"] == "What is the total?" and result["prefill_seconds"] > 0


def test_standard_output_is_the_answer_alone(ask, page):
    answer = json.loads(ask("--image", page, "--json", "What is the date?"))["answer"]
    assert ask("--image", page, "What is the date?") == answer + "\n"


def test_without_an_image_a_remark_says_so(folder, page, capsys, monkeypatch):
    flags = ("--model", folder, "--device", "cpu", "--max-new-tokens", 2, "What is the date?")
    status, answer, err = call(infer, capsys, monkeypatch, *flags)
    assert (status, err) == (0, "no image: text only\n") and answer
    assert call(infer, capsys, monkeypatch, "--image", page, *flags)[2] == ""


@pytest.mark.parametrize("flags", [("What", "is it?"), ("What", "--json", "is it?"), ("--image", "x.png", "What", "is", "it?")])
def test_two_questions_are_one_line(capsys, monkeypatch, flags):
    assert "give one QUESTION, in quotes, or use --questions FILE" in refuses(infer, capsys, monkeypatch, *flags)
    assert "unrecognized arguments: --imge" in refuses(infer, capsys, monkeypatch, "--imge", "x.png", *flags)


def test_images_and_tiles_are_counted(ask, page):
    result = json.loads(ask("--image", page, "--image", page, "--max-tiles", 1, "--json", "<image> or <image>?"))
    assert result["tiles"] == [1, 1]
    assert json.loads(ask("--json", "No image?"))["tiles"] == []


def test_a_seed_draws_the_same_answer_again(ask, page):
    def drawn(seed):
        return json.loads(ask("--image", page, "--temperature", 1.5, "--seed", seed, "--json", "What?"))["tokens"]
    assert drawn(1) == drawn(1) != drawn(2)


def test_lines_from_standard_input_are_a_chat(ask, page, tiny):
    first, second = ask("--image", page, stdin="What is the date?\n\nAnd the <image> total?\n").splitlines()
    assert first == ask("--image", page, "What is the date?").strip("\n")
    tiles = tile_page(load_image(str(page)), 12, 128)
    prompt = conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, [5], [("<image>\nWhat is the date?", first), ("And the <image> total?", None)])      # a later <image> is text
    tokens = [step[0] for step in generate(tiny, [(tiles, prompt)], 6)]
    assert second == decode(tiny, tokens)


def test_commands_change_the_conversation(ask, page, tmp_path):
    """Lines that begin with /word are commands, from a terminal and from standard input alike."""
    Image.effect_noise((128, 128), 90).save(tmp_path / "other.png")
    lines = [f"/image {page}", "What?", f"/image {tmp_path}/other.png", "And this?", "/undo", "And this?", "/clear", "What?",
             "/settings max_new_tokens 2", "/etc/hosts?"]
    results = [json.loads(line) for line in ask("--json", stdin="\n".join(lines)).splitlines()]
    assert [result["tiles"] for result in results] == [[5], [5, 1], [5, 1], [], []]
    assert results[1]["tokens"] == results[2]["tokens"] and results[0]["tokens"] == json.loads(ask("--json", "--image", page, "What?"))["tokens"]
    assert results[3]["tokens"] == json.loads(ask("--json", "What?"))["tokens"]
    assert len(results[4]["tokens"]) == 2 and results[4]["question"] == "/etc/hosts?"


def test_int8_answers_too(ask, page):
    assert json.loads(ask("--image", page, "--int8", "--json", "What?"))["tokens"]


def test_a_video_is_shown_frame_by_frame(ask, tmp_path):
    frames = [Image.effect_noise((90, 100), 90) for _ in range(20)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    whole = json.loads(ask("--video", tmp_path / "clip.gif", "--json", "What happens?"))
    assert whole["tiles"] == [1] * 8
    assert json.loads(ask("--json", stdin=f"/video {tmp_path}/clip.gif\nWhat happens?"))["tokens"] == whole["tokens"]
    part = json.loads(ask("--video", tmp_path / "clip.gif", "--frames", 3, "--span", 0.5, 1, "--json", "What happens?"))
    assert part["tiles"] == [1] * 3


def test_a_folder_is_asked_page_by_page_and_resumed(folder, ask, page, tmp_path, capsys, monkeypatch):
    scans, out = tmp_path / "scans", tmp_path / "answers.jsonl"
    scans.mkdir()
    for i, size in enumerate(((128, 128), (300, 100), (100, 300))):
        Image.effect_noise(size, 90).save(scans / f"{i}.png")
    (scans / "notes.txt").write_text("not asked")
    flags = ("--folder", scans, "--batch", 2, "--out", out, "What is the date?")
    ask(*flags)
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["images"] for result in whole] == [[str(scans / f"{i}.png")] for i in range(3)]
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:1]) + b'{"fingerprint": "mod')          # interrupted
    ask(*flags)
    assert [json.loads(line)["tokens"] for line in out.read_text().splitlines()] == [result["tokens"] for result in whole]
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    Image.effect_noise((128, 128), 90).save(scans / "00.png")                                   # sorts between the others
    (scans / "2.png").unlink()
    status, _, err = call(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", "--max-new-tokens", 6, *flags)
    assert status == 0 and "scans: 1 of 4 files are no images" in err and err.endswith("3 questions: 1 answered now, 2 kept, 0 not answered; 1 earlier answers dropped\n")
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["images"] for line in again] == [[str(scans / name)] for name in ("0.png", "00.png", "1.png")]
    assert [again[0], again[2]] == whole[:2] and list(tmp_path.glob("*.lock")) == []
    (scans / "notes.txt").unlink()
    assert "was started with max_new_tokens=6; repeat that" in refuses(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", *flags)
    ask(*flags[:-1], "--overwrite", "Other?")
    assert [json.loads(line)["question"] for line in out.read_text().splitlines()] == ["Other?"] * 3
    for name in ("0.png", "00.png", "1.png"):
        (scans / name).unlink()
    assert "no images among its 0 files" in refuses(infer, capsys, monkeypatch, "--model", folder, *flags)


def test_answers_to_a_file_of_questions_name_their_images_and_are_resumed(folder, ask, page, tmp_path, capsys, monkeypatch):
    asked, out = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    asked.write_text(json.dumps({"question": "What?", "image": "page.png"}) + '\n{"question": "Why?"}\n')
    ask("--questions", asked, "--out", out)
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["images"] for line in whole] == [[str(page)], []]
    before = out.read_bytes()
    ask("--questions", asked, "--out", out)
    assert out.read_bytes() == before                                       # nothing was left to answer
    out.write_text(json.dumps({"question": "What?", "answer": "by which model?"}) + "\n")
    assert "cannot be resumed (KeyError: 'fingerprint'); choose another file" in refuses(infer, capsys, monkeypatch, "--model", folder, "--questions", asked, "--out", out)
    asked.write_text("\n")
    assert "q.jsonl: no questions" in refuses(infer, capsys, monkeypatch, "--model", folder, "--questions", asked)


def test_an_output_is_never_a_file_that_was_there_or_an_input(folder, page, tmp_path, capsys, monkeypatch):
    """--overwrite replaces a file that was there, but never an input, under whatever name."""
    import os
    other, asked, rows = tmp_path / "other.png", tmp_path / "q.jsonl", tmp_path / "e.jsonl"
    other.write_text("mine")
    (tmp_path / "p.json.scores.json").write_text("mine")
    asked.write_text(json.dumps({"question": "What?", "images": ["page.png"]}))
    rows.write_text(json.dumps({"question": "What?", "answer": "x", "images": ["page.png"]}))
    os.link(page, tmp_path / "link.png")
    one = ("--image", page, "What?")
    cases = [((flag, other, *one), "exists; choose another name, or replace it with --overwrite") for flag in ("--show", "--attend", "--explain")]
    cases += [((flag, tmp_path / "link.png", "--overwrite", *one), "also an input") for flag in ("--show", "--attend", "--explain")]
    cases += [(("--show", "s.png", "--attend", "./s.png", *one), "or another output"), (("--questions", asked, "--out", asked), "also an input"),
              (("--questions", asked, "--out", other), "cannot be resumed"), (("--questions", asked, "--out", page, "--overwrite"), "also an input"),
              (("--questions", asked, "--out", folder / "config.json", "--overwrite"), "also an input"), (("--questions", asked, "--out", tmp_path), "no regular file"),
              (("--evaluate", rows, "--predictions", other), "cannot be resumed"), (("--evaluate", rows, "--predictions", tmp_path / "p.json"), "cannot be resumed"),
              (("--evaluate", rows, "--predictions", rows, "--overwrite"), "also an input"), (("--evaluate", rows, "--predictions", page, "--overwrite"), "also an input")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, message in cases:
        assert message in refuses(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", "--max-new-tokens", 2, *flags), flags
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert call(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", "--max-new-tokens", 2, "--show", other, "--overwrite", *one)[0] == 0
    assert other.read_bytes() != b"mine"


def test_questions_about_a_page_share_its_reading(ask, page, tmp_path, monkeypatch):
    """Also if they do not stand side by side, and however many pages are answered at once; the answers keep the file's order."""
    from model import InternVL
    Image.effect_noise((128, 128), 90).save(tmp_path / "other.png")
    asked = [("A?", ["page.png"]), ("B?", ["other.png"]), ("C?", ["page.png"]), ("D?", []), ("And E?", ["page.png"])]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"question": q, "images": i}) for q, i in asked))
    seen, see = [], InternVL.encode_images
    monkeypatch.setattr(InternVL, "encode_images", lambda model, tiles: seen.append(len(tiles)) or see(model, tiles))
    for batch, expected in ((1, [5, 1]), (2, [6]), (8, [6])):
        seen.clear()
        results = [json.loads(line) for line in ask("--questions", tmp_path / "q.jsonl", "--batch", batch).splitlines()]
        assert [result["question"] for result in results] == [question for question, _ in asked]
        assert seen == expected
    for result, (question, images) in zip(results, asked):
        alone = json.loads(ask(*[flag for i in images for flag in ("--image", tmp_path / i)], "--json", question))
        assert (result["tokens"], result["prompt_tokens"]) == (alone["tokens"], alone["prompt_tokens"])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_one_broken_image_is_named_and_the_others_are_answered(folder, page, tmp_path, capsys, monkeypatch, batch):
    (tmp_path / "broken.png").write_bytes(b"no image")
    flags = ("--model", folder, "--device", "cpu", "--max-new-tokens", 6, "--batch", batch)
    asked = [("A?", "page.png"), ("B?", "broken.png"), ("word " * 10_000, "page.png"), ("C?", "page.png"), ("D?", "broken.png")]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"question": q, "images": i}) for q, i in asked))
    status, out, err = call(infer, capsys, monkeypatch, *flags, "--questions", tmp_path / "q.jsonl")
    results = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [(line["question"], line["images"]) for line in results] == [(q, [str(tmp_path / i)]) for q, i in asked]
    assert ["as an image" in line.get("error", "") for line in results] == [False, True, False, False, True]
    assert "exceed the model's 2048" in results[2]["error"] and all(results[i]["tokens"] for i in (0, 3))
    assert "broken.png" in err and "not answered" in err
    status, out, _ = call(infer, capsys, monkeypatch, *flags, "--folder", tmp_path, "A?")
    bad, good = map(json.loads, out.splitlines())
    assert status == 0 and "error" in bad and good["tokens"] == results[0]["tokens"]


def test_a_question_asked_twice_is_answered_twice(ask, page, tmp_path):
    """Also where it says where its image goes, and so shares no prefix."""
    asked = ["<image> What?", "<image> What?", "And this?", "And this?"]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"question": question, "images": [str(page)]}) for question in asked))
    results = [json.loads(line) for line in ask("--questions", tmp_path / "q.jsonl", "--batch", 4).splitlines()]
    assert [result["question"] for result in results] == asked
    for result in results:
        assert result["tokens"] == json.loads(ask("--image", page, "--json", result["question"]))["tokens"]


def test_pdf_pages_are_images(ask, page, tmp_path, monkeypatch, folder, capsys):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    Image.open(page).convert("RGB").save(tmp_path / "scan.pdf", resolution=72)
    assert "pip install pypdfium2" in refuses(infer, capsys, monkeypatch, "--model", folder, "--image", tmp_path / "scan.pdf", "What?")
    monkeypatch.undo()
    pytest.importorskip("pypdfium2", reason="needs the package pypdfium2")
    extra = [Image.new("RGB", (100, 100))]
    Image.open(page).convert("RGB").save(tmp_path / "scan.pdf", resolution=200, save_all=True, append_images=extra)
    assert [round(image.width, -1) for image in load_images(str(tmp_path / "scan.pdf"))] == [260, 100]
    assert [image.size for image in load_images(f"{tmp_path}/scan.pdf#2")] == [(100, 100)]
    for bad in ("scan.pdf#3", "nowhere.pdf", "scan.pdf#0"):
        assert "cannot be read as a PDF, or has no such page" in refuses(infer, capsys, monkeypatch, "--model", folder, "--image", tmp_path / bad, "?")


@pytest.mark.parametrize("line, message", [
    ("/image -", "standard input is where the questions come from"), ("/image", "give a path or an address"), ("/video", "give a path or an address"), ("/undo", "no question to take back"), ("/image nowhere.png", "nowhere.png: no such file"), ("/jump", "/jump: not a command; there are /image"),
    ("/settings width 3", "width: not a setting; there are max_tiles"), ("/settings top_p 7", "top_p: 7.0 is not between"),
    ("/settings seed x", "seed: invalid literal")])
def test_a_command_that_cannot_be_obeyed_gets_one_line(folder, capsys, monkeypatch, line, message):
    status, out, err = call(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", stdin=line)
    first, last = err.splitlines()
    assert status == 2 and not out and message in first and last.endswith("1 line of standard input could not be used; see above")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_file_of_questions_gets_the_same_answers_in_any_batch(ask, page, tmp_path, batch):
    asked = [("What is the date?", ["page.png"]), ("No image?", []), ("Which of them?", ["page.png", str(page)]), ("你好？", "page.png")]
    lines = [json.dumps({"question": question, "images": images}) for question, images in asked]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    results = [json.loads(line) for line in ask("--questions", tmp_path / "questions.jsonl", "--batch", batch).splitlines()]
    assert [result["question"] for result in results] == [question for question, _ in asked]
    for result, (question, images) in zip(results, asked):
        flags = [flag for _ in ([images] if isinstance(images, str) else images) for flag in ("--image", page)]
        assert result["tokens"] == json.loads(ask(*flags, "--json", question))["tokens"]


@pytest.fixture
def web(page):
    """An address that serves the page at /page.png and an endless stream elsewhere."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(404 if "missing" in self.path else 200)
            self.end_headers()
            try:
                self.wfile.write(page.read_bytes() if "page" in self.path else b"text")
                while "endless" in self.path:
                    self.wfile.write(b"x" * 1_000_000)
            except ConnectionError:
                pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_image_comes_from_an_address(ask, page, web):
    def tokens(image):
        return json.loads(ask("--allow-private", "--image", image, "--json", "What?"))["tokens"]
    assert tokens(f"{web}/page.png") == tokens(page)


@pytest.mark.parametrize("flags, message", [
    (("--image", "nowhere.png", "What?"), "nowhere.png: no such file"),
    (("--image", "README.md", "What?"), "cannot read README.md as an image"),
    (("--allow-private", "--image", "WEB/missing.png", "What?"), "cannot be fetched (HTTP Error 404"),
    (("--allow-private", "--image", "WEB/endless", "What?"), "more than 50,000,000 bytes"),
    (("--allow-private", "--image", "WEB/text", "What?"), "/text as an image"),
    (("--image", "WEB/page.png", "What?"), "is 127.0.0.1, an address of a private network; --allow-private lets it"),
    (("--image", "http://127.0.0.1:9/x.png", "What?"), "cannot be fetched"),
    (("--model", "nowhere", "What?"), "nowhere: not found; expected a model folder"),
    (("--max-tiles", "0", "What?"), "0 is not between 1 and 128"),
    (("--top-p", "0", "What?"), "0.0 is not between"),
    (("--temperature", "hot", "What?"), "invalid"),
    (("--max-new-tokens", "5000", "What?"), "exceed the model's 2048"),
    (("--temperature", "nan", "What?"), "nan is not between"),
    (("--image", "http://a b/x.png", "What?"), "cannot be fetched"),
    (("--questions", "x.jsonl", "What?"), "give no QUESTION"),
    (("",), "the question is empty"),
    (("word " * 10_000,), "exceed the model's 2048"),
    (("--image", "PAGE") * 40 + ("What?",), "exceed the model's 2048"),
    (("--folder", "nowhere", "What?"), "nowhere: cannot be read"),
    (("--folder", "nowhere"), "give one, and no --image"),
    (("--out", "x.jsonl", "What?"), "--out is for the answers"),
    (("--image", "-"), "give a QUESTION beside it"),
    *((("--image", "PAGE", "--explain", "x.html", *more, "What?"), "give no --show, --attend, --json, --video")
      for more in (("--show", "x.png"), ("--attend", "x.png"), ("--json",), ("--video", "x.gif"), ("--temperature", "1"))),
    (("--questions", "x.jsonl", "--out", "nodir/o.jsonl"), "nodir/o.jsonl: there is no folder nodir; make it first"),
    (("--evaluate", "x", "--predictions", "nodir/p.json"), "nodir/p.json: there is no folder nodir; make it first"),
    (("--video", "nowhere.gif", "What?"), "cannot be read as an animation"),
    (("--questions", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
    (("--evaluate", "nowhere"), "nowhere: not found"),
    (("--evaluate", "x", "What?"), "give no QUESTION"),
    (("--predictions", "x.json", "What?"), "belong to --evaluate"),
    (("--device", "nonsense", "What?"), "try --device cpu"),
    (("--image", "PAGE", "--image", "PAGE", "<image>?"), "2 images, but 1 <image> in the question"),
    *(((flag, ""), f"argument {flag}: the value is empty") for flag in (
        "--evaluate", "--questions", "--folder", "--out", "--predictions", "--image", "--show", "--explain", "--model", "--split")),
])
def test_mistakes_get_one_line(folder, page, web, capsys, monkeypatch, flags, message):
    flags = [flag.replace("WEB", web).replace("PAGE", str(page)) for flag in flags]
    assert message in refuses(infer, capsys, monkeypatch, "--model", folder, *flags)


def test_a_default_run_imports_only_what_it_needs():
    """One question about one image: no other mode, no web server, no scores."""
    code = "import sys, infer; print(*(name for name in sys.modules if name.startswith('extras.')))"
    found = set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert "extras.video" in found
    assert not found & {f"extras.{name}" for name in ("evaluate", "chat_cli", "web", "explain", "int8", "score")}


def test_modes_exclude_each_other(capsys, monkeypatch):
    modes = (("--questions", "x"), ("--folder", "x"), ("--evaluate", "x"), ("--web",), ("--explain", "x"))
    for i, one in enumerate(modes):
        for other in modes[:i]:
            assert "not allowed with argument" in refuses(infer, capsys, monkeypatch, *one, *other)


def test_questions_may_be_a_json_list(ask, page, tmp_path):
    asked = [{"question": "What is the date?", "images": ["page.png"]}, {"question": "And the name?", "image": "page.png"}]
    (tmp_path / "q.json").write_text(json.dumps(asked, indent=1))
    results = [json.loads(line) for line in ask("--questions", tmp_path / "q.json").splitlines()]
    assert [(line["question"], line["images"]) for line in results] == [(line["question"], [str(page)]) for line in asked]


def test_a_bad_line_of_questions_is_named(folder, tmp_path, capsys, monkeypatch):
    for bad in ("{", '["x"]', '{"images": []}', '{"question": "x", "images": [3]}', '{"question": 5}', "null", "{}", '{"question": " "}'):
        (tmp_path / "q.jsonl").write_text('{"question": "fine"}\n' + bad + "\n")
        line = refuses(infer, capsys, monkeypatch, "--model", folder, "--questions", tmp_path / "q.jsonl")
        assert "q.jsonl:2: not a question" in line and "Error" not in line


def test_rows_for_training_are_no_questions(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "conversations": [["What?", "This."]]}\n')
    line = refuses(infer, capsys, monkeypatch, "--model", folder, "--questions", tmp_path / "q.jsonl")
    assert 'q.jsonl:1: not a question (no "question" in {"image": "a.png"' in line and "rows for training go to --evaluate" in line


# -------------------------------------------------------------------------------------------------------- whole splits

@pytest.fixture
def split(tmp_path):
    return write_dataset(tmp_path / "data", train_pages=1, validation_pages=5)


def test_a_split_gets_the_same_predictions_in_any_batch_as_one_by_one(ask, split, tmp_path, tiny):
    for batch in (1, 3):
        printed = ask("--evaluate", split, "--predictions", tmp_path / f"{batch}.json", "--batch", batch)
        assert "--max-tiles 12 " in printed and "None" not in printed and "False" not in printed
    rows, predictions = mixed_rows(5, first=1000), json.loads((tmp_path / "1.json").read_text())
    assert (tmp_path / "1.json").read_text() == (tmp_path / "3.json").read_text()
    assert all(list(line) == ["questionId", "answer"] for line in predictions)
    assert sorted(line["questionId"] for line in predictions) == sorted(row["questionId"] for row in rows)
    told = {line["questionId"]: line["answer"] for line in predictions}
    for row in rows[::5]:
        (tmp_path / "one.png").write_bytes(row["image"]["bytes"])
        assert ask("--image", tmp_path / "one.png", f"{row['question']} Answer the question using a single word or phrase.") == told[row["questionId"]] + "\n"


def test_an_interrupted_evaluation_is_resumed(ask, split, tmp_path, monkeypatch, folder, capsys):
    table = ask("--evaluate", split, "--predictions", tmp_path / "whole.json", "--json")
    calls, real_generate = [], evaluate.generate
    def breaking(model, pages, **more):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(pages)
        return real_generate(model, pages, **more)
    monkeypatch.setattr(evaluate, "generate", breaking)
    flags = ("--model", folder, "--device", "cpu", "--max-new-tokens", 6, "--evaluate", split, "--predictions", tmp_path / "p.json")
    assert call(infer, capsys, monkeypatch, *flags)[0] == 130
    assert 0 < len(json.loads((tmp_path / "p.json.scores.json").read_text())["answers"]) < len(json.loads((tmp_path / "whole.json").read_text()))
    monkeypatch.setattr(evaluate, "generate", lambda model, pages, **more: calls.append(pages) or real_generate(model, pages, **more))
    status, out, err = call(infer, capsys, monkeypatch, *flags, "--json")
    assert status == 0 and len(calls) == 5 and out == table                 # each of the five pages was answered once
    assert (tmp_path / "p.json").read_text() == (tmp_path / "whole.json").read_text()
    assert json.loads((tmp_path / "p.json.scores.json").read_text())["scores"] == json.loads(table)
    assert "started with max_new_tokens=6" in refuses(infer, capsys, monkeypatch, *flags[:-1], tmp_path / "p.json", "--max-new-tokens", 7)
    assert call(infer, capsys, monkeypatch, *flags, "--split", "train")[0] == 0          # other questions in the same file
    assert call(infer, capsys, monkeypatch, *flags[:-1], tmp_path / "train.json", "--split", "train")[0] == 0
    for suffix in (".json", ".json.scores.json"):
        assert (tmp_path / f"p{suffix}").read_text() == (tmp_path / f"train{suffix}").read_text()


def test_predictions_that_cannot_be_written_are_one_line(folder, split, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(evaluate, "write_text", full)
    flags = ("--model", folder, "--device", "cpu", "--max-new-tokens", 2, "--evaluate", split, "--predictions", tmp_path / "p.json")
    assert f"{tmp_path / 'p.json.scores.json'}: cannot be written (No space left on device)" in refuses(infer, capsys, monkeypatch, *flags)


def test_scores_are_those_of_the_answers_by_type_and_none_without_answers(folder, tmp_path, capsys, monkeypatch):
    rows = [row | {"question_types": "form" if row["docId"] % 2 else "table/list"} for row in mixed_rows(4)]
    unanswered = [row | {"answers": None} for row in rows[:7]]
    broken = [row | {"image": {"bytes": b"x", "path": None}} if row["docId"] == 3 else row for row in rows]
    for name, written in (("validation", rows), ("test", unanswered), ("broken", broken)):
        write_split(tmp_path / "data", name, written)
    truth = {row["questionId"]: row["answers"][0] for row in rows}
    asked = iter([])
    def knowing(model, pages, **more):                                       # right but for an answer that has one character too many
        texts = [text for _, text in zip(range(sum(max(prompt.branches) for _, prompt in pages)), asked)]
        ids = [model.tokenizer(text).input_ids for text in texts]
        return ([column[i] if i < len(column) else None for column in ids] for i in range(max(map(len, ids))))
    monkeypatch.setattr(evaluate, "generate", knowing)
    order = [name for page in group_rows_into_pages(rows) for name in page.ids]
    asked = iter([truth[name] + ("!" if i == 0 else "") for i, name in enumerate(order)])
    common = ("--model", folder, "--device", "cpu", "--evaluate", tmp_path / "data", "--json", "--max-new-tokens", 50)
    table = json.loads(call(infer, capsys, monkeypatch, *common)[1])
    assert table["all"]["questions"] == len(rows) and table["all"]["exact_match"] == pytest.approx(1 - 1 / len(rows))
    assert table["type form"]["questions"] == sum(row["docId"] % 2 for row in rows) and table["type form"]["anls"] == 1
    assert 1 - 1 / len(rows) < table["all"]["anls"] < 1 and set(table["all"]) == {"questions", *SCORES}
    asked = iter(["x"] * 99)
    status, out, err = call(infer, capsys, monkeypatch, *common, "--split", "test", "--predictions", tmp_path / "t.json")
    assert status == 0 and json.loads(out) == {} and len(json.loads((tmp_path / "t.json").read_text())) == 7, err
    asked = iter([truth[name] for name in order if name // 100 != 3])
    status, out, err = call(infer, capsys, monkeypatch, *common, "--split", "broken")
    wrong = sum(row["docId"] == 3 for row in rows)
    assert status == 0 and "3/1: cannot read it as an image" in err and "not answered" in err
    assert json.loads(out)["all"]["exact_match"] == pytest.approx(1 - wrong / len(rows))


def test_no_room_for_a_question_is_an_error_and_what_is_not_answered_is_counted(folder, page, tmp_path, capsys, monkeypatch):
    rows = [{"id": name, "question": question, "answer": "x", "images": [image]} for name, question, image in (
        ("a", "What?", "page.png"), ("b", "What?", "gone.png"), ("a", "the date of this page " * 400, "page.png"))]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--model", folder, "--device", "cpu", "--evaluate", tmp_path / "e.jsonl", "--predictions", tmp_path / "p.json")
    for most in (2048, 4096):
        assert f"{most} tokens of answer leave no room for a question in the model's 2048 positions" in refuses(infer, capsys, monkeypatch, *flags, "--max-new-tokens", most)
    assert not list(tmp_path.glob("p.json*"))
    status, out, err = call(infer, capsys, monkeypatch, *flags, "--max-new-tokens", 4)
    assert status == 0 and "3 questions, 3 of them with an answer to compare with, 2 not answered; " in out
    assert "3 questions: 1 answered now, 0 kept, 2 not answered\n1 ids stand at more than one question; the first is a\n" in err
    assert json.loads((tmp_path / "p.json.scores.json").read_text())["not_answered"] == 2
    Image.new("L", (128, 128)).save(tmp_path / "gone.png")
    status, out, err = call(infer, capsys, monkeypatch, *flags, "--max-new-tokens", 4)
    assert "3 questions: 1 answered now, 1 kept, 1 not answered" in err and ", 1 not answered; " in out


def test_a_file_is_evaluated_whole_and_its_conversations_turn_by_turn(ask, page, tmp_path):
    lines = [{"id": "a", "image": "page.png", "conversations": [["<image>\nWhat is the date?", "1"], ["And the total?", "2"]]},
             {"query": "What is the total?", "response": "2", "images": ["page.png"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = ask("--evaluate", tmp_path / "a.jsonl", "--predictions", tmp_path / "p.json")
    assert "3 questions, 3 of them with an answer" in table 
    assert table.splitlines()[1].split() == ["questions", "exact_match", "anls"]           # the other scores are in the file
    scores = json.loads((tmp_path / "p.json.scores.json").read_text())["scores"]
    assert set(scores["all"]) == {"questions", *SCORES} and f"{scores['all']['anls']:.4f}" in table.splitlines()[2]
    predictions = json.loads((tmp_path / "p.json").read_text())
    assert [line["questionId"] for line in predictions] == ["a/1", "a/2", f"{tmp_path / 'a.jsonl'}:2"]
    assert predictions[0]["answer"] + "\n" == ask("--image", page, "What is the date?")
    assert predictions[2]["answer"] + "\n" == ask("--image", page, "What is the total?")
