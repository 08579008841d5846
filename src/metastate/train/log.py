"""What a run writes down as it goes: log.jsonl, and TensorBoard beside it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metastate.data.files import atomic_write
from metastate.errors import ConfigError, TrainingError, remedy


class RunLog:
    """The log of a run, a JSON object a line; every line gets the `seconds` of the run.

    These go on from the last line, so the time between a stop and --resume is no part of them.

    Args:
        path: log.jsonl in the run's folder.
        step: finished updates; TensorBoard drops what it has of later ones.
        tensorboard: write the numbers there too.

    Raises:
        TrainingError: the file cannot be written. ConfigError: TensorBoard is not installed.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool) -> None:
        before = _last_seconds(path) if step else 0.0
        self.path, self.started = path, time.monotonic() - before
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "tensorboard needs a package: pip install 'metastate[tensorboard]'"
                ) from None
            self.board = SummaryWriter(path.parent / "tensorboard", purge_step=step + 1)
        try:
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as cause:
            raise TrainingError(f"cannot write {path}: {cause.strerror}") from cause

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, and its numbers to TensorBoard."""
        record = record | {"seconds": round(time.monotonic() - self.started, 3)}
        with self._writing():
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        if self.board is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("step", "tokens"):
                    self.board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def sync(self) -> None:
        """Return when all lines are safely on the disk."""
        with self._writing():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # of a line that `write` has refused already
            self.file.close()
        if self.board is not None:
            self.board.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise TrainingError(
                f"cannot write {self.path}: {cause.strerror}; the last checkpoint is whole, "
                f"{remedy(cause)} and go on with --resume"
            ) from cause


def _last_seconds(path: Path) -> float:
    """Return the seconds in the last line of a log that `cut_log` has seen, 0 without one."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return float(json.loads(lines[-1]).get("seconds", 0)) if lines else 0.0


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last one that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):  # those of text end at U+2028 too
        try:
            row = json.loads(line)
            last = step - 1 if row["kind"] == "growth" else step
            if row["step"] <= last and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    atomic_write(path, b"".join(kept))
