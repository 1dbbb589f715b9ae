"""Which rows does a file of yours hold, in whichever of the usual formats, and what is wrong with those that it does not?

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}
        ->  {"images": (".../a.png",), "turns": [("What?", "This.")], "place": ".../my.jsonl:1", ...}

Plain text in, plain rows out: no image is opened here.
"""
import functools
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import InputError
from model.prompt import PLACEHOLDER

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACES = re.compile(r"<img>(.*?)</img>|<image>|<ImageHere>", re.DOTALL)


def food_turns(entry):
    """A row of FoodieQA -> its turns: the right choice and the dish are the answer, as in its conversion for LLaVA."""
    try:
        return [("user", entry["question"]),
                ("assistant", f"{entry['choices'][int(entry['answer'])]}，图中的菜是{entry['food_name']}")]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{type(error).__name__}: {error}; expected FoodieQA's question, choices, answer (the index of one) "
                         "and food_name") from error


FORMATS = {                             # the key that a format is known by -> its turns
    "conversations": lambda entry: spoken(entry["conversations"], "from", "value"),             # InternVL, LLaVA, XComposer
    "messages": lambda entry: spoken(entry["messages"], "role", "content"),                     # ms-swift, OpenAI
    "query": lambda entry: [*([("system", entry["system"])] if entry.get("system") else []),    # ms-swift, older
                            *(spoken(entry["history"], None, None) if entry.get("history") else []),
                            ("user", entry["query"]), ("assistant", entry.get("response"))],
    "food_meta": food_turns,
    "question": lambda entry: [("user", entry["question"]), ("assistant", accepted_answers(entry)[0])],
}


