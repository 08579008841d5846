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
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from metastate.data.files import alone_in, in_turn, write_json
from metastate.data.loader import BatchSource, PreparedData
from metastate.errors import BusyError, ConfigError, DataError, DivergedError
from metastate.eval.doctor import environment
from metastate.eval.loss import evaluate, held_out
from metastate.eval.plots import read_log
from metastate.eval.runs import check_settings, settings, source
from metastate.eval.suite import Cell, Suite, plan, uneven
from metastate.mapping import to_dict
from metastate.model.io import load
from metastate.model.lm import LanguageModel, arithmetic, sketch
from metastate.model.loss import lm_loss
from metastate.train.checkpoint import find_checkpoint, has_run, saved_config, step_of
from metastate.train.trainer import DTYPES, LOG, train

RESULTS, SCORE = "results.json", "score.json"
SOURCES = "sources.json"  # of a cell: the sources that worked on it, in their order
CLAIM = "claim"  # folder in a cell's, held from the look to the score; training holds the other
LAPS, LAPS_S = 3, 5.0  # batches that an estimate times, and seconds after which it times no more
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
        DataError: no such data, or a damaged score.json.
        KeyboardInterrupt: a signal came; the running cell has its checkpoint, the same call goes
            on.
    """
    out = Path(out)
    source()  # that of now, not of the hour when the first cell ends
    cells = plan(suite, out, match_params=match_params)
    work = {id(c): max(1, round(c.flops / 1e9)) for c in cells}
    told = False
    while left := _left(cells):
        worked = False
        for cell in left:
            sweeping = any(c.rate is not None and not _finished(c) for c in left)
            if _finished(cell) or (cell.rate is None and sweeping) or _hopeless(cells, cell):
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
            loss = last_loss(cell)
            ended = f"{loss:.4f} nats a token of held-out text" if loss < math.inf else "diverged"
            say(f"{cell.title}: {ended}")
        if not worked:
            if not told:
                say(f"{len(left)} cells are being run by other processes; waiting for them")
            told = True
            time.sleep(WAIT_S)
    return collect(suite, cells, out)


def _left(cells: list[Cell]) -> list[Cell]:
    """Return the cells that are still to be run."""
    return [c for c in cells if not _finished(c) and _hopeless(cells, c) is None]


def _sweep(cells: list[Cell], cell: Cell) -> list[Cell]:
    """Return the runs that a cell's learning rate is found by."""
    return [c for c in cells if c.rate is not None and c.model == cell.model]


def _hopeless(cells: list[Cell], cell: Cell) -> str | None:
    """Return why a cell is not run, where every learning rate of its finished sweep diverged."""
    sweep = [] if cell.rate is not None else _sweep(cells, cell)
    if not sweep or any(not _finished(c) or math.isfinite(last_loss(c)) for c in sweep):
        return None
    rates = ", ".join(f"{c.rate:g}" for c in sweep)
    return f"every learning rate of the sweep diverged ({rates}); give lr.values lower ones"


def _finished(cell: Cell) -> bool:
    """Say whether a cell is run and scored; refuse one that was run with other settings."""
    if not (cell.folder / SCORE).exists():
        return False
    score = _score(cell)
    check_settings(score["run"], cell.train, "choose another --out, or remove that folder")
    # What an older score does not say counts as equal.
    data = score.get("data", cell.data)
    if data != cell.data:
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
        if cell.rate is not None or not all(map(_finished, [cell, *_sweep(cells, cell)])):
            continue
        used, chosen = _score(cell)["lr"], chosen_rate(suite, cells, cell)
        if not math.isclose(used, chosen):
            raise ConfigError(
                f"{cell.folder} was run with lr {used:g}, the sweep chose {chosen:g}; remove that "
                "folder to run it again, or go back to the lr.values that it was run with"
            )


def _score(cell: Cell) -> dict[str, Any]:
    """Return what a finished cell's score.json says.

    Raises:
        DataError: it cannot be read, or says nothing of the kind.
    """
    file = cell.folder / SCORE
    try:
        score = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no JSON, or no UTF-8
        score = None
    if not isinstance(score, dict) or not isinstance(score.get("run"), dict) or "lr" not in score:
        raise DataError(f"{file} is damaged; delete it, and compare will score the cell again")
    return score


