"""Which rows does a file hold, in whichever of the usual formats, and what is wrong with the others?

    {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]}
        ->  {"images": (".../a.png",), "turns": [("What?", "This.")], "place": ".../my.jsonl:1", ...}

A format of your own is one entry in FORMATS. No image is opened here.
"""
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.errors import InputError
from model.prompt import OTHER_PLACE, PLACEHOLDER

EXPECTED = "expected JSON lines, a JSON list or a mixture file; of parquet files give the folder, in the Hub's layout"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PARTS = {"text": "{}", "image": "<img>{}</img>", "image_url": "<img>{}</img>"}      # of a turn, by their "type"
PLACES = re.compile(rf"<img>(.*?)</img>|{PLACEHOLDER}|{OTHER_PLACE}", re.DOTALL)
# what other programs write for a place, or for a box of the key "objects"
OTHER_PLACES = re.compile(r"<(?!image>)(?i:\|?image[ _-]?\d*(?:_pad|_placeholder)?\|?|(?:img|picture|photo)[ _-]?\d+"
                          r"|ref-object|bbox)>")
# keys that may carry an image or a turn; that may carry a mask; that carry nothing; and values that name an image
CARRIES = re.compile(r"image|img|picture|photo|\bpic|path|file|url|video|audio|media|visual|scan|\bdoc\b|object|box|"
                     r"turn|conversation|message|history|system|prompt|instruct|context|query|question|answer|respon|label|"
                     r"caption|\btext|chosen|reject|input|output|tool", re.I)
MASKS = re.compile("loss|mask|weight|train", re.I)
NOTHING = re.compile("(.*[_-])?(id|source|width|height|size|type|no)s?(_list)?|.*(Id|_en)")
IMAGE_NAME = re.compile(r"\.(png|jpe?g|tiff?|webp|gif|bmp|pdf|jp2|avif)\b|\"(data:image|https?:)", re.I)
HELD_OUT, MOST_HELD_OUT = 20, 64        # one image of a file in 20 is held out for validation, and about 64 at most


# -------------------------------------------------------------------------------------------------------------- formats

FORMATS = {         # the key that tells a format -> its (speaker, text) pairs, and its images as they are written
    "conversations": lambda entry: (turns_of(entry["conversations"], "from", "value"), images_of(entry)),
    "messages": lambda entry: (turns_of(entry["messages"], "role", "content"), images_of(entry)),
    "query": lambda entry: (query_turns(entry), images_of(entry)),                      # older ms-swift
    "food_meta": lambda entry: (food_turns(entry), entry["food_meta"]["food_file"]),    # FoodieQA
    "question": lambda entry: (
        list(zip(("user", "assistant"), (entry["question"], *accepted_answers(entry)))), images_of(entry)),
}
IMAGES_LAST = ("messages", "query")     # ms-swift puts images without a place before the last question, not the first


def images_of(entry):
    return entry.get("image") or entry.get("images") or []


def path_of(image):
    """An image as a path or an address; of {"path": ...} and {"url": ...} what they name, or "". Raises InputError."""
    image = image.get("path") or image.get("url") or "" if isinstance(image, dict) else image
    if str(image).startswith("data:image/"):
        raise InputError(f"an image inside the row, {shown(image)}; write it to a file and give its path")
    return image


def text_of(content):
    """The text of a turn. A list of parts, as in OpenAI's and transformers' chats, becomes text with its images."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = (PARTS[part["type"]].format(path_of(part.get(part["type"]) or part)) for part in content)
    return "".join(texts).replace("<img></img>", PLACEHOLDER)           # an image that is beside the turns


def turns_of(turns, speaker, text):
    """[{speaker: ..., text: ...}, ...] or [[question, answer], ...] -> [(speaker, text), ...]."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"turns are {shown(turns)}; expected a list of them")
    pairs = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and speaker in turn and text in turn:
            refuse_unread(turn, {speaker, text}, f"turn {number}: ")
            pairs.append((turn[speaker], text_of(turn[text])))
        elif isinstance(turn, list) and len(turn) == 2:
            pairs += zip(("user", "assistant"), turn)
        else:
            raise InputError(f"turn {number} is {shown(turn)}; expected [question, answer]"
                             + (f' or {{"{speaker}", "{text}"}}' if speaker else ""))
    return pairs


def query_turns(entry):
    history = turns_of(entry["history"], None, None) if entry.get("history") else []
    answer = [] if entry.get("response") is None else [("assistant", entry["response"])]
    return [*history, ("user", entry["query"]), *answer]


def food_turns(entry):
    """The right choice and the dish are the answer, as in FoodieQA's conversion for LLaVA."""
    choice = entry["choices"][int(entry["answer"])]
    return [("user", entry["question"]), ("assistant", f"{choice}，图中的菜是{entry['food_name']}")]


