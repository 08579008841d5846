"""What a state holds and which tokens wrote it, as JSON-ready numbers for the inspector."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate.config import ModelConfig
from metastate.data.tokenizer import StreamDecoder, Tokenizer
from metastate.errors import ConfigError
from metastate.infer.generate import inference
from metastate.layers.attention import AttentionState
from metastate.layers.common import RecurrentState
from metastate.model.lm import LanguageModel
from metastate.model.state import MEMORY, ModelState

MAP_SIZE = 32  # rows and columns of a heat map, at most
MAX_TOKENS = 512  # that one call reads token by token
LEVELS = 127  # a heat map's cells are whole numbers from -LEVELS to LEVELS


def heat_map(x: Tensor) -> dict[str, Any]:
    """Return a matrix as a picture of at most `MAP_SIZE` x `MAP_SIZE` cells.

    A cell stands for a block of b x b entries, b = ceil(N / MAP_SIZE), and shows the one of largest
    magnitude with its sign: a mean would let entries of opposite sign vanish.

    Args:
        x: [N_v, N_k], any float dtype.

    Returns:
        `size` (N), `scale` (max |x|), `block` (b), and `cells`: rows of whole numbers, an entry's
        share of the scale in steps of 1/127.
    """
    x = x.detach().to("cpu", torch.float64)
    longest = max(x.shape)
    block = -(-longest // MAP_SIZE)
    high, low = (F.max_pool2d(y[None, None], block, ceil_mode=True)[0, 0] for y in (x, -x))
    peaks, scale = torch.where(high >= low, high, -low), float(x.abs().max())
    cells = (peaks * (LEVELS / scale if scale else 0.0)).round().to(torch.int64)
    picture = {"scale": _short(scale), "block": block, "cells": cells.tolist()}
    return {"size": longest, **picture}


def effective_rank(x: Tensor) -> Tensor:
    """Return exp(-sum p log p) with p the singular values over their sum; 0 for a zero matrix.

    Args:
        x: [..., N_v, N_k].

    Returns:
        [...] float64, from 1 (one direction holds everything) to N (all hold the same).

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = torch.linalg.svdvals(x.detach().to("cpu", torch.float64))
    total = values.sum(-1)
    p = values / total.clamp_min(1e-300)[..., None]
    return torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def inspect_state(state: ModelState, config: ModelConfig) -> dict[str, Any]:
    """Describe the state of one row, B = 1: pictures, norms and effective ranks, and its size.

    Returns:
        tokens_seen; state_bytes; cache_bytes, of the keys and values that a Transformer of the
        same width, depth and number format would hold by now; `reads`, who reads which matrix;
        `layers`, one mapping from "S" (and "M" where there is one) to a list by head of `norm`
        (Frobenius), `effective_rank` and the heat map's fields; `memory`, such a mapping for the M
        of the surprise memory, None where there is none. A Transformer has no such matrix: its
        layers are empty.

    Raises:
        ConfigError: the state has several rows.
    """
    if state.batch_size != 1:
        raise ConfigError(f"the state has {state.batch_size} rows; inspect one, state[i]")
    parts = []
    for matrices in _matrices(state):
        ranks = {name: effective_rank(x).tolist() for name, x in matrices.items()}
        parts.append(
            {
                name: [
                    {"norm": _short(float(x.norm())), "effective_rank": _short(rank), **heat_map(x)}
                    for x, rank in zip(by_head, ranks[name], strict=True)
                ]
                for name, by_head in matrices.items()
            }
        )
    return {
        "tokens_seen": state.tokens_seen,
        "state_bytes": state.num_bytes,
        "cache_bytes": cache_bytes(state, config),
        "reads": readers(config),
        **_named(parts, state),
    }


