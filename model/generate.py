"""How does the model answer? Prefill the prompts, then decode one token per open question and step; sample each.

    prefill   pages with their questions  ->  logits at the last token of every question; the caches hold all tokens
    decode    one token per open question ->  logits for the next token of each
    sample    logits                      ->  token ids: the likeliest, or drawn
"""
import itertools
from dataclasses import dataclass

import torch

from model.errors import InputError
from model.language import KVCache, page_mask
from model.tokenizer import special_id


@dataclass
class OpenQuestion:
    """A question that is being answered."""
    page: int                           # index of its page
    branch: int
    row: int                            # index of its last token in the packed row
    position: int                       # position of its latest token


@torch.inference_mode()
def generate(model, pages, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, image_tokens=None, caches=None,
             repetition_penalty=None, whole=None):
    """Answer all open questions of some pages together.

    Yields one list per step: the next token id of each question, pages in order; None after its end-of-turn token.
    `pages`: (tiles, prompt) pairs; a prompt of branch 0 alone is one question, else each branch is one.
    `temperature`: 0 takes the likeliest token; else a token is drawn from the likeliest ones that have probability
    `top_p` together. Each question has its own generator of `seed`, so its answer does not depend on the others.
    `image_tokens`: (256 N, D) of all tiles, if `model.encode_images` was called already.
    `caches`: one KVCache per page; tokens in it are not read again, new ones are appended. `whole`: the prompts with
    what the caches hold. `repetition_penalty`: see `penalize`; None: the model's own.
    """
    template, penalty = model.config.template, repetition_penalty or model.config.repetition_penalty
    ends = {special_id(model.tokenizer, token) for token in (template.end, *template.stops)}
    questions = open_questions(pages)
    caches = caches or [KVCache(model.config.language, 0, model.device, model.dtype) for _ in pages]
    logits = prefill(model, pages, questions, max_new_tokens, image_tokens, caches)
    generators = [torch.Generator(model.device).manual_seed(seed) for _ in questions] if temperature else questions
    running = list(range(len(questions)))                               # indices of the questions that have not ended
    prompts = whole or [prompt for _, prompt in pages]
    written = [ids_so_far(prompts[question.page], question.branch) for question in questions]
    for _ in range(max_new_tokens):
        low, high = logits.float().aminmax(dim=-1)
        if not ((high > low) & (high - low).isfinite()).all():      # equal: where a norm's mean square overflowed
            raise InputError("no answer: the logits are not finite, or all equal; the weights are damaged")
        logits = penalize(logits.float(), [written[i] for i in running], penalty)
        tokens = sample(logits, temperature, top_p, [generators[i] for i in running])
        step = dict(zip(running, tokens.tolist()))
        for i in running:
            written[i].add(step[i])
        yield [step.get(i) for i in range(len(questions))]
        going_on = [n for n, i in enumerate(running) if step[i] not in ends]
        if not going_on:
            return
        running = [running[n] for n in going_on]
        tokens = tokens if len(going_on) == len(tokens) else tokens[going_on]
        logits = decode(model, tokens, [questions[i] for i in running], caches)


def open_questions(pages):
    """The OpenQuestions of (tiles, prompt) pairs."""
    questions, start = [], 0
    for page, (_, prompt) in enumerate(pages):
        for branch in range(1 if max(prompt.branches) else 0, max(prompt.branches) + 1):
            last = len(prompt.branches) - 1 - prompt.branches[::-1].index(branch)
            questions.append(OpenQuestion(page, branch, start + last, prompt.positions[last]))
        start += len(prompt.ids)
    return questions


def ids_so_far(prompt, branch):
    """The ids of a prompt that count for the penalty. With images none: official code hands over vectors, not ids."""
    return {i for i, of in zip(prompt.ids, prompt.branches) if of in (0, branch)} if not any(prompt.images) else set()


def penalize(logits, written, penalty):
    """float32 logits (questions, V): of the ids in `written`, one set per question, a logit above 0 is divided by
    `penalty`, one below multiplied. Source: CTRL (arXiv 1909.05858), section 4.1."""
    for row, ids in zip(logits, written) if penalty != 1 else ():
        ids = torch.tensor(sorted(ids), dtype=torch.long, device=logits.device)
        row[ids] = torch.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return logits


def prefill(model, pages, questions, max_new_tokens, image_tokens, caches):
    """Read the prompts into the caches, with room for `max_new_tokens` per question. Returns logits (questions, V)."""
    batch = model.pack(pages)
    batch.image_tokens = image_tokens
    batch.answer_index = torch.tensor([question.row for question in questions], device=model.device)
    for page, (_, prompt) in enumerate(pages):
        caches[page].grow(len(prompt.ids) + sum(question.page == page for question in questions) * max_new_tokens)
    return model(batch, caches)


def decode(model, tokens, questions, caches):
    """Read the latest token, int64 (questions,), of each question. Returns logits (questions, V) for the next ones."""
    for question in questions:
        question.position += 1
    numbers = torch.tensor([[question.branch for question in questions], [question.position for question in questions]])
    branches, positions = numbers.to(model.device, non_blocking=True)
    masks, start = [], 0
    for page, of_page in itertools.groupby(questions, key=lambda question: question.page):
        asked = [question.branch for question in of_page]
        masks.append(page_mask(branches[start:start + len(asked)], caches[page], (asked.count(0), max(asked))))
        start += len(asked)
    x = model.language.embedding(tokens).to(model.dtype)                    # (questions, D)
    return model.language.lm_head(model.language(x, positions, masks))


def sample(logits, temperature, top_p, generators):
    """float32 logits (questions, V), one generator per question -> int64 (questions,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability, token = torch.softmax(logits / max(temperature, 1e-6), dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability                       # of all likelier tokens together
    probability[(before >= top_p) & (before > 0)] = 0                       # the likeliest one always stays
    drawn = torch.stack([torch.multinomial(p, 1, generator=generator) for p, generator in zip(probability, generators)])
    return token.gather(-1, drawn)[:, 0]
