"""Zero-shot scores: log-likelihoods of continuations, and the usual metrics made of them.

A model is asked for nothing but log p(continuation | end of document, context): every document in
training begins behind an end of document, so every context does here. The metrics are those of
lm-evaluation-harness 0.4, but that alternatives with the same score share the point (there the
first of them gets it, which in BLiMP is always the right one).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metastate.data.tokenizer import Tokenizer
from metastate.errors import CheckpointError, ConfigError, DataError
from metastate.eval.loss import read_in_chunks
from metastate.eval.zero_shot_data import TASKS, Item, check_tasks
from metastate.model.io import check_tokenizer
from metastate.model.lm import LanguageModel, evaluating
from metastate.model.loss import LOGITS

Score = tuple[float, bool]  # sum of log p in nats, and whether every token was the likeliest
TokenPair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Metric:
    """A mean over items.

    Attributes:
        value: accuracy (0 to 1) or perplexity (1 and more).
        stderr: its standard error; None for a single item.
        chance: what guessing gives: all alternatives, or else all tokens, equally likely.
    """

    value: float
    stderr: float | None
    chance: float


@dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task: metrics by name, BLiMP's accuracy by paradigm."""

    task: str
    num_items: int
    metrics: dict[str, Metric]
    groups: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite is None."""

        def plain(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        metrics = {
            name: {key: plain(value) for key, value in vars(metric).items()}
            for name, metric in self.metrics.items()
        }
        return {"items": self.num_items, "metrics": metrics} | (
            {"paradigms": self.groups} if self.groups else {}
        )


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
    """Return the token ids of contexts and continuations.

    Both are encoded as one text and cut behind the tokens of the context, so that a word keeps the
    token that it has in running text; white space at a context's end counts to the continuation.

    Raises:
        DataError: as `check_continuations`.
    """
    texts = [
        text
        for context, continuation in pairs
        for text in (context.rstrip(), context + continuation)
    ]
    ids = [found.tolist() for found in tokenizer.encode_batch(texts)]
    encoded = [(ids[i], ids[i + 1][len(ids[i]) :]) for i in range(0, len(ids), 2)]
    check_continuations(pairs, [continuation for _, continuation in encoded])
    return encoded


def check_continuations(
    pairs: Sequence[tuple[str, str]], continuations: Sequence[Sequence[int]]
) -> None:
    """Raise DataError, naming the first, where a continuation has no token of its own.

    Its log p would be 0, so it would win against any other: a tokenizer that makes one token of the
    context's end and the continuation cannot score the item.
    """
    for (context, text), tokens in zip(pairs, continuations, strict=True):
        if not tokens:
            raise DataError(
                f"the continuation {text!r} of {context[-60:]!r} has no token of its own: it is "
                "empty, or the tokenizer joins it to the context's last token, so this model "
                "cannot score the item; take it out"
            )


def loglikelihoods(
    model: LanguageModel,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Return log p(continuation | end of document, context) of each pair of texts.

    Args:
        model: trained with `tokenizer`; left in the mode that it was in.
        tokenizer: of the model.
        pairs: (context, continuation); an empty context is the start of a document.
        batch_size: texts a forward; short ones are packed more.
        progress: called with (tokens done, tokens in all) after every forward.

    Returns:
        For each pair, in their order: the sum over the continuation's tokens in nats, and whether
        each of them is the model's likeliest.

    Raises:
        ConfigError: batch_size is below 1, or the tokenizer has more ids than the model.
        DataError: a continuation has no token of its own.
        CheckpointError: the model gives values that are not finite.
    """
    check_tokenizer(model, tokenizer)
    encoded = encode_pairs(tokenizer, pairs)
    return score_tokens(model, encoded, tokenizer.eod_id, batch_size=batch_size, progress=progress)


