"""What changes when torchrun starts several processes, the *ranks*, for one run? Imported only then.

    rank 0          reads rows -> steps of pages, cut into micro-batches -> deals the micro-batches of each step
    every rank      decodes, tiles, forward and backward passes of its own; the gradients are added up over all ranks
    gather          once a step: what every rank read, whether it failed, a signal; then all ranks decide alike
    rank 0          prints and writes

The loss of a step is a sum over answer tokens, so its gradients add up: with their number over all ranks as divisor
they are those of one process. Everything but the gradients travels over gloo; these too, unless they are on GPUs.
"""
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset

import data
from extras.cli import run
from extras.run_folder import SIGNALS, RunFolder, checkpoint_tensors, restore_checkpoint
from model import checkpoint, internvl
from model.checkpoint import latest_checkpoint
from model.errors import InputError, warn
from model.prompt import IGNORE_INDEX, write_page

RANK, RANKS, LOCAL_RANKS = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
ROUND = 4                               # batches of pages that each rank answers before the next rows are read
LONGEST = timedelta(minutes=30)         # that a rank waits for another, as for rank 0 while it saves
SHARDED = []                            # the model, if its weights are split over the ranks
FAILED = []                             # the error of this rank's forward or backward pass, until all ranks know it


class Elsewhere(InputError):
    """Another rank failed, and says why; or it is gone."""


# --------------------------------------------------------------------------------------------------- start and end

def run_together(main):
    """Meet the other ranks, run `main()` as `run` does, end this process; one rank prints why, after rank 0 saved."""
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= LOCAL_RANKS
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))    # before NCCL: else every rank takes memory on GPU 0
    store, _, _ = next(rendezvous("env://", timeout=LONGEST))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=RANK, world_size=RANKS,
                            timeout=LONGEST)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")

    def on_this_rank():
        try:
            main()
            gather()                                        # all have come to the end
            dist.destroy_process_group()
        except BaseException as error:
            leave(error, store)
            raise

    status = 0
    try:
        run(on_this_rank)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:                                   # a bug
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)                                        # NCCL may wait for a rank that is gone


def leave(error, store):
    """Leave the other ranks. The first with an error of its own prints it; all wait until rank 0 has saved the run."""
    own, saves = not isinstance(error, Elsewhere), not SHARDED or known_to_all(error)
    with contextlib.suppress(RuntimeError):                 # the store is gone with its process
        if saves:
            dist.destroy_process_group()                    # a rank that waits for this one gets an error
        if not own and RANK == 0:
            time.sleep(1)
        if not isinstance(error, SystemExit):
            prints = store.add("printed", own) == own and (own or RANK == 0)
            sys.stderr = sys.__stderr__ if prints else open(os.devnull, "w")
        if RANK == 0:
            store.set("saved", "")
        elif saves:
            store.wait(["saved"], LONGEST)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun sends it when the first rank has ended


def known_to_all(error):
    """Whether all ranks raise this error at the same place: in `agreed`, or about what all know, as in `check_step`."""
    return getattr(error, "known_to_all", type(error) is InputError and not error.__cause__)


class Signals:
    """Ctrl-C and SIGTERM: noted, and at the next `gather` all ranks end; at once where only this rank is concerned."""
    number, at_once = 0, False

    def catch(self, number, _):
        self.number = number
        if self.at_once:
            raise SystemExit(128 + number)

    def hold(self):
        """`gather` decides."""

    allow = hold

    @contextlib.contextmanager
    def noticed(self):
        """Within, a signal raises SystemExit at once."""
        self.at_once = True
        try:
            if self.number:
                raise SystemExit(128 + self.number)
            yield
        finally:
            self.at_once = False


SIGNAL = Signals()


# ------------------------------------------------------------------------------------------------------ collectives

def gather(value=None, error=None):
    """[each rank's value], on every rank. An `error` or a signal of one rank is raised on all."""
    error, values = error or (SystemExit(128 + SIGNAL.number) if SIGNAL.number else None), [None] * RANKS
    with others_there():
        dist.all_gather_object(values, (value, status_of(error)))
    return agreed(values, error)


def scatter(values_of):
    """Rank 0 calls `values_of()`, a list with a value for each rank; returns this rank's. Errors as in `gather`."""
    mine, values, error = [None], [None] * RANKS, None
    if RANK == 0:
        try:
            with SIGNAL.noticed():
                values = values_of()
        except (Exception, SystemExit) as found:
            error = found
    with others_there():
        dist.scatter_object_list(mine, [(value, status_of(error)) for value in values], src=0)
    return agreed(mine, error)[0]


