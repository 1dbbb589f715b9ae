"""How good is an answer? ANLS in its three definitions, exact match, and relaxed accuracy for charts; each 0 to 1.

The definitions of ANLS agree but for spaces in the answers and at a score of exactly 0.5:

    anls            the official evaluation of InternVL2, which the published figures come from
    anls_stvqa      the evaluator class beside it, in the manner of ST-VQA: lengths are those of the normalized texts
    anls_challenge  the challenge's formula, of normalized texts: what is half wrong counts as wrong, so 0.5 becomes 0

Source: ANLS, "Scene Text Visual Question Answering" (arXiv 1905.13648), section "Evaluation metric"; relaxed accuracy,
"ChartQA" (arXiv 2203.10244), section "Evaluation"; the official eval/vqa.
"""
import math

from extras.cli import as_flag, count


def normalize(text):
    """Lower case, single spaces."""
    return " ".join(text.strip().lower().split())


def exact_match(prediction, answers):
    """1.0 if the prediction is one of the answers but for case and spacing, else 0.0."""
    return float(normalize(prediction) in map(normalize, answers))


def anls(prediction, answers):
    """1 - normalized Levenshtein distance to the nearest answer, 0 to 1; below 0.5 it counts as 0.

    As in the official script the distance is that of normalized texts, the length that of the texts as written.

    >>> anls("abd", ["abc"])
    0.6666666666666667
    """
    lengths = [max(len(answer.upper()), len(prediction.upper())) or 1 for answer in answers]
    score = 1 - min(levenshtein(normalize(answer), normalize(prediction)) / n for answer, n in zip(answers, lengths))
    return score if score >= 0.5 else 0.0


def anls_stvqa(prediction, answers):
    """As `anls`, but of lower-case texts without space around them, whose lengths count."""
    score = 1 - nearest(prediction.strip().lower(), [answer.strip().lower() for answer in answers])
    return score if score >= 0.5 else 0.0


def anls_challenge(prediction, answers):
    """As `anls`, but the lengths are those of the normalized texts, and a score of exactly 0.5 counts as 0, too."""
    distance = nearest(normalize(prediction), map(normalize, answers))
    return 1 - distance if distance < 0.5 else 0.0


def nearest(text, answers):
    """Levenshtein distance to the nearest answer, divided by the length of the longer text."""
    return min(levenshtein(answer, text) / (max(len(answer), len(text)) or 1) for answer in answers)


def relaxed_accuracy(prediction, answers):
    """1.0 if a number is within 5 % of an answer, or a text is an answer but for case, else 0.0.

    >>> relaxed_accuracy("104", ["100"]), relaxed_accuracy("50%", ["0.5"]), relaxed_accuracy("106", ["100"])
    (1.0, 1.0, 0.0)
    """
    def right(answer):
        truth, told = number(answer), number(prediction)
        if truth and told is not None:
            return abs(told - truth) <= 0.05 * abs(truth)
        return prediction.lower() == answer.lower()
    return float(any(map(right, answers)))


def number(text):
    """'50%' -> 0.5; None for what is no finite number."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def levenshtein(a, b):
    """The fewest insertions, deletions and replacements of characters that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


# --------------------------------------------------------------------------------------------------------------- tables

SCORES = {score.__name__: score for score in (exact_match, anls, anls_stvqa, anls_challenge, relaxed_accuracy)}
PRINTED = ("exact_match", "anls")       # the others go to --json and to the scores file
LENGTHS = (5, 10, 20, 40)               # characters of the shortest right answer, where a row of the table begins


def score_table(answers):
    """Means of all scores: {row: {"questions": n, score: mean, ...}}, in total, by answer length and by question type.

    `answers`: dicts with `answer`, `expected` (a list) and `types` (a list); nothing expected: not scored.
    """
    by_length = [f"answers of {low} to {high - 1} characters" for low, high in zip((1, *LENGTHS), LENGTHS)]
    by_length.append(f"answers of {LENGTHS[-1]} characters and more")
    rows = {name: [] for name in ("all", *by_length)}
    for line in answers:
        if line["expected"]:
            scores = {name: score(line["answer"], line["expected"]) for name, score in SCORES.items()}
            length = min(map(len, line["expected"]))
            types = [f"type {kind}" for kind in line["types"]]
            for name in ("all", by_length[sum(length >= low for low in LENGTHS)], *types):
                rows.setdefault(name, []).append(scores)
    return {name: {"questions": len(row), **{score: sum(line[score] for line in row) / len(row) for score in SCORES}}
            for name, row in rows.items() if row}


def print_scores(answers, table, settings):
    """Print the `score_table` of `answers`, and the {flag: value} settings that they were made with."""
    scored, failed = table["all"]["questions"] if table else 0, sum(line["error"] is not None for line in answers)
    print(f"{count(len(answers), 'question')}, {scored} of them with an answer to compare with, {failed} not answered; "
          + " ".join(as_flag(*flag) for flag in settings.items() if flag[1] is not None and flag[1] is not False))
    print(f"{'':<32} questions  " + "  ".join(PRINTED))
    for name, row in table.items():
        print(f"{name:<32} {row['questions']:>9}  " + "  ".join(f"{row[score]:>{len(score)}.4f}" for score in PRINTED))
