"""Prepared data: open and check a folder, draw training batches, walk through held-out text.

What a batch holds is a pure function of (seed, step, rank): nothing is kept between calls, so a run
that resumes at step s reads exactly what the uninterrupted one would have read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metastate.data.indexed import IndexedDataset
from metastate.data.tokenizer import Tokenizer, identity, is_vocabulary, load_tokenizer
from metastate.errors import ConfigError, DataError

FORMAT = 1  # of data.json and the files beside it
RECORD = "data.json"


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        tokens: inputs, [B, T] int64.
        targets: the token after each input, [B, T] int64.
        resets: [B, T] bool, True where the state is fresh: a document starts, or nothing is
            carried into the row.
        carry: [B] bool, True where row b continues row b of the step before; None where every row
            starts fresh.
    """

    tokens: Tensor
    targets: Tensor
    resets: Tensor
    carry: Tensor | None


class Document(NamedTuple):
    """A held-out document: its domain, token ids [length] int64 (end of document last), bytes."""

    domain: str
    tokens: np.ndarray
    text_bytes: int


@dataclass(eq=False)
class Split:
    """One split of prepared data.

    Attributes:
        name: train, valid or test.
        dataset: the documents, an `IndexedDataset`.
        domain_names: names that `dataset.domains` points to.
        text_bytes: bytes of UTF-8 text of every document, [documents] int64.
        eod_id: the token that ends every document.
        num_ids: every token is below it.
    """

    name: str
    dataset: IndexedDataset
    domain_names: list[str]
    text_bytes: np.ndarray
    eod_id: int
    num_ids: int

    @property
    def num_tokens(self) -> int:
        """Tokens, ends of documents included."""
        return self.dataset.num_tokens

    def checked(self, tokens: np.ndarray) -> np.ndarray:
        """Return `tokens` as int64.

        Raises:
            DataError: a token is outside the vocabulary, so the file is damaged.
        """
        tokens = tokens.astype(np.int64)
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_ids:
            raise DataError(
                f"{self.dataset.bin_path} is damaged: it holds a token outside the vocabulary of "
                f"{self.num_ids:,}; prepare the data again"
            )
        return tokens

    def documents(self) -> Iterator[Document]:
        """Yield the documents, whole and in order."""
        for i in range(len(self.dataset)):
            domain = self.domain_names[int(self.dataset.domains[i])]
            yield Document(domain, self.checked(self.dataset[i]), int(self.text_bytes[i]))


