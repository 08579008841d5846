"""Where text comes from: files, folders, the running Python's own documentation, dataset names."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import json
import lzma
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from metastate.data.files import expanded
from metastate.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("validation", "val", "dev"), "valid")
COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
LINES = (".jsonl", ".ndjson")
NO_DOMAIN = "text"
STDLIB_BYTES = 12_000_000
# tests, tables and vendored code: much text that is neither documentation nor worth imitating
STDLIB_SKIP = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings"}
STDLIB_SKIP |= {"pydoc_data", "ensurepip", "site-packages", "dist-packages", "__pycache__"}


class RawDocument(NamedTuple):
    """A text with its domain, and how many bytes of its source have been read so far."""

    text: str
    domain: str
    position: int


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        name: what a person calls it.
        identity: JSON; a preparation that was interrupted goes on only if this is unchanged.
        split: train, valid or test where the name says so, else None.
        num_bytes: size on disk, the total of `RawDocument.position`; None where unknown.
        read: yields the documents, always in the same order.
    """

    name: str
    identity: list[Any]
    split: str | None
    num_bytes: int | None
    read: Callable[[], Iterator[RawDocument]]


def find_sources(
    inputs: Sequence[str | os.PathLike[str]],
    split: str | None = None,
    exclude: Path | None = None,
) -> list[Source]:
    """Return the sources that `inputs` name, in order.

    Args:
        inputs: text or JSONL files (also .gz .xz .zst .bz2), folders (read recursively, in sorted
            order, files that are no text left out), `stdlib`, or Hugging Face dataset names. Of a
            folder that holds train.*, only train.*, valid.* and test.* are read.
        split: put everything into this split.
        exclude: leave out what lies in this folder (the output).

    Raises:
        DataError: an input does not exist or cannot be read. ConfigError: a dataset name needs a
            missing package.
    """
    found: list[Source] = []
    for item in [os.fspath(given) for given in inputs]:
        try:
            found.extend(_sources(item, split, exclude))
        except OSError as cause:
            raise _unreadable(cause.filename or item, cause) from cause
    return found


def _sources(item: str, split: str | None, exclude: Path | None) -> list[Source]:
    path = expanded(item)
    if path.is_file():
        return [_file_source(path, split or _split_of(path))]
    if path.is_dir():
        return _folder_sources(path, split, exclude)
    if item == "stdlib":
        return [_stdlib_source(split)]
    if _is_path(item):
        raise DataError(f"no such file or folder: {item}")
    return _hub_sources(item, split)


def _split_of(path: Path) -> str | None:
    return SPLIT_NAMES.get(path.name.split(".")[0].lower())


def _is_path(item: str) -> bool:
    known = (*COMPRESSED, *LINES, ".txt", ".md", ".json", ".py")
    return item.endswith(known) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", item)


def _file_source(path: Path, split: str | None) -> Source:
    stat = path.stat()
    lines = path.name.removesuffix(_compression(path)).endswith(LINES)
    read = _read_lines if lines else _read_text
    identity = [path.name, stat.st_size, stat.st_mtime_ns]
    return Source(str(path), identity, split, stat.st_size, lambda: read(path))


def _folder_sources(folder: Path, split: str | None, exclude: Path | None) -> list[Source]:
    named = [p for p in sorted(folder.iterdir()) if split is None and _split_of(p)]
    if "train" not in map(_split_of, named):  # a folder `test` alone is no sign of splits
        named = []
    found = []
    for top in named or [folder]:
        for path in [top] if top.is_file() else _files_below(top):
            ours = exclude is not None and exclude.resolve() in path.resolve().parents
            if not ours and path.is_file() and _looks_like_text(path):
                found.append(_file_source(path, split or (_split_of(top) if named else None)))
    if not found:
        raise DataError(f"the folder {folder} holds no text files")
    return found


