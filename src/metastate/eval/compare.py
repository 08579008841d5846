"""Equal comparisons: a matrix of models x sizes x seeds on the same data, order and tokens.

Every cell of a suite is an ordinary training run in OUT/cells, so it resumes, and it is read back
from there: nothing but the disk decides what is done. Several processes may work on one OUT; each
takes cells that are free.

Learning rates: each model is run with every rate of `lr.values` at the smallest size on the first
seed for a share of the tokens; the best one on held-out text is carried to a size of width D as
lr (D_smallest / D)^exponent.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metastate import __version__
from metastate.config import TrainConfig, to_dict
from metastate.data.files import write_json
from metastate.data.loader import BatchSource, PreparedData
from metastate.errors import BusyError, ConfigError, DataError, DivergedError
from metastate.eval.loss import evaluate, held_out
from metastate.eval.plots import read_log
from metastate.eval.suite import Cell, Suite, plan, sketch
from metastate.model.io import load
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.train.checkpoint import find_checkpoint, has_run
from metastate.train.trainer import LOG, train

RESULTS, SCORE = "results.json", "score.json"
WAIT_S = 5.0  # between two looks at cells that another process is working on


def compare(
    suite: Suite,
    out: str | os.PathLike[str],
    *,
    match_params: bool = False,
    progress: Callable[..., None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run every cell that is not finished, then return what `collect` reads back.

    Args:
        suite: what to compare.
        out: folder; gets sweep/, cells/ and results.json. What it holds already counts, so a suite
            can be given more models, sizes and seeds later.
        match_params: fit every model to the size's count within 1 %.
        progress: called as progress(GFLOPs done, GFLOPs in all, cell=..., loss=...).
        say: told what happens.

    Raises:
        ConfigError: the suite is impossible, or a cell in `out` was run with other settings.
        DataError: no such data.
        KeyboardInterrupt: a signal came; the running cell has its checkpoint, the same call goes
            on.
    """
    out = Path(out)
    cells = plan(suite, out, match_params=match_params)
    work = {id(c): max(1, round(c.flops / 1e9)) for c in cells}
    told = False
    while left := [c for c in cells if not _finished(c)]:
        worked = False
        for cell in left:
            sweeping = any(c.rate is not None and not _finished(c) for c in left)
            if _finished(cell) or (cell.rate is None and sweeping):
                continue
            done = sum(work[id(c)] for c in cells if _finished(c))

            def show(step: int, steps: int, cell: Cell = cell, done: int = done, **f: str) -> None:
                if progress is not None:
                    now = done + round(work[id(cell)] * step / steps)
                    progress(now, sum(work.values()), cell=cell.title, **f)

            try:
                _run(cell, chosen_rate(suite, cells, cell), suite, show)
            except BusyError:
                continue
            worked = True
            say(f"{cell.title}: {_told(cell)}")
        if not worked:
            if not told:
                say(f"{len(left)} cells are being run by other processes; waiting for them")
            told = True
            time.sleep(WAIT_S)
    return collect(suite, cells, out)


def _told(cell: Cell) -> str:
    """Return how a finished cell ended."""
    loss = last_loss(cell)
    return f"{loss:.4f} nats a token of held-out text" if math.isfinite(loss) else "diverged"


def _finished(cell: Cell) -> bool:
    """Say whether a cell is run and scored; refuse one that was run with other settings."""
    file = cell.folder / SCORE
    if not file.exists():
        return False
    old, new = json.loads(file.read_text(encoding="utf-8"))["run"], _settings(cell)
    old = to_dict(TrainConfig()) | old  # a setting that came later had its default
    changed = [k for k in new if old.get(k) != new[k]]
    if changed:
        raise ConfigError(
            f"{cell.folder} was run with other settings ({changed[0]} {old.get(changed[0])!r}, now "
            f"{new[changed[0]]!r}); choose another --out, or remove that folder"
        )
    return True


def _settings(cell: Cell) -> dict[str, Any]:
    """Return the settings that decide what a run computes."""
    free = ("out", "data", "device", "backend", "compile", "log_every", "tensorboard")
    return {k: v for k, v in to_dict(cell.train).items() if k not in free}


def _run(cell: Cell, rate: float, suite: Suite, show: Callable[..., None]) -> None:
    """Train a cell to its end and score it; a run that diverged is a result too."""
    run = replace(cell.train, lr=rate, min_lr=rate * cell.train.min_lr / cell.train.lr)
    data = PreparedData.open(run.data)
    try:
        result = train(run, evaluate=held_out(data, run), progress=show, resume=has_run(run.out))
    except DivergedError as error:
        score = {"run": _settings(cell), "lr": rate, "failed": str(error)}
        write_json(cell.folder / SCORE, score)
        return
    if result.interrupted is not None:
        raise KeyboardInterrupt
    model = load(cell.folder)
    model.backend = run.backend
    has_test = bool(data.record["splits"].get("test", {}).get("tokens"))
    split = "test" if has_test else "valid"
    score = {"run": _settings(cell), "lr": rate, "split": split}
    if cell.rate is None:
        score |= evaluate(
            model.to(run.device),
            data.split(split),
            mode="windowed",
            context=run.context,
            by_domain=True,
            limit_tokens=suite.test_tokens,
        ).to_json()
    write_json(cell.folder / SCORE, score)


