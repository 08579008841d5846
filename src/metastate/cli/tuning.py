"""`metastate tune-state`: train the state that documents start from."""

from __future__ import annotations

import argparse
import signal

from metastate.cli.models import load_model
from metastate.cli.progress import bar, log, print_json
from metastate.cli.training import validation
from metastate.config import TrainConfig
from metastate.mapping import to_dict
from metastate.train.tune import tune

SETTINGS = (
    *("data", "out", "steps", "batch_size", "context", "accumulate", "schedule", "warmup"),
    *("clip", "seed", "device", "dtype", "valid_every", "valid_tokens", "checkpoint_every"),
)
LR = {"tokens": 0.3, "state": 1.0}  # what did best in the first hundred steps (docs/results.md)


def run_tune_state(args: argparse.Namespace) -> int:
    """Tune, with a bar and the held-out loss before and after."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    lr = LR[args.what] if args.lr is None else args.lr
    config = TrainConfig(
        **settings, from_checkpoint=args.checkpoint, lr=lr, min_lr=lr / 10, z_loss=0.0
    )
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
    if result.interrupted is not None:
        name = signal.Signals(result.interrupted).name
        log(f"stopped by {name} after step {result.step:,}; go on with --resume")
        return 128 + result.interrupted
    return 0
