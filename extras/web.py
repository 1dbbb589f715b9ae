"""How is a conversation held in a browser? On a page made by gradio (pip install gradio), for this machine alone."""
import contextlib
import os
import signal
import socket
import tempfile
import threading

from extras.chat_cli import log, remarks, stats_line
from extras.pictures import draw_tiles
from extras.video import load_images
from model.errors import InputError
from model.images import FETCH_BYTES

CHATS = 16                                              # conversations kept in memory; a new one replaces the oldest


class Conversations:
    """A `model.chat.Chat` for each session of the browser. `settings`: of `model.chat`."""

    def __init__(self, model, settings):
        self.model, self.settings, self.chats, self.lock = model, settings, {}, threading.Lock()

    def chat(self, session, length):
        """The session's chat as it was when the browser's history had this length; undo, retry and clear shorten it."""
        while len(self.chats) >= CHATS and session not in self.chats:
            del self.chats[next(iter(self.chats))]
        chat, past = self.chats.setdefault(session, (self.model.chat(**self.settings), []))
        while past and past[-1][0] >= length:
            _, chat.turns = past.pop()
        past.append((length, list(chat.turns)))
        chat.waiting = []
        return chat

    def answer(self, session, length, question, files):
        """Yield (text so far, remarks, None), then (text, notes, the picture of the tiles or None)."""
        with self.lock:                                 # one question at a time
            try:
                chat, text = self.chat(session, length), ""
                for image in [image for path in files for image in load_images(path)]:
                    chat.add_image(image)
                notes = remarks(chat, undo="press Undo")
                with contextlib.closing(chat.stream(question)) as pieces:
                    for piece in pieces:
                        text += piece
                        yield text, "; ".join(notes), None
                pictures = chat.turns[-1].pictures
                tiles = draw_tiles(pictures, self.model.config.tokens_per_tile) if pictures else None
                yield text, "; ".join([*notes, stats_line(chat)]), tiles
            except InputError as error:
                yield " ".join(str(error).split()), "not answered", None


def serve(model, port, settings):
    """Serve the page at http://127.0.0.1:port until Ctrl-C; port 0: a free one. Raises InputError.

    `settings`: of `model.chat`. Nothing is sent anywhere else; uploaded files are deleted at the end.
    """
    try:
        with socket.create_server(("127.0.0.1", port)) as free:
            port = free.getsockname()[1]
    except OSError as error:
        raise InputError(f"--port {port}: cannot be used ({error}); give another one, or 0 for a free one") from error
    with tempfile.TemporaryDirectory() as folder:
        page = launch(Conversations(model, settings), port, folder)
        log(f"http://127.0.0.1:{port}   Ctrl-C stops it")
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # then, too, uploads are deleted
        try:
            threading.Event().wait()
        finally:
            page.close()


def launch(conversations, port, folder):
    """Start the page in a thread, with uploads in `folder` -> the running gradio.ChatInterface. Raises InputError."""
    # read when gradio is imported: no statistics, and no proxy between the page and this machine
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "NO_PROXY": "127.0.0.1"}
    try:
        import gradio
        from starlette.middleware import Middleware
        from starlette.middleware.base import BaseHTTPMiddleware
    except ImportError as error:
        raise InputError("--web needs the package gradio: pip install gradio") from error

    def respond(message, history, request: gradio.Request):
        files = [file if isinstance(file, str) else file["path"] for file in message["files"]]  # after retry: objects
        for text, notes, tiles in conversations.answer(request.session_hash, len(history), message["text"], files):
            content = gradio.Image(tiles) if tiles else ""
            yield [text, {"role": "assistant", "content": content, "metadata": {"title": notes}}] if notes else text

    page = gradio.ChatInterface(
        respond, multimodal=True, title="Ask a page", analytics_enabled=False, api_visibility="private",
        chatbot=gradio.Chatbot(render_markdown=False, latex_delimiters=[], buttons=[], height="70vh"),
        textbox=gradio.MultimodalTextbox(file_types=["image", ".pdf"], file_count="multiple", stop_btn=True,
                                         placeholder="Ask a question; drop images here"))
    page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                ssr_mode=False, run_history=False, footer_links=[], max_file_size=FETCH_BYTES,
                css="button[aria-label=Share] { display: none }",
                app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=own_page_only(port))]})
    return page


def own_page_only(port):
    """Middleware: no other page may ask in its visitor's name, and this page may reach no other server."""
    from starlette.responses import PlainTextResponse
    names = [f"127.0.0.1:{port}", f"localhost:{port}"]

    async def dispatch(request, respond):
        origin = request.headers.get("origin")
        if request.headers.get("host") not in names or origin not in (None, *(f"http://{name}" for name in names)):
            return PlainTextResponse("only the page of this server may ask", 403)
        reply = await respond(request)
        reply.headers["Content-Security-Policy"] = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
        return reply

    return dispatch
