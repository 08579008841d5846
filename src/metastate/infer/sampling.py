"""Choose the next token: temperature, top-k, top-p, repetition penalty, one seeded generator."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from metastate.errors import ConfigError, StateError

LARGEST = 1e6  # of a temperature or penalty: float32 arithmetic with it stays finite
SMALLEST = 1e-30  # temperature that float32 divides by; below it the same token comes out


@dataclass(frozen=True)
class SamplingConfig:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token always.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability; 1 keeps all.
        repetition_penalty: p >= 1; logits of tokens among the last `repetition_window` are divided
            by p where positive, multiplied by p where negative (CTRL, arXiv:1909.05858); 1 is off.
        repetition_window: number of last tokens (prompt included) that count; 0 means all.
        seed: of the generator, from -2^63 to 2^64 - 1; None draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0 <= self.temperature <= LARGEST, f"0 (greedy) to {LARGEST:g}"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "repetition_penalty": (
                1 <= self.repetition_penalty <= LARGEST,
                f"1 (off) to {LARGEST:g}",
            ),
            "repetition_window": (
                0 <= self.repetition_window < 2**31,
                "0 (all tokens) to 2^31 - 1",
            ),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**64, "-2^63 to 2^64 - 1"),
        }
        for name, (ok, allowed) in limits.items():
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {allowed}")


class Sampler:
    """Draws token after token; the generator and the window of last tokens are its state."""

    def __init__(self, config: SamplingConfig, num_tokens: int) -> None:
        """Start a sampler over the ids 0 .. num_tokens - 1; higher ids (padding) never come out."""
        self.config = config
        self.num_tokens = num_tokens
        self.generator = torch.Generator()
        self.seed = self.generator.seed() if config.seed is None else config.seed
        self.generator.manual_seed(self.seed)
        self.recent: deque[int] = deque(maxlen=config.repetition_window or None)

    def observe(self, tokens: Iterable[int]) -> None:
        """Let `tokens` count for the repetition penalty, of a later run if not of this one."""
        self.recent.extend(tokens)

    def sample(self, logits: Tensor) -> int:
        """Choose one token by its logits [V] (any float dtype) and observe it.

        Raises:
            StateError: the logits are not finite.
        """
        probabilities = self.probabilities(logits)
        if self.config.temperature == 0:
            token = int(probabilities.argmax())
        else:
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        self.observe([token])
        return token

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities to draw from, [num_tokens] float32 on the CPU; see `sample`."""
        config = self.config
        logits = logits[: self.num_tokens].to("cpu", torch.float32, copy=True)
        if not logits.max().isfinite():  # a NaN is the largest of all
            raise StateError(
                "the model's logits are not finite; its weights or the state that it goes on from "
                "are broken"
            )
        if config.repetition_penalty != 1 and self.recent:
            index = torch.tensor(sorted({t for t in self.recent if t < len(logits)}))
            seen, penalty = logits[index], config.repetition_penalty
            logits[index] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if config.temperature == 0:
            return logits.softmax(0)
        # The largest logit becomes 0 first: a tiny temperature must not overflow.
        logits = (logits - logits.max()) / max(config.temperature, SMALLEST)
        if 0 < config.top_k < len(logits):
            best = logits.topk(config.top_k)  # by index: among equals exactly k stay
            logits = torch.full_like(logits, -torch.inf).index_copy(0, best.indices, best.values)
        probabilities = logits.softmax(0)
        if config.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            before = ordered.cumsum(0) - ordered
            probabilities[index[before >= config.top_p]] = 0
            probabilities /= probabilities.sum()
        return probabilities