def from_rank_0(value_of):
    """What `value_of()` returns on rank 0, on every rank."""
    return scatter(lambda: [value_of()] * RANKS)


@contextlib.contextmanager
def on_rank_0(context):
    """Rank 0 enters a `context`; every rank gets what it yields."""
    with contextlib.ExitStack() as stack:
        yield from_rank_0(lambda: stack.enter_context(context))


def status_of(error):
    return error.code if isinstance(error, SystemExit) else 2 if error else 0


def agreed(values, error):
    """(value, status) of some ranks -> [value]; raises if one of them ends."""
    if status := max(status for _, status in values):
        error = error or (SystemExit(status) if status > 2 else Elsewhere("another rank failed"))
        error.known_to_all = True
        raise error
    return [value for value, _ in values]


@contextlib.contextmanager
def others_there():
    """Around a collective: it fails only where a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Elsewhere(f"another process of torchrun has ended ({str(error).splitlines()[0][:100]}); continue with "
                        "--resume") from error


# ------------------------------------------------------------------------------------------------------------- data

def check_device(device):
    """Raise InputError for one GPU that all ranks would share, and for more ranks on a machine than it has GPUs."""
    if ":" in (device or ""):
        raise InputError("--device names one GPU, and torchrun gives each process its own; give --device cuda")
    if device != "cpu" and 0 < torch.cuda.device_count() < LOCAL_RANKS:
        raise InputError(f"{LOCAL_RANKS} processes, but {torch.cuda.device_count()} GPUs; start one process for each "
                         "GPU, or give --device cpu")


def share_settings(args):
    """Give every rank the settings of rank 0. Raises InputError for more ranks than micro-batches."""
    if args.accumulate < RANKS:
        raise InputError(f"{RANKS} processes, but --accumulate {args.accumulate}: a step has as many micro-batches "
                         f"and each process needs one; start at most {args.accumulate}, or raise --accumulate")
    vars(args).update(from_rank_0(lambda: vars(args)))


def seen(example):
    """An example as the other ranks know it: without its prompt's tokens, its tiles without pixels."""
    if example.error:
        return example
    return replace(example, tiles=torch.empty_like(example.tiles, device="meta"),
                   prompt=replace(example.prompt, numbers=torch.empty(0)))


class Hands(Dataset):
    """[page] -> [example]: what a worker makes of this rank's pages of a step."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, pages):
        return [self.dataset.light(self.dataset[page]) for page in pages]

    def light(self, examples):
        return examples


def hands_of(step, batch_pages, size):
    """Deal the pages of a step to the ranks, whole micro-batches -> the pages of each.

    The largest goes to the rank with the least so far; none gets more than its equal share, rounded up.
    """
    batches = sorted(data.chunks(step, batch_pages), key=lambda batch: sum(map(size, batch)), reverse=True)
    hands, loads, most = [[] for _ in range(RANKS)], [0] * RANKS, -(-len(batches) // RANKS)
    for batch in batches:
        to = min((r for r in range(RANKS) if len(hands[r]) < most), key=loads.__getitem__)
        hands[to].append(batch)
        loads[to] += sum(map(size, batch))
    return [list(itertools.chain(*hand)) for hand in hands]


def load_examples(blocks, dataset, args):
    """Yield the examples of all pages of rank 0's `blocks`, in their order: this rank's own; others as `seen`."""
    pages, most = data.prefetch(blocks), args.batch_pages * args.accumulate
    steps = (hands_of(step, args.batch_pages, dataset.size)
             for _, of_epoch in itertools.groupby(pages, key=lambda page: page.epoch)
             for step in data.chunks(of_epoch, most))
    hands = iter(lambda: scatter(lambda: next(steps, [None] * RANKS)), None)
    for own in data.load_examples(hands, Hands(dataset), args.workers, args.device.startswith("cuda")):
        others = gather([seen(example) for example in own])
        others[RANK] = own
        yield from sorted(itertools.chain(*others), key=lambda example: example.page.resume)


def read_pages(read, run):
    """What `read()` returns on rank 0, (validation pages, blocks, rows); the other ranks get no blocks."""
    kept = []

    def pages_and_rows():
        pages, blocks, rows = read()
        kept.append(blocks)
        return pages, rows, run.losses

    pages, rows, run.losses = from_rank_0(pages_and_rows)
    return pages, *(kept or [()]), rows


def pages_of_this_rank(pages):
    """This rank's validation pages; all of them, which all ranks answer at once, if the weights are split."""
    return pages if SHARDED else pages[RANK::RANKS]


