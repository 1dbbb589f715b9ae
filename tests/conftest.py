"""What the tests share: small models, small data, and the real files when they lie beside the repository."""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import embedded  # noqa: E402  before any module takes TINY
from reference import randomise  # noqa: E402

from model import InternVL, checkpoint  # noqa: E402
from model.checkpoint import TINY  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"


def real(name):
    """A folder of real files (tokenizer, receipts), or a skipped test."""
    if not (SHARED / name).exists():
        pytest.skip(f"needs the real files '{name}', which are not part of this repository")
    return SHARED / name


@pytest.fixture
def receipts():
    return real("receipts")


@pytest.fixture(scope="session")
def tokenizer():
    """The real tokenizer of InternVL2-1B."""
    from model.tokenizer import load_tokenizer
    return load_tokenizer(real("internvl2-1b"))


@pytest.fixture
def published(monkeypatch):
    """In this test `tiny` is the embedded model as published; elsewhere it is the one of embedded.py."""
    monkeypatch.setattr(checkpoint, "TINY", embedded.PUBLISHED)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """The config.json of the model of embedded.py, but with tiles of 128 pixels, and its tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    for file in TINY.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((TINY / "config.json").read_text())
    config["force_image_size"] = 128
    config["vision_config"] |= dict(image_size=128, patch_size=8)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tiny(small_folder, monkeypatch):
    """A small model with random weights, float32, with which a chat has the remarks of the embedded one."""
    monkeypatch.setattr("extras.chat_cli.TINY", small_folder)
    return randomise(InternVL.from_scratch(small_folder, seed=6, device="cpu"))      # which answers with characters


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """A model folder of InternVL2-1B's widths with 2 + 2 layers, random bfloat16 weights; the real vocabulary if it is here."""
    folder = tmp_path_factory.mktemp("wide")
    source = SHARED / "internvl2-1b" if (SHARED / "internvl2-1b").exists() else TINY
    for file in source.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((TINY / "config.json").read_text())
    config |= {"force_image_size": 448, "torch_dtype": "bfloat16"}
    config["vision_config"] |= dict(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4096,
                                    image_size=448, patch_size=14)
    config["llm_config"] |= dict(hidden_size=896, num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2,
                                 intermediate_size=4864, rope_theta=1e6, max_position_embeddings=32768,
                                 vocab_size=151655 if source != TINY else 288)
    (folder / "config.json").write_text(json.dumps(config))
    randomise(InternVL.from_scratch(folder, seed=0, device="cpu")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide(wide_folder):
    return InternVL.from_pretrained(wide_folder, device="cpu")


def pytest_collect_file(file_path, parent):
    """`pytest tests/exercises` runs the exercises, which are red until they are solved; `pytest tests` leaves them alone."""
    folder, session = ROOT / "tests" / "exercises", parent.session
    if file_path.parent == folder and file_path.match("exercise_*.py") and session.isinitpath(folder) and not session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_configure(config):
    config.addinivalue_line("markers", "official: about a whole published model; another projector may break it")
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inside torch.compile
    config.addinivalue_line("filterwarnings", "ignore:This DataLoader will create")     # more workers than cores, on purpose
