"""Frozen, typed configurations of models and training runs."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from metastate.errors import ConfigError
from metastate.mapping import LATER, give_types

CONFIG_VERSION = 1
LARGEST_SIZE = 2**31 - 1  # of a model's sizes
SMALLEST_HEAD, LARGEST_HEAD = 16, 256  # channels of a head that the GPU kernels take
MOST_LAYERS = 10_000
SEEDS = 2**43  # of a run; times a million, as each of its steps has one, they stay below 2^64
LARGEST = 2**53  # of all counts in a run's settings: processes tell them each other as float64
ATTENTION = ("transformer", "tokenformer")  # architectures with a cache of keys and values


def _positive(where: str, **values: int | float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{where}.{name} is {value}; it must be positive")


def _fraction(where: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{where} is {value}; from 0 (frozen) to 1")


_MODEL_SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "input_slices", "head_size"),
    *("ffn_size", "attention_slots", "memory_heads"),
    *("decay_rank", "icl_rate_rank", "value_rank", "gate_rank", "rope_theta"),
)
_TRAIN_SIZES = (
    *("steps", "batch_size", "context", "accumulate", "lr", "clip", "eps"),
    *("log_every", "valid_every", "valid_tokens", "checkpoint_every", "context_parallel"),
)


@dataclass(frozen=True)
class MetaStateConfig:
    """The options of the Meta-State layer; docs/architecture.md gives the equation of each.

    The defaults are the reading that measured best so far (docs/log.md); `paper()` is the literal
    one. `readout_gain` is the first weight of the readout's norms, no part of shape or function.
    """

    readout: Literal["both", "meta", "encoding"] = "encoding"
    modulation: Literal["input", "none"] = "input"
    update: Literal["delta", "input", "self"] = "delta"
    query: Literal["input", "encoding", "receptance"] = "input"
    encoder_query: Literal["input", "receptance"] = "receptance"
    encoding_norm: Literal["l2", "rms", "none"] = "l2"
    output_norm: Literal["group", "none"] = "group"
    readout_gain: float = 0.5
    read: Literal["key", "value"] = "key"
    encoder_size: int | None = None
    encoder: Literal["self_state", "cross"] = "self_state"
    latent_size: int | None = None
    variational: bool = False
    kl_weight: float = 1e-3
    activation: Literal["none", "relu2", "silu"] = "none"
    gate: bool = False
    token_shift: bool = False

    def __post_init__(self) -> None:
        give_types(self, "meta_state")
        _positive("meta_state", encoder_size=self.encoder_size, latent_size=self.latent_size)
        _positive("meta_state", readout_gain=self.readout_gain)
        if self.kl_weight < 0:
            raise ConfigError(f"meta_state.kl_weight is {self.kl_weight}; it must be 0 or more")
        if self.output_norm == "none" and self.readout_gain != type(self).readout_gain:
            raise ConfigError("meta_state.readout_gain needs meta_state.output_norm='group'")
        if self.variational and self.encoder != "cross":
            raise ConfigError("meta_state.variational needs meta_state.encoder='cross'")
        if self.encoder != "cross" and self.latent_size is not None:
            raise ConfigError("meta_state.latent_size needs meta_state.encoder='cross'")
        for name in ("query", "update", "encoding_norm") if self.readout == "encoding" else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(
                    f"meta_state.{name} acts on M alone, and meta_state.readout='encoding' has none"
                )

    @property
    def asks_by_receptance(self) -> bool:
        """Whether a state is read with time mixing's receptance of the layer's own input."""
        return "receptance" in (self.encoder_query, self.query)

    @classmethod
    def paper(cls) -> MetaStateConfig:
        """Return the paper's literal reading: no modulation, no norm, U = e^T e."""
        return cls(
            readout="meta",
            modulation="none",
            update="self",
            encoder_query="input",
            encoding_norm="none",
            output_norm="none",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a model's shape and function.

    Sizes: D = hidden_size, L = num_layers, H = num_heads, N = head_size (D/H unless given),
    V = vocab_size. The low-rank sizes of RWKV-7 follow its training code where they are None.
    ffn_size (F) is the hidden width of a feed-forward layer, 4 D unless given; a Meta-State block
    has none unless it is given, and then channel mixing as in RWKV-7, where ffn_order says: after
    the Meta-State layer, with a norm of its own, or (None, as in files from before that choice)
    beside it, on the same normed input. meta_layers and ffn_layers number the blocks (from 0) that
    have a Meta-State layer and that feed-forward layer; None means all. A TokenFormer's layers have
    attention_slots and ffn_size learned slots, 0.75 D and 3 D unless given. With memory_heads a
    meta state of so many heads stands before the block memory_layer (from 0; -1 is the top one), or
    before the head of the model where that is None, of any architecture
    (layers/surprise_memory.py).
    Growth sets input_slices (slices that the Meta-State heads cut x into, H unless given; head
    h reads slice h mod input_slices), head_segments (a head's channels by growth step), and
    first_slots (attention_slots and ffn_size that a TokenFormer began with).
    """

    architecture: Literal["metastate", "rwkv7", "transformer", "tokenformer"] = "metastate"
    vocab_size: int = 50304
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    input_slices: int | None = None
    head_size: int | None = None
    head_segments: tuple[int, ...] | None = None
    ffn_size: int | None = None
    attention_slots: int | None = None
    first_slots: tuple[int, ...] | None = None
    decay_rank: int | None = None
    icl_rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    parameter_tokens: int = 0
    meta_state: MetaStateConfig = field(default_factory=MetaStateConfig)
    meta_layers: tuple[int, ...] | None = field(default=None, metadata=LATER)
    ffn_layers: tuple[int, ...] | None = field(default=None, metadata=LATER)
    ffn_order: Literal["beside", "after"] | None = field(default=None, metadata=LATER)
    memory_heads: int | None = field(default=None, metadata=LATER)
    memory_layer: int | None = field(default=None, metadata=LATER)
    rope_theta: float = 10000.0
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        give_types(self, "model")
        if not 1 <= self.version <= CONFIG_VERSION:
            raise ConfigError(
                f"this model's config has version {self.version}, this program reads up to "
                f"{CONFIG_VERSION}; install a newer metastate"
            )
        _positive("model", **{name: getattr(self, name) for name in _MODEL_SIZES})
        if self.parameter_tokens < 0:
            raise ConfigError(f"model.parameter_tokens is {self.parameter_tokens}; 0 or more")
        slices = self.input_slices or self.num_heads
        if self.hidden_size % slices:
            name = "input_slices" if self.input_slices else "num_heads"
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} is not a multiple of {name} {slices}; "
                "change one of them"
            )
        if slices > self.num_heads:
            raise ConfigError(f"model.input_slices {slices} is above num_heads {self.num_heads}")
        object.__setattr__(self, "input_slices", slices)
        if self.head_size is None:
            object.__setattr__(self, "head_size", self.hidden_size // slices)
        assert self.head_size is not None
        sizes = {name: getattr(self, name) or 0 for name in (*_MODEL_SIZES, "parameter_tokens")}
        for name, size in {**sizes, "num_heads * head_size": self.attention_size}.items():
            largest = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            if size > largest and name != "rope_theta":
                raise ConfigError(f"model.{name} is {size}; {largest} at most")
        segments = self.head_segments or (self.head_size,)
        if sum(segments) != self.head_size or min(segments) < 1:
            raise ConfigError(
                f"model.head_segments {list(segments)} must be positive and sum to head_size "
                f"{self.head_size}"
            )
        object.__setattr__(self, "head_segments", tuple(segments))
        if self.architecture == "tokenformer":
            slots = (
                self.attention_slots or max(1, 3 * self.hidden_size // 4),
                self.ffn_size or 3 * self.hidden_size,
            )
            object.__setattr__(self, "attention_slots", slots[0])
            object.__setattr__(self, "ffn_size", slots[1])
            first = self.first_slots or slots
            if len(first) != 2 or first[0] > slots[0] or first[1] > slots[1] or min(first) < 1:
                raise ConfigError(
                    f"model.first_slots {list(first)} must be two numbers from 1 to "
                    f"attention_slots and ffn_size, {list(slots)}"
                )
            object.__setattr__(self, "first_slots", tuple(first))
        if self.architecture in ATTENTION:
            if self.attention_size != self.hidden_size or self.head_size % 2:
                raise ConfigError(
                    f"a {self.architecture} needs an even head_size equal to hidden_size / "
                    f"num_heads (rotary positions turn pairs); head_size is {self.head_size}"
                )
            if self.parameter_tokens:
                raise ConfigError(
                    f"model.parameter_tokens needs a WKV state; a {self.architecture} has none"
                )
        elif self.head_size < self.hidden_size // slices:
            raise ConfigError(
                f"model.head_size {self.head_size} is below hidden_size / num_heads = "
                f"{self.hidden_size // slices}"
            )
        if self.memory_heads and self.hidden_size % self.memory_heads:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} is not a multiple of memory_heads "
                f"{self.memory_heads}; change one of them"
            )
        if self.memory_layer is not None:
            if not self.memory_heads:
                raise ConfigError("model.memory_layer needs model.memory_heads")
            if not -1 <= self.memory_layer < self.num_layers:
                raise ConfigError(
                    f"model.memory_layer is {self.memory_layer}; a block from 0 to "
                    f"{self.num_layers - 1}, -1 for the top one, or null for before the head"
                )
            object.__setattr__(self, "memory_layer", self.memory_layer % self.num_layers)
        self._check_layers()
        size = self.meta_state.encoder_size
        if size is not None and size > self.head_size:
            raise ConfigError(f"meta_state.encoder_size {size} is above head_size {self.head_size}")
        latent = self.meta_state.latent_size
        if latent is not None and latent >= self.head_size:
            raise ConfigError(
                f"meta_state.latent_size {latent} is not below head_size {self.head_size}; "
                "the cross encoder compresses"
            )

    def _check_layers(self) -> None:
        """Check which blocks have which second layer, and where; the usual is written as None."""
        for name in ("meta_layers", "ffn_layers"):
            given = getattr(self, name)
            if given is None:
                continue
            if self.architecture != "metastate":
                raise ConfigError(f"model.{name} is for metastate, not for {self.architecture}")
            layers = tuple(sorted(set(given)))
            if not layers or layers[0] < 0 or layers[-1] >= self.num_layers:
                raise ConfigError(
                    f"model.{name} is {list(given)}; blocks from 0 to {self.num_layers - 1}, at "
                    "least one"
                )
            object.__setattr__(self, name, layers if len(layers) < self.num_layers else None)
        if self.ffn_layers is not None and not self.ffn_size:
            raise ConfigError("model.ffn_layers needs model.ffn_size")
        if self.ffn_order is not None and self.architecture != "metastate":
            raise ConfigError(f"model.ffn_order is for metastate, not for {self.architecture}")
        if self.ffn_order == "after" and self.ffn_size and self.meta_state.token_shift:
            raise ConfigError(
                "meta_state.token_shift needs model.ffn_order='beside': the Meta-State and the "
                "feed-forward layer of a block share one shifted input"
            )
        if self.ffn_order == "beside":
            object.__setattr__(self, "ffn_order", None)
        if self.architecture == "metastate":
            for layer in range(self.num_layers):
                if not any(self.second_layers(layer)):
                    raise ConfigError(
                        f"block {layer} has neither a Meta-State nor a feed-forward layer; name it "
                        "in model.meta_layers or (with model.ffn_size) in model.ffn_layers"
                    )

    def second_layers(self, layer: int) -> tuple[bool, bool]:
        """Return whether a recurrent block has a Meta-State layer, and a feed-forward layer."""
        if self.architecture != "metastate":
            return False, True
        return (
            self.meta_layers is None or layer in self.meta_layers,
            bool(self.ffn_size) and (self.ffn_layers is None or layer in self.ffn_layers),
        )

    @property
    def attention_size(self) -> int:
        """D_att = H N, the width of all heads together."""
        assert self.head_size is not None
        return self.num_heads * self.head_size

    @property
    def hidden_channels(self) -> int:
        """F of a block's feed-forward layer, 0 where it has none."""
        return self.ffn_size or (0 if self.architecture == "metastate" else 4 * self.hidden_size)

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with `changes`; derived fields follow unless they are given.

        So do the heads of a surprise memory, of which there are as few as may be in a new width,
        and its place: what stands before the top block does so in another depth.
        """
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if {"hidden_size", "attention_slots", "ffn_size"} & changes.keys():
            data["first_slots"] = None
        if {"hidden_size", "num_heads", "head_size"} & changes.keys():
            data["head_segments"] = None
            if self.input_slices == self.num_heads:
                data["input_slices"] = None
            if "head_size" not in changes and self.attention_size == self.hidden_size:
                data["head_size"] = None
        width = changes.get("hidden_size")
        if isinstance(width, int) and self.memory_heads:
            data["memory_heads"] = fewest_memory_heads(width)
        if changes.get("memory_heads", self.memory_heads) is None:
            data["memory_layer"] = None
        elif self.memory_layer == self.num_layers - 1:
            data["memory_layer"] = -1
        return ModelConfig(**(data | changes))


def fewest_memory_heads(hidden_size: int) -> int:
    """Return the fewest heads of a surprise memory that LARGEST_HEAD channels at most allow.

    A width without such divisors gets one head, which the GPU kernels do not take.
    """
    sizes = range(min(hidden_size, LARGEST_HEAD), SMALLEST_HEAD - 1, -1)
    return next((hidden_size // n for n in sizes if not hidden_size % n), 1)


@dataclass(frozen=True)
class GrowthStep:
    """Growth inside a run: before update `step` the model grows to the sizes that are given.

    The learning rate rises again from zero over `warmup` steps, and entries that the model had
    before learn at `old_lr_scale` times the rate until the next growth (None: as the run says).
    """

    step: int
    head_size: int | None = None
    num_heads: int | None = None
    parameter_tokens: int | None = None
    num_layers: int | None = None
    ffn_size: int | None = None
    attention_slots: int | None = None
    memory_heads: int | None = None
    init: Literal["zero", "random", "released"] = "zero"
    warmup: int = 0
    old_lr_scale: float | None = None

    def __post_init__(self) -> None:
        give_types(self, "growth")
        _positive("growth", step=self.step, **self.sizes())
        if not any(self.sizes().values()):
            raise ConfigError(f"growth at step {self.step} names no size to grow to")
        if self.warmup < 0:
            raise ConfigError(f"growth.warmup is {self.warmup}; 0 or more steps")
        if self.old_lr_scale is not None:
            _fraction("growth.old_lr_scale", self.old_lr_scale)

    def sizes(self) -> dict[str, int | None]:
        """Return the sizes to grow to, None where an axis stays."""
        other = ("step", "init", "warmup", "old_lr_scale")
        return {key: n for key, n in vars(self).items() if key not in other}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `model` overrides single fields of the preset.

    With `from_checkpoint` the run starts from those weights, and preset and model are not used. A ~
    at the start of a path is the home of a person.
    """

    MEANT: ClassVar[dict[str, str]] = {
        **{f.name: f"model.{f.name}" for f in dataclasses.fields(ModelConfig)},
        **{"learning_rate": "lr", "wd": "weight_decay", "bs": "batch_size", "max_steps": "steps"},
    }

    preset: str = "metastate-tiny"
    from_checkpoint: str = ""
    data: str = ""
    out: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 16
    context: int = 512
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 50
    decay_fraction: float = 0.2
    old_lr_scale: float = 1.0
    growth: tuple[GrowthStep, ...] = ()
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    clip: float = 1.0
    z_loss: float = 1e-4
    seed: int = 0
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "none"
    shard_size: int = 0
    context_parallel: int = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    backend: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    document_reset: bool = True
    carry_state: bool = False
    log_every: int = 10
    valid_every: int = 200
    valid_tokens: int = 65536
    checkpoint_every: int = 200
    async_checkpoint: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        give_types(self, "train")
        for name in ("data", "out", "from_checkpoint"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        for name, value in vars(self).items():
            if isinstance(value, int) and value > LARGEST:
                raise ConfigError(f"train.{name} is {value}; {LARGEST} at most")
        _positive("train", **{name: getattr(self, name) for name in _TRAIN_SIZES})
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"train.min_lr {self.min_lr} must be between 0 and lr {self.lr}")
        for name in ("warmup", "shard_size", "weight_decay", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"train.decay_fraction is {self.decay_fraction}; in (0, 1]")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; in [0, 1)")
        _fraction("train.old_lr_scale", self.old_lr_scale)
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"train.seed is {self.seed}; from 0 to {SEEDS - 1}")
        steps = [g.step for g in self.growth]
        if steps != sorted(set(steps)):
            raise ConfigError(f"train.growth has steps {steps}; each must be after the one before")
        if steps and steps[-1] >= self.steps:
            raise ConfigError(f"train.growth: {steps[-1]} is after the run's end, {self.steps}")
