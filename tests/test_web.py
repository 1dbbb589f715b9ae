"""The page in the browser answers as the chat does; what it should not take it refuses with a message."""
import http.client
import io
import json
import threading

import pytest
from PIL import Image

from extras.web import CHATS, UPLOAD_BYTES, Server


def png(width=200, height=100):
    file = io.BytesIO()
    Image.effect_noise((width, height), 90).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server(tiny):
    server = Server(tiny, max_new_tokens=8)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(server):
    def call(path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request("GET" if body is None else "POST", path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    return call


@pytest.fixture
def key(call):
    return json.loads(call("/new", b"")[1])["chat"]


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_conversation_is_the_chats(call, key, tiny):
    page, chat = png(), tiny.chat(max_new_tokens=8)
    assert b"<!doctype html>" in call("/")[1]
    assert json.loads(call(f"/image?chat={key}", page)[1]) == {"number": 1, "size": [200, 100], "tiles": 3}
    chat.add_image(page)
    for question in ("What is it?", "还有呢？"):
        assert call(f"/ask?chat={key}", question.encode()) == (200, chat.ask(question).encode())
    status, drawn = call(f"/tiles?chat={key}&n=1")
    assert status == 200 and Image.open(io.BytesIO(drawn)).size[0] > 3 * 128
    assert call(f"/undo?chat={key}", b"") == (200, b"taken back") and call(f"/clear?chat={key}", b"")[0] == 200
    assert call(f"/ask?chat={key}", b"Alone?")[1] == tiny.chat(max_new_tokens=8).ask("Alone?").encode()


@pytest.mark.parametrize("path, body, message", [
    ("/image?chat=KEY", b"a text that is called page.png", b"this file is no image"), ("/image?chat=KEY", b"", b"this file is no image"),
    ("/ask?chat=KEY", b" ", b"the question is empty"), ("/ask?chat=KEY", b"word " * 10_000, b"exceed the model's 2048"),
    ("/ask?chat=other", b"What?", b"this conversation is gone"), ("/undo?chat=KEY", b"", b"no question to take back"),
    ("/tiles?chat=KEY&n=1", None, b"no such image"), ("/tiles?chat=KEY&n=x", None, b"no such image")])
def test_what_cannot_be_done_is_told(call, key, path, body, message):
    status, text = call(path.replace("KEY", key), body)
    assert status == 400 and message in text and b"\n" not in text and b"Traceback" not in text


def test_a_large_upload_is_refused_before_it_is_read(server, key):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest("POST", f"/image?chat={key}")
    connection.putheader("Content-Length", "200000000")
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 400 and reply.read() == f"200,000,000 bytes; at most {UPLOAD_BYTES:,} are taken".encode()


def test_foreign_pages_may_not_ask(call, key):
    for headers in ({"Origin": "http://example.com"}, {"Host": "example.com"}, {"Origin": "null"}):
        assert call(f"/ask?chat={key}", b"What?", **headers)[0] == 403
    assert call("/nowhere")[0] == 404


def test_the_oldest_conversations_are_forgotten(call, key, server):
    for _ in range(CHATS):
        call("/new", b"")
    assert len(server.chats) == CHATS and key not in server.chats
