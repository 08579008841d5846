"""`metastate train` and `tune-state`: runs with a bar and validation, of weights or of a state."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from metastate.cli.models import load_model
from metastate.cli.options import flags_of, settings_of
from metastate.cli.progress import bar, log, print_json
from metastate.config import ModelConfig, TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import CheckpointError, ConfigError, DataError
from metastate.eval.loss import held_out
from metastate.eval.plots import loss_curve
from metastate.growth import grow_in_training, grown_config
from metastate.mapping import from_dict, merge, to_dict
from metastate.model.io import checkpoint_folder, read_config
from metastate.model.lm import sketch
from metastate.model.presets import preset
from metastate.train.checkpoint import find_checkpoint, saved_config, step_of
from metastate.train.distributed import is_first
from metastate.train.optim import learning_rate
from metastate.train.trainer import LOG, TrainResult, train
from metastate.train.tune import tune

CURVE = "loss.png"
LR = {"tokens": 0.3, "state": 1.0}  # what did best in the first hundred steps (docs/results.md)


def run_train(args: argparse.Namespace) -> int:
    """`metastate train`: one run, from settings to checkpoint, log and curve."""
    settings, saved = settings_of(args), None
    if args.resume:
        out = from_dict(TrainConfig, {"out": settings.get("out", "")}).out
        if not out:
            raise ConfigError("--out is missing: the folder of the run that --resume goes on with")
        saved = saved_config(out)
        if not (settings.get("data") or os.path.exists(saved.data)):
            raise ConfigError(
                f"the run in {out} was started with --data {saved.data}, which is not there from "
                "here; say with --data where it is"
            )
        settings = merge(to_dict(saved), settings)
    elif settings.get("from_checkpoint") and (unused := {"preset", "model"} & settings.keys()):
        raise ConfigError(
            f"--from brings its own model, so {min(unused)} has no meaning; leave one of them out"
        )
    config = from_dict(TrainConfig, settings)
    for name in ("data", "out"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; see `metastate train --help`")
    if is_first():
        say_plan(config, saved)
    try:
        result = train_with_bar(config, args.resume)
    except CheckpointError as error:
        best, last = (checkpoint_folder(Path(config.out, name)) for name in ("best", "last"))
        same = last.exists() and best.exists() and os.path.samefile(best, last)
        if same or not (args.resume and (best / "config.json").exists()):
            raise
        raise CheckpointError(
            f"{error}. To begin another run with the weights of its best checkpoint: --from {best} "
            "with another --out, and no --resume"
        ) from None
    if not is_first():
        return 0
    if args.json:
        print_json(to_dict(result) | {"out": str(result.out)})
    code = exit_code(result)
    return code if config.parallel == "none" else 0  # torchrun starts again what ends with an error


def exit_code(result: TrainResult) -> int:
    """Return the exit code of a run, 0 where it came to its end; say where it was stopped."""
    if result.interrupted is None:
        return 0
    name = signal.Signals(result.interrupted).name
    log(f"stopped by {name} after step {result.step:,}; go on with --resume")
    return 128 + result.interrupted


def first_model(config: TrainConfig, **fields: Any) -> ModelConfig:
    """Return the model that a run begins with; `fields` are what a preset's gets where unsaid."""
    if config.from_checkpoint:
        return cast(ModelConfig, read_config(config.from_checkpoint)["model"])
    return preset(config.preset, **fields | config.model)


