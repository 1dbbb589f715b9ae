"""Which rows does a file hold, in whichever of the usual formats, and what is wrong with the others?

    {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]}
        ->  {"images": (".../a.png",), "turns": [("What?", "This.")], "place": ".../my.jsonl:1", ...}

A format of your own is one entry in FORMATS. No image is opened here.
"""
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.errors import InputError
from model.prompt import PLACEHOLDER

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PARTS = {"text": "{}", "image": "<img>{}</img>", "image_url": "<img>{}</img>"}      # of a turn, by their "type"
PLACES = re.compile(r"<img>(.*?)</img>|<image>|<ImageHere>", re.DOTALL)


# -------------------------------------------------------------------------------------------------------------- formats

FORMATS = {         # the key that tells a format -> its (speaker, text) pairs, and its images as they are written
    "conversations": lambda entry: (turns_of(entry["conversations"], "from", "value"), images_of(entry)),
    "messages": lambda entry: (turns_of(entry["messages"], "role", "content"), images_of(entry)),
    "query": lambda entry: (query_turns(entry), images_of(entry)),                      # older ms-swift
    "food_meta": lambda entry: (food_turns(entry), entry["food_meta"]["food_file"]),    # FoodieQA
    "question": lambda entry: (
        [("user", entry["question"]), ("assistant", accepted_answers(entry)[0])], images_of(entry)),
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
            pairs.append((turn[speaker], text_of(turn[text])))
        elif isinstance(turn, list) and len(turn) == 2:
            pairs += zip(("user", "assistant"), turn)
        else:
            raise InputError(f"turn {number} is {shown(turn)}; expected [question, answer]"
                             + (f' or {{"{speaker}", "{text}"}}' if speaker else ""))
    return pairs


def query_turns(entry):
    history = turns_of(entry["history"], None, None) if entry.get("history") else []
    turns = [*history, ("user", entry["query"]), ("assistant", entry.get("response"))]
    return [("system", entry["system"]), *turns] if entry.get("system") else turns


def food_turns(entry):
    """The right choice and the dish are the answer, as in FoodieQA's conversion for LLaVA."""
    choice = entry["choices"][int(entry["answer"])]
    return [("user", entry["question"]), ("assistant", f"{choice}，图中的菜是{entry['food_name']}")]


def accepted_answers(entry):
    """All answers that count as right; the first one is in the loss."""
    answers = entry.get("answers", entry.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"answers are {shown(answers)}; expected a text or a list of texts")
    return answers


def shown(value):
    """A value in a message, cut to 60 characters."""
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


# -------------------------------------------------------------------------------------------------------------- entries

def read_entry(entry):
    """One entry of a file in any of FORMATS -> a row. Raises InputError for what is wrong with it.

    Row: `turns`, (question, answer) pairs; `images`, as they are written; `system`, its turn's text or None; `history`
    and `question_start` as in `write_page`; what scores and predictions need.
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
    try:
        turns, images = FORMATS[key](entry)
        system, turns = question_answer_pairs(turns)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{type(error).__name__}: {error}; expected a row of the format with the key {key}") from error
    images, turns = place_images(turns, images, first=-1 if key in IMAGES_LAST else 0)
    history, question_start, rest = images_first(turns)
    ids = (entry.get(name) for name in ("questionId", "question_id", "id"))
    return {"turns": rest, "images": images, "system": system, "history": history, "question_start": question_start,
            "accepted": accepted_answers(entry) if key == "question" else None, "instruction": "",
            "question_types": entry.get("question_types") or [],
            "questionId": next((name for name in ids if name is not None), None),
            "key": hashlib.sha1(repr(images or turns).encode()).hexdigest()}


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
    system = texts.pop(0) if has_system else None
    if not texts or len(texts) % 2:
        raise InputError("the last turn is not an answer; expected questions and answers to take turns")
    return system, list(zip(texts[::2], texts[1::2]))


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
    entries: int = 0                    # right and wrong ones
    remarks: list = field(default_factory=list)                 # as problems, but the rows can be used


def read_file(path):
    """The parts of a file: itself, or those that a mixture file names. Malformed rows become problems of their part."""
    try:
        return read_parts(str(path), os.stat(path).st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file") from error


@functools.lru_cache(maxsize=32)
def read_parts(path, changed, root=None, **more):
    """`changed`: the file's time, for the cache. `root`: folder of the images. `more`: settings of every row."""
    found = list(entries(path, Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")))
    whole = found[0][1] if len(found) == 1 else None
    if isinstance(whole, dict) and any(isinstance(part, dict) and "annotation" in part for part in whole.values()):
        return read_mixture(path, whole)
    part = Part(entries=len(found))
    for place, value in found:
        try:
            if isinstance(value, InputError):
                raise value
            row = read_entry(value)
            row["images"] = tuple(locate(image, root or Path(path).parent) for image in row["images"])
            part.rows.append(row | more | {"place": place})
        except InputError as error:
            part.problems.append((place, str(error)))
    if not found:
        part.problems.append((f"{path}:1", "no rows; expected JSON lines, a JSON list or a mixture file"))
    return [part]


def entries(path, text):
    """Yield (place, value) for each entry of a JSON list or of JSON lines; broken JSON gives an InputError."""
    place, whole = read_json(path, text)
    first = text.strip().partition("\n")[0].strip()
    broken_list = first[:1] == "[" and isinstance(read_json(path, first)[1], InputError)
    if isinstance(whole, list):
        yield from ((f"{path}: entry {number}", value) for number, value in enumerate(whole, 1))
    elif not isinstance(whole, InputError) or broken_list or first == "{":
        yield place, whole
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
    if not Path(annotation).is_file():
        raise InputError(f"annotation {annotation}: no such file")
    root = source["root"] and locate(source["root"], folder)
    part, *others = read_parts(annotation, os.stat(annotation).st_mtime_ns, root,
                               max_tiles=source["max_dynamic_patch"], augment=source["data_augment"])
    if others:
        raise InputError(f"annotation {annotation} is a mixture file itself; expected rows")
    length, found = source.get("length", part.entries), part.entries
    remarks = [(place, f"length is {shown(length)}, but {source['annotation']} has {found} rows")] * (length != found)
    return replace(part, problems=list(part.problems), weight=source["repeat_time"], remarks=remarks)


def locate(name, folder):
    """An address, or the path of a file: relative to `folder` or, if it is not there, to the current folder."""
    beside = os.path.join(folder, name)
    return name if "://" in name or not os.path.exists(beside) and os.path.exists(name) else beside
