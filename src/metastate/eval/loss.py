"""Held-out loss of whole documents: nats per token, perplexity, bits per byte of the real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from metastate.config import TrainConfig
from metastate.data.loader import PreparedData, Split, permute
from metastate.data.tokenizer import is_vocabulary
from metastate.errors import ConfigError, DataError
from metastate.model.lm import LanguageModel, evaluating
from metastate.model.loss import LOGITS
from metastate.model.state import ModelState

CHUNK = 512  # tokens a row in one forward of a stateful pass
CUT = 1024  # with `limit_tokens`, tokens that any document may give


@dataclass(frozen=True)
class Tally:
    """The sum of the losses of some tokens, nats, and how much text they are."""

    nats: float
    tokens: int
    bytes: int
    documents: int

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
        documents: (number in the split, nats, tokens) of every document that was scored.
    """

    mode: str
    context: int | None
    total: Tally
    domains: dict[str, Tally] = field(default_factory=dict)
    positions: list[dict[str, Any]] = field(default_factory=list)
    documents: list[tuple[int, float, int]] = field(default_factory=list)

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
            **({"by_document": self.documents} if self.documents else {}),
        }


def evaluate(
    model: LanguageModel,
    split: Split,
    *,
    context: int | None = None,
    mode: Literal["stateful", "windowed"] = "stateful",
    by_domain: bool = False,
    by_position: bool = False,
    by_document: bool = False,
    limit_tokens: int | None = None,
    batch_size: int = 16,
    start: ModelState | None = None,
    group: dist.ProcessGroup | None = None,
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
        by_document: tell the sum of every document too.
        limit_tokens: score so many tokens: of each domain in proportion to its tokens in the split
            (at least one, where the limit allows), within a domain of documents in a fixed shuffled
            order. So that a few books do not use them up, a document gives at most the larger of
            `CUT` and a 16th of its domain's share (more where the domain has too few documents);
            the bytes of a document that is cut are taken in proportion. None scores all.
        batch_size: documents a forward; short ones are packed more (`read_in_chunks`).
        start: one row that every document (or window) starts from in place of the model's own
            first state.
        group: processes that divide the work: all call this with the same arguments, each scores
            its share of the documents (or windows), and each returns the result of the whole.
        progress: called with (tokens done by this process, tokens in all) after every forward.

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
    if not is_vocabulary(model.config.vocab_size, split.num_ids):
        raise DataError(
            f"the data has a vocabulary of {split.num_ids}, the model one of "
            f"{model.config.vocab_size}; prepare the text with the model's own tokenizer"
        )
    if not split.num_tokens:
        raise DataError(f"the {split.name} split holds no tokens; prepare more text")
    owner = split.dataset.domains
    lengths, pieces = _pieces(split.dataset.lengths, owner, limit_tokens, context)
    nats = np.zeros(len(lengths))
    buckets = np.zeros((2, 64))  # sums and counts
    total, done = int(lengths.sum()), 0
    with evaluating(model):
        chunks = read_in_chunks(
            model,
            pieces[:, 2],
            lambda i: _text(split, *pieces[i].tolist()),
            batch_size,
            split.eod_id,
            start,
            group,
        )
        for batch, first, x, targets, valid in chunks:
            keep = torch.from_numpy(valid).to(x.device)
            nll = token_losses(model, x[keep], targets[keep]).double().cpu().numpy()
            rows, offset = np.nonzero(valid)
            nats += np.bincount(pieces[batch, 0][rows], nll, len(nats))
            bucket = np.frexp(first + offset + 1.0)[1] - 1
            buckets += [np.bincount(bucket, w, 64) for w in (nll, None)]
            done += len(nll)
            if progress is not None:
                progress(done, total)
    if group is not None:
        for sums in (nats, buckets):
            dist.all_reduce(torch.from_numpy(sums), group=group)  # in place
    text_bytes = np.rint(split.text_bytes * (lengths / split.dataset.lengths))
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
    documents = [
        (i, float(nats[i]), int(lengths[i])) for i in np.flatnonzero(scored).tolist() if by_document
    ]
    return EvalResult(mode, context, tally(scored), domains, positions, documents)


def held_out(data: PreparedData, run: TrainConfig) -> Callable[..., dict[str, Any]]:
    """Return what scores a model of `run` on the valid split of its data, as `train` wants it.

    Windows of run.context tokens, run.valid_tokens in all; the loss of each domain besides. A
    second argument is what documents start from, as `tune` wants it. With run.parallel all
    processes call it together and divide the work.
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
            group=None if run.parallel == "none" else dist.group.WORLD,
        ).to_json()
        domains = {name: own["nats_per_token"] for name, own in scores["domains"].items()}
        kept = ("nats_per_token", "perplexity", "bits_per_byte")
        return {key: scores[key] for key in kept} | {"domains": domains}

    return score


def _pieces(
    lengths: np.ndarray, domains: np.ndarray, limit: int | None, context: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of each document is scored, and the pieces that start from a fresh state.

    A piece is (document, first, length), [pieces, 3]: its tokens first .. first + length - 1.
    """
    scored = lengths.copy()
    if limit is not None and limit < lengths.sum():
        tokens = np.bincount(domains, lengths).astype(np.int64)
        for domain, share in enumerate(_shares(tokens.tolist(), limit)):
            own = np.flatnonzero(domains == domain)
            most = max(CUT, share // 16)
            while np.minimum(lengths[own], most).sum() < share:
                most *= 2
            order = own[permute(np.arange(len(own)), len(own), key=0)]
            given = np.minimum(lengths[order], most)
            scored[order] = np.clip(share - (np.cumsum(given) - given), 0, given)
    pieces = []
    for i in np.flatnonzero(scored):
        window = context or int(scored[i])
        for first in range(0, int(scored[i]), window):
            pieces.append((int(i), first, min(window, int(scored[i]) - first)))
    return scored, np.array(pieces)


def _shares(tokens: list[int], limit: int) -> list[int]:
    """Divide `limit`, below the sum of `tokens`, in their proportion by the largest remainders.

    Whoever has tokens gets at least one, from the largest share, as long as that has two.
    """
    total = sum(tokens)
    shares = [limit * n // total for n in tokens]
    by_remainder = sorted(range(len(tokens)), key=lambda i: -(limit * tokens[i] % total))
    for i in by_remainder[: limit - sum(shares)]:
        shares[i] += 1
    for i, n in enumerate(tokens):
        largest = max(range(len(tokens)), key=lambda j: shares[j])
        if n and not shares[i] and shares[largest] > 1:
            shares[largest], shares[i] = shares[largest] - 1, 1
    return shares


def _text(split: Split, document: int, first: int, length: int) -> np.ndarray:
    """Return the token before a piece, and its own."""
    text = split.checked(split.dataset[document])
    before = text[first - 1] if first else split.eod_id
    return np.concatenate([[before], text[first : first + length]])


@torch.no_grad()
def read_in_chunks(
    model: LanguageModel,
    lengths: np.ndarray,
    text_of: Callable[[int], np.ndarray],
    batch_size: int,
    fill: int,
    start: ModelState | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[np.ndarray, int, Tensor, Tensor, np.ndarray]]:
    """Read texts in chunks of `CHUNK` tokens, the state carried: memory does not grow with length.

    Texts of like length go together, longest first, padded on the right; a row that ended leaves
    the batch with its state. Short ones are packed more, at most `CHUNK` * batch_size tokens.

    Args:
        model: on any device, in eval mode.
        lengths: [n] tokens of each text that are read, 1 or more.
        text_of: returns text i, lengths[i] + 1 ids: what is read, and each token's successor.
        batch_size: texts a forward.
        fill: id that fills the rows.
        start: one row that every text starts from in place of the model's own first state.
        group: processes that divide the texts. Weights that FSDP splits are there only while all
            run a forward, so those with less to read make up the number by reading `fill`.

    Yields:
        For each chunk that this process reads the numbers of its texts [B], its first position, the
        features x [B, W, D], the successors [B, W], and where both belong to a text, bool [B, W].
    """
    device = next(model.parameters()).device
    order = np.argsort(-lengths, kind="stable")
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    shares = [_batches(order[i::size], lengths, batch_size) for i in range(size)]
    forwards = [sum(-(-int(lengths[batch[0]]) // CHUNK) for batch in share) for share in shares]
    for batch in shares[rank]:
        texts = [text_of(int(i)) for i in batch]
        state = None if start is None else start.expand(len(batch))
        for first in range(0, int(lengths[batch[0]]), CHUNK):
            batch = batch[lengths[batch] > first]
            width = min(CHUNK, int(lengths[batch[0]]) - first)
            tokens = np.full((len(batch), width + 1), fill)
            for row in range(len(batch)):
                part = texts[row][first : first + width + 1]
                tokens[row, : len(part)] = part
            moved = torch.from_numpy(tokens).to(device)
            if state is not None and len(batch) < state.batch_size:
                state = state[: len(batch)]
            x, state, _ = model.features(moved[:, :-1], state)
            yield (
                batch,
                first,
                x,
                moved[:, 1:],
                np.arange(width) < (lengths[batch] - first)[:, None],
            )
    for _ in range(max(forwards) - forwards[rank]):
        model.features(torch.full((1, 1), fill, device=device))


def _batches(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut `order`, texts from the longest to the shortest, into those that are read together."""
    batches = []
    while len(order):
        rows = batch_size * min(max(1, CHUNK // int(lengths[order[0]])), 8)  # states cost too
        batches.append(order[:rows])
        order = order[rows:]
    return batches


@torch.no_grad()
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
