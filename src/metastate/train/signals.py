"""Ctrl-C and SIGTERM: a run ends after the step it is in, and not in the middle of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals(note: Callable[[int], None]) -> Iterator[None]:
    """Hand the first SIGINT or SIGTERM to `note`; the second one acts as it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        note(number)
        # os.write: the signal may have come in the middle of a print, which must not be re-entered.
        os.write(2, b"\nfinishing the step, then writing a checkpoint; again to stop at once\n")

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
