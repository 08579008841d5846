r"""Megatron's .bin/.idx: documents of token ids in one memory-mapped file, with an index beside it.

idx, little-endian: magic `MMIDIDX\0\0`, u64 version 1, u8 dtype code, u64 sequences, u64 entries
of doc_idx, i32 sizes, i64 byte pointers, i64 doc_idx (the first sequence of every document, and
the end). bin: the tokens, one sequence after the other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metastate.data.files import atomic_write
from metastate.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that tokens of this vocabulary are stored in: u16 to 65,536, else i32."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<i4")


def paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the .bin and .idx paths of a prefix; a prefix with either suffix is understood."""
    text = os.fspath(prefix)
    text = text[:-4] if text.endswith((".bin", ".idx")) else text
    return Path(text + ".bin"), Path(text + ".idx")


def write_index(
    prefix: str | os.PathLike[str], lengths: Sequence[int] | np.ndarray, dtype: np.dtype
) -> None:
    """Write PREFIX.idx for documents that lie one after the other in PREFIX.bin.

    Args:
        prefix: path without suffix.
        lengths: tokens of every document, [documents].
        dtype: dtype of the tokens in the .bin file.

    Raises:
        DataError: a document is longer than the format can say, or the file cannot be written.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    if counts.size and counts.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"document {int(counts.argmax())} has {int(counts.max()):,} tokens; the .idx format "
            "holds at most 2,147,483,647 in one document: split it"
        )
    ends = np.cumsum(counts)
    pointers = (ends - counts) * dtype.itemsize
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], counts.size, counts.size + 1)
    body = [counts.astype("<i4"), pointers.astype("<i8"), np.arange(counts.size + 1, dtype="<i8")]
    content = b"".join([header, *(array.tobytes() for array in body)])
    atomic_write(paths(prefix)[1], content, error=DataError)


class IndexedDataset:
    """Documents of PREFIX.bin/.idx, memory-mapped: `ds[i]` is document i, `len(ds)` their number.

    Attributes:
        tokens: all documents one after the other, [num_tokens] of the file's dtype, read only.
        offsets: first token of every document and the end, [documents + 1] int64.
        lengths: tokens of every document, [documents] int64.
        domains: index of every document's domain, [documents] int64; zeros unless given.
    """

    def __init__(self, prefix: str | os.PathLike[str], domains: np.ndarray | None = None) -> None:
        """Open and check the two files.

        Args:
            prefix: path without suffix, or with .bin or .idx.
            domains: domain index of every document, if there are any.

        Raises:
            DataError: a file is missing, foreign, of another version, truncated or inconsistent.
        """
        self.bin_path, self.idx_path = paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"{path} is missing; prepare the data again")
        dtype, sizes, doc_idx = self._read_index()
        expected = int(sizes.sum()) * dtype.itemsize
        found = self.bin_path.stat().st_size
        if found != expected:
            state = "truncated" if found < expected else "longer than its index says"
            raise DataError(
                f"{self.bin_path} is {state}: expected {expected:,} bytes, found {found:,}; "
                "prepare the data again"
            )
        try:
            self.tokens: np.ndarray = (
                np.memmap(self.bin_path, dtype=dtype, mode="r") if expected else np.empty(0, dtype)
            )
        except OSError as cause:
            raise DataError(f"{self.bin_path} cannot be read ({cause})") from None
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])[doc_idx]
        self.lengths = np.diff(self.offsets)
        self.domains = np.zeros(len(self), np.int64) if domains is None else domains
        if len(self.domains) != len(self):
            raise DataError(
                f"{self.idx_path} has {len(self):,} documents, but {len(self.domains):,} domains "
                "are recorded; prepare the data again"
            )

    def _read_index(self) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        """Return the dtype, the sizes [sequences] and doc_idx [documents + 1], all checked."""
        try:
            content = self.idx_path.read_bytes()
        except OSError as cause:
            raise DataError(f"{self.idx_path} cannot be read ({cause})") from None

        def broken(what: str) -> DataError:
            return DataError(f"{self.idx_path} {what}; prepare the data again")

        if not content.startswith(MAGIC):
            raise broken(f"is not a .idx file (it starts with {content[:9]!r}, not {MAGIC!r})")
        if len(content) < HEADER.size:
            raise broken(f"is truncated: {len(content)} bytes, the header alone has {HEADER.size}")
        _, version, code, sequences, entries = HEADER.unpack_from(content)
        if version != VERSION:
            raise broken(f"has version {version}; this program reads version {VERSION}")
        if code not in DTYPES:
            raise broken(f"has dtype code {code}; known: {', '.join(map(str, DTYPES))}")
        expected = HEADER.size + sequences * 12 + entries * 8
        if len(content) != expected:
            state = "truncated" if len(content) < expected else "too long"
            raise broken(
                f"is {state}: {sequences:,} sequences and {entries:,} document entries need "
                f"{expected:,} bytes, found {len(content):,}"
            )
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        at = HEADER.size
        sizes = np.frombuffer(content, "<i4", sequences, at).astype(np.int64)
        pointers = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
        doc_idx = np.frombuffer(content, "<i8", entries, at + 12 * sequences)
        if (sizes < 0).any():
            raise broken("holds a negative size")
        if not np.array_equal(pointers, (np.cumsum(sizes) - sizes) * dtype.itemsize):
            raise broken("holds pointers that do not follow from its sizes")
        whole = entries > 0 and doc_idx[0] == 0 and doc_idx[-1] == sequences
        if not whole or (np.diff(doc_idx) < 0).any():
            raise broken("holds document boundaries that do not fit its sequences")
        return dtype, sizes, doc_idx

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return document `index`, [length] of the file's dtype, without copying it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their end-of-document tokens included."""
        return len(self.tokens)
