"""Which numbers define a model of the family? The defaults are InternVL2-1B's; `Config.read` reads a config.json.

Sources: the official config.json of each model; ../README.md lists the models.
"""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import InputError
from model.prompt import TEMPLATES, Template, read_template

READERS = {}                            # model_type -> reads the config.json of another model, see xcomposer2.py


@dataclass(frozen=True)
class VisionConfig:
    """InternViT-300M-448px; the last three differ in InternViT-6B."""
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    tile_pixels: int = 448              # side of a tile
    patch_pixels: int = 14              # side of a patch
    norm_eps: float = 1e-6
    rms_norm: bool = False              # RMSNorm instead of LayerNorm in the blocks
    qk_norm: bool = False               # queries and keys are normalized, all heads as one vector
    qkv_bias: bool = True

    @property
    def grid(self):                     # patches along a side of a tile: 448 / 14 = 32
        return self.tile_pixels // self.patch_pixels


# The decoders, by the class that config.json names (<name>ForCausalLM), and what each does otherwise than Qwen2.
# InternLM2 computes as Llama does; like Phi-3 it has other tensors in files, see names.py.
DECODERS = {
    "Qwen2": {}, "Qwen3": {"qkv_bias": False, "qk_norm": True},
    "Llama": {"qkv_bias": False}, "InternLM2": {"qkv_bias": False}, "Phi3": {"qkv_bias": False}}


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
    decoder: str = "Qwen2"              # in DECODERS
    qkv_bias: bool = True
    qk_norm: bool = False               # each query and key is normalized before it is rotated
    own_head_width: int | None = None   # where it is not width / heads
    rope: dict = field(default_factory=dict)    # rope_scaling of config.json, if the model has any

    @property
    def head_width(self):               # 896 / 14 = 64
        return self.own_head_width or self.width // self.heads

    def is_long(self, tokens):          # LongRoPE: keys of longer texts are rotated otherwise
        return tokens > self.rope.get("original_max_position_embeddings", math.inf)


@dataclass(frozen=True)
class Config:
    """The whole model: vision encoder, projector, language model, how a page is cut, how a prompt is written."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    shuffle: int = 2                    # the projector merges shuffle x shuffle patches into one image token
    thumbnail: bool = True              # a page of several tiles gets one more tile: the whole page
    max_tiles: int = 12                 # most tiles of a page when the model was trained, the thumbnail not counted
    stored_dtype: str = "bfloat16"      # of a checkpoint written from scratch
    template: Template = TEMPLATES["Hermes-2"]
    # of another model: its class (None: InternVL), whether images are tiled, and the penalty of `generate`
    model_class, tiled, repetition_penalty = None, True, 1.0

    @property
    def tokens_per_tile(self):          # (32 / 2)^2 = 256
        return (self.vision.grid // self.shuffle) ** 2

    def __post_init__(self):
        vision, language = self.vision, self.language
        if (vision.width % vision.heads or not language.own_head_width and language.width % language.heads
                or language.heads % language.kv_heads or language.head_width % 2
                or any(2 * len(x) != language.head_width for name, x in language.rope.items() if "_factor" in name)
                or vision.tile_pixels % vision.patch_pixels or self.shuffle < 1 or vision.grid % self.shuffle):
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
            if official.get("model_type") in READERS:
                return READERS[official["model_type"]](official)
            if not (wrong := unsupported(official)):
                vision, language = official["vision_config"], official["llm_config"]
                return cls(VisionConfig(**numbers(vision, VISION), rms_norm=vision["norm_type"] == "rms_norm",
                                        qk_norm=vision["qk_normalization"], qkv_bias=vision["qkv_bias"]),
                           read_language(language), shuffle=round(1 / official["downsample_ratio"]),
                           thumbnail=official["use_thumbnail"], stored_dtype=official["torch_dtype"],
                           template=read_template(official, Path(path).parent),
                           **numbers({"max_dynamic_patch": 12} | official, {"max_tiles": ("max_dynamic_patch", 128)}))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{path}: not an InternVL2 config ({type(error).__name__}: {error}); "
                             "expected the official config.json with vision_config and llm_config") from error
        raise InputError(f"{path}: not an architecture that this code builds: {wrong}")


def unsupported(official):
    """What a config.json has that we cannot build, with the nearest model that we can; None if there is nothing."""
    if any(key.startswith("flash_") for key in official):
        return "a Flash variant, which merges tokens on the way; take the model of this size without -Flash"
    if official.get("model_type") in NEAREST:
        return NEAREST[official["model_type"]]
    parts = {"": official, "vision_config.": official["vision_config"], "llm_config.": official.get("llm_config", {})}
    wrong = [f"{part}{key} is {parts[part].get(key)!r}, expected {' or '.join(map(repr, values))}"
             for part, keys in SUPPORTED.items() for key, values in keys.items() if parts[part].get(key) not in values]
    nearest = NEAREST.get(parts["llm_config."].get("model_type"), "OpenGVLab/InternVL2-1B")
    return f"{'; '.join(wrong)}; the nearest one that works is {nearest}" if wrong else None


def read_language(official):
    """The LanguageConfig of an official llm_config."""
    decoder, limit = official["architectures"][0].removesuffix("ForCausalLM"), "original_max_position_embeddings"
    own = {"own_head_width": ("head_dim", 1_024)} if "head_dim" in official else {}
    rope = dict(official.get("rope_scaling") or {})
    kind = rope.pop("type", None) or rope.get("rope_type")
    if kind == "dynamic":
        rope = {"rope_type": kind} | numbers(rope, {"factor": ("factor", 1000.0)})
    elif kind in ("su", "longrope"):
        rope |= {"rope_type": "longrope"} | numbers(official, {limit: (limit, 10 ** 9)})
    elif rope:
        raise ValueError(f"rope_scaling is {kind}, expected dynamic, su or longrope")
    return LanguageConfig(**numbers(official, LANGUAGE | own), decoder=decoder, rope=rope, **DECODERS[decoder])


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

# The values of a config.json that this code implements: image features are the last layer's output (select_layer -1),
# the pixel shuffle has the order "v2".
SUPPORTED = {
    "": {"template": TEMPLATES, "select_layer": (-1,), "ps_version": ("v2",), "use_thumbnail": (True, False),
         "pad2square": (False, None), "torch_dtype": ("bfloat16", "float16", "float32")},
    "vision_config.": {"norm_type": ("layer_norm", "rms_norm"), "qk_normalization": (False, True),
                       "qkv_bias": (True, False), "hidden_act": ("gelu",)},
    "llm_config.": {"architectures": [[f"{name}ForCausalLM"] for name in DECODERS], "hidden_act": ("silu",),
                    "use_sliding_window": (False, None), "bias": (False, None), "attention_bias": (False, None)}}
NEAREST = {                             # model_type -> what to take instead
    "internlm3": "OpenGVLab/InternVL3-8B", "qwen3_moe": "OpenGVLab/InternVL3_5-38B",
    "gpt_oss": "OpenGVLab/InternVL3_5-14B",
    "internvl": "transformers layout; export with --format official, or take the model without -HF"}
