"""Tokens and labels are the reference's; what a user types stays plain text."""
import random
from types import SimpleNamespace

import pytest
from conftest import real
from reference import conversation_prompt, page_prompt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model import InputError
from model.chat import decode
from model.prompt import END, IGNORE_INDEX, START, SYSTEM

SYSTEM_IDS = [151644, 8948, 198, 56568, 104625, 100633, 104455, 104800, 101101, 32022, 102022, 99602, 100013, 9370, 90286,
              21287, 42140, 53772, 35243, 26288, 104949, 3837, 105205, 109641, 67916, 30698, 11, 54851, 46944, 115404, 42192,
              99441, 100623, 48692, 100168, 110498, 1773, 151645]       # golden, of the published tokenizer
SPECIALS = ("<|endoftext|>", START, END, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


@pytest.fixture(scope="session")
def reference():
    """Two tokenizers built from the vocabulary files alone: one that knows the special tokens, one that does not."""
    folder = real("internvl2-1b")

    def build():
        built = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        built.normalizer, built.decoder = normalizers.NFC(), decoders.ByteLevel()
        words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
        built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        return built

    knows = build()
    knows.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return knows, build()


def random_text(draw):
    words = ["What", " is", " the", " total", "?", " 1993", "12,50", "\n", "  ", "日期是什么", "总金额", "，", "é", "e\u0301", "😀", "👩‍👩‍👧",
             "ﬁ", "\t", " I'll", "ПРИВЕТ", "مرحبا", "<", ">", "|", "image", " $", "\r\n", "ñ", "…", "0x1F", "__init__"]
    return "".join(draw.choice(words) for _ in range(draw.randint(1, 12)))


def test_tokens_are_those_of_the_fact_sheet(tokenizer):
    prompt, too_long = page_prompt(tokenizer, 256, [1], ["What is the date?"], ["January 8, 1993."])
    assert prompt.ids[:38] == SYSTEM_IDS
    assert prompt.ids[38:42] == [151644, 872, 198, 151646] and prompt.ids[42:298] == [151648] * 256
    assert prompt.ids[298:309] == [151647, 198, 3838, 374, 279, 2400, 30, 151645, 151644, 77091, 198]
    assert prompt.ids[309:] == [32227, 220, 23, 11, 220, 16, 24, 24, 18, 13, 151645] and not too_long
    prompt, _ = page_prompt(tokenizer, 256, [13], ["Please describe the image shortly."])
    assert len(prompt.ids) == 44 + 256 * 13 + 6 + 4 == 3382


def test_200_random_conversations_equal_the_reference_tokenizer(tokenizer, reference):
    knows, _ = reference
    draw = random.Random(0)
    for _ in range(200):
        turns = [(random_text(draw), random_text(draw)) for _ in range(draw.randint(1, 4))]
        tiles = [draw.randint(1, 13) for _ in range(draw.randint(0, 3))]
        text = f"{START}system\n{SYSTEM}{END}"
        for i, (question, answer) in enumerate(turns):
            images = "".join(f"<img>{'<IMG_CONTEXT>' * 256 * n}</img>\n" for n in tiles) if i == 0 else ""
            text += f"{START}user\n{images}{question}{END}{START}assistant\n"
            if answer[0].isspace():         # the only place where pieces differ from the whole: "\n" and a space may merge
                answer = "x" + answer
                turns[i] = question, answer
            text += f"{answer}{END}"
        ids = conversation_prompt(tokenizer, 256, tiles, turns).ids
        assert ids == knows.encode(text).ids
        assert tokenizer.decode(ids) == tokenizer.decode(knows.encode(text).ids)


def test_special_tokens_typed_by_a_user_stay_text_but_for_markup(tokenizer, reference):
    _, plain = reference
    marked = Tokenizer.from_str(plain.to_str())
    marked.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[6:]])    # quad, ref, box

    def ids(text):
        return [i + 6 if i >= 151643 else i for i in marked.encode(text).ids]
    draw = random.Random(1)
    for _ in range(200):
        typed = "".join(draw.choice([random_text(draw), draw.choice(SPECIALS), "<image>"]) for _ in range(4)) + draw.choice(SPECIALS)
        typed = typed.replace("<image>", "< image>")
        prompt, _ = page_prompt(tokenizer, 256, [1], [typed], ["x" + typed])
        branch = [i for i, b in zip(prompt.ids, prompt.branches) if b]
        header = [151645, 151644, 77091, 198]
        assert branch == ids("\n" + typed) + header + ids("x" + typed) + [151645]


def test_markup_is_read_learned_and_shown_as_tokens(tokenizer, tiny):
    """<ref>, <box>, <quad> are the model's own; a tokenizer that lacks them keeps them as text. Answers show what is compared with."""
    question, answer = "Where is <ref>the date</ref>, <quad></quad>?", "<ref>the date</ref><box>[[40, 90, 310, 130]]</box>"
    prompt, _ = page_prompt(tokenizer, 256, [1], [question], [answer])
    learned = [label for label in prompt.labels if label != IGNORE_INDEX]
    assert len(learned) == 25 and learned[:4] == [151651, 1782, 2400, 151652] and learned[4] == 151653 and learned[-2:] == [151654, 151645]
    assert [i for i in prompt.ids if 151649 <= i <= 151652] == [151651, 151652, 151649, 151650, 151651, 151652]
    assert decode(SimpleNamespace(tokenizer=tokenizer), learned) == answer
    prompt, _ = page_prompt(tiny.tokenizer, 64, [1], [question], [answer])
    assert decode(tiny, [label for label in prompt.labels if label != IGNORE_INDEX]) == answer
    assert tiny.tokenizer(answer).input_ids == [label for label in prompt.labels if label != IGNORE_INDEX][:-1]


