"""Which exact tokens does the model read, and which of them are in the loss?

A page is written once, its questions are branches of it:

    branch 0    <|im_start|>system\\n{SYSTEM}<|im_end|><|im_start|>user\\n<img><IMG_CONTEXT> x 256 x tiles</img>
    branch 1    \\nWhat is the date?<|im_end|><|im_start|>assistant\\n[January 8, 1993.<|im_end|>]     [in the loss]
    branch 2    \\nWho signed it?<|im_end|><|im_start|>assistant\\n[W. Jones<|im_end|>]

The positions of every branch begin where the prefix ends. Text that a user typed is plain text: "<|im_end|>" in a
question is ten characters, not the end of the turn. Only <ref> <box> <quad> and their ends are tokens there, too.

Source: the template "Hermes-2" of InternVL2-1B and those of its siblings, in the `conversation.py` published with each.
"""
import ast
import itertools
import re
from dataclasses import dataclass, field, replace

from model.errors import InputError
from model.tokenizer import special_id

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
SYSTEM_25 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: E501
# after DocumentVQA's questions, as in its official evaluation
INSTRUCTION = " Answer the question using a single word or phrase."
START, END = "<|im_start|>", "<|im_end|>"
IMAGE_OPEN, IMAGE_TOKEN, IMAGE_CLOSE = "<img>", "<IMG_CONTEXT>", "</img>"
PLACEHOLDER, OTHER_PLACE = "<image>", "<ImageHere>"      # in a question: the next image goes here
MARKUP = re.compile("(</?(?:ref|box|quad)>)")           # tokens that name and frame a part of an image
IGNORE_INDEX, LONGEST_TOKEN = -100, 256                 # characters of a token, at most


@dataclass(frozen=True)
class Template:
    """How a turn is written; the text of an answer and its `end` are in the loss."""
    system: str                         # text of the system turn
    start: str = START                  # special token that opens a turn; {} is the role: system, user or assistant
    name: str = "{}\n"                  # plain text behind it
    end: str = END                      # special token; the model stops there
    gap: str = ""                       # plain text between two turns
    strip: bool = False                 # in training, turns lose white space at their ends
    line: str = "\n"                    # plain text behind an image that comes before the question
    stops: tuple = ()                   # special tokens beside `end` that end an answer

    def builder(self, tokenizer, tokens_per_tile, system, tiles, branches):
        """The PromptBuilder of a row. Another model's depends on `tiles` and `branches`, see `write_page`."""
        return PromptBuilder(tokenizer, tokens_per_tile, self, system)


TEMPLATES = {                           # by the word "template" of config.json; V1.5's sentences: `read_template`
    "Hermes-2": Template(SYSTEM), "internlm2-chat": Template(SYSTEM, strip=True),
    "internvl2_5": Template(SYSTEM_25, gap="\n"), "phi3-chat": Template(SYSTEM, "<|{}|>", "\n", "<|end|>")}


def read_template(official, folder):
    """The Template of a config.json; its sentence from there, or from conversation.py, which is read, not executed."""
    file, template, sentences = folder / "conversation.py", TEMPLATES[official["template"]], {}
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ():
        values = {keyword.arg: getattr(keyword.value, "value", None) for keyword in getattr(call, "keywords", ())}
        sentences[values.get("name")] = values.get("system_message")
    system = official.get("system_message") or sentences.get(official["template"]) or template.system
    return replace(template, system=system)


@dataclass
class Prompt:
    """A row of tokens; the five lists have one length."""
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)         # the token's own id if it is in the loss, else IGNORE_INDEX
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)       # 0: prefix; 1, 2, ...: one per conversation about the page
    images: list[bool] = field(default_factory=list)        # whether it is an image token, which the model computes

    @property
    def answer_tokens(self):
        return sum(label != IGNORE_INDEX for label in self.labels)


