"""Make a model larger along any axis without changing what it computes.

Why the function stays. New channels of an old head have k = kappa = 0, so the columns of S and M
that they own stay zero and the old channels of a read never see them; norms act on each growth
segment alone; new heads, channels and blocks reach the residual stream only through output columns
that are zero. New pairs of parameter tokens have v_p = 0. Everything else in the new entries is as
in a fresh model, or in new blocks a copy of the block below, so gradients reach all of it within
two steps. A model without a surprise memory can be given one, whose gain is zero at first.

Source: arXiv:2504.08247, section 3.4, eqs 7-11, which leave the values of new entries open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate.config import ATTENTION, GrowthStep, MetaStateConfig, ModelConfig
from metastate.errors import ConfigError, StateError
from metastate.layers.attention import AttentionState
from metastate.layers.common import IDENTITY, KEY, OUTPUT, ZERO, RecurrentState
from metastate.layers.time_mix import TimeMix
from metastate.mapping import coerce_fields, to_dict
from metastate.model.lm import LanguageModel, ask_as
from metastate.model.regions import Region, Regions, regions
from metastate.model.state import ModelState
from metastate.model.weights import weights_hash

RECURRENT = ("head_size", "num_heads", "parameter_tokens", "num_layers", "ffn_size")
AXES = (*RECURRENT, "attention_slots", "memory_heads")
RANDOM_STD = 0.02  # of the entries that init="zero" makes zero
Init = Literal["zero", "random", "released"]


def grown_config(
    config: ModelConfig,
    *,
    init: Init = "zero",
    **sizes: int | None,
) -> ModelConfig:
    """Return the configuration of a model grown to `sizes`; None leaves an axis as it is.

    Raises:
        ConfigError: a size is no whole number, shrinks, does not fit the architecture, or cannot be
            reached exactly.
    """
    assert config.head_size is not None and config.head_segments is not None
    if init not in get_args(Init):
        raise ConfigError(f"init is {init!r}; allowed: {', '.join(map(repr, get_args(Init)))}")
    if init == "released" and config.architecture != "tokenformer":
        raise ConfigError("init='released' is what TokenFormer's code does; only that can grow so")
    if unknown := sorted(sizes.keys() - set(AXES)):
        raise ConfigError(f"{unknown[0]} cannot grow; the axes are {', '.join(AXES)}")
    named = {axis: n for axis, n in sizes.items() if n is not None}
    given = coerce_fields(ModelConfig, named, "growth")
    before = {axis: getattr(config, axis) for axis in AXES}
    before["ffn_size"] = config.hidden_channels
    wanted = {axis: n for axis, n in given.items() if n != before[axis]}
    if not wanted:
        raise ConfigError(
            f"nothing grows: give at least one of {', '.join(AXES)} above its present size "
            f"({', '.join(f'{k} {v}' for k, v in before.items() if v is not None)})"
        )
    kind, meta = config.architecture, config.meta_state
    allowed = {
        "transformer": ("num_layers", "ffn_size"),
        "tokenformer": ("ffn_size", "attention_slots"),
    }.get(kind, RECURRENT)
    if before["memory_heads"] and "memory_heads" in wanted:
        raise ConfigError(
            "the model has a surprise memory already, whose heads cannot change; leave out "
            "memory_heads"
        )
    if refused := sorted(wanted.keys() - {*allowed, "memory_heads"}):
        raise ConfigError(
            f"{refused[0]} of a {kind} cannot grow exactly; it can grow in "
            f"{', '.join(sorted([*allowed, 'memory_heads']))}"
        )
    for axis, n in wanted.items():
        if n < (before[axis] or 0):
            raise ConfigError(f"{axis} {n} is below the present {before[axis]}; growth never drops")
    if kind == "metastate" and "head_size" in wanted and (reason := _inexact(meta)):
        raise ConfigError(f"head_size cannot grow with {reason}; grow num_heads instead")
    changes: dict[str, Any] = {**wanted, "memory_layer": config.memory_layer}
    if kind == "tokenformer":  # its released code forgets how many slots there were
        changes["first_slots"] = None if init == "released" else config.first_slots
    if kind not in ATTENTION:
        # What follows from D, N and the like in a fresh config stays what it is in this model.
        changes |= ranks_of(config)
        changes |= {"input_slices": config.input_slices, "head_size": config.head_size}
        changes["head_segments"] = config.head_segments
        if "head_size" in wanted:
            changes["head_size"] = wanted["head_size"]
            segment = wanted["head_size"] - config.head_size
            if segment == 1:
                raise ConfigError(
                    "head_size cannot grow by one channel: a norm of one number is always zero, so "
                    "it would never be read; grow by two or more"
                )
            changes["head_segments"] = (*config.head_segments, segment)
        # A new block has the layers of the top one, of which it starts as a copy.
        for name in ("meta_layers", "ffn_layers"):
            layers = getattr(config, name)
            if layers is not None and config.num_layers - 1 in layers:
                added = range(config.num_layers, wanted.get("num_layers", config.num_layers))
                changes[name] = (*layers, *added)
        if kind == "metastate" and meta.encoder == "cross":
            latent = meta.latent_size or max(1, config.head_size // 2)
            changes["meta_state"] = dataclasses.replace(meta, latent_size=latent)
    return config.replace(**changes)


def _inexact(meta: MetaStateConfig) -> str:
    """Return the options that forbid wider heads, and why; "" where heads can grow."""
    asks, has_meta = meta.encoder_query == "receptance", meta.readout != "encoding"
    if has_meta and meta.update == "self" and meta.query != "input":
        return (
            f"meta_state.update='self' and query={meta.query!r}: the new channels of e would be "
            "read back through the old ones"
        )
    if asks and meta.read == "value":
        return (
            "meta_state.encoder_query='receptance' and read='value': old channels would be read "
            "through new values"
        )
    if asks and has_meta and meta.query == "input" and meta.update != "self":
        return (
            "meta_state.encoder_query='receptance' and query='input': new key channels of M would "
            "be written and read with the same zeros and never learn (query='receptance' can grow)"
        )
    if asks and meta.encoder == "cross":
        return (
            "meta_state.encoder_query='receptance' and encoder='cross': what feeds the new "
            "channels of x would never learn"
        )
    return ""


def ranks_of(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of the low-rank maps of a recurrent model, as given or by D and N."""
    with torch.device("meta"):
        mix = TimeMix(config, 1)  # layer 0 has no value residual
    assert mix.value_mix is not None
    return {
        "decay_rank": mix.decay.A.shape[1],
        "icl_rate_rank": mix.icl_rate.A.shape[1],
        "value_rank": mix.value_mix.A.shape[1],
        "gate_rank": mix.gate.A.shape[1],
    }


