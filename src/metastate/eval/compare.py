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

from metastate.config import to_dict
from metastate.data.files import alone_in, in_turn, write_json
from metastate.data.loader import BatchSource, PreparedData
from metastate.errors import BusyError, ConfigError, DataError, DivergedError
from metastate.eval.loss import evaluate, held_out
from metastate.eval.plots import read_log
from metastate.eval.runs import check_settings, settings, source
from metastate.eval.suite import Cell, Suite, plan, sketch
from metastate.model.io import load
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.train.checkpoint import find_checkpoint, has_run
from metastate.train.trainer import LOG, train

RESULTS, SCORE = "results.json", "score.json"
CLAIM = "claim"  # folder in a cell's, held from the look to the score; training holds the other
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
        ConfigError: the suite is impossible, or a cell in `out` was run with other settings, on
            other data, or at another learning rate than the sweep chose.
        DataError: no such data.
        KeyboardInterrupt: a signal came; the running cell has its checkpoint, the same call goes
            on.
    """
    out = Path(out)
    source()  # that of now, not of the hour when the first cell ends
    cells = plan(suite, out, match_params=match_params)
    work = {id(c): max(1, round(c.flops / 1e9)) for c in cells}
    told = False
    while left := [c for c in cells if not _finished(c)]:
        worked = False
        for cell in left:
            sweeping = any(c.rate is not None and not _finished(c) for c in left)
            if _finished(cell) or (cell.rate is None and sweeping):
                continue
            if cell.rate is None:
                _check_rates(suite, cells)
            done = sum(work[id(c)] for c in cells if _finished(c))

            def show(step: int, steps: int, cell: Cell = cell, done: int = done, **f: str) -> None:
                if progress is not None:
                    now = done + round(work[id(cell)] * step / steps)
                    progress(now, sum(work.values()), cell=cell.title, **f)

            rate = chosen_rate(suite, cells, cell)
            try:
                with alone_in(cell.folder / CLAIM, error=DataError):
                    if _finished(cell):  # by the one that held it until now
                        continue
                    _run(cell, rate, show)
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
    if not (cell.folder / SCORE).exists():
        return False
    score = _score(cell)
    check_settings(score["run"], cell.train, "choose another --out, or remove that folder")
    # What an older score does not say counts as equal.
    data = score.get("data", cell.data)
    if data != cell.data and data not in PreparedData.open(cell.train.data).fingerprints:
        raise ConfigError(
            f"{cell.folder} was run on other data than {cell.train.data} holds now; choose another "
            "--out, or remove that folder"
        )
    tokens = score.get("test_tokens", cell.test_tokens)
    if tokens != cell.test_tokens:
        raise ConfigError(
            f"{cell.folder} was scored on {tokens:,} tokens of test text, the suite says "
            f"{cell.test_tokens:,}; remove its {SCORE} to score it again, or choose another --out"
        )
    return True


def _check_rates(suite: Suite, cells: list[Cell]) -> None:
    """Refuse a finished cell whose learning rate is not the one that a finished sweep chose."""
    for cell in cells:
        sweep = [c for c in cells if c.rate is not None and c.model == cell.model]
        if cell.rate is not None or not all(map(_finished, [cell, *sweep])):
            continue
        used, chosen = _score(cell)["lr"], chosen_rate(suite, cells, cell)
        if not math.isclose(used, chosen):
            raise ConfigError(
                f"{cell.folder} was run with lr {used:g}, the sweep chose {chosen:g}; remove that "
                "folder to run it again, or go back to the lr.values that it was run with"
            )


def _score(cell: Cell) -> dict[str, Any]:
    """Return what a finished cell's score.json says."""
    return json.loads((cell.folder / SCORE).read_text(encoding="utf-8"))


def _run(cell: Cell, rate: float, show: Callable[..., None]) -> None:
    """Train a cell to its end and score it; a run that diverged is a result too."""
    run = replace(cell.train, lr=rate, min_lr=rate * cell.train.min_lr / cell.train.lr)
    data = PreparedData.open(run.data)
    made = {"run": settings(cell.train), "lr": rate, "data": cell.data, "source": source()}
    try:
        result = train(run, evaluate=held_out(data, run), progress=show, resume=has_run(run.out))
    except DivergedError as error:
        write_json(cell.folder / SCORE, made | {"failed": str(error)})
        return
    if result.interrupted is not None:
        raise KeyboardInterrupt
    model = load(cell.folder)
    model.backend = run.backend
    has_test = bool(data.record["splits"].get("test", {}).get("tokens"))
    split = "test" if has_test else "valid"
    score = made | {"split": split}
    if cell.rate is None:
        score["test_tokens"] = cell.test_tokens
        score |= evaluate(
            model.to(run.device),
            data.split(split),
            mode="windowed",
            context=run.context,
            by_domain=True,
            limit_tokens=cell.test_tokens,
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
    failed = "failed" in _score(cell)
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
        {"suite", "environment", "data", "cells", "sweep": [...], "rows": [...]}; a row has model,
        size, seed, lr, parameters, tokens, flops, loss (nats a token of the test split),
        bits_per_byte, domains, state_bytes, tokens_per_s, config, curve, and what it was made of:
        data (fingerprint), test_tokens and source, None where an older score does not say.

    Raises:
        ConfigError: as `compare`.
    """
    _check_rates(suite, cells)
    rows, sweep = [], []
    for cell in cells:
        if not _finished(cell):
            continue
        score = _score(cell)
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
                "data": cell.data if "data" in score else None,  # _finished has seen that it is
                "test_tokens": score.get("test_tokens"),
                "source": score.get("source"),
                "config": to_dict(cell.config),
                "curve": points,
            }
        )
    results = {
        "suite": to_dict(suite),
        "environment": environment(),
        "data": cells[0].data,
        "cells": sum(c.rate is None for c in cells),
        "sweep": sweep,
        "rows": rows,
    }
    with in_turn(out, error=DataError):  # whoever ran the other cells may end in the same moment
        write_json(out / RESULTS, results, error=DataError)
    return results


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge speeds by, and the sources that report."""
    return {
        **source(),
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
