"""One pipeline answers questions: the same answers whatever is asked at once, from validation to a folder of scans."""
import contextlib
import http.server
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from PIL import Image
from small_data import mixed_rows

import train
from data import Page, PageDataset, group_rows_into_pages
from extras import evaluate
from extras.evaluate import answer, answer_batch, answer_questions, evaluate_rows, question_pages
from model import InputError, InternVL
from model.checkpoint import TINY


def examples_of(model, rows, **more):
    dataset = PageDataset(model, 4, **more)
    return [dataset[page] for page in group_rows_into_pages(rows, answered=False)]


def tokens(answers):
    return [(one.page.name, one.index, one.report["tokens"]) for one in answers]


def test_every_question_gets_the_answer_that_it_gets_alone_in_any_batch(tiny):
    examples = examples_of(tiny, mixed_rows(5), max_length=None)
    whole = tokens(answer(tiny, examples, 1, max_new_tokens=6))
    assert len(whole) == sum(len(example.page.questions) for example in examples)
    for batch in (2, 3, 9):
        assert tokens(answer(tiny, examples, batch, max_new_tokens=6)) == whole
    for name, index, ids in whole[::3]:
        example = next(example for example in examples if example.page.name == name)
        example.kept_questions = [index]
        assert tokens(answer(tiny, [example], max_new_tokens=6)) == [(name, index, ids)]


def test_drawn_answers_do_not_depend_on_the_batch_either(tiny):
    examples, settings = examples_of(tiny, mixed_rows(4)), dict(max_new_tokens=6, temperature=1.5, seed=3)
    whole = tokens(answer(tiny, examples, 1, **settings))
    assert tokens(answer(tiny, examples, 4, **settings)) == whole != tokens(answer(tiny, examples, 4, **settings | {"seed": 4}))


def test_a_record_says_what_was_read_and_how_fast(tiny):
    [example] = examples_of(tiny, mixed_rows(1))
    for one in answer(tiny, [example], max_new_tokens=6):
        assert one.page is example.page and one.report["question"] == example.page.questions[one.index]
        assert one.report["answer"] == one.text and one.report["tiles"] == example.tile_counts and one.report["prefill_seconds"] > 0
        prompt, _ = PageDataset(tiny, max_length=None).write(one.page, example.tile_counts, [one.index])
        assert one.report["prompt_tokens"] == len(prompt.ids)


def test_answers_come_batch_by_batch_so_that_no_more_pages_are_held(tiny):
    read = []
    examples = (read.append(example) or example for example in examples_of(tiny, mixed_rows(6)))
    answers = answer(tiny, examples, 2, max_new_tokens=2)
    next(answers)
    assert len(read) == 2