@torch.no_grad()
def score_tokens(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    eod_id: int,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Do the work of `loglikelihoods` on token ids; contexts come without the end of document.

    A continuation without tokens is the empty product, log p = 0; `check_continuations` says where
    that means nothing.

    Texts of like length go together, padded on the right, and are read in chunks with the state
    carried, so memory does not grow with their length; a row that ended leaves the batch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
    texts = [np.array([eod_id, *context, *continuation]) for context, continuation in pairs]
    first = np.array([len(context) for context, _ in pairs])  # where scoring begins
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    scored = [i for i, (_, continuation) in enumerate(pairs) if continuation]
    lengths = np.array([len(texts[i]) - 1 for i in scored], dtype=np.int64)
    total, done = int(lengths.sum()), 0
    with evaluating(model):
        chunks = read_in_chunks(model, lengths, lambda i: texts[scored[i]], batch_size, eod_id)
        for batch, start, x, targets, valid in chunks:
            owners = np.array(scored)[batch]
            asked = valid & (start + np.arange(valid.shape[1]) >= first[owners][:, None])
            keep = torch.from_numpy(asked).to(x.device)
            log_p, best = _token_scores(model, x[keep], targets[keep])
            owner = owners[np.nonzero(asked)[0]]
            np.add.at(sums, owner, log_p)
            np.logical_and.at(greedy, owner, best)
            done += int(valid.sum())
            if progress is not None:
                progress(done, total)
    if not np.isfinite(sums).all():
        raise CheckpointError(
            "the model gives log-likelihoods that are not finite; its weights are broken: use an "
            "earlier checkpoint"
        )
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _token_scores(
    model: LanguageModel, x: Tensor, targets: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p(target) and whether it is the likeliest token, [n], for features x [n, D]."""
    log_p, best = np.zeros(len(x)), np.zeros(len(x), dtype=bool)
    rows = max(1, LOGITS // model.config.vocab_size)
    for i in range(0, len(x), rows):
        part, target = slice(i, i + rows), targets[i : i + rows, None]
        logits = model.head(x[part])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p[part] = logits.log_softmax(-1).gather(1, target)[:, 0].double().cpu().numpy()
        best[part] = (logits.argmax(-1, keepdim=True) == target)[:, 0].cpu().numpy()
    return log_p, best


def evaluate_items(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task: str,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score the items of a task.

    acc: the right alternative has the largest log p. acc_norm: the largest log p a character.
    acc_paradigms: the mean of the paradigms' accuracies. LAMBADA: acc is the last word guessed
    token by token, perplexity exp(-mean log p of a whole word). Standard errors are those of means
    (sample deviation / sqrt n; paradigms count as strata), the perplexity's by the delta method.

    Args:
        model: as in `loglikelihoods`.
        tokenizer: of the model.
        task: a name in `TASKS`.
        items: from `load_items`, at least one.
        batch_size: texts a forward; short ones are packed more.
        progress: called with (tokens done, tokens in all) after every forward.

    Raises:
        As `loglikelihoods`; ConfigError for an unknown task.
    """
    check_tasks([task])
    pairs = [pair for item in items for pair in item.pairs]
    scores = loglikelihoods(model, tokenizer, pairs, batch_size=batch_size, progress=progress)
    metrics = {}
    if task == "lambada":
        lengths = [len(continuation) for _, continuation in encode_pairs(tokenizer, pairs)]
        metrics = _last_word(scores, lengths, model.config.vocab_size)
        return TaskResult(task, len(items), metrics)
    at, log_p = 0, []
    for item in items:
        log_p.append([score for score, _ in scores[at : at + len(item.pairs)]])
        at += len(item.pairs)
    chance = float(np.mean([1 / len(item.pairs) for item in items]))
    points = [_point(values, item.gold) for item, values in zip(items, log_p, strict=True)]
    groups: dict[str, list[float]] = defaultdict(list)
    for item, point in zip(items, points, strict=True):
        groups[item.group].append(point)
    for name in TASKS[task].metrics:
        if name == "acc_paradigms":
            metrics[name] = _mean_of_groups(list(groups.values()), chance)
        elif name == "acc_norm":
            # the space in front of a choice is no part of it
            each = [
                [p / (len(text) - 1) for p, (_, text) in zip(values, item.pairs, strict=True)]
                for item, values in zip(items, log_p, strict=True)
            ]
            norm = [_point(values, item.gold) for item, values in zip(items, each, strict=True)]
            metrics[name] = Metric(float(np.mean(norm)), stderr(norm), chance)
        else:
            metrics[name] = Metric(float(np.mean(points)), stderr(points), chance)
    by_group = {name: float(np.mean(own)) for name, own in groups.items() if name}
    return TaskResult(task, len(items), metrics, by_group)


def stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, sqrt(sum (x - mean)^2 / (n - 1) / n); n = 1: None."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _point(values: Sequence[float], gold: int) -> float:
    """Return 1 where `gold` has the largest value, its share of the point in a tie, else 0."""
    best = max(values)
    return 1 / values.count(best) if values[gold] == best else 0.0


def _last_word(
    scores: Sequence[Score], lengths: Sequence[int], vocab_size: int
) -> dict[str, Metric]:
    log_p = [score for score, _ in scores]
    hits = [float(greedy) for _, greedy in scores]
    perplexity, error = _exp(-float(np.mean(log_p))), stderr(log_p)
    guessed = float(np.mean([float(vocab_size) ** -n for n in lengths]))
    uniform = _exp(float(np.mean(lengths)) * math.log(vocab_size))
    return {
        "acc": Metric(float(np.mean(hits)), stderr(hits), guessed),
        "perplexity": Metric(perplexity, None if error is None else perplexity * error, uniform),
    }


def _mean_of_groups(groups: Sequence[Sequence[float]], chance: float) -> Metric:
    errors = [stderr(own) for own in groups]
    known = [e for e in errors if e is not None]
    error = math.sqrt(sum(e**2 for e in known)) / len(groups) if len(known) == len(groups) else None
    return Metric(float(np.mean([np.mean(own) for own in groups])), error, chance)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
