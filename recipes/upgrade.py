"""A trained RWKV-7 gets Meta-State layers: what that is worth against training on as it is.

    metastate prepare DIR_OF_PILELITE --tokenizer bytes --out runs/pilelite-bytes
    python recipes/upgrade.py --data runs/pilelite-bytes --out runs/upgrade --seeds 0 1 2

An rwkv7-tiny (vocabulary of the data) is trained, then each cell trains on from its weights and
moments, all on the same further text in the same order. Every run goes on where it was stopped;
one of other settings or other data in its place is refused. `results.json` holds every figure; the
table is on standard output.

    continued          the RWKV-7 itself
    beside frozen      a Meta-State layer beside every feed-forward layer, only the new is trained
    beside slowed      the same, what was there at a tenth of the learning rate
    beside free        the same, everything at the full rate
    replaced frozen    a Meta-State layer in every feed-forward layer's place, only that is trained
    replaced slowed    the same, what was there at a tenth of the learning rate
    replaced free      the same, everything at the full rate
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metastate.cli import exit_code
from metastate.cli.growing import write
from metastate.cli.options import positive
from metastate.cli.training import train_with_bar
from metastate.config import TrainConfig
from metastate.data.loader import PreparedData
from metastate.eval.loss import held_out
from metastate.eval.runs import is_finished
from metastate.growth import logits_change, upgrade
from metastate.model.io import checkpoint_folder, load
from metastate.train.checkpoint import has_run
from metastate.train.optim import make_optimizer

# name: (upgraded how: None, "beside" or "replaced"; old_lr_scale)
CELLS: dict[str, tuple[str | None, float]] = {
    "continued": (None, 1.0),
    "beside frozen": ("beside", 0.0),
    "beside slowed": ("beside", 0.1),
    "beside free": ("beside", 1.0),
    "replaced frozen": ("replaced", 0.0),
    "replaced slowed": ("replaced", 0.1),
    "replaced free": ("replaced", 1.0),
}
BATCH, CONTEXT, WARM = 8, 256, 20


def settings(args: argparse.Namespace, out: Path, steps: int, seed: int, lr: float) -> TrainConfig:
    """Return what every run of this recipe shares."""
    every = max(1, steps // 8)
    return TrainConfig(
        preset="rwkv7-tiny",
        model={"vocab_size": PreparedData.open(args.data).vocab_size},
        data=args.data,
        out=str(out),
        steps=steps,
        batch_size=BATCH,
        context=CONTEXT,
        lr=lr,
        min_lr=lr / 20,
        schedule="wsd",
        warmup=WARM,
        seed=seed,
        valid_every=every,
        checkpoint_every=every,
        valid_tokens=args.valid_tokens,
    )


def trained(config: TrainConfig, what: str) -> Path:
    """Train a run to its end, or find it finished; return its last checkpoint."""
    if not is_finished(config):
        print(f"== {what}, seed {config.seed}", flush=True)
        if train_with_bar(config, resume=has_run(config.out)).signal is not None:
            raise SystemExit("stopped; the same command goes on")
    return checkpoint_folder(config.out)


def upgraded(base: Path, out: Path, kind: str) -> Path:
    """Write the upgraded checkpoint, or find it written; return its folder."""
    if not out.exists():
        model = load(base)
        write(out, base, model, upgrade(model, replace=kind == "replaced"))
    return out


def cell(name: str, base: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one cell on one trained parent; return its figures."""
    kind, scale = CELLS[name]
    out = Path(args.out)
    start = base if kind is None else upgraded(base, out / f"{kind}-{seed}", kind)
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    # Another seed than the parent's: further text, not the same again.
    config = settings(args, folder, args.more_steps, 1000 + seed, args.more_lr)
    config = replace(config, from_checkpoint=str(start), old_lr_scale=scale, model={})
    end = trained(config, name)
    data = PreparedData.open(args.data)
    score = held_out(data, config)
    parent, model = load(base), load(start)
    text = next(d.tokens for d in data.split("valid").documents() if len(d.tokens) >= CONTEXT)
    tokens = torch.from_numpy(text[:CONTEXT].astype("int64"))[None]
    optimizer = make_optimizer(load(start), config)
    return {
        "cell": name,
        "seed": seed,
        "parameters": model.count_parameters()["total"],
        "trained": sum(p.numel() for g in optimizer.param_groups for p in g["params"]),
        "logits_moved": logits_change(parent, model, tokens)["relative"],
        "tokens": args.more_steps * BATCH * CONTEXT,
        "nats": [score(m)["nats_per_token"] for m in (parent, model, load(end))],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown, the mean over the seeds and its deviation."""

    def mean(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    lines = [
        "| cell | parameters | trained | loss before | after the upgrade | after "
        f"{rows[0]['tokens']:,} more tokens | logits moved |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["cell"] for row in rows):
        own = [row for row in rows if row["cell"] == name]
        losses = " | ".join(mean([row["nats"][i] for row in own]) for i in range(3))
        moved = max(row["logits_moved"] for row in own)
        counts = f"{own[0]['parameters']:,} | {own[0]['trained']:,}"
        lines.append(f"| {name} | {counts} | {losses} | {moved:.2g} |")
    return "\n".join(lines)


def main() -> None:
    """Train the parents, run every cell of every seed, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="prepared text")
    parser.add_argument("--out", default="runs/upgrade")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=600, help="of the parent")
    parser.add_argument("--more-steps", type=positive, default=300, help="of each cell")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--more-lr", type=float, default=1e-3)
    parser.add_argument("--valid-tokens", type=positive, default=32768)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    args = parser.parse_args()
    out = Path(args.out)
    if args.dry_run:
        a_step = BATCH * CONTEXT
        for seed in args.seeds:
            print(f"parent {seed}: {args.steps * a_step:,} tokens, then {', '.join(args.cells)}")
        total = len(args.seeds) * (args.steps + len(args.cells) * args.more_steps) * a_step
        print(f"{args.more_steps * a_step:,} tokens a cell, {total:,} in all, into {out}")
        return
    rows = []
    for seed in args.seeds:
        base = trained(settings(args, out / f"parent-{seed}", args.steps, seed, args.lr), "parent")
        rows += [cell(name, base, seed, args) for name in args.cells]
        (out / "results.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
