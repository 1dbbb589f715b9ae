"""A small Hub on 127.0.0.1: serves ROOT/models/OWNER/NAME and ROOT/datasets/OWNER/NAME over the calls our libraries make."""
import contextlib
import hashlib
import http.server
import json
import threading
import time
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def fault(self):
        """Do what `faults` wants of this request; returns whether that was all."""
        self.cut = fault = self.server.faults(self.path)
        if isinstance(fault, int):
            self.json({"error": "injected"}, fault)
        elif fault == "stall":
            time.sleep(1.5)
        self.close_connection = fault in ("close", "stall", "cut")
        return fault not in (None, "cut")

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:len(body) // 2] if self.cut == "cut" else body)

    def json(self, value, status=200, **headers):
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def absent(self, what):
        self.json({"error": what}, 404, X_Error_Code=what, X_Error_Message=what)

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        if self.fault():
            return
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.split("/") if part]
        if parts[0] == "api" and len(parts) >= 4:
            return self.api(parts[1], "/".join(parts[2:4]), parts[4:])
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        folder = self.server.root / kind / "/".join(parts[:2])
        if not folder.is_dir():
            return self.absent("RepoNotFound")
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return self.absent("EntryNotFound")
        content, span = file.read_bytes(), self.headers.get("Range")
        headers = dict(ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        if not span:
            return self.answer(content, **headers)
        first, last = span.removeprefix("bytes=").split("-")
        start = int(first) if first else len(content) - int(last)
        stop = int(last) + 1 if first and last else len(content)
        self.answer(content[start:stop], 206, Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **headers)

    do_HEAD = do_GET

    def api(self, kind, name, rest):
        folder = self.server.root / kind / name
        if not folder.is_dir():
            return self.absent("RepoNotFound")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            listed = files if "recursive=true" in self.path.lower() else sorted(
                {f"{under}/".lstrip("/") + file.removeprefix(under).lstrip("/").split("/")[0]
                 for file in files if file.startswith(under)})
            return self.json([self.entry(folder, file) for file in listed])
        if rest[:1] == ["paths-info"]:
            paths = json.loads(self.body)["paths"] if self.body[:1] == b"{" else urllib.parse.parse_qs(self.body.decode())["paths"]
            return self.json([self.entry(folder, path) for path in paths if (folder / path).exists()])
        self.json({"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0,
                   "likes": 0, "siblings": [{"rfilename": file} for file in files]})

    @staticmethod
    def entry(folder, name):
        path = folder / name
        return {"type": "directory" if path.is_dir() else "file", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(),
                "size": path.stat().st_size if path.is_file() else 0}


@contextlib.contextmanager
def serve(root, faults=lambda path: None):
    """Serve `root`; yields the address for HF_ENDPOINT.

    `faults`: what goes wrong with the request for a path: a status to refuse it with, "close" (no answer), "stall" (none for
    1.5 seconds), "cut" (half of it), or None.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.daemon_threads, server.faults = root, True, faults
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
