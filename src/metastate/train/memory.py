"""How the process handles freed memory; every step, or piece read, asks for the same sizes."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h of the GNU C library


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next allocation, for the rest of the process.

    By default glibc maps every tensor above 32 MB afresh and returns it when it is freed, and the
    kernel must zero each page again on its first touch: half of the time of a step of 16,384 tokens
    on two cores (docs/log.md). Costs some fragmentation (seen: 14 % of the peak).

    Returns:
        Whether it could be set: only with glibc; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    # One arena, since the others cannot hold a block of 64 MB and would map it after all.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))  # -1: never
    return sum(mallopt(*setting) for setting in settings) == len(settings)
