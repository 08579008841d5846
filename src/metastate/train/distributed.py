"""Many processes on one run: who is here, how model and rows are spread, what all agree on.

The work is PyTorch's own: torchrun starts the processes, DDP keeps copies of the model equal,
fully_shard (FSDP2) splits it, Distributed Checkpoint writes the parts.

The R processes stand in a grid of R/C rows and C columns, C = context_parallel: a row of the grid
takes its own rows of each batch, its columns share the tokens of those. DDP, FSDP and HSDP spread
the weights over all R, and average the gradients over all R.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metastate.config import TrainConfig
from metastate.data.files import alone_in
from metastate.errors import BusyError, CheckpointError, ConfigError, TrainingError, is_full
from metastate.model.lm import LanguageModel
from metastate.model.loss import LossOutput, lm_loss
from metastate.model.state import ModelState
from metastate.ops.context import of_last

TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others
WRITING = timedelta(hours=4)  # how long for one that writes files: a large model, a slow disk


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


class Team:
    """The processes of a run and this one's place among them; every method is called by all.

    Attributes:
        rank: of this process, 0 <= rank < size.
        size: R, all processes.
        device: where this process computes.
        data_rank: the part of a batch's rows that this process has.
        data_size: into how many parts the rows are split, R/C.
        group: the processes that share this one's rows, in the order of their tokens; None where
            rows are whole.
        files: the group of all that waits long enough for files to be written; None in one process.
        saver: the same where it writes the parts of a sharded model; None where a model is whole.
        restarted: torchrun started the processes again after a failure.
        launch: tells this command of torchrun from others, "" without torchrun; the first process's
            counts, and after a restart it is the same.
    """

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, size: int) -> None:
        self.config, self.device, self.rank, self.size = config, device, rank, size
        columns = config.context_parallel
        self.data_rank, self.data_size = rank // columns, size // columns
        self.group: dist.ProcessGroup | None = None
        self.files: dist.ProcessGroup | None = None
        if columns > 1:
            for row in range(self.data_size):  # every process must make every group
                group = dist.new_group([row * columns + i for i in range(columns)])
                self.group = group if row == self.data_rank else self.group
        if config.parallel != "none":
            self.files = dist.new_group(backend="gloo", timeout=WRITING)
        self.saver = self.files if config.parallel in ("fsdp", "hsdp") else None

        # Of a machine that lost none of its own processes torchrun counts no restart.
        count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.restarted = any(n for [n] in self.everyone(count))
        self.launch = _launch()

    def everyone(self, *values: float) -> list[list[float]]:
        """Return the `values` of all processes, one list a process, the same everywhere."""
        if self.config.parallel == "none":
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return [x.tolist() for x in found]

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise ConfigError, on every process, unless all have the same `facts`."""
        digests = [
            float(int.from_bytes(sha256(repr(fact).encode()).digest()[:6]))
            for fact in facts.values()
        ]
        found = self.everyone(*digests)
        for rank, theirs in enumerate(found):
            for name, fact, a, b in zip(facts, facts.values(), theirs, found[0], strict=True):
                if a != b:
                    raise ConfigError(
                        f"process {rank} has another {name} than process 0 (here, on process "
                        f"{self.rank}, it is {fact!r}); start all with the same settings"
                    )

    def check_shared(self, folder: Path, *facts: float) -> None:
        """Raise CheckpointError, on every process, unless all find the same `facts` in `folder`."""
        found = self.everyone(*facts)
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise CheckpointError(
                    f"process {rank} does not see {folder} as process 0 does, which goes on from "
                    "it; --out must be one folder that all machines share"
                )

    @contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Hold `folder` for this run alone: the first process has the lock."""
        held, busy = alone_in(folder) if self.rank == 0 else nullcontext(), None
        try:
            held.__enter__()
        except (BusyError, TrainingError) as error:
            busy = error
        if any(failed for [failed] in self.everyone(busy is not None)):
            raise busy or BusyError("the first process cannot write to the run's folder; see there")
        try:
            yield
        finally:
            held.__exit__(None, None, None)

    def write(self, job: Callable[[], object]) -> None:
        """Write files by `job`: each process its parts of a sharded model, else the first alone.

        For the first one the others wait, and what it raises, all raise.
        """
        if self.saver is None:
            led(self.files, job)
        else:
            job()

    def shard(self, model: LanguageModel) -> None:
        """Split the model's weights over the processes, where the run says so: FSDP2.

        A block's weights are gathered while it runs, forward and backward; all others stay
        gathered from the first to the last use of a step.
        """
        if self.saver is None:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        sizes: tuple[int, ...] = (self.size,)
        if self.config.parallel == "hsdp":
            sizes = (self.size // self.shard_size, self.shard_size)
        names = ("replicate", "shard")[-len(sizes) :]
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        # Nothing here changes a block's output in place, which is what the warning is about.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        _ = model.empty_state  # of whole weights, while they are whole
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "features")

    @property
    def shard_size(self) -> int:
        """How many processes hold one copy of a model under HSDP: by default those of a machine."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return self.config.shard_size or min(local, self.size)

    def objective(self, model: LanguageModel) -> nn.Module:
        """Return `lm_loss` of `model` as a module that averages gradients over all processes."""
        objective = Objective(model)
        if self.config.parallel != "ddp":
            return objective
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Else it lays gradients out anew after the first step, so that a resumed run would add
            # those of more than two processes in another order, and round them differently.
            find_unused_parameters=True,
        )

    @contextmanager
    def exchanging(self, objective: nn.Module, on: bool) -> Iterator[None]:
        """Exchange gradients in the backward passes inside, or, where not `on`, only add them up.

        Not `on` an FSDP process holds the sum of its whole gradients, 4 bytes a parameter.
        """
        if self.saver is not None:
            objective.model.set_requires_gradient_sync(on)  # type: ignore[union-attr, operator]
        if isinstance(objective, nn.parallel.DistributedDataParallel) and not on:
            with objective.no_sync():
                yield
        else:
            yield

    def rest(self, model: LanguageModel) -> None:
        """Let go of weights that a forward pass without a backward one left gathered."""
        if self.saver is not None:
            model.reshard()  # type: ignore[operator]

    def columns(self, x: Tensor) -> Tensor:
        """Return this process's tokens of its rows x [B, T]."""
        if self.group is None:
            return x
        return x.chunk(self.group.size(), 1)[self.group.rank()].contiguous()

    def carried(self, state: ModelState) -> ModelState:
        """Return the state after the last token of this process's rows, whoever read it."""
        group = self.group
        return state.detach() if group is None else state.map(lambda x: of_last(x, group))

    def whole_rows(self, state: ModelState | None) -> ModelState | None:
        """Return the carried state of all rows."""
        if state is None or self.config.parallel == "none":
            return state

        def gathered(x: Tensor) -> Tensor:
            found = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(found, x.contiguous())
            return torch.cat(found[:: self.size // self.data_size])

        return state.map(gathered)

    def own_rows(self, state: ModelState | None) -> ModelState | None:
        """Return this process's part of `whole_rows`."""
        if state is None:
            return None
        count = state.batch_size // self.data_size
        return state[count * self.data_rank : count * (self.data_rank + 1)].to(self.device)


class Objective(nn.Module):
    """`lm_loss` as a module, so that DDP sees the whole of it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> LossOutput:
        """Return lm_loss(model, ...)."""
        return lm_loss(self.model, *args, **options)


@contextmanager
def join(config: TrainConfig) -> Iterator[Team]:
    """Yield the team that `config.parallel` asks for; a process group is made, and ended, for it.

    Raises:
        ConfigError: torchrun and `parallel` disagree, a size does not divide, or the device is not
            there.
    """
    device = device_of(config.device)
    mine = config.parallel != "none" and not dist.is_initialized()
    if config.parallel != "none":
        if mine and "RANK" not in os.environ:
            raise ConfigError(
                f"parallel is {config.parallel!r}, but this is one process of its own; start it "
                "with `torchrun --nproc-per-node N -m metastate train ...`, or leave parallel out"
            )
        if device.type == "cuda" and device.index is None:
            device = device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(device)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but parallel is 'none'; "
            "choose --parallel ddp (a copy each) or fsdp (each a part)"
        )
    size = _size(config)
    _check(config, size)
    if mine:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun's store outlives a restart, and in it the addresses of processes that died.
            # Counts of restarts are the same on one machine only; docs/scaling.md for several.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
        start_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        rank = dist.get_rank() if config.parallel != "none" else 0
        team = Team(config, device, rank, size)
        yield team
        team.group = team.files = team.saver = None
    finally:
        if mine:
            end_groups()


def led(group: dist.ProcessGroup | None, job: Callable[[], object]) -> None:
    """Run `job` in the first process of `group`, while the others wait; None: here.

    Raises:
        Exception: what the job raised there. TrainingError: the same, in the other processes.
    """
    if group is None:
        job()
        return
    error: Exception | None = None
    if group.rank() == 0:
        try:
            job()
        except Exception as cause:
            error = cause
    told = [None if error is None else (str(error), is_full(error))]
    dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
    if error is not None:
        raise error
    if told[0] is not None:
        text, full = told[0]
        raise TrainingError(text) from (OSError(errno.ENOSPC, text) if full else None)


def start_group(backend: str, **how: Any) -> None:
    """Start the process group, so that `end_groups` can end it; arguments of init_process_group."""
    # Imported later, its functions would have the group as a default, and hold it for ever.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group(backend, **how)


def end_groups() -> None:
    """End all process groups and their threads.

    A thread of gloo that wakes late lets go of the tensors of its last exchange. Should Python be
    leaving by then, that aborts the process, and torchrun takes a finished run for a failed one.
    The threads end with their group, and it with what holds it, as a DDP module in a cycle.
    """
    gc.collect()
    dist.destroy_process_group()


def _launch() -> str:
    """Return what tells torchrun's command from others: its --rdzv-id, its process, or both.

    The process is not the same on the machines of a run, of which any may have the first rank next.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if name and (one_machine or name == "none"):  # "none": nobody gave it a name
        name += f" of process {os.getppid()}"
    return name


def _size(config: TrainConfig) -> int:
    if config.parallel == "none":
        return 1
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])


