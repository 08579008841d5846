"""Checkpoints of a run, whole at every moment, and everything that an exact resume needs.

OUT/checkpoints/step-00000200/   model.safetensors, config.json   what metastate.load opens
                                 optimizer.safetensors            moments by parameter name
                                 state.safetensors                carried state, with --carry-state
                                 trainer.json                     TrainerState
OUT/last, OUT/best               links to the newest one and to the one of the best held-out loss;
                                 where links are refused, files that name those folders

A folder is written under a temporary name, every file fsynced, and only then renamed: a folder
with its final name is whole. The links are replaced by rename, old folders deleted last. The files
are the same whatever processes wrote them, so any others can go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from metastate.config import ModelConfig, TrainConfig
from metastate.data.files import atomic_write, sync_folder, write_json, write_tensors
from metastate.errors import (
    CheckpointError,
    ConfigError,
    StateError,
    TrainingError,
    is_full,
    remedy,
)
from metastate.mapping import from_dict, to_dict
from metastate.model import io
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from metastate.model.state import ModelState
from metastate.train.distributed import is_sharded, led, placed, save_sharded
from metastate.train.optim import GroupedAdamW, moments, step_count

# Where things are, what is reported, and what computes a run. The last changes rounding alone, and
# a machine may lack what another had.
FREE = {
    *("data", "out", "log_every", "tensorboard", "async_checkpoint"),
    *("device", "backend", "compile", "activation_checkpointing"),
    *("parallel", "shard_size", "context_parallel"),
}
# What may differ between a run and its continuation: its end besides, and when it is looked at.
MAY_CHANGE = FREE | {"steps", "valid_every", "valid_tokens", "checkpoint_every"}
NO_RECORD = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what broken JSON raises
VERSION = 1
MODEL, MOMENTS, CARRIED = "model.safetensors", "optimizer.safetensors", "state.safetensors"
RUN = "run.json"  # the settings of the run, written before its first step


@dataclass(frozen=True)
class TrainerState:
    """Where a run is; with weights, moments and carried state all that the next step depends on.

    Attributes:
        step: finished updates.
        tokens: tokens read so far.
        config: the settings that made it.
        data: fingerprint of the prepared data.
        best_step: the step of the lowest held-out loss, None before the first validation.
        best_loss: that loss, nats a token.
        window_nats: sum of the training losses since the last line of the log.
        window_tokens: over how many tokens.
    """

    step: int
    tokens: int
    config: TrainConfig
    data: str
    best_step: int | None = None
    best_loss: float | None = None
    window_nats: float = 0.0
    window_tokens: int = 0
    version: int = VERSION


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, of one moment of a run.

    Attributes:
        trainer: everything but tensors.
        weights: of the model, by name; parts of them where the model is sharded.
        moments: of the optimizer, likewise.
        record: what config.json says.
        carried: the state that the next batch continues from, of all rows.
        model: the model's shape.
    """

    trainer: TrainerState
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    record: dict[str, Any]
    carried: ModelState | None
    model: ModelConfig

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        optimizer: GroupedAdamW,
        trainer: TrainerState,
        carried: ModelState | None = None,
        *,
        copy: bool = False,
    ) -> Snapshot:
        """Take what is there now; with `copy` into memory of its own, so that training may go on.

        Args:
            model: as it is after trainer.step updates.
            optimizer: of `make_optimizer`.
            trainer: everything else.
            carried: the state that the next batch continues from.
            copy: see above; the memory of the weights and moments is taken once more.
        """

        def kept(x: Tensor) -> Tensor:
            return x.detach().to("cpu", copy=copy)

        weights = {k: kept(x) for k, x in model.state_dict().items()}
        own = {k: kept(x) for k, x in moments(optimizer).items()}
        carried = carried if carried is None else carried.map(kept)
        return cls(trainer, weights, own, io.record(model), carried, model.config)


def write_checkpoint(
    out: str | os.PathLike[str], snapshot: Snapshot, group: dist.ProcessGroup | None = None
) -> Path:
    """Write a checkpoint, point `last` (and `best`) to it, and delete those nobody needs.

    Kept are the newest, and the model of the best.

    Args:
        out: folder of the run.
        snapshot: what to write.
        group: the processes that hold the snapshot's parts and call this together; None where this
            one has everything. All must see the same folder.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: the disk is full or the system refuses, in any of the processes; the
            checkpoint before is whole.
    """
    trainer = snapshot.trainer
    final = checkpoint_of(out, trainer.step)
    folder = final.parent
    temporary = folder / f".{final.name}.tmp"
    leads = group is None or group.rank() == 0

    def begin() -> None:
        assert not final.exists(), f"{final} is whole already"
        for leftover in folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)

    def finish() -> None:
        io.write_record(snapshot.record, temporary)
        if snapshot.carried is not None:
            snapshot.carried.save(temporary / CARRIED, snapshot.model)
        write_json(temporary / "trainer.json", to_dict(trainer))
        os.replace(temporary, final)
        sync_folder(folder)
        _publish(Path(out), trainer)

    try:
        led(group, begin)  # nobody writes into what is being cleared away
        if group is None:
            io.write_weights(snapshot.weights, temporary / MODEL)
            write_tensors(temporary / MOMENTS, snapshot.moments)
        else:
            save_sharded(temporary, {MODEL: snapshot.weights, MOMENTS: snapshot.moments}, group)
        led(group, finish)
    except (OSError, CheckpointError, StateError, TrainingError) as cause:
        if leads:
            shutil.rmtree(temporary, ignore_errors=True)
        before = find_checkpoint(out)
        kept = f"{before} is whole" if before else "there was none before"
        why = "the disk is full" if is_full(cause) else str(cause)
        goes_on = "then go on with --resume" if before else "then --resume begins again"
        raise TrainingError(
            f"the checkpoint of step {trainer.step} could not be written: {why}; {kept}; "
            f"{remedy(cause)}, {goes_on}"
        ) from cause
    return final