def test_errors_are_printed_once_per_page_and_the_others_are_answered(tiny, capsys):
    good, long, bad = examples_of(tiny, mixed_rows(3), max_length=None)
    bad.error = "cannot be\nread"
    long.page.questions[1] = "word " * 10_000
    answers = list(answer(tiny, [bad, long, good], 3, max_new_tokens=6))
    assert tokens(one for one in answers if one.page is good.page) == tokens(answer(tiny, [good], max_new_tokens=6))
    assert [one.error for one in answers if one.page is bad.page] == [bad.error] * len(bad.page.questions)
    errors = [one.error for one in answers if one.page is long.page]
    assert "exceed the model's 2048 positions" in errors[1] and errors[:1] + errors[2:] == [None] * (len(errors) - 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == f"{bad.page.name}: cannot be read; not answered" and long.page.name in lines[1]
    assert [one.error for one in answer_batch(tiny, [bad])] == [bad.error] * len(bad.page.questions)      # nothing to generate


def test_validation_gives_the_answers_of_an_evaluation_and_sees_each_page_once(tiny, monkeypatch):
    rows, seen = mixed_rows(3), []
    monkeypatch.setattr(train, "LONGEST_ANSWER", 64)
    whole, _ = evaluate_rows(tiny, rows, dict(evaluate="x", max_tiles=4, max_new_tokens=train.LONGEST_ANSWER, temperature=0.0, top_p=1.0, seed=0))
    see = InternVL.encode_images
    monkeypatch.setattr(InternVL, "encode_images", lambda model, tiles: seen.append(len(tiles)) or see(model, tiles))
    _, answers = train.evaluate(tiny, examples_of(tiny, rows))
    assert [line["answer"] for line in answers] == [line["answer"] for line in whole] and len(seen) == 3


def test_a_validation_answers_as_long_as_the_longest_right_answer_and_counts_what_it_leaves_out(tiny, monkeypatch, capsys):
    asked, answers = [], evaluate.answer_batch
    monkeypatch.setattr(evaluate, "answer_batch", lambda *given, **more: asked.append(more["max_new_tokens"]) or answers(*given, **more))
    rows = mixed_rows(2)
    for row in rows:
        row["answers"] = ["word " * 100] if row["docId"] else ["word"]
    rows[0]["question"] = "the date of this page " * 400
    examples = examples_of(tiny, rows)
    train.evaluate(tiny, examples)
    longest = len(tiny.tokenizer("word " * 100).input_ids) + 1
    assert asked == [train.LONGEST_ANSWER, longest] and longest > train.LONGEST_ANSWER
    assert "validation: skipped: 0 pages, 1 question too long, 0 without an answer; 0 questions not answered" in capsys.readouterr().err


def test_questions_about_the_same_images_share_a_page_of_bounded_size():
    assert [page.ids for page in question_pages([(0, "A?", ["a"]), (1, "B?", ["b"]), (2, "C?", ["a"]), (3, "<image> D?", ["a"]),
                                                 (4, "<image> D?", ["a"]), (5, "E <image>?", []), (6, "F?", [])])] == [[0, 2], [1], [3, 4], [5, 6]]
    pages = question_pages((i, f"{i}?", ["a"]) for i in range(100))
    assert [len(page.questions) for page in pages] == [64, 36] and pages[0].answers == [""] * 64
    assert all(isinstance(page, Page) for page in pages)


def test_text_around_placed_images_is_read_as_typed(tiny, tmp_path):
    """As one-shot questions read it, wherever the images stand; an "<image>" too many is text, one too few an error."""
    names = []
    for i in range(2):
        Image.effect_noise((128, 128 + 128 * i), 90).save(tmp_path / f"{i}.png")
        names.append(str(tmp_path / f"{i}.png"))
    asked = [("Is <image> older than <image>?", names), ("<image><image>", names), ("  <image>\n\n and <image> <image>?", names),
             ("Both?", names), ("<image> only?", names), ("<image>", [])]
    answer_questions(tiny, asked, tmp_path / "out.jsonl", batch=3, max_new_tokens=5)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["question"], line["images"]) for line in lines] == asked
    assert "2 images, but 1 <image> in the question" in lines.pop(4)["error"] and asked.pop(4)
    for line, (question, images) in zip(lines, asked):
        chat = tiny.chat(max_new_tokens=5)
        chat.ask(question, *images)
        assert {key: line[key] for key in ("tokens", "tiles", "prompt_tokens")} == {key: chat.report[key] for key in ("tokens", "tiles", "prompt_tokens")}


