"""4. Which tokens are learned?

A row of token ids, one page with several questions. Mark what the loss is taken of: the answers, and the token that ends
them; not the system sentence, not the page, not the questions, not the words "assistant\n".

Hint: an answer begins behind `<|im_start|>assistant\n` and ends with the next `<|im_end|>`, which is learned too: a model that
never learns it never stops. See `PromptBuilder.reply` in model/prompt.py.
"""


def learned(tokens):
    """Texts of the tokens of a row -> a list of bools, True where the token is learned."""
    raise NotImplementedError("write me")


def test_it_is_what_the_prompt_learns():
    from model.checkpoint import TINY
    from model.prompt import IGNORE_INDEX, write_page
    from model.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(TINY)
    for questions, answers in ((["What is the total?"], ["$41.07"]), (["A?", "What is the date?", "C"], ["1", "03/11/98", "assistant"])):
        prompt, _ = write_page(tokenizer, 4, [2], [[turn] for turn in zip(questions, answers)])
        tokens = [tokenizer.decode([i]) for i in prompt.ids]
        assert learned(tokens) == [label != IGNORE_INDEX for label in prompt.labels]
