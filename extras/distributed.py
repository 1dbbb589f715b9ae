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
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset

import data
from extras.run_folder import SIGNALS, RunFolder, checkpoint_tensors, restore_checkpoint
from model import checkpoint, internvl
from model.checkpoint import latest_checkpoint
from model.errors import InputError, warn
from model.prompt import IGNORE_INDEX, write_page

ROUND = 4                               # batches of pages that each rank answers before the next rows are read
LONGEST = timedelta(minutes=30)         # that a rank waits for another, as for rank 0 while it saves
JOINED = {}                             # "store": what ranks know of each other outside of collectives


class Elsewhere(InputError):
    """Another rank failed, and says why; or it is gone."""


# --------------------------------------------------------------------------------------------------- start and end

def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


def run_together(report, main):
    """Meet the other ranks, run `report(main)`, end this process; of all ranks one prints why, after rank 0 saved."""
    local, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if gpus:
        torch.cuda.set_device(local)                        # before NCCL: else every rank takes memory on GPU 0
    JOINED["store"], number, ranks = next(rendezvous("env://", timeout=LONGEST))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=JOINED["store"], rank=number,
                            world_size=ranks, timeout=LONGEST)
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w")

    def on_this_rank():
        try:
            main()
            gather()                                        # all have come to the end
            dist.destroy_process_group()
        except BaseException as error:
            wait_for_rank_0(error)
            raise

    status = 0
    try:
        report(on_this_rank)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:                                   # a bug
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)                                        # torchrun ends the others, should they wait for this one


def wait_for_rank_0(error):
    """Decide which rank prints its error: the first that has one. Unless rank 0 goes on, wait until it has saved."""
    store = JOINED["store"]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)               # torchrun sends SIGTERM when the first rank has ended
    with contextlib.suppress(RuntimeError):                 # the store is gone with its process
        if isinstance(error, Elsewhere) and rank() == 0:
            time.sleep(1)
        alone = store.add("printed", 0) == 0 and rank() == 0
        prints = (alone or not isinstance(error, Elsewhere)) and store.add("printed", 1) == 1
        if not isinstance(error, SystemExit):
            sys.stderr = sys.__stderr__ if prints else open(os.devnull, "w")
        if rank() == 0:
            store.set("ends", "")
            store.set("saved", "")
        else:
            began = time.monotonic()                        # later: rank 0 waits for this rank in a collective
            while not store.check(["saved"]) and (store.check(["ends"]) or time.monotonic() < began + 5):
                time.sleep(0.05)


def all_end():
    """Whether all ranks come here within 5 seconds. One that does not waits in a collective, for what will not come."""
    store, began = JOINED["store"], time.monotonic()
    store.add("ending", 1)
    while store.add("ending", 0) < size():
        if time.monotonic() > began + 5:
            return False
        time.sleep(0.05)
    return True


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
    error, values = error or (SystemExit(128 + SIGNAL.number) if SIGNAL.number else None), [None] * size()
    with others_there():
        dist.all_gather_object(values, (value, status_of(error)))
    return agreed(values, error)


def scatter(values_of):
    """Rank 0 calls `values_of()`, a list with a value for each rank; returns this rank's. Errors as in `gather`."""
    mine, values, error = [None], [], None
    if rank() == 0:
        try:
            with SIGNAL.noticed():
                values = values_of()
        except (Exception, SystemExit) as found:
            error, values = found, [None] * size()
    with others_there():
        dist.scatter_object_list(mine, [(value, status_of(error)) for value in values] or None, src=0)
    return agreed(mine, error)[0]


def from_rank_0(value_of):
    """What `value_of()` returns on rank 0, on every rank."""
    return scatter(lambda: [value_of()] * size())


@contextlib.contextmanager
def on_rank_0(context):
    """Rank 0 enters a `context`; every rank gets what it yields."""
    with contextlib.ExitStack() as stack:
        yield from_rank_0(lambda: stack.enter_context(context))


def status_of(error):
    return error.code if isinstance(error, SystemExit) else 2 if error else 0


def agreed(values, error):
    """(value, status) of some ranks -> [value]; raises if one of them ends."""
    if error:
        raise error
    if status := max(status for _, status in values):
        raise SystemExit(status) if status > 2 else Elsewhere("another rank failed")
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

def share_settings(args):
    """Give every rank the settings of rank 0. Raises InputError for more ranks than micro-batches."""
    if args.accumulate < size():
        raise InputError(f"{size()} processes, but --accumulate {args.accumulate}: a step has as many micro-batches "
                         f"and each process needs one; start at most {args.accumulate}, or raise --accumulate")
    if args.device.startswith("cuda") and "nccl" not in str(dist.get_backend_config()):
        raise InputError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, but {torch.cuda.device_count()} GPUs; start one "
                         "process for each GPU, or give --device cpu")
    vars(args).update(from_rank_0(lambda: vars(args)))