def accepted_answers(entry):
    """All answers that count as right, none if they are missing or empty; the first one is in the loss."""
    answers = entry.get("answers", entry.get("answer"))
    answers = [answers] if isinstance(answers, str) else [] if answers is None else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"answers are {shown(answers)}; expected a text or a list of texts")
    return [answer for answer in answers if answer.strip()]


def shown(value):
    """A value in a message, cut to 60 characters."""
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


def refuse_unread(entry, read, place="", images=()):
    """Raise InputError for a key that is not among `read`, but may carry an image, a turn or a mask."""
    for key, value in entry.items():
        if key in read or value in (None, "", [], {}):
            continue
        names_image = IMAGE_NAME.search(json.dumps(value))
        if NOTHING.fullmatch(key) and (images or not names_image):
            continue
        nested = isinstance(value, list) and any(isinstance(part, (list, dict)) for part in value)
        if (names_image or nested or MASKS.search(key) and value != 1
                or CARRIES.search(key) and not isinstance(value, (bool, int, float))):
            raise InputError(f"{place}{key}: not a key that is read here, and it may carry an image, a turn or a mask; "
                             "use the keys in extras/README.md, or remove it")


class Noted(collections.UserDict):
    """An entry that notes in `read` which of its keys were looked up."""
    read = frozenset()

    def __getitem__(self, key):
        self.read |= {key}
        return super().__getitem__(key)


# -------------------------------------------------------------------------------------------------------------- entries

def read_entry(entry):
    """One entry of a file in any of FORMATS -> a row. Raises InputError for what is wrong with it.

    Row: `turns`, (question, answer) pairs; `images`, as they are written; `system`, its turn's text or None; `history`
    and `question_start` as in `write_page`; what scores and predictions need. A last answer that is missing is empty.
    """
    if isinstance(entry, list):
        entry = {"conversations": [entry] if entry and isinstance(entry[0], str) else entry}
    if not isinstance(entry, dict):
        raise InputError(f"{shown(entry)}; expected an object")
    key = next((key for key in FORMATS if key in entry), None)
    if key is None:
        raise InputError(f"none of the keys {', '.join(FORMATS)} (found: {', '.join(entry) or 'none'}); "
                         "expected one of the formats in extras/README.md")
    if entry.get("video") or entry.get("videos"):
        raise InputError("a video; only images are read")
    entry = Noted(entry)
    try:
        turns, images = FORMATS[key](entry)
        if beside := entry.get("system"):
            if SPEAKERS.get(str(turns[0][0])) == "system" and turns.pop(0)[1] != beside:
                raise InputError(f"system is {shown(beside)}, and the system turn is another; expected one of them")
            turns.insert(0, ("system", beside))
        system, turns = question_answer_pairs(turns)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{type(error).__name__}: {error}; expected a row of the format with the key {key}") from error
    images, turns = place_images(turns, images, first=-1 if key in IMAGES_LAST else 0)
    history, question_start, rest = images_first(turns)
    ids = (entry.get(name) for name in ("questionId", "question_id", "id"))
    types = entry.get("question_types") or []
    accepted = accepted_answers(entry) if key == "question" else None
    refuse_unread(entry, entry.read, images=images)
    return {"turns": rest, "images": images, "system": system, "history": history, "question_start": question_start,
            "accepted": accepted, "instruction": "",
            "question_types": types if isinstance(types, list) else [str(types)],
            "questionId": next((name for name in ids if name is not None), None)}


def question_answer_pairs(turns):
    """(speaker, text) pairs -> the system turn's text or None, and (question, answer) pairs. Raises InputError."""
    texts, has_system = [text for _, text in turns], SPEAKERS.get(str(turns[0][0])) == "system"
    for number, (speaker, text) in enumerate(turns, 1):
        role, is_answer = SPEAKERS.get(str(speaker)), (number - has_system) % 2 == 0
        if role is None:
            raise InputError(f"turn {number} is from {shown(speaker)}; expected one of {', '.join(SPEAKERS)}")
        if not isinstance(text, str):
            raise InputError(f"turn {number} is {shown(text)}; expected text")
        if bad := re.search("[\ud800-\udfff]", text):           # half a character, or a byte that is none
            raise InputError(f"turn {number} is not UTF-8 at its character {bad.start() + 1}")
        if number > has_system and role != ("assistant" if is_answer else "user"):
            raise InputError(f"{speaker} speaks where {'an answer' if is_answer else 'a question'} is expected; "
                             "questions and answers take turns")
        if number > has_system and not text.strip():
            raise InputError("an empty answer; there is nothing to train on" if is_answer else "an empty question")
        if role != "user" and (place := PLACES.search(text)):
            raise InputError(f"{place.group()} in {'a system turn' if role == 'system' else 'an answer'}; expected "
                             "images in questions alone")
        if place := OTHER_PLACES.search(text):
            raise InputError(f"{place.group()} is not the place of an image or a box; expected {PLACEHOLDER}, or "
                             "<ref>its name</ref><box>[[x1, y1, x2, y2]]</box>")
    system = texts.pop(0) if has_system else None
    if not texts:
        raise InputError("no question; expected questions and answers to take turns")
    return system, list(itertools.zip_longest(texts[::2], texts[1::2], fillvalue=""))


