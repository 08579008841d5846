"""How the native kernels are compiled by Numba, and kept compiled on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba as nb
from numba import types
from numba.core import event
from numba.extending import intrinsic

logger = logging.getLogger(__name__)

# Reassociation and contraction are allowed, never "no NaNs": a NaN propagates.
OPTIONS: Any = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
# Functions that only kernels call need no way in from Python, which takes long to compile.
INNER: Any = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class Telling(event.Listener):
    """Say once what a first run waits for; kernels that are found compiled are no such event."""

    said = False

    def on_start(self, _: event.Event) -> None:
        """Say it at the first compilation."""
        if not self.said:
            self.said = True
            logger.info(
                "compiling native kernels for this processor: up to a minute, as a rule the first "
                "time only"
            )

    def on_end(self, _: event.Event) -> None:
        """Say nothing."""


event.register("numba:compile", Telling())


@cache
def _sources() -> str:
    """Return the digest of the sources in this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable) -> Any:
    """Compile a function, cached on disk where any cache folder can be written.

    Numba holds cached code for fresh as long as the kernel's own file is unchanged, though what the
    kernel calls may lie in another; here it is fresh as long as no source in this folder changed.
    """
    try:
        compiled = nb.njit(cache=True, **OPTIONS)(function)
        compiled._cache._cache_file._source_stamp = _sources()
    except (RuntimeError, AttributeError, OSError):  # no folder to write to, another Numba, no
        return nb.njit(**OPTIONS)(function)  # sources to read: compiled in every process
    return compiled


def _address_as_pointer(typing_context, address, like):  # type: ignore[no-untyped-def]
    """Return `address` as a pointer to values of `like`'s type."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build


pointer: Any = intrinsic(_address_as_pointer)
