"""Which class reads these tokenizer files? Transformers' Qwen2 class, directly: no code of the folder is run."""
import re

from model.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt")


def load_tokenizer(folder):
    """The tokenizer of a model folder. Raises InputError for files that cannot be read."""
    from transformers import Qwen2Tokenizer
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        tokenizer("?")                          # some settings are checked only here
        return tokenizer
    except Exception as error:                  # the libraries have no common class of errors for broken files
        raise InputError(f"{folder}: its tokenizer cannot be read ({str(error)[:300]}); expected vocab.json and "
                         "merges.txt, or tokenizer.json, and tokenizer_config.json") from error


def special_id(tokenizer, token):
    """The id of one special token. Raises InputError for a tokenizer that lacks it."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise InputError(f"the tokenizer has no {token}; the model folder needs InternVL2's own tokenizer files")
    return index


def clean(text):
    """Text from outside as the tokenizer takes it: what is not UTF-8 becomes a replacement character."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\N{REPLACEMENT CHARACTER}", text)     # half characters, from JSON
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")            # bytes, from the command line
