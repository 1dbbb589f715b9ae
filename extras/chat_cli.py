"""How is a conversation held at a terminal? Lines in; answers to standard output, as they come, all else to standard error.

    a line  ->  /command  ->  what it did                the conversation in between is model/chat.py's
            ->  question  ->  the answer, how fast it came

Without a terminal, lines come from standard input and answers are printed one a line; a mistake then ends the program.
"""
import argparse
import contextlib
import json
import re
import sys

from extras.cli import float_in, int_in
from extras.video import read_video
from model.errors import InputError
from model.tokenizer import clean

SETTINGS = {                                    # of an answer, each with its type
    "max_tiles": int_in(1, 128), "max_new_tokens": int_in(1), "temperature": float_in(0, 1000),
    "top_p": float_in(1e-6, 1), "seed": int_in(0)}
COMMANDS = """/image PATH|URL          show an image with the next question
/video PATH              show a video with it
/undo                    take the last question back; its images wait for the next one
/clear                   forget everything, images too
/settings [NAME VALUE]   see or change """ + ", ".join(SETTINGS)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")       # what an answer must not send to a terminal: it could be an order


def converse(chat, load_images, as_json=False):
    """Questions from the terminal or, one a line, from standard input; each sees the conversation before it.

    `load_images`: a path or address -> its Pillow images. Prints answers to standard output, all else to standard error.
    Raises InputError for what cannot be done, unless a person is there to be told.
    """
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):              # not on Windows, whose terminal has a history of its own
            import readline  # noqa: F401: input() then has arrow keys and a history
        tell(f"{pictures_shown(chat)}Ask; /help tells the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    while (line := next_line(typed)) is not None:
        try:
            if re.match(r"/[a-z]+(\s|$)", line):
                tell(obey(chat, line, load_images))
            elif line:
                answer_one(chat, line, as_json, one_line=not typed)
                if typed:
                    tell(how_it_went(chat))
        except InputError as error:
            if not typed:
                raise
            tell(" ".join(str(error).split()))
        except KeyboardInterrupt:
            if not typed:
                raise
            tell("\n(stopped)")


def next_line(typed):
    """The next line, or None at the end. Ctrl-C at the prompt gives up the line, not the chat."""
    try:
        if typed and sys.stdout.isatty():
            return clean(input("> ").strip())
        print("> " if typed else "", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return clean(line.strip()) if line else None
    except EOFError:
        tell("")
        return None
    except KeyboardInterrupt:
        if not typed:
            raise
        tell("")
        return ""


def answer_one(chat, question, as_json=False, one_line=False):
    """Ask and print, as the answer comes or, for `as_json` and `one_line`, when it is whole."""
    with contextlib.closing(chat.stream(question)) as pieces:
        for text in pieces:
            if not (as_json or one_line):
                print(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text, end="", flush=True)
    if as_json:
        print(json.dumps(chat.report, ensure_ascii=False), flush=True)
    else:
        print(" ".join(chat.report["answer"].split()) if one_line else "", flush=True)


def obey(chat, line, load_images):
    """Do what a /command says; returns what there is to tell. Raises InputError."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/image", "/video") and rest == "-":
        raise InputError(f"{line}: standard input is where the questions come from; give a path or an address")
    if command == "/image" and rest:
        for image in load_images(rest):
            chat.add_image(image)
        return pictures_shown(chat).rstrip()
    if command == "/video" and rest:
        chat.add_video(read_video(rest))
        return pictures_shown(chat).rstrip()
    if command == "/undo":
        chat.undo()
        return f"taken back; {len(chat.turns)} before it" + ("; its images wait for the next question" if chat.waiting else "")
    if command == "/clear":
        chat.clear()
        return "all forgotten, images too"
    if command == "/settings":
        if rest:
            change_setting(chat, *rest.partition(" ")[::2])
        return ", ".join(f"{name} {value}" for name, value in (chat.settings | {"max_tiles": chat.max_tiles}).items())
    if command == "/help":
        return COMMANDS
    raise InputError(f"{line}: not a command; there are {', '.join(re.findall('^/.*?(?=  )', COMMANDS, re.MULTILINE))}")


def change_setting(chat, name, value):
    try:
        value = SETTINGS[name](value.strip())
    except KeyError as error:
        raise InputError(f"{name}: no setting; there are {', '.join(SETTINGS)}") from error
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{name}: {error}; give a number, like /settings {name} 1") from error
    if name == "max_tiles":
        chat.max_tiles = value
    else:
        chat.settings[name] = value


def pictures_shown(chat):
    """A line for each picture that waits for the next question."""
    first = len(chat.pictures) - len(chat.waiting) + 1
    return "".join(f"image {i}: {picture.image.width} x {picture.image.height} pixels, {len(picture.tiles)} tiles\n"
                   for i, picture in enumerate(chat.waiting, first))


def how_it_went(chat):
    report = chat.report
    speed = report["decode_tokens_per_second"]
    return (f"[{sum(report['tiles'])} tiles, {report['prompt_tokens']:,} tokens, {chat.read:,} of them new; first token after "
            f"{report['prefill_seconds']:.2f} s" + (f", then {speed:.1f} a second]" if speed else "]"))


def tell(text):
    print(text, file=sys.stderr, flush=True)
