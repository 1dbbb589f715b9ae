"""Small data of our own: rows in DocumentVQA's layout, written as a local folder."""
import io
import random

from model.tiny.pages import draw_page

SHAPES = (128, 128), (256, 128), (256, 256)             # 1, 2 or 4 tiles of the small models of the tests


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def page_rows(page, seed=0, questions=None):
    """The rows of one drawn page, in zhangfaen/DocumentVQA's columns."""
    draw = random.Random(f"{seed} {page}")
    image, asked = draw_page(draw, shape=draw.choice(SHAPES), sizes=(12, 16))
    return [{"questionId": page * 100 + i, "question": question, "image": {"bytes": png(image), "path": f"{page}.png"},
             "docId": page, "ucsf_document_id": f"doc{page}", "ucsf_document_page_no": "1", "answers": [answer]}
            for i, (question, answer) in enumerate(asked[:questions])]


def mixed_rows(pages, seed=0, first=0):
    """Rows of several pages, near each other but not side by side: two of a page, then of the next, then the rest."""
    queues = [page_rows(page, seed) for page in range(first, first + pages)]
    rows = []
    while any(queues):
        for queue in queues:
            rows += queue[:2]
            del queue[:2]
    return rows


def write_split(folder, split, rows, shards=2, image="image"):
    """Write rows as data/{split}-0000x-of-0000y.parquet in a folder that load_dataset reads."""
    import datasets
    features = {name: datasets.Value("string") for name in rows[0]}
    features |= {image: datasets.Image()} | ({"answers": datasets.List(datasets.Value("string"))} if image == "image" else {})
    features |= {name: datasets.Value("int32") for name in ("questionId", "docId") if name in rows[0]}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    for shard in range(shards):
        part = datasets.Dataset.from_list(rows[shard * size:(shard + 1) * size], features=datasets.Features(features))
        part.to_parquet(folder / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet")


def write_dataset(folder, train_pages=12, validation_pages=4):
    write_split(folder, "train", mixed_rows(train_pages))
    write_split(folder, "validation", mixed_rows(validation_pages, first=1000))
    return folder
