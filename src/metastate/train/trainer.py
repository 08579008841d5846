"""The training loop: data in a fixed order, exact resume, no step on non-finite numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metastate import __version__
from metastate.config import GrowthStep, TrainConfig
from metastate.data.files import write_json
from metastate.data.loader import Batch, BatchSource, PreparedData
from metastate.errors import ConfigError, DivergedError
from metastate.mapping import to_dict
from metastate.model import io
from metastate.model.lm import LanguageModel, arithmetic, ask_as
from metastate.model.loss import IGNORE
from metastate.model.presets import preset
from metastate.model.state import ModelState
from metastate.ops import resolve_backend
from metastate.train.checkpoint import (
    MOMENTS,
    RUN,
    Snapshot,
    TrainerState,
    Writer,
    check_same_run,
    checkpoint_of,
    continued,
    find_checkpoint,
    has_run,
    launch_of,
    load_checkpoint,
    read_trainer,
    step_of,
    write_checkpoint,
)
from metastate.train.distributed import Team, join, whole
from metastate.train.log import RunLog, cut_log
from metastate.train.memory import keep_freed_memory
from metastate.train.optim import (
    adopt_moments,
    learning_rate,
    make_optimizer,
    moments,
    whole_moments,
)
from metastate.train.signals import signals

LOG = "log.jsonl"
WALL_CLOCK = ("tokens_per_s", "seconds")  # fields of the log that differ between equal runs
Moments = dict[str, Tensor]
# (model, growth, whole moments, carried state, seed) -> the same three of the grown model
Grow = Callable[
    [LanguageModel, GrowthStep, Moments, ModelState | None, int],
    tuple[LanguageModel, Moments, ModelState | None],
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: folder of the run; its newest checkpoint is out/last, the best one out/best.
        step: finished updates.
        tokens: tokens read.
        loss: training loss of the last line of the log (of the last step, in state tuning), nats a
            token, None if none was written.
        best_loss: lowest held-out loss, None without validation.
        best_step: its step.
        interrupted: number of the signal that ended the run early, None if it is complete.
        signal: number of the signal that came, also in the last step of a complete run, which ends
            what was to follow; None if none came.
    """

    out: Path
    step: int
    tokens: int
    loss: float | None
    best_loss: float | None
    best_step: int | None
    interrupted: int | None
    signal: int | None


def train(
    config: TrainConfig,
    *,
    evaluate: Callable[[LanguageModel], dict[str, Any]] | None = None,
    progress: Callable[..., None] | None = None,
    resume: bool = False,
    model: LanguageModel | None = None,
    grow: Grow | None = None,
) -> TrainResult:
    """Train a model on prepared data.

    The folder config.out gets run.json (all settings), log.jsonl, checkpoints, and the links `last`
    and `best`. On the CPU the weights, the optimizer's state and the log (but for WALL_CLOCK) after
    N steps are bit for bit the same however often the run was killed and resumed on the way.

    The first SIGINT, SIGTERM or SIGHUP finishes the step and writes a checkpoint; the second kills.

    With config.parallel every process of torchrun calls this with the same arguments; the first one
    writes. After a failure torchrun starts all again, and they go on from the last checkpoint.

    Args:
        config: all settings.
        evaluate: scores the model on held-out text; its result has "nats_per_token" and goes into
            the log whole. Called every config.valid_every steps and at the end, by all processes
            together; it must return the same to each.
        progress: called as progress(step, steps, loss=..., tokens_per_s=...) after every step.
        resume: continue the run in config.out.
        model: train this one in place of config.preset with fresh weights; config.model is then
            not used.
        grow: makes the model larger as config.growth says; metastate.growth.grow_in_training.

    Raises:
        ConfigError: a setting is impossible, or config.out does not fit `resume`.
        DataError: the data is missing, broken, too short or of another vocabulary.
        CheckpointError: the checkpoint to resume from is damaged, or processes see others.
        BusyError: another process trains in config.out.
        TrainingError: the loss or a gradient is not finite (DivergedError), or the disk is full;
            the last checkpoint is whole and the weights of this step were not written to it.
    """
    if not config.out:
        raise ConfigError("out is missing; name a folder for checkpoints and log")
    if config.growth and grow is None:
        raise ConfigError("config.growth needs train(..., grow=metastate.growth.grow_in_training)")
    keep_freed_memory()
    with join(config) as team:
        return _train(_Run(config, evaluate, progress, grow, team), model, resume)


