"""The chat at a terminal: commands, remarks, what reaches the terminal and what ends it. Without one: tests/test_infer.py."""
import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT
from PIL import Image

from extras import chat_cli
from extras.chat_cli import ChatShell, answer_one, stats_line
from model import InputError
from model.checkpoint import TINY
from model.errors import CONTROL


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """Types lines into a shell -> (standard output, standard error, its chat)."""
    def talk(*lines, chat=None, typed=True):
        chat = chat or tiny.chat(max_new_tokens=6)
        monkeypatch.setattr("sys.stdin", (Terminal if typed else io.StringIO)("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        ChatShell(chat).run()
        return *capsys.readouterr(), chat
    return talk


@pytest.fixture
def page(tmp_path):
    Image.effect_noise((128, 128), 90).save(tmp_path / "page.png")
    return tmp_path / "page.png"


def test_answers_and_their_speed(talk, page, tiny):
    out, err, chat = talk(f"/image {page}", "What?", "", "And?", "/settings max_new_tokens 3", "Why?")
    assert out.split("\n") == [*(turn.answer for turn in chat.turns), ""] and len(chat.turns) == 3
    assert "image 1: 128 x 128, 1 tile\n" in err and "max_new_tokens 3" in err
    stats = re.findall(r"\[1 tile, [\d,]+ tokens, [\d,]+ of them new; first token after [\d.]+ s(, then [\d.]+ per second)?\]", err)
    assert [bool(rate) for rate in stats] == [True, True, False]            # of three tokens there is no rate
    assert err.startswith("Ask a question; /help lists commands")


def test_every_command_is_in_help_and_quit_exit_and_the_end_of_input_end_it(talk):
    _, err, _ = talk("/help")
    listed = re.findall("^(?:> )*/([a-z]+)", err, re.MULTILINE)
    assert {"image", "video", "undo", "clear", "settings", "help", "quit"} <= set(listed) and "/exit" in err
    for end in ("/quit", "/exit", "/quit now"):
        assert talk(end, "What?")[0] == "" == talk(end, "What?", typed=False)[0]
    assert talk("EOF", "What?")[0] == ""                                    # as cmd has it
    assert len(talk("EOF", "EOF", typed=False)[2].turns) == 2               # a question like any other


def test_a_mistake_gets_a_line_and_the_chat_goes_on(talk):
    lines = ["/jump", "/image", "/video -", "/image nowhere.png", "/undo", "/settings seed x", "/settings width 3", "/help me"]
    out, err, chat = talk(*lines, "/etc/hosts?", "/ what", "/Undo")
    for message in ("/jump: not a command; there are /image PATH|URL, /video PATH, /undo", "give a path", "nowhere.png: no such file",
                    "no question to take back", "seed: invalid literal", "width: not a setting"):
        assert message in err
    assert [turn.question for turn in chat.turns] == ["/etc/hosts?", "/ what", "/Undo"]    # no commands: questions


def test_without_a_terminal_too_the_chat_goes_on_after_a_mistake(talk, page, capsys):
    """Each mistake gets its line; at the end, not before, the command fails."""
    for line in ("/jump", "/image", "/video -", "/image nowhere.png", "/undo", "/settings seed x", "/settings width 3"):
        with pytest.raises(InputError, match="1 line of standard input could not be used; see above"):
            talk(line, typed=False)
    with pytest.raises(InputError, match="2 lines"):
        talk("/image nowhere.png", f"/image {page}", "What?", "word " * 10_000, "And?", typed=False)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "nowhere.png: no such file\n" in err and "exceed the model's 2048" in err


def test_undo_and_clear(talk, page):
    _, err, chat = talk(f"/image {page}", "A?", "B?", "/undo", "/undo")
    assert "question taken back; 1 question left\n" in err and "0 questions left; its images wait" in err and len(chat.waiting) == 1
    assert not talk("/clear", chat=chat)[2].pictures


def test_remarks_come_before_the_answer(tiny, monkeypatch):
    printed, chat = [], tiny.chat(max_new_tokens=6)
    monkeypatch.setattr(chat_cli, "log", lambda text: printed.append("log"))
    monkeypatch.setattr(chat_cli, "show", lambda text, end="": printed.append("show"))
    for question in ("A?", "B?"):
        answer_one(chat, question)
        assert printed[0] == "log" and set(printed[1:]) == {"show"}
        printed.clear()


def test_the_embedded_model_and_a_question_without_an_image_are_remarked_on(talk, page, tiny, tmp_path):
    _, err, _ = talk("A?", "B?", "C?")
    assert err.count("no image: text only") == 1 and err.count("the embedded model answers single questions only") == 1
    assert err.index("no image") < err.index("single questions only: type /undo before each new question")
    assert "no image" not in talk(f"/image {page}", "A?")[1] and "single" not in talk("A?", "/undo", "B?")[1]
    tiny.folder = tmp_path
    assert "single" not in talk("A?", "B?")[1]


def test_ctrl_c_stops_the_answer_not_the_chat(talk, monkeypatch, tiny):
    real, calls = chat_cli.answer_one, []

    def stopped(*arguments, **flags):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments, **flags)
    monkeypatch.setattr(chat_cli, "answer_one", stopped)
    out, err, chat = talk("A?", "B?")
    assert "(stopped)" in err and [turn.question for turn in chat.turns] == ["B?"]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        talk("A?", typed=False)


EVIL = "a\x1b]0;title\x07b\x9b31mc\x00\r\n\td\x7f"


@pytest.mark.parametrize("as_json, one_line", [(False, False), (True, False), (False, True)])
def test_control_characters_never_reach_a_terminal(tiny, monkeypatch, capsys, as_json, one_line):
    """Neither of answers nor of messages; a file gets the answer as it is."""
    monkeypatch.setattr("model.chat.decode", lambda *_: EVIL)
    chat = tiny.chat(max_new_tokens=1)
    answer_one(chat, "What?", as_json, one_line)
    whole = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    answer_one(chat, "What?", as_json, one_line)
    shown = capsys.readouterr().out
    assert "\x9b" in whole and not CONTROL.search(shown) and "b\N{REPLACEMENT CHARACTER}31mc" in shown
    chat_cli.log("no\x1b[31msuch.png\n")
    assert capsys.readouterr().err == "no\N{REPLACEMENT CHARACTER}[31msuch.png\n\n"


def test_a_question_that_cannot_be_asked_prints_its_line_alone(tiny, capsys):
    with pytest.raises(InputError, match="exceed the model's 2048"):
        answer_one(tiny.chat(), "word " * 10_000)
    assert capsys.readouterr() == ("", "")


def test_a_short_answer_has_no_rate(tiny):
    chat = tiny.chat(max_new_tokens=4)
    chat.ask("What?")
    assert stats_line(chat).endswith(" s]") and chat.report["decode_tokens_per_second"]


def test_a_real_terminal():
    """Through a pseudo-terminal: prompt, history, an answer as it comes, Ctrl-C at the prompt, Ctrl-D."""
    controller, terminal = pty.openpty()
    shell = subprocess.Popen([sys.executable, "infer.py", "--tiny", "--model", TINY, "--max-new-tokens", "8"], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
                             start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))         # so that ^C is a signal
    os.close(terminal)
    seen = ""

    def wait_for(text, seconds=90):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([controller], [], [], 1)[0]:
                seen += os.read(controller, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]
    wait_for("> ")
    for typed, expected in ((b"What?\n", "first token after"), (b"\x03", "> "), (b"\x1b[A\n", "What?"), (b"/exi\x7fxit\x7f\x7f\x7f\n", "not a command"), (b"\x04", "\n")):
        time.sleep(0.5)
        os.write(controller, typed)
        wait_for(expected)
    assert shell.wait(30) == 0
    os.close(controller)
