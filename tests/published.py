"""What the published weights of model/tiny must reach, in one place, and the pages that they answer.

Used by tests marked `official`, whose fixture `published` puts these weights where all others have the small model of embedded.py.
Whoever trains a better model raises the numbers.
"""
import itertools
import random

import torch
from bench_tiny import answers

from model.tiling import tile_page
from model.tiny.pages import READ, SHAPES, TILE, draw_page

READS = {SHAPES[0]: 0.65, SHAPES[1]: 0.5}              # {shape of plain pages: least exact match on held-out values, of 60 questions}
FIRST_RUN = {"steps": 60, "loss": 0.4}      # `train.py --tiny --steps`: to what share the loss falls; bench_tiny.py first has whole runs


def asked_pages(shape, domain="plain"):
    """Yield (seed, page, tiles, [(question, answer), ...]) of the test pages that bench_tiny.py scores, without end."""
    for seed in itertools.count():
        page, asked = draw_page(random.Random(f"test {seed}"), domain, shape)
        if asked := [turn for turn in asked if turn[0] != READ]:
            yield seed, page, torch.from_numpy(tile_page(page, tile_pixels=TILE)), asked


def answered_rightly(model, tiles, asked):
    """The (question, answer) pairs of a page that a model answers so."""
    given = answers(model, tiles, [question for question, _ in asked])
    return [turn for turn, answer in zip(asked, given) if answer == turn[1]]


def answered_pages(model, shape, most=60):
    """`asked_pages` of at most `most` seeds with what a model answers rightly; pages without are passed over."""
    for seed, page, tiles, asked in itertools.takewhile(lambda found: found[0] < most, asked_pages(shape)):
        if right := answered_rightly(model, tiles, asked):
            yield seed, page, tiles, right


def exact_match(model, pages):
    """The share of the questions about some `asked_pages` that a model answers rightly."""
    return sum(len(answered_rightly(model, *page)) for _, _, *page in pages) / sum(len(asked) for *_, asked in pages)
