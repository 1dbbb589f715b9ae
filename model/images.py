"""How does a file, its bytes or an address become RGB pixels?"""
from PIL import Image

from model.network import fetch
from model.tiling import compressed, image_size, read_image

__all__ = ["compressed", "image_size", "load_image"]


def load_image(source, allow_private=False):
    """A Pillow image from itself, from the bytes of a file, a path or an http(s) address. Raises InputError."""
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str):
        return read_image(source)
    if source.startswith(("http://", "https://")):
        return read_image(fetch(source, allow_private), source)
    return read_image(source, source)
