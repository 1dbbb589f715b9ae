"""Which numbers define InternVL2-1B? The defaults below; `Config.read` takes others from a config.json.

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
    thumbnail: bool = True              # a page of several tiles gets one more tile: the whole page
    max_tiles: int = 12                 # most tiles of a page when the model was trained, the thumbnail not counted
    stored_dtype: str = "bfloat16"      # of a checkpoint written from scratch

    @property
    def tokens_per_tile(self):          # (32 / 2)^2 = 256
        return (self.vision.grid // self.shuffle) ** 2

    def __post_init__(self):
        vision, language = self.vision, self.language
        if (vision.width % vision.heads or language.width % language.heads or language.heads % language.kv_heads
                or vision.tile_pixels % vision.patch_pixels or self.shuffle < 1 or vision.grid % self.shuffle
                or language.head_width % 2):
            raise ValueError("widths, heads and tile size do not divide evenly")

    @classmethod
    def read(cls, path):
        """Read an official config.json. Raises InputError for a file or an architecture that we cannot build."""
        try:
            official = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); a model folder has a config.json") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error}); expected the model's official config.json") from error
        try:
            vision, language = official["vision_config"], official.get("llm_config", {})
            parts = {"": official, "vision_config.": vision, "llm_config.": language}
            wrong = [f"{part}{key} is {parts[part].get(key)!r}, expected {values[0]!r}"
                     for part, keys in SUPPORTED.items() for key, values in keys.items()
                     if parts[part].get(key) not in values]
            if official.get("model_type") == "internvl":
                wrong = ["transformers layout; export with --format official"]
            if not wrong:
                return cls(VisionConfig(**numbers(vision, VISION)), LanguageConfig(**numbers(language, LANGUAGE)),
                           shuffle=round(1 / official["downsample_ratio"]), thumbnail=official["use_thumbnail"],
                           stored_dtype=official["torch_dtype"], **numbers({"max_dynamic_patch": 12} | official, TILES))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{path}: not an InternVL2 config ({type(error).__name__}: {error}); "
                             "expected the official config.json with vision_config and llm_config") from error
        raise InputError(f"{path}: not an architecture that this code builds: {'; '.join(wrong)}")


def numbers(official, table):
    """The values of a part's config, checked: {our name: number}."""
    values = {}
    for ours, (key, most) in table.items():
        value = values[ours] = official[key]
        if type(value) not in (int, type(most)) or not 0 < value <= most:
            raise ValueError(f"{key} is {str(value)[:20]}, expected a number up to {most:,}")
    return values


# our name: (official name, largest value accepted: generous for real models, small enough to fit in memory)
VISION = {
    "width": ("hidden_size", 16_384), "layers": ("num_hidden_layers", 200), "heads": ("num_attention_heads", 512),
    "mlp_width": ("intermediate_size", 131_072), "tile_pixels": ("image_size", 4_096),
    "patch_pixels": ("patch_size", 4_096), "norm_eps": ("layer_norm_eps", 1.0)}
LANGUAGE = {name: VISION[name] for name in ("width", "layers", "heads", "mlp_width")} | {
    "kv_heads": ("num_key_value_heads", 512), "vocabulary": ("vocab_size", 1_000_000),
    "rope_theta": ("rope_theta", 1e9), "norm_eps": ("rms_norm_eps", 1.0),
    "max_positions": ("max_position_embeddings", 10 ** 9)}

TILES = {"max_tiles": ("max_dynamic_patch", 128)}

# The values of a config.json that this code implements, InternVL2-1B's first.
SUPPORTED = {
    "": {
        "template": ("Hermes-2",),
        "select_layer": (-1,),          # image features are the last layer's output
        "ps_version": ("v2",),          # order of the pixel shuffle
        "use_thumbnail": (True, False),
        "torch_dtype": ("bfloat16", "float16", "float32")},
    "vision_config.": {
        "norm_type": ("layer_norm",), "qk_normalization": (False,), "qkv_bias": (True,), "hidden_act": ("gelu",)},
    "llm_config.": {
        "architectures": (["Qwen2ForCausalLM"],), "hidden_act": ("silu",), "rope_scaling": (None,),
        "use_sliding_window": (False, None)},
}
