"""Every error that a user's mistake can raise.

Each message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import errno


class MetaStateError(Exception):
    """Base of all errors that are the input's fault; the command line turns it into exit code 2."""


class ConfigError(MetaStateError):
    """A setting is unknown, of the wrong type, out of range, or impossible on this machine."""


class BusyError(ConfigError):
    """Another process is at work in the same folder."""


class EngineError(MetaStateError):
    """The thread that serves requests failed; no more of them are taken."""


class ShapeError(MetaStateError, ValueError):
    """A tensor has the wrong shape or dtype."""


class StateError(MetaStateError):
    """A state does not belong to this model or batch."""


class CheckpointError(MetaStateError):
    """A checkpoint is missing, truncated, corrupt, foreign or newer than this program."""


class DataError(MetaStateError):
    """Text or prepared data is missing, empty, truncated, corrupt or of another vocabulary."""


class TrainingError(MetaStateError):
    """Training cannot go on (a loss that is not finite, a disk that is full)."""


class DivergedError(TrainingError):
    """The loss or a gradient is not finite."""


def remedy(error: BaseException) -> str:
    """Return what to do about a file that cannot be written: only a full disk needs room."""
    return "make room" if is_full(error) else "mend that"


def is_full(error: BaseException | None) -> bool:
    """Return whether `error`, or what it was raised from, is a full disk or a quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
