"""The memory of a training step, estimated before the first one.

    weights  +  gradients and AdamW's two moments of the trainable parts  +  activations kept for the backward pass

The activations are by far the most and grow with the tokens of a micro-batch. They are counted, not derived: autograd
reports what it saves for a page of one tile and for one of two; the difference is the cost of every further tile.
"""
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint import device_memory
from model.errors import InputError, warn
from model.prompt import write_page

# about a page of DocumentVQA
QUESTION, ANSWER, QUESTIONS = "What is the total amount of this invoice?", "$1,234.56", 4
STEP_PAGES = 8                          # of a step by default
SHARE, WORK = 0.8, 1.0                  # of a GPU's memory, after WORK GB for what the encoder and one block need


def peak_gb(device):
    """Peak memory so far, in GB: of the GPU's tensors, or of this process (unknown on Windows: 0)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():                                 # Linux: getrusage would include the peak of the parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    if sys.platform == "win32":
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def held_gb(device):
    """Memory held now, in GB; the peak so far where the system does not report it."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device) / 1e9
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 / 1e9 if pages.exists() else peak_gb(device)


def of_this_rank(parameter):
    """A parameter, or with --shard the part of it that this rank holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def saved_gb(model, tiles):
    """What autograd saves in one forward pass over a page of so many tiles, in GB, without parameters."""
    parameters = {of_this_rank(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    saved, gathered = {}, set()

    def used_by(module, _):                                     # with --shard its weights are whole for a moment
        gathered.clear()
        gathered.update(parameter.untyped_storage().data_ptr() for parameter in module.parameters(recurse=False))

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | gathered:
            saved[storage.data_ptr()] = storage.nbytes()        # several saved tensors may be views of one storage
        return tensor.detach()                                  # the tensor itself would keep its graph alive

    size = model.config.vision.tile_pixels
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [tiles], [[(QUESTION, ANSWER)]] * QUESTIONS,
                           template=model.config.template)
    split = hasattr(model, "reshard")                           # --shard
    hooks = [module.register_forward_pre_hook(used_by) for module in model.modules() if split and module is not model]
    counting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with counting, torch.compiler.set_stance("force_eager"):
        batch = model.pack([(torch.zeros(tiles, 3, size, size, dtype=torch.uint8), prompt)])
        loss = F.cross_entropy(model(batch).float(), batch.targets, reduction="sum")
    del loss                                            # alive until here, so that no storage is reused
    for hook in hooks:
        hook.remove()
    if split:                                           # only a backward pass would split all of it again
        model.reshard()
    return sum(saved.values()) / 1e9


def step_gb(model, max_tiles, batch_pages):
    """{what: GB} of a training step whose pages all have `max_tiles` tiles and a few questions.

    Warns if that is more than the device has; raises InputError if not even a page of two tiles fits.
    """
    max_tiles = max_tiles if model.config.tiled else 1
    tiles, advice = max_tiles + (model.config.thumbnail and max_tiles > 1), (
        "try --checkpoint-activations, fewer tiles (--max-tiles), --train lora or a smaller model; with several GPUs, "
        "start them with torchrun and use --shard")
    held = held_gb(str(model.device))
    try:
        one, two = saved_gb(model, 1), saved_gb(model, 2)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the memory is too small for a step on a page of two tiles; {advice}") from error
    trained = sum(of_this_rank(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = {"in use now": held, "gradients and optimizer": 12 * trained / 1e9,  # float32: one gradient, two moments
              "activations": batch_pages * (one + (tiles - 1) * (two - one))}
    if (total := sum(needed.values())) > (most := device_memory(model.device) / 1e9):
        warn(f"a step on pages of {max_tiles} tiles needs about {total:.0f} GB, and there are {most:.0f} GB; {advice}")
    return needed


def room_gb(device):
    """The memory of a GPU that is free or ours, in GB."""
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 1e9


def choose_split(args, model):
    """Set --batch-pages and --accumulate if not given: 8 pages a step, on a GPU as many of them at once as fit."""
    if args.batch_pages is None and args.accumulate is None and args.device.startswith("cuda"):
        most = max(1, STEP_PAGES // int(os.environ.get("WORLD_SIZE", 1)))     # every rank of torchrun needs one
        args.batch_pages = min(most, fitting_pages(model, args.max_tiles, room_gb(args.device)))
        args.accumulate = STEP_PAGES // args.batch_pages
        print(f"a step: {args.accumulate} x {args.batch_pages} pages, as many at once as should fit into memory")
    args.batch_pages, args.accumulate = args.batch_pages or 1, args.accumulate or STEP_PAGES


def fitting_pages(model, max_tiles, room):
    """How many pages of a step, 8, 4, 2 or 1, are one micro-batch: the most that fit into `room`, in GB.

    More of them at once are as exact, and cost the host half the time a page.
    """
    needed, pages = step_gb(model, max_tiles, 1), STEP_PAGES
    while pages > 1 and sum(needed.values()) + (pages - 1) * needed["activations"] > SHARE * (room - WORK):
        pages //= 2
    return pages


class AttentionKernels(TorchDispatchMode):
    """Notes which kernel torch takes for each call of attention; "math", which keeps all scores, is slow and large."""

    def __init__(self, model):
        super().__init__()
        self.patches, self.found = model.config.vision.grid ** 2 + 1, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name == "scaled_dot_product_attention":          # in inference mode it arrives here before it has chosen
            with self:
                return function.decompose(*args, **(kwargs or {}))
        kernel = re.match("_scaled_dot_product_(.+?)_attention", name)
        if kernel or name in ("_softmax", "_safe_softmax"):
            queries, keys = (args[0].shape[-2], args[1].shape[-2]) if kernel else args[0].shape[-2:]
            call = "tiles" if queries == self.patches else "prefix" if queries == keys else "branches"
            self.found[call] = kernel[1] if kernel else "math"
        return function(*args, **(kwargs or {}))


def attention_kernels(model):
    """{"tiles", "prefix", "branches": "flash", "efficient", "cudnn" or "math"} of a page in training."""
    with AttentionKernels(model) as kernels:
        saved_gb(model, 1)
    return kernels.found


def print_step(args, model, ranks=None):
    """Print the estimated memory of a step and, on a GPU, the kernels of its attention."""
    needed = step_gb(model, args.max_tiles, args.batch_pages)
    if args.shard:
        needed["largest gathered block"] = ranks.gathered_gb(model)
    print(f"estimated memory of a step on pages of {args.max_tiles if model.config.tiled else 1} tiles: "
          f"{sum(needed.values()):.2f} GB (" + ", ".join(f"{what} {gb:.2f}" for what, gb in needed.items()) + ")")
    if args.device.startswith("cuda"):
        print("attention kernels: " + ", ".join(map(" ".join, attention_kernels(model).items())))