class PromptBuilder:
    """Appends pieces to a prompt, first the system turn. Text between two special tokens is tokenized as one string."""

    def __init__(self, tokenizer, tokens_per_tile, template=TEMPLATES["Hermes-2"], system=None):
        self.tokenizer, self.tokens_per_tile, self.added = tokenizer, tokens_per_tile, tokenizer.get_added_vocab()
        # swallow: white space that follows vanishes (Phi-3)
        self.template, self.prompt, self.branch, self.position, self.swallow = template, Prompt(), 0, 0, False
        self.append(list(tokenizer("").input_ids), False)
        self.text(self.start("system") + (template.system if system is None else system))
        self.end()

    def text(self, text, in_loss=False):
        text = text.lstrip() if self.swallow else text
        self.swallow = self.swallow and not text
        for piece in MARKUP.split(text) if self.added.keys() >= set(MARKUP.findall(text)) else [text]:
            self.append([self.added[piece]] if piece in self.added and MARKUP.fullmatch(piece) else
                        self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids, in_loss)

    def special(self, token, count=1, in_loss=False):
        self.append([special_id(self.tokenizer, token)] * count, in_loss, token == IMAGE_TOKEN)
        self.swallow = token in getattr(self.tokenizer, "swallowing", ())

    def start(self, role):
        """Open a turn; returns its first plain text."""
        self.special(self.template.start.format(role))
        return self.template.name.format(role)

    def end(self, in_loss=False):
        self.special(self.template.end, in_loss=in_loss)
        self.text(self.template.gap)

    def question(self, text, images):
        """A user's turn up to its end; each "<image>" becomes the next of `images`, an iterator over tile counts."""
        tiles = list(itertools.islice(images, text.count(PLACEHOLDER)))
        first, *parts = text.split(PLACEHOLDER, len(tiles))             # further placeholders are plain text
        self.text(self.start("user") + first)
        for count, part in zip(tiles, parts):
            self.special(IMAGE_OPEN)
            self.special(IMAGE_TOKEN, count * self.tokens_per_tile)
            self.special(IMAGE_CLOSE)
            self.text(part)

    def reply(self, answer, last=False):        # last: of its branch, for models that mark it
        """End the user's turn and write the answer, which is in the loss; stop where it begins if it is None."""
        self.end()
        self.text(self.start("assistant"))
        if answer is not None:
            self.text(answer, in_loss=True)
            self.end(in_loss=True)

    def append(self, ids, in_loss, image=False):
        self.prompt.ids += ids
        self.prompt.images += [image] * len(ids)
        self.prompt.labels += ids if in_loss else [IGNORE_INDEX] * len(ids)
        self.prompt.positions += range(self.position, self.position + len(ids))
        self.prompt.branches += [self.branch] * len(ids)
        self.position += len(ids)


def write_page(tokenizer, tokens_per_tile, tiles, branches, max_length=None, system=None, history=(),
               question_start=None, template=TEMPLATES["Hermes-2"]):
    """Write a page with all its conversations, each a branch -> (Prompt, indices of the branches that were left out).

    `tiles`: number of tiles of each image; the images come first, one per line. `branches`: one list of (question,
    answer) turns per conversation; the model writes an answer that is None. `max_length`: largest number of tokens of
    prefix and branch together. `system`: text of the system turn, if not the template's. Where the images do not come
    first, the prefix has `history`, whole turns, and `question_start`, the next question up to its last "<image>".

    >>> write_page(tokenizer, 256, [7], [[("What is the date?", "January 8, 1993.")]])[0].ids[-2:]
    [13, 151645]
    """
    builder, images = template.builder(tokenizer, tokens_per_tile, system, tiles, branches), iter(tiles)
    for question, answer in history:
        builder.question(question, images)
        builder.reply(answer)
    if tiles:
        builder.question(question_start or template.line.join([PLACEHOLDER] * len(tiles)), images)
        begins_with = "" if question_start else template.line
    else:
        begins_with = builder.start("user")
    prompt, too_long = builder.prompt, []
    prefix, swallow = len(prompt.ids), builder.swallow
    for index, turns in enumerate(branches):
        # megabytes are not even tokenized
        hopeless = max_length and sum(len(text or "") for turn in turns for text in turn) > LONGEST_TOKEN * max_length
        begin = len(prompt.ids)
        builder.branch, builder.position, builder.swallow = index + 1 - len(too_long), prefix, swallow
        for i, (question, answer) in enumerate(() if hopeless else turns):
            builder.question(question, iter(())) if i else builder.text(begins_with + question)
            builder.reply(answer, last=i + 1 == len(turns))
        if hopeless or max_length and prefix + len(prompt.ids) - begin > max_length:
            for column in vars(prompt).values():
                del column[begin:]
            too_long.append(index)
    return prompt, too_long


def write_conversation(tokenizer, tokens_per_tile, turns, template=TEMPLATES["Hermes-2"]):
    """Write one conversation -> Prompt of branch 0 alone.

    `turns`: (question, answer, number of tiles of each of its images); each image replaces the next "<image>" in the
    question; the model writes a last answer that is None. Raises InputError for fewer "<image>" than images.
    """
    builder = template.builder(tokenizer, tokens_per_tile, None, [tiles for *_, tiles in turns], ())
    for question, answer, tiles in turns:
        if question.count(PLACEHOLDER) < len(tiles):
            raise InputError(f"{len(tiles)} images, but {question.count(PLACEHOLDER)} {PLACEHOLDER} in the question: "
                             "write one for each image, or none")
        builder.question(question, iter(tiles))
        builder.reply(answer)
    return builder.prompt
