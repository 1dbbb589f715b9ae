"""Images come from files, bytes and addresses as a viewer shows them; an address leads to no private network."""
import io
import ipaddress
import shutil
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from model import InputError, images
from model.images import image_size, is_public, load_image


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def test_unreadable_images_are_refused_in_one_line(tmp_path):
    page = encoded(Image.effect_noise((300, 300), 90), "JPEG")
    for bad in (b"", b"not an image", page[:2000]):
        with pytest.raises(InputError, match="cannot read page 7 as an image"):
            load_image(bad, name="page 7")
    for path in (tmp_path, "x" * 5000, "nul\0.png"):
        with pytest.raises(InputError, match="cannot read page 8 as an image"):
            load_image(path, name="page 8")
    with pytest.raises(InputError, match="nowhere.png: no such file"):
        load_image(tmp_path / "nowhere.png")


def test_an_image_is_read_as_a_viewer_shows_it():
    page, exif = Image.new("L", (60, 40)), Image.Exif()
    exif[images.ORIENTATION] = 6
    rotated = encoded(page, "JPEG", exif=exif)
    assert load_image(rotated).size == image_size(rotated) == (40, 60) and image_size(encoded(page)) == (60, 40)
    assert load_image(encoded(Image.new("RGBA", (2, 2)))).getpixel((0, 0)) == (255, 255, 255)           # transparent: white
    deep = load_image(encoded(Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))))
    assert (deep.mode, deep.getpixel((0, 0))) == ("L", 0x80)
    assert image_size("http://localhost/x.png") is image_size(b"text") is image_size("x" * 5000) is None


def test_a_path_bytes_and_a_view_of_them_give_the_same_image(tmp_path):
    content = encoded(Image.effect_noise((50, 30), 90))
    (tmp_path / "page.png").write_bytes(content)
    assert load_image(str(tmp_path / "page.png")) == load_image(content) == load_image(memoryview(content))


# -------------------------------------------------------------------------------------------------------------- addresses

@pytest.mark.parametrize("text", [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1",
    "192.0.0.1", "192.0.0.9", "240.0.0.1", "198.18.0.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "fe80::1",
    "fec0::1", "fc00::1", "fd00::1", "ff02::1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::1", "2001::7f00:1", "2001:db8::1",
    "5f00::1", "100::1"])
def test_an_address_of_a_private_network_is_not_public(text):
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "151.101.1.69", "2606:4700:4700::1111", "2a00:1450:4001::200e", "2001:4860:4860::8888"])
def test_an_address_of_the_internet_is_public(text):
    assert is_public(ipaddress.ip_address(text))


class Handler(BaseHTTPRequestHandler):
    """What a server may do: send an image, redirect, drip, flood, or send an interim response without end."""
    page = encoded(Image.new("L", (30, 20), 7))

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        port = self.server.server_port
        to = {"/private": f"http://127.0.0.2:{port}/x", "/name": f"http://localhost:{port}/x", "/ftp": "ftp://127.0.0.1/x",
              "/file": "file:///etc/passwd", "/loop": "/loop", "/relative": "d/%20/../page.png?a=b c", "/chinese": "/图.png".encode().decode("latin-1"),
              "/nowhere": ""}.get(self.path)
        try:
            if self.path == "/continue":
                while True:
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)
            if self.path == "/header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                self.drip(b"x")
            self.send_response(302 if to is not None else 404 if self.path == "/missing" else 200)
            if to is not None:
                self.send_header("Location", to)
            self.end_headers()
            if self.path == "/slow":
                self.drip(b"x")
            while self.path == "/endless":
                self.wfile.write(b"x" * 1_000_000)
            self.wfile.write(self.page)
        except ConnectionError:
            pass

    def drip(self, piece):
        while True:
            self.wfile.write(piece)
            threading.Event().wait(0.05)


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    server.daemon_threads, server.asked = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def public(server, monkeypatch):
    """The server's address, where 127.0.0.1 counts as public; the private network begins at 127.0.0.2."""
    real = images.ipaddress.ip_address
    monkeypatch.setattr(images.ipaddress, "ip_address", lambda text: real("8.8.8.8" if text == "127.0.0.1" else text))
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("path, message", [
    ("/private", "127.0.0.2 is 127.0.0.2, an address of a private network; --allow-private"), ("/ftp", "is not an http"),
    ("/file", "is not an http"), ("/loop", "more than 10 redirects"), ("/nowhere", "HTTP Error 302"), ("/missing", "HTTP Error 404"),
    ("/slow", "not whole after 1 seconds"), ("/header", "not whole after 1 seconds"), ("/continue", "not whole after 1 seconds"),
    ("/endless", "more than 50,000,000 bytes")])