def merged(results_of_own):
    """[(example, ...)] of this rank's validation pages, an iterable -> those of all, in order; examples as `seen`."""
    results, error = [], None
    for model in SHARDED:
        model.unshard()                                     # for `encode_images`, which is not the model's `forward`
    try:
        with contextlib.nullcontext() if SHARDED else SIGNAL.noticed():
            results = [(seen(example), *more) for example, *more in results_of_own]
    except (Exception, SystemExit) as found:
        error = found
    of_ranks = gather(None if SHARDED else results, error)
    for model in SHARDED:
        model.reshard()
    return results if SHARDED else [one for row in itertools.zip_longest(*of_ranks) for one in row if one]


def answers(pages, dataset, batch, make_examples, answer):
    """Yield on rank 0 the Answers to its `pages`, in their order; all ranks answer, `ROUND` batches at a time.

    `make_examples` and `answer`: as in extras/evaluate.py, with everything but pages and dataset, or examples, given.
    """
    rounds, share = data.chunks(pages, ROUND * batch * RANKS), ROUND * batch

    def deal():
        taken = next(rounds, None)
        return [taken and taken[r * share:(r + 1) * share] for r in range(RANKS)]

    for hand in make_examples(iter(lambda: scatter(deal), None), Hands(dataset)):
        found, error = [], None
        try:
            found = list(answer(iter(hand)))
            for one in found:
                one.page.images = []                        # images may be large
        except Exception as failed:
            error = failed
        first, *others = gather(found, error)
        if RANK == 0:
            for text in dict.fromkeys(f"{one.page.name}: {one.error}" for one in itertools.chain(*others) if one.error):
                warn(f"{text}; not answered")               # those of rank 0 are printed already
            yield from itertools.chain(first, *others)


# ------------------------------------------------------------------------------------------------------------- step