def _run(cell: Cell, rate: float, show: Callable[..., None]) -> None:
    """Train a cell to its end and score it; a run that diverged is a result too."""
    run = replace(cell.train, lr=rate, min_lr=rate * cell.train.min_lr / cell.train.lr)
    if has_run(run.out):  # the suite or a preset may have changed since
        begun = to_dict(saved_config(run.out))
        check_settings(begun, run, "choose another --out, or remove that folder")
    data = PreparedData.open(run.data)
    made = {"run": settings(cell.train), "lr": rate, "data": cell.data}
    made["source"] = _sources(cell.folder)
    try:
        result = train(run, evaluate=held_out(data, run), progress=show, resume=has_run(run.out))
    except DivergedError as error:
        write_json(cell.folder / SCORE, made | {"failed": str(error)})
        return
    if result.signal is not None:
        raise KeyboardInterrupt
    if not math.isfinite(held := _valid_rows(cell)[-1]["nats_per_token"]):
        failed = f"the held-out loss after the last step is {held:.4g}: the weights are broken"
        write_json(cell.folder / SCORE, made | {"failed": failed})
        return
    model = load(cell.folder)
    model.backend = run.backend
    split = _scored_split(data)
    score = made | {"split": split}
    if cell.rate is None:
        score["test_tokens"] = cell.test_tokens
        score |= evaluate(
            model.to(run.device),
            data.split(split),
            mode="windowed",
            context=run.context,
            by_domain=True,
            by_document=True,
            limit_tokens=cell.test_tokens,
        ).to_json()
    write_json(cell.folder / SCORE, score)


def _sources(folder: Path) -> list[dict[str, str | None] | None]:
    """Add the sources that run now to those that worked on a cell, None where they were not noted.

    Raises:
        DataError: the file cannot be read or written.
    """
    file = folder / SOURCES
    try:
        made = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as cause:
        raise DataError(f"{file} is damaged ({cause}); delete it, its cell goes on") from None
    if made is None:
        made = [None] if has_run(folder) else []
    if source() not in made:
        made.append(source())
        write_json(file, made, error=DataError)
    return made


def chosen_rate(suite: Suite, cells: list[Cell], cell: Cell) -> float:
    """Return the learning rate of a cell: its own, or by the sweep and the rule of transfer.

    Raises:
        ConfigError: every rate of the sweep diverged.
    """
    if cell.rate is not None:
        return cell.rate
    sweep = _sweep(cells, cell)
    if not sweep:
        return cell.train.lr
    if why := _hopeless(cells, cell):
        raise ConfigError(f"{cell.model}: {why}")
    best = min(sweep, key=last_loss).rate
    assert best is not None
    return best * (sweep[0].config.hidden_size / cell.config.hidden_size) ** suite.lr.exponent


def last_loss(cell: Cell) -> float:
    """Return the held-out loss that a run ended with; infinite if it diverged."""
    points = [] if "failed" in _score(cell) else _valid_rows(cell)
    loss = points[-1]["nats_per_token"] if points else math.inf
    return loss if math.isfinite(loss) else math.inf  # NaN, of an older score, has no order


def _valid_rows(cell: Cell) -> list[dict[str, Any]]:
    return [row for row in read_log(cell.folder / LOG) if row["kind"] == "valid"]


def curve(cell: Cell) -> list[dict[str, float]]:
    """Return a run's held-out losses with the tokens, FLOPs and training seconds until each.

    Seconds are those of the steps alone, summed over however many processes the run took; between
    two lines of its log, which say the speed since the one before, in proportion to the tokens.
    """
    per_token = cell.flops / cell.tokens
    tokens, seconds = [0], [0.0]
    for row in read_log(cell.folder / LOG):
        if row["kind"] == "train":
            seconds.append(seconds[-1] + (row["tokens"] - tokens[-1]) / row["tokens_per_s"])
            tokens.append(row["tokens"])
    return [
        {
            "tokens": row["tokens"],
            "flops": row["tokens"] * per_token,
            "seconds": float(np.interp(row["tokens"], tokens, seconds)),
            "loss": row["nats_per_token"],
        }
        for row in _valid_rows(cell)
    ]