@torch.no_grad()
def grow(
    model: LanguageModel,
    *,
    head_size: int | None = None,
    num_heads: int | None = None,
    parameter_tokens: int | None = None,
    num_layers: int | None = None,
    ffn_size: int | None = None,
    attention_slots: int | None = None,
    memory_heads: int | None = None,
    init: Init = "zero",
    seed: int = 0,
) -> LanguageModel:
    """Return a larger model; `model` is not changed. The width D stays.

    Args:
        model: the parent, of any architecture.
        head_size: N, channels of a head and of its states; new ones form a growth segment.
        num_heads: H; new heads read the slices of x of old ones in turn.
        parameter_tokens: P, pairs (k_p, v_p) that make up the state before the first token.
        num_layers: L; new blocks go on top and have the layers of the block that was there.
        ffn_size: F, hidden channels of a feed-forward layer; where no Meta-State block has one, all
            get one.
        attention_slots: A, slots of a TokenFormer's projections.
        memory_heads: heads of a surprise memory before the head, of any model that has none.
        init: "zero", and the grown model computes what the parent does; or "random", the paper's
            other choice: the entries that would be zero are normal with std 0.02; or "released", of
            a TokenFormer only: what its released code does, new keys random and the scale that of
            the new number of slots.
        seed: of the new entries.

    Returns:
        The grown model on the parent's device and in its dtype; its lineage has one more step.

    Raises:
        ConfigError: a size is no whole number, an axis shrinks, does not divide, is unknown to the
            architecture or cannot grow exactly; or torch takes no such seed.

    Source: arXiv:2504.08247, section 3.4; the choice of new entries is ours (docs/architecture.md).
    """
    sizes = {
        "head_size": head_size,
        "num_heads": num_heads,
        "parameter_tokens": parameter_tokens,
        "num_layers": num_layers,
        "ffn_size": ffn_size,
        "attention_slots": attention_slots,
        "memory_heads": memory_heads,
    }
    parent = model.config
    config = grown_config(parent, init=init, **sizes)
    like = model.embedding.weight
    with drawing(seed):
        grown = LanguageModel(config).to(like.dtype)
        before, axes = dict(model.named_parameters()), grown.growth_axes()
        parts = regions(grown, parent)
        for name, part in parts.items():
            if part.old is not None and name in before:
                part.old.of(grown.get_parameter(name)).copy_(_parents(part, before[name]))
        _copy_top(grown, parent.num_layers)
        for name, (_, rule) in axes.items():
            p, part = grown.get_parameter(name), parts[name]
            is_above = name.startswith("blocks.") and int(name.split(".")[1]) >= parent.num_layers
            for region in _closed(part, rule, is_above):
                if init == "zero":
                    region.of(p).zero_()
                elif init == "random":
                    region.of(p).normal_(std=RANDOM_STD)
            if is_above and rule == ZERO and not p.any():
                p.normal_(std=RANDOM_STD)  # behind a closed output zero would only delay it
    step: dict[str, Any] = {
        axis: [getattr(parent, axis), getattr(config, axis)]
        for axis in AXES
        if getattr(parent, axis) != getattr(config, axis)
    }
    inherit(grown, model, step | {"init": init, "seed": seed})
    return grown.to(like.device).train(model.training)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Draw random numbers from `seed`, and afterwards as if nothing had been drawn."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed}; from 0 to 2^64 - 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def inherit(grown: LanguageModel, model: LanguageModel, step: dict[str, Any]) -> None:
    """Give `grown` what its parent `model` is known by, and its lineage one more `step`.

    Parameters that the parent has ask for a gradient as they do there.
    """
    ask_as(model, grown)
    step = step | {"step": model.step, "parent": weights_hash(model), "child": weights_hash(grown)}
    grown.lineage = [*model.lineage, step | {"before": to_dict(model.config)}]
    grown.step = model.step
    grown.tokenizer_info = model.tokenizer_info
    grown.backend = model.backend
    grown.activation_checkpointing = model.activation_checkpointing


