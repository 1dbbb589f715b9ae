"""The page in the browser answers as the chat does; undo, retry and clear there take questions back; nobody else may ask.

The page itself is gradio's, which CI does not install: its tests run where it is, and it was tried in a real browser.
"""
import http.client
import json
import socket
import sys

import pytest
from commands import infer, refuses
from PIL import Image

from extras import web
from extras.pictures import draw_tiles
from extras.web import CHATS, Conversations


@pytest.fixture
def conversations(tiny):
    return Conversations(tiny, {"max_new_tokens": 8})


@pytest.fixture
def images(tmp_path):
    """Two image files."""
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path, size in zip(paths, ((200, 100), (128, 128))):
        Image.effect_noise(size, 90).save(path)
    return paths


def ask(conversations, length, question, *files, session="s"):
    """The last that is shown of an answer: (text, notes, picture)."""
    return list(conversations.answer(session, length, question, files))[-1]


def test_a_conversation_is_the_chats(conversations, images, tiny):
    chat, length = tiny.chat(max_new_tokens=8), 0
    for question, files in (("What is it?", images[:1]), ("还有呢？", []), ("And both?", images)):
        shown = list(conversations.answer("s", length, question, files))
        assert shown[-1][0] == chat.ask(question, *files) and "tiles" not in shown[0][1] and shown[0][2] is None
        texts = [text for text, *_ in shown]
        assert all(later.startswith(text) for text, later in zip(texts, texts[1:]))         # it streams
        assert f"{sum(chat.report['tiles'])} tiles" in shown[-1][1]
        length += len(files) + 3
    assert shown[-1][2].tobytes() == draw_tiles(chat.turns[-1].pictures, tiny.config.tokens_per_tile).tobytes()


def test_undo_retry_and_clear_shorten_the_history(conversations, images, tiny):
    chat = tiny.chat(max_new_tokens=8)
    first = chat.ask("A?", images[0])
    second = chat.ask("B?")
    assert [ask(conversations, 0, "A?", images[0])[0], ask(conversations, 3, "B?")[0]] == [first, second]
    assert ask(conversations, 3, "B?")[0] == second                                         # retry
    assert ask(conversations, 5, " ")[:2] == ("the question is empty; write what you want to know", "not answered")
    assert ask(conversations, 5, "C?")[0] == chat.ask("C?")                                 # after undo of the empty one
    assert ask(conversations, 0, "Alone?")[0] == tiny.chat(max_new_tokens=8).ask("Alone?")  # clear
    assert len(conversations.chats["s"][0].turns) == 1


def test_an_answer_that_was_stopped_stays_as_far_as_it_came(conversations):
    answer = conversations.answer("s", 0, "Say something", [])
    next(answer)
    answer.close()
    assert len(conversations.chats["s"][0].turns) == 1 and ask(conversations, 2, "And now?")[1] != "not answered"


def test_sessions_are_apart_and_the_oldest_are_forgotten(conversations):
    alone = ask(conversations, 0, "A?", session="first")[0]
    for i in range(CHATS):
        assert ask(conversations, 0, "A?", session=f"s{i}")[0] == alone
    assert len(conversations.chats) == CHATS and "first" not in conversations.chats


@pytest.mark.parametrize("question, files, message", [
    (" ", (), "the question is empty"), ("word " * 10_000, (), "exceed the model's 2048"), ("What?", ("README.md",), "cannot read README.md"),
    ("What?", ("nowhere.pdf",), "nowhere.pdf")])
def test_what_cannot_be_answered_is_said_in_one_line(conversations, question, files, message):
    text, notes, picture = ask(conversations, 0, question, *files)
    assert message in text and "\n" not in text and notes == "not answered" and picture is None


def test_remarks_stand_beside_the_answer(conversations, images):
    assert "no image: text only" in ask(conversations, 0, "What?")[1]
    (_, first, _), *_, (_, last, _) = conversations.answer("s", 2, "And?", images[:1])
    assert first == last.split("; ")[0] == "the embedded model answers single questions only: press Undo before each new question"
    assert "single" not in ask(conversations, 0, "What?", images[0])[1]


@pytest.fixture
def environment(monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "NO_PROXY"):
        monkeypatch.setenv(name, "")


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch, environment):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in refuses(infer, capsys, monkeypatch, "--tiny", "--web", "--port", "0")


def test_a_port_in_use_is_one_line(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port {port}: cannot be used" in refuses(infer, capsys, monkeypatch, "--tiny", "--web", "--port", port)


@pytest.fixture
def call(conversations, tmp_path, environment):
    pytest.importorskip("gradio", reason="needs the package gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = web.launch(conversations, port, str(tmp_path))

    def call(path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET" if body is None else "POST", path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    call.port = port
    yield call
    page.close()


def test_it_listens_on_this_machine_alone_and_asks_no_other(call):
    status, headers, text = call("/")
    assert status == 200 and b"Ask a page" in text and headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert "http" not in headers["Content-Security-Policy"]
    config = json.loads(call("/config")[2])
    assert config["analytics_enabled"] is False and not config.get("footer_links") and not config.get("run_history")
    with open("/proc/net/tcp") as tcp, open("/proc/net/tcp6") as tcp6:
        listening = {line.split()[1] for line in (*tcp, *tcp6) if line.split()[3] == "0A" and line.split()[1].endswith(f":{call.port:04X}")}
    assert listening == {f"0100007F:{call.port:04X}"}


def test_foreign_pages_may_not_ask(call):
    for headers in ({"Origin": "http://example.com"}, {"Host": "example.com"}, {"Origin": "null"}, {"Host": f"example.com:{call.port}"}):
        for path, body in (("/", None), ("/gradio_api/queue/join", b"{}"), ("/gradio_api/upload", b"x")):
            assert call(path, body, **headers)[0] == 403
    assert call("/", Origin=f"http://localhost:{call.port}")[0] == 200


def test_a_large_upload_is_refused(call):
    body = b"\r\n".join([b"--x", b'Content-Disposition: form-data; name="files"; filename="a.png"', b"", b"x" * 50_000_001, b"--x--", b""])
    assert call("/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})[0] == 413
