"""Writes the same questions in every format that data.py reads. Knows nothing of data.py.

    python tests/example_formats.py FOLDER PARQUET      the rows of a file in DocumentVQA's layout, in all formats
"""
import json
import sys
from pathlib import Path


def jsonl(entries):
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n"


def write_formats(folder, asked):
    """`asked`: (image file name in `folder`, question, answer). Returns {format: file}."""
    human, gpt = (lambda text: {"from": "human", "value": text}), (lambda text: {"from": "gpt", "value": text})
    internvl = [{"id": i, "image": image, "conversations": [human(f"<image>\n{q}"), gpt(a)]} for i, (image, q, a) in enumerate(asked)]
    files = {
        "internvl.jsonl": jsonl(internvl),
        "llava.json": json.dumps(internvl, indent=2),
        "llava-one-line.json": json.dumps(internvl),
        "no-placeholder.jsonl": jsonl({"image": [image], "conversations": [human(q), gpt(a)]} for image, q, a in asked),
        "mixture.json": json.dumps({"receipts": {"root": str(folder), "annotation": str(folder / "internvl.jsonl"), "data_augment": False,
                                                 "repeat_time": 1, "length": len(asked)}}, indent=2),
        "swift-query.jsonl": jsonl({"query": q, "response": a, "history": [], "images": [image]} for image, q, a in asked),
        "swift-tag.jsonl": jsonl({"query": f"<image>{q}", "response": a, "images": [image]} for image, q, a in asked),
        "swift-messages.jsonl": jsonl({"messages": [{"role": "user", "content": f"<image>{q}"}, {"role": "assistant", "content": a}],
                                       "images": [image]} for image, q, a in asked),
        "swift-inline.jsonl": jsonl({"query": f"<img>{image}</img>{q}", "response": a} for image, q, a in asked),
        "xcomposer-pairs.json": json.dumps([{"id": str(i), "conversations": [[f"<img>{image}</img>{q}", a]]}
                                            for i, (image, q, a) in enumerate(asked)]),
        "xcomposer-bare.json": json.dumps([[f"<img>{image}</img>\n{q}", a] for image, q, a in asked], indent=1),
        "xcomposer-swift.json": json.dumps([{"conversations": [{"from": "user", "value": f"<img>{image}</img>{q}"},
                                                               {"from": "assistant", "value": a}]} for image, q, a in asked]),
        "xcomposer2.json": json.dumps([{"id": str(i), "image": [image], "conversations": [
            {"from": "user", "value": f"<ImageHere> {q}"}, {"from": "assistant", "value": a}]} for i, (image, q, a) in enumerate(asked)]),
        "foodieqa-llava.json": json.dumps([{"image": image, "conversations": [human(f"{q}\n<image>"), gpt(a)]} for image, q, a in asked],
                                          ensure_ascii=False, indent=4),
        "questions.jsonl": jsonl({"question": q, "images": [image], "answer": a} for image, q, a in asked),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in files}


if __name__ == "__main__":
    from pyarrow import parquet
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    triples = []
    for row in parquet.read_table(sys.argv[2]).to_pylist():
        name = f"{row['docId']}.jpg"
        (target / name).write_bytes(row["image"]["bytes"])
        triples.append((name, row["question"], row["answers"][0]))
    print(*write_formats(target.resolve(), triples), sep="\n")
