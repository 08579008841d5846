"""Stored states of a server: one file each, in a folder by owner, within limits."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors

from metastate.data.files import alone_in, sync_folder
from metastate.errors import ConfigError, MetaStateError, StateError
from metastate.infer.generate import Continuation
from metastate.model.lm import LanguageModel
from metastate.model.state_file import config_hash
from metastate.model.weights import weights_hash

logger = logging.getLogger(__name__)

SUFFIX, UPLOAD = ".safetensors", ".upload-"
NAME = re.compile(r"state-[0-9a-f]{24}")
OWNER = re.compile(r"open|[0-9a-f]{32}")  # the folders of a server without keys, and of a key
LOOKS_BACK = 256  # tokens of a request's penalty, characters of its stop strings
# What a killed process leaves: an upload that was being read, a file that was being written.
HALF = re.compile(rf"\{UPLOAD}[0-9a-f]{{24}}|\.{NAME.pattern}\{SUFFIX}\.tmp")


class NoSuchStateError(StateError):
    """There is no such state, or it is another owner's: both look the same."""


class StoreFullError(ConfigError):
    """A further state would pass the owner's limits; stored ones are never dropped for it."""


class StoreBrokenError(MetaStateError):
    """The folder cannot be written or a file in it cannot be read: no client's mistake."""


@dataclass(frozen=True)
class StoredState:
    """What is known of a stored state without reading it."""

    id: str
    created: int
    num_bytes: int
    tokens_seen: int

    def to_json(self) -> dict[str, Any]:
        """Return what the API says of a state."""
        return {
            "id": self.id,
            "object": "state",
            "created": self.created,
            "bytes": self.num_bytes,
            "tokens_seen": self.tokens_seen,
        }


