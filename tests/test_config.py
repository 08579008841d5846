"""Configurations made in Python are checked as those read from a file are."""

from pathlib import Path

import pytest

from metastate.config import GrowthStep, MetaStateConfig, ModelConfig, TrainConfig
from metastate.errors import ConfigError
from metastate.mapping import from_dict


@pytest.mark.parametrize(
    ("cls", "field", "message"),
    [
        (ModelConfig, {"architecture": "metastat"}, "model.architecture is 'metastat'; allowed: "),
        (ModelConfig, {"num_heads": 2.0}, "model.num_heads is 2.0; int is needed"),
        (ModelConfig, {"version": True}, "model.version is True; int is needed"),
        (ModelConfig, {"version": -5}, "version -5, this program reads up to 1"),
        (ModelConfig, {"vocab_size": 10**30}, "model.vocab_size is 10+; 2147483647 at most"),
        (ModelConfig, {"hidden_size": 4 * 10**9}, "model.hidden_size is .*; 2147483647 at most"),
        (ModelConfig, {"parameter_tokens": 10**18}, "model.parameter_tokens is .* at most"),
        (ModelConfig, {"num_layers": 100_000}, "model.num_layers is 100000; 10000 at most"),
        (
            ModelConfig,
            {"head_size": 2**30, "num_heads": 4},
            r"num_heads \* head_size is 4294967296",
        ),
        (ModelConfig, {"rope_theta": 10**400}, "model.rope_theta is 10+; float is needed"),
        (ModelConfig, {"meta_state": {"readout": "Both"}}, "meta_state.readout is 'Both'"),
        (MetaStateConfig, {"readout": "Both"}, "meta_state.readout is 'Both'; allowed: 'both'"),
        (MetaStateConfig, {"activation": "relu"}, "meta_state.activation is 'relu'"),
        (MetaStateConfig, {"readout_gain": 0.0}, "meta_state.readout_gain is 0.0; it must be posi"),
        (MetaStateConfig, {"kl_weight": -1e-3}, "meta_state.kl_weight is -0.001; it must be 0 or"),
        (MetaStateConfig, {"readout_gain": 2.0, "output_norm": "none"}, "needs .*='group'"),
        (TrainConfig, {"schedule": "cosin"}, "train.schedule is 'cosin'; allowed: 'cosine'"),
        (TrainConfig, {"weight_decay": float("nan")}, "train.weight_decay is nan; a finite"),
        (TrainConfig, {"steps": "3"}, "train.steps is '3'; int is needed"),
        (GrowthStep, {"step": 3.5, "num_heads": 4}, "growth.step is 3.5; int is needed"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(cls, field, message):
    with pytest.raises(ConfigError, match=message):
        cls(**field)
    with pytest.raises(ConfigError):
        from_dict(cls, field)


def test_fields_have_the_types_that_are_declared():
    model = ModelConfig(
        hidden_size=12,
        head_size=8,
        head_segments=[6, 2],  # type: ignore[arg-type]
        meta_state={"readout": "both"},  # type: ignore[arg-type]
        rope_theta=500,
    )
    assert model.head_segments == (6, 2) and model.meta_state == MetaStateConfig(readout="both")
    assert isinstance(model.rope_theta, float)
    train = TrainConfig(data=Path("data"), growth=[{"step": 3, "num_heads": 4}])  # type: ignore[arg-type]
    assert train.data == "data" and train.growth == (GrowthStep(3, num_heads=4),)
