"""The pictures of a run: curve.png, the losses over the steps, and samples.png, questions with their answers."""
import warnings

from extras.pictures import GRAY, RIGHT, WRONG
from extras.score import exact_match
from model.images import load_image

COLUMNS = ((0.0, 36), (0.36, 20), (0.58, 20), (0.8, 18))        # where a column begins, and its room in characters
LINE = 0.27                                                     # inches from one question to the next


def draw_samples(folder, samples, pages):
    """Draw samples.png: pages with their questions, the first and the latest answers and the expected ones.

    `samples`: lines of samples.jsonl. A right answer has a check mark, a wrong one a cross. The first page is also
    saved on its own, as page.png, to be asked about.
    """
    pyplot = plotting()
    images = [load_image(page.images[0]) if page.images else None for page in pages]
    for image in [image for image in images if image][:1]:
        image.save(folder / "page.png")
    before, after = samples[0], samples[-1]
    rows = [[(a, b) for a, b in zip(before["answers"], after["answers"]) if a["page"] == page.name] for page in pages]
    heights = [LINE * max(5, len(lines)) for lines in rows]
    size = 11, 0.4 + sum(heights) + 0.15 * len(pages)
    figure, axes = pyplot.subplots(1 + len(pages), 2, figsize=size, squeeze=False, width_ratios=(1, 4),
                                   height_ratios=(LINE, *heights), layout="constrained")
    for each in axes.flat:
        each.axis("off")
    titles = "question", f"answer at step {before['step']}", f"answer at step {after['step']}", "expected"
    for (x, _), title in zip(COLUMNS, titles):
        axes[0, 1].text(x, 0, title, fontsize=9, weight="bold", color=GRAY)
    for image, lines, height, (left, right) in zip(images, rows, heights, axes[1:]):
        if image:
            left.imshow(image.convert("RGB"))
            left.set_anchor("NE")
        for i, (a, b) in enumerate(lines):
            cells = (a["question"], "black"), marked(a), marked(b), (a["expected"][0], "black")
            for (x, room), (text, color) in zip(COLUMNS, cells):
                shown = text if len(text) <= room else text[:room - 1] + "…"
                right.text(x, 1 - i * LINE / height, shown, va="top", fontsize=9, color=color, parse_math=False)
    with warnings.catch_warnings(action="ignore"):              # about characters that the font lacks
        figure.savefig(folder / "samples.png", dpi=110)
    pyplot.close(figure)


def marked(line):
    """(the answer with its mark, its color)."""
    right = exact_match(line["answer"], line["expected"])
    return f"{'✓' if right else '✗'} {line['answer']}", RIGHT if right else WRONG


def draw_curve(folder, lines):
    """Draw curve.png: training and validation loss over the steps and, on a second axis, the ANLS of the answers.

    `lines`: those of metrics.jsonl.
    """
    pyplot = plotting()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("train_loss", "training", dict(color=GRAY, alpha=0.5, linewidth=1)),
                              ("val_loss", "validation", dict(color=WRONG, marker="o"))):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.grid(alpha=0.3)
    scored = [(line["step"], line["anls"]) for line in lines if "anls" in line]
    if scored:
        right, style = axes.twinx(), dict(color=RIGHT, marker="s", linestyle="--")
        axes.plot([], [], label="ANLS of its answers", **style)                 # its line in the legend
        right.plot(*zip(*scored), **style)
        right.set(ylabel="ANLS", ylim=(0, 1.05))
    axes.legend(loc="center right")
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)


def plotting():
    import matplotlib
    matplotlib.use("Agg")                       # draws into files, needs no screen
    from matplotlib import pyplot
    return pyplot
