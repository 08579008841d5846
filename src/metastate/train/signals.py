"""Ctrl-C, SIGTERM and SIGHUP: a run ends after the step it is in, not in the middle of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def signals(note: Callable[[int], None]) -> Iterator[None]:
    """Hand the first SIGINT, SIGTERM or SIGHUP to `note`; the second one acts as it did before.

    Those that are ignored, as nohup and `trap '' INT` ask for, stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    found = {n: signal.getsignal(n) for name in names if (n := getattr(signal, name, None))}
    before = {n: handler for n, handler in found.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        note(number)
        # os.write: the signal may have come in the middle of a print, which must not be re-entered.
        with contextlib.suppress(OSError):  # the terminal may be what went away
            os.write(2, b"\nfinishing the step, then writing a checkpoint; again to stop at once\n")

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
