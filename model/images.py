"""How does a file, its bytes or an address become RGB pixels? `load_image` takes all three.

Formats and number of pixels are limited; for an address also time, size and network.
"""
import http.client
import io
import ipaddress
import socket
import ssl
import string
import time
import urllib.parse
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from model.errors import InputError, warn

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")  # none that starts other programs
ORIENTATION, SIDEWAYS = 0x112, (5, 6, 7, 8)     # an EXIF tag, and its values that swap width and height
FETCH_SECONDS, FETCH_BYTES, FETCH_REDIRECTS = 20, 50_000_000, 10                        # limits for one address
REQUEST = b"GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: internvl2\r\nConnection: close\r\n\r\n"


def load_image(source, allow_private=False, name=None, page=None):
    """Read an image -> Pillow image of mode 1, L or RGB.

    `source`: path, http(s) address, a file's bytes (or what `bytes()` turns into them), or an image, returned as it is.
    `allow_private`: fetch from private networks too. `name`: of the source in errors. `page`: of a TIFF, from 0. The
    result is what a viewer shows: rotated as its EXIF says, transparent parts white, 16 bits per channel scaled to 8,
    the first frame. Raises InputError, also for 32 bits per channel and for more than 89 million pixels.
    """
    if isinstance(source, Image.Image):
        return source
    name = name or (source if isinstance(source, (str, Path)) else "it")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = fetch(source, allow_private)
    try:
        if not isinstance(source, (str, Path)):
            source = io.BytesIO(bytes(source))
        elif Path(source).exists() and not Path(source).is_file():
            raise OSError("not a file")                                 # a pipe would never end
        Image.init()                                                    # load all plugins: some formats are optional
        with warnings.catch_warnings(action="ignore"):                  # about metadata that is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=[format for format in FORMATS if format in Image.OPEN])
            if image.format == "TIFF" and page is None and image.n_frames > 1:
                warn(f"{name}: {image.n_frames} pages, only the first is read; save each as an image of its own")
            image.seek(page or 0)
            image.load()                # Image.open reads the header only; a truncated file fails here
            return as_shown(image)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        raise InputError(f"cannot read {name} as an image ({error or type(error).__name__})") from error


def as_shown(image):
    """A decoded image as a viewer shows it, in mode 1, L or RGB."""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel; expected 8 or 16")
    if image.mode.startswith("I;16"):
        shown = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's own conversion clips at 255
    elif image.has_transparency_data:
        shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    else:
        shown = image if image.mode in ("1", "L", "RGB") else image.convert("RGB")
    shown.info = image.info                                             # with the EXIF
    try:
        return ImageOps.exif_transpose(shown)
    except Exception:                   # broken EXIF raises unrelated classes of errors; the image stays as it is
        return shown


def image_size(source):
    """(width, height) of an image, from its file's header; None for an address and for what cannot be read."""
    try:
        if isinstance(source, str) and not Path(source).is_file():
            return None
        with Image.open(source if isinstance(source, str) else io.BytesIO(bytes(source))) as image:
            return image.size[::-1] if image.getexif().get(ORIENTATION) in SIDEWAYS else image.size
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
        return None


def compressed(image, quality):
    """The image after JPEG compression of this quality, 1 to 100: the official code's augmentation."""
    file = io.BytesIO()
    image.convert("L" if image.mode in ("1", "L") else "RGB").save(file, "JPEG", quality=quality)
    return load_image(file.getvalue())


# ------------------------------------------------------------------------------------------------------------ addresses

# with the standard library: which HTTP client is installed depends on the release of huggingface_hub
# reserved IPv4; Teredo and 6to4, which embed an IPv4 address
NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "2001::/32", "2002::/16")]


def is_public(peer):
    """Whether an IP address is public: global unicast, and no IPv6 address that embeds an IPv4 one."""
    return (peer.is_global and not peer.is_multicast and not any(peer in network for network in NOT_PUBLIC)
            and (peer.version == 4 or peer in ipaddress.ip_network("2000::/3")))


class Received(io.RawIOBase):
    """A socket as http.client reads it, until a deadline however slowly it drips; then `settimeout` raises."""

    def __init__(self, sock, deadline):
        self.sock, self.deadline, self.makefile = sock, deadline, lambda _: io.BufferedReader(self)
        self.readable = lambda: True

    def readinto(self, buffer):
        self.sock.settimeout(self.deadline - time.monotonic())
        return self.sock.recv_into(buffer)


def connect(url, allow_private, deadline):
    """A socket to the host of a URL. The IP address that is judged is the one connected to."""
    failure, secure = OSError("no address"), url.scheme == "https"
    for *_, place in socket.getaddrinfo(url.hostname, url.port or (443 if secure else 80), type=socket.SOCK_STREAM):
        peer = ipaddress.ip_address(place[0].partition("%")[0])
        if not (allow_private or is_public(peer)):
            raise OSError(f"{url.hostname} is {peer}, an address of a private network; --allow-private lets it in")
        try:
            sock = socket.create_connection(place[:2], deadline - time.monotonic())
            return ssl.create_default_context().wrap_socket(sock, server_hostname=url.hostname) if secure else sock
        except OSError as error:
            failure = error                                             # the next IP address may answer
    raise failure


def fetch(address, allow_private=False):
    """The bytes behind an http(s) address. Raises InputError for what fails, is too large, too slow or private.

    The time limit covers all but the name lookup; every redirect is judged. No proxy: behind one, nobody can judge.
    """
    deadline, target = time.monotonic() + FETCH_SECONDS, address
    try:
        for _ in range(FETCH_REDIRECTS + 1):
            url = urllib.parse.urlsplit(target)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise OSError(f"{target!r} is not an http(s) address")
            path = url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl()
            with connect(url, allow_private, deadline) as sock:
                sock.sendall(REQUEST % (urllib.parse.quote(path, safe=string.punctuation).encode(),
                                        url.netloc.rpartition("@")[2].encode("idna")))
                response = http.client.HTTPResponse(Received(sock, deadline))
                response.begin()
                data = response.read(FETCH_BYTES + 1) if response.status == 200 else b""
            if response.status == 200 and len(data) <= FETCH_BYTES:
                return data
            location = response.headers.get("Location", "").encode("latin-1").decode("utf-8", "replace")
            if data or response.status not in (301, 302, 303, 307, 308) or not location:
                raise OSError(f"more than {FETCH_BYTES:,} bytes" if data else f"HTTP Error {response.status}")
            target = urllib.parse.urljoin(target, location)
        raise OSError(f"more than {FETCH_REDIRECTS} redirects")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"not whole after {FETCH_SECONDS} seconds" if time.monotonic() >= deadline else error
        raise InputError(f"{address}: cannot be fetched ({reason})") from error
