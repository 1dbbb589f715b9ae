"""What tests mean by `tiny`: a model of the embedded one's architecture and tile, with 0.4 million parameters that are drawn here.

Imported before anything takes `TINY` from model/checkpoint.py. So tests stay cheap, and green in a fork with another projector. What
the published weights can do is asked in tests marked `official`, which have the fixture `published`.
"""
import atexit
import json
import shutil
import tempfile
from pathlib import Path

from model import InternVL, checkpoint


def small_model():
    """A model folder with random weights, the same every time, that image tokens of 32 x 32 pixels make fast; deleted at the end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in PUBLISHED.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = "float32"
    config["vision_config"] |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, patch_size=16)
    config["llm_config"] |= dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, intermediate_size=256,
                                 max_position_embeddings=2048)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = InternVL.from_scratch(folder, seed=24, device="cpu")             # a seed that no test draws from
    head, end = model.language.lm_head.weight, model.tokenizer.eos_token_id
    head[94:end], head[end + 1:] = 0, 0                                 # it writes ASCII, ids 0 to 93
    model.save_pretrained(folder)
    return folder


PUBLISHED = checkpoint.TINY
checkpoint.TINY = small_model()
