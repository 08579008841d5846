"""How far models are ahead of others as training goes on, across the suites that they came from.

    python recipes/lead.py --pair "2 M" CELL BASE --pair "0.25 M" CELL BASE --out lead.png

CELL and BASE are runs, the folders in OUT/cells of `metastate compare` among them, or their
log.jsonl; lead is 1 - loss / BASE's loss, held-out text, BASE's curve read off between its points.
(`compare` itself draws this for the runs of one suite.) `--positions CELL.json BASE.json`, of
`metastate eval CKPT --by-position --context 512 --json`, adds the lead by place in the window.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from metastate.cli import exit_code
from metastate.errors import ConfigError
from metastate.eval.plots import read_log

FEW = 500  # tokens of a group, the last of which a window may hardly reach


def curve(run: Path) -> np.ndarray:
    """Return [2, n], tokens read and held-out nats a token, of a run's folder or its log."""
    log = run / "log.jsonl" if run.is_dir() else run
    rows = [(r["tokens"], r["nats_per_token"]) for r in read_log(log) if r["kind"] == "valid"]
    if len(rows) < 2:
        raise ConfigError(f"{log} has no curve: {len(rows)} values of held-out text")
    return np.array(sorted(dict(rows).items())).T


def lead(own: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return [2, n], tokens and lead in % over the span that both were trained for, but 0."""
    tokens, loss = own[:, (own[0] > 0) & (own[0] >= base[0, 0]) & (own[0] <= base[0, -1])]
    return np.stack([tokens, 100 * (1 - loss / np.interp(tokens, *base))])


def by_position(path: Path) -> dict[float, float]:
    """Return nats a token by the middle place of each group, from 1; `FEW` tokens say nothing."""
    try:
        return {
            ((row["first"] + 1) * (row["last"] + 1)) ** 0.5: row["nats_per_token"]
            for row in json.loads(path.read_text())["windowed"]["positions"]
            if row["tokens"] >= FEW
        }
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise ConfigError(
            f"{path} is not what `metastate eval CKPT --by-position --context 512 --json` prints: "
            f"{cause!r}"
        ) from cause


def draw(lines: dict[str, np.ndarray], places: dict[float, float], out: Path) -> None:
    """Draw the leads by tokens and, where they are given, by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: Any
    count = 1 + bool(places)
    fig, panels = plt.subplots(
        1, count, figsize=(1.5 + 4.5 * count, 4.4), layout="constrained", squeeze=False
    )
    left, *rest = panels[0]
    for name, (tokens, percent) in lines.items():
        left.plot(tokens, percent, lw=1.4, label=name)
    left.set(xscale="log", xlabel="training tokens", ylabel="lead, % of the other's loss")
    left.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    for right in rest:
        right.plot(list(places), list(places.values()), marker="o", ms=3)
        right.set_xscale("log", base=2)
        right.set(xlabel="place in the window", ylabel="lead, % of the other's loss")
    for axis in panels[0]:
        axis.axhline(0, color="0.4", lw=0.8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)


def main() -> None:
    """Read the logs; write the picture and print the last value of every line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pair", nargs=3, action="append", required=True, metavar=("NAME", "CELL", "BASE")
    )
    parser.add_argument("--positions", nargs=2, type=Path, metavar=("CELL", "BASE"))
    parser.add_argument("--out", type=Path, default=Path("runs/lead.png"))
    args = parser.parse_args()
    lines = {name: lead(curve(Path(own)), curve(Path(base))) for name, own, base in args.pair}
    places = {}
    if args.positions:
        own, base = map(by_position, args.positions)
        places = {at: 100 * (1 - own[at] / base[at]) for at in own if at in base}
    draw(lines, places, args.out)
    for name, (tokens, percent) in lines.items():
        print(f"{name}: {percent[-1]:+.2f} % after {tokens[-1]:,.0f} tokens")


if __name__ == "__main__":
    sys.exit(exit_code(main))