def test_addresses_that_lead_astray_or_never_end_are_refused(public, server, monkeypatch, path, message):
    monkeypatch.setattr(images, "FETCH_SECONDS", 1 if "seconds" in message else 20)
    before = threading.active_count()
    with pytest.raises(InputError, match=message):
        load_image(public + path)
    assert not any(host.startswith("127.0.0.2") for host, _ in server.asked)
    deadline = time.monotonic() + 10                                    # the server's threads end with their connections, soon after
    while threading.active_count() > before + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 1


def test_a_redirect_within_the_public_network_is_followed(public, server):
    for path, target in (("/relative", "/d/%20/../page.png?a=b%20c"), ("/chinese", "/%E5%9B%BE.png"), ("/a b?图=1", "/a%20b?%E5%9B%BE=1")):
        assert load_image(public + path).size == (30, 20)
        assert server.asked[-1] == (public.removeprefix("http://"), target.replace("/d/%20/..", "/d"))


def test_private_addresses_are_refused_under_every_name(server):
    """Before a byte is sent; with `allow_private` they are fetched."""
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "127.1", "2130706433", "[::ffff:127.0.0.1]", "user@127.0.0.1"):
        with pytest.raises(InputError, match="cannot be fetched"):
            load_image(f"http://{host}:{server.server_port}/x")
    assert server.asked == []
    assert load_image(f"http://localhost:{server.server_port}/x", allow_private=True).size == (30, 20)


def test_a_name_is_looked_up_once(server, monkeypatch):
    """A name that is public when it is judged and private when it is connected to would be DNS rebinding."""
    looked_up, real = [], images.socket.getaddrinfo

    def rebinding(host, *more, **flags):
        looked_up.append(host)
        return real("8.8.8.8" if looked_up.count("name") == 1 and host == "name" else "127.0.0.1" if host == "name" else host, *more, **flags)
    monkeypatch.setattr(images.socket, "getaddrinfo", rebinding)
    connected = []
    monkeypatch.setattr(images.socket, "create_connection", lambda place, _: connected.append(place) or real_refusal())
    with pytest.raises(InputError, match="refused"):
        load_image(f"http://name:{server.server_port}/x")
    assert connected == [("8.8.8.8", server.server_port)] and looked_up == ["name"]


def real_refusal():
    raise ConnectionRefusedError("refused")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the program openssl for a certificate")
def test_https_is_read_and_a_foreign_certificate_refused(tmp_path, server, monkeypatch):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = f"https://localhost:{server.server_port}"
    with pytest.raises(InputError, match="certificate verify failed"):
        load_image(f"{address}/x", allow_private=True)
    monkeypatch.setattr(images, "FETCH_SECONDS", 1)
    with pytest.raises(InputError, match="cannot be fetched"):
        load_image(f"{address}/x")
    real = ssl.create_default_context
    monkeypatch.setattr(images.ssl, "create_default_context", lambda: real(cafile=tmp_path / "cert.pem"))
    assert load_image(f"{address}/x", allow_private=True).size == (30, 20)
    with pytest.raises(InputError, match="not whole after 1 seconds"):
        load_image(f"{address}/slow", allow_private=True)