class Writer:
    """Writes one checkpoint at a time, in the caller or, `beside` it, in a thread.

    In a thread, an error is raised by the next call; a write waits for the one before.
    """

    def __init__(self, beside: bool) -> None:
        self.pool = ThreadPoolExecutor(1, "checkpoint") if beside else None
        self.under_way: Future[Any] | None = None

    def write(self, job: Callable[[], Any]) -> None:
        """Run `job`, which writes a checkpoint.

        Raises:
            TrainingError: this one, or beside the caller the one before, could not be written.
        """
        self.wait()
        if self.pool is None:
            job()
        else:
            self.under_way = self.pool.submit(job)

    def wait(self) -> None:
        """Return when everything is written; TrainingError if it could not be."""
        job, self.under_way = self.under_way, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Return when nothing writes any more, however that went."""
        if self.pool is not None:
            self.pool.shutdown()


def load_checkpoint(
    folder: Path, model: LanguageModel, optimizer: GroupedAdamW, *, repair: bool = True
) -> tuple[TrainerState, ModelState | None]:
    """Load a checkpoint of a run into `model` and `optimizer`, in place.

    A sharded model takes its parts out of the whole tensors, whatever processes wrote them.

    Args:
        folder: the checkpoint, one that `find_checkpoint` names.
        model: of the checkpoint's shape.
        optimizer: of `make_optimizer` on it.
        repair: set the links right where a kill came between the folder's rename and theirs; one
            process does it.

    Returns:
        The trainer's state and the carried state, if there was one.

    Raises:
        CheckpointError: it is damaged, newer than this program or of another model; or the links
            cannot be set right.
    """
    trainer = read_trainer(folder)
    tensors, own = io.read_tensors(folder / MODEL), model.state_dict()
    io.check_tensors(tensors, own, folder / MODEL)
    model.load_state_dict(
        {k: placed(x, own[k]) if is_sharded(own[k]) else x for k, x in tensors.items()}
    )
    _load_moments(optimizer, folder / MOMENTS)
    state_file = folder / CARRIED
    try:
        carried = ModelState.load(state_file, model) if state_file.exists() else None
    except StateError as cause:
        raise CheckpointError(f"{cause}") from None
    if repair:
        out = folder.parents[1]
        try:
            _publish(out, trainer)
        except (OSError, TrainingError) as cause:
            raise CheckpointError(
                f"{out} cannot be written, where `last` is to lead to {folder} ({cause}); "
                f"{remedy(cause)}, or go on in a copy of that folder"
            ) from cause
    return trainer, carried


def find_checkpoint(out: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the newest checkpoint of a run, None before the first."""
    return max(_checkpoints(out), key=step_of, default=None)