def spoken(turns, who, what):
    """[{who: speaker, what: text}, ...], or [[question, answer], ...] -> [(speaker, text), ...]."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"turns are {shown(turns)}; expected a list of them")
    said = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and who in turn and what in turn:
            said.append((turn[who], turn[what]))
        elif isinstance(turn, list) and len(turn) == 2:
            said += zip(("user", "assistant"), turn)
        else:
            raise InputError(f"turn {number} is {shown(turn)}; expected [question, answer]"
                             + (f' or {{"{who}", "{what}"}}' if who else ""))
    return said


def accepted_answers(entry):
    """All answers that count as right, the first one to be learned."""
    answers = entry.get("answers", entry.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"answers are {shown(answers)}; expected a text or a list of texts")
    return answers


def shown(value):
    """A value as a message shows it, cut to some length."""
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


def read_entry(entry):
    """One entry of a file in any of FORMATS -> a row. Raises InputError for what is wrong with it.

    Row: `turns`, (question, answer) pairs; `images`, as they are written; `system`, its turn's text or None; `history` and
    `question_start` as in `write_page`; what else scores and predictions need.
    """
    if isinstance(entry, list):
        entry = {"conversations": [entry] if entry and isinstance(entry[0], str) else entry}
    if not isinstance(entry, dict):
        raise InputError(f"{shown(entry)}; expected an object")
    told_by = next((key for key in FORMATS if key in entry), None)
    if told_by is None:
        raise InputError(f"none of the keys {', '.join(FORMATS)} (found: {', '.join(entry) or 'none'}); "
                         "expected one of the formats in README.md")
    if entry.get("video") or entry.get("videos"):
        raise InputError("a video; only images are read")
    try:
        system, turns = take_turns(FORMATS[told_by](entry))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{type(error).__name__}: {error}; expected a row of the format known by its key {told_by}") from error
    listed = entry.get("image") or entry.get("images") or []
    if told_by == "food_meta":
        listed = entry["food_meta"].get("food_file") if isinstance(entry["food_meta"], dict) else entry["food_meta"]
    listed = listed if isinstance(listed, list) else [listed]
    if not all(isinstance(image, str) and image for image in listed):
        raise InputError(f"image is {shown(listed)}; expected a path, an address or a list of them")
    images, turns = place_images(turns, listed, first=-1 if told_by in ("query", "messages") else 0)
    history, question_start, rest = images_first(turns)
    return {"turns": rest, "images": images, "system": system, "history": history, "question_start": question_start,
            "accepted": accepted_answers(entry) if told_by == "question" else None,
            "question_types": entry.get("question_types") or [],
            "questionId": next((entry[key] for key in ("questionId", "question_id", "id") if entry.get(key) is not None), None),
            "key": hashlib.sha1(repr(images or turns).encode()).hexdigest()}


def take_turns(said):
    """(speaker, text) pairs -> the system turn's text or None, and (question, answer) pairs."""
    for number, (speaker, text) in enumerate(said, 1):
        if SPEAKERS.get(str(speaker)) is None:
            raise InputError(f"turn {number} is from {shown(speaker)}; expected one of {', '.join(SPEAKERS)}")
        if not isinstance(text, str):
            raise InputError(f"turn {number} is {shown(text)}; expected text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"turn {number} is not UTF-8 at its character {error.start + 1}") from error
    system = None
    if SPEAKERS[said[0][0]] == "system":
        system, said = said[0][1], said[1:]
    for number, (speaker, text) in enumerate(said):
        if SPEAKERS[speaker] != ("user", "assistant")[number % 2]:
            raise InputError(f"{speaker} speaks where {('a question', 'an answer')[number % 2]} is expected; "
                             "questions and answers take turns")
        if not text.strip():
            raise InputError("an empty answer: nothing could be learned from it" if number % 2 else "an empty question")
    if not said or len(said) % 2:
        raise InputError("the last turn is no answer; expected questions and answers to take turns")
    return system, [(question, answer) for (_, question), (_, answer) in zip(said[::2], said[1::2])]


def place_images(turns, listed, first=0):
    """Turns with "<image>" wherever an image is written -> all images in that order, and the turns.

    `listed`: the images named beside the turns, which take the places without a path of their own. `first`: the turn that
    they begin where no place is written: the first one or, in ms-swift, the last.
    """
    images, waiting, places = [], iter(listed), 0

    def place(match):
        nonlocal places
        places += match.group(1) is None
        images.append(match.group(1) if match.group(1) is not None else next(waiting, None))
        return PLACEHOLDER
    turns = [(PLACES.sub(place, question), answer) for question, answer in turns]
    if not images:
        question, answer = turns[first]
        turns[first] = f"{PLACEHOLDER}\n" * len(listed) + question, answer
        return listed, turns
    if places != len(listed):
        raise InputError(f"{places} {PLACEHOLDER} and {len(listed)} images; expected one place an image, or none")
    if not all(images):
        raise InputError("an <img></img> without a path")
    return images, turns


def images_first(turns):
    """-> (history, question_start, rest of the turns), see `write_page`; ([], None, turns) where the images simply come first.

    They do where they are all at the beginning, or all at the end, of the first question: on lines of their own, before what
    is left of it, so that rows about an image share a page. (LLaVA and XTuner move them to the beginning too.)
    """
    last = max((number for number, (question, _) in enumerate(turns) if PLACEHOLDER in question), default=None)
    if last is None:
        return [], None, turns
    question, answer = turns[last]
    begin, end = re.match(r"(?:\s*<image>)*\s*", question).end(), re.search(r"\s*(?:<image>\s*)*$", question).start()
    for rest in (question[begin:], question[:end]):
        if last == 0 and PLACEHOLDER not in rest:
            return [], None, [(rest, answer), *turns[1:]]
    question_start, _, rest = question.rpartition(PLACEHOLDER)
    return turns[:last], question_start + PLACEHOLDER, [(rest, answer), *turns[last + 1:]]


def entries(text):
    """(line, value) of each entry of a JSON list or of JSON lines; the value is an InputError where it is no JSON."""
    whole = text.strip()
    first = whole.partition("\n")[0].strip()
    if whole[:1] == "[" and (len(first) == len(whole) or not is_json(first)):
        yield from list_entries(text)
    elif whole[:1] == "{" and (first == "{" or not is_json(first) and is_json(whole)):
        yield read_json(whole, 1)
    else:
        yield from (read_json(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_json(text, line):
    """(line, value) of a JSON text that begins on this line; the value is an InputError, with its own line, if it is none."""
    try:
        return line, json.loads(text)
    except (ValueError, RecursionError) as error:
        return line + getattr(error, "lineno", 1) - 1, InputError(f"no JSON ({error})")


def is_json(text):
    return not isinstance(read_json(text, 1)[1], InputError)


def list_entries(text):
    """As `entries`, of a JSON list: each with the line it begins on; what follows a mistake is not read."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    counted, line = 0, 1
    at = space.match(text, text.index("[") + 1).end()
    more = text[at:at + 1] != "]"
    try:
        while more:
            counted, line = at, line + text.count("\n", counted, at)
            value, at = decode(text, at)
            yield line, value
            at = space.match(text, at).end()
            more = text[at:at + 1] == ","
            if more:
                at = space.match(text, at + 1).end()
            elif text[at:at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']' after an entry", text, at)
        if text[at + 1:].strip():
            raise json.JSONDecodeError("Extra data", text, space.match(text, at + 1).end())
    except (ValueError, RecursionError) as error:
        yield getattr(error, "lineno", line), InputError(f"no JSON ({error}); what follows was not read")


@dataclass
class Part:
    """The rows of one file, how often they come in an epoch, and what is wrong: (file:line, reason) pairs."""
    rows: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    weight: float = 1.0
    entries: int = 0                    # right and wrong ones
    remarks: list = field(default_factory=list)                 # as problems, but nothing that keeps rows from being used


def read_file(path):
    """The parts of a file: itself, or those that a mixture file names. Nothing is raised for a malformed row."""
    try:
        return read_parts(str(path), os.stat(path).st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file") from error


@functools.lru_cache(maxsize=32)
def read_parts(path, changed, root=None, **more):
    """`changed`: its time, so that nothing stale is kept; `root`: folder of the images; `more`: settings of every row."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    found = list(entries(text))
    if len(found) == 1 and is_mixture(found[0][1]):
        return read_mixture(path, text, found[0][1])
    part, on_line = Part(entries=len(found)), Counter(line for line, _ in found)
    for number, (line, value) in enumerate(found, 1):
        try:
            if isinstance(value, InputError):
                raise value
            row = read_entry(value)
            row["images"] = tuple(locate(image, root or Path(path).parent) for image in row["images"])
            part.rows.append(row | more | {"place": f"{path}:{line}"})
        except InputError as error:
            part.problems.append((f"{path}:{line}", str(error) if on_line[line] == 1 else f"entry {number}: {error}"))
    if not found:
        part.problems.append((f"{path}:1", "no rows; expected JSON lines, a JSON list or a mixture file"))
    return [part]


def is_mixture(value):
    return isinstance(value, dict) and any(isinstance(source, dict) and "annotation" in source for source in value.values())


def read_mixture(path, text, sources):
    """The parts of the mixture file `path`, whose text holds `sources`, by name."""
    parts = []
    for name, source in sources.items():
        place = f"{path}:{text[:text.find(json.dumps(name, ensure_ascii=False))].count(chr(10)) + 1}"
        try:
            part = read_source(path, name, source)
            if source.get("length", part.entries) != part.entries:
                part.remarks.append((place, f"{name}: length is {shown(source['length'])}, but {source['annotation']} has "
                                            f"{part.entries} rows"))
        except InputError as error:
            part = Part(problems=[(place, str(error))])
        parts.append(part)
    return parts


def read_source(path, name, source):
    """One source of the mixture file `path` -> its part."""
    def wanted(key, kind, default, text):
        value = source.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise InputError(f"{name}: {key} is {shown(value)}; expected {text}")
        return value
    if not isinstance(source, dict):
        raise InputError(f"{name}: {shown(source)}; expected an object with root, annotation, repeat_time")
    annotation = locate(wanted("annotation", str, None, "a file"), Path(path).parent)
    weight = wanted("repeat_time", (int, float), 1, "a number above 0")
    if not 0 < weight < 1e6:
        raise InputError(f"{name}: repeat_time is {weight}; expected a number above 0")
    max_tiles = wanted("max_dynamic_patch", (int, type(None)), None, "a number of tiles")
    if max_tiles is not None and not 1 <= max_tiles <= 128:
        raise InputError(f"{name}: max_dynamic_patch is {max_tiles}; expected 1 to 128")
    more = {"max_tiles": max_tiles, "augment": wanted("data_augment", bool, False, "true or false")}
    root = locate(wanted("root", str, "", "a folder"), Path(path).parent) if source.get("root") else None
    if not Path(annotation).is_file():
        raise InputError(f"{name}: annotation {annotation}: no such file")
    parts = read_parts(annotation, os.stat(annotation).st_mtime_ns, root, **more)
    if len(parts) != 1:
        raise InputError(f"{name}: annotation {annotation} is a mixture file itself; expected rows")
    return Part(parts[0].rows, list(parts[0].problems), weight, parts[0].entries)


def locate(name, folder):
    """Where a file is: an address or a whole path is itself, else it lies in `folder` or, if not there, is named from here."""
    beside = os.path.join(folder, name)
    return name if "://" in name or not os.path.exists(beside) and os.path.exists(name) else beside
