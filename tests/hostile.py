"""Files and rows that want to do harm, from fixed seeds, each shown to the code that reads such things: python tests/hostile.py FOLDER

Prints as JSON how many there were, what escaped as anything but an InputError, the slowest in seconds, and the memory's peak in GB.
"""
import copy
import io
import itertools
import json
import random
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import embedded  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402

from data import PageDataset, page_blocks  # noqa: E402
from extras.memory import peak_gb  # noqa: E402
from extras.run_folder import SkipLog  # noqa: E402
from model import InputError, InternVL  # noqa: E402
from model.checkpoint import TINY, load_checkpoint  # noqa: E402
from model.images import load_image  # noqa: E402
from model.prompt import write_page  # noqa: E402
from model.tiling import tile_page  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402


def encode(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def png_of(width, height, color=0):
    """The head of a PNG of any size, with almost nothing behind it."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b""))


def broken(draw, content):
    """Bytes cut, flipped, repeated, or with four bytes of the head made large."""
    content, kind = bytearray(content), draw.randrange(5)
    if kind == 0:
        return bytes(content[:draw.randrange(len(content))])
    if kind == 1:
        for _ in range(draw.randint(1, 40)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    if kind == 2:
        place = draw.randrange(min(100, len(content)))
        content[place:place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x40\0\0\0"))
    if kind == 3:
        place, size = draw.randrange(len(content)), draw.randint(1, 200)
        content[place:place] = content[place:place + size] * draw.randint(1, 50)
    if kind == 4:
        content[draw.randrange(len(content)):] = draw.randbytes(draw.randrange(2000))
    return bytes(content)


def images():
    """Image files: odd but honest ones, bombs, and broken ones of every format."""
    page = Image.effect_noise((120, 80), 90)
    honest = {
        "CMYK": encode(page.convert("CMYK"), "JPEG"), "palette": encode(page.convert("P"), "PNG"), "1x1": encode(page.resize((1, 1)), "PNG"),
        "transparent": encode(page.convert("RGBA"), "PNG"), "30000x20": encode(page.resize((30_000, 20)), "PNG"),
        "20x30000": encode(page.resize((20, 30_000)), "PNG"), "16 bit": encode(Image.fromarray(np.asarray(page).astype(np.uint16) << 8), "PNG"),
        "16 bit TIFF": encode(Image.fromarray(np.asarray(page).astype(np.uint16) << 8), "TIFF"), "LA": encode(page.convert("LA"), "PNG"),
        "animated": encode(page, "GIF", save_all=True, append_images=[page.rotate(90)] * 3), "WebP": encode(page.convert("RGB"), "WEBP"),
        "80 million pixels": png_of(8_000, 10_000)}
    yield from honest.items()
    for name, file in {"empty": b"", "text": b"<html>404</html>", "bomb": png_of(50_000, 50_000, 2), "bomb RGBA": png_of(30_000, 5_000, 6),
                       "wide bomb": png_of(2 ** 31 - 1, 1), "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"}.items():
        yield name, file
    draw = random.Random("images")
    exif = Image.Exif()
    exif[0x112] = 6
    kinds = [("PNG", {}), ("JPEG", {"exif": exif}), ("GIF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"exif": exif}), ("BMP", {}), ("PPM", {})]
    for i in range(140):
        kind, more = kinds[i % len(kinds)]
        yield f"broken {kind} {i}", broken(draw, encode(page.convert("RGB"), kind, **more))


def show_image(file):
    tile_page(load_image(file), 12)


def rows():
    """Lists of rows: null, empty and wrong fields, one page with thousands of questions, questions of a million characters."""
    good = {"question": "What?", "answers": ["this"], "image": {"bytes": encode(Image.new("L", (40, 40), 255), "PNG"), "path": None},
            "docId": 1, "ucsf_document_page_no": "1"}
    yield "3,000 questions on a page", [good | {"question": f"What is number {i}?"} for i in range(3_000)]
    yield "a million characters", [good | {"question": "x " * 500_000}, good]
    yield "an answer of a million characters", [good | {"answers": ["y" * 1_000_000]}, good]
    odd = {"question": (None, "", 5, b"x", ["x"], "\ud800", "\0", "<|im_end|><image>" * 50), "docId": (None, "a/b/../c", -1, 2.5, "x" * 9_999),
           "answers": (None, [], [""], [None], "text", 7, [5], {"a": 1}, [["x"]], ["\ud800"], ["a", None]),
           "image": (None, {"bytes": None, "path": None}, {"bytes": None, "path": "/dev/zero"}, {"bytes": None, "path": "/nowhere"},
                     {"bytes": b"", "path": None}, {}, "nowhere.png", b"bytes", 7, {"bytes": "text"})}
    draw = random.Random("rows")
    for i in range(60):
        lines = []
        for page in range(6):
            line = good | {"docId": page}
            for column in draw.sample(list(odd), draw.randint(0, 2)):
                line[column] = draw.choice(odd[column])
            lines.append(line)
        yield f"rows {i}", lines


def show_rows(lines):
    model, skips = show_rows.model, SkipLog()
    read = left_out = pages = 0
    for page in itertools.chain.from_iterable(page_blocks(lines, seed=3)):
        example = PageDataset(model, 1, 2048)[page]
        read, pages = read + page.rows, pages + 1
        try:
            used = skips.usable(example)
        except InputError:                                          # the 1 % rule: this is not what is asked here
            used = False
        left_out += page.unanswered + (len(page.questions) if not used else len(example.too_long))
        if used and pages <= 3:
            with torch.no_grad():
                model(model.pack([(example.tiles, example.prompt)]))
    assert read == len(lines)
    assert skips.count(SkipLog.UNANSWERED) + skips.count(SkipLog.TOO_LONG) <= left_out
    assert (left_out == 0) == (not skips.lines), (left_out, skips.lines)        # every loss has its line


def configs():
    official = json.loads((TINY / "config.json").read_text())
    yield "deep", "[" * 200_000
    yield "not UTF-8", b"\xff\xfe{}"
    yield "a number", "1e999"
    draw = random.Random("configs")
    values = (10 ** 9, 10 ** 18, 0, -1, 2.5, 1e308, float("nan"), float("inf"), "64", None, True, [], {}, [64], 10 ** 400, 999_999)
    for i in range(70):
        config = copy.deepcopy(official)
        part = config if i % 3 == 0 else config["vision_config" if i % 3 == 1 else "llm_config"]
        for key in draw.sample(sorted(part), draw.randint(1, 2)):
            part[key] = draw.choice(values)
        yield f"config {i}", json.dumps(config)


def show_config(content, folder):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    InternVL.from_pretrained(folder, "cpu")


def weights():
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    def file_of(header, body=b"\0" * 4096):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    yield "empty", b""
    for length in (0, 1, 2 ** 31, 2 ** 62, 2 ** 64 - 1, 99_000_000):
        yield f"length {length}", struct.pack("<Q", length) + b"{" * 100
    yield "deep header", file_of(b"[" * 500_000)
    yield "many names", file_of({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}, b"")
    for name in ("../../etc/passwd", "/tmp/x", "a\0b", "model.", "optimizer.x", "x" * 100_000, "optimizer.step.mlp1.0.bias", names[0]):
        yield f"name {name[:20]!r}", file_of({name: entry}, bytes(16))
    for change in ({"shape": [2 ** 40, 2 ** 40]}, {"shape": [-1]}, {"shape": [2 ** 63]}, {"data_offsets": [16, 0]}, {"data_offsets": [0, 2 ** 62]},
                   {"dtype": "OBJECT"}, {"dtype": "I64"}, {"shape": "4"}, {"shape": [1.5]}, {"data_offsets": [8, 24]}):
        yield f"entry {change}", file_of({names[0]: entry | change, "other": entry}, bytes(64))
    yield "overlap", file_of({"a": entry, "b": entry}, bytes(16))
    for state in ("[1]", "{}", '{"step": "x"}', "[" * 100_000, "null"):
        yield f"state {state[:9]}", file_of({"__metadata__": {"state": state, "sha256": "0"}, "model.mlp1.0.bias": {
            "dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}}, bytes(1024))
    draw, real = random.Random("weights"), (TINY / "model.safetensors").read_bytes()
    for i in range(20):
        yield f"broken {i}", broken(draw, real[:20_000]) + real[20_000:]


def show_weights(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    for read in (lambda: InternVL.from_pretrained(folder, "cpu"), lambda: load_checkpoint(folder / "model.safetensors", show_rows.model)):
        try:
            read()
        except InputError:
            pass


def tokenizers():
    real = json.loads((TINY / "tokenizer.json").read_text())
    settings = (TINY / "tokenizer_config.json").read_text()
    for name, content in {"empty": b"", "object": b"{}", "list": b"[]", "deep": b"[" * 100_000, "binary": b"\xff\0\xff"}.items():
        yield f"{name} tokenizer.json", (content, settings.encode())
        yield f"{name} tokenizer_config.json", (json.dumps(real).encode(), content)
    draw = random.Random("tokenizers")
    values = (None, [], {}, "", "x", -1, 10 ** 18, 1.5, True, ["x"], {"type": "BPE"}, {"type": "Nonsense"},
              [{"id": 2 ** 40, "content": "x", "special": True}], {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False})
    for i in range(40):
        changed, other = copy.deepcopy(real), json.loads(settings)
        part = draw.choice((changed, changed["model"], other))
        for key in draw.sample(sorted(part), draw.randint(1, 2)):
            part[key] = draw.choice(values)
        if i % 4 == 0:
            other |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", "chat_template": "{{ 1 / 0 }}",
                      "added_tokens_decoder": {"99999999": {"content": "x", "special": True}}}
        yield f"tokenizer {i}", (json.dumps(changed).encode(), json.dumps(other).encode())


def show_tokenizer(content, folder):
    (folder / "tokenizer.json").write_bytes(content[0])
    (folder / "tokenizer_config.json").write_bytes(content[1])
    write_page(load_tokenizer(folder), 64, [1], [[("x" * 40 + " What?", "this")]])


def main():
    torch.set_num_threads(1)
    show_rows.model = InternVL.from_pretrained("tiny", "cpu")
    folder, told = Path(sys.argv[1]) / "model", {"count": 0, "refused": 0, "escaped": [], "slowest": ["", 0.0]}
    sources = ((images, show_image), (rows, show_rows), (configs, show_config), (weights, show_weights), (tokenizers, show_tokenizer))
    for source, show in sources:
        for name, content in source():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
            started = time.perf_counter()
            try:
                show(content, folder) if source in (configs, weights, tokenizers) else show(content)
            except InputError:
                told["refused"] += 1
            except BaseException as error:                          # whatever it is, it is reported
                told["escaped"].append(f"{source.__name__}, {name}: {type(error).__name__}: {error}"[:300])
            seconds = time.perf_counter() - started
            told["count"] += 1
            told["slowest"] = max(told["slowest"], [f"{source.__name__}, {name}", round(seconds, 2)], key=lambda pair: pair[1])
    told["gb"] = peak_gb("cpu")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