def say_plan(config: TrainConfig, saved: TrainConfig | None) -> None:
    """Say what will be trained, and how long; `saved` are the settings of a run that goes on."""
    found, data = find_checkpoint(config.out), PreparedData.open(config.data)
    done = step_of(found) if saved and found else 0
    if saved and found:
        model = read_config(found)["model"]
    else:
        model = first_model(config, vocab_size=data.vocab_size)
    counts, threads = sketch(model).count_parameters(), torch.get_num_threads()
    log(
        f"{model.architecture} of width {model.hidden_size} and depth {model.num_layers}: "
        f"{counts['total']:,} parameters, {counts['non_embedding']:,} without embedding and head; "
        f"{config.dtype} on {config.device}, {threads} thread{'s' if threads > 1 else ''}"
    )
    rows = config.batch_size * config.accumulate
    tokens = config.steps * rows * config.context
    share = tokens / data.split("train").num_tokens
    passes = f"{share:.1f} times" if share >= 1 else f"{share:.1%} of"
    left = f"steps {done + 1:,} to {config.steps:,}"
    if done >= config.steps:
        left = f"none left after {config.steps:,} steps"
    log(
        f"{left} of {rows} x {config.context:,} tokens: "
        f"{tokens:,} tokens in all, {passes} the training text"
    )
    if saved and saved.steps != config.steps and config.schedule != "constant":
        rates = [learning_rate(done, c) for c in (saved, config)]
        log(
            f"the {config.schedule} schedule is laid anew over {config.steps:,} steps in place of "
            f"{saved.steps:,}: a learning rate of {rates[1]:.3g} now in place of {rates[0]:.3g}"
        )
    if config.warmup >= config.steps:
        log(f"warning: the warm-up of {config.warmup:,} steps is not over when the run ends")


def train_with_bar(config: TrainConfig, resume: bool) -> TrainResult:
    """Run `train` with a progress bar and periodic validation; draw the curve at its end."""
    if config.growth and not resume:  # what a resumed run began from may be gone
        model = first_model(config)
        for growth in config.growth:  # what is impossible is refused now, not at its step
            model = grown_config(model, init=growth.init, **growth.sizes())
    with bar("train", "steps") as show:
        result = train(
            config, evaluate=validation(config), progress=show, resume=resume, grow=grow_in_training
        )
    if not is_first():
        return result
    log(f"{result.step:,} steps, {result.tokens:,} tokens; checkpoint {result.out / 'last'}")
    if result.best_loss is not None:
        log(f"best held-out loss {result.best_loss:.4f} nats/token at step {result.best_step:,}")
    try:
        loss_curve(result.out / LOG, result.out / CURVE, str(result.out))
        log(f"loss curve {result.out / CURVE}")
    except (ConfigError, DataError) as error:  # a missing figure must not fail a finished run
        log(f"no loss curve: {error}")
    return result


def validation(config: TrainConfig) -> Callable[..., dict[str, Any]] | None:
    """Return what scores the model on the valid split, or None where there is no such split."""
    data = PreparedData.open(config.data)
    if not data.has("valid"):
        if is_first():
            log(f"{config.data} has no valid split: training goes on without validation")
        return None
    return held_out(data, config)


def run_tune_state(args: argparse.Namespace) -> int:
    """Tune, with a bar and the held-out loss before and after."""
    lr = LR[args.what] if args.lr is None else args.lr
    own = {"from_checkpoint": args.checkpoint, "lr": lr, "min_lr": lr / 10, "z_loss": 0.0}
    config = TrainConfig(**flags_of(args) | own)
    model = load_model(args.checkpoint, args)
    with bar("tune", "steps") as show:
        result = tune(
            model,
            config,
            what=args.what,
            parameter_tokens=args.parameter_tokens,
            evaluate=validation(config),
            progress=show,
            resume=args.resume,
        )
    log(f"{result.step:,} steps, {result.tokens:,} tokens; {result.out}, {result.file_bytes:,} B")
    if result.before is not None and result.best_loss is not None:
        log(
            f"held-out loss {result.before:.4f} nats/token before, {result.best_loss:.4f} with the "
            f"state of step {result.best_step:,}"
        )
        if result.best_loss >= result.before:
            log("the tuned state does not help on held-out text; try another --lr or more data")
    if args.json:
        print_json(to_dict(result))
    return exit_code(result)