def checkpoint_of(out: str | os.PathLike[str], step: int) -> Path:
    """Return the folder that the checkpoint of `step` has, whether it is there or not."""
    return Path(out) / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def _checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """Return the folders that `checkpoint_of` names; others, as a user's copy, are not ours."""
    found = (Path(out) / "checkpoints").glob("step-*")
    return [f for f in found if re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", f.name)]


def read_trainer(folder: Path) -> TrainerState:
    """Return the TrainerState in a checkpoint's folder.

    Raises:
        CheckpointError: it is missing, broken or newer than this program.
    """
    file = folder / "trainer.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] > VERSION:
            raise CheckpointError(
                f"{file} has version {data['version']}, this program reads up to {VERSION}; "
                "install a newer metastate"
            )
        return from_dict(TrainerState, data, "trainer")
    except (*NO_RECORD, ConfigError) as cause:
        raise CheckpointError(f"{file} is missing or broken ({cause})") from None


def has_run(out: str | os.PathLike[str]) -> bool:
    """Return whether a run was started in `out`."""
    return (Path(out) / RUN).exists() or find_checkpoint(out) is not None


def launch_of(out: str | os.PathLike[str]) -> str:
    """Return the `Team.launch` that began the run in `out`, or last went on with it; "" if none."""
    try:
        return json.loads((Path(out) / RUN).read_text(encoding="utf-8"))["launch"]
    except NO_RECORD:  # of a run from before this was written
        return ""


def saved_config(out: str | os.PathLike[str]) -> TrainConfig:
    """Return the settings of the run in `out`, so that resuming it needs nothing but its folder.

    Raises:
        ConfigError: no run was started there. CheckpointError: its record is broken.
    """
    file = Path(out) / RUN
    if not file.exists():
        raise ConfigError(f"there is no run in {out}; leave out --resume, or correct --out")
    try:
        return from_dict(TrainConfig, json.loads(file.read_text(encoding="utf-8"))["train"])
    except (*NO_RECORD, ConfigError) as cause:
        raise CheckpointError(f"{file} is broken ({cause})") from None


def _publish(out: Path, trainer: TrainerState) -> None:
    """Point the links to what `trainer` says, then delete what they no longer need."""
    keep = {"last": trainer.step, "best": trainer.best_step}
    for link, step in keep.items():
        if step is not None:
            _point(out / link, checkpoint_of("", step))
    sync_folder(out)
    for folder in _checkpoints(out):
        if step_of(folder) not in keep.values():
            shutil.rmtree(folder, ignore_errors=True)
        elif step_of(folder) != trainer.step:
            for name in (MOMENTS, CARRIED):
                with contextlib.suppress(OSError):
                    (folder / name).unlink(missing_ok=True)


def _point(link: Path, folder: Path) -> None:
    """Let `link` lead to `folder`, a path from where it lies: a link, or a file that holds it."""
    if link.is_dir() and not link.is_symlink():
        _remove_copy(link)
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder, target_is_directory=True)
    except OSError:  # exFAT, SMB, Windows: io.checkpoint_folder reads the file
        atomic_write(link, folder.as_posix().encode())
    else:
        os.replace(temporary, link)


def _remove_copy(folder: Path) -> None:
    """Remove a checkpoint that lies where a link was, as in a copy of a run made with `cp -rL`.

    Raises:
        CheckpointError: none of `checkpoints` has the same files.
    """
    held = [p.name for p in folder.iterdir()]
    copies = (filecmp.cmpfiles(folder, c, held, shallow=False) for c in _checkpoints(folder.parent))
    if not any(len(same) == len(held) for same, _, _ in copies):
        raise CheckpointError(
            f"{folder} is a folder, not a link, and holds what none of {folder.parent}/checkpoints "
            "does; move it elsewhere"
        )
    shutil.rmtree(folder)


def _load_moments(optimizer: GroupedAdamW, file: Path) -> None:
    tensors = io.read_tensors(file)
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            found = {k: tensors.pop(f"{k}:{name}", None) for k in ("step", "exp_avg", "exp_avg_sq")}
            state = {k: v for k, v in found.items() if v is not None}
            if len(state) not in (0, len(found)):
                raise CheckpointError(f"{file} lacks a part of the moments of {name}")
            for key in state.keys() - {"step"}:
                if state[key].shape != p.shape:
                    raise CheckpointError(
                        f"{file}: {key} of {name} is {list(state[key].shape)}, the model needs "
                        f"{list(p.shape)}"
                    )
                state[key] = placed(state[key], p)
            if state:
                state["step"] = step_count(state["step"], p, group)
            optimizer.state[p] = state
    if tensors:
        raise CheckpointError(f"{file} holds {min(tensors)!r}, which this model does not have")


def check_same_run(trainer: TrainerState, config: TrainConfig, data: str, out: str) -> None:
    """Check that `config` continues the run that `trainer` is of.

    Args:
        trainer: of the run's checkpoint.
        config: what the command asks for.
        data: `fingerprint` of the prepared data that `config` names.
        out: the run's folder, for messages.

    Raises:
        ConfigError: a setting that shapes the weights differs, or the end is passed already; the
            message names it.
    """
    before, now = _meant(trainer.config), _meant(config)
    for field in dataclasses.fields(TrainConfig):
        name = field.name
        if before[name] != now[name] and name not in MAY_CHANGE:
            old, new = getattr(trainer.config, name), getattr(config, name)
            raise ConfigError(
                f"the run in {out} has {name} {old!r}, this command asks for {new!r}; leave "
                f"it out to resume, or start another run with another --out"
            )
    if config.steps < trainer.step:
        raise ConfigError(
            f"the run in {out} has made {trainer.step:,} steps, this command asks for "
            f"{config.steps:,}; give --steps {trainer.step} or more, or start another with another "
            "--out"
        )
    if trainer.data != data:
        raise ConfigError(
            f"{config.data} is not the data that the run in {out} was trained on; give that with "
            "--data, or start another run with another --out"
        )


def continued(trainer: TrainerState, config: TrainConfig) -> TrainerState:
    """Return where a run is that goes on with `config`, which `check_same_run` has checked.

    A held-out loss of other tokens is no measure of those to come: the next one is the best.
    """
    same = trainer.config.valid_tokens == config.valid_tokens
    return dataclasses.replace(
        trainer, config=config, best_loss=trainer.best_loss if same else None
    )


def _meant(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as they act, which a record can spell otherwise or be too old to have."""
    return to_dict(config) | {"model": to_dict(preset(config.preset, **config.model))}