def _copy_top(grown: LanguageModel, num_old: int) -> None:
    """Start each new block as a copy of the parent's top one, whose features are useful already."""
    top = dict(grown.blocks[num_old - 1].named_parameters())
    for block in grown.blocks[num_old:]:
        for name, p in block.named_parameters():
            if name in top:  # block 0 has no value residual
                p.copy_(top[name])


def _closed(part: Regions, rule: str, is_above: bool) -> list[Region]:
    """Return the regions that must be zero for the function to stay; `is_above`: a new block's."""
    if rule == OUTPUT or (rule == ZERO and not is_above):
        return list(part.new.values())
    return [part.new["N"]] if rule in (KEY, IDENTITY) and "N" in part.new else []


def _parents(part: Regions, x: Tensor) -> Tensor:
    """Return the parent's tensor with its axes taken apart as in `part.old`."""
    assert part.old is not None
    return x.reshape([last for _, last in part.old.box])


def grow_moments(
    moments: dict[str, Tensor], grown: LanguageModel, parent: ModelConfig
) -> dict[str, Tensor]:
    """Return an optimizer's moments for a grown model.

    Old entries keep theirs. New entries of an old parameter have no mean gradient, and the square
    of a gradient that its old entries have on average: at zero, with the old count of steps, their
    first updates would be twice as large as Adam's ever are.

    Args:
        moments: `kind:name` -> a tensor laid out like the parameter `name` of the parent; of kind
            `step` the count of steps, which stays.
        grown: from `grow`.
        parent: configuration of the model that the moments are of.

    Returns:
        The same keys with the shapes of `grown`; parameters that the parent did not have are left
        out, so that an optimizer starts them from nothing, and so are those that `grown` has not.
    """
    out, parts = {}, regions(grown, parent)
    for key, value in moments.items():
        name = key.partition(":")[2]
        if name not in parts:
            continue
        old = parts[name].old
        assert old is not None
        if not key.startswith("step:"):
            start = float(value.mean()) if key.startswith("exp_avg_sq:") else 0.0
            whole = value.new_full(grown.get_parameter(name).shape, start)
            old.of(whole).copy_(_parents(parts[name], value))
            value = whole
        out[key] = value
    return out


