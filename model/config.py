"""Which numbers define InternVL2-1B? The defaults below are the answer; `Config.read` takes them from a config.json.

Everything that follows from these numbers is a property, so it can never disagree with them.
Source: the official config.json of OpenGVLab/InternVL2-1B.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    """InternViT-300M-448px."""
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    tile_pixels: int = 448              # side of a tile
    patch_pixels: int = 14              # side of a patch
    norm_eps: float = 1e-6

    @property
    def grid(self):                     # patches along a side of a tile: 448 / 14 = 32
        return self.tile_pixels // self.patch_pixels


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2-0.5B-Instruct."""
    width: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2                   # each serves 7 consecutive query heads
    mlp_width: int = 4864
    vocabulary: int = 151655
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    max_positions: int = 32768

    @property
    def head_width(self):               # 896 / 14 = 64
        return self.width // self.heads


@dataclass(frozen=True)
class Config:
    """The whole model: vision encoder, projector, language model, and how a page is cut."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    shuffle: int = 2                    # the projector merges shuffle x shuffle patches into one image token
    thumbnail: bool = True              # a page cut into several tiles is also seen whole
    stored_dtype: str = "bfloat16"      # of a checkpoint written from scratch

    @property
    def tokens_per_tile(self):          # (32 / 2)^2 = 256
        return (self.vision.grid // self.shuffle) ** 2

    @classmethod
    def read(cls, path):
        """Read an official config.json. Raises InputError for a file or an architecture that we cannot build."""
        path = Path(path)
        try:
            if path.stat().st_size > 1_000_000:
                raise ValueError("over 1 MB")
            official = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); a model folder holds a config.json") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error}); expected the model's official config.json") from error
        try:
            vision, language = official["vision_config"], official["llm_config"]
            found = {
                "llm_config.architectures": language["architectures"][0],
                "template": official["template"],
                "select_layer": official["select_layer"],
                "ps_version": official["ps_version"],
                "vision_config.norm_type": vision["norm_type"],
                "vision_config.qk_normalization": vision["qk_normalization"],
                "vision_config.qkv_bias": vision["qkv_bias"],
                "vision_config.hidden_act": vision["hidden_act"],
                "llm_config.hidden_act": language["hidden_act"],
                "llm_config.rope_scaling": language.get("rope_scaling"),
                "llm_config.use_sliding_window": language.get("use_sliding_window", False),
            }
            wrong = [f"{key} is {found[key]!r}, expected {value!r}" for key, value in SUPPORTED.items() if found[key] != value]
            if wrong:
                raise InputError(f"{path}: not an architecture that this code builds: {'; '.join(wrong)}")
            config = cls(
                VisionConfig(width=vision["hidden_size"], layers=vision["num_hidden_layers"],
                             heads=vision["num_attention_heads"], mlp_width=vision["intermediate_size"],
                             tile_pixels=vision["image_size"], patch_pixels=vision["patch_size"],
                             norm_eps=vision["layer_norm_eps"]),
                LanguageConfig(width=language["hidden_size"], layers=language["num_hidden_layers"],
                               heads=language["num_attention_heads"], kv_heads=language["num_key_value_heads"],
                               mlp_width=language["intermediate_size"], vocabulary=language["vocab_size"],
                               rope_theta=language["rope_theta"], norm_eps=language["rms_norm_eps"],
                               max_positions=language["max_position_embeddings"]),
                shuffle=round(1 / official["downsample_ratio"]), thumbnail=official["use_thumbnail"],
                stored_dtype=official["torch_dtype"])
            config.check()
            return config
        except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{path}: not an InternVL2 config ({type(error).__name__}: {error}); "
                             "expected the official config.json with vision_config and llm_config") from error

    def check(self):
        """Raise TypeError or ArithmeticError for numbers that no model can be built from."""
        for part in (self.vision, self.language):
            for key, value in vars(part).items():
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"{key} is {value!r}, not a number")
                if key not in REALS and not isinstance(value, int):
                    raise TypeError(f"{key} is {value!r}, not a whole number")
                if not 0 < value <= MOST.get(key, 1e9):
                    raise ArithmeticError(f"{key} is {str(value)[:20]}, expected between 0 and {MOST.get(key, 1e9):,}")
        vision, language = self.vision, self.language
        if (vision.width % vision.heads or language.width % language.heads or language.heads % language.kv_heads
                or vision.tile_pixels % vision.patch_pixels or vision.grid % self.shuffle or language.head_width % 2):
            raise ArithmeticError("widths, heads and tile do not divide as they must")
        if not isinstance(self.thumbnail, bool):
            raise TypeError(f"use_thumbnail is {self.thumbnail!r}")
        if self.stored_dtype not in ("bfloat16", "float16", "float32"):
            raise TypeError(f"torch_dtype is {self.stored_dtype!r}")


REALS = ("rope_theta", "norm_eps")
# Beyond these nothing is a model of this kind, and building one would take all memory. Others: at most 1e9.
MOST = {"layers": 1_000, "width": 65_536, "mlp_width": 1_000_000, "heads": 4_096, "kv_heads": 4_096, "vocabulary": 10_000_000,
        "tile_pixels": 4_096, "patch_pixels": 4_096}

# What a config.json must say for this code to compute what its authors meant. InternVL2-1B says exactly this.
SUPPORTED = {
    "llm_config.architectures": "Qwen2ForCausalLM",
    "template": "Hermes-2",
    "select_layer": -1,                 # image features are the last layer's output
    "ps_version": "v2",                 # order of the pixel shuffle
    "vision_config.norm_type": "layer_norm",
    "vision_config.qk_normalization": False,
    "vision_config.qkv_bias": True,
    "vision_config.hidden_act": "gelu",
    "llm_config.hidden_act": "silu",
    "llm_config.rope_scaling": None,
    "llm_config.use_sliding_window": False,
}