@dataclass
class Seen:
    """What all ranks know of an Example of one of them."""
    rank: int
    shown: int                          # number of tiles
    page: data.Page
    error: str | None
    too_long: list[str]
    kept_questions: list[int]
    answer_tokens: int
    tiles: tuple = ()

    @classmethod
    def of(cls, example):
        page = replace(example.page, questions=[], answers=[], accepted=[], history=[])
        shown, tokens = (0, 0) if example.error else (len(example.tiles), example.answer_tokens)
        return cls(rank(), shown, page, example.error, example.too_long, example.kept_questions, tokens)


class Hands(Dataset):
    """[(place, page)] -> [(place, example)]: what a worker makes of a rank's share of a step."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, hand):
        return [(place, self.dataset[page]) for place, page in hand]

    def light(self, hand):
        return [(place, self.dataset.light(example)) for place, example in hand]


def hands_of(step, batch_pages, page_size):
    """Deal the pages of a step to the ranks -> for each [(place in the step, page)], whole micro-batches.

    The largest goes to the rank with the least so far; none gets more than its equal share, rounded up.
    """
    placed = list(enumerate(step))
    batches = [placed[i:i + batch_pages] for i in range(0, len(placed), batch_pages)]
    sizes = [sum(page_size(page) for _, page in batch) for batch in batches]
    hands, loads, most = [[] for _ in range(size())], [0] * size(), -(-len(batches) // size())
    for number in sorted(range(len(batches)), key=sizes.__getitem__, reverse=True):
        to = min((r for r in range(size()) if len(hands[r]) < most), key=loads.__getitem__)
        hands[to].append(batches[number])
        loads[to] += sizes[number]
    return [list(itertools.chain(*hand)) for hand in hands]


def deal(pages, args, page_size):
    """Yield this rank's pages of each step, as in `hands_of`, of rank 0's `pages`."""
    def steps():
        for _, of_epoch in itertools.groupby(pages, key=lambda page: page.epoch):
            while step := list(itertools.islice(of_epoch, args.batch_pages * args.accumulate)):
                yield hands_of(step, args.batch_pages, page_size)

    dealt, end = steps(), [None] * size()
    while (hand := scatter(lambda: next(dealt, end))) is not None:
        yield hand


def load_examples(blocks, dataset, args):
    """Yield the examples of all pages of rank 0's `blocks`, in their order: this rank's own, of others what is Seen."""
    hands = deal(data.prefetch(blocks) if rank() == 0 else None, args, dataset.size)
    for own in data.load_examples(hands, Hands(dataset), args.workers, args.device.startswith("cuda")):
        records = gather([(place, Seen.of(example)) for place, example in own])
        own = dict(own)
        for place, seen in sorted(itertools.chain(*records), key=lambda record: record[0]):
            yield own.get(place, seen)


def validation_pages(read, run, skips, dataset):
    """What `read()` returns on rank 0, (validation pages, blocks, rows); others get their own pages and the rows."""
    kept = []

    def of_ranks():
        kept[:] = pages, _, rows = read()
        return [([page if SHARDED or i % size() == r else None for i, page in enumerate(pages)], rows, run.losses,
                 skips.validation) for r in range(size())]

    pages, rows, run.losses, validation = scatter(of_ranks)
    if rank() and run.args.eval_every:
        skips.leave_out([], dataset)
        skips.validation = validation
    return tuple(kept) or (pages, None, rows)


def own(pages):
    """This rank's validation pages; all of them, which all ranks answer at once, if the weights are split."""
    return pages if SHARDED else pages[rank()::size()]


def merged(results_of_own):
    """[(example, ...)] of this rank's validation pages, an iterable -> those of all, in order; examples are Seen."""
    results, error = [], None
    for model in SHARDED:
        model.unshard()                                     # for `encode_images`, which is not the model's `forward`
    try:
        with contextlib.nullcontext() if SHARDED else SIGNAL.noticed():
            results = [(Seen.of(example), *more) for example, *more in results_of_own]
    except (Exception, SystemExit) as found:
        error = found
    of_ranks = gather(results, error)
    for model in SHARDED:
        model.reshard()
    return results if SHARDED else [one for row in itertools.zip_longest(*of_ranks) for one in row if one]


def answers(pages, dataset, batch, make_examples, answer):
    """Yield on rank 0 the Answers to its `pages`, in their order; all ranks answer, `ROUND` batches at a time.

    `make_examples` and `answer`: as in extras/evaluate.py, with everything but pages and dataset, or examples, given.
    """
    share = ROUND * batch
    def hands():
        waiting, end = iter(pages), [None] * size()
        def of_ranks():
            taken = list(enumerate(itertools.islice(waiting, share * size())))
            return [taken[r * share:(r + 1) * share] for r in range(size())] if taken else end
        while (hand := scatter(of_ranks)) is not None:
            yield hand

    for hand in make_examples(hands(), Hands(dataset)):
        found, error = [], None
        try:
            found = list(answer(example for _, example in hand))
            for one in found:
                one.page.images = []                        # images may be large
        except Exception as failed:
            error = failed
        first, *others = gather(found, error)
        if rank() == 0:
            for text in dict.fromkeys(f"{one.page.name}: {one.error}" for one in itertools.chain(*others) if one.error):
                warn(f"{text}; not answered")               # those of rank 0 are printed already
            yield from itertools.chain(first, *others)


