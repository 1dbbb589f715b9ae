"""How good is an answer? Exact match and ANLS, as the official evaluation of DocVQA computes them.

Source: ANLS, "Scene Text Visual Question Answering" (arXiv 1905.13648), section "Evaluation metric"; FACTS: "Evaluation".
"""


def normalise(text):
    """Lower case, single spaces."""
    return " ".join(text.strip().lower().split())


def exact_match(prediction, answers):
    """1.0 if the prediction is one of the answers but for case and spacing, else 0.0."""
    return float(normalise(prediction) in map(normalise, answers))


def anls(prediction, answers):
    """1 - normalised Levenshtein distance to the nearest answer, 0 to 1; below 0.5 it counts as 0.

    As in the official script the distance is taken between normalised texts, its norm is the longer of the texts as written.

    >>> anls("abd", ["abc"])
    0.6666666666666667
    """
    longest = [max(len(answer.upper()), len(prediction.upper())) or 1 for answer in answers]
    score = 1 - min(levenshtein(normalise(answer), normalise(prediction)) / n for answer, n in zip(answers, longest))
    return score if score >= 0.5 else 0.0


def levenshtein(a, b):
    """The fewest insertions, deletions and replacements of characters that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]
