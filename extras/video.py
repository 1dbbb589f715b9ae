"""How does a file of several pictures become images? Every page of a PDF; evenly spread frames of a video, a tile each.

PyAV reads films (pip install av), pypdfium2 reads PDF (pip install pypdfium2); each is imported only for its files.
Animated GIF, WebP and PNG need nothing but Pillow.
Source of the frames: the model card of InternVL2.
"""
import re
import sys
from pathlib import Path

from PIL import Image, ImageSequence

from model.errors import InputError
from model.images import load_image
from model.tiling import read_image

ANIMATED = (".gif", ".webp", ".png", ".apng")
PDF_DPI, PDF_PAGES = 200, 40                    # the resolution of DocumentVQA's scans; the most pages at once


# ---------------------------------------------------------------------------------------------------------- images, PDF

def load_images(source, allow_private=False):
    """The Pillow images of a path, an address, a PDF or, for "-", of standard input. Raises InputError."""
    if source == "-":
        return [read_image(sys.stdin.buffer.read(), "standard input")]
    if "://" not in source and re.search(r"\.pdf(#\d+)?$", source, re.IGNORECASE):
        return read_pdf(source)
    return [load_image(source, allow_private)]


def read_pdf(source):
    """The pages of a PDF file, or page N of "FILE#N": Pillow images, RGB. Raises InputError if it cannot be read."""
    path, number = re.fullmatch(r"(.*?)(?:#(\d+))?", source, re.DOTALL).groups()
    try:
        import pypdfium2
    except ImportError as error:
        raise InputError(f"{source}: reading PDF needs the package pypdfium2: pip install pypdfium2") from error
    try:
        with pypdfium2.PdfDocument(path) as document:
            pages = [int(number) - 1] if number else range(len(document))
            if len(pages) > PDF_PAGES:
                raise InputError(f"{source}: {len(pages)} pages, at most {PDF_PAGES} at once; choose one: {source}#1")
            return [document[page].render(scale=PDF_DPI / 72).to_pil().convert("RGB") for page in pages]
    except (OSError, IndexError, pypdfium2.PdfiumError) as error:
        raise InputError(f"{source}: cannot be read as a PDF, or has no such page ({error})") from error


# --------------------------------------------------------------------------------------------------------------- frames


def frame_places(count, frames, per_second=1.0, span=None):
    """Which of a video's `count` frames are seen: the middles of `frames` equal parts.

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
    """`frames` Pillow images of a video, RGB, those of `frame_places`. Raises InputError for what cannot be read."""
    if Path(path).suffix.lower() in ANIMATED:
        return read_animation(path, frames, span)
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: reading a film needs the package av: pip install av (GIF and WebP need none)") from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count = sum(packet.size > 0 for packet in container.demux(stream))      # what the header says is often wrong
            places = places_in(path, count, frames, float(stream.average_rate or 1), span)
            container.seek(0)
            return pick(container.decode(stream), places, lambda frame: frame.to_image())
    except (OSError, IndexError, av.FFmpegError) as error:
        raise InputError(f"{path}: cannot be read as a video ({error})") from error


def read_animation(path, frames, span):
    try:
        with Image.open(path) as video:
            seconds = []
            for frame in ImageSequence.Iterator(video):
                frame.load()                        # a WebP tells a frame's duration only then
                seconds.append(frame.info.get("duration", 0) / 1000)
            places = places_in(path, len(seconds), frames, len(seconds) / (sum(seconds) or len(seconds)), span)
            return pick(ImageSequence.Iterator(video), places, lambda frame: frame.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an animation ({error})") from error


def places_in(path, count, frames, per_second, span):
    if count == 0 or span and not 0 <= span[0] * per_second <= min(span[1] * per_second, count - 1):
        asked = f" from second {span[0]:g} to {span[1]:g}" if span else ""
        raise InputError(f"{path}: no frames{asked}; it has {count} in {count / per_second:.1f} seconds")
    return frame_places(count, frames, per_second, span)


def pick(sequence, places, convert):
    """What is at the ascending `places` of a sequence; one that ends early gives its last for those behind."""
    kept = {}
    for i, frame in enumerate(sequence):
        if i in places:
            kept[i] = last = convert(frame)
        if i >= places[-1]:
            break
    return [kept.get(place, last) for place in places]
