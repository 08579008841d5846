"""What a comparison is: models x sizes x seeds, and the runs that they come to.

A suite names models (a preset's architecture and changes to it), sizes and seeds. `plan` turns it
into cells, each an ordinary training run; `fit_parameters` makes their sizes equal.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from metastate.config import ModelConfig, TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import ConfigError, DataError
from metastate.mapping import from_dict, merge, to_dict, unknown_key_message
from metastate.model.lm import sketch
from metastate.model.presets import preset

TOLERANCE = 0.01  # of the non-embedding parameters, under which two counts are called equal
DEPTHS = range(1, 200)
RESERVED = {  # setting of `train`: what decides it instead
    "data": "suite.data or --data",
    "out": "--out",
    "seed": "suite.seeds",
    "steps": "tokens_per_parameter",
    "preset": "suite.models and suite.sizes",
    "model": "suite.models and suite.sizes",
    "growth": "suite.sizes (a cell has one size)",
    "from_checkpoint": "the seed (equal cells start from fresh weights)",
    "valid_every": "suite.points",
    "checkpoint_every": "suite.points",
}
SAME_TEXT = ("batch_size", "context", "accumulate", "valid_tokens", "document_reset", "carry_state")


@dataclass(frozen=True)
class SuiteModel:
    """One side of the comparison: a preset's architecture, and what differs from it."""

    preset: str = "metastate"
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteSize:
    """One size: a preset's (`preset`, else the size's own name), and changes for every model.

    `parameters`, without embedding and head, is what `match_params` fits every model to; the first
    model's own count unless given. `shapes` are changes for one model by its name, which say what a
    fit would guess. `seeds` and `tokens_per_parameter` replace the suite's.
    """

    preset: str | None = None
    parameters: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    tokens_per_parameter: float | None = None


@dataclass(frozen=True)
class RateSweep:
    """How learning rates are found; no values: as `train.lr` says."""

    values: tuple[float, ...] = ()
    share: float = 0.25
    exponent: float = 0.5


@dataclass(frozen=True)
class Suite:
    """A whole comparison; docs/results.md shows some.

    Attributes:
        data: folder of prepared data; cells are scored on its test split.
        models: name -> SuiteModel, in the order of the tables.
        sizes: name -> SuiteSize, smallest first.
        baseline: model that gains are relative to; the last one unless given.
        seeds: of every cell.
        tokens_per_parameter: training tokens a non-embedding parameter.
        points: held-out scores along a run.
        test_tokens: text of the test split that the finished cell is scored on.
        train: settings of every run.
        lr: sweep of learning rates.
    """

    models: dict[str, Any]
    sizes: dict[str, Any]
    data: str = ""
    baseline: str = ""
    seeds: tuple[int, ...] = (0,)
    tokens_per_parameter: float = 10.0
    points: int = 20
    test_tokens: int = 262144
    train: dict[str, Any] = field(default_factory=dict)
    lr: RateSweep = field(default_factory=RateSweep)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.path.expanduser(self.data))
        for name, kind in (("models", SuiteModel), ("sizes", SuiteSize)):
            given = getattr(self, name)
            if not given:
                raise ConfigError(f"suite.{name} is empty; name at least one")
            typed = {
                str(key): value
                if isinstance(value, kind)
                else from_dict(kind, value or {}, f"suite.{name}.{key}")
                for key, value in given.items()
            }
            object.__setattr__(self, name, typed)
        folders: dict[str, str] = {}
        for pair in ((model, size) for model in self.models for size in self.sizes):
            title, folder = ", ".join(pair), _folder(*pair)
            if folder in folders:
                raise ConfigError(
                    f"{folders[folder]!r} and {title!r} would share one folder, {folder}; rename a "
                    "model or a size"
                )
            folders[folder] = title
        object.__setattr__(self, "baseline", self.baseline or list(self.models)[-1])
        if self.baseline not in self.models:
            raise ConfigError(
                f"suite.baseline is {self.baseline!r}; the models are {', '.join(self.models)}"
            )
        for key, size in self.sizes.items():
            for name in size.shapes:
                if name not in self.models:
                    where = f"suite.sizes.{key}.shapes"
                    raise ConfigError(unknown_key_message(name, list(self.models), where))
        if not self.seeds:
            raise ConfigError("suite.seeds is empty; name at least one")
        own = ("tokens_per_parameter", "points", "test_tokens")
        _check_numbers("suite", self, own, self.seeds)
        for key, size in self.sizes.items():
            names = ("parameters", "tokens_per_parameter")
            _check_numbers(f"suite.sizes.{key}", size, names, size.seeds or ())
        for rate in self.lr.values:
            if rate <= 0 or self.lr.values.count(rate) > 1:
                raise ConfigError(f"suite.lr.values holds {rate:g}; different rates above 0")
        if not 0 < self.lr.share <= 1:
            raise ConfigError(f"suite.lr.share is {self.lr.share:g}; above 0, at most 1")
        if self.lr.exponent < 0:
            raise ConfigError(f"suite.lr.exponent is {self.lr.exponent:g}; 0 or more")


