"""Held-out loss of whole documents: nats per token, perplexity, bits per byte of the real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metastate.config import TrainConfig
from metastate.data.loader import PreparedData, Split, permute
from metastate.errors import ConfigError, DataError
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState

CHUNK = 512  # tokens a row in one forward of a stateful pass
CUT = 1024  # with `limit_tokens`, tokens that any document may give
LOGITS = 2**25  # logits held at once: 128 MiB in float32


@dataclass
class Tally:
    """A running sum of losses."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return means; `bits_per_byte` is None where the bytes of the text are not known."""
        nats = self.nats / self.tokens
        return {
            "nats_per_token": nats,
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured.

    Attributes:
        mode: "stateful" or "windowed".
        context: window length in tokens; None for stateful.
        total: over everything scored; the end of every document counts as a token.
        domains: the same by domain name.
        positions: mean loss by number of tokens seen before, in buckets of doubling size.
    """

    mode: str
    context: int | None
    total: Tally
    domains: dict[str, Tally] = field(default_factory=dict)
    positions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.total.nats / self.total.tokens

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, the totals on the top level."""
        return {
            "mode": self.mode,
            "context": self.context,
            **self.total.to_json(),
            "domains": {name: t.to_json() for name, t in sorted(self.domains.items())},
            "positions": self.positions,
        }


@dataclass(frozen=True)
class _Piece:
    """Tokens first .. first + length - 1 of a document, scored from a fresh state."""

    document: int
    first: int
    length: int


def evaluate(
    model: LanguageModel,
    split: Split,
    *,
    context: int | None = None,
    mode: Literal["stateful", "windowed"] = "stateful",
    by_domain: bool = False,
    by_position: bool = False,
    limit_tokens: int | None = None,
    batch_size: int = 16,
    start: ModelState | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score held-out documents, each alone and from a fresh state (or from `start`).

    Every document is the sequence eod, x_1, ..., x_n, eod; the loss is the mean of
    -log p(x_t | eod, x_<t) over x_1, ..., x_n and the final eod.
    bits_per_byte = sum of nats / ln 2 / UTF-8 bytes of the text.

    Args:
        model: left in the mode (train or eval) it was in.
        split: of data prepared with the model's tokenizer.
        context: window length in tokens, for mode="windowed" only.
        mode: "stateful" reads a document once and carries the state to its end; "windowed" cuts it
            into windows of `context` tokens and starts each from a fresh state with nothing but the
            token before it, as a model without a state must.
        by_domain: tally every domain too.
        by_position: tally by the number of tokens that the model has seen since its fresh start.
        limit_tokens: score so many tokens, of documents in a fixed shuffled order. So that a few
            books do not use them up, a document gives at most the larger of `CUT` and a 16th
            (more where the split has too few documents); the bytes of a document that is cut are
            taken in proportion. None scores all.
        batch_size: documents a forward; short ones are packed more, at most `CHUNK` * batch_size
            tokens a forward.
        start: one row that every document (or window) starts from in place of the model's own
            first state.
        progress: called with (tokens done, tokens in all) after every forward.

    Raises:
        ConfigError: a setting is out of range. DataError: the split is empty, or its vocabulary is
        not the model's.
    """
    for name, value in (("context", context), ("limit_tokens", limit_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
    if (mode == "windowed") != (context is not None):
        raise ConfigError(
            f"context is {context} with mode {mode!r}; a windowed evaluation needs the length of "
            "its windows, a stateful one has none"
        )
    if split.vocab_size != model.config.vocab_size:
        raise DataError(
            f"the data has a vocabulary of {split.vocab_size}, the model one of "
            f"{model.config.vocab_size}; prepare the text with the model's own tokenizer"
        )
    if not split.num_tokens:
        raise DataError(f"the {split.name} split holds no tokens; prepare more text")
    lengths, pieces = _pieces(split.dataset.lengths, limit_tokens, context)
    nats = np.zeros(len(lengths))
    buckets = np.zeros((2, 64))  # sums and counts
    total, done = int(lengths.sum()), 0
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(pieces, batch_size):
            for rows, position, nll in _score(model, split, batch, start):
                document = np.array([p.document for p in batch])[rows]
                nats += np.bincount(document, nll, len(nats))
                bucket = np.frexp(position + 1.0)[1] - 1
                buckets += [np.bincount(bucket, w, 64) for w in (nll, None)]
                done += len(nll)
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(was_training)
    text_bytes = np.rint(split.text_bytes * (lengths / split.dataset.lengths))
    owner = split.dataset.domains
    scored = lengths > 0

    def tally(rows: np.ndarray) -> Tally:
        return Tally(
            float(nats[rows].sum()),
            int(lengths[rows].sum()),
            int(text_bytes[rows].sum()),
            int(rows.sum()),
        )

    domains = {}
    if by_domain:
        domains = {
            split.domain_names[i]: tally(scored & (owner == i)) for i in np.unique(owner[scored])
        }
    positions = [
        {
            "first": 2**i - 1,
            "last": 2 ** (i + 1) - 2,
            "nats_per_token": float(buckets[0, i] / buckets[1, i]),
            "tokens": int(buckets[1, i]),
        }
        for i in np.flatnonzero(buckets[1]).tolist()
        if by_position
    ]
    return EvalResult(mode, context, tally(scored), domains, positions)


def held_out(data: PreparedData, run: TrainConfig) -> Callable[..., dict[str, Any]]:
    """Return what scores a model of `run` on the valid split of its data, as `train` wants it.

    Windows of run.context tokens, run.valid_tokens in all; the loss of each domain besides. A
    second argument is what documents start from, as `tune` wants it.
    """
    split = data.split("valid")

    def score(model: LanguageModel, start: ModelState | None = None) -> dict[str, Any]:
        scores = evaluate(
            model,
            split,
            mode="windowed",
            context=run.context,
            by_domain=len(data.domain_names) > 1,
            limit_tokens=run.valid_tokens,
            start=start,
        ).to_json()
        domains = {name: own["nats_per_token"] for name, own in scores["domains"].items()}
        kept = ("nats_per_token", "perplexity", "bits_per_byte")
        return {key: scores[key] for key in kept} | {"domains": domains}

    return score


def _pieces(
    lengths: np.ndarray, limit: int | None, context: int | None
) -> tuple[np.ndarray, list[_Piece]]:
    """Return how much of each document is scored, and the pieces, longest first."""
    scored = lengths.copy()
    if limit is not None and limit < lengths.sum():
        most = max(CUT, limit // 16)
        while np.minimum(lengths, most).sum() < limit:
            most *= 2
        order = permute(np.arange(len(lengths)), len(lengths), key=0)
        given = np.minimum(lengths, most)[order]
        scored[order] = np.clip(limit - (np.cumsum(given) - given), 0, given)
    pieces = []
    for i in np.flatnonzero(scored):
        window = context or int(scored[i])
        for first in range(0, int(scored[i]), window):
            pieces.append(_Piece(int(i), first, min(window, int(scored[i]) - first)))
    return scored, sorted(pieces, key=lambda p: -p.length)


def _batches(pieces: Sequence[_Piece], batch_size: int) -> Iterator[Sequence[_Piece]]:
    """Cut the sorted pieces into batches of about equal work."""
    first = 0
    while first < len(pieces):
        short = max(1, CHUNK // pieces[first].length)
        rows = batch_size * min(short, 8)  # the state of a row costs memory too
        yield pieces[first : first + rows]
        first += rows


@torch.no_grad()
def _score(
    model: LanguageModel, split: Split, batch: Sequence[_Piece], start: ModelState | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Run a batch chunk by chunk; yield (row, position, nats) of the tokens of each chunk.

    Rows are sorted, so those that ended are the last ones: they leave the batch with their state.
    """
    device = next(model.parameters()).device
    texts = []
    for piece in batch:
        text = split.checked(split.dataset[piece.document])
        before = text[piece.first - 1] if piece.first else split.eod_id
        texts.append(np.concatenate([[before], text[piece.first : piece.first + piece.length]]))
    state = None if start is None else start.expand(len(texts))
    for first in range(0, batch[0].length, CHUNK):
        texts = [t for t in texts if len(t) - 1 > first]
        width = min(CHUNK, len(texts[0]) - 1 - first)
        tokens = np.full((len(texts), width + 1), split.eod_id)
        for row, text in enumerate(texts):
            part = text[first : first + width + 1]
            tokens[row, : len(part)] = part
        used = np.array([min(width, len(t) - 1 - first) for t in texts])
        valid = np.arange(width) < used[:, None]
        moved = torch.from_numpy(tokens).to(device)
        if state is not None and len(texts) < state.batch_size:
            state = state[: len(texts)]
        x, state, _ = model.features(moved[:, :-1], state)
        keep = torch.from_numpy(valid).to(device)
        nll = token_losses(model, x[keep], moved[:, 1:][keep])
        rows, offset = np.nonzero(valid)
        yield rows, first + offset, nll.double().cpu().numpy()


def token_losses(model: LanguageModel, x: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target), [n] float32, for features x [n, D], a few logits at a time."""
    rows = max(1, LOGITS // model.config.vocab_size)
    parts = [
        F.cross_entropy(
            model.head(x[i : i + rows]).float(), targets[i : i + rows], reduction="none"
        )
        for i in range(0, len(x), rows)
    ]
    return torch.cat(parts)
