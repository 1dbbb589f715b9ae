"""The reference: transformers' own InternVL, given the same weights. Nobody here wrote it."""
import copy
import re

import torch
import torch.nn.functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from model.names import official_name
from model.prompt import IMAGE_TOKEN, PLACEHOLDER, write_conversation, write_page
from model.tokenizer import special_id
from train import answer_loss

TRANSFORMERS_NAMES = (                  # official -> transformers, first match, applied once
    (r"vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    (r"vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls(\d)", r"model.vision_tower.encoder.layer.\1.lambda_\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm1", r"model.vision_tower.encoder.layer.\1.layernorm_before"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm2", r"model.vision_tower.encoder.layer.\1.layernorm_after"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj", r"model.vision_tower.encoder.layer.\1.attention.projection_layer"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv", r"model.vision_tower.encoder.layer.\1.attention.#_proj"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp", r"model.vision_tower.encoder.layer.\1.mlp"),
    (r"mlp1\.0", "model.multi_modal_projector.layer_norm"),
    (r"mlp1\.1", "model.multi_modal_projector.linear_1"),
    (r"mlp1\.3", "model.multi_modal_projector.linear_2"),
    (r"language_model\.model", "model.language_model"),
    (r"language_model\.lm_head", "lm_head"),
)


def transformers_tensors(official):
    """{official name: tensor} -> {transformers name: tensor}; the fused qkv is cut into thirds."""
    found = {}
    for name, tensor in official.items():
        for pattern, replacement in TRANSFORMERS_NAMES:
            renamed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise KeyError(name)
        if "#" in renamed:
            found |= {renamed.replace("#", part): third for part, third in zip("qkv", tensor.chunk(3))}
        else:
            found[renamed] = tensor
    return found


def reference_model(model, whole=False):
    """transformers' InternVL in the shape and with the weights of `model`, in its dtype.

    Its projector is a copy of the model's, of whatever class; `whole`: transformers' own, in tests marked `official`.
    """
    vision, language = model.config.vision, model.config.language
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.width, num_hidden_layers=vision.layers, num_attention_heads=vision.heads,
            intermediate_size=vision.mlp_width, image_size=vision.tile_pixels, patch_size=vision.patch_pixels,
            attention_bias=True, use_qk_norm=False, hidden_act="gelu", norm_type="layer_norm", layer_norm_eps=vision.norm_eps,
            use_absolute_position_embeddings=True, use_mask_token=False, use_mean_pooling=True, layer_scale_init_value=1.0),
        text_config=Qwen2Config(
            vocab_size=language.vocabulary, hidden_size=language.width, intermediate_size=language.mlp_width,
            num_hidden_layers=language.layers, num_attention_heads=language.heads, num_key_value_heads=language.kv_heads,
            max_position_embeddings=language.max_positions, rms_norm_eps=language.norm_eps, use_sliding_window=False,
            rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta}, tie_word_embeddings=False),
        image_token_id=special_id(model.tokenizer, IMAGE_TOKEN), downsample_ratio=0.5, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False)
    with torch.device("meta"):
        reference = InternVLForConditionalGeneration(config)
    tensors = {official_name(name): tensor.detach() for name, tensor in model.state_dict().items()       # shared, not copied
               if whole or not name.startswith("projector.")}
    if not whole:
        del reference.model.multi_modal_projector
    reference.load_state_dict(transformers_tensors(tensors), strict=True, assign=True)
    if not whole:
        projector = reference.model.multi_modal_projector = copy.deepcopy(model.projector)

        def encode_images(pixel_values, **_):
            patches = reference.model.vision_tower(pixel_values.to(reference.dtype)).last_hidden_state[:, 1:]
            return BaseModelOutputWithPooling(pooler_output=projector(patches))
        reference.model.get_image_features = encode_images
    reference.model.language_model.rotary_emb = Qwen2RotaryEmbedding(config.text_config)     # its buffers are not stored
    return reference.eval()


def randomise(model, seed=0):
    """Nudge what is built as zeros or ones (biases, norms, layer scale), so that a test sees each of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def reference_pixels(tiles):
    """uint8 tiles -> the pixel_values that the reference takes, normalized as in the official code."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.as_tensor(tiles).float() / 255 - mean[:, None, None]) / deviation[:, None, None]


# ---------------------------------------------------------------------------------------------- our own model, in one call

def all_logits(model, batch, caches=None):
    """(L, V): logits of every token, not only of the answers."""
    batch.answer_index = torch.arange(len(batch.ids), device=model.device)
    return model(batch, caches)


def loss_of(model, pages):
    """Sum of the answer tokens' negative log-likelihood of (tiles, prompt) pairs, in the dtype of the model."""
    batch = model.pack(pages)
    return F.cross_entropy(model(batch), batch.targets, reduction="sum")


def accumulate_gradients(model, examples, batch_pages):
    """The forward and backward passes of one step, as between the fences of train.py's loop. Returns the step's loss."""
    model.train()
    tokens = sum(example.answer_tokens for example in examples)
    step_loss = torch.zeros((), device=model.device)
    for start in range(0, len(examples), batch_pages):
        batch = model.pack([(example.tiles, example.prompt) for example in examples[start:start + batch_pages]])
        loss = answer_loss(model(batch), batch.targets) / tokens
        loss.backward()
        step_loss += loss.detach()
    return step_loss


def page_prompt(tokenizer, tokens_per_tile, tiles, questions, answers=None, max_length=None):
    """`write_page` for questions that are one branch each; no answers: all are left to the model."""
    answers = [None] * len(questions) if answers is None else answers
    return write_page(tokenizer, tokens_per_tile, tiles, [[turn] for turn in zip(questions, answers)], max_length)


def conversation_prompt(tokenizer, tokens_per_tile, tiles, turns, images=None):
    """`write_conversation` of (question, answer) turns whose images are listed apart, `images` of them per turn.

    Without `images` they take the placeholders in order; without any placeholder they come first, one per line.
    """
    if images is None and not any(PLACEHOLDER in question for question, _ in turns):
        turns = [(f"{PLACEHOLDER}\n" * len(tiles) + turns[0][0], turns[0][1]), *turns[1:]]
    left, written = list(tiles), []
    for i, (question, answer) in enumerate(turns):
        count = images[i] if images else question.count(PLACEHOLDER) if i < len(turns) - 1 else len(left)
        written.append((question, answer, left[:count]))
        left = left[count:]
    return write_conversation(tokenizer, tokens_per_tile, written)
