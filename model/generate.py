"""How is one token chosen after another? All open questions of all pages advance together, from one prefix a page."""
import torch

from model.language import Cache, look_back
from model.prompt import END, special_id


@torch.inference_mode()
def generate(model, pages, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, image_tokens=None, caches=None):
    """Answer every open question of some pages.

    `pages`: (tiles, prompt) pairs; a prompt of branch 0 alone is one question, else each branch is one.
    `temperature`: 0 takes the likeliest token; else tokens are drawn, from the likeliest ones that together have
    probability `top_p`; every question draws from `seed` anew, so its answer does not depend on its company.
    `image_tokens`: what `model.see` made of all tiles, (256 N, D), if that is known already.
    `caches`: one a page, with the past that its prompt goes on from; what is read and generated is added to it.
    Yields one list a step: for each question, pages in order, the id of its next token, or None once it has ended; the
    end-of-turn token is the last one yielded.
    """
    end, device = special_id(model.tokenizer, END), model.device
    batch = model.pack(pages)
    batch.image_tokens = image_tokens
    places, positions, branch_of, page_of = [], [], [], []                  # one entry a question
    for page, (_, prompt) in enumerate(pages):
        for branch in range(1 if max(prompt.branches) else 0, max(prompt.branches) + 1):
            last = len(prompt.branches) - 1 - prompt.branches[::-1].index(branch)
            places.append(last)
            positions.append(prompt.positions[last])
            branch_of.append(branch)
            page_of.append(page)
    caches = caches or [Cache(model.config.language, 0, device, model.dtype) for _ in pages]
    for page, (_, prompt) in enumerate(pages):
        caches[page].reserve(len(prompt.ids) + page_of.count(page) * max_new_tokens)
    asked = [torch.tensor([place for place, of in zip(places, page_of) if of == page], dtype=torch.long)
             for page in range(len(pages))]
    hidden = model.read(batch, caches, asked)                               # (questions, D)
    open_questions = list(range(len(places)))
    generators = [torch.Generator(device).manual_seed(seed) for _ in places] if temperature else places
    for _ in range(max_new_tokens):
        chosen = choose(model.language.head(hidden).float(), temperature, top_p, [generators[i] for i in open_questions])
        step = [None] * len(places)
        for question, token in zip(open_questions, chosen.tolist()):
            step[question] = token
        yield step
        going_on = [i for i, question in enumerate(open_questions) if step[question] != end]
        if not going_on:
            return
        chosen, open_questions = chosen[going_on], [open_questions[i] for i in going_on]
        lookbacks = []
        for page, cache in enumerate(caches):
            branches = torch.tensor([branch_of[question] for question in open_questions if page_of[question] == page])
            if len(branches):
                lookbacks.append(look_back(branches, cache, device))
        for question in open_questions:
            positions[question] += 1
        at = torch.tensor([positions[question] for question in open_questions], device=device)
        hidden = model.language(model.language.embedding(chosen).to(model.dtype), at, lookbacks)


def choose(logits, temperature, top_p, generators):
    """float32 logits (questions, V), one generator a question -> int64 (questions,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability, token = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability                       # of all likelier tokens together
    probability[(before >= top_p) & (before > 0)] = 0                       # the likeliest one always stays
    drawn = torch.stack([torch.multinomial(p, 1, generator=generator) for p, generator in zip(probability, generators)])
    return token.gather(-1, drawn)[:, 0]
