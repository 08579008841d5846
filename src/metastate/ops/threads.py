"""Native kernels on several threads, safe under several callers and after a fork."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_pool: tuple[int, ThreadPoolExecutor] | None = None


def _forget_pool() -> None:
    """A forked child inherits the pool object but none of its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _helpers(count: int) -> ThreadPoolExecutor:
    """Return a pool with at least `count` threads."""
    global _pool
    if _pool is None or _pool[0] < count:
        _pool = (count, ThreadPoolExecutor(count, thread_name_prefix="metastate"))
    return _pool[1]


def _work(kernel: Any, calls: Iterator[Sequence[Any]]) -> None:
    for args in calls:
        kernel(*args)


def run_pieces(kernel: Any, calls: Sequence[Sequence[Any]], num_threads: int) -> None:
    """Call `kernel(*args)` for every args of `calls`, on up to `num_threads` threads.

    The kernel must release the GIL. The caller works too, so it never waits for a helper that has
    not started.
    """
    num_threads = min(num_threads, len(calls))
    pieces = iter(calls)  # next() is atomic under the GIL
    helpers: list[Future] = [
        _helpers(num_threads - 1).submit(_work, kernel, pieces) for _ in range(num_threads - 1)
    ]
    try:
        _work(kernel, pieces)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()