def _train(run: _Run, model: LanguageModel | None, resume: bool) -> TrainResult:
    """Run the whole of `run`; apart from `train`, so that none of it outlives the team."""
    with run.team.alone_in(run.out):  # what is in there stays so from here on
        run.find(resume)
        run.use(*run.first_model(model))
        run.restore()
        run.start()
        with signals(run.interrupt):
            return run.loop()


class _Run:
    """One call of `train`: what it holds open and where it is."""

    def __init__(
        self,
        config: TrainConfig,
        evaluate: Callable[[LanguageModel], dict[str, Any]] | None,
        progress: Callable[..., None] | None,
        grow: Grow | None,
        team: Team,
    ) -> None:
        self.config, self.evaluate, self.grow = config, evaluate, grow
        self.team, self.device = team, team.device
        self.progress = progress if team.rank == 0 else None
        self.out = Path(config.out)
        self.data = data = PreparedData.open(config.data)
        self.source = BatchSource(
            data.split("train"),
            config.batch_size,
            config.context,
            config.seed,
            carry_state=config.carry_state,
        )
        self.at = TrainerState(step=0, tokens=0, config=config, data=data.fingerprint)
        team.check_same(to_dict(config) | {"text": data.fingerprint, "version": __version__})
        self.writer = Writer(config.async_checkpoint)
        self.resumes = False
        self.found: Path | None = None  # the checkpoint to go on from
        self.carried: ModelState | None = None
        self.growths = 0  # steps of config.growth that the model has made
        self.noted = 0  # number of the signal that came to this process
        self.signal: int | None = None  # of the one that ends the run, the same everywhere
        self.loss: float | None = None
        self.busy_s, self.busy_tokens = 0.0, 0

    def find(self, resume: bool) -> None:
        """Find the checkpoint to go on from: the newest that the first process sees.

        Raises:
            ConfigError: `out` is not what `resume` says it is. CheckpointError: another process
                does not see that checkpoint.
        """
        out = self.out
        newest = find_checkpoint(out)
        step = step_of(newest) if newest is not None else -1
        written = step >= 0 or ((out / LOG).exists() and (out / LOG).stat().st_size > 0)
        same = self.team.launch != "" and self.team.launch == launch_of(out)
        facts = (has_run(out), written, same, (out / "config.json").exists(), step)
        started, begun, ours, taken, step = map(int, self.team.everyone(*facts)[0])
        self.resumes = resume or (self.team.restarted and ours > 0)
        if started and begun and not self.resumes:  # what fell before its first line is begun anew
            raise ConfigError(
                f"{out} already holds a run; go on with it by --resume, or choose another --out"
            )
        if self.resumes and not started:
            raise ConfigError(f"there is no run in {out}; leave out --resume, or correct --out")
        if taken:
            raise ConfigError(f"{out} already holds a checkpoint; choose another --out")
        if self.resumes and step >= 0:
            self.found = checkpoint_of(out, step)
            self.team.check_shared(self.found, self.found.is_dir())

    def first_model(self, model: LanguageModel | None) -> tuple[LanguageModel, Moments]:
        """Return the model that the run begins or goes on with, and moments it brings along."""
        config, data, found = self.config, self.data, self.found
        if found is not None:  # its weights come later; its shape may have grown since the start
            info, at = io.read_config(found), read_trainer(found)
            check_same_run(at, config, data.fingerprint, config.out)
            # A checkpoint is written before the growth that is due at its step.
            self.growths = sum(g.step < at.step for g in config.growth)
            if model is None or model.config != info["model"]:
                given, model = model, LanguageModel(info["model"])
                if given is not None:
                    ask_as(given, model)
            io.adopt_record(model, info, found / "config.json")
        elif model is None and config.from_checkpoint:
            io.read_config(config.from_checkpoint)  # a preset's name is no checkpoint
            folder = io.pinned(config.from_checkpoint)
            model = io.load(folder)
            io.check_finite(model.state_dict(), folder)
            model.tokenizer_info = model.tokenizer_info or data.record["tokenizer"]
            if (folder / MOMENTS).exists():
                return model, whole_moments(io.read_tensors(folder / MOMENTS), model)
        elif model is None:
            torch.manual_seed(config.seed)
            fields = {"vocab_size": data.vocab_size} | config.model
            model = LanguageModel(preset(config.preset, **fields))
            model.tokenizer_info = data.record["tokenizer"]
        return model, {}

    def use(self, model: LanguageModel, known: Moments) -> None:
        """Train `model` from now on, the optimizer starting from the whole moments `known`."""
        config = self.config
        self.data.check_vocab(model.config.vocab_size, model.tokenizer_info)
        if config.carry_state and not model.recurrent:
            raise ConfigError(
                "carry_state needs a recurrent model; a transformer's cache would grow for ever"
            )
        if model.recurrent or model.surprise_memory is not None:  # others have no kernels to choose
            resolve_backend(config.backend, self.device)
        self.model = model.to(self.device, DTYPES[config.dtype]).train()
        self.model.backend = config.backend
        self.model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            for block in self.model.blocks:
                block.compile()
        self.team.shard(self.model)
        scale = config.growth[self.growths - 1].old_lr_scale if self.growths else None
        if scale is None:  # before its first growth nothing of a model is old
            scale = 1.0 if config.growth and not model.lineage else config.old_lr_scale
        self.optimizer = make_optimizer(self.model, config, scale)
        adopt_moments(self.optimizer, known)
        self.objective = self.team.objective(self.model)

    def restore(self) -> None:
        """Go back to the checkpoint; to the very start where there is none yet."""
        first = self.team.rank == 0
        if self.found is not None:
            folder, model, optimizer = self.found, self.model, self.optimizer
            at, carried = load_checkpoint(folder, model, optimizer, repair=first)
            self.at = continued(at, self.config)
            self.carried = self.team.own_rows(carried)
            self.team.check_shared(folder, at.step, at.tokens, at.window_nats)
        if self.resumes and first:  # growth due at this step is made and logged again
            cut_log(self.out / LOG, self.at.step)

    def start(self) -> None:
        """Open the logs, and write the settings and the vocabulary: the first process does."""
        self.log: RunLog | None = None
        if self.team.rank == 0:
            self.log = RunLog(self.out / LOG, self.at.step, self.config.tensorboard)
            settings = {"train": to_dict(self.config), "model": to_dict(self.model.config)}
            write_json(self.out / RUN, settings | {"launch": self.team.launch})
            self.data.tokenizer.save(self.out)  # the run can write text when its data is gone

    def interrupt(self, number: int) -> None:
        """Note that a signal came; the loop ends after the step, the same one everywhere."""
        self.noted = number

    def loop(self) -> TrainResult:
        """Run the steps that are left."""
        config, written = self.config, self.at.step
        try:
            while self.at.step < config.steps and self.signal is None:
                if self.at.step in [g.step for g in config.growth[self.growths :]]:
                    self.enlarge(config.growth[self.growths])
                begin = time.monotonic()
                figures = self.update()
                self.busy_s += time.monotonic() - begin
                self.busy_tokens += config.accumulate * config.batch_size * config.context
                done, last = self.at.step, self.at.step == config.steps
                if self.progress is not None:
                    speed = self.busy_tokens / max(self.busy_s, 1e-9)
                    shown = {"loss": f"{figures['nll']:.3f}", "tokens_per_s": f"{speed:,.0f}"}
                    self.progress(done, config.steps, **shown)
                if last or done % config.log_every == 0:
                    self.log_step(figures)
                better = (last or done % config.valid_every == 0) and self.validate()
                if last or better or done % config.checkpoint_every == 0:
                    self.save()
                    written = done
                self.signal = int(max(n for [n] in self.team.everyone(self.noted))) or None
            if self.at.step > written:
                self.save()
            self.team.write(self.writer.wait)
        finally:
            self.writer.close()  # before another process may have the folder
            if self.log is not None:
                self.log.close()
        at, came = self.at, self.signal or self.noted or None
        best, stopped = (at.best_loss, at.best_step), came if at.step < config.steps else None
        return TrainResult(self.out, at.step, at.tokens, self.loss, *best, stopped, came)

    def update(self) -> dict[str, float]:
        """Make one optimizer step of `accumulate` batches; return its figures."""
        config, step, team = self.config, self.at.step, self.team
        # Noise, where a model has any, is a function of the step too, so no generator is saved.
        torch.manual_seed((config.seed + 7919 * team.rank) * 1_000_003 + step)
        rows = (team.data_rank, team.data_size)
        first = step * config.accumulate
        batches = [self.source.batch(first + i, *rows) for i in range(config.accumulate)]
        counts = [int((team.columns(b.targets) != IGNORE).sum()) for b in batches]
        total = max(1, int(sum(count for [count] in team.everyone(sum(counts)))))
        nats = 0.0
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True), 1):
            with team.exchanging(self.objective, i == len(batches)):
                # Weighted by its tokens, so that the sum is the mean over all of them: gradients
                # are summed over batches and averaged over processes.
                nats += self.accumulate(batch, count * team.size / total) * count
        nats = sum(own for [own] in team.everyone(nats))
        parameters, norm = self.optimizer.gather()
        figures = {"nll": nats / total, "grad_norm": float(norm)}
        if not all(math.isfinite(x) for x in figures.values()):
            self.refuse(figures)
        figures["lr"] = learning_rate(step, config)
        self.optimizer.advance(parameters, norm, config.clip, figures["lr"])
        self.model.step += 1
        self.at = replace(
            self.at,
            step=step + 1,
            tokens=self.at.tokens + config.accumulate * config.batch_size * config.context,
            window_nats=self.at.window_nats + nats,
            window_tokens=self.at.window_tokens + total,
        )
        return figures

    def enlarge(self, growth: GrowthStep) -> None:
        """Grow the model, moments and carried state; log what it did to the loss."""
        assert self.grow is not None
        before, known = self.model, whole_moments(moments(self.optimizer), self.model)
        seed = self.config.seed * 1_000_003 + growth.step
        for p in self.optimizer.frozen:  # by the factor that held until now
            p.requires_grad_(True)
        model, known, self.carried = self.grow(before, growth, known, self.carried, seed)
        self.growths += 1
        self.use(model, known)
        both = (before, self.model)
        context = self.config.context
        record: dict[str, Any] = {
            "kind": "growth",
            "step": self.at.step,
            "tokens": self.at.tokens,
            "sizes": {k: v for k, v in growth.sizes().items() if v is not None},
            "parameters": [m.count_parameters()["total"] for m in both],
            "flops_per_token": [sum(m.flops_per_token(context)) for m in both],
        }
        if self.evaluate is not None:
            record["nats_per_token"] = [self.scores(m)["nats_per_token"] for m in both]
        self.write(record)

    def accumulate(self, batch: Batch, weight: float) -> float:
        """Add weight x the gradient of one batch; return its mean loss in nats a token."""
        config = self.config
        resets: Tensor | None = batch.resets
        if not config.document_reset:
            resets = None
            if batch.carry is not None:
                resets = torch.zeros_like(batch.resets)
                resets[:, 0] = ~batch.carry

        def own(x: Tensor) -> Tensor:
            return self.team.columns(x).to(self.device)

        with arithmetic(self.device, self.config.dtype):
            out = self.objective(
                own(batch.tokens),
                own(batch.targets),
                self.carried,
                resets=None if resets is None else own(resets),
                z_loss=config.z_loss,
                group=self.team.group,
            )
        (out.loss * weight).backward()
        if config.carry_state:
            self.carried = self.team.carried(out.state)
        # A loss that is not finite shows here even if only the z-loss or the KL term is to blame.
        return float(out.nll if torch.isfinite(out.loss) else out.loss.detach())

    def refuse(self, figures: dict[str, float]) -> None:
        """Stop before the weights are touched; say where the gradient is largest."""
        norms = {
            name: float(whole(p.grad.norm()))
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        order = sorted(norms, key=lambda n: (math.isfinite(norms[n]), -norms[n]))
        largest = ", ".join(f"{name} {norms[name]:.3g}" for name in order[:5])
        self.writer.wait()
        folder = find_checkpoint(self.out)
        if folder is not None:
            kept = f"the last good checkpoint is {folder}"
            again = f"go on from it: metastate train --from {self.out / 'last'}"
        else:
            kept, again = "no checkpoint was due yet", "start anew: metastate train"
        raise DivergedError(
            f"step {self.at.step + 1}: the loss is {figures['nll']:.4g}, the gradient's norm "
            f"{figures['grad_norm']:.4g}; the weights were left as they were and {kept}. Largest "
            f"gradients: {largest}. --resume would make the same steps again; {again} --data "
            f"{self.config.data} --out NEW ..., with a lower --lr, a longer --warmup or "
            "--dtype float32"
        )

    def log_step(self, figures: dict[str, float]) -> None:
        """Write the mean loss since the line before, and the figures of this step."""
        self.loss = self.at.window_nats / max(1, self.at.window_tokens)
        self.write(
            {
                "kind": "train",
                "step": self.at.step,
                "tokens": self.at.tokens,
                "loss": self.loss,
                "lr": figures["lr"],
                "grad_norm": figures["grad_norm"],
                "tokens_per_s": round(self.busy_tokens / max(self.busy_s, 1e-9), 1),
            }
        )
        self.at = replace(self.at, window_nats=0.0, window_tokens=0)
        self.busy_s, self.busy_tokens = 0.0, 0

    def validate(self) -> bool:
        """Score held-out text and log it; return whether it is the best loss so far."""
        if self.evaluate is None:
            return False
        scores = self.scores(self.model)
        self.write({"kind": "valid", "step": self.at.step, "tokens": self.at.tokens, **scores})
        loss = float(scores["nats_per_token"])
        if not loss < (math.inf if self.at.best_loss is None else self.at.best_loss):
            return False
        self.at = replace(self.at, best_step=self.at.step, best_loss=loss)
        return True

    def scores(self, model: LanguageModel) -> dict[str, Any]:
        """Score `model` on held-out text."""
        assert self.evaluate is not None
        with arithmetic(self.device, self.config.dtype), torch.no_grad():
            scores = self.evaluate(model)
        self.team.rest(model)
        model.train()
        return scores

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to the log, if this is the process that has it."""
        if self.log is not None:
            self.log.write(record)

    def save(self) -> None:
        """Write a checkpoint, after the log is safely on the disk."""
        if self.log is not None:
            self.log.sync()
        carried, saver = self.team.whole_rows(self.carried), self.team.saver

        def write() -> None:
            self.writer.wait()  # one copy in memory at a time
            copy = self.config.async_checkpoint
            snapshot = Snapshot.of(self.model, self.optimizer, self.at, carried, copy=copy)
            self.writer.write(lambda: write_checkpoint(self.out, snapshot, saver))

        self.team.write(write)