def test_a_file_of_answers_that_stopped_anywhere_ends_like_an_uninterrupted_one(tiny, tmp_path):
    """Cut after any byte, also inside a line or a character, it is completed with the same answers in the same order."""
    for name in ("a.png", "b.png"):
        Image.effect_noise((128, 128), 90).save(tmp_path / name)
    asked = [("é A?", [str(tmp_path / "a.png")]), ("B?", [str(tmp_path / "b.png")]), ("<image> C?", [str(tmp_path / "a.png")]),
             ("D?", [str(tmp_path / "none.png")]), ("E?", [str(tmp_path / "a.png")]), ("é A?", [str(tmp_path / "a.png")])]

    def run(path, questions=asked):
        answer_questions(tiny, questions, path, batch=2, max_new_tokens=4)
        return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in path.read_text().splitlines()]
    whole, out, draw = run(tmp_path / "whole.jsonl"), tmp_path / "out.jsonl", random.Random(0)
    data = (tmp_path / "whole.jsonl").read_bytes()
    for stop in sorted({0, 15, 16, data.index(b"\n"), data.index(b"\n") + 1, len(data), *draw.sample(range(len(data)), 8)}):
        out.write_bytes(data[:stop])
        assert run(out) == whole and out.read_bytes().startswith(data[:data[:stop].rfind(b"\n") + 1])
    for other in (asked[:3], asked[1:], [(asked[0][0], []), *asked[1:]]):
        assert run(out, other) == run(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", other)
    for stranger in (b"5\nno end", b"{}\n", b"text", b'{"question": 1}\n', b"[1]\n", b"\xff\n", b'{"a": "no end"}', data + b"no end", data + b"\n"):
        out.write_bytes(stranger)
        with pytest.raises(InputError, match="cannot be resumed"):
            run(out)
        assert out.read_bytes() == stranger


def test_answers_of_other_weights_or_settings_are_refused_and_stay(tiny, tmp_path):
    asked, path = [("A?", []), ("B?", [])], tmp_path / "out.jsonl"
    answer_questions(tiny, asked, path, max_new_tokens=2, temperature=0.5)
    before = path.read_bytes()
    for more in ({"max_new_tokens": 3}, {"temperature": 0.6}, {"max_tiles": 3}):
        with pytest.raises(InputError, match=f"was started with {'max_tiles=12' if 'max_tiles' in more else list(more)[0]}.*repeat that"):
            answer_questions(tiny, asked, path, **{"max_new_tokens": 2, "temperature": 0.5} | more)
    tiny.vision.blocks[1].mlp_down.weight.data[-1, -1] += 1e-3                # one weight of all
    with pytest.raises(InputError, match="was started with model=[0-9a-f]{16}; repeat that"):
        answer_questions(tiny, asked, path, max_new_tokens=2, temperature=0.5)
    assert path.read_bytes() == before


def test_an_answer_is_known_by_its_question_and_the_content_of_its_images(tiny, tmp_path, capsys):
    """A renamed page is not asked again, another page under its name is; what nobody asks any more is dropped and counted."""
    for i in range(4):
        Image.effect_noise((128, 128), 90).save(tmp_path / f"{i}.png")
    def run(*names):
        answer_questions(tiny, [("What?", [str(tmp_path / f"{name}.png")]) for name in names], tmp_path / "out.jsonl", max_new_tokens=2)
        assert [json.loads(line)["images"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [[str(tmp_path / f"{name}.png")] for name in names]
        return capsys.readouterr().err.splitlines()[-1]
    assert run(0, 1, 2, "gone") == "4 questions: 3 answered now, 0 kept, 1 not answered"
    (tmp_path / "0.png").rename(tmp_path / "gone.png")
    (tmp_path / "3.png").rename(tmp_path / "1.png")
    assert run("gone", 1, 2) == "3 questions: 1 answered now, 2 kept, 0 not answered; 1 earlier answers dropped"
    assert run("gone", 1, 2, 2) == "4 questions: 0 answered now, 4 kept, 0 not answered"


def test_predictions_that_cannot_be_resumed_are_one_error_and_stay(tiny, tmp_path):
    settings = dict(evaluate="x", max_tiles=4, max_new_tokens=2, temperature=0.0, top_p=1.0, seed=0)
    path, rows = tmp_path / "p.json", mixed_rows(2)
    evaluate_rows(tiny, rows, settings, path)
    whole, scores = path.read_bytes(), (tmp_path / "p.json.scores.json").read_bytes()
    evaluate_rows(tiny, rows, settings, path)
    assert (path.read_bytes(), (tmp_path / "p.json.scores.json").read_bytes()) == (whole, scores)
    with pytest.raises(InputError, match="was started with max_tiles=4; repeat that"):
        evaluate_rows(tiny, rows, settings | {"max_tiles": 5}, path)
    tiny.language.embedding.weight.data[-1, -1] += 1e-3
    with pytest.raises(InputError, match="was started with model="):
        evaluate_rows(tiny, rows, settings, path)
    tiny.language.embedding.weight.data[-1, -1] -= 1e-3
    assert path.read_bytes() == whole
    for stranger in (b"5", b"[5]", b"[{}]", b"text", b"\xff"):
        path.write_bytes(stranger)
        with pytest.raises(InputError, match="cannot be resumed"):
            evaluate_rows(tiny, rows, settings, path)
        assert path.read_bytes() == stranger
    path.write_bytes(whole)
    for stranger in (b"5", b"[5]", b"{}", b"text", b"\xff", b'{"fingerprint": "x"}'):
        (tmp_path / "p.json.scores.json").write_bytes(stranger)
        with pytest.raises(InputError, match="cannot be resumed|was started with x"):
            evaluate_rows(tiny, rows, settings, path)
    (tmp_path / "p.json.scores.json").unlink()
    with pytest.raises(InputError, match="cannot be resumed"):
        evaluate_rows(tiny, rows, settings, path)
    with pytest.raises(InputError, match="the data holds no rows"):
        evaluate_rows(tiny, [], settings)


def test_an_evaluation_stopped_after_any_page_ends_like_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    settings, rows = dict(evaluate="x", max_tiles=4, max_new_tokens=3, temperature=0.0, top_p=1.0, seed=0), mixed_rows(5)
    whole = evaluate_rows(tiny, rows, settings, tmp_path / "whole.json")
    generate, calls = evaluate.generate, []

    def breaking(*arguments, **more):
        calls.append(1)
        if len(calls) in (2, 4, 5):
            raise KeyboardInterrupt
        return generate(*arguments, **more)
    monkeypatch.setattr(evaluate, "generate", breaking)
    for batch in (1, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            evaluate_rows(tiny, rows, settings, tmp_path / "p.json", batch)
    assert evaluate_rows(tiny, rows, settings, tmp_path / "p.json", 2) == whole
    for suffix in (".json", ".json.scores.json"):
        assert (tmp_path / f"p{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_ctrl_c_leaves_whole_lines_and_the_command_repeated_completes_them(tmp_path):
    """The signal comes while the fourth question waits for its image; the command repeated does not fetch the others again."""
    file, requests, wait = io.BytesIO(), [], threading.Event()
    Image.effect_noise((128, 128), 90).save(file, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            requests.append(self.path)
            if self.path == "/3.png" and requests.count(self.path) == 1:
                wait.wait(60)
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(file.getvalue())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    images, out = [f"http://127.0.0.1:{server.server_port}/{i}.png" for i in range(6)], tmp_path / "answers.jsonl"
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"question": "What?", "images": [image]}) for image in images))
    command = [sys.executable, ROOT / "infer.py", "--tiny", "--model", TINY, "--max-new-tokens", "3", "--allow-private", "--questions", tmp_path / "q.jsonl", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while "/3.png" not in requests:
        assert process.poll() is None and not time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.stderr.read()) == (130, b"")
    wait.set()
    before = out.read_bytes()
    assert before.count(b"\n") == 3 and before.endswith(b"\n")
    assert subprocess.run(command, timeout=300).returncode == 0
    server.shutdown()
    assert out.read_bytes().startswith(before) and requests == [f"/{i}.png" for i in (0, 1, 2, 3, 3, 4, 5)]
    assert [json.loads(line)["images"] for line in out.read_text().splitlines()] == [[image] for image in images]
