"""How does a conversation continue? The KV cache keeps all earlier tokens, so a turn reads only its own.

    turn 1   <|im_start|>system ... user\\n <img> 1,792 image tokens </img>\\n What is the date?  reads 1,848 tokens
             January 8, 1993.                                                                   read when generated
    turn 2   <|im_end|><|im_start|>user\\n And the total?                                        reads 13 tokens

The whole conversation is written anew for each turn; what it shares with the cache is not read again. So `undo` needs
no rule of its own, nor does an answer whose text has other tokens than those that were generated.
"""
import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from model.errors import InputError
from model.generate import generate
from model.images import load_image
from model.language import KVCache
from model.prompt import MARKUP, OTHER_PLACE, PLACEHOLDER, Prompt, write_conversation
from model.tiling import choose_grid, tile_page


@dataclass(eq=False)
class Picture:
    """An image or a video frame of a conversation."""
    image: Image.Image
    tiles: np.ndarray                           # uint8 (n, 3, 448, 448)
    grid: tuple[int, int]                       # columns and rows of the tiles, without the thumbnail
    label: str = ""                             # the words before it in the prompt
    tokens: torch.Tensor | None = None          # (256 n, D), once it is encoded


@dataclass
class Turn:
    question: str                               # with an "<image>" for every picture
    answer: str | None
    pictures: list[Picture] = field(default_factory=list)


