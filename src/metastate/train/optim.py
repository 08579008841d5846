"""The optimizer, with each layer's own groups, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metastate.config import ModelConfig, TrainConfig
from metastate.errors import ConfigError
from metastate.layers.common import DECAY_BASE, MATRIX, VECTOR
from metastate.mapping import from_dict
from metastate.model.lm import LanguageModel
from metastate.model.regions import Region, Regions, regions
from metastate.train.distributed import placed, whole

# group -> (factor of the learning rate, whether weight decay applies)
RULES = {MATRIX: (1.0, True), VECTOR: (1.0, False), DECAY_BASE: (2.0, False)}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of update `step`, a pure function.

    Warm-up: lr (step + 1) / warmup for the first `warmup` steps. Then, p running from 0 to 1 at the
    last step,
        cosine    min_lr + (lr - min_lr) (1 + cos(pi p)) / 2
        wsd       lr, and over the last `decay_fraction` of all steps a straight line to min_lr
        constant  lr
    After growth before update s: times (step - s + 1) / w over its own warm-up of w steps.

    Args:
        step: 0 is the first update; steps past config.steps keep the last rate.
        config: lr, min_lr, schedule, warmup, decay_fraction, steps, growth.
    """
    factor = 1.0
    for growth in config.growth:
        if growth.step <= step < growth.step + growth.warmup:
            factor = (step - growth.step + 1) / growth.warmup
    return factor * _scheduled(step, config)


def _scheduled(step: int, config: TrainConfig) -> float:
    """Return the learning rate of `step` without regard to growth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    last = config.steps - 1
    if config.schedule == "wsd":
        start = max(config.warmup, config.steps - round(config.decay_fraction * config.steps)) - 1
        p = min(1.0, max(0.0, (step - start) / max(1, last - start)))
        return config.lr + (config.min_lr - config.lr) * p
    p = min(1.0, (step - config.warmup) / max(1, last - config.warmup))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * p)) / 2


class GroupedAdamW(torch.optim.AdamW):
    """AdamW over the parameters of a model, or over regions of them after growth.

    A group holds "name", "scale" (factor of the learning rate) and "names" of what it trains;
    `regions` has those that are not whole parameters by name, apart from the groups, which
    `state_dict` copies: what it returns is for any loader. A region is trained through a view, so
    that it has its own learning rate and moments, and what no region covers is never touched.
    `frozen` are the parameters that would learn but for a factor of 0; no gradient is asked of
    them.
    """

    def __init__(
        self,
        model: LanguageModel,
        groups: list[dict[str, Any]],
        boxes: dict[str, Region],
        **settings: Any,
    ) -> None:
        self.sources, self.regions = dict(model.named_parameters()), boxes
        trained = {name.partition("[")[0] for group in groups for name in group["names"]}
        learning = {name: p for name, p in self.sources.items() if p.requires_grad}
        self.frozen = [p.requires_grad_(False) for n, p in learning.items() if n not in trained]
        super().__init__(groups, **settings)

    def gather(self) -> tuple[list[Tensor], Tensor]:
        """Give regions their parts of the gradient; return all that has one, and the whole norm."""
        self._hand_out()
        found = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        return found, whole(nn.utils.get_total_norm([p.grad for p in found]))

    def _hand_out(self) -> None:
        """Give regions their parts, views, of the gradient that their parameters have."""
        for group in self.param_groups:
            for p, name in zip(group["params"], group["names"], strict=True):
                if (region := self.regions.get(name)) is not None:
                    grad = self.sources[name.partition("[")[0]].grad
                    p.grad = None if grad is None else region.of(grad)

    def advance(self, parameters: list[Tensor], norm: Tensor, clip: float, lr: float) -> None:
        """Make a step with what `gather` found, cut to the norm `clip`; drop the gradients."""
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        set_learning_rate(self, lr)
        self.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        """Make a step as AdamW does, also in a loop that knows of no regions."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hand_out()
        super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the regions and of the parameters they belong to."""
        super().zero_grad(set_to_none)
        for p in self.sources.values():
            p.grad = None


def make_optimizer(
    model: LanguageModel, config: TrainConfig, old_lr_scale: float | None = None
) -> GroupedAdamW:
    """Return AdamW over the trainable parameters in the groups that the layers declare.

    MATRIX is decayed, VECTOR is not, DECAY_BASE is not and learns twice as fast. The fused form
    took 0.2 of the time of the other two on the CPU (79 M parameters).

    Args:
        model: to train.
        config: lr, betas, eps, weight_decay.
        old_lr_scale: factor of the learning rate of the entries that a grown model has from its
            parent; config's if None. At 0 they are left out: no moments, no gradient where that can
            be avoided, and they stay as they are bit by bit.

    Parameters that are frozen whole no longer require gradients afterwards (`frozen`).

    Raises:
        ConfigError: a parameter has no group, a group names no parameter or no rule, or
            old_lr_scale is not 1 and the model never grew.
    """
    scale_of_old = config.old_lr_scale if old_lr_scale is None else old_lr_scale
    parts = None if scale_of_old == 1 else grown_regions(model)
    groups = model.optimizer_groups()
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() - groups.keys()):
        raise ConfigError(
            f"no optimizer group for {', '.join(missing)}; GROUPS of the layer that owns a "
            "parameter must name its group"
        )
    if unknown := sorted(set(groups.values()) - RULES.keys()):
        raise ConfigError(f"unknown optimizer group {unknown[0]!r}; known: {', '.join(RULES)}")
    members: dict[tuple[str, float, bool], list[tuple[str, Tensor]]] = {}
    boxes: dict[str, Region] = {}
    for name, p in parameters.items():
        if p.requires_grad:
            part = None if parts is None else parts[name]
            for piece, region, scale in _pieces(name, part, scale_of_old):
                view = p if region is None else region.of(p.detach())
                key = (groups[name], scale, region is None)
                members.setdefault(key, []).append((piece, view))
                boxes |= {} if region is None else {piece: region}
    settings = []
    for group, (factor, decays) in RULES.items():
        for (name, scale, is_whole), own in members.items():
            if name == group:
                names, params = (list(column) for column in zip(*own, strict=True))
                settings.append(
                    {
                        "params": params,
                        "name": group,
                        "names": names,
                        "scale": factor * scale,
                        "lr": config.lr * factor * scale,
                        "weight_decay": config.weight_decay if decays else 0.0,
                        "fused": is_whole,  # the fused form takes no strided views
                        "foreach": False,
                    }
                )
    if not settings:
        raise ConfigError("every parameter of the model is frozen; there is nothing to train")
    betas = (config.beta1, config.beta2)
    return GroupedAdamW(model, settings, boxes, lr=config.lr, betas=betas, eps=config.eps)


def grown_regions(model: LanguageModel) -> dict[str, Regions]:
    """Return which entries the model has from before it last grew.

    Raises:
        ConfigError: it never grew.
    """
    if not model.lineage:
        raise ConfigError(
            "old_lr_scale is not 1, but this model never grew, so that nothing in it is old; grow "
            "it with `metastate grow`, or leave old_lr_scale out"
        )
    first = len(model.lineage) - 1
    while first > 0 and not _trained_between(*model.lineage[first - 1 : first + 1]):
        first -= 1  # grown twice without training in between: both are new
    return regions(model, from_dict(ModelConfig, model.lineage[first]["before"], "lineage"))


def _trained_between(growth: dict[str, Any], after: dict[str, Any]) -> bool:
    """Say whether weights changed between two growths; other loops than ours count no steps."""
    changed = growth.get("child", after.get("parent")) != after.get("parent")  # None: older file
    return changed or growth["step"] != after["step"]


def _pieces(
    name: str, part: Regions | None, scale: float
) -> Iterator[tuple[str, Region | None, float]]:
    """Yield what of a parameter is trained: its name, region (None: whole), factor of the rate."""
    if part is None or part.old is None:
        yield name, None, 1.0
    elif part.new:
        if scale:
            yield f"{name}[old]", part.old, scale
        for axis, region in part.new.items():
            yield f"{name}[{axis}]", region, 1.0
    elif scale:
        yield name, None, scale


def moments(optimizer: GroupedAdamW) -> dict[str, Tensor]:
    """Return the optimizer's state, `kind:name` -> tensor, kinds step, exp_avg and exp_avg_sq."""
    return {
        f"{key}:{name}": value.detach()
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(p, {}).items()
    }


