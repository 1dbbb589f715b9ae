"""Which exact tokens does the model read, and which of them does it learn?

A page is written once, its questions are branches of it:

    branch 0    <|im_start|>system\\n{SYSTEM}<|im_end|><|im_start|>user\\n<img><IMG_CONTEXT> x 256 x tiles</img>
    branch 1    \\nWhat is the date?<|im_end|><|im_start|>assistant\\n[January 8, 1993.<|im_end|>]     in brackets: learned
    branch 2    \\nWho signed it?<|im_end|><|im_start|>assistant\\n[W. Jones<|im_end|>]

Every branch takes up the positions where the prefix ends. Tokens, labels, positions and branches are appended together,
piece by piece, so a label can never be out of step with its token. Text that a user typed is always read as plain text:
"<|im_end|>" in a question is ten characters, not the end of the turn.

Source: the template "Hermes-2" of InternVL2-1B, in the `conversation.py` published with it.
"""
import itertools
from dataclasses import dataclass, field

from model.errors import InputError

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
# behind DocumentVQA's questions, as in its official evaluation
INSTRUCTION = " Answer the question using a single word or phrase."
START, END = "<|im_start|>", "<|im_end|>"
IMAGE_OPEN, IMAGE_TOKEN, IMAGE_CLOSE = "<img>", "<IMG_CONTEXT>", "</img>"
PLACEHOLDER = "<image>"                 # in a question: here comes the next image
IGNORE_INDEX = -100


@dataclass
class Prompt:
    """What is read, token by token; the four lists have one length."""
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)         # the token's own id where it is learned, else IGNORE_INDEX
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)       # 0 prefix; 1, 2, ... one a question


class PromptBuilder:
    """Appends pieces to a prompt. Plain text between two special tokens is tokenized as one string."""

    def __init__(self, tokenizer, tokens_per_tile):
        self.tokenizer, self.tokens_per_tile = tokenizer, tokens_per_tile
        self.prompt, self.branch, self.position = Prompt(), 0, 0
        self.waiting = ""                                   # plain text not tokenised yet

    def text(self, text):
        self.waiting += text

    def special(self, token, count=1, learned=False):
        self.flush()
        self.append([special_id(self.tokenizer, token)] * count, learned)

    def image(self, tiles):
        self.special(IMAGE_OPEN)
        self.special(IMAGE_TOKEN, tiles * self.tokens_per_tile)
        self.special(IMAGE_CLOSE)

    def system(self, sentence=SYSTEM):
        self.special(START)
        self.text(f"system\n{sentence}")
        self.special(END)
        self.special(START)

    def question(self, text, images):
        """A user's turn up to its end; each "<image>" becomes the next of `images`, an iterator over tiles of an image."""
        self.text("user\n")
        for i, part in enumerate(text.split(PLACEHOLDER)):
            count = next(images, None) if i else None
            if count is not None:
                self.image(count)
            elif i:
                self.text(PLACEHOLDER)                      # more places than images: what is left over is plain text
            self.text(part)

    def reply(self, answer):
        """End the user's turn; write the answer, learned, or stop where the model is to begin it (`answer` None)."""
        self.special(END)
        self.special(START)
        self.text("assistant\n")
        self.flush()
        if answer is not None:
            self.text(answer)
            self.flush(learned=True)
            self.special(END, learned=True)

    def flush(self, learned=False):
        if self.waiting:
            ids = self.tokenizer(self.waiting, add_special_tokens=False, split_special_tokens=True).input_ids
            self.append(ids, learned)
            self.waiting = ""

    def append(self, ids, learned):
        prompt = self.prompt
        prompt.ids += ids
        prompt.labels += ids if learned else [IGNORE_INDEX] * len(ids)
        prompt.positions += range(self.position, self.position + len(ids))
        prompt.branches += [self.branch] * len(ids)
        self.position += len(ids)