def of_this_rank(forward_backward, accumulate):
    """A `forward_backward` for the micro-batches of this rank; `sum_gradients` raises its errors."""
    most = -(-accumulate // RANKS)                          # micro-batches of a rank

    def own_part(model, micro_batches, *more):
        own = [batch for batch in micro_batches if not batch[0].tiles.is_meta]
        if SHARDED:
            with others_there():
                loss = forward_backward(model, with_blanks(model, own, most), *more)
            if not any(len(example.tiles) for example in itertools.chain(*micro_batches)):
                for parameter in (*model.vision.parameters(), *model.projector.parameters()):
                    parameter.grad = None                   # as in one process, not 0
            return loss
        try:
            return forward_backward(model, own, *more)
        except Exception as error:
            FAILED.append(error)
            return torch.zeros((), device=model.device)
    return own_part


def sum_gradients(trained, step_loss):
    """Add up the gradients, and the loss, over all ranks, in one message. Raises the error of a rank that failed."""
    trained = [p for p in trained if not isinstance(p, DTensor)]            # the others are added up already
    has = torch.tensor([*(p.grad is not None for p in trained), bool(FAILED)], dtype=step_loss.dtype)
    parts = [*(torch.zeros_like(p) if p.grad is None else p.grad for p in trained), step_loss, has.to(step_loss.device)]
    message = torch.cat([part.detach().reshape(-1) for part in parts])
    with others_there():
        dist.all_reduce(message)
    *gradients, loss, has = message.split([part.numel() for part in parts])
    step_loss.copy_(loss[0])
    *somewhere, failed = has.tolist()                       # None where no rank has a gradient: AdamW passes over it
    for p, gradient, found in zip(trained, gradients, somewhere):
        p.grad = gradient.view_as(p) if found else None
    if failed:
        gather(error=FAILED.pop() if FAILED else None)


# ---------------------------------------------------------------------------------------------------------- --shard

def shard(model, train, choose_parts):
    """Split the weights over the ranks of a machine; a frozen vision encoder, and trained parts if small, stay whole.

    `choose_parts(model, train, parameters)` makes those of them trainable that are: of one block after another, each
    split at once. Across machines, which a slow network connects, the split weights repeat.
    """
    parts = set(train.split(","))
    device = "cuda" if "nccl" in str(dist.get_backend_config()) else "cpu"
    splits = LOCAL_RANKS if LOCAL_RANKS > 1 else RANKS      # machines with one GPU each: over all of them
    mesh = init_device_mesh(device, (RANKS // splits, splits), mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if splits == RANKS else mesh
    half = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    large = parts & {"llm", "vision"}                       # trained parts are either all split or all whole
    if "vision" in parts:
        internvl.VISION_TILES = sys.maxsize                 # all ranks run its blocks equally often: once a micro-batch
    blocks = [*(model.vision.blocks if "vision" in parts else ()), *model.language.blocks]
    for group in (*blocks, model.language.embedding, model.language.lm_head, model):
        choose_parts(model, train, set(group.parameters()))
        frozen = {p for part in (model.vision, model.projector) for p in part.parameters() if not p.requires_grad}
        whole = frozen | {p for p in model.parameters() if p.requires_grad and not large}
        policy = {"mp_policy": half} if group in [*model.language.blocks] else {}
        fully_shard(group, mesh=mesh, ignored_params=whole, **policy)
    for parameter in whole:
        parameter.data = parameter.data.to(device, copy=True)   # not mapped from the file any longer
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)          # a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)
    model.sharded = True
    SHARDED.append(model)


def gathered_gb(model):
    """The most weights that are gathered at once, in GB: a block of the LLM, or the embedding, and the next block.

    Bytes a parameter: frozen 2 as received and 2 as used; trained 4 and 4, and 4 for its gradient, 8 in the embedding.
    The next block takes 2.
    """
    layers, groups = [*model.language.blocks], [model.language.embedding, model.language.lm_head]
    blocks = [(12 if any(p.requires_grad for p in group.parameters()) else 4, group) for group in layers + groups]
    blocks = [(each + 4 * (each > 4 and group in groups)) * sum(p.numel() for p in group.parameters())
              for each, group in blocks]
    return (max(blocks) + 2 * sum(p.numel() for p in model.language.blocks[0].parameters())) / 1e9


def with_blanks(model, own, most):
    """The micro-batches of this rank as every rank runs them: `most`, the largest first.

    What is missing is a page with one black tile and no answer: it adds 0 to the loss and to every gradient.
    """
    pixels = model.config.vision.tile_pixels
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [1], [[("", "")]],
                           template=model.config.template)
    prompt.labels = [IGNORE_INDEX] * len(prompt.labels)
    blank = data.Example(data.Page("", []), torch.zeros(1, 3, pixels, pixels, dtype=torch.uint8), prompt)
    own = sorted(own, key=lambda batch: sum(len(example.tiles) for example in batch), reverse=True)
    return own + [[blank]] * (most - len(own))


def split_as(parameter, tensor):
    """A tensor, the same on all ranks, split as a parameter is; the parameter's own part if it is whole."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def clip_grad_norm(trained, largest):
    norm = torch.nn.utils.clip_grad_norm_(trained, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ----------------------------------------------------------------------------------------------------------- folder

class RankFolder(RunFolder):
    """The folder of a run on several ranks: rank 0 writes, the others keep count."""

    @contextlib.contextmanager
    def ending(self, model, optimizer):
        with super().ending(model, optimizer):
            for number in SIGNALS:
                signal.signal(number, SIGNAL.catch)
            try:
                yield SIGNAL
            except BaseException as error:
                if SHARDED and not known_to_all(error):
                    self.whole = False                      # what is split can only be saved by all
                raise

    def restore(self, model, optimizer):
        restored = super().restore
        kept = from_rank_0(lambda: restored(model, optimizer, split_as) or (self.state, self.saved, self.losses))
        self.state, self.saved, self.losses = kept
        if RANK and self.saved:
            restore_checkpoint(latest_checkpoint(self.path), model, optimizer, split_as)

    def save(self, model, optimizer):
        if RANK == 0:
            super().save(model, optimizer)
        elif SHARDED:
            for _ in checkpoint_tensors(model, optimizer):
                pass
        self.saved = self.state["step"]

    if RANK:
        begin = log = lambda *_, **__: None                 # rank 0 writes settings.json and metrics.jsonl

    def skip_log(self):
        log = super().skip_log()
        log.path = None if RANK else log.path
        return log

    def log_validation(self, bar, pages, measures, answers):
        if RANK == 0:
            super().log_validation(bar, pages, measures, answers)
        self.losses[self.state["step"]] = measures["val_loss"]

    def finish(self, model, first, skips):
        if RANK == 0:
            super().finish(model, first, skips)
        elif SHARDED:
            checkpoint.write_tensors = lambda *_: None      # rank 0 writes what all gather
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