def _files_below(top: Path) -> list[Path]:
    """Return what is in a folder and its folders, sorted, the hidden left out; OSError by any."""

    def refuse(cause: OSError) -> None:
        raise cause  # or the text of a folder that may not be read would be missing unsaid

    found = []
    for root, folders, names in os.walk(top, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _looks_like_text(path: Path) -> bool:
    if _compression(path):  # a.txt.gz is text, a.tar.gz is not
        return path.name.removesuffix(_compression(path)).endswith((*LINES, ".txt", ".md"))
    with open(path, "rb") as file:
        head = file.read(8192)
    # a character cut at the end of the head is no fault
    return b"\0" not in head and "\ufffd" not in head.decode("utf-8", "replace")[:-3]


def _compression(path: Path) -> str:
    return path.suffix if path.suffix in COMPRESSED else ""


class _ZstdReader(io.RawIOBase):
    """Decompress all frames of a .zst file; unlike the library's own reader, notice truncation."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as cause:
            raise ConfigError(
                "reading .zst needs zstandard: pip install 'metastate[cli]'"
            ) from cause
        self._raw, self._start = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(1 << 18)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self._frame = self._frame or self._start()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    kind = _compression(path)
    if kind == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 18))
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
        "": lambda file: file,
    }
    return cast(BinaryIO, openers[kind](raw))


def _unreadable(path: str | Path, cause: Exception) -> DataError:
    if isinstance(cause, OSError) and cause.strerror:  # the system's own refusal, no damage
        return DataError(f"{path} cannot be read: {cause.strerror}")
    return DataError(f"{path} cannot be read, it is damaged or truncated: {cause}")


def _is_damage(cause: Exception) -> bool:
    known = (OSError, EOFError, lzma.LZMAError, zlib.error)
    return isinstance(cause, known) or type(cause).__name__ == "ZstdError"


def _not_text(name: str, offset: int, what: str) -> DataError:
    return DataError(
        f"{name} is not text: {what} at byte {offset:,}; give UTF-8 text, JSONL, or either as "
        f"{' '.join(COMPRESSED)}"
    )


def _decode(data: bytes, name: str, offset: int = 0) -> str:
    """Return `data`, which lies at `offset` of the file `name`, as text."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise _not_text(name, offset + nul, "a NUL byte")
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as cause:
        # utf-8-sig counts from behind the byte order mark
        mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
        raise _not_text(name, offset + cause.start + mark, "invalid UTF-8") from cause


def _read_text(path: Path) -> Iterator[RawDocument]:
    """Yield the whole file as one document."""
    try:
        with open(path, "rb") as raw:
            data = _open(path, raw).read()
    except Exception as cause:
        if _is_damage(cause):
            raise _unreadable(path, cause) from cause
        raise
    yield RawDocument(_decode(data, str(path)), NO_DOMAIN, path.stat().st_size)


def _read_lines(path: Path) -> Iterator[RawDocument]:
    """Yield one document a line of JSONL."""
    offset = 0
    try:
        with open(path, "rb") as raw:
            for number, line in enumerate(_open(path, raw), 1):
                text = _decode(line, str(path), offset)
                offset += len(line)
                if text.strip():
                    record = _parse(text, f"{path}:{number}")
                    yield RawDocument(*record, raw.tell())
    except Exception as cause:
        if _is_damage(cause):
            raise _unreadable(path, cause) from cause
        raise


def _parse(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise DataError(f"{where}: the line is not JSON ({cause})") from cause
    return _text_and_domain(record, where)


def _text_and_domain(record: Any, where: str) -> tuple[str, str]:
    """Return the text and the domain of a Pile-style record {"text", "meta": {"set"}}."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: a record needs a field 'text' with a string; found: {keys}")
    meta = record.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    domain = meta.get("set") or meta.get("pile_set_name") or NO_DOMAIN
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud800"
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, str(domain)


def _stdlib_source(split: str | None) -> Source:
    """Return the running interpreter's documentation topics, docstrings and sources as a corpus.

    A module gives either its docstrings or its source, never both: or held-out docstrings would
    have been seen in a source file of the training split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = root / "pydoc_data" / "topics.py"
    files, total = [], topics.stat().st_size if topics.is_file() else 0
    candidates = [p for p in root.rglob("*.py") if not STDLIB_SKIP & set(p.relative_to(root).parts)]
    # in the order of a hash, so that the limit cuts a fair sample
    for path in sorted(candidates, key=lambda p: _hash(p.relative_to(root).as_posix())):
        size = path.stat().st_size
        if size and total + size <= STDLIB_BYTES:
            files.append(path)
            total += size
    if not files:
        raise DataError(
            f"this Python has no source files in {root}; give a text file instead of 'stdlib'"
        )
    identity = ["stdlib", platform.python_version(), len(files), total]
    return Source("stdlib", identity, split, total, lambda: _read_stdlib(root, topics, files))


def _hash(name: str) -> int:
    return zlib.crc32(name.encode("utf-8"))


def _read_stdlib(root: Path, topics: Path, files: list[Path]) -> Iterator[RawDocument]:
    position = 0
    if topics.is_file():
        position = topics.stat().st_size
        for value in ast.walk(ast.parse(topics.read_bytes())):
            if isinstance(value, ast.Dict):
                for topic in value.values:
                    if isinstance(topic, ast.Constant) and isinstance(topic.value, str):
                        yield RawDocument(topic.value, "topics", position)
    for path in files:
        position += path.stat().st_size
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_bytes().decode("utf-8")
            if _hash(name) % 3 == 0:
                docstrings = _docstrings(text, name.removesuffix(".py").replace("/", "."))
                yield RawDocument(docstrings, "docstrings", position)
            else:
                yield RawDocument(text, "source", position)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few modules are samples of broken or Latin-1 code


def _docstrings(source: str, module: str) -> str:
    """Return every docstring of a module under its dotted name, like pydoc prints them."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            found.append(f"{name}\n\n{text}\n")
        for child in ast.iter_child_nodes(node):
            inner = getattr(child, "name", None) if isinstance(child, kinds) else None
            visit(child, f"{name}.{inner}" if inner else name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in docstrings
        visit(ast.parse(source), module)
    return "\n\n".join(found)


def _hub_sources(name: str, split: str | None) -> list[Source]:
    """Return one source a split of a Hugging Face dataset, `name` or `name:configuration`."""
    try:
        import datasets
    except ImportError as cause:
        raise ConfigError(
            f"there is no file or folder {name!r}; to read it as a Hugging Face dataset: "
            "pip install 'metastate[hub]'"
        ) from cause
    path, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, configuration or None, streaming=True)
    except Exception as cause:  # no network, no such name, ...: the library raises many kinds
        raise DataError(
            f"there is no file or folder {name!r}, and the Hugging Face hub cannot give a dataset "
            f"of that name: {cause}"
        ) from cause

    def rows(part: str) -> Iterator[RawDocument]:
        position = 0
        for number, record in enumerate(loaded[part], 1):
            text, domain = _text_and_domain(record, f"{name}/{part}:{number}")
            position += len(text)
            yield RawDocument(text, domain, position)

    return [
        Source(
            f"{name}/{part}",
            [name, part],
            split or SPLIT_NAMES.get(part),
            None,
            lambda part=part: rows(part),  # type: ignore[misc]
        )
        for part in loaded
    ]
