"""How many pages a second does one core decode, tile and tokenize? Ours beside the usual path, interleaved, and the same bytes.

    python tests/bench_data.py [--passes 5] [--image SCAN.png]
    python tests/bench_data.py --hub 1500 --delay 0.2           streamed through a Hub on this machine that answers late: pages
                                                                per second and the longest wait for a page
    python tests/bench_data.py --main FOLDER --pages 100        what the main process itself does for a page of a folder in the Hub's
                                                                layout: reads rows, takes examples, packs them, asks for the masks

The usual path: Pillow to RGB, resize, one crop a tile, float32, normalize on the host. The page is text with scan noise, 1700 x 2200
pixels, letter size at 200 dpi: 12 tiles and a thumbnail. Not collected by pytest.
"""
import argparse
import io
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont

from data import Page, PageDataset, load_examples, page_blocks, prefetch
from model import InternVL
from model.config import Config
from model.images import load_image
from model.language import page_mask
from model.tiling import choose_grid
from model.vision import IMAGENET_MEAN, IMAGENET_STD, normalize


def scan(width=1700, height=2200):
    """A grey page of text with noise."""
    draw, page = random.Random(0), Image.new("L", (width, height), 235)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=28)
    for y in range(80, height - 80, 44):
        pen.text((100, y), " ".join("".join(draw.choices("abcdefghiklmnoprstuvw0123456789", k=draw.randint(2, 9))) for _ in range(14)),
                 fill=draw.randint(0, 70), font=font)
    noise = np.random.default_rng(0).normal(0, 6, (height, width))
    return Image.fromarray((np.asarray(page) + noise).clip(0, 255).astype(np.uint8))