def test_a_text_that_cannot_fit_is_not_even_tokenized(tiny, monkeypatch):
    """A question of 20 MB would take minutes."""
    read, call = [], type(tiny.tokenizer).__call__
    monkeypatch.setattr(type(tiny.tokenizer), "__call__", lambda self, text, **more: read.append(len(text)) or call(self, text, **more))
    prompt, too_long = page_prompt(tiny.tokenizer, 64, [1], ["A?", "x" * 20_000_000, "C?"], ["1", "2", "3"], max_length=300)
    assert too_long == [1] and max(read) < 1000 and set(prompt.branches) == {0, 1, 2}
    assert page_prompt(tiny.tokenizer, 64, [1], ["A?"], [None])[0].ids


def test_image_placeholders_beyond_the_images_are_text(tokenizer, reference):
    _, plain = reference
    prompt = conversation_prompt(tokenizer, 256, [1], [("<image>\nIs this an <image>?", None)])
    assert prompt.ids.count(151648) == 256
    assert prompt.ids[prompt.ids.index(151647) + 1:][:-4] == plain.encode("\nIs this an <image>?").ids
    prompt = conversation_prompt(tokenizer, 256, [], [("What does <image> mean?", None)])
    assert prompt.ids[41:-4] == plain.encode("What does <image> mean?").ids
    prompt, _ = page_prompt(tokenizer, 256, [2], ["a <image> here"])
    assert prompt.ids.count(151648) == 512


def test_images_stand_where_the_question_places_them(tokenizer, reference):
    knows, _ = reference
    prompt = conversation_prompt(tokenizer, 256, [1, 2], [("Image-1: <image>\nImage-2: <image>\nWhat differs?", None)])
    text = "".join(f"Image-{i}: <img>{'<IMG_CONTEXT>' * 256 * i}</img>\n" for i in (1, 2))
    assert prompt.ids[38:] == knows.encode(f"{START}user\n{text}What differs?{END}{START}assistant\n").ids
    first = conversation_prompt(tokenizer, 256, [1, 2], [("What differs?", None)])
    assert first.ids == conversation_prompt(tokenizer, 256, [1, 2], [("<image>\n<image>\nWhat differs?", None)]).ids
    with pytest.raises(InputError, match="2 images, but 1 <image>"):
        conversation_prompt(tokenizer, 256, [1, 2], [("<image> what?", None)])


def test_labels_cover_answer_and_end_token_only(tiny):
    prompt, _ = page_prompt(tiny.tokenizer, 64, [2], ["What is the date?", "Total?"], ["03/11", "$7"])
    learned = [i for i, label in enumerate(prompt.labels) if label != IGNORE_INDEX]
    assert all(prompt.labels[i] == prompt.ids[i] for i in learned)
    assert tiny.tokenizer.decode([prompt.ids[i] for i in learned]) == f"03/11{END}$7{END}"
    turns = [("a?", "one"), ("b?", "two")]
    prompt = conversation_prompt(tiny.tokenizer, 64, [1], turns)
    assert tiny.tokenizer.decode([label for label in prompt.labels if label >= 0]) == f"one{END}two{END}"
    assert set(prompt.branches) == {0}


def test_a_branch_goes_on_where_the_prefix_ends(tiny):
    prompt, _ = page_prompt(tiny.tokenizer, 64, [1], ["A?", "Longer question?"], ["b", "c"])
    prefix = prompt.branches.count(0)
    assert prompt.positions[:prefix] == list(range(prefix))
    for branch in (1, 2):
        positions = [p for p, b in zip(prompt.positions, prompt.branches) if b == branch]
        assert positions == list(range(prefix, prefix + len(positions)))
    assert sorted(prompt.branches) == prompt.branches
    assert len(prompt.ids) == len(prompt.labels) == len(prompt.positions) == len(prompt.branches)


@pytest.mark.parametrize("tiles", [[], [1], [2, 3]])
def test_a_page_with_one_question_is_the_plain_prompt(tiny, tiles):
    page, _ = page_prompt(tiny.tokenizer, 64, tiles, ["\nWhat is <img>?"], ["42"])
    plain = conversation_prompt(tiny.tokenizer, 64, tiles, [("\nWhat is <img>?", "42")])
    assert (page.ids, page.labels, page.positions) == (plain.ids, plain.labels, plain.positions)


def test_a_question_that_does_not_fit_is_left_out_whole(tiny):
    questions, answers = ["A?", "B" * 50 + "?", "C?"], ["1", "2", "3"]
    whole, _ = page_prompt(tiny.tokenizer, 64, [1], questions, answers)
    prefix = whole.branches.count(0)
    longest = prefix + whole.branches.count(2)
    assert page_prompt(tiny.tokenizer, 64, [1], questions, answers, max_length=longest) == (whole, [])
    cut, too_long = page_prompt(tiny.tokenizer, 64, [1], questions, answers, max_length=longest - 1)
    assert too_long == [1] and cut == page_prompt(tiny.tokenizer, 64, [1], ["A?", "C?"], ["1", "3"])[0]
    empty, too_long = page_prompt(tiny.tokenizer, 64, [1], questions, answers, max_length=10)
    assert too_long == [0, 1, 2] and len(empty.ids) == prefix                   # image tokens are never cut
