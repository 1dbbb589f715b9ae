"""Draws assets/explain_*, the pictures of "One page, followed" in model/README.md: those that `infer.py --explain` embeds.

    python tests/draw_explain.py

One drawn page and question of the embedded model, on the CPU. With OUT.html behind it, it writes the whole HTML page too.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from extras.explain import explain, follow, pictures
from model import InternVL
from model.tiny.pages import SHAPES, draw_page

SHOWN = "page", "tiles", "patches", "tokens", "looked", "answer"


def example():
    """The page of model/README.md, a Pillow image, and its question."""
    return draw_page(random.Random("test 11"), shape=SHAPES[1])[0], "What is the tax?"


def draw(folder):
    """Write explain_*.png and explain_answer.svg into a folder; return what was followed."""
    run = follow(InternVL.from_pretrained("tiny", "cpu"), *example())
    drawn = pictures(run) | {"page": example()[0]}
    for name in SHOWN:
        if isinstance(drawn[name], str):
            (folder / f"explain_{name}.svg").write_text(drawn[name] + "\n", encoding="utf-8")
        else:
            drawn[name].save(folder / f"explain_{name}.png", optimize=True)
    return run


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    run = draw(Path(__file__).parent.parent / "assets")
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(explain(run.chat.model, *example())[0], encoding="utf-8")
