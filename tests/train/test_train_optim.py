"""Optimizer groups and learning-rate schedules."""

import math

import pytest
import torch

from metastate.config import ModelConfig, TrainConfig
from metastate.errors import ConfigError
from metastate.layers.common import DECAY_BASE, MATRIX, VECTOR
from metastate.model.lm import LanguageModel
from metastate.train.optim import learning_rate, make_optimizer, set_learning_rate


def rates(**settings):
    config = TrainConfig(lr=1.0, min_lr=0.1, **settings)
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    lr = rates(schedule=schedule, steps=100, warmup=10)
    assert lr[:10] == [(i + 1) / 10 for i in range(10)]
    assert max(lr) == lr[10] == 1.0


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum():
    lr = rates(schedule="cosine", steps=101, warmup=0)
    assert lr[0] == 1.0
    assert math.isclose(lr[50], 0.55)
    assert math.isclose(lr[100], 0.1)
    assert all(a > b for a, b in zip(lr[:-1], lr[1:], strict=True))


def test_wsd_is_flat_then_falls_in_a_line():
    lr = rates(schedule="wsd", steps=100, warmup=5, decay_fraction=0.25)
    assert set(lr[5:75]) == {1.0}
    assert math.isclose(lr[99], 0.1)
    drops = [a - b for a, b in zip(lr[74:-1], lr[75:], strict=True)]
    assert all(math.isclose(d, 0.9 / 25) for d in drops)


def test_constant_is_flat():
    assert set(rates(schedule="constant", steps=50, warmup=3)[3:]) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 1, 5, 9])
@pytest.mark.parametrize("decay_fraction", [0.01, 1.0])
def test_any_length_gives_rates_in_range(schedule, steps, warmup, decay_fraction):
    lr = rates(schedule=schedule, steps=steps, warmup=warmup, decay_fraction=decay_fraction)
    assert all(0 < x <= 1.0 for x in lr)


def model():
    return LanguageModel(ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2))


def test_groups_follow_the_layers():
    lm = model()
    config = TrainConfig(weight_decay=0.3)
    optimizer = make_optimizer(lm, config)
    set_learning_rate(optimizer, 0.5)
    groups = {g["name"]: g for g in optimizer.param_groups}
    declared = lm.optimizer_groups()
    for kind, lr, decay in ((MATRIX, 0.5, 0.3), (VECTOR, 0.5, 0.0), (DECAY_BASE, 1.0, 0.0)):
        assert (groups[kind]["lr"], groups[kind]["weight_decay"]) == (lr, decay)
        assert groups[kind]["names"] == [n for n, _ in lm.named_parameters() if declared[n] == kind]
    assert "blocks.1.time_mix.decay.bias" in groups[DECAY_BASE]["names"]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(lm.parameters()))


def test_frozen_parameters_are_left_out():
    lm = model()
    lm.head.weight.requires_grad_(False)
    names = [n for g in make_optimizer(lm, TrainConfig()).param_groups for n in g["names"]]
    assert "head.weight" not in names
    lm.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        make_optimizer(lm, TrainConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups.pop("head.weight"), "no optimizer group for head.weight"),
        (lambda groups: groups.update({"head.weight": "sparse"}), "'sparse'; known: matrix"),
    ],
)
def test_a_missing_or_unknown_group_is_refused(monkeypatch, change, message):
    lm = model()
    groups = lm.optimizer_groups()
    change(groups)
    monkeypatch.setattr(lm, "optimizer_groups", lambda: groups)
    with pytest.raises(ConfigError, match=message):
        make_optimizer(lm, TrainConfig())


def test_one_step_is_adamw_with_the_groups_decay():
    lm = model()
    config = TrainConfig(lr=0.1, weight_decay=0.5, eps=1e-3, beta1=0.8, beta2=0.9)
    optimizer = make_optimizer(lm, config)
    set_learning_rate(optimizer, 0.1)
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}
    for p in lm.parameters():
        p.grad = torch.full_like(p, config.eps)
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    optimizer.step()
    # The first Adam step of a gradient g is lr g / (g + eps).
    scale = {MATRIX: (0.1, 0.05), VECTOR: (0.1, 0.0), DECAY_BASE: (0.2, 0.0)}
    for name, p in lm.named_parameters():
        lr, decay = scale[lm.optimizer_groups()[name]]
        assert torch.allclose(p, before[name] * (1 - decay) - lr / 2, atol=1e-6), name