class PreparedData:
    """A folder that `prepare` made.

    Attributes:
        path: the folder.
        record: what data.json says (tokenizer, domains, and per split documents, tokens, bytes).
        vocab_size: V of a new model.
        num_ids: every token is below it.
        eod_id: the token that ends a document.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record
        self.vocab_size = int(record["tokenizer"]["vocab_size"])
        self.num_ids = int(record["tokenizer"].get("num_ids", self.vocab_size))
        self.eod_id = int(record["tokenizer"]["eod_id"])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PreparedData:
        """Open a prepared folder; every split's files are checked when it is first used.

        Raises:
            DataError: the folder was not prepared (to the end), or by a newer program, or data.json
                is broken.
        """
        folder = Path(path)
        if not (folder / RECORD).is_file():
            if (folder / "parts").is_dir():
                what = "preparing it was interrupted: run the same `metastate prepare` again"
            elif folder.is_dir():
                what = "it holds no data.json: run `metastate prepare INPUT --out` on it"
            else:
                what = "there is no such folder: run `metastate prepare INPUT --out` first"
            raise DataError(f"{folder} is not prepared data; {what}")
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            version = int(record["format"])
            if version > FORMAT:
                raise DataError(
                    f"{folder} was prepared in format {version}, this program reads up to "
                    f"{FORMAT}; install a newer metastate or prepare it again"
                )
            for name in ("tokenizer", "domains", "splits"):
                record[name]
            return cls(folder, record)
        except OSError as cause:
            raise DataError(f"{folder / RECORD} cannot be read ({cause})") from None
        except (ValueError, KeyError, TypeError) as cause:
            raise DataError(f"{folder / RECORD} is broken ({cause!r}); prepare again") from cause

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what tells this data from any other: tokenizer and contents."""
        record = {"tokenizer": identity(self.record["tokenizer"]), "splits": self.record["splits"]}
        return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made this data."""
        return load_tokenizer(self.record["tokenizer"], [self.path])

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains; one name where the text has none."""
        return list(self.record["domains"])

    def has(self, split: str) -> bool:
        """Return whether the split `split` holds any text."""
        return bool(self.record["splits"].get(split, {}).get("tokens"))

    def split(self, name: str) -> Split:
        """Return the split `name`.

        Raises:
            DataError: there is no such split, it is empty, or its files are truncated or broken.
        """
        if not self.has(name):
            filled = filter(self.has, self.record["splits"])
            raise DataError(f"{self.path} has no {name!r} split; it has {', '.join(filled)}")
        table_path = self.path / f"{name}.docs.npy"
        try:
            table = np.load(table_path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as cause:
            raise DataError(f"{table_path} is broken ({cause}); prepare again") from cause
        if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.int64:
            raise DataError(f"{table_path} is not the table of this data; prepare again")
        if table.size and not 0 <= table[:, 0].min() <= table[:, 0].max() < len(self.domain_names):
            raise DataError(f"{table_path} names a domain that data.json lacks; prepare again")
        dataset = IndexedDataset(self.path / name, domains=table[:, 0])
        told = self.record["splits"][name]["tokens"]
        if dataset.num_tokens != told:
            raise DataError(
                f"{dataset.bin_path} has {dataset.num_tokens:,} tokens, data.json says {told:,}; "
                "prepare again"
            )
        return Split(name, dataset, self.domain_names, table[:, 1], self.eod_id, self.num_ids)

    def check_vocab(self, vocab_size: int, tokenizer: dict[str, Any] | None = None) -> None:
        """Check that a model with this vocabulary can read the data.

        Args:
            vocab_size: V of the model.
            tokenizer: `info()` of the tokenizer that the model was trained with, if known.

        Raises:
            DataError: the size is another tokenizer's, or the model knows of another one.
        """
        mine = self.record["tokenizer"]
        if tokenizer and any(tokenizer.get(key) != mine.get(key) for key in ("kind", "sha256")):
            raise DataError(
                f"{self.path} was prepared with tokenizer {mine['name']!r}, but the model was "
                f"trained with {tokenizer.get('name')!r}; prepare the data with that one"
            )
        if not is_vocabulary(vocab_size, self.num_ids):
            raise DataError(
                f"{self.path} was prepared with tokenizer {mine['name']!r} (vocabulary "
                f"{self.vocab_size:,}), but the model has a vocabulary of {vocab_size:,}; take "
                f"a model with vocab_size {self.vocab_size}, or prepare the data with this one's "
                "tokenizer"
            )


class BatchSource:
    """Training batches of a split; batch s is a pure function of (seed, s, rank).

    Without `carry_state` the documents, one after the other, are cut into windows of T inputs and
    T targets (T + 1 tokens, the next window starts at the last target); each epoch is another
    permutation of all windows. With it, each epoch is another permutation of all *documents*, cut
    into B equal streams: row b of step s goes on where row b of step s - 1 ended, until the epoch
    ends and `carry` is False once.

    Memory: O(1) without, 16 bytes a document with `carry_state`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        context: int,
        seed: int = 0,
        *,
        carry_state: bool = False,
    ) -> None:
        """Set up the source, of `context` T and a `batch_size` B of all ranks; nothing is read.

        Raises:
            DataError: the split is shorter than T + 1 tokens (or B streams of them).
        """
        self.split, self.batch_size, self.context = split, batch_size, context
        self.seed, self.carry_state = seed, carry_state
        streams = batch_size if carry_state else 1
        #: windows (or, with carry_state, steps) in an epoch
        self.num_windows = (split.num_tokens - 1) // (streams * context)
        if self.num_windows < 1:
            what = f"{streams} streams of context {context}" if carry_state else f"T = {context}"
            raise DataError(
                f"the {split.name} split has {split.num_tokens:,} tokens, {what} needs at least "
                f"{streams * context + 1:,}; lower --context"
                f"{' or --batch-size' if carry_state else ''}, or prepare more text"
            )

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rows of `rank` of batch `step`; all ranks together always have the same rows.

        Args:
            step: 0, 1, ...
            rank: 0 <= rank < world_size.
            world_size: must divide the batch size.

        Raises:
            ConfigError: it does not. DataError: the file is damaged.
        """
        if self.batch_size % world_size:
            raise ConfigError(
                f"batch size {self.batch_size} must be a multiple of the {world_size} processes"
            )
        per_rank = self.batch_size // world_size
        rows = np.arange(rank * per_rank, (rank + 1) * per_rank)
        tokens, fresh = self._streams(step, rows) if self.carry_state else self._windows(step, rows)
        tokens = self.split.checked(tokens)
        # A document's first word is predicted from a fresh state that has read the end-of-document
        # token, in training as in evaluation and generation: the reset falls on that token.
        resets = tokens[:, :-1] == self.split.eod_id
        resets[:, 0] |= fresh
        carry = torch.full((per_rank,), step % self.num_windows > 0) if self.carry_state else None
        return Batch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(tokens[:, 1:].copy()),
            torch.from_numpy(resets),
            carry,
        )

    def _windows(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        samples = step * self.batch_size + rows
        places = np.empty_like(samples)
        for epoch in np.unique(samples // self.num_windows).tolist():
            here = samples // self.num_windows == epoch
            window = permute(
                samples[here] % self.num_windows, self.num_windows, _key(self.seed, epoch)
            )
            # the tokens that no whole window holds are another few each epoch
            spare = self.split.num_tokens - 1 - self.num_windows * self.context
            places[here] = window * self.context + _key(self.seed, epoch) % (spare + 1)
        tokens = self.split.dataset.tokens[places[:, None] + np.arange(self.context + 1)]
        return tokens, np.ones(len(rows), dtype=bool)

    def _streams(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch, at = divmod(step, self.num_windows)
        order, ends = _document_order(self.split.dataset, _key(self.seed, epoch))
        # What no stream holds is other text each epoch, also where one document is all there is.
        spare = self.split.num_tokens - 1 - self.batch_size * self.num_windows * self.context
        first = _key(self.seed, epoch) % (spare + 1)
        starts = first + (rows * self.num_windows + at) * self.context
        out = np.empty((len(rows), self.context + 1), dtype=np.int64)
        fresh = np.full(len(rows), at == 0)
        for row, start in enumerate(starts.tolist()):
            i = int(np.searchsorted(ends, start, side="right"))
            filled = 0
            while filled <= self.context:
                document = self.split.dataset[int(order[i])]
                begin = start + filled - (int(ends[i]) - len(document))
                piece = document[begin : begin + self.context + 1 - filled]
                out[row, filled : filled + len(piece)] = piece
                filled += len(piece)
                i += 1
        return out, fresh


@lru_cache(maxsize=2)
def _document_order(dataset: IndexedDataset, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch's permutation of documents and where each ends, [documents] int64 both."""
    order = permute(np.arange(len(dataset)), len(dataset), key)
    return order, np.cumsum(dataset.lengths[order])


def _key(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Apply a pseudo-random permutation of 0..size-1 to `index`, without storing it.

    A Feistel network of 6 rounds on the smallest even number of bits that holds `size`; what falls
    outside is sent through again (cycle walking), at most about 4 times on average.

    Args:
        index: values in [0, size), any shape, int64.
        size: how many values are permuted.
        key: chooses the permutation, 64 bits.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    rounds = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for k in rounds:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    out = once(np.asarray(index).astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)
