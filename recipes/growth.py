"""Growth against training from scratch, on bytes of mixed real text.

    metastate prepare DIR_OF_PILELITE --tokenizer bytes --out runs/pilelite-bytes
    python recipes/growth.py --data runs/pilelite-bytes --out runs/growth --seeds 0 1 2

Every cell is a run that goes on where it was stopped; one of other settings or other data in its
place is refused. Figures: `growth.png` and the tables on
standard output; `results.json` holds every point. D 128, 4 heads, 4 layers, vocabulary 256.

    grown          N 32 -> 64 at half of the steps -> 128 at three quarters, new entries exact
    grown early    the same, grown at a quarter and at half of the steps
    grown random   the same as grown, what must be zero for exactness is normal with std 0.02
    grown tokens   the same and 64 parameter tokens a head from the first growth on
    scratch        N 128 from the start, the same tokens in all, the same parameter count
    scratch short  N 128 from the start, the tokens of grown's last stage only
    small          N 32 to the end
    tokenformer *  80 / 320 slots -> 160 / 640 at half of the steps: done right, and as released
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.cli.training import train_with_bar
from metastate.config import GrowthStep, TrainConfig
from metastate.eval.plots import read_log
from metastate.eval.runs import is_finished
from metastate.model.io import load
from metastate.train.checkpoint import has_run
from metastate.train.trainer import LOG

SMALL: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "num_layers": 4}
SMALL |= {"vocab_size": 256, "memory_heads": None}
RANKS = dict.fromkeys(("decay_rank", "icl_rate_rank", "value_rank"), 32)  # those of N 32
BATCH, CONTEXT, WARM = 8, 256, 20


def cells(steps: int) -> dict[str, dict[str, Any]]:
    """Return the settings of every cell."""
    first, second = steps // 2, steps * 3 // 4
    wide = {"model": SMALL | RANKS | {"head_size": 128}}

    def grown(
        init: str, tokens: int | None = None, at: tuple[int, int] = (first, second)
    ) -> dict[str, Any]:
        growth = (
            GrowthStep(at[0], head_size=64, parameter_tokens=tokens, init=init, warmup=WARM),  # type: ignore[arg-type]
            GrowthStep(at[1], head_size=128, init=init, warmup=WARM),  # type: ignore[arg-type]
        )
        return {"model": SMALL, "steps": steps, "growth": growth}

    def tokenformer(init: str) -> dict[str, Any]:
        step = GrowthStep(first, attention_slots=160, ffn_size=640, init=init, warmup=WARM)  # type: ignore[arg-type]
        model = {"vocab_size": 256}
        return {"preset": "tokenformer-tiny", "model": model, "steps": steps, "growth": (step,)}

    return {
        "grown": grown("zero"),
        "grown early": grown("zero", at=(steps // 4, first)),
        "grown random": grown("random"),
        "grown tokens": grown("zero", 64),
        "scratch": wide | {"steps": steps},
        "scratch short": wide | {"steps": steps - second},
        "small": {"model": SMALL, "steps": steps},
        "tokenformer right": tokenformer("zero"),
        "tokenformer released": tokenformer("released"),
    }


def curve(out: Path, flops: float) -> list[dict[str, float]]:
    """Return the validation points of a run, with the training FLOPs spent until each."""
    points, spent, tokens = [], 0.0, 0
    for row in read_log(out / LOG):
        spent, tokens = spent + flops * (row["tokens"] - tokens), row["tokens"]
        if row["kind"] == "growth":
            flops = row["flops_per_token"][1]
        elif row["kind"] == "valid":
            points.append({"tokens": tokens, "flops": spent, "nats": row["nats_per_token"]})
    return points


def run(name: str, settings: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one cell to its end, or find it finished; return its curve and its jumps."""
    out = Path(args.out) / f"{name.replace(' ', '-')}-{seed}"
    every = max(1, args.steps // 24)
    config = TrainConfig(
        **{"preset": "metastate-tiny"} | settings,
        data=args.data,
        out=str(out),
        batch_size=BATCH,
        context=CONTEXT,
        lr=args.lr,
        min_lr=args.lr / 20,
        schedule="wsd",
        warmup=WARM,
        seed=seed,
        valid_every=every,
        checkpoint_every=every,
        valid_tokens=args.valid_tokens,
    )
    if not is_finished(config):
        print(f"== {name}, seed {seed}")
        if train_with_bar(config, resume=has_run(out)).signal is not None:
            raise SystemExit("stopped; the same command goes on")
    model = load(out)
    flops = sum(model.flops_per_token(CONTEXT))
    jumps = [row for row in read_log(out / LOG) if row["kind"] == "growth"]
    start = jumps[0]["flops_per_token"][0] if jumps else flops
    return {
        "cell": name,
        "seed": seed,
        "parameters": model.count_parameters()["total"],
        "curve": curve(out, start),
        "jumps": [{"sizes": row["sizes"], "nats": row["nats_per_token"]} for row in jumps],
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: end of each run, then the jumps."""

    def mean(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    names = list(dict.fromkeys(row["cell"] for row in rows))
    lines = [
        "| cell | parameters | tokens | training FLOPs | held-out nats a byte |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        own = [row for row in rows if row["cell"] == name]
        end = own[0]["curve"][-1]
        nats = mean([row["curve"][-1]["nats"] for row in own])
        size = f"{own[0]['parameters']:,} | {end['tokens']:,} | {end['flops']:.3g}"
        lines.append(f"| {name} | {size} | {nats} |")
    lines += ["", "| cell | growth | loss before | loss after |", "|---|---|---|---|"]
    for name in names:
        own = [row for row in rows if row["cell"] == name]
        for i, jump in enumerate(own[0]["jumps"]):
            before, after = (mean([row["jumps"][i]["nats"][j] for row in own]) for j in (0, 1))
            sizes = ", ".join(f"{key} {n}" for key, n in jump["sizes"].items())
            lines.append(f"| {name} | {sizes} | {before} | {after} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw the mean curves of our cells against tokens and against training FLOPs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("tokens", "flops"), strict=True):
        for name in dict.fromkeys(row["cell"] for row in rows):
            if name.startswith("tokenformer"):
                continue
            runs = [row["curve"] for row in rows if row["cell"] == name]
            nats = [
                statistics.mean(p["nats"] for p in points) for points in zip(*runs, strict=True)
            ]
            xs = [point[key] for point in runs[0]]
            axes.plot(xs, nats, "o-", ms=3, lw=1.5, label=f"{name} (seeds: {len(runs)})")
        axes.set_xlabel({"tokens": "training tokens", "flops": "training FLOPs"}[key])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss (nats a byte)")
    figure.axes[0].set_ylim(top=2.6)
    figure.axes[0].legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    """Run every cell of every seed, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="mixed text, prepared as bytes")
    parser.add_argument("--out", default="runs/growth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--valid-tokens", type=positive, default=32768)
    parser.add_argument("--cells", nargs="+", choices=cells(4), help="only these")
    args = parser.parse_args()
    wanted = cells(args.steps)
    rows = [
        run(name, wanted[name], seed, args) for seed in args.seeds for name in args.cells or wanted
    ]
    out = Path(args.out)
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    draw(rows, out / "growth.png")
    print(tables(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