# ------------------------------------------------------------------------------------------------------------- step

FAILED = []                             # the error of this rank's forward or backward pass, until all ranks know it


def of_this_rank(forward_backward):
    """A `forward_backward` for the micro-batches of this rank; `sum_gradients` raises its errors."""
    def own_part(model, micro_batches, *more):
        own = [batch for batch in micro_batches if not isinstance(batch[0], Seen)]
        if SHARDED:
            with others_there():
                loss = forward_backward(model, with_blanks(model, own, micro_batches), *more)
            if not any(example.shown if isinstance(example, Seen) else len(example.tiles)
                       for example in itertools.chain(*micro_batches)):
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

SHARDED = []                            # the model, if its weights are split over the ranks


def shard(model, train, choose_parts):
    """Split the weights over the ranks of a machine; a frozen vision encoder, and trained parts if small, stay whole.

    `choose_parts(model, train, parameters)` makes those of them trainable that are: of one block after another, each
    split at once. Across machines, which a slow network connects, the split weights repeat.
    """
    parts, local = set(train.split(",")), int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if "nccl" in str(dist.get_backend_config()) else "cpu"
    mesh = init_device_mesh(device, (size(),) if local in (1, size()) else (size() // local, local))
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
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)          # a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)
    model.sharded = True
    SHARDED.append(model)


def gathered_gb(model):
    """What is whole for a moment, in GB: the largest block, or the embedding, as it arrives and as it is used.

    2 bytes a parameter each; of a trained one 4 each, and 4 (of the embedding 8) for its gradient. And the next block.
    """
    layers, groups = [*model.language.blocks], [model.language.embedding, model.language.lm_head]
    blocks = [(12 if any(p.requires_grad for p in group.parameters()) else 4, group) for group in layers + groups]
    blocks = [(each + 4 * (each > 4 and group in groups)) * sum(p.numel() for p in group.parameters())
              for each, group in blocks]
    return (max(blocks) + 2 * sum(p.numel() for p in model.language.blocks[0].parameters())) / 1e9


def with_blanks(model, own, micro_batches):
    """The micro-batches of this rank as every rank runs them: equally many, the largest first.

    What is missing is a page with one black tile and no answer: it adds 0 to the loss and to every gradient.
    """
    size_of, pixels = lambda batch: sum(len(example.tiles) for example in batch), model.config.vision.tile_pixels
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [1], [[("", "")]],
                           template=model.config.template)
    prompt.labels = [IGNORE_INDEX] * len(prompt.labels)
    blank = data.Example(data.Page("", []), torch.zeros(1, 3, pixels, pixels, dtype=torch.uint8), prompt)
    of_ranks = Counter(batch[0].rank if isinstance(batch[0], Seen) else rank() for batch in micro_batches)
    return sorted(own, key=size_of, reverse=True) + [[blank]] * (max(of_ranks.values()) - len(own))


def split_as(parameter, tensor):
    """A tensor, the same on all ranks, split as a parameter is; the parameter's own part if it is whole."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def clip_grad_norm(trained, largest):
    norm = torch.nn.utils.clip_grad_norm_(trained, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                if SHARDED and (isinstance(error, Elsewhere) or not all_end()):
                    self.whole = False                      # what is split can only be saved by all
                if rank() == 0:
                    JOINED["store"].set("ends", "")         # the others wait until it is saved
                raise

    def restore(self, model, optimizer):
        restored = super().restore
        kept = from_rank_0(lambda: restored(model, optimizer, split_as) or (self.state, self.saved, self.losses))
        self.state, self.saved, self.losses = kept
        if rank() and self.saved:
            restore_checkpoint(latest_checkpoint(self.path), model, optimizer, split_as)

    def skip_log(self):
        log = super().skip_log()
        log.path = None if rank() else log.path
        return log

    def log_validation(self, bar, pages, measures, answers):
        if rank() == 0:
            super().log_validation(bar, pages, measures, answers)
        self.losses[self.state["step"]] = measures["val_loss"]

    def save(self, model, optimizer):
        if rank() == 0:
            super().save(model, optimizer)
        elif SHARDED:
            for _ in checkpoint_tensors(model, optimizer):
                pass
        self.saved = self.state["step"]

    def begin(self):
        if rank() == 0:
            super().begin()

    def log(self, bar, **line):
        if rank() == 0:
            super().log(bar, **line)

    def finish(self, model, first, skips):
        if rank() == 0:
            super().finish(model, first, skips)
        elif SHARDED:
            checkpoint.write_tensors = lambda *_: None          # rank 0 writes what all gather
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