def page_prompt(tokenizer, tokens_per_tile, tiles, questions, answers=None, max_length=None):
    """Write a page with all its questions.

    `tiles`: tiles of each of the page's images, which come first, one to a line. `answers`: one a question, learned; None
    leaves the questions open for generation. `max_length`: tokens of a question together with the prefix.
    Returns the prompt and the indices of the questions left out because they do not fit. With none left the prompt holds
    the prefix alone.

    >>> page_prompt(tokenizer, 256, [7], ["What is the date?"], ["January 8, 1993."])[0].ids[-2:]
    [13, 151645]
    """
    turns = zip(questions, answers if answers is not None else [None] * len(questions))
    return write_page(tokenizer, tokens_per_tile, tiles, [[turn] for turn in turns], max_length)


def write_page(tokenizer, tokens_per_tile, tiles, branches, max_length=None, system=None, opening=(), head=None):
    """Write a page with all its conversations, each a branch: a list of (question, answer) turns, an answer None open.

    `system`: the system turn's text, if not the model's own. `opening`, `head`: what stands in the prefix where the images
    do not simply come first: whole turns, and the beginning of the next question up to and with its last "<image>".
    Returns the prompt and the indices of the branches left out because they do not fit.
    """
    writer, images = PromptBuilder(tokenizer, tokens_per_tile), iter(tiles)
    writer.system(SYSTEM if system is None else system)
    for question, answer in opening:
        writer.question(question, images)
        writer.reply(answer)
        writer.special(START)
    if tiles:
        writer.question(head or "\n".join([PLACEHOLDER] * len(tiles)), images)
    begins_with = "" if head else "\n" if tiles else "user\n"
    prompt, too_long = writer.prompt, []
    prefix = len(prompt.ids)
    for index, turns in enumerate(branches):
        begin = len(prompt.ids)
        writer.branch, writer.position = writer.branch + 1, prefix
        for i, (question, answer) in enumerate(turns):
            if i:
                writer.special(START)
            writer.text(("user\n" if i else begins_with) + question)
            writer.reply(answer)
        if max_length and prefix + len(prompt.ids) - begin > max_length:
            for column in (prompt.ids, prompt.labels, prompt.positions, prompt.branches):
                del column[begin:]
            writer.branch -= 1
            too_long.append(index)
    return prompt, too_long


def write_conversation(tokenizer, tokens_per_tile, tiles, turns, images=None):
    """Write one conversation: a prompt of branch 0 alone.

    `tiles`: tiles of each image, in order. `turns`: (question, answer) pairs; the last answer may be None, to be generated.
    Each image takes the place of the next "<image>" in the questions; without any, the images come first, one to a line.
    `images`: how many of them belong to each turn; a turn's places take no others.
    Raises InputError for fewer places than images.
    """
    places = [question.count(PLACEHOLDER) for question, _ in turns]
    if images is None and tiles and not any(places):
        turns = [(f"{PLACEHOLDER}\n" * len(tiles) + turns[0][0], turns[0][1]), *turns[1:]]
    else:
        for there, wanted in zip(places, images) if images else [(sum(places), len(tiles))]:
            if there < wanted:
                raise InputError(f"{wanted} images, but {there} {PLACEHOLDER} in the question: "
                                 "write one for each image, or none")
    writer, waiting = PromptBuilder(tokenizer, tokens_per_tile), iter(tiles)
    writer.system()
    for i, (question, answer) in enumerate(turns):
        if i:
            writer.special(START)
        writer.question(question, itertools.islice(waiting, images[i]) if images else waiting)
        writer.reply(answer)
    return writer.prompt


def special_id(tokenizer, token):
    """The id of one special token. Raises InputError for a tokenizer that lacks it."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise InputError(f"the tokenizer has no {token}; the model folder needs InternVL2's own tokenizer files")
    return index


def clean(text):
    """Text from outside as the tokenizer takes it: what is not UTF-8 becomes a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
