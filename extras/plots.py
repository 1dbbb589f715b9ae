"""The pictures of a run: curve.png, the losses over the steps, and samples.png, questions with their answers."""
import warnings

from extras.score import exact_match
from model.images import load_image
from model.prompt import INSTRUCTION

RIGHT, WRONG = "tab:green", "tab:red"


def draw_samples(folder, samples, pages):
    """Draw samples.png: pages with their questions, the first and the latest answers and the expected ones.

    `samples`: lines of samples.jsonl. The first page is also saved on its own, as page.png, to be asked about.
    """
    pyplot = plotting()
    images = [load_image(page.images[0], allow_private=True) if page.images else None for page in pages]
    for image in [image for image in images if image][:1]:
        image.save(folder / "page.png")
    before, after = samples[0], samples[-1]
    figure, rows = pyplot.subplots(len(pages), 2, figsize=(11, 2.4 * len(pages)), width_ratios=(1, 3), squeeze=False,
                                   layout="constrained")
    columns = ((0.0, 34, "question"), (0.34, 20, f"answer at step {before['step']}"), (0.57, 20, f"at step {after['step']}"),
               (0.8, 18, "expected"))                           # where a column begins, the characters it has room for
    for page, image, (left, right) in zip(pages, images, rows):
        left.set(xticks=[], yticks=[])
        if image:
            left.imshow(image.convert("RGB"))
        right.axis("off")
        lines = [(a, b) for a, b in zip(before["answers"], after["answers"]) if a["page"] == page.name]
        for x, _, text in columns:
            right.text(x, 1, text, va="top", fontsize=8, color="grey")
        for i, (a, b) in enumerate(lines, 1):
            y = 1 - i / (len(lines) + 1)
            cells = a["question"].removesuffix(INSTRUCTION), a["answer"], b["answer"], a["expected"][0]
            colors = "black", *(RIGHT if exact_match(line["answer"], line["expected"]) else WRONG for line in (a, b)), "black"
            for (x, room, _), text, color in zip(columns, cells, colors):
                shown = text if len(text) <= room else text[:room - 1] + "…"
                right.text(x, y, shown, va="top", fontsize=9, color=color, parse_math=False)
    with warnings.catch_warnings(action="ignore"):              # characters that the font lacks: samples.md has them all
        figure.savefig(folder / "samples.png", dpi=110)
    pyplot.close(figure)


def draw_curve(folder, lines):
    """Draw curve.png: training and validation loss over the steps and, on a second axis, the ANLS of the answers.

    `lines`: those of metrics.jsonl.
    """
    pyplot = plotting()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("train_loss", "training", dict(color="tab:blue", alpha=0.5, linewidth=1)),
                              ("val_loss", "validation", dict(color="tab:red", marker="o"))):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="loss per answer token (nats)")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.grid(alpha=0.3)
    scored = [(line["step"], line["anls"]) for line in lines if "anls" in line]
    if scored:
        right = axes.twinx()
        style = dict(color="tab:green", marker="s", linestyle="--")
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
