"""How is a conversation held at a terminal? Answers go to standard output as they come, all else to standard error.

A line is a /command, a do_ method below, or a question; the conversation itself is in model/chat.py.
Without a terminal: one question per line from standard input, one answer per line; after an error comes the next line.
"""
import argparse
import cmd
import contextlib
import itertools
import json
import re
import sys

from extras.cli import ANSWER_SETTINGS, count
from extras.video import load_images, read_video
from model.checkpoint import TINY
from model.errors import InputError, printable
from model.tokenizer import clean

RATE_TOKENS = 5                                 # shorter answers say nothing about tokens per second
HELP = """\
/image PATH|URL          show an image with the next question
/video PATH              show a video with the next question
/undo                    take the last question back; its images wait for the next one
/clear                   forget the conversation and its images
/settings [NAME VALUE]   show the settings or change one, as in /settings max_tiles 6
/help                    list the commands
/quit  /exit             end the chat, as Ctrl-D does"""


class ChatShell(cmd.Cmd):
    """Holds a conversation with a `model.chat.Chat`: `run` returns when there are no more lines.

    `allow_private`: fetch images from private networks too. `as_json`: print a report in place of each answer.
    """
    prompt = "> "

    def __init__(self, chat, allow_private=False, as_json=False):
        super().__init__(completekey=None, stdout=sys.stderr)       # of cmd's prompt
        self.chat, self.allow_private, self.as_json = chat, allow_private, as_json
        self.typed, self.use_rawinput, self.failed = sys.stdin.isatty(), sys.stdout.isatty(), 0

    def run(self):
        """Raises InputError at the end if a line could not be used, unless a person typed it at a terminal."""
        if not self.typed:
            any(self.onecmd(line) for line in sys.stdin)            # until a command returns True
            if self.failed:
                raise InputError(f"{count(self.failed, 'line')} of standard input could not be used; see above")
            return
        with contextlib.suppress(ImportError):                      # Windows terminals have a history of their own
            import readline  # noqa: F401 - input() then has arrow keys and a history
        log(f"{images_waiting(self.chat)}Ask a question; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.")
        while True:
            try:
                return self.cmdloop()
            except KeyboardInterrupt:                               # at the prompt: drop the line, not the chat
                log("")

    def onecmd(self, line):
        try:
            return super().onecmd(clean(line.strip()))
        except (InputError, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not self.typed:
                raise
            self.failed += 1
            log(" ".join(str(error).split()) or "\n(stopped)")

    def parseline(self, line):
        """A line -> (command or None, its argument, the line), as cmd wants it."""
        command, argument = re.fullmatch(r"(?:/([a-z]+)(?=\s|$))?\s*(.*)", line, re.DOTALL).groups()
        return "EOF" if line == "EOF" and self.typed else command, argument, line   # cmd's sign for the end of input

    def default(self, line):
        if self.parseline(line)[0]:
            names = re.findall("^/.*?(?=  )", HELP, re.MULTILINE)
            raise InputError(f"{line}: not a command; there are {', '.join(names)}")
        answer_one(self.chat, line, self.as_json, one_line=not self.typed)
        if self.typed:
            log(stats_line(self.chat))

    def emptyline(self):
        pass                                                        # cmd would repeat the last command

    def do_image(self, source):
        for image in load_images(checked(source), self.allow_private):
            self.chat.add_image(image)
        log(images_waiting(self.chat).rstrip())

    def do_video(self, path):
        self.chat.add_video(read_video(checked(path)))
        log(images_waiting(self.chat).rstrip())

    def do_undo(self, _):
        self.chat.undo()
        waiting = "; its images wait for the next question" if self.chat.waiting else ""
        log(f"question taken back; {count(len(self.chat.turns), 'question')} left{waiting}")

    def do_clear(self, _):
        self.chat.clear()
        log("the conversation and its images are forgotten")

    def do_settings(self, text):
        settings = {"max_tiles": self.chat.max_tiles} | self.chat.settings
        name, _, value = text.partition(" ")
        if name and name not in settings:
            raise InputError(f"{name}: not a setting; there are {', '.join(settings)}")
        try:
            settings |= {name: ANSWER_SETTINGS[name](value.strip())} if name else {}
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{name}: {error}; give a number, like /settings {name} 1") from error
        log(", ".join(f"{name} {value}" for name, value in settings.items()))
        self.chat.max_tiles = settings.pop("max_tiles")
        self.chat.settings = settings

    def do_help(self, _):
        log(HELP)

    def do_quit(self, _):
        return True                                                 # ends cmdloop

    do_exit = do_EOF = do_quit

    def postloop(self):
        log("")                                                     # after Ctrl-D the prompt of the shell begins a line


def checked(source):
    if source in ("", "-"):
        raise InputError("give a path or an address; standard input is where the questions come from")
    return source


def answer_one(chat, question, as_json=False, one_line=False):
    """Ask; print remarks, then the answer as it comes or, for `as_json` and `one_line`, when it is whole.

    Raises InputError, before anything is printed.
    """
    notes = remarks(chat)
    with contextlib.closing(chat.stream(question)) as pieces:
        first = next(pieces, "")
        for note in notes:
            log(note)
        for text in itertools.chain([first], pieces):
            if not (as_json or one_line):
                show(text, end="")
    if as_json:
        show(json.dumps(chat.report, ensure_ascii=False))
    else:
        show(" ".join(chat.report["answer"].split()) if one_line else "")


def remarks(chat, undo="type /undo"):
    """What a user should know about the answer to the next question, one line each. `undo`: how to do that."""
    notes = [] if chat.pictures or chat.turns else ["no image: text only"]
    if len(chat.turns) == 1 and chat.model.folder.resolve() == TINY.resolve():
        notes.append(f"the embedded model answers single questions only: {undo} before each new question")
    return notes


def images_waiting(chat):
    """A line for each image that waits for the next question."""
    first = len(chat.pictures) - len(chat.waiting) + 1
    return "".join(f"image {i}: {picture.image.width} x {picture.image.height}, {count(len(picture.tiles), 'tile')}\n"
                   for i, picture in enumerate(chat.waiting, first))


def stats_line(chat):
    """The size and the speed of the last answer."""
    report = chat.report
    rate = f", then {report['decode_tokens_per_second']:.1f} per second" if len(report["tokens"]) >= RATE_TOKENS else ""
    return (f"[{count(sum(report['tiles']), 'tile')}, {report['prompt_tokens']:,} tokens, {chat.read:,} of them new; "
            f"first token after {report['prefill_seconds']:.2f} s{rate}]")


def show(text, end="\n"):
    """Print to standard output; a terminal gets no control characters."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def log(text):
    """Print to standard error, without control characters."""
    print(printable(text), file=sys.stderr, flush=True)
