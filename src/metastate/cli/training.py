"""`metastate train`: a run with a bar, validation and a curve."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from typing import Any

from metastate.cli.options import settings_of
from metastate.cli.progress import bar, log, print_json
from metastate.config import TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import ConfigError, DataError
from metastate.eval.loss import held_out
from metastate.eval.plots import loss_curve
from metastate.growth import grow_in_training, grown_config
from metastate.mapping import from_dict, merge, to_dict
from metastate.model.io import read_config
from metastate.model.presets import preset
from metastate.train.checkpoint import saved_config
from metastate.train.distributed import is_first
from metastate.train.trainer import LOG, TrainResult, train

CURVE = "loss.png"


def run_train(args: argparse.Namespace) -> int:
    """`metastate train`: one run, from settings to checkpoint, log and curve."""
    settings = settings_of(args)
    if args.resume and (out := from_dict(TrainConfig, {"out": settings.get("out", "")}).out):
        settings = merge(to_dict(saved_config(out)), settings)
    elif settings.get("from_checkpoint") and (unused := {"preset", "model"} & settings.keys()):
        raise ConfigError(
            f"--from brings its own model, so {min(unused)} has no meaning; leave one of them out"
        )
    config = from_dict(TrainConfig, settings)
    for name in ("data", "out"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; see `metastate train --help`")
    result = train_with_bar(config, args.resume)
    if not is_first():
        return 0
    if args.json:
        print_json(to_dict(result) | {"out": str(result.out)})
    if result.interrupted is not None:
        name = signal.Signals(result.interrupted).name
        log(f"stopped by {name} after step {result.step:,}; go on with --resume")
        # torchrun would start again what ends with an error.
        return 128 + result.interrupted if config.parallel == "none" else 0
    return 0


def check_schedule(config: TrainConfig) -> None:
    """Refuse growth that is impossible before the run begins, not at its step."""
    if config.from_checkpoint:
        model = read_config(config.from_checkpoint)["model"]
    else:
        model = preset(config.preset, **config.model)
    for growth in config.growth:
        model = grown_config(model, init=growth.init, **growth.sizes())


def train_with_bar(config: TrainConfig, resume: bool) -> TrainResult:
    """Run `train` with a progress bar and periodic validation; draw the curve at its end."""
    if config.growth and not resume:  # what a resumed run began from may be gone
        check_schedule(config)
    with bar("train", "steps") as show:
        result = train(
            config,
            evaluate=validation(config),
            progress=show,
            resume=resume,
            grow=grow_in_training,
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
