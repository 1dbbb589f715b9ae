"""7. What is one token chosen after another with a cache?

Answer a question with the embedded model: read the prompt once, then one token at a time, each of which sees the keys and
values of all before it.

Hint: `model(batch, [cache])` fills a `KVCache` and returns logits at `batch.answer_index`. The next token needs its embedding,
its position, and `page_mask` with the cache; `model.language` returns its vector, `model.language.lm_head` the logits. See
`prefill` and `decode` in model/generate.py.
"""
import torch

from model.language import KVCache, page_mask  # noqa: F401  you will want it


@torch.no_grad()
def answer(model, tiles, prompt, most=16):
    """Greedy tokens up to and with the end-of-turn token, model.tokenizer.eos_token_id."""
    raise NotImplementedError("write me")


def test_the_answer_is_right(published):
    from published import answered_pages

    from model import InternVL
    from model.generate import generate
    from model.prompt import write_page
    from model.tiny.pages import SHAPES
    model = InternVL.from_pretrained("tiny", "cpu")
    _, _, tiles, questions = next(answered_pages(model, SHAPES[0]))
    for question, truth in questions:
        prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [[(question, None)]])
        tokens = answer(model, tiles, prompt)
        assert tokens == [step[0] for step in generate(model, [(tiles, prompt)], 16)]
        assert model.tokenizer.decode(tokens, skip_special_tokens=True) == truth
