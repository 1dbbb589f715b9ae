"""The conversation in a browser: one page, served on this machine alone by the standard library.

    POST /new                  a conversation's key        POST /image?chat=KEY     an image file -> how it was cut
    POST /ask?chat=KEY         a question -> the answer, streamed    POST /undo, /clear?chat=KEY
    GET  /tiles?chat=KEY&n=1   the first image's tiles, drawn
"""
import contextlib
import http.server
import io
import json
import secrets
import threading
import urllib.parse
from pathlib import Path

from extras.pictures import draw_tiles
from model.errors import InputError
from model.images import read_image

UPLOAD_BYTES, QUESTION_BYTES = 50_000_000, 200_000      # largest image and question that are taken
CHATS = 16                                              # conversations kept; the oldest is forgotten for a new one
PAGE = Path(__file__).with_name("web.html")


class Server(http.server.ThreadingHTTPServer):
    """Serves conversations with `model` on 127.0.0.1; one question is answered at a time."""
    daemon_threads = True

    def __init__(self, model, port=0, **settings):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.settings, self.chats, self.lock = model, settings, {}, threading.Lock()
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60                                        # seconds of silence

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve({"/": self.page, "/tiles": self.tiles})

    def do_POST(self):
        self.serve({"/new": self.new, "/image": self.image, "/ask": self.ask, "/undo": self.undo, "/clear": self.clear})

    def serve(self, answers):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        # a foreign page must not ask in its visitor's name, nor a name that was turned to this address
        if host not in self.server.hosts or origin not in (None, *(f"http://{name}" for name in self.server.hosts)):
            return self.send("only pages of this server may ask", 403)
        if url.path not in answers:
            return self.send("no such page", 404)
        try:
            answers[url.path]()
        except InputError as error:
            self.send(" ".join(str(error).split()), 400)
        except OSError:                                 # the browser went away, or is silent
            self.close_connection = True

    def send(self, text, status=200, kind="text/plain; charset=utf-8"):
        body = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def body(self, most):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise InputError("an upload must tell its length")
        if int(length) > most:
            self.close_connection = True                # what follows is not read
            raise InputError(f"{int(length):,} bytes; at most {most:,} are taken")
        return self.rfile.read(int(length))

    @property
    def chat(self):
        if self.query.get("chat") not in self.server.chats:
            raise InputError("this conversation is gone; load the page again")
        return self.server.chats[self.query["chat"]]

    def page(self):
        self.send(PAGE.read_bytes(), kind="text/html; charset=utf-8")

    def new(self):
        key = secrets.token_urlsafe(16)
        with self.server.lock:
            while len(self.server.chats) >= CHATS:
                del self.server.chats[next(iter(self.server.chats))]
            self.server.chats[key] = self.server.model.chat(**self.server.settings)
        self.send(json.dumps({"chat": key, "most_bytes": UPLOAD_BYTES}))

    def image(self):
        data = self.body(UPLOAD_BYTES)
        try:
            image = read_image(data)
        except InputError as error:
            raise InputError("this file is no image that can be read; expected PNG, JPEG, WebP, TIFF or the like") from error
        with self.server.lock:
            self.chat.add_image(image)
            pictures = self.chat.pictures
        self.send(json.dumps({"number": len(pictures), "size": pictures[-1].image.size, "tiles": len(pictures[-1].tiles)}))

    def tiles(self):
        with self.server.lock:
            pictures, number = self.chat.pictures, self.query.get("n", "")
            if not number.isdecimal() or not 0 < int(number) <= len(pictures):
                raise InputError("no such image in this conversation")
            drawn = io.BytesIO()
            draw_tiles(self.chat, pictures[int(number) - 1]).save(drawn, "PNG")
        self.send(drawn.getvalue(), kind="image/png")

    def ask(self):
        question = self.body(QUESTION_BYTES).decode("utf-8", "replace")
        with self.server.lock, contextlib.closing(self.chat.stream(question)) as pieces:
            first = next(pieces, "")                    # before the answer's head is sent: a mistake is told as one
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()                          # no length: the answer ends where the connection does
            self.wfile.write(first.encode())
            for text in pieces:
                self.wfile.write(text.encode())

    def undo(self):
        with self.server.lock:
            self.chat.undo()
        self.send("taken back")

    def clear(self):
        with self.server.lock:
            self.chat.clear()
        self.send("forgotten")
