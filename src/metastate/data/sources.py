"""Where text comes from: files, folders, the running Python's own documentation, dataset names."""

from __future__ import annotations

import ast
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from metastate.data.files import expanded
from metastate.data.reading import (
    COMPRESSED,
    JSON,
    LINES,
    TEXT_FIELD,
    RawDocument,
    form_of,
    looks_like_text,
    read_file,
    suffixes,
    text_and_domain,
    unreadable,
)
from metastate.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("validation", "val", "dev"), "valid")
# train.jsonl, train/, and the shards that data sets come in: train-00000-of-00002.jsonl
SPLIT_NAME = re.compile(rf"({'|'.join(SPLIT_NAMES)})(\.|$|[-_]\d|[-_].*\.(jsonl|ndjson)(\.|$))")
Notes = dict[str, Counter[str]]  # what happened to how many files of which suffix
STDLIB_BYTES = 12_000_000
# tests, tables and vendored code: much text that is neither documentation nor worth imitating
STDLIB_SKIP = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings"}
STDLIB_SKIP |= {"pydoc_data", "ensurepip", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        identity: JSON; a preparation that was interrupted goes on only if this is unchanged.
        split: train, valid or test where the name says so, else None.
        num_bytes: size on disk, the total of `RawDocument.position`; None where unknown.
        read: yields the documents, always in the same order.
    """

    identity: list[Any]
    split: str | None
    num_bytes: int | None
    read: Callable[[], Iterator[RawDocument]]


def find_sources(
    inputs: Sequence[str | os.PathLike[str]],
    split: str | None = None,
    exclude: Path | None = None,
    *,
    text_field: str = TEXT_FIELD,
    notes: Notes | None = None,
) -> list[Source]:
    """Return the sources that `inputs` name, in order.

    Args:
        inputs: files of text, JSON lines or a JSON array (also .gz .xz .zst .bz2), folders (read
            recursively and through links, in sorted order, files that are no text or hidden left
            out), `stdlib`, or Hugging Face dataset names. Of a folder that holds a train split,
            only what is named for a split is read.
        split: put everything into this split.
        exclude: leave out what lies in this folder (the output).
        text_field: the name of the field that holds a record's text.
        notes: what is left out of a folder, or read otherwise than its name says, is counted here.

    Raises:
        DataError: an input does not exist or cannot be read. ConfigError: a dataset name needs a
            missing package.
    """
    found: list[Source] = []
    search = _Search(split, exclude, text_field, {} if notes is None else notes)
    for item in [os.fspath(given) for given in inputs]:
        try:
            found.extend(search.sources(item))
        except OSError as cause:
            raise unreadable(cause.filename or item, cause) from cause
    return found


@dataclass(frozen=True)
class _Search:
    """The arguments of one `find_sources`, and how each kind of input is looked up with them."""

    split: str | None
    exclude: Path | None
    text_field: str
    notes: Notes

    def sources(self, item: str) -> list[Source]:
        path = expanded(item)
        if path.is_file():
            return [self.file(path, self.split or _split_of(path))]
        if path.is_dir():
            return self.folder(path)
        if item == "stdlib":
            return [_stdlib_source(self.split)]
        if _is_path(item):
            raise DataError(f"no such file or folder: {item}")
        return _hub_sources(item, self.split, self.text_field)

    def file(self, path: Path, split: str | None) -> Source:
        stat, form = path.stat(), form_of(path, self.text_field)
        identity = [path.name, stat.st_size, stat.st_mtime_ns]
        suffix, compression = suffixes(path)
        if form != "text" and not path.name.removesuffix(compression).endswith(LINES):
            identity.append(form)  # which earlier versions read as one text
        if form == "text" and suffix == JSON:
            self.note(f"read as plain text, no records with a field {self.text_field!r}", path)
        read = partial(read_file, path, form, self.text_field)
        return Source(identity, split, stat.st_size, read)

    def folder(self, folder: Path) -> list[Source]:
        top = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
        named = [p for p in top if self.split is None and _split_of(p)]
        if "train" not in map(_split_of, named):  # a folder `test` alone is no sign of splits
            named = []
        found, ours = [], False
        for start in named or [folder]:
            for path in [start] if start.is_file() else _files_below(start):
                if self.is_ours(path):
                    ours = True
                elif path.is_file() and looks_like_text(path):
                    split = _split_of(start) if named else None
                    found.append(self.file(path, self.split or split))
                else:
                    self.note("left out, no UTF-8 text", path)
        for path in top:
            if named and path not in named and not self.is_ours(path):
                self.note("left out, not named for a split as train.* is", path)
        if not found and ours:
            raise DataError(
                f"the folder {folder} holds no text but that in {self.exclude}, which is where the "
                "output goes and is not read; choose another --out"
            )
        if not found:
            noted = f" ({said})" if (said := told(self.notes)) else ""
            raise DataError(f"the folder {folder} holds no text files{noted}")
        return found

    def is_ours(self, path: Path) -> bool:
        exclude, path = self.exclude and self.exclude.resolve(), path.resolve()
        return exclude is not None and (exclude == path or exclude in path.parents)

    def note(self, what: str, path: Path) -> None:
        suffix = "folder" if path.is_dir() else "".join(suffixes(path)) or "without suffix"
        self.notes.setdefault(what, Counter())[suffix] += 1


def told(notes: Notes) -> str:
    """Return notes as a person reads them, "" where there are none."""
    return "; ".join(
        f"{what}: {', '.join(f'{count:,} {suffix}' for suffix, count in sorted(kinds.items()))}"
        for what, kinds in notes.items()
    )


def _split_of(path: Path) -> str | None:
    found = SPLIT_NAME.match(path.name.lower())
    return SPLIT_NAMES[found[1]] if found else None


def _is_path(item: str) -> bool:
    known = (*COMPRESSED, *LINES, JSON, ".txt", ".md", ".py")
    return item.lower().endswith(known) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", item)


def _files_below(top: Path) -> list[Path]:
    """Return what is in a folder and its folders, sorted, the hidden left out; OSError by any.

    Links are followed. A folder that several paths lead to, or a link in a circle, is read once.
    """

    def refuse(cause: OSError) -> None:
        raise cause  # or the text of a folder that may not be read would be missing unsaid

    found, seen = [], {os.path.realpath(top)}
    for root, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        given, folders[:] = sorted(folders), []
        for name in given:
            place = os.path.realpath(os.path.join(root, name))
            if not name.startswith(".") and place not in seen:
                seen.add(place)
                folders.append(name)
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


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
    return Source(identity, split, total, lambda: _read_stdlib(root, topics, files))


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


def _hub_sources(name: str, split: str | None, text_field: str) -> list[Source]:
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
        position, number, records = 0, 0, iter(loaded[part])
        while True:
            number += 1
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as cause:  # the library raises many kinds
                raise DataError(
                    f"{name}/{part} stopped before record {number} ({cause}); run the same command "
                    "again to go on"
                ) from cause
            text, domain = text_and_domain(record, f"{name}/{part}:{number}", text_field)
            position += len(text)
            yield RawDocument(text, domain, position)

    return [
        Source(
            [name, part],
            split or SPLIT_NAMES.get(part),
            None,
            lambda part=part: rows(part),  # type: ignore[misc]
        )
        for part in loaded
    ]