def inspect_prompt(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    state: ModelState | None = None,
    *,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Read a prompt token by token and tell what each token did to the states.

    A token's writing is the change |S_t - S_{t-1}|_F, of M likewise: what it added, removed and
    let decay together, so that both matrices and all their updates are measured alike.

    Args:
        model: in evaluation mode; a recurrent one.
        tokenizer: the model's own.
        prompt: text, or token ids; at least one token, `MAX_TOKENS` at most.
        state: to go on from; None starts a document, whose first token is an end of document.
        stop: once set, from another thread, the tokens read so far are the result.

    Returns:
        `tokens`: per token its `id`, its `text` (empty inside a character) and `nats`, the
        negative log-likelihood under the tokens before it (None for the first);
        `layers`: per layer "S" (and "M") to `norms` and `changes`, [tokens][heads] each, and
        `memory`, the same for the surprise memory's M (None without one);
        `state`: what `inspect_state` says of the state after the last token.

    Raises:
        ConfigError: the model has no such state, or the prompt is empty or too long.
        StateError: the state is another model's.
    """
    if not model.recurrent:
        raise ConfigError(
            f"a {model.config.architecture} keeps keys and values, no state that tokens write to; "
            "inspect a metastate or rwkv7 model"
        )
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    most = MAX_TOKENS - (state is None)  # a fresh state reads an end of document first
    if not 0 < len(ids) <= most:
        raise ConfigError(f"the prompt has {len(ids):,} tokens; the inspector reads 1 to {most:,}")
    if state is None:
        ids = [tokenizer.eod_id, *ids]
    decoder, device = StreamDecoder(tokenizer), next(model.parameters()).device
    before = state or model.init_state(1)
    tokens: list[dict[str, Any]] = []
    parts: list[dict[str, dict[str, list[list[float]]]]] = [
        {name: {"norms": [], "changes": []} for name in matrices} for matrices in _matrices(before)
    ]
    predicted: Tensor | None = None
    with inference(model):
        for token in ids:
            nats = None if predicted is None else _short(-float(predicted[token]))
            tokens.append({"id": token, "text": decoder.push(token), "nats": nats})
            x, after, _ = model.features(torch.tensor([[token]], device=device), before)
            predicted = model.head(x)[0, 0].double().log_softmax(-1)
            for record, old, new in zip(parts, _matrices(before), _matrices(after), strict=True):
                for name, x in new.items():
                    norms, changes = _norms(x), _norms(x - old[name])
                    record[name]["norms"].append(norms)
                    record[name]["changes"].append(changes)
            before = after
            if stop is not None and stop.is_set():
                break
    tokens[-1]["text"] += decoder.finish()
    return {"tokens": tokens, **_named(parts, before), "state": inspect_state(before, model.config)}


def readers(config: ModelConfig) -> dict[str, list[str]]:
    """Return by matrix who reads it, layers of a block but for `memory`, the M of no block."""
    reads: dict[str, list[str]] = {}
    if config.architecture == "rwkv7":
        reads["S"] = ["time mixing"]
    elif config.architecture == "metastate":
        layer, size = "the Meta-State layer", config.meta_state.encoder_size
        encoder = layer if size is None else f"{layer} (its top-left {size} x {size} block)"
        reads["S"] = ["time mixing", encoder]
        if config.meta_state.readout != "encoding":
            reads["M"] = [layer]
    if config.memory_heads is not None:
        place = "the head" if config.memory_layer is None else f"block {config.memory_layer}"
        reads[MEMORY] = [f"what corrects the features before {place}"]
    return reads


def cache_bytes(state: ModelState, config: ModelConfig) -> int:
    """Return the bytes of a Transformer's keys and values after as many tokens.

    2 L D a token in the number format of the model, whose shift vectors and caches carry it.
    """
    layer = state.layers[0]
    carried = layer.time_shift if isinstance(layer, RecurrentState) else layer.keys
    per_token = 2 * config.num_layers * config.hidden_size * carried.element_size()
    return per_token * state.tokens_seen


def _matrices(state: ModelState) -> list[dict[str, Tensor]]:
    """Return by layer, then of the memory, the matrices of the first row, [H, N, N] each."""
    return [
        {name: x[0] for name in ("S", "M") if (x := getattr(part, name, None)) is not None}
        for part in state.parts
        if not isinstance(part, AttentionState)
    ]


def _named(parts: list[Any], state: ModelState) -> dict[str, Any]:
    """Return what `_matrices` counts up by the names of an answer: `layers` and `memory`."""
    if state.memory is None:
        return {"layers": parts, MEMORY: None}
    return {"layers": parts[:-1], MEMORY: parts[-1]}


def _norms(x: Tensor) -> list[float]:
    return [_short(n) for n in x.double().flatten(1).norm(dim=1).tolist()]


def _short(x: float) -> float:
    """Round to five digits: a picture shows no more, and the answer is half as long."""
    return float(f"{x:.5g}")
