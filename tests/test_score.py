"""ANLS is the official script's; its distance is that of an independent definition."""
import functools
import random

import pytest

from model.score import anls, exact_match, levenshtein


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