class Chat:
    """A conversation with a model. `turns` are the questions and answers so far, `waiting` the images for the next one.

    `max_tiles`: limit for the grid of an image, by default the model's; the other settings are those of `generate`.
    After a turn `report` has the answer, its tokens and timings, and `read` the number of prompt tokens that were new.
    """

    def __init__(self, model, max_tiles=None, max_new_tokens=512, temperature=0.0, top_p=1.0, seed=0,
                 repetition_penalty=None):
        self.model, self.max_tiles = model, max_tiles or model.config.max_tiles
        self.settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
                         "repetition_penalty": repetition_penalty or model.config.repetition_penalty}
        self.clear()

    def clear(self):
        """Forget all turns and images."""
        self.turns, self.waiting, self.report, self.read, self.is_long = [], [], None, 0, False
        self.cache, self.held = KVCache(self.model.config.language, 0, self.model.device, self.model.dtype), []

    @property
    def pictures(self):
        """All pictures of the conversation, in order."""
        return [picture for turn in self.turns for picture in turn.pictures] + self.waiting

    def add_image(self, image):
        """Show an image with the next question. `image`: as `load_image` takes it. Raises InputError."""
        self.waiting.append(self.picture(image, len(self.pictures) + 1))

    def add_video(self, frames):
        """Show a video with the next question: its `frames`, Pillow images, become one tile each. Raises InputError."""
        if frames and not self.model.config.tiled:
            raise InputError("this model was not trained on videos; show a frame as an image, or take an InternVL")
        self.waiting += [self.cut(frame, 1, f"Frame{i}: ") for i, frame in enumerate(frames, 1)]

    def picture(self, image, number):
        """The Picture of an image, number `number` of the conversation."""
        # images of the first question have no label; later ones are numbered, as in the official multi-image prompt
        return self.cut(load_image(image), self.max_tiles,
                        f"Image-{number}: " if self.turns and self.model.config.tiled else "")

    def cut(self, image, max_tiles, label):
        size, max_tiles = self.model.config.vision.tile_pixels, max_tiles if self.model.config.tiled else 1
        tiles = tile_page(image, max_tiles, size, self.model.config.thumbnail)
        return Picture(image, tiles, choose_grid(*image.size, max_tiles, size), label)

    def undo(self):
        """Take the last question back; its pictures wait for the next one. Raises InputError if there is none."""
        if not self.turns:
            raise InputError("there is no question to take back")
        self.waiting = self.turns.pop().pictures + self.waiting

    def ask(self, question, *images, **settings):
        """The answer to `question`, about `images` and the conversation before it. See `stream`."""
        return "".join(self.stream(question, *images, **settings))

    def stream(self, question, *images, **settings):
        """Yield the answer's text as it is generated, never half a character.

        `images`: as `add_image` takes them; an "<image>" in the question says where one belongs, else they come first,
        one per line. `settings`: max_new_tokens, temperature, top_p, seed, for this question only. If the generator is
        closed early, the conversation keeps the answer so far, or nothing if there is none. Raises InputError for an
        empty question, and for more tokens than the model has positions.
        """
        settings = self.settings | settings
        turn, prompt, keys = self.prepare(question, images, settings["max_new_tokens"])
        same = self.shared(keys)
        self.held, self.read = keys[:same], len(keys) - same
        self.cache.crop(same)
        started, first, tokens, shown = time.perf_counter(), None, [], ""
        try:
            tiles, image_tokens = self.encode(keys[same:])
            rest = Prompt(*(column[same:] for column in vars(prompt).values()))         # what is not in the cache
            for [token] in generate(self.model, [(tiles, rest)], image_tokens=image_tokens, caches=[self.cache],
                                    whole=[prompt], **settings):
                first = first or time.perf_counter()
                self.held = keys + tokens               # `generate` reads a token when it computes the next one
                tokens.append(token)
                # tokenizers' DecodeStream neither strips the text nor shows an answer's incomplete last character
                text = decode(self.model, tokens)
                if len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(shown):]
                    shown = text
            if len(text) > len(shown):
                yield text[len(shown):]
        finally:
            self.cache.crop(len(self.held))             # interrupted inside a layer, it may hold part of a token
            if tokens:
                seconds = time.perf_counter() - first
                turn.answer, self.waiting = decode(self.model, tokens), []
                self.turns.append(turn)
                speed = (len(tokens) - 1) / seconds if len(tokens) > 1 else None
                self.report = describe(self.model, question, tokens, [len(picture.tiles) for picture in self.pictures],
                                       len(prompt.ids), first - started, speed)

    def shared(self, keys):
        """How many of a prompt's first tokens the cache holds, rotated as in a text of this length."""
        if self.model.config.language.is_long(len(keys)) != self.is_long:
            self.is_long, self.held = not self.is_long, []
        most = min(len(self.held), len(keys) - 1)       # at least one token must be read to predict the next
        return next((i for i in range(most) if self.held[i] != keys[i]), most)

    def prepare(self, question, images, max_new_tokens):
        """Write a question into the conversation -> (its turn, prompt, keys as in `write`)."""
        if not question.strip():
            raise InputError("the question is empty; write what you want to know")
        shown = [self.picture(image, i) for i, image in enumerate(images, len(self.pictures) + 1)]
        turn = Turn(question.replace(OTHER_PLACE, PLACEHOLDER), None, self.waiting + shown)
        if PLACEHOLDER not in turn.question:
            line = self.model.config.template.line
            turn.question = "".join(f"{picture.label}{PLACEHOLDER}{line}" for picture in turn.pictures) + question
        prompt, keys = self.write([*self.turns, turn])
        most = self.model.config.language.max_positions
        if len(prompt.ids) + max_new_tokens > most:
            raise InputError(f"{len(prompt.ids)} tokens of prompt and {max_new_tokens} of answer exceed the model's "
                             f"{most}; ask with fewer tiles, images or words, or for a shorter answer")
        return turn, prompt, keys

    def write(self, turns):
        """The prompt, and a key for each of its tokens: the id, or the picture that an image token belongs to."""
        size = self.model.config.tokens_per_tile
        prompt = write_conversation(self.model.tokenizer, size, [
            (turn.question, turn.answer, [len(picture.tiles) for picture in turn.pictures]) for turn in turns],
            self.model.config.template)
        shown = (picture for turn in turns for picture in turn.pictures for _ in range(len(picture.tiles) * size))
        return prompt, [next(shown) if is_image else token for token, is_image in zip(prompt.ids, prompt.images)]

    @torch.inference_mode()
    def encode(self, keys):
        """The pictures among `keys` -> (tiles, image tokens (n, D)), or ([], None); each picture is encoded once."""
        pictures = list(dict.fromkeys(key for key in keys if isinstance(key, Picture)))
        for picture in pictures:
            if picture.tokens is None:
                picture.tokens = self.model.encode_images(torch.as_tensor(picture.tiles).to(self.model.device))
        if not pictures:
            return [], None
        return np.concatenate([picture.tiles for picture in pictures]), torch.cat([p.tokens for p in pictures])


def decode(model, tokens):
    """The text of an answer's tokens, without special tokens other than markup."""
    tokenizer = model.tokenizer
    markup = {index: text for text, index in tokenizer.get_added_vocab().items() if MARKUP.fullmatch(text)}
    return "".join("".join(map(markup.get, run)) if marked else tokenizer.decode(list(run), skip_special_tokens=True)
                   for marked, run in itertools.groupby(tokens, markup.__contains__)).strip()


def describe(model, question, tokens, tiles, prompt_tokens, prefill_seconds, decode_tokens_per_second):
    """The JSON object of an answer. `tiles`: of each image; `prompt_tokens`: of the whole conversation."""
    return {"question": question, "answer": decode(model, tokens), "tokens": tokens, "tiles": tiles,
            "prompt_tokens": prompt_tokens, "prefill_seconds": prefill_seconds,
            "decode_tokens_per_second": decode_tokens_per_second}