class StateStore:
    """Continuations by owner and id, kept as files that `Continuation.save` writes.

    A file is whole or absent, and on the disk before its id is told. Opening a folder again finds
    every state of the same model, weights and number format, that was stored there; those of others
    are left alone and take none of the limits, and so is every file and folder that is not named
    as the store names its own. All methods may be called from any thread.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: LanguageModel,
        *,
        max_states: int = 256,
        max_bytes: int = 2**30,
    ) -> None:
        """Open `folder` for this process alone; make it, for its user alone, where it is missing.

        Args:
            folder: holds one folder an owner.
            model: that the states are of.
            max_states: of one owner.
            max_bytes: of one owner's files together; also the most of one file given to `add_file`.

        Raises:
            BusyError: another process has it open. TrainingError: it cannot be written.
        """
        self.folder, self.model = Path(folder), model
        self.max_states, self.max_bytes = max_states, max_bytes
        self._states: defaultdict[str, dict[str, StoredState]] = defaultdict(dict)
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()
        with contextlib.suppress(OSError):  # alone_in says what is wrong with it
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open.enter_context(alone_in(self.folder))
        _drop_half_files(self.folder)
        self._weights = weights_hash(model)
        left = sum(self._find(p) for p in self.folder.iterdir() if OWNER.fullmatch(p.name))
        if left:
            logger.warning(
                "left alone in %s until their model is served again: %d states of another model, "
                "other weights or another number format",
                self.folder,
                left,
            )

    def close(self) -> None:
        """Let go of the folder; what is stored stays."""
        self._open.close()

    def list(self, owner: str) -> list[StoredState]:
        """Return an owner's states, oldest first."""
        with self._lock:
            return list(self._states[owner].values())

    def totals(self) -> tuple[int, int]:
        """Return the number of all states and the bytes of their files."""
        with self._lock:
            found = [state for states in self._states.values() for state in states.values()]
        return len(found), sum(state.num_bytes for state in found)

    def info(self, owner: str, id: str) -> StoredState:
        """Return what is known of a state; NoSuchStateError if the owner has none of that id."""
        with self._lock:
            if id not in self._states[owner]:
                raise NoSuchStateError(
                    f"no state {id!r}; it was deleted, never there, or is of other weights"
                )
            return self._states[owner][id]

    def get(self, owner: str, id: str) -> Continuation:
        """Read a state.

        Raises:
            NoSuchStateError: the owner has none of that id. StoreBrokenError: its file was damaged.
        """
        with self._reading(owner, id) as path:
            return Continuation.load(path, self.model)

    def content(self, owner: str, id: str) -> bytes:
        """Return the bytes of a state's file; errors as `get`."""
        with self._reading(owner, id) as path:
            return path.read_bytes()

    def check_room(self, owner: str, num_states: int, num_bytes: int) -> None:
        """Raise StoreFullError unless `num_states` more could be added, of `num_bytes` each."""
        with self._lock:
            self._check_room(owner, num_bytes, num_states)

    def add(self, owner: str, continuation: Continuation) -> StoredState:
        """Store a state.

        Raises:
            StoreFullError: the owner's limits are reached. StoreBrokenError: the disk is full.
        """
        with self._lock:
            self._check_room(owner, continuation.state.num_bytes)  # at least, before it is written
            id = f"state-{secrets.token_hex(12)}"
            path = self._path(owner, id)
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                continuation.save(path, self.model)
                size = path.stat().st_size
            except (StateError, OSError) as cause:
                raise StoreBrokenError("the server cannot write the state; see its log") from cause
            try:
                self._check_room(owner, size)
            except StoreFullError:
                path.unlink()
                raise
            state = StoredState(id, int(time.time()), size, continuation.state.tokens_seen)
            self._states[owner][id] = state
            return state

    def add_file(self, owner: str, content: bytes) -> StoredState:
        """Store a state of unknown origin; what is kept is written anew from what was understood.

        Raises:
            StateError: it is no state of one row of this model, or holds what no forward pass
                could have left. StoreFullError, StoreBrokenError: as `add`.
        """
        path = self.folder / (UPLOAD + secrets.token_hex(12))
        try:
            path.write_bytes(content)
            given = Continuation.load(path, self.model)
            given.state.check_single("the file")
            # Whoever goes on from it reads all of it each time.
            recent, shown = given.recent[-LOOKS_BACK:], given.shown[-LOOKS_BACK:]
            return self.add(owner, replace(given, recent=recent, shown=shown))
        except StateError as cause:
            raise type(cause)(str(cause).replace(str(path), "the file")) from None
        except OSError as cause:
            raise StoreBrokenError("the server cannot write the state; see its log") from cause
        finally:
            path.unlink(missing_ok=True)

    def fork(self, owner: str, id: str) -> StoredState:
        """Store a copy under a new id; errors as `get` and `add`."""
        return self.add(owner, self.get(owner, id))

    def delete(self, owner: str, id: str) -> None:
        """Remove a state; NoSuchStateError if the owner has none of that id."""
        self.info(owner, id)
        with self._lock:
            self._states[owner].pop(id, None)
            path = self._path(owner, id)
            path.unlink(missing_ok=True)
            sync_folder(path.parent)

    def _find(self, folder: Path) -> int:
        """Take in what an earlier process stored, by time; return how many are of others."""
        if not folder.is_dir():
            return 0
        _drop_half_files(folder)
        needed, found, left = config_hash(self.model.config), [], 0
        for path in folder.iterdir():
            if not NAME.fullmatch(path.stem) or path.suffix != SUFFIX:
                continue
            try:
                with safetensors.safe_open(path, "pt") as file:
                    header = file.metadata() or {}
                tokens_seen, stat = int(header["tokens_seen"]), path.stat()
            except (safetensors.SafetensorError, OSError, KeyError, ValueError):
                continue
            weights = header.get("weights") or self._weights  # old files do not say
            if (header.get("config"), weights) != (needed, self._weights):
                left += 1
                continue
            found.append(StoredState(path.stem, int(stat.st_mtime), stat.st_size, tokens_seen))
        found.sort(key=lambda state: state.created)
        self._states[folder.name] = {state.id: state for state in found}
        return left

    def _check_room(self, owner: str, num_bytes: int, num_states: int = 1) -> None:
        own, more = self._states[owner].values(), num_states * num_bytes
        used = sum(state.num_bytes for state in own)
        if len(own) + num_states > self.max_states:
            raise StoreFullError(
                f"{len(own)} states are stored already; {num_states} more would pass the limit of "
                f"{self.max_states}: delete some first"
            )
        if used + more > self.max_bytes:
            raise StoreFullError(
                f"stored states take {used:,} bytes; {more:,} more would pass the limit of "
                f"{self.max_bytes:,}: delete some first"
            )

    def _path(self, owner: str, id: str) -> Path:
        return self.folder / owner / (id + SUFFIX)

    @contextlib.contextmanager
    def _reading(self, owner: str, id: str) -> Iterator[Path]:
        self.info(owner, id)
        try:
            yield self._path(owner, id)
        except (StateError, OSError) as cause:
            self.info(owner, id)  # deleted meanwhile: that is the better answer
            raise StoreBrokenError(f"the server cannot read {id}; see its log") from cause


def _drop_half_files(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if HALF.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
