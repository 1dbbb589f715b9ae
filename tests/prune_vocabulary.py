"""Cuts the vocabularies of InternLM2 and Phi-3 to what the tests need: tests/vocabularies/, under 100 kB together.

    python tests/prune_vocabulary.py FOLDER         FOLDER/internlm2 and FOLDER/phi3: tokenizer.model, tokenizer_config.json

Kept are all control, byte and user-defined pieces, and the normal ones that the texts below need, with their parts.
golden.json has the ids that sentencepiece, which must be installed, gives to the texts with the cut vocabulary.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.prompt import SYSTEM, SYSTEM_25  # noqa: E402
from model.tokenizer import NORMAL, fields, load_tokenizer  # noqa: E402

TEXTS = (
    SYSTEM, SYSTEM_25, "You are an AI assistant whose name is InternLM (书生·浦语).", "You are an AI assistant whose name is Phi-3.",
    "system\n", "user\n", "assistant\n", "\nWhat is the date?", "January 8, 1993.", "Who signed it? The total amount is $1,234.56.",
    "这张发票的总金额是多少？", "日期是什么？一九九三年一月八日。", "0123456789 2024-11-25", "a  b   c    d\n\n\n  e\t\tf", "🙂👩‍👩‍👧 é ñ ПРИВЕТ مرحبا",
    "def f(x):\n    return {'a': x ** 2}  # comment\n", "ＥＦｘ……——", "[UNUSED_TOKEN_3] is one piece of InternLM2", "[UNUSED_TOKEN_145]<|im_end|><|end|>", "<s></s><0x0A>▁", "  two spaces first ",
    "Answer the question using a single word or phrase.", "Image-1: \nImage-2: \nFrame1: ")


def number(value):
    """An integer of a protobuf message."""
    done = b""
    while value > 127:
        done, value = done + bytes([value & 127 | 128]), value >> 7
    return done + bytes([value])


def wrapped(key, content):
    return number(key << 3 | 2) + number(len(content)) + content


def prune(source, target):
    messages = list(fields((source / "tokenizer.model").read_bytes()))
    pieces = [dict(fields(content)) for key, content in messages if key == 1]
    whole = load_tokenizer(source)
    used = {token for text in TEXTS for token in whole.convert_ids_to_tokens(whole(text, add_special_tokens=False, split_special_tokens=True).input_ids)}
    kept = {part for token in used for i in range(len(token)) for j in range(i + 1, len(token) + 1) for part in [token[i:j]]}
    kept |= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!-'\"()[]{}<>|/_$%&*+=#@\n\t")
    old = [i for i, piece in enumerate(pieces) if piece.get(3, NORMAL) != NORMAL or piece[1].decode() in kept or {*piece[1].decode()} == {"▁"}]
    content = b""
    for i in old:
        piece = pieces[i]
        body = wrapped(1, piece[1]) + number(2 << 3 | 5) + piece[2]
        content += wrapped(1, body + (number(3 << 3) + number(piece[3]) if 3 in piece else b""))
    for key, value in messages:
        if key in (2, 3):                                       # how it was trained, and the normalizer
            value = b"".join(number(k << 3) + number(v) for k, v in fields(value) if isinstance(v, int) and k not in (4,)) if key == 2 else value
            content += wrapped(key, value)
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.model").write_bytes(content)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    new, added, beyond = {index: i for i, index in enumerate(old)}, {}, len(old)
    for index, token in sorted((int(index), token) for index, token in settings["added_tokens_decoder"].items()):
        place = new.get(index, beyond)
        added[str(place)], beyond = token, beyond + (index not in new)
    settings["added_tokens_decoder"] = added
    settings.pop("auto_map", None)
    (target / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    return {i for i in map(int, added) if i < len(old)}


def golden(folder, covered):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    for index in covered:
        model.pieces[index].type = 5 if model.pieces[index].type == 4 else model.pieces[index].type         # UNUSED: it cannot be typed
    model.normalizer_spec.add_dummy_prefix = False              # text inside a prompt has none
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return {text: processor.encode(text) for text in TEXTS}


if __name__ == "__main__":
    ids = {}
    for name in ("internlm2", "phi3"):
        folder = ROOT / "tests" / "vocabularies" / name
        covered = prune(Path(sys.argv[1]) / name, folder)
        ids[name] = golden(folder, covered)
    (ROOT / "tests" / "vocabularies" / "golden.json").write_text(json.dumps(ids, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
