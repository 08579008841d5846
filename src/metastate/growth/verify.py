"""Measure what growth did: sizes before and after, and how far the logits moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metastate.model.lm import LanguageModel


@torch.no_grad()
def logits_change(
    before: LanguageModel, after: LanguageModel, tokens: Tensor
) -> dict[str, float | int]:
    """Return how far the logits of two models are apart on the same tokens.

    Args:
        before: the parent.
        after: the grown model, of the same vocabulary.
        tokens: [B, T] int64.

    Returns:
        max_abs = max |after - before|, relative = max_abs / max |before|, and the number of tokens.
    """
    training = before.training, after.training
    a, b = before.eval()(tokens)[0], after.eval()(tokens)[0]
    before.train(training[0])
    after.train(training[1])
    largest = float((b - a).abs().max())
    return {
        "max_abs": largest,
        "relative": largest / max(float(a.abs().max()), 1e-30),
        "tokens": tokens.numel(),
    }


def growth_report(
    before: LanguageModel, after: LanguageModel, tokens: Tensor, context: int = 1024
) -> dict[str, Any]:
    """Return [before, after] of parameters, state bytes and FLOPs a token, and the logits' change.

    Args:
        before: the parent.
        after: the grown model.
        tokens: [B, T] int64, text that the logits are compared on.
        context: training length that the FLOPs of attention are counted for.
    """
    both = (before, after)
    return {
        "parameters": [m.count_parameters()["total"] for m in both],
        "non_embedding": [m.count_parameters()["non_embedding"] for m in both],
        "state_bytes": [m.state_bytes(1, context) for m in both],
        "flops_per_token": [sum(m.flops_per_token(context)) for m in both],
        "logits": logits_change(before, after, tokens),
    }