def whole_moments(found: dict[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
    """Put the moments of regions together, so that each is laid out like its parameter.

    Regions that were frozen get what `grow_moments` gives new entries; of different counts of steps
    the largest is kept.
    """
    parts = grown_regions(model) if any("[" in key for key in found) else {}
    out: dict[str, Tensor] = {}
    for key, value in found.items():
        base, bracket, axis = key.rstrip("]").partition("[")
        is_count = key.startswith("step:")
        value = value.reshape(()) if is_count else value  # a vector of one where saved sharded
        if not bracket:
            out[key] = value
        elif is_count:
            out[base] = torch.maximum(value, out[base]) if base in out else value
        else:
            name = base.partition(":")[2]
            region = parts[name].old if axis == "old" else parts[name].new[axis]
            assert region is not None
            start = float(value.mean()) if base.startswith("exp_avg_sq:") else 0.0
            shape = model.get_parameter(name).shape
            whole = out.setdefault(base, value.new_full(shape, start))
            region.of(whole).copy_(value)
    return out


def adopt_moments(optimizer: GroupedAdamW, whole: dict[str, Tensor]) -> None:
    """Start the optimizer from `whole_moments`; what has none there starts from nothing."""
    for group in optimizer.param_groups:
        for p, name in zip(group["params"], group["names"], strict=True):
            base, region = name.partition("[")[0], optimizer.regions.get(name)
            own = {k: whole.get(f"{k}:{base}") for k in ("step", "exp_avg", "exp_avg_sq")}
            if any(value is None for value in own.values()):
                continue
            optimizer.state[p] = {
                key: step_count(value, p, group)  # type: ignore[arg-type]
                if key == "step"
                else placed(value if region is None else region.of(value), p)  # type: ignore[arg-type]
                for key, value in own.items()
            }


def step_count(value: Tensor, p: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a count of steps where the optimizer needs it: beside p if fused, else on the CPU."""
    count = value.reshape(())  # a vector of one where it was saved sharded
    return count.to(p.device if group["fused"] else "cpu", torch.float32, copy=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its own multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
