"""Writes this folder's tokenizer.json: one token a byte, and one for each fixed text of the prompts.

    python -m model.tiny.tokenizer

Answers are read and written character by character, as they stand on the page; only what many prompts repeat (the
system sentence, "What is the ") is one token each, so that prompts are short. No single words: they occur in answers.
"""
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.prompt import END, IMAGE_CLOSE, IMAGE_OPEN, IMAGE_TOKEN, START, SYSTEM
from model.tiny.pages import ASKED, READ

SPECIAL = ("<|endoftext|>", START, END, IMAGE_OPEN, IMAGE_CLOSE, IMAGE_TOKEN)


def build():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False)])
    phrases = ("system\n", "user\n", "assistant\n", READ, *(form[:-3] for form in ASKED if form[:-3]))
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


if __name__ == "__main__":
    folder = Path(__file__).parent
    build().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": END, "pad_token": "<|endoftext|>",
                "unk_token": None, "clean_up_tokenization_spaces": False, "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
