"""Which frames of a video does the model see? A few, evenly spread; each is one tile.

PyAV reads films and is imported only for them (pip install av); animated GIF, WebP and PNG need nothing but Pillow.
Source: the model card of InternVL2.
"""
from pathlib import Path

from PIL import Image, ImageSequence

from model.errors import InputError

ANIMATED = (".gif", ".webp", ".png", ".apng")


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