def place_images(turns, listed, first=0):
    """Turns with "<image>" wherever an image is written -> all images in that order, and the turns. Raises InputError.

    `listed`: the images beside the turns, one or several; they take the places that have no path of their own. `first`:
    the turn that they begin if there is no place.
    """
    listed = [path_of(image) for image in (listed if isinstance(listed, list) else [listed])]
    if not all(isinstance(image, str) and image for image in listed):
        raise InputError(f"image is {shown(listed)}; expected a path, an address or a list of them")
    found = [match.group(1) for question, _ in turns for match in PLACES.finditer(question)]    # paths, or None
    if not found:
        question, answer = turns[first]
        turns[first] = f"{PLACEHOLDER}\n" * len(listed) + question, answer
        return listed, turns
    if found.count(None) != len(listed):
        raise InputError(f"{found.count(None)} {PLACEHOLDER} and {len(listed)} images; "
                         "expected one for each image, or none")
    if "" in found:
        raise InputError("an <img></img> without a path")
    waiting = iter(listed)
    images = [next(waiting) if path is None else path for path in found]
    return images, [(PLACES.sub(PLACEHOLDER, question), answer) for question, answer in turns]


def images_first(turns):
    """Turns -> (history, question_start, turns), see `write_page`; ([], None, turns) if images simply come first.

    They do if all of them begin, or all of them end, the first question: then they stand on lines before it, so that
    rows about an image share a page. (LLaVA and XTuner move them to the beginning, too.)
    """
    last = max((number for number, (question, _) in enumerate(turns) if PLACEHOLDER in question), default=None)
    if last is None:
        return [], None, turns
    question, answer = turns[last]
    for rest in (re.sub(r"^(\s*<image>)*\s*", "", question), re.sub(r"\s*(<image>\s*)*$", "", question)):
        if last == 0 and PLACEHOLDER not in rest:
            return [], None, [(rest, answer), *turns[1:]]
    question_start, _, rest = question.rpartition(PLACEHOLDER)
    return turns[:last], question_start + PLACEHOLDER, [(rest, answer), *turns[last + 1:]]


# ---------------------------------------------------------------------------------------------------------------- files

@dataclass
class Part:
    """The rows of one file, how often they come in an epoch, and what is wrong: (place, reason) pairs.

    A place is "file:3", the third line, or "file: entry 3" of a JSON list.
    """
    rows: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    weight: float = 1.0
    unanswered: list = field(default_factory=list)              # as problems, but the rows can be asked
    entries: int = 0                    # right and wrong ones
    remarks: list = field(default_factory=list)                 # as problems, but the rows can be used
    digest: str = ""                    # a hash of the file's text


