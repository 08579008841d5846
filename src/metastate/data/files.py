"""Files that are either whole or absent: atomic writes with errors a person can act on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from metastate.errors import BusyError, ConfigError, MetaStateError, TrainingError, is_full

LOCK = ".lock"
# What safetensors calls the dtypes, in its order.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


def atomic_write(
    path: str | os.PathLike[str],
    content: bytes | Callable[[BinaryIO], Any],
    *,
    error: type[MetaStateError] = TrainingError,
) -> None:
    """Write a file so that at every moment `path` holds the old content or the whole new one.

    Temporary file in the same folder, flush, fsync, rename over `path`, fsync of the folder.
    Missing folders are made. The temporary file has one fixed name for each path, so what a killed
    process left is overwritten by the next write and never piles up; one process at a time writes
    a path.

    Args:
        path: where to write.
        content: the bytes, or a callable that writes them to the binary file it is given.
        error: the class to raise when the system refuses.

    Raises:
        error: the disk is full or the system refuses; the previous file is untouched and the
            temporary one removed. What the callable itself raises (no OSError) passes unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as cause:
        what = f"cannot write {path}: {cause.strerror or cause}"
        if is_full(cause):
            what = f"disk full while writing {path}; free room and run again"
        kept = "; the previous file is untouched" if os.path.exists(path) else ""
        raise error(what + kept) from cause
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    *,
    error: type[MetaStateError] = TrainingError,
) -> None:
    """Write tensors as a safetensors file with `atomic_write`, one after the other.

    The library's `save` makes the file twice in memory first; its `save_file` renames a file of its
    own name, which a killed process would leave, and which others may not read. The bytes are
    theirs.

    Args:
        path: where to write.
        tensors: by name, on any device, of a dtype in `DTYPES`.
        header: texts that the file carries besides.
        error: as in `atomic_write`.

    Raises:
        error: as `atomic_write`.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    entries: dict[str, Any] = {"__metadata__": dict(header)} if header else {}
    end = 0
    for name in names:
        x, first = tensors[name], end
        end += x.nbytes
        entries[name] = {
            "dtype": DTYPES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [first, end],
        }
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)

    def content(file: BinaryIO) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            x = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(x.numpy().data)

    atomic_write(path, content, error=error)


@contextlib.contextmanager
def whole_folder(
    out: str | os.PathLike[str], *, error: type[MetaStateError] = TrainingError
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends; after an error nothing does.

    Raises:
        ConfigError: `out` holds something already. error: the system refuses.
    """
    out = Path(out)
    check_free(out)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, out)
        sync_folder(out.parent)
    except OSError as cause:
        raise error(f"{out} cannot be written: {cause}") from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str], last: str, *, error: type[MetaStateError] = TrainingError
) -> Iterator[Path]:
    """Yield a temporary folder, the files of which then replace those of `folder`, others stay.

    Nothing changes in `folder` before the block ends, and nothing after an error in it. Then
    `last`, without which the others are not read, is removed, all are renamed, and it is the last:
    a kill within these renames leaves a folder that is refused, never one of old and new files.

    Raises:
        error: the system refuses.
    """
    folder = Path(folder)
    temporary = folder / ".new.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        (folder / last).unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
            os.replace(file, folder / file.name)
        sync_folder(folder)
    except OSError as cause:
        raise error(f"cannot write {folder}: {cause.strerror or cause}") from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: str | os.PathLike[str]) -> None:
    """Raise ConfigError if a file, or a folder with something in it, is at `out`."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out")


def write_json(
    path: str | os.PathLike[str], value: Any, *, error: type[MetaStateError] = TrainingError
) -> None:
    """Write `value` as indented JSON with `atomic_write`; the same errors."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # a file name can hold half a character, which UTF-8 cannot say and JSON can: \ud800
    atomic_write(path, text.encode("utf-8", "backslashreplace"), error=error)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path as a person types it, ~ for a home; ConfigError where it is nobody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError as cause:
        raise ConfigError(f"no file {os.fspath(path)!r}: {cause}") from None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable; OSError if the system refuses."""
    if os.name == "nt":  # Windows cannot open a folder; NTFS journals the rename itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path, *, error: type[MetaStateError] = TrainingError) -> Iterator[None]:
    """Hold `folder` for this process alone; the system lets go of it however the process ends.

    The folder is made if it is missing, and removed again if nothing was written into it. Where the
    file system has no locks a warning says so, and the folder is not guarded.

    Raises:
        BusyError: another process holds it. error: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock, missing = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(lock, "wb")  # noqa: SIM115
    except FileExistsError as cause:
        raise error(f"{folder} is a file, where a folder is needed; choose another") from cause
    except OSError as cause:
        raise error(f"cannot write {lock}: {cause.strerror}") from cause
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = _is_at(file, lock)  # or the one who held it has just removed it
        except OSError as cause:
            held = cause.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
            if held:
                warnings.warn(
                    f"the file system of {folder} has no locks ({cause.strerror}): nothing keeps a "
                    "second process from working there at the same time; see that none does",
                    RuntimeWarning,
                    stacklevel=3,  # behind contextlib, the one who asked
                )
        if not held:
            raise BusyError(
                f"another process works in {folder}; wait for it, or choose another folder"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if missing and os.listdir(folder) == [LOCK]:
                    lock.unlink()
                    folder.rmdir()


@contextlib.contextmanager
def in_turn(folder: Path, *, error: type[MetaStateError] = TrainingError) -> Iterator[None]:
    """Hold `folder` as `alone_in` does, for a moment's work: wait while another process has it.

    Raises:
        error: the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(alone_in(folder, error=error))
                break
            except BusyError:
                time.sleep(0.1)
        yield


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether `path` is the open file, and not another one or none."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
