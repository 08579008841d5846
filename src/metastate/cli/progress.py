"""What goes to the person (stderr: a bar, or lines without a terminal) and to scripts (stdout)."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

LINE_EVERY_S = 10.0


def log(text: str) -> None:
    """Say something to the person, if there still is one; standard output is for results."""
    with suppress(OSError):  # the terminal may be gone, which must not end a run
        print(text, file=sys.stderr, flush=True)


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log(record.getMessage())


def hear_kernels() -> None:
    """Say what `metastate.ops` has to say, in the first process of a run."""
    logger = logging.getLogger("metastate.ops")
    if not logger.handlers and os.environ.get("RANK", "0") == "0":
        logger.addHandler(_Said())
        logger.setLevel(logging.INFO)


def print_json(value: dict[str, Any]) -> None:
    """Print the one object that a script reads; a number that JSON cannot say becomes null."""
    print(json.dumps(_sayable(value), ensure_ascii=False, allow_nan=False))


def _sayable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sayable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def told_if_interrupted(kept: str) -> Iterator[None]:
    """Say on an interruption what is kept, and that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        log(f"{kept}; the same command goes on")
        raise


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show how far a piece of work is; yields `show(done, total, **figures)`, total None: unknown.

    A terminal gets a bar (with tqdm), anything else a line every ten seconds and one at the end.
    """
    make: Any = None
    if sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            make = tqdm
    painted: Any = None
    started = said = time.monotonic()
    first: tuple[int, float] | None = None
    ended = False

    def show(done: int, total: int | None, **figures: str) -> None:
        nonlocal painted, said, first, ended
        if make is not None:
            if painted is None:
                # What was done before the first call is not part of the speed.
                scaled = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": unit}
                painted = make(total=total, initial=done, desc=what, leave=False, **scaled)
            painted.set_postfix(figures, refresh=False)
            painted.update(done - painted.n)
            return
        now = time.monotonic()
        # Neither what a resumed run had before nor the start-up of the first call is the speed.
        first = first or (done, now)
        last = total is not None and done >= total and not ended
        if now - said < LINE_EVERY_S and not last:
            return
        said, ended = now, ended or last
        text = "".join(f", {key} {value}" for key, value in figures.items())
        if total is not None and done > first[0]:
            left = (now - first[1]) * (total - done) / (done - first[0])
            text = f", {left:.0f} s left{text}"
        of_all = "" if total is None else f"/{total:,}"
        log(f"{what}: {done:,}{of_all} {unit} in {now - started:.0f} s{text}")

    try:
        yield show
    finally:
        if painted is not None:
            painted.close()
