"""State tracking and recall: made-up tasks that say what a recurrent state can hold and compute.

Both are made as they are needed, from a seed, and learned from nothing by small models. A problem
is a `WordProblem` or a `Recall`; a cell is one architecture of one size trained on one problem.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from metastate.config import MetaStateConfig, ModelConfig, TrainConfig, fewest_memory_heads
from metastate.errors import ConfigError
from metastate.model.lm import LanguageModel
from metastate.model.loss import IGNORE, lm_loss
from metastate.model.presets import ARCHITECTURES
from metastate.train.optim import learning_rate, make_optimizer

GROUPS = ("S5", "A5", "A4xZ5", "Z60")
LEVELS = ("64x4", "128x8", "256x16", "512x64", "1024x128", "2048x256")
LARGEST_GROUP = 1000  # elements: the table is their square
REACH, SHORTER = 3, 0.3  # first length of a word problem's training; share of shorter batches
BEYOND = 4  # word problems are also scored up to so many times the length learned
GAP_POWER = 0.01  # queries come a gap of g slots later with probability ~ g^(GAP_POWER - 1)
ANSWERS, PROBE = 2048, 256  # answers that a score, and a look during training, rest on
TOKENS = 16384  # tokens of one forward while scoring
# Parts of the seeds' space: no sequence is shared but by chance.
TRAIN, WATCH, TEST, CHOICE = range(4)

Seed = int | Sequence[int]


@cache
def group_table(name: str) -> np.ndarray:
    """Return the multiplication table of a finite group.

    Args:
        name: S, A (permutations and even permutations) or Z (cyclic) with a number, or several
            joined by x (the direct product): S5, A4xZ5, Z60.

    Returns:
        [n, n] int64, entry i, j the number of g_i o g_j, where (p o q)(x) = p(q(x)). Element 0 is
        the identity.

    Raises:
        ConfigError: the name is none, or the group has fewer than 2 or more than LARGEST_GROUP
            elements.
    """
    tables = []
    for factor in name.split("x"):
        match = re.fullmatch(r"([SAZ])([1-9]\d{0,3})", factor)
        if not match:
            raise ConfigError(
                f"unknown group {name!r}; {', '.join(GROUPS)}, or others written so: S, A or Z "
                "with a number, products with x between"
            )
        kind, n = match[1], int(match[2])
        permutations = math.factorial(min(n, 9))  # above the largest group from 7 on
        order = {"S": permutations, "A": (permutations + 1) // 2, "Z": n}[kind]
        tables.append((kind, n, order))
    total = math.prod(order for _, _, order in tables)
    if not 2 <= total <= LARGEST_GROUP:
        raise ConfigError(f"the group {name} has {total} elements or more; 2 to {LARGEST_GROUP}")
    out = np.zeros((1, 1), np.int64)
    for kind, n, order in tables:
        i = np.arange(n)
        own = (i[:, None] + i) % n if kind == "Z" else _permutations(n, even=kind == "A")
        both = out[:, None, :, None] * order + own[None, :, None, :]
        out = both.reshape(len(out) * order, -1)
    out.flags.writeable = False  # shared by all who ask
    return out


def _permutations(n: int, even: bool) -> np.ndarray:
    all_of_them = np.array(list(itertools.permutations(range(n))))  # sorted, the identity first
    earlier, later = np.triu_indices(n, 1)
    swaps = (all_of_them[:, earlier] > all_of_them[:, later]).sum(1)
    p = all_of_them[swaps % 2 == 0] if even else all_of_them
    digits = n ** np.arange(n)[::-1]
    return np.searchsorted(p @ digits, p[:, p] @ digits)


@dataclass(frozen=True)
class WordProblem:
    """Read g_1 g_2 ... of a group, say the product so far after each: label_t = g_1 o ... o g_t.

    Attention and diagonal recurrences of fixed depth are believed unable to follow a group that is
    not solvable (S5, A5) at any length; A4xZ5 and Z60 are the solvable ones of A5's size.

    Attributes:
        name: of the group, as `group_table` reads it.
        length: elements of a sequence in training.

    Source: Merrill, Petty and Sabharwal, arXiv:2404.08819.
    """

    name: str
    length: int = 20
    threshold: ClassVar[float] = 0.9  # accuracy above which it counts as solved
    task: ClassVar[str] = "state-tracking"

    def __post_init__(self) -> None:
        group_table(self.name)
        if self.length < 1:
            raise ConfigError(f"length is {self.length}; 1 or more")

    @property
    def vocab_size(self) -> int:
        """Elements of the group; a token is the number of one."""
        return len(group_table(self.name))

    def batch(
        self, batch_size: int, seed: Seed, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and labels, [B, T] int64, T = length (self.length unless given)."""
        table = group_table(self.name)
        T = length or self.length
        tokens = np.random.default_rng(seed).integers(len(table), size=(batch_size, T))
        labels = tokens.copy()
        for t in range(1, T):
            labels[:, t] = table[labels[:, t - 1], tokens[:, t]]
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def training_batch(self, batch_size: int, seed: Seed, reach: int) -> tuple[Tensor, Tensor]:
        """Return a batch of one length, `reach` mostly, else one from 2 to it; as many tokens each.

        Nothing can be learned of a product before the shorter ones are known. S3 with two layers of
        RWKV-7, at length 20 after 2,600 steps of 64 x 20 tokens: 0.89 right with a reach that grows
        as it is mastered, 0.30 with lengths drawn from 2 to 20 all along.
        """
        rng, length = np.random.default_rng(seed), reach
        if rng.random() < SHORTER:
            length = int(rng.integers(min(2, reach), reach + 1))
        return self.batch(batch_size * self.length // length, seed, length)

    @property
    def first_reach(self) -> int:
        """Length to train first."""
        return min(REACH, self.length)

    def next_reach(self, reach: int, by_length: Sequence[float] | None) -> int:
        """Return the length to train next: the first whose accuracy is not above `threshold`."""
        assert by_length is not None
        while reach < self.length and by_length[reach - 1] > self.threshold:
            reach += 1
        return reach

    def score(self, model: LanguageModel, answers: int, seed: Sequence[int], far: bool) -> Score:
        """Return the accuracy of the product of `length` elements, and of 1, 2, ... elements.

        A model reads from left to right, so its answer at position n is its answer to the sequence
        of length n: one forward scores every length, with `far` up to BEYOND times `length`.
        """
        length = self.length * (BEYOND if far else 1)
        right, asked = _count(model, self, answers, seed, length)
        by_length = (right / asked).tolist()
        return by_length[self.length - 1], by_length


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall: key-value pairs, then each key once more: what was its value?

        k_1 v_1 k_2 v_2 ... k_P v_P  0 0 k_7 0 0 0 k_2 0 ...

    The label stands at the repeated key, IGNORE everywhere else; 0 fills the rest. Queries stand at
    every second place at most, near ones likelier: a gap of g places has probability ~ g^-0.99.
    Keys are 1 .. V/2 - 1 and values V/2 .. V - 1, each drawn without repetition. A 0 tells that
    nothing is asked; with `random` any of the V tokens, keys and values too, stands in its place.

    Attributes:
        length: tokens of a sequence.
        pairs: P.
        vocab_size: V.
        filler: `zero` or `random`.

    Source: Arora et al., "Zoology", arXiv:2312.04927; `zero` is the form of its figure 2
    (`random_non_queries=False`), `random` its code's default, which is harder.
    """

    length: int
    pairs: int
    vocab_size: int = 8192
    filler: Literal["zero", "random"] = "zero"
    threshold: ClassVar[float] = 0.99
    task: ClassVar[str] = "recall"

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length < 4 * self.pairs:
            raise ConfigError(
                f"recall of {self.pairs} pairs in {self.length} tokens is impossible; at least 1 "
                "pair, and 4 tokens a pair"
            )
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ConfigError(
                f"recall of {self.pairs} pairs needs a vocabulary of {2 * self.pairs + 2} or more "
                f"(half of it keys, half values); vocab_size is {self.vocab_size}"
            )
        if self.filler not in ("zero", "random"):
            raise ConfigError(f"filler is {self.filler!r}; allowed: zero, random")

    @classmethod
    def parse(
        cls, text: str, vocab_size: int = 8192, filler: Literal["zero", "random"] = "zero"
    ) -> Recall:
        """Return the problem of LENGTHxPAIRS, as in 64x4; else ConfigError."""
        match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
        if not match:
            raise ConfigError(f"{text!r} is not LENGTHxPAIRS, as in {', '.join(LEVELS)}")
        return cls(int(match[1]), int(match[2]), vocab_size, filler)

    @property
    def name(self) -> str:
        """LENGTHxPAIRS, and `random` where the filler is."""
        return f"{self.length}x{self.pairs}" + " random" * (self.filler == "random")

    def batch(
        self, batch_size: int, seed: Seed, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and labels, [B, T] int64, T = length (self.length unless given)."""
        if length not in (None, self.length):
            return replace(self, length=length).batch(batch_size, seed)
        rng, P, half = np.random.default_rng(seed), self.pairs, self.vocab_size // 2
        keys = 1 + _draw(rng, batch_size, np.zeros(half - 1), P)
        values = half + _draw(rng, batch_size, np.zeros(self.vocab_size - half), P)
        gaps = np.arange(1, (self.length - 2 * P) // 2 + 1)
        places = 2 * P + 2 * _draw(rng, batch_size, (GAP_POWER - 1) * np.log(gaps), P)
        tokens = np.zeros((batch_size, self.length), np.int64)
        if self.filler == "random":
            tokens = rng.integers(self.vocab_size, size=tokens.shape)
        tokens[:, 0 : 2 * P : 2], tokens[:, 1 : 2 * P : 2] = keys, values
        np.put_along_axis(tokens, places, keys, 1)
        labels = np.full_like(tokens, IGNORE)
        np.put_along_axis(labels, places, values, 1)
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def training_batch(self, batch_size: int, seed: Seed, reach: int) -> tuple[Tensor, Tensor]:
        """Return `batch`: all is learned at full length."""
        return self.batch(batch_size, seed)

    @property
    def first_reach(self) -> int:
        """Length to train first: its only one."""
        return self.length

    def next_reach(self, reach: int, by_length: Sequence[float] | None) -> int:
        """Return `reach`."""
        return reach

    def score(self, model: LanguageModel, answers: int, seed: Sequence[int], far: bool) -> Score:
        """Return the share of queries that are answered with the right value, and nothing else."""
        right, asked = _count(model, self, -(-answers // self.pairs), seed, self.length)
        return float(right.sum() / asked.sum()), None


Problem = WordProblem | Recall
Score = tuple[float, list[float] | None]


def _draw(rng: np.random.Generator, rows: int, log_weights: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` of n without repetition by their weights, in random order: [rows, count].

    The largest of log_weights + Gumbel noise are such a draw.
    """
    noisy = log_weights + rng.gumbel(size=(rows, len(log_weights)))
    chosen = np.argpartition(-noisy, count - 1, axis=1)[:, :count]
    return rng.permuted(chosen, axis=1)


@torch.no_grad()
def _count(
    model: LanguageModel, problem: Problem, sequences: int, seed: Sequence[int], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many answers were right and how many asked for at each position, [T] each."""
    device = next(model.parameters()).device
    rows = max(1, TOKENS // length)
    right = asked = np.zeros(1)
    for i, first in enumerate(range(0, sequences, rows)):
        tokens, labels = problem.batch(min(rows, sequences - first), [*seed, i], length)
        x, _, _ = model.features(tokens.to(device))
        scored = labels != IGNORE
        hit = torch.zeros_like(scored)
        hit[scored] = model.head(x[scored.to(device)]).argmax(-1).cpu() == labels[scored]
        right, asked = right + hit.sum(0).numpy(), asked + scored.sum(0).numpy()
    return right, asked


def task_model(
    architecture: str, layers: int, width: int, heads: int, vocab_size: int
) -> ModelConfig:
    """Return the small model of an architecture.

    Args:
        architecture: one of presets.ARCHITECTURES, with a surprise memory if its presets have one;
            NAME+memory has it where they have none, NAME-memory has none where they have it.
        layers: L.
        width: D.
        heads: H; the surprise memory has as few as may be.
        vocab_size: V.

    Raises:
        ConfigError: no such architecture, or sizes that do not fit together.
    """
    name = re.sub(r"[+-]memory$", "", architecture)
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"unknown architecture {architecture!r}; there are: {', '.join(ARCHITECTURES)}, each "
            "also with +memory or -memory after it"
        )
    usual = name == "metastate"
    memory = usual if name == architecture else architecture == f"{name}+memory"
    if name != architecture and memory == usual:
        has = "a" if usual else "no"
        raise ConfigError(
            f"{name} has {has} surprise memory as it is; write {name}, not {architecture}"
        )
    paper = name == "paper"
    return ModelConfig(
        architecture="metastate" if paper else name,  # type: ignore[arg-type]
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        ffn_size=4 * width // 3 if name == "metastate" else None,  # as in the presets
        ffn_order="after" if name == "metastate" else None,
        memory_heads=fewest_memory_heads(width) if memory else None,
        memory_layer=-1 if memory else None,
        meta_state=MetaStateConfig.paper() if paper else MetaStateConfig(),
    )


def train_and_score(
    problem: Problem,
    model: ModelConfig,
    train: TrainConfig,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Train a fresh model on a problem until it is solved, or to the end, and score it.

    Every `valid_every` steps new sequences are tried: a word problem goes on to longer ones where
    it can, and training stops where less than half of the errors are left that `problem.threshold`
    allows, in as many answers as the score rests on. The score rests on others again.

    Args:
        problem: makes the sequences.
        model: the model; its vocabulary is the problem's.
        train: steps, batch_size, seed, device, valid_every, z_loss, and what `make_optimizer` and
            `learning_rate` read.
        progress: called with (steps done, steps in all, loss=, accuracy=) after each step.

    Returns:
        parameters, non_embedding; steps (made); reach (the length that they came to); loss (of the
        last step, nats an answer); accuracy (at the problem's length); choice (the same on other
        sequences, for choosing among cells); threshold (what accuracy must be above); by_length
        (accuracy at lengths 1, 2, ...; word problems only); passed; diverged (the loss was not
        finite, and training stopped before it did harm); seconds.
    """
    torch.manual_seed(train.seed)
    network = LanguageModel(model).to(torch.device(train.device))
    optimizer = make_optimizer(network, train)
    begun, enough = time.monotonic(), 1 - (1 - problem.threshold) / 2
    step, loss, watched, diverged = 0, math.nan, "", False
    reach = problem.first_reach
    while step < train.steps:
        batch = problem.training_batch(train.batch_size, [train.seed, TRAIN, step], reach)
        tokens, labels = (part.to(train.device) for part in batch)
        out = lm_loss(network, tokens, labels, z_loss=train.z_loss)
        out.loss.backward()
        parameters, norm = optimizer.gather()
        diverged = not (math.isfinite(float(out.loss.detach())) and math.isfinite(float(norm)))
        if diverged:
            break
        optimizer.advance(parameters, norm, train.clip, learning_rate(step, train))
        step, loss = step + 1, float(out.nll)
        accuracy = 0.0
        if step % train.valid_every == 0:
            seed = (train.seed, WATCH, step)
            accuracy, by_length = problem.score(network.eval(), PROBE, seed, far=False)
            if accuracy > enough:  # a lucky few are no reason to stop
                accuracy, by_length = problem.score(network, ANSWERS, (*seed, 0), far=False)
            network.train()
            watched = f"{accuracy:.1%}"
            reach = problem.next_reach(reach, by_length)
            if reach < problem.length:
                watched += f" (learning length {reach})"
        if progress is not None:
            progress(step, train.steps, loss=f"{loss:.3f}", accuracy=watched or "?")
        if accuracy > enough:
            break
    choice, _ = problem.score(network.eval(), ANSWERS, (train.seed, CHOICE), far=False)
    accuracy, by_length = problem.score(network, ANSWERS, (train.seed, TEST), far=True)
    counts = network.count_parameters()
    return {
        "parameters": counts["total"],
        "non_embedding": counts["non_embedding"],
        "steps": step,
        "reach": reach,
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": accuracy,
        "choice": choice,
        "threshold": problem.threshold,
        "by_length": by_length,
        "passed": accuracy > problem.threshold,
        "diverged": diverged,
        "seconds": round(time.monotonic() - begun, 1),
    }
