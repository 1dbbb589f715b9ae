"""Which class reads these tokenizer files? Transformers' own; a tokenizer.model, as InternLM2, Phi-3 and Yi have it and
transformers 5 reads wrongly, becomes a BPE of the package tokenizers here. No code of the folder is run.
"""
import json
import re
import struct

from model.errors import InputError

SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", SENTENCEPIECE)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4             # kinds of pieces of a tokenizer.model
TURNS = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"   # InternLM2's pieces that open and end a turn


def load_tokenizer(folder):
    """The tokenizer of a model folder, a fast one of transformers. Raises InputError for files that cannot be read.

    `tokenizer("")` has the ids that every prompt begins with; behind a token in its `swallowing` white space vanishes.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
    try:
        settings = folder / "tokenizer_config.json"
        if (folder / SENTENCEPIECE).is_file():
            tokenizer = read_sentencepiece(folder, json.loads(settings.read_text(encoding="utf-8")))
        elif settings.is_file() and '"PreTrainedTokenizerFast"' in settings.read_text(encoding="utf-8"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        tokenizer("?")                          # some settings are checked only here
        tokenizer.swallowing = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        return tokenizer
    except Exception as error:                  # the libraries have no common class of errors for broken files
        raise InputError(f"{folder}: its tokenizer cannot be read ({str(error)[:300]}); expected vocab.json and "
                         "merges.txt, tokenizer.json, or tokenizer.model, and tokenizer_config.json") from error


def read_sentencepiece(folder, settings):
    """The BPE of a tokenizer.model (sentencepiece_model.proto): a piece's score is the rank of the merges that make it.

    Tokens of tokenizer_config.json take the place of pieces with their ids, and cannot be typed; nor can TURNS.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    model = list(fields((folder / SENTENCEPIECE).read_bytes()))
    pieces = [dict(fields(value)) for number, value in model if number == 1]        # 1: text, 2: score, 3: kind
    added = {i: {"content": piece[1].decode(), "normalized": False, "special": True}
             for i, piece in enumerate(pieces) if piece[1].decode() in TURNS}
    added |= {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    vocabulary, ranks, user = {}, {}, []
    for index, piece in enumerate(pieces):
        text, kind = piece[1].decode(), None if index in added else piece.get(3, NORMAL)
        vocabulary[added.get(index, {"content": text})["content"]] = index
        if kind == USER_DEFINED:
            user.append(AddedToken(text, normalized=False))
        elif kind == NORMAL:
            ranks[text] = -struct.unpack("<f", piece[2])[0], index
    pairs = ((text[:i], text[i:]) for text in sorted(ranks, key=ranks.get) for i in range(1, len(text)))
    merges = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    built = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_tokens(user)
    for index, token in sorted(added.items()):
        special = token["special"] or index < len(pieces) and pieces[index].get(3) == CONTROL
        built.add_special_tokens([AddedToken(**token | {"special": special})])
    named = {key: value if isinstance(value, str) else value["content"] for key, value in settings.items()
             if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value}
    normalizer = dict(fields(dict(model).get(3, b"")))
    begin = [named["bos_token"]] * settings.get("add_bos_token", True) + ["▁"] * normalizer.get(3, 1)
    built.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A"], special_tokens=[(text, vocabulary[text]) for text in begin])
    return PreTrainedTokenizerFast(tokenizer_object=built, **named)


def fields(message):
    """Yield (number, value) of a protobuf message's fields; a value is an integer, or bytes."""
    at = 0

    def integer():
        nonlocal at
        start = at
        while message[at] > 127:
            at += 1
        at += 1
        return sum((byte & 127) << 7 * i for i, byte in enumerate(message[start:at]))

    while at < len(message):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or integer()
            yield key >> 3, message[at:at + size]
            at += size


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
