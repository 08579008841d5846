import json

import pytest

from metastate.config import ModelConfig
from metastate.eval.describe import describe, describe_table
from metastate.model.lm import LanguageModel


def config(architecture, **kw):
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_layers": 3, "num_heads": 2}
    return ModelConfig(architecture=architecture, **(sizes | kw))


@pytest.mark.parametrize("architecture", ["metastate", "rwkv7", "transformer"])
def test_parts_sum_up_and_a_config_is_enough(architecture):
    model = LanguageModel(config(architecture))
    facts = describe(model)
    parts = dict(facts["parameters"])
    total, inner = parts.pop("total"), parts.pop("non_embedding")
    assert sum(parts.values()) == total == sum(p.numel() for p in model.parameters())
    assert inner == total - 2 * 64 * 24
    assert facts == describe(config(architecture))
    assert json.loads(json.dumps(facts))["config"]["hidden_size"] == 24


def test_state_is_constant_and_a_cache_grows():
    state = describe(config("metastate"))["state_bytes"]
    assert (
        len(set(state.values())) == 1
        and state[1024] == LanguageModel(config("metastate")).init_state(1).num_bytes
    )
    facts = describe(config("transformer"))
    assert facts["state_bytes"] == facts["transformer_cache_bytes"]
    assert facts["state_bytes"][8192] == 2 * 3 * 24 * 4 * 8192


def test_attention_flops_follow_the_context():
    def forward(architecture, context):
        return describe(config(architecture), context)["flops_per_token"]["forward"]

    assert forward("metastate", 64) == forward("metastate", 4096)
    assert forward("transformer", 4096) - forward("transformer", 64) == 2 * 3 * 24 * (4096 - 64)


def test_big_model_takes_no_memory():
    big = config("metastate", vocab_size=50304, hidden_size=8192, num_layers=4, num_heads=64)
    assert describe(big)["parameters"]["total"] > 1e9


def test_table():
    model = LanguageModel(config("metastate"))
    table = describe_table(model)
    assert "3 layers, width 24, 2 heads of 12, vocabulary 64" in table
    assert f"{describe(model)['parameters']['total']:,}" in table
    assert "never grown" in table and "65,536 tokens" in table
    model.lineage = [{"axis": "head_size", "from": 12, "to": 24}]
    assert "axis head_size, from 12, to 24" in describe_table(model)
