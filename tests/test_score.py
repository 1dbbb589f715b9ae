"""ANLS is what its definitions say, its distance another algorithm's; charts are judged as their benchmark does."""
import functools
import random

import pytest

from extras.score import anls, anls_challenge, anls_stvqa, exact_match, levenshtein, relaxed_accuracy, score_table


def test_anls_of_the_fact_sheets_vectors():
    assert anls("abd", ["abc"]) == pytest.approx(2 / 3)
    assert anls("ad", ["ab"]) == 0.5                            # 0.5 exactly is kept
    assert anls("b", ["a"]) == 0
    assert anls("itc limited", ["ITC  Limited"]) == 1.0
    assert anls("x", ["y", "x"]) == 1.0 and anls("", ["a"]) == 0 and anls("", [""]) == 1
    for length, score in ((1, 0.5), (2, 2 / 3), (4, 0.8), (6, 6 / 7)):
        assert anls("a" * length + ".", ["a" * length]) == pytest.approx(score)     # what a full stop too many costs


def test_levenshtein_equals_its_recursive_definition():
    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))
    draw = random.Random(0)
    for _ in range(500):
        a, b = ("".join(draw.choice("abc") for _ in range(draw.randint(0, 8))) for _ in range(2))
        assert levenshtein(a, b) == distance(a, b)


def test_exact_match_ignores_case_and_spacing_only():
    assert exact_match(" itc  LIMITED", ["x", "ITC Limited"]) == 1 and exact_match("ITC Limited.", ["ITC Limited"]) == 0


def bit_parallel_distance(a, b):
    """Levenshtein distance by Myers' bit vectors: no table, nothing in common with ours."""
    if not a:
        return len(b)
    where = {c: sum(1 << i for i, x in enumerate(a) if x == c) for c in set(a)}
    full, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    more, less, distance = full, 0, len(a)
    for c in b:
        same = where.get(c, 0)
        diagonal = (((same & more) + more) ^ more) | same | less
        up, down = less | ~(diagonal | more) & full, more & diagonal
        distance += bool(up & top) - bool(down & top)
        up, down = (up << 1 | 1) & full, (down << 1) & full
        more, less = down | ~(diagonal | up) & full, up & diagonal
    return distance


def test_anls_of_10000_random_pairs_equals_an_independent_one():
    draw, alphabet = random.Random(0), "abcXYZ 12$.,é日"
    for _ in range(10_000):
        truth = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 14)))
        told = list(truth)
        for _ in range(draw.randint(0, 4)):
            told[draw.randint(0, len(told)):draw.randint(0, len(told))] = draw.choice(alphabet).swapcase() * draw.randint(0, 2)
        told = "".join(told)
        near = bit_parallel_distance(" ".join(truth.lower().split()), " ".join(told.lower().split()))
        script = 1 - near / (max(len(truth.upper()), len(told.upper())) or 1)
        assert anls(told, [truth]) == pytest.approx(script if script >= 0.5 else 0)
        challenge = near / (max(len(" ".join(truth.split())), len(" ".join(told.split()))) or 1)
        assert anls_challenge(told, [truth]) == pytest.approx(1 - challenge if challenge < 0.5 else 0)
        x, y = truth.lower().strip(), told.lower().strip()
        stvqa = 1 - bit_parallel_distance(x, y) / (max(len(x), len(y)) or 1)
        assert anls_stvqa(told, [truth]) == pytest.approx(stvqa if stvqa >= 0.5 else 0)


def test_the_definitions_of_anls_differ_where_they_should():
    assert (anls("ad", ["ab"]), anls_stvqa("ad", ["ab"]), anls_challenge("ad", ["ab"])) == (0.5, 0.5, 0)
    assert anls("itc limited", ["ITC  Limited"]) == anls_challenge("itc limited", ["ITC  Limited"]) == 1
    assert anls_stvqa("itc limited", ["ITC  Limited"]) == pytest.approx(1 - 1 / 12)
    assert anls("abd   ", ["abc"]) == pytest.approx(1 - 1 / 6) and anls_stvqa("abd   ", ["abc"]) == pytest.approx(2 / 3)


def test_a_chart_is_read_within_5_percent():
    assert relaxed_accuracy("105", ["100"]) == relaxed_accuracy("95", ["1", "100"]) == 1 and relaxed_accuracy("105.1", ["100"]) == 0
    assert relaxed_accuracy("-10", ["10"]) == 0 and relaxed_accuracy("-10.4", ["-10"]) == 1
    assert relaxed_accuracy("52%", ["0.5"]) == 1 and relaxed_accuracy("52", ["0.5"]) == 0
    assert relaxed_accuracy("0", ["0"]) == 1 and relaxed_accuracy("0.01", ["0"]) == 0      # nothing is within 5 % of 0
    assert relaxed_accuracy("YES", ["yes"]) == 1 and relaxed_accuracy("yes.", ["yes"]) == 0 and relaxed_accuracy("nan", ["1"]) == 0


def test_scores_are_told_by_length_and_type():
    answers = [{"answer": "a", "expected": ["a"], "types": ["form"]}, {"answer": "b", "expected": ["x" * 7, "y" * 30], "types": []},
               {"answer": "c" * 50, "expected": ["C" * 50], "types": ["form", "table"]}, {"answer": "d", "expected": [], "types": ["form"]}]
    table = score_table(answers)
    assert {name: row["questions"] for name, row in table.items()} == {
        "all": 3, "answers of 1 to 4 characters": 1, "answers of 5 to 9 characters": 1, "answers of 40 characters and more": 1,
        "type form": 2, "type table": 1}
    assert table["all"]["exact_match"] == pytest.approx(2 / 3) and table["type form"]["anls"] == 1
