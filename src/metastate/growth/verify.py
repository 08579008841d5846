"""Measure what growth did: sizes before and after, and how far the logits moved."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from metastate.model.lm import LanguageModel, evaluating

CONTEXT = 1024  # training length that the FLOPs of attention and the size of a cache are told of


@torch.no_grad()
def logits_change(
    before: LanguageModel, after: LanguageModel, tokens: Tensor
) -> dict[str, float | int]:
    """Return how far the logits of two models are apart on the same tokens.

    Weights of 16 bits are widened to float32, where rounding cannot hide what else differs.

    Args:
        before: the parent.
        after: the grown model, of the same vocabulary.
        tokens: [B, T] int64.

    Returns:
        max_abs = max |after - before|, relative = max_abs / max |before|, and the number of tokens.
    """
    a, b = _logits(before, tokens), _logits(after, tokens)
    largest = float((b - a).abs().max())
    return {
        "max_abs": largest,
        "relative": largest / max(float(a.abs().max()), 1e-30),
        "tokens": tokens.numel(),
    }


def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the model's logits in evaluation mode, in float32 at least."""
    if model.embedding.weight.element_size() < 4:
        model = copy.deepcopy(model).float()
    with evaluating(model):
        return model(tokens)[0]


def growth_report(before: LanguageModel, after: LanguageModel, tokens: Tensor) -> dict[str, Any]:
    """Return [before, after] of parameters, state bytes and FLOPs a token, and the logits' change.

    Args:
        before: the parent.
        after: the grown model.
        tokens: [B, T] int64, text that the logits are compared on.
    """
    both = (before, after)
    return {
        "parameters": [m.count_parameters()["total"] for m in both],
        "non_embedding": [m.count_parameters()["non_embedding"] for m in both],
        "state_bytes": [m.state_bytes(1, CONTEXT) for m in both],
        "flops_per_token": [sum(m.flops_per_token(CONTEXT)) for m in both],
        "logits": logits_change(before, after, tokens),
    }