def read_file(path):
    """The parts of a file: itself, or those that a mixture file names. Malformed rows become problems of their part."""
    try:
        return read_parts(str(path), os.stat(path).st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file") from error


@functools.lru_cache(maxsize=32)
def read_parts(path, changed, root=None, **more):
    """`changed`: the file's time, for the cache. `root`: folder of the images. `more`: settings of every row."""
    try:
        text = read_text(path)
        found = list(entries(path, text))
    except InputError as error:
        return [Part(problems=[(path, str(error))], entries=1)]
    whole = found[0][1] if len(found) == 1 else None
    if isinstance(whole, dict) and any(isinstance(part, dict) and "annotation" in part for part in whole.values()):
        if more:
            raise InputError(f"annotation {path} is a mixture file itself; expected rows")
        return read_mixture(path, whole)
    part = Part(entries=len(found), digest=hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest())
    for place, value in found:
        try:
            if isinstance(value, InputError):
                raise value
            row = read_entry(value)
            row["images"] = tuple(locate(image, root or Path(path).parent) for image in row["images"])
            part.rows.append(row | more | {"place": place})
            if not row["turns"][-1][1]:
                part.unanswered.append((place, "the last turn is not an answer; expected an answer to every question"))
        except InputError as error:
            part.problems.append((place, str(error)))
    if not found:
        part.problems.append((f"{path}:1", f"no rows; {EXPECTED}"))
    return [part]


def read_text(path):
    """The text of a file in UTF-8 or UTF-16. Raises InputError for a pipe, a device and a file that holds no text."""
    if not os.path.isfile(path):
        raise InputError(f"not a regular file; {EXPECTED}")
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    if b"\0" in content:
        raise InputError(f"no text file, it begins with {content[:4]}; {EXPECTED}")
    return content.decode("utf-8-sig", "surrogateescape")


def entries(path, text):
    """Yield (place, value) for each entry of a JSON list or of JSON lines; broken JSON gives an InputError."""
    place, whole = read_json(path, text)
    first = text.strip().partition("\n")[0].strip()
    broken_list = first[:1] == "[" and isinstance(read_json(path, first)[1], InputError)
    if isinstance(whole, list):
        yield from ((f"{path}: entry {number}", value) for number, value in enumerate(whole, 1))
    elif not isinstance(whole, InputError) or broken_list or first == "{":
        yield place, whole
    elif first and not re.search(r"^\s*[{\[]", text, re.MULTILINE):
        yield f"{path}:1", InputError(f"no line is JSON; {EXPECTED}")
    else:
        yield from (read_json(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_json(path, text, line=1):
    """(place, value) of a JSON text that begins on a line; of broken JSON the place of the mistake, an InputError."""
    try:
        return f"{path}:{line}", json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"{path}:{line + getattr(error, 'lineno', 1) - 1}", InputError(f"not JSON ({error})")


# ------------------------------------------------------------------------------------------------------------- mixtures

SOURCE = {          # keys of a mixture's source -> the value of one that is left out, what is right, and its name
    "annotation": (None, lambda value: isinstance(value, str), "a file"),
    "root": ("", lambda value: isinstance(value, str), "a folder"),
    "repeat_time": (1, lambda value: type(value) in (int, float) and 0 < value < 1e6, "a number above 0"),
    "max_dynamic_patch": (None, lambda value: value is None or type(value) is int and 0 < value <= 128, "1 to 128"),
    "data_augment": (False, lambda value: isinstance(value, bool), "true or false"),
}


def read_mixture(path, sources):
    """The parts of a mixture file, {name: source}; its places are "file: name"."""
    parts = []
    for name, source in sources.items():
        try:
            parts.append(read_source(f"{path}: {name}", source, Path(path).parent))
        except InputError as error:
            parts.append(Part(problems=[(f"{path}: {name}", str(error))]))
    return parts


def read_source(place, source, folder):
    """One source of a mixture file in `folder` -> its part. Raises InputError."""
    if not isinstance(source, dict):
        raise InputError(f"{shown(source)}; expected an object with root, annotation, repeat_time")
    source = {key: default for key, (default, _, _) in SOURCE.items()} | source
    for key, (_, right, expected) in SOURCE.items():
        if not right(source[key]):
            raise InputError(f"{key} is {shown(source[key])}; expected {expected}")
    annotation = locate(source["annotation"], folder)
    if not os.path.isfile(annotation):
        raise InputError(f"annotation {annotation}: no such file")
    root = source["root"] and locate(source["root"], folder)
    [part] = read_parts(annotation, os.stat(annotation).st_mtime_ns, root,
                        max_tiles=source["max_dynamic_patch"], augment=source["data_augment"])
    length, found = source.get("length", part.entries), part.entries
    remarks = [(place, f"length is {shown(length)}, but {source['annotation']} has {found} rows")] * (length != found)
    return replace(part, problems=list(part.problems), weight=source["repeat_time"], remarks=remarks)


def locate(name, folder):
    """An address, or the path of a file: relative to `folder` or, if it is not there, to the current folder."""
    beside = os.path.join(folder, name)
    return name if "://" in name or not os.path.exists(beside) and os.path.exists(name) else beside


# ------------------------------------------------------------------------------------------------------------- hold-out

def content_hash(image):
    """A number from 0 to 1, from the size and the first 64 kB of an image's file, or from the text of an address."""
    content = image.encode("utf-8", "surrogatepass") if isinstance(image, str) else bytes(image)
    size = len(content)
    if isinstance(image, str) and os.path.isfile(image):
        with contextlib.suppress(OSError), open(image, "rb") as file:   # one that cannot be read is its name
            size, content = os.path.getsize(image), file.read(2 ** 16)
    return int.from_bytes(hashlib.sha1(b"%d " % size + content[:2 ** 16]).digest()[:8]) / 2 ** 64


def splits_of(rows):
    """The split of each row of all files together: "train", "validation", or "neither" where its images are of both.

    Each image decides by itself: so no image is in both, and rows that are added never move one to validation.
    """
    hashes = {image: content_hash(image) for row in rows for image in row["images"]}
    limit = min(1 / HELD_OUT, MOST_HELD_OUT / max(1, len(rows)))
    limit = max(limit, min(hashes.values(), default=0))                 # at least one image
    sides = ({hashes[image] <= limit for image in row["images"]} for row in rows)
    return ["neither" if len(side) == 2 else "validation" if True in side else "train" for side in sides]
