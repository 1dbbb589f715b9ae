"""How well is a whole split answered? Every question gets a line of predictions and, where an answer is known, its scores.

    pages  ->  those that an interrupted evaluation has answered  --------------------->  predictions.json
           ->  the others  ->  examples, a batch at a time  ->  answers, written down  ->        |
                                                                                          predictions.scores.json

How pages become examples and how a token is chosen it is told by the program, see `evaluate`.
"""
import itertools
import json
import sys

from tqdm import tqdm

from extras.score import score_table
from model.chat import decode
from model.errors import InputError, warn


def evaluate(model, pages, load, write, generate, settings, batch=1, path=None):
    """Answer all questions about some pages -> (lines as `lines_of` makes them, the table of their scores).

    `pages`: an iterator over pages as data.py gathers them. `load`: pages -> their examples, in order. `write`: a page, the
    tiles of its images, indices of questions -> (prompt, indices left out). `generate`: (tiles, prompt) pairs -> steps, as
    `model.generate.generate` with its model and settings. `settings`: {flag: value} of all that answers depend on.
    `batch`: pages answered at once, all questions of a page from one prefix. `path`: a file of predictions; one that exists
    is gone on with.
    A page that cannot be read or does not fit is named, and its answers are empty. Questions without a known answer, such as
    the challenge's test split has, are not scored.
    Raises InputError for a file of predictions made in another way, and for pages without questions.
    """
    answers, pages = pass_over(pages, earlier_answers(path, settings) if path else [], path, settings)
    examples = iter(load(pages))
    with tqdm(initial=len(answers), unit=" questions", file=sys.stderr) as bar:
        while together := list(itertools.islice(examples, batch)):
            answers += answer_batch(model, together, write, generate)
            if path:
                write_predictions(path, answers)
            bar.update(len(answers) - bar.n)
    if not answers:
        raise InputError(f"{settings['evaluate']}: holds no questions")
    table = score_table(answers)
    if path:
        write_settings(path, {"settings": settings, "scores": table}, indent=2)
    return answers, table


def pass_over(pages, known, path, settings):
    """-> (lines of the pages that `known` predictions answer, the other pages). A page is answered whole or not at all."""
    answers, pages = [], iter(pages)
    for page in pages:
        before = known[len(answers):len(answers) + len(page.questions)]
        if [line["questionId"] for line in before] != page.ids[:len(before)]:
            raise InputError(f"{path}: its questions are not those of {settings['evaluate']}; choose another --predictions")
        if len(before) < len(page.questions):
            return answers, itertools.chain([page], pages)
        answers += lines_of(page, [line["answer"] for line in before])
    return answers, iter(())


def answer_batch(model, examples, write, generate):
    """The lines of some examples, whose questions are all answered at once."""
    for example in examples:
        if example.error or example.too_long:
            warn(f"{example.page.name}: {example.error or 'questions that do not fit'}; answered by nothing")
    asked = [[] if example.error else example.kept_questions for example in examples]       # indices of questions, of each page
    prompts = [(example.tiles, write(example.page, example.tile_counts, kept)[0])
               for example, kept in zip(examples, asked) if kept]
    columns = zip(*generate(prompts)) if prompts else []
    texts = iter([decode(model, [token for token in column if token is not None]) for column in columns])
    answers = [[next(texts) if i in kept else "" for i in range(len(example.page.questions))]
               for example, kept in zip(examples, asked)]
    return [line for example, told in zip(examples, answers) for line in lines_of(example.page, told)]


def lines_of(page, texts):
    """What is noted of a page's answers, to be written and scored."""
    return [{"questionId": page.ids[i], "answer": text, "expected": page.accepted[i], "types": page.types[i]}
            for i, text in enumerate(texts)]


def earlier_answers(path, settings):
    """The predictions that an interrupted evaluation has written. Raises InputError if they were made in another way."""
    try:
        if path.exists():
            kept = json.loads(beside(path).read_text(encoding="utf-8"))["settings"]
            changed = [f"--{name.replace('_', '-')} {kept.get(name)}" for name in settings if kept.get(name) != settings[name]]
            if changed:
                raise InputError(f"{path}: begun with {', '.join(changed)}; go on with that, or choose another --predictions")
            return json.loads(path.read_text(encoding="utf-8"))
        write_settings(path, {"settings": settings})
        return []
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be gone on with ({type(error).__name__}: {error}); "
                         "choose another --predictions") from error


def write_predictions(path, answers):
    """The challenge's submission format, a line a question. Raises InputError."""
    lines = [json.dumps({"questionId": line["questionId"], "answer": line["answer"]}, ensure_ascii=False) for line in answers]
    write_whole(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_settings(path, what, indent=None):
    write_whole(beside(path), json.dumps(what, indent=indent, ensure_ascii=False) + "\n")


def write_whole(path, text):
    """Written aside and renamed, so that the file is always whole. Raises InputError where that is not possible."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); mend that, then repeat the command") from error


def beside(path):
    """predictions.json -> predictions.scores.json, with what the predictions were made by and their scores."""
    return path.with_suffix(".scores.json")