def chosen_rate(suite: Suite, cells: list[Cell], cell: Cell) -> float:
    """Return the learning rate of a cell: its own, or by the sweep and the rule of transfer."""
    if cell.rate is not None:
        return cell.rate
    sweep = [c for c in cells if c.rate is not None and c.model == cell.model]
    if not sweep:
        return cell.train.lr
    losses = {c.rate: last_loss(c) for c in sweep}
    best = min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        raise ConfigError(f"every learning rate of the sweep diverged for {cell.model}: {losses}")
    assert best is not None
    return best * (sweep[0].config.hidden_size / cell.config.hidden_size) ** suite.lr.exponent


def last_loss(cell: Cell) -> float:
    """Return the held-out loss that a run ended with; infinite if it diverged."""
    points = [row["nats_per_token"] for row in _valid_rows(cell)]
    failed = "failed" in json.loads((cell.folder / SCORE).read_text(encoding="utf-8"))
    return math.inf if failed or not points else points[-1]


def _valid_rows(cell: Cell) -> list[dict[str, Any]]:
    return [row for row in read_log(cell.folder / LOG) if row["kind"] == "valid"]


def curve(cell: Cell) -> list[dict[str, float]]:
    """Return a run's held-out losses with the tokens, FLOPs and training seconds until each.

    Seconds are those of the steps alone, summed over however many processes the run took.
    """
    per_token = cell.flops / cell.tokens
    points, tokens, seconds = [], 0, 0.0
    for row in read_log(cell.folder / LOG):
        if row["kind"] == "train":
            seconds += (row["tokens"] - tokens) / row["tokens_per_s"]
            tokens = row["tokens"]
        elif row["kind"] == "valid":
            points.append(
                {
                    "tokens": row["tokens"],
                    "flops": row["tokens"] * per_token,
                    "seconds": seconds,
                    "loss": row["nats_per_token"],
                }
            )
    return points


def collect(suite: Suite, cells: list[Cell], out: Path) -> dict[str, Any]:
    """Read finished cells back, write results.json, and return it.

    Returns:
        {"suite", "environment", "sweep": [...], "rows": [...]}; a row has model, size, seed, lr,
        parameters, tokens, flops, loss (nats a token of the test split), bits_per_byte, domains,
        state_bytes, tokens_per_s, config and curve.
    """
    rows, sweep = [], []
    for cell in cells:
        if not _finished(cell):
            continue
        score = json.loads((cell.folder / SCORE).read_text(encoding="utf-8"))
        if cell.rate is not None:
            loss = last_loss(cell)
            shown = loss if math.isfinite(loss) else None
            sweep.append({"model": cell.model, "lr": cell.rate, "loss": shown})
            continue
        points = [] if "failed" in score else curve(cell)
        model = sketch(cell.config)
        rows.append(
            {
                "model": cell.model,
                "size": cell.size,
                "seed": cell.seed,
                "lr": score["lr"],
                "parameters": cell.parameters,
                "tokens": cell.tokens,
                "flops": cell.flops,
                "loss": score.get("nats_per_token"),
                "failed": score.get("failed"),
                "bits_per_byte": score.get("bits_per_byte"),
                "domains": {n: d["nats_per_token"] for n, d in score.get("domains", {}).items()},
                "state_bytes": model.state_bytes(1, cell.train.context),
                "tokens_per_s": cell.tokens / points[-1]["seconds"] if points else None,
                "config": to_dict(cell.config),
                "curve": points,
            }
        )
    results = {
        "suite": to_dict(suite),
        "environment": environment(),
        "cells": sum(c.rate is None for c in cells),
        "sweep": sweep,
        "rows": rows,
    }
    write_json(out / RESULTS, results, error=DataError)
    return results


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge speeds by."""
    return {
        "metastate": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def estimate(cells: list[Cell]) -> dict[str, float]:
    """Return the seconds that each unfinished run will take, by timing one batch of its model.

    Runs of one model and size share a timing: loss and gradient of one batch, after a first one
    that is not counted.
    """
    speeds: dict[tuple[str, str], float] = {}
    out = {}
    for cell in cells:
        if _finished(cell):
            continue
        key, run = (cell.model, cell.size), cell.train
        if key not in speeds:
            batch = BatchSource(
                PreparedData.open(run.data).split("train"), run.batch_size, run.context, 0
            ).batch(0)
            model = LanguageModel(cell.config).to(run.device)
            model.backend = run.backend
            for _ in range(2):
                begin = time.monotonic()
                loss = lm_loss(
                    model,
                    batch.tokens.to(run.device),
                    batch.targets.to(run.device),
                    resets=batch.resets.to(run.device),
                ).loss
                loss.backward()
                float(loss.detach())
                speeds[key] = time.monotonic() - begin
        found = find_checkpoint(run.out)
        done = int(found.name.rpartition("-")[2]) if found is not None else 0
        out[cell.title] = speeds[key] * run.accumulate * (run.steps - done)
    return out
