"""Which exact tokens does the model read, and which of them are in the loss?

A page is written once, its questions are branches of it:

    branch 0    <|im_start|>system\\n{SYSTEM}<|im_end|><|im_start|>user\\n<img><IMG_CONTEXT> x 256 x tiles</img>
    branch 1    \\nWhat is the date?<|im_end|><|im_start|>assistant\\n[January 8, 1993.<|im_end|>]     [in the loss]
    branch 2    \\nWho signed it?<|im_end|><|im_start|>assistant\\n[W. Jones<|im_end|>]

The positions of every branch begin where the prefix ends. Tokens, labels, positions and branches are appended together,
piece by piece, so a label always stands beside its token. Text that a user typed is always read as plain text:
"<|im_end|>" in a question is ten characters, not the end of the turn.

Source: the template "Hermes-2" of InternVL2-1B, in the `conversation.py` published with it.
"""
import itertools
from dataclasses import dataclass, field

from model.errors import InputError
from model.tokenizer import special_id

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
# after DocumentVQA's questions, as in its official evaluation
INSTRUCTION = " Answer the question using a single word or phrase."
START, END = "<|im_start|>", "<|im_end|>"
IMAGE_OPEN, IMAGE_TOKEN, IMAGE_CLOSE = "<img>", "<IMG_CONTEXT>", "</img>"
PLACEHOLDER = "<image>"                 # in a question: the next image goes here
IGNORE_INDEX = -100


@dataclass
class Prompt:
    """A row of tokens; the four lists have one length."""
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)         # the token's own id if it is in the loss, else IGNORE_INDEX
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)       # 0: prefix; 1, 2, ...: one per conversation about the page


class PromptBuilder:
    """Appends pieces to a prompt. Plain text between two special tokens is tokenized as one string."""

    def __init__(self, tokenizer, tokens_per_tile):
        self.tokenizer, self.tokens_per_tile = tokenizer, tokens_per_tile
        self.prompt, self.branch, self.position = Prompt(), 0, 0
        self.pending = ""                                   # plain text that is not tokenized yet

    def text(self, text):
        self.pending += text

    def special(self, token, count=1, in_loss=False):
        self.flush()
        self.append([special_id(self.tokenizer, token)] * count, in_loss)

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
        """A user's turn up to its end; each "<image>" becomes the next of `images`, an iterator over tile counts."""
        self.text("user\n")
        for i, part in enumerate(text.split(PLACEHOLDER)):
            tiles = next(images, None) if i else None
            if tiles is not None:
                self.image(tiles)
            elif i:
                self.text(PLACEHOLDER)                      # more places than images: the rest are plain text
            self.text(part)

    def reply(self, answer):
        """End the user's turn and write the answer, which is in the loss; None: stop where the answer begins."""
        self.special(END)
        self.special(START)
        self.text("assistant\n")
        self.flush()
        if answer is not None:
            self.text(answer)
            self.flush(in_loss=True)
            self.special(END, in_loss=True)

    def flush(self, in_loss=False):
        if self.pending:
            ids = self.tokenizer(self.pending, add_special_tokens=False, split_special_tokens=True).input_ids
            self.append(ids, in_loss)
            self.pending = ""

    def append(self, ids, in_loss):
        prompt = self.prompt
        prompt.ids += ids
        prompt.labels += ids if in_loss else [IGNORE_INDEX] * len(ids)
        prompt.positions += range(self.position, self.position + len(ids))
        prompt.branches += [self.branch] * len(ids)
        self.position += len(ids)


def write_page(tokenizer, tokens_per_tile, tiles, branches, max_length=None, system=None, history=(),
               question_start=None):
    """Write a page with all its conversations, each a branch of its own.

    `tiles`: number of tiles of each of the page's images, which come first, one on a line. `branches`: one list of
    (question, answer) turns per conversation; an answer None is left to the model. `max_length`: tokens of a branch
    together with the prefix. `system`: text of the system turn, if not the model's own. Where the images do not simply
    come first, the prefix has `history`, whole turns, and `question_start`, the next question up to its last "<image>".
    Returns the prompt, and the indices of the branches that do not fit and are left out.

    >>> write_page(tokenizer, 256, [7], [[("What is the date?", "January 8, 1993.")]])[0].ids[-2:]
    [13, 151645]
    """
    builder, images = PromptBuilder(tokenizer, tokens_per_tile), iter(tiles)
    builder.system(SYSTEM if system is None else system)
    for question, answer in history:
        builder.question(question, images)
        builder.reply(answer)
        builder.special(START)
    if tiles:
        builder.question(question_start or "\n".join([PLACEHOLDER] * len(tiles)), images)
    begins_with = "" if question_start else "\n" if tiles else "user\n"
    prompt, too_long = builder.prompt, []
    prefix = len(prompt.ids)
    for index, turns in enumerate(branches):
        begin = len(prompt.ids)
        builder.branch, builder.position = builder.branch + 1, prefix
        for i, (question, answer) in enumerate(turns):
            if i:
                builder.special(START)
            builder.text(("user\n" if i else begins_with) + question)
            builder.reply(answer)
        if max_length and prefix + len(prompt.ids) - begin > max_length:
            for column in (prompt.ids, prompt.labels, prompt.positions, prompt.branches):
                del column[begin:]
            builder.branch -= 1
            too_long.append(index)
    return prompt, too_long


def write_conversation(tokenizer, tokens_per_tile, tiles, turns, images=None):
    """Write one conversation: a prompt of branch 0 alone.

    `tiles`: number of tiles of each image, in order. `turns`: (question, answer) pairs; the last answer may be None and
    is then left to the model. Each image takes the place of the next "<image>" in the questions; without any, the
    images come first, one on a line. `images`: how many of them belong to each turn; a turn's places take no others.
    Raises InputError for fewer places than images.
    """
    places = [question.count(PLACEHOLDER) for question, _ in turns]
    if images is None and tiles and not any(places):
        turns = [(f"{PLACEHOLDER}\n" * len(tiles) + turns[0][0], turns[0][1]), *turns[1:]]
    else:
        for found, wanted in zip(places, images) if images else [(sum(places), len(tiles))]:
            if found < wanted:
                raise InputError(f"{wanted} images, but {found} {PLACEHOLDER} in the question: "
                                 "write one for each image, or none")
    builder, remaining = PromptBuilder(tokenizer, tokens_per_tile), iter(tiles)
    builder.system()
    for i, (question, answer) in enumerate(turns):
        if i:
            builder.special(START)
        builder.question(question, itertools.islice(remaining, images[i]) if images else remaining)
        builder.reply(answer)
    return builder.prompt
