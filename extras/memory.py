"""The memory of a training step, estimated before the first one.

    weights  +  gradients and AdamW's two moments of the trainable parts  +  activations kept for the backward pass

The activations are by far the most and grow with the tokens of a micro-batch. They are counted, not derived: autograd
reports what it saves for a page of one tile and for one of two; the difference is the cost of every further tile.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from model.checkpoint import device_memory
from model.errors import InputError, warn
from model.prompt import write_page

# about a page of DocumentVQA
QUESTION, ANSWER, QUESTIONS = "What is the total amount of this invoice?", "$1,234.56", 4


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


def saved_gb(model, tiles):
    """What autograd saves in one forward pass over a page of so many tiles, in GB, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()        # several saved tensors may be views of one storage
        return tensor.detach()                                  # the tensor itself would keep its graph alive

    size = model.config.vision.tile_pixels
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [tiles], [[(QUESTION, ANSWER)]] * QUESTIONS,
                           template=model.config.template)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        batch = model.pack([(torch.zeros(tiles, 3, size, size, dtype=torch.uint8), prompt)])
        loss = F.cross_entropy(model(batch).float(), batch.targets, reduction="sum")
    del loss                                            # alive until here, so that no storage is reused
    return sum(saved.values()) / 1e9


def step_gb(model, max_tiles, batch_pages):
    """{what: GB} of a training step whose pages all have `max_tiles` tiles and a few questions.

    Warns if that is more than the device has; raises InputError if not even a page of two tiles fits.
    """
    tiles, advice = max_tiles + (model.config.thumbnail and max_tiles > 1), (
        "try --checkpoint-activations, fewer tiles (--max-tiles), --train lora, a smaller model or a larger GPU")
    held = held_gb(str(model.device))
    try:
        one, two = saved_gb(model, 1), saved_gb(model, 2)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the memory is too small for a step on a page of two tiles; {advice}") from error
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = {"in use now": held, "gradients and optimizer": 12 * trained / 1e9,  # float32: one gradient, two moments
              "activations": batch_pages * (one + (tiles - 1) * (two - one))}
    if (total := sum(needed.values())) > (most := device_memory(model.device) / 1e9):
        warn(f"a step on pages of {max_tiles} tiles needs about {total:.0f} GB, and there are {most:.0f} GB; {advice}")
    return needed