def _check_numbers(where: str, given: Any, names: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Refuse numbers that are not above 0, and a seed that stands twice or is negative."""
    for name in names:
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{where}.{name} is {value}; it must be above 0")
    for seed in seeds:
        if seed < 0 or seeds.count(seed) > 1:
            raise ConfigError(f"{where}.seeds holds {seed}; different numbers, 0 or more")


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Attributes:
        model, size, seed: its place; `rate` is the learning rate of a sweep's run, else None.
        config: of the model.
        train: settings of the run.
        parameters: of the model, without embedding and head.
        data: fingerprint of the prepared data.
        test_tokens: of the test text, to score the finished run on.
    """

    model: str
    size: str
    seed: int
    rate: float | None
    config: ModelConfig
    train: TrainConfig
    parameters: int
    data: str
    test_tokens: int

    @property
    def title(self) -> str:
        """The cell's name for people."""
        rate = "" if self.rate is None else f", lr {self.rate:g}"
        return f"{self.model}, {self.size}, seed {self.seed}{rate}"

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return Path(self.train.out)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.train.steps * self.train.batch_size * self.train.context * self.train.accumulate

    @property
    def flops(self) -> int:
        """Training FLOPs of the run."""
        return self.tokens * sum(sketch(self.config).flops_per_token(self.train.context))


def _all_fields(config: ModelConfig) -> dict[str, Any]:
    """Return what makes `config` of any preset: every field, those at None too."""
    every = {f.name: None for f in fields(config)} | to_dict(config)
    return {name: value for name, value in every.items() if name != "version"}


def _folder(model: str, size: str) -> str:
    """Return how the folders of a model's and size's runs begin."""
    slugs = (re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in (model, size))
    return "-".join(slugs)


def count(config: ModelConfig) -> int:
    """Return the parameters of a model without embedding and head."""
    return sketch(config).count_parameters()["non_embedding"]


def fit_parameters(
    config: ModelConfig, target: int, ratio: float | None = None, *, depths: Sequence[int] = DEPTHS
) -> ModelConfig:
    """Return `config` with the depth and hidden width whose count comes to `target` within 1 %.

    Of the depths that can meet it, the one whose hidden width F comes nearest to `ratio` D; D, H
    and N stay. A layer without a hidden part is fitted by depth alone.

    Args:
        config: what to fit.
        target: parameters without embedding and head.
        ratio: F / D that is preferred; that of `config` unless given, so that every architecture
            keeps the shape that it was found to do best in.
        depths: those to choose from, rising.

    Raises:
        ConfigError: none of them meets the target.
    """
    D, kind, hidden = config.hidden_size, config.architecture, config.hidden_channels
    usual = (D * ratio if ratio else hidden) or 1.0  # 1: nothing to choose by
    step = config.num_heads if kind == "metastate" else 4
    # The count is linear in the width, and in the depth from one block on.
    widths = (1, 2) if hidden else (1, 1)
    (one, wider), (two, two_wider) = (
        [count(_shape(config, depth, n * step if hidden else None)) for n in widths]
        for depth in (1, 2)
    )
    found: list[tuple[float, int, int]] = []
    for depth in depths:
        base, slope = one + (depth - 1) * (two - one), wider - one
        slope += (depth - 1) * (two_wider - two - slope)
        n = 1 + round((target - base) / slope) if slope else 1
        if n < 1 or base > target * (1 + TOLERANCE):
            break
        if abs(base + (n - 1) * slope - target) <= TOLERANCE * target:
            found.append((abs(math.log(n * step / usual)), depth, n * step))
    if not found:
        what = "depth" if len(depths) > 1 else f"hidden width of {depths[0]} block(s)"
        raise ConfigError(
            f"no {what} of this {kind} (D {D}) has {target:,} parameters within 1 %: one block "
            f"makes {one:,}, each further one {two - one:,}; choose another target or hidden_size"
            + ("" if hidden else ", or give it an ffn_size, which can be fitted")
        )
    _, depth, width = min(found)
    return _shape(config, depth, width if hidden else None)


def _shape(config: ModelConfig, depth: int, width: int | None) -> ModelConfig:
    changes: dict[str, Any] = {"num_layers": depth}
    if width is not None:
        changes["ffn_size"] = width
        if config.architecture == "tokenformer":
            changes["attention_slots"] = width // 4
    return config.replace(**changes)


def plan(suite: Suite, out: str | os.PathLike[str], *, match_params: bool = False) -> list[Cell]:
    """Return all runs of a suite in their order: sweeps, then size by size, seed by seed.

    Raises:
        ConfigError: a model or size is impossible, or cannot be fitted. DataError: no such data.
    """
    data = PreparedData.open(suite.data)
    if not data.has("valid"):
        raise DataError(f"{suite.data} has no valid split, by which the comparison is made")
    cells: list[Cell] = []
    for size_name, size in suite.sizes.items():
        target = size.parameters
        for name, side in suite.models.items():
            changes = merge(merge({"vocab_size": data.vocab_size}, size.model), side.model)
            changes = merge(changes, size.shapes.get(name) or {})
            origin = f"{side.preset}-{size.preset or size_name}"
            config = preset(origin, **changes)
            target = target or count(config)
            if match_params:  # by the preset's own F / D, unless the suite says an F
                own = config if "ffn_size" in changes else preset(origin)
                ratio = own.hidden_channels / own.hidden_size
                config = fit_parameters(config, target, ratio)
            settings = merge(merge(suite.train, size.train), side.train)
            for reserved in RESERVED.keys() & settings.keys():
                raise ConfigError(
                    f"train.{reserved} cannot be set in a suite, where {RESERVED[reserved]} "
                    "decides it; remove it"
                )
            if suite.lr.values and "lr" in size.train | side.train:
                raise ConfigError(
                    f"{name}, {size_name} has a train.lr of its own beside suite.lr.values, which "
                    "decide it; remove one of them"
                )
            base = from_dict(TrainConfig, settings, "suite.train")
            a_step = base.batch_size * base.context * base.accumulate
            tokens = (size.tokens_per_parameter or suite.tokens_per_parameter) * target
            steps = max(1, round(tokens / a_step))
            base = replace(
                base,
                preset=origin,
                model=_all_fields(config),
                data=suite.data,
                steps=steps,
                valid_every=max(1, steps // suite.points),
                checkpoint_every=max(1, steps // suite.points),
            )
            runs: list[tuple[int, float | None, TrainConfig]]
            runs = [(seed, None, base) for seed in size.seeds or suite.seeds]
            for lr in suite.lr.values if size_name == next(iter(suite.sizes)) else ():
                short = replace(
                    base,
                    steps=max(1, round(steps * suite.lr.share)),
                    warmup=math.ceil(base.warmup * suite.lr.share),
                    lr=lr,
                    min_lr=lr * base.min_lr / base.lr,
                )
                runs.append((suite.seeds[0], lr, short))
            for seed, rate, run in runs:
                parts = [_folder(name, size_name), f"seed{seed}"]
                parts += [] if rate is None else [f"lr{rate:g}"]
                folder = Path(out) / ("cells" if rate is None else "sweep") / "-".join(parts)
                run = replace(run, out=str(folder), seed=seed)
                made = name, size_name, seed, rate, config, run, count(config)
                cells.append(Cell(*made, data.fingerprint, suite.test_tokens))
    sizes = list(suite.sizes)
    seeds = {s: i for size in suite.sizes.values() for i, s in enumerate(size.seeds or suite.seeds)}
    # Seed by seed, so that what is finished compares all models at any time.
    return sorted(cells, key=lambda c: (c.rate is None, sizes.index(c.size), seeds.get(c.seed, 0)))


def uneven(cells: list[Cell]) -> list[str]:
    """Return what is not equal at a size, a sentence each.

    That is counts that differ by more than two fits may, 2 %, and settings by which models see
    other text, or see it in another order.
    """
    said = []
    for size in dict.fromkeys(c.size for c in cells):
        counts = {c.model: c.parameters for c in cells if c.size == size}
        low, high = min(counts.values()), max(counts.values())
        if high > low * (1 + 2 * TOLERANCE):
            each = ", ".join(f"{name} {n:,}" for name, n in counts.items())
            said.append(f"size {size}: parameters are not equal ({each}); --match-params fits them")
        for key in SAME_TEXT:
            values = {c.model: getattr(c.train, key) for c in cells if c.size == size}
            if len(set(values.values())) > 1:
                each = ", ".join(f"{name} {value}" for name, value in values.items())
                said.append(
                    f"size {size}: train.{key} differs ({each}), so that the models do not learn "
                    "from, or are not scored on, the same text in the same order"
                )
    return said