def collect(suite: Suite, cells: list[Cell], out: Path) -> dict[str, Any]:
    """Read finished cells back, write results.json, and return it.

    Returns:
        {"suite", "environment", "data", "split", "cells", "sweep": [...], "rows": [...]}; a row has
        model, size, seed, lr, parameters, tokens, flops, loss (nats a token of `split`),
        bits_per_byte, domains, domain_tokens, documents ([number, nats, tokens] each), state_bytes,
        tokens_per_s, config, curve, and what it was made of: data (fingerprint), test_tokens and
        source (those that trained and scored it, in their order), None where an older score does
        not say. One that failed says so in `failed`; lr is None where every rate of a sweep
        diverged. `uneven` are the sentences of `suite.uneven`.

    Raises:
        ConfigError, DataError: as `compare`.
    """
    _check_rates(suite, cells)
    rows, sweep = [], []
    for cell in cells:
        if _finished(cell):
            score = _score(cell)
        elif why := _hopeless(cells, cell):
            score = {"lr": None, "failed": why}
        else:
            continue
        if cell.rate is not None:
            loss = last_loss(cell)
            shown = loss if math.isfinite(loss) else None
            sweep.append({"model": cell.model, "lr": cell.rate, "loss": shown})
            continue
        points = [] if "failed" in score else curve(cell)
        model, domains = sketch(cell.config), score.get("domains", {})
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
                "domains": {n: d["nats_per_token"] for n, d in domains.items()},
                "domain_tokens": {n: d["tokens"] for n, d in domains.items()},
                "documents": score.get("by_document"),
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
        "environment": source() | environment(),
        "data": cells[0].data,
        "split": _scored_split(PreparedData.open(suite.data)),
        "cells": sum(c.rate is None for c in cells),
        "uneven": uneven(cells),
        "sweep": sweep,
        "rows": rows,
    }
    with in_turn(out, error=DataError):  # whoever ran the other cells may end in the same moment
        write_json(out / RESULTS, results, error=DataError)
    return results


def _scored_split(data: PreparedData) -> str:
    """Return the split that finished models are scored on: held-out text is better than none."""
    return "test" if data.has("test") else "valid"


def estimate(cells: list[Cell]) -> dict[str, tuple[float, float]]:
    """Return how long each unfinished run will take, by timing batches of its model.

    Runs of one model and size share a timing: loss and gradient of a batch, the fastest of LAPS
    after a first one that is not counted (fewer where they take longer than LAPS_S). A token that
    is scored is counted as a third of one that is learned from, since its gradient is not made.

    Returns:
        title -> seconds as the machine is now, and how many of them this thread had a processor:
        about what is left of them where nothing else runs. On a GPU the two are the same.
    """
    speeds: dict[tuple[str, str], tuple[float, float]] = {}
    out = {}
    for cell in _left(cells):
        key, run = (cell.model, cell.size), cell.train
        if key not in speeds:
            speeds[key] = _time_batch(cell)
        found = find_checkpoint(run.out)
        done = step_of(found) if found is not None else 0
        learned = run.accumulate * (run.steps - done)
        batches = learned + _scored(cell, done) / (3 * run.batch_size * run.context)
        out[cell.title] = (speeds[key][0] * batches, speeds[key][1] * batches)
    return out


def _scored(cell: Cell, done: int) -> int:
    """Return how many tokens will be scored for a run after `done` of its steps."""
    run, data = cell.train, PreparedData.open(cell.train.data)
    checks = -(-run.steps // run.valid_every) - done // run.valid_every
    tokens = checks * min(run.valid_tokens, data.split("valid").num_tokens)
    if cell.rate is None:
        tokens += min(cell.test_tokens, data.split(_scored_split(data)).num_tokens)
    return tokens


def _time_batch(cell: Cell) -> tuple[float, float]:
    """Return the seconds of a batch, and those in which this thread had a processor."""
    run = cell.train
    split = PreparedData.open(run.data).split("train")
    batch = BatchSource(split, run.batch_size, run.context, 0).batch(0)
    parts = (batch.tokens, batch.targets, batch.resets)
    laps: list[tuple[float, float]] = []
    model = LanguageModel(cell.config).to(run.device, DTYPES[run.dtype])
    model.backend = run.backend
    while len(laps) <= LAPS and sum(seconds for seconds, _ in laps[1:]) < LAPS_S:
        begin, begin_own = time.monotonic(), time.thread_time()
        tokens, targets, resets = (part.to(run.device) for part in parts)
        with arithmetic(run.device, run.dtype):
            loss = lm_loss(model, tokens, targets, resets=resets).loss
        loss.backward()
        float(loss.detach())
        seconds, own = time.monotonic() - begin, time.thread_time() - begin_own
        laps.append((seconds, own if run.device == "cpu" else seconds))
    return min(laps[1:])
