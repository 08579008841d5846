"""Native kernels on several threads, safe under several callers and after a fork.

torch's own OpenMP threads do the work where they can be reached: after every torch operation they
spin on their cores for a while, so that threads of our own would have to share those cores with
them (measured, operators and kernels in turn on two cores: 9 instead of 15 ms).
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: tuple[int, ThreadPoolExecutor] | None = None
_forked = False


def _after_fork() -> None:
    """A forked child inherits the pools, torch's and ours, but none of their threads."""
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp_parallel() -> Any:
    """Return `GOMP_parallel(body, data, num_threads, flags)` of torch's runtime, None without."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off: raised where C calls Python, before its `try`, it would be lost."""
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or handler is not signal.default_int_handler:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _on_openmp(parallel: Any, work: Callable[[], None], num_threads: int) -> None:
    errors: list[BaseException] = []

    def body(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # it cannot pass through the C runtime
            errors.append(error)

    with _uninterrupted():
        parallel(_BODY(body), None, num_threads, 0)
    if errors:
        raise errors[0]


def _on_pool(work: Callable[[], None], num_threads: int) -> None:
    """Work on threads of our own and in the caller, which waits for no helper that never began."""
    global _pool
    if _pool is None or _pool[0] < num_threads - 1:
        _pool = (num_threads - 1, ThreadPoolExecutor(num_threads - 1, "metastate"))
    helpers: list[Future] = [_pool[1].submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def run_pieces(kernel: Any, calls: Sequence[Sequence[Any]], num_threads: int) -> None:
    """Call `kernel(*args)` for every args of `calls`, on up to `num_threads` threads.

    The kernel must release the GIL. Every thread takes the next piece when it is free.
    """
    pieces = iter(calls)  # next() is atomic under the GIL

    def work() -> None:
        for args in pieces:
            kernel(*args)

    num_threads = min(num_threads, len(calls))
    parallel = None if _forked else _openmp_parallel()
    if num_threads <= 1:
        work()
    elif parallel is None:
        _on_pool(work, num_threads)
    else:
        _on_openmp(parallel, work, num_threads)