def _check(config: TrainConfig, size: int) -> None:
    """Raise ConfigError unless `size` processes can do what `config` asks for."""
    columns = config.context_parallel
    sharded = config.parallel in ("fsdp", "hsdp")
    if columns > 1 and config.parallel == "none":
        raise ConfigError("context_parallel needs several processes: add --parallel ddp or fsdp")
    if config.shard_size and config.parallel != "hsdp":
        raise ConfigError("shard_size is of parallel 'hsdp'; leave it out, or choose that")
    for name, value, parts, what in (
        ("context_parallel", size, columns, "must divide the number of processes"),
        ("context", config.context, columns, "must be a multiple of context_parallel"),
        ("batch_size", config.batch_size, size // columns, "must be a multiple of the processes"),
        ("shard_size", size, config.shard_size or 1, "must divide the number of processes"),
    ):
        if value % max(1, parts):
            given = parts if value == size else value
            raise ConfigError(
                f"{name} is {given}, with {size} processes and context_parallel {columns}; it "
                f"{what}" + (" / context_parallel" if name == "batch_size" else "")
            )
    if sharded and config.growth:
        raise ConfigError(
            f"a model sharded by {config.parallel!r} cannot grow inside a run; use --parallel ddp, "
            "or end the run, `metastate grow` its checkpoint and start from that"
        )
    if sharded and config.old_lr_scale != 1:
        raise ConfigError(
            f"old_lr_scale slows regions of weights, which {config.parallel!r} splits; use "
            "--parallel ddp, or leave old_lr_scale out"
        )


def device_of(name: str) -> torch.device:
    """Return the device `name`; ConfigError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as cause:  # no such backend in this torch
        reason = str(cause).split("\n")[0].split(". ")[0]  # what follows may fill a screen
        raise ConfigError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def is_sharded(x: Tensor) -> bool:
    """Return whether x is a DTensor, of which this process holds a part."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """Return all of x, which every process must ask for."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def placed(x: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor x laid out and split as `like` is, in memory of its own."""
    if not is_sharded(like):
        # Laid out as `like`, which a mapped file's tensor is not.
        return torch.empty_like(like, requires_grad=False).copy_(x)
    from torch.distributed.tensor import distribute_tensor

    mesh, places = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(x.to(like.dtype), mesh, places, src_data_rank=None).clone()


def save_sharded(
    folder: Path, files: dict[str, dict[str, Tensor]], group: dist.ProcessGroup
) -> None:
    """Write tensors that the processes of `group` hold in parts as whole safetensors files.

    Every process writes its parts at once, by Distributed Checkpoint; then the first one puts them
    together, one tensor in memory at a time. No file holds a pickle.

    Args:
        folder: where all processes can write.
        files: name of a file -> its tensors.
        group: of a backend that takes CPU tensors.

    Raises:
        CheckpointError: the disk is full or the system refuses. OSError, TrainingError: so it is
            for the first process alone, when it puts files in place; as `led`.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    number = {key: i for i, tensors in enumerate(files.values(), 1) for key in tensors}
    # Scalars as vectors of one: putting together drops what has no axis.
    tensors = {k: x if x.dim() else x.view(1) for own in files.values() for k, x in own.items()}
    try:
        writer = dcp.HuggingFaceStorageWriter(
            str(folder), number, save_distributed=True, enable_consolidation=True
        )
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as cause:
        reasons = {
            str(e): e
            for e in (e[0] if isinstance(e, tuple) else e for e in cause.failures.values())
        }
        raise CheckpointError("; ".join(sorted(reasons))) from next(iter(reasons.values()))

    def finish() -> None:
        for i, name in enumerate(files, 1):
            os.replace(folder / f"model-{i:05d}-of-{len(files):05d}.safetensors", folder / name)
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder / "sharded")
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)

    led(group, finish)
