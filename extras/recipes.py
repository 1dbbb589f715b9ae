"""Which settings did others publish for this model? Flags of train.py, by name."""

# Peak learning rates. The official second fine-tuning of InternVL2-1B trains projector and LLM, or LoRA, at 4e-5; its
# domain adaptation, which also trains the vision encoder, uses 1e-5. TINY_LR, for --tiny, was found by trial.
LR = {"projector": 4e-5, "lora": 4e-5, "llm": 4e-5, "vision": 1e-5}
TINY_LR = {"projector": 2e-3, "lora": 5e-4, "llm": 2e-4, "vision": 2e-4}
# Published recipes: (source, the flags they set). Their batch size counts questions, ours pages (3.87 questions on
# average). None sets drop path (0.1 in the official full run) or groups by length, as the originals do.
OFFICIAL = dict(max_tiles=6, max_length=4096, schedule="cosine", warmup=0.03, weight_decay=0.01, beta2=0.999, clip=1.0,
                batch_pages=1, checkpoint_activations=True)
COMPOSER = OFFICIAL | dict(max_tiles=1, warmup=0.01, weight_decay=0.1, beta2=0.95, accumulate=8)
RECIPES = {
    "official-full": (
        "InternVL 2.0 second fine-tuning of 1B, full: 128 questions a step",
        OFFICIAL | dict(train="projector,llm", lr=4e-5, accumulate=32)),
    "official-lora": (
        "InternVL 2.0 second fine-tuning of 1B, LoRA: 16 questions a step",
        OFFICIAL | dict(train="lora", lr=4e-5, accumulate=4,
                        lora_rank=16, lora_alpha=32, lora_dropout=0.05, lora_targets="llm")),
    "xtuner-lora": (
        "XTuner's InternVL2 LoRA, learning rate and batch of its FoodieQA tutorial: 8 questions a step",
        OFFICIAL | dict(train="projector,lora", lr=3e-5, accumulate=2, weight_decay=0.05, max_tiles=12, max_length=8192,
                        lora_rank=128, lora_alpha=256, lora_dropout=0.05, lora_targets="llm")),
    "ms-swift-lora": (
        "ms-swift's defaults for LoRA, on query, key and value: 16 questions a step",
        OFFICIAL | dict(train="lora", lr=1e-4, accumulate=4, warmup=0.05, weight_decay=0.1, beta2=0.95, max_tiles=12,
                        lora_rank=8, lora_alpha=32, lora_dropout=0.05, lora_targets="qkv")),
    "paddlemix-llm": (
        "PaddleMIX's second fine-tuning of 1B, LLM and projector trainable: 128 questions a step",
        OFFICIAL | dict(train="projector,llm", lr=4e-5, accumulate=32)),
    "xcomposer2-lora": (
        "InternLM-XComposer2's own fine-tuning, LoRA",
        COMPOSER | dict(train="lora", lr=5e-5, lora_rank=64, lora_alpha=64, lora_dropout=0.05, lora_targets="llm")),
    "xcomposer2-full": ("InternLM-XComposer2's own fine-tuning, full", COMPOSER | dict(train="projector,llm", lr=1e-5)),
}


def fit_to_size(args, rates, parameters):
    """Set the weight decay, and the peak learning `rates` that were not typed, as the official scripts do for a size.

    Source: the second fine-tuning scripts of InternVL 2.0 and 2.5; they have none between 8B and 26B.
    """
    args.weight_decay = (0.05 if parameters > 5e9 else 0.01) if args.weight_decay is None else args.weight_decay
    if parameters > 12e9 and getattr(args, "untyped", ()):
        args.lr = as_text({part: min(rates[part], 2e-5) if part in args.untyped else rates[part]
                           for part in args.train.split(",")})


def as_text(rates):
    """{'projector': 1e-3, 'lora': 1e-4} -> 'projector=0.001,lora=0.0001'."""
    return ",".join(f"{part}={rate:g}" for part, rate in rates.items())