def encoded(page):
    """{kind of file: its bytes}."""
    kinds = {"PNG, grey": (page, "PNG"), "PNG, grey stored as RGB": (page.convert("RGB"), "PNG"), "PNG, 1 bit": (page.convert("1"), "PNG"),
             "JPEG, grey": (page, "JPEG"), "JPEG, grey stored as RGB": (page.convert("RGB"), "JPEG"),
             "PNG, colour": (Image.merge("RGB", (page, page.point(lambda v: v * 3 // 4), page)), "PNG")}
    files = {}
    for kind, (image, suffix) in kinds.items():
        file = io.BytesIO()
        image.save(file, suffix)
        files[kind] = file.getvalue()
    return files


def usual(data):
    """The usual path -> float32 (n, 3, 448, 448), normalized."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = choose_grid(*image.size)
    whole = image.resize((columns * 448, rows * 448), Image.Resampling.BICUBIC)
    tiles = [whole.crop((x * 448, y * 448, (x + 1) * 448, (y + 1) * 448)) for y in range(rows) for x in range(columns)]
    tiles.append(image.resize((448, 448), Image.Resampling.BICUBIC))
    mean, deviation = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.stack([(torch.from_numpy(np.asarray(tile).transpose(2, 0, 1).copy()).float() / 255 - mean) / deviation for tile in tiles])


def stream(settings):
    """Print pages per second and the longest wait, of pages in DocumentVQA's layout from a Hub that answers late."""
    from hub import serve
    from small_data import mixed_rows, write_split
    with tempfile.TemporaryDirectory() as folder:
        folder, name = Path(folder), "owner/pages"
        with serve(folder, lambda path: time.sleep(settings.delay)) as address:
            os.environ |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            write_split(folder / "datasets" / name, "train", mixed_rows(settings.hub), shards=8)
            from extras.sources import open_rows
            dataset = PageDataset(InternVL.from_pretrained("tiny", "cpu"), max_tiles=1)
            started = last = time.perf_counter()
            waits = []
            for example in itertools.islice(load_examples(prefetch(page_blocks(open_rows(name, "train"))), dataset, 0), settings.hub):
                waits.append(time.perf_counter() - last)
                time.sleep(settings.step)
                last = time.perf_counter()
    print(f"{len(waits)} pages, Hub answers after {settings.delay} s: {len(waits) / (last - started):.1f} pages/s; first page after "
          f"{waits[0]:.2f} s, longest wait for a later one {max(waits[1:]):.2f} s")


def main_process(settings):
    """Print the CPU milliseconds that the main process takes for a page, and what share of its time 25 pages a second are."""
    from extras.sources import open_rows
    tiny, rows = InternVL.from_pretrained("tiny", "cpu"), open_rows(settings.main, "train")
    dataset = PageDataset(tiny)
    dataset.config = Config()                                       # tiles and tokens of InternVL2-1B
    model = SimpleNamespace(tokenizer=tiny.tokenizer, config=dataset.config, device="cpu")
    next(iter(rows))                                                # imports what reads them
    process, wall, packing, copying, count = time.process_time(), time.perf_counter(), 0.0, 0.0, 0
    loader = iter(load_examples(prefetch(page_blocks(rows, None, block_rows=settings.pages)), dataset, settings.workers))
    thread = time.thread_time()                                     # its workers are there
    for example in itertools.islice(loader, settings.pages):
        started, count = time.thread_time(), count + 1
        torch.cat([example.tiles])                                  # as `pack` does; on a GPU the GPU does it
        copying += 2 * (time.thread_time() - started)
        started = time.thread_time()
        batch = InternVL.pack(model, [(example.tiles, example.prompt)])
        page_mask(batch.branches[0], None, batch.spans[0])
        packing += time.thread_time() - started
    packing -= copying / 2
    thread, process, wall = (1e3 * seconds / count for seconds in (time.thread_time() - thread - copying, time.process_time() - process - copying,
                                                                   time.perf_counter() - wall))
    print(f"{count} pages, {settings.workers} workers: {1e3 / wall:.1f} pages/s; CPU ms a page in the main process: {process:.2f}, of which "
          f"its main thread {thread:.2f}, of which packing {1e3 * packing / count:.2f}; at 25 pages/s the main thread is busy {thread / 40:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--image", help="an image file of your own")
    parser.add_argument("--hub", type=int, metavar="PAGES", help="stream so many pages through a Hub on this machine")
    parser.add_argument("--delay", type=float, default=0.2, help="of every answer of this Hub, in seconds (%(default)s)")
    parser.add_argument("--step", type=float, default=0.0, help="seconds that training takes for a page (%(default)s)")
    parser.add_argument("--main", metavar="FOLDER", help="measure the main process on a folder in the Hub's layout")
    parser.add_argument("--pages", type=int, default=100, help="of --main (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of --main (%(default)s)")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.main:
        return main_process(settings)
    if settings.hub:
        return stream(settings)
    print(f"one core of {platform.processor() or platform.machine()}; torch {torch.__version__}, Pillow {PIL.__version__}; {time.strftime('%Y-%m-%d')}\n")
    model = InternVL.from_pretrained("tiny", "cpu")
    examples = PageDataset(model)
    examples.config = type(model.config)()                      # tiles and tokens of InternVL2-1B
    files = {settings.image: Path(settings.image).read_bytes()} if settings.image else encoded(scan())
    print("| file | decode ms | usual ms | ours ms | ours, pages/s | times | bytes equal | MB handed on |\n|---|---|---|---|---|---|---|---|")
    for kind, data in files.items():
        page = Page("page", [data], ["What is the total amount?"] * 4, ["$41.07"] * 4)
        seconds = {load_image: [], usual: [], examples.__getitem__: []}
        for _ in range(settings.passes):
            for work, times in seconds.items():
                started = time.perf_counter()
                work(page if work == examples.__getitem__ else data)
                times.append(time.perf_counter() - started)
        decode, plain, ours = (min(times) for times in seconds.values())
        tiles = examples[page].tiles
        equal = torch.equal(normalize(tiles, torch.float32), usual(data)) if len(tiles) > 1 else "one tile: not compared"
        print(f"| {kind} | {decode * 1e3:.0f} | {plain * 1e3:.0f} | {ours * 1e3:.0f} | {1 / ours:.1f} | {sum(seconds[usual]) / sum(seconds[examples.__getitem__]):.1f} "
              f"| {equal} | {tiles.nbytes / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
