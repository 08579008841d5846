"""New domains after growth: what the old slice's learning rate does to learning and forgetting.

    python recipes/growth_domains.py --text DIR_OF_PILELITE --out runs/growth-domains

Stage 1 trains D 128, 4 heads, 4 layers, N 32 on prose, dialogue and law. Stage 2 goes on with code
and mathematics alone, from the same checkpoint: not grown, or grown exactly to N 64 with the old
slice free, at a tenth of the learning rate, or frozen. Held-out loss of both halves is measured on
the way. Every run goes on where it was stopped; one of other settings or other data in its place is
refused. Bytes, batches of 8 x 256. The text is files named for their split (train.jsonl.xz, a
folder train) in any form that `metastate prepare` reads, of records whose meta.set is their domain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import metastate
from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.cli.progress import bar
from metastate.config import TrainConfig
from metastate.data.files import atomic_write
from metastate.data.loader import PreparedData
from metastate.data.prepare import prepare
from metastate.data.sources import find_sources
from metastate.errors import ConfigError, DataError
from metastate.eval.loss import evaluate
from metastate.eval.plots import read_log
from metastate.eval.runs import is_finished
from metastate.model.lm import LanguageModel
from metastate.train.checkpoint import has_run
from metastate.train.trainer import LOG, train

NEW = ("code", "math")
SMALL: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "num_layers": 4}
SMALL |= {"vocab_size": 256, "memory_heads": None}
ARMS: dict[str, tuple[int, float]] = {  # name: (N, old_lr_scale)
    "not grown": (32, 1.0),
    "grown, old free": (64, 1.0),
    "grown, old at 0.1": (64, 0.1),
    "grown, old frozen": (64, 0.0),
}


def halves(text: Path, out: Path) -> tuple[Path, Path]:
    """Prepare the old and the new domains apart, or find them so; return both folders."""
    if not text.exists():
        raise DataError(f"no such folder: {text}")
    folders, sources = (out / "data-old", out / "data-new"), find_sources([text])
    for folder in folders:
        raw = out / f"{folder.name}-text"
        for split in ("train", "valid", "test"):
            target = raw / f"{split}.jsonl"
            own = [
                json.dumps({"text": document.text, "meta": {"set": document.domain}}) + "\n"
                for source in sources
                if source.split == split
                for document in source.read()
                if (document.domain in NEW) == (folder is folders[1])
            ]
            if not own and split != "test":
                domains = f"{' or '.join(NEW)}, " if folder is folders[1] else "other domains, "
                raise DataError(
                    f"the {split} split of {text} has no records of {domains}named in meta.set; "
                    "give a folder of train.* and valid.* as `metastate prepare` reads them"
                )
            content = "".join(own).encode()
            if not target.exists():
                atomic_write(target, content, error=DataError)
            elif target.read_bytes() != content:
                raise ConfigError(f"{target} is of other text than {text}; choose another --out")
        prepare([raw], "bytes", folder)
    return folders


def run(out: Path, data: Path, both: tuple[Path, Path], args: Any, **settings: Any) -> Path:
    """Train one stage to its end, or find it finished."""
    every = max(1, args.steps // 12)
    config = TrainConfig(
        data=str(data),
        out=str(out),
        steps=args.steps,
        batch_size=8,
        context=256,
        lr=args.lr,
        min_lr=args.lr / 20,
        warmup=20,
        valid_every=every,
        checkpoint_every=every,
        valid_tokens=args.valid_tokens,
        **settings,
    )

    def score(model: LanguageModel) -> dict[str, Any]:
        old, new = (
            evaluate(
                model,
                PreparedData.open(folder).split("valid"),
                mode="windowed",
                context=256,
                limit_tokens=config.valid_tokens,
            ).nats_per_token
            for folder in both
        )
        return {"nats_per_token": new, "old_domains": old}

    if not is_finished(config):
        print(f"== {out.name}")
        with bar("train", "steps") as show:
            result = train(config, evaluate=score, progress=show, resume=has_run(out))
        if result.signal is not None:
            raise SystemExit("stopped; the same command goes on")
    return out


def cells(both: tuple[Path, Path], seed: int, args: Any) -> list[dict[str, Any]]:
    """Run stage 1 and every arm of stage 2; return the points of each arm."""
    out = Path(args.out)
    first = run(
        out / f"stage1-{seed}",
        both[0],
        both,
        args,
        preset="metastate-tiny",
        model=SMALL,
        seed=seed,
        schedule="constant",  # stage 2 goes on from it, so nothing is annealed away
    )
    rows = []
    for name, (size, scale) in ARMS.items():
        slug = name.replace(",", "").replace(" ", "-")
        start = out / f"start-{size}-{seed}"
        if not start.exists():
            model = metastate.load(first)
            grown = model if size == 32 else metastate.grow(model, head_size=size, seed=seed)
            metastate.save(grown, start)
        stage = run(
            out / f"{slug}-{seed}",
            both[1],
            both,
            args,
            from_checkpoint=str(start),
            old_lr_scale=scale,
            seed=seed + 1000,
            schedule="wsd",
        )
        before = [row for row in read_log(first / LOG) if row["kind"] == "valid"][-1]
        points = [row for row in read_log(stage / LOG) if row["kind"] == "valid"]
        curve = [
            {"tokens": row["tokens"], "new": row["nats_per_token"], "old": row["old_domains"]}
            for row in [before | {"tokens": 0}, *points]
        ]
        rows.append({"arm": name, "seed": seed, "curve": curve})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the ends of all arms as Markdown."""

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    start = [row["curve"][0] for row in rows if row["arm"] == rows[0]["arm"]]
    ends = {"before stage 2": start} | {
        name: [row["curve"][-1] for row in rows if row["arm"] == name] for name in ARMS
    }
    lines = [
        f"| stage 2 ({len(start)} seeds) | new domains | old domains | forgotten |",
        "|---|---|---|---|",
    ]
    for name, points in ends.items():
        lost = [p["old"] - s["old"] for p, s in zip(points, start, strict=True)]
        new, old = (cell([p[key] for p in points]) for key in ("new", "old"))
        lines.append(f"| {name} | {new} | {old} | {cell(lost)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw the mean curves of both halves over stage 2."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"new": "new domains (trained on now)", "old": "old domains (trained on before)"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name in ARMS:
            curves = [row["curve"] for row in rows if row["arm"] == name]
            mean = [statistics.mean(p[key] for p in ps) for ps in zip(*curves, strict=True)]
            axes.plot([p["tokens"] for p in curves[0]], mean, "o-", ms=3, lw=1.5, label=name)
        axes.set_title(title)
        axes.set_xlabel("tokens of stage 2")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss (nats a byte)")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    """Run every arm of every seed, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="folder with train.* and valid.*")
    parser.add_argument("--out", default="runs/growth-domains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=240, help="of each stage")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--valid-tokens", type=positive, default=16384, help="of each half")
    args = parser.parse_args()
    both = halves(Path(args.text), Path(args.out))
    rows = [row for seed in args.seeds for row in cells(both, seed, args)]
    (Path(args.out) / "results.json").write_text(json.dumps(rows, indent=1))
    draw(rows, Path(args.out) / "growth-domains.png")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