def grow_in_training(
    model: LanguageModel,
    growth: GrowthStep,
    moments: dict[str, Tensor],
    carried: ModelState | None,
    seed: int,
) -> tuple[LanguageModel, dict[str, Tensor], ModelState | None]:
    """Make one step of a growth schedule: model, whole moments and carried state together."""
    grown = grow(model, **growth.sizes(), init=growth.init, seed=seed)
    state = None if carried is None else grow_state(carried, grown)
    return grown, grow_moments(moments, grown, model.config), state


@torch.no_grad()
def grow_state(state: ModelState, grown: LanguageModel) -> ModelState:
    """Return a parent's carried state for a grown model, which then goes on as the parent would.

    New rows, columns and heads of S and M are zero; new blocks and a new surprise memory have seen
    nothing.

    Args:
        state: of the model that `grown` came from, at any point of a sequence.
        grown: from `grow`.

    Raises:
        StateError: the state is larger than the grown model's, or of another architecture.
    """
    start = grown.init_state(state.batch_size)
    fresh = start.layers
    if len(state.layers) > len(fresh):
        raise StateError(
            f"the state has {len(state.layers)} layers, the grown model {len(fresh)}: it is of "
            "another model"
        )
    layers: list[Any] = []
    for i, new in enumerate(fresh):
        old = state.layers[i] if i < len(state.layers) else None
        if old is None and isinstance(new, AttentionState):
            first = state.layers[0]  # the new block writes nothing, whatever its cache holds
            assert isinstance(first, AttentionState)
            old = first.map(lambda t: t if t.dtype == torch.int64 else torch.zeros_like(t))
        if old is not None and type(old) is not type(new):
            raise StateError(f"the state's layer {i} is a {type(old).__name__}; of another model")
        if isinstance(old, RecurrentState) and isinstance(new, RecurrentState):
            fields = [
                b if a is None or b is None else _padded(a, b)  # a new shift acts on nothing yet
                for a, b in zip(vars(old).values(), vars(new).values(), strict=True)
            ]
            layers.append(RecurrentState(*fields))  # type: ignore[arg-type]
        else:
            layers.append(new if old is None else old)
    memory = start.memory if state.memory is None else state.memory
    out = dataclasses.replace(state, layers=tuple(layers), memory=memory)
    out.check(grown)
    return out


def _padded(old: Tensor, new: Tensor) -> Tensor:
    """Return `old` with zeros up to the shape of `new`."""
    added = [n - m for n, m in zip(new.shape, old.shape, strict=True)]
    if min(added) < 0 or (old.dim() == 2 and any(added)):  # a token shift is D wide for ever
        raise StateError(
            f"the state is {list(old.shape)}, the grown model's {list(new.shape)}: it is of "
            "another model"
        )
    pads = [n for extra in reversed(added) for n in (0, extra)]
    return F.pad(old, pads)
