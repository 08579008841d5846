"""How a file becomes documents: plain text, JSON lines or a JSON array, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from metastate.errors import ConfigError, DataError

COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
LINES = (".jsonl", ".ndjson")
JSON = ".json"
TEXT_FIELD = "text"
NO_DOMAIN = "text"


class RawDocument(NamedTuple):
    """A text with its domain, and how many bytes of its source have been read so far."""

    text: str
    domain: str
    position: int


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that says the form and the one that says the compression, lower case.

    Either is "" where there is none: UP.JSONL.GZ gives (".jsonl", ".gz").
    """
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    form = Path(path.stem).suffix if compression else path.suffix
    return form.lower(), compression


def looks_like_text(path: Path) -> bool:
    """Say whether a folder's file is worth reading: UTF-8 at its beginning, or known when packed.

    Raises:
        OSError: the file cannot be read.
    """
    form, compression = suffixes(path)
    if compression:  # a.txt.gz is text, a.tar.gz is not
        return form in (*LINES, JSON, ".txt", ".md")
    with open(path, "rb") as file:
        head, rest = file.read(8192), file.read(1)
    try:  # where more follows, the head may end within a character
        codecs.getincrementaldecoder("utf-8")().decode(head, final=not rest)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def form_of(path: Path, text_field: str = TEXT_FIELD) -> str:
    """Return how a file is to be read: as `text`, as `lines` of JSON or as an `array` of JSON.

    .jsonl and .ndjson are lines. A .json file is what it holds: lines if its first line is an
    object that has the field `text_field` or is followed by another object, an array if that is
    what it is and its first value is a string or has the field, else text.

    Raises:
        DataError: the file cannot be read, or is damaged. ConfigError: .zst without its package.
    """
    form, _ = suffixes(path)
    if form != JSON:
        return "lines" if form in LINES else "text"
    with _opened(path) as (_, file):
        filled = (line.strip() for line in file if line.strip())
        first, second = next(filled, b"").removeprefix(codecs.BOM_UTF8), next(filled, b"")
    try:
        if first.startswith(b"["):
            values = json.loads(_whole(path)[0])
            return "array" if values and _has_text(values[0], text_field) else "text"
        record = json.loads(first)
    except (ValueError, RecursionError):
        return "text"
    is_record = isinstance(record, dict) and (second[:1] == b"{" or _has_text(record, text_field))
    return "lines" if is_record else "text"


def read_file(path: Path, form: str, text_field: str = TEXT_FIELD) -> Iterator[RawDocument]:
    """Yield the documents of a file: one of a text, one a line, or one a value of an array.

    Args:
        path: the file.
        form: of `form_of`.
        text_field: the name of the field that holds a record's text.

    Raises:
        DataError: the file cannot be read, is damaged, is no UTF-8, or holds something other than
            records. ConfigError: .zst without its package.
    """
    if form == "lines":
        yield from _read_lines(path, text_field)
        return
    text, size = _whole(path)
    if form == "text":
        yield RawDocument(text, NO_DOMAIN, size)
        return
    for number, value in enumerate(_parse(text, str(path)), 1):
        where = f"{path}, value {number} of the array"
        record = {text_field: value} if isinstance(value, str) else value
        yield RawDocument(*text_and_domain(record, where, text_field), size)


def _whole(path: Path) -> tuple[str, int]:
    """Return a file's text, and the bytes of the file."""
    with _opened(path) as (raw, file):
        return _decode(file.read(), str(path)), os.fstat(raw.fileno()).st_size


def _read_lines(path: Path, text_field: str) -> Iterator[RawDocument]:
    offset = 0
    with _opened(path) as (raw, file):
        for number, line in enumerate(file, 1):
            text = _decode(line, str(path), offset)
            offset += len(line)
            if text.strip():
                where = f"{path}:{number}"
                record = text_and_domain(_parse(text, where), where, text_field)
                yield RawDocument(*record, raw.tell())


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise DataError(f"{where} is not JSON ({cause})") from cause


def _has_text(record: Any, text_field: str) -> bool:
    """Say whether a value of an array is a document."""
    text = record.get(text_field) if isinstance(record, dict) else record
    return isinstance(text, str)


def text_and_domain(record: Any, where: str, text_field: str = TEXT_FIELD) -> tuple[str, str]:
    r"""Return the text and the domain of a Pile-style record {text_field, "meta": {"set"}}.

    Half a character, which JSON can spell ("\ud800") and UTF-8 cannot, becomes U+FFFD in both.

    Raises:
        DataError: the record has no such text; the message begins with `where` it is.
    """
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        if isinstance(record, dict) and text_field in record:
            keys = f"{text_field} with {json.dumps(text, ensure_ascii=False, default=str)[:60]}"
        raise DataError(
            f"{where}: a record needs a field {text_field!r} with a string (--text-field names "
            f"another); found: {keys}"
        )
    meta = record.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    domain = meta.get("set") or meta.get("pile_set_name") or NO_DOMAIN
    return _sayable(text), _sayable(str(domain))


def _sayable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield a file and its decompressed content; what goes wrong while reading is a DataError."""
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
        ".zst": lambda file: io.BufferedReader(_ZstdReader(file), 1 << 18),
        "": lambda file: file,
    }
    try:
        with open(path, "rb") as raw:
            yield raw, openers[suffixes(path)[1]](raw)
    except Exception as cause:
        known = (OSError, EOFError, lzma.LZMAError, zlib.error)
        if isinstance(cause, known) or type(cause).__name__ == "ZstdError":
            raise unreadable(path, cause) from cause
        raise


def unreadable(path: str | Path, cause: Exception) -> DataError:
    """Return the error that says why a file or folder cannot be read."""
    if isinstance(cause, OSError) and cause.strerror:  # the system's own refusal, no damage
        return DataError(f"{path} cannot be read: {cause.strerror}")
    return DataError(f"{path} cannot be read, it is damaged or truncated: {cause}")


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


def _not_text(name: str, offset: int, what: str) -> DataError:
    parquet = "; a Parquet file must be written as JSONL first" * name.endswith(".parquet")
    return DataError(
        f"{name} is not text: {what} at byte {offset:,}; give UTF-8 text, JSONL, or either as "
        f"{' '.join(COMPRESSED)}{parquet}"
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
