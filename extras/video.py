"""Which frames of a video and which pages of a PDF does the model see? A few frames, evenly spread; every page.

PyAV reads videos (pip install av), pypdfium2 reads PDF (pip install pypdfium2); each is imported only when needed.
Animated GIF, WebP and PNG need nothing but Pillow. Source of the frames: the model card of InternVL2.
"""
import re
import struct
import sys
from pathlib import Path

from PIL import Image, ImageSequence

from model.errors import InputError
from model.images import load_image

PDF_DPI, DOCUMENT_PAGES = 200, 40               # resolution, as of the scans in DocumentVQA; most pages at once


def load_images(source, allow_private=False):
    """Read a path, an address, "-" (standard input), a PDF or a TIFF -> list of Pillow images. Raises InputError."""
    if source == "-":
        return [load_image(sys.stdin.buffer.read(), name="standard input")]
    document = re.fullmatch(r"(.*\.(pdf|tiff?))(?:#(\d{1,9}))?", source, re.IGNORECASE | re.DOTALL)
    if "://" in source or not document:
        return [load_image(source, allow_private)]
    path, kind, number = document.groups()
    return read_pdf(path, number) if kind.lower() == "pdf" else read_tiff(path, number)


def chosen(path, number, count):
    """The indices of a document's pages to read: all, or the one with a number, from 1. Raises InputError."""
    if number and not 0 < int(number) <= count:
        raise InputError(f"{path}#{number}: it has {count} pages")
    if not number and count > DOCUMENT_PAGES:
        raise InputError(f"{path}: {count} pages; at most {DOCUMENT_PAGES} at once: choose one, {path}#1")
    return [int(number) - 1] if number else range(count)


def read_tiff(path, number):
    """The pages of a TIFF as Pillow images: scan.tif all of them, scan.tif#2 the second. Raises InputError."""
    load_image(path, page=0)
    with Image.open(path) as document:
        pages = chosen(path, number, getattr(document, "n_frames", 1))
    return [load_image(path, page=page) for page in pages]


def read_pdf(path, number):
    """The pages of a PDF as RGB Pillow images: scan.pdf all of them, scan.pdf#2 the second. Raises InputError."""
    try:
        import pypdfium2
    except ImportError as error:
        raise InputError(f"{path}: reading PDF needs the package pypdfium2: pip install pypdfium2") from error
    try:
        with pypdfium2.PdfDocument(path) as document:
            pages = [document[page] for page in chosen(path, number, len(document))]
            for width, height in (page.get_size() for page in pages):
                if width * height * (PDF_DPI / 72) ** 2 > Image.MAX_IMAGE_PIXELS:
                    raise InputError(f"{path}: a page of {width:.0f} x {height:.0f} points; expected a sheet of paper")
            return [page.render(scale=PDF_DPI / 72).to_pil().convert("RGB") for page in pages]
    except (OSError, pypdfium2.PdfiumError) as error:
        raise InputError(f"{path}: cannot be read as a PDF ({error})") from error


def frame_places(count, frames, per_second=1.0, span=None):
    """The indices of the frames to show, of a video's `count`: the middles of `frames` equal parts.

    `span`: (from, to) in seconds, of a video with so many frames `per_second`; None: all of it.

    >>> frame_places(240, 8)
    [14, 44, 74, 104, 134, 163, 193, 223]
    """
    first, last = 0, count - 1
    if span is not None:
        first, last = max(0, round(span[0] * per_second)), min(round(span[1] * per_second), last)
    part = (last - first) / frames
    return [int(first + part / 2 + round(part * i)) for i in range(frames)]


def read_video(path, frames=8, span=None):
    """Read `frames` RGB Pillow images of a video file, at the places of `frame_places`. Raises InputError."""
    if "://" in str(path) or Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path}: not a file; expected a video in a file on this machine")
    if Path(path).suffix.lower() in (".gif", ".webp", ".png", ".apng"):
        return read_animation(path, frames, span)
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: reading a video needs the package av: pip install av (a GIF needs none)") from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count = sum(packet.size > 0 for packet in container.demux(stream))  # the count in the header is often wrong
            places = places_in(path, count, frames, float(stream.average_rate or 1), span)
            container.seek(0)
            return pick(container.decode(stream), places, lambda frame: frame.to_image())
    except (OSError, IndexError, UnicodeError, av.FFmpegError) as error:
        raise InputError(f"{path}: cannot be read as a video ({error})") from error


def read_animation(path, frames, span):
    try:
        with Image.open(path) as video:
            seconds = []
            for frame in ImageSequence.Iterator(video):
                frame.load()                        # a WebP file gives a frame's duration only then
                seconds.append(frame.info.get("duration", 0) / 1000)
            places = places_in(path, len(seconds), frames, len(seconds) / (sum(seconds) or len(seconds)), span)
            return pick(ImageSequence.Iterator(video), places, lambda frame: frame.convert("RGB"))
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an animation ({error})") from error


def places_in(path, count, frames, per_second, span):
    """`frame_places`, with an InputError for a video that has no frames there."""
    if count == 0 or span and not 0 <= span[0] * per_second <= min(span[1] * per_second, count - 1):
        wanted = f" from second {span[0]:g} to {span[1]:g}" if span else ""
        raise InputError(f"{path}: no frames{wanted}; it has {count} in {count / per_second:.1f} seconds")
    return frame_places(count, frames, per_second, span)


def pick(sequence, places, convert):
    """The items at the ascending `places` of a sequence; if it ends early, its last one stands for the missing ones."""
    kept = {}
    for i, frame in enumerate(sequence):
        if i in places:
            kept[i] = last = convert(frame)
        if i >= places[-1]:
            break
    return [kept.get(place, last) for place in places]
