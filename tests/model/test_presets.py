"""Presets and what a model says about its own size, against counts made by hand."""

import dataclasses

import pytest
import torch

import metastate
from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ConfigError
from metastate.model import presets
from metastate.model.lm import LanguageModel
from metastate.model.presets import SIZES, preset

NAMED_TOTALS = {"150m": 150e6, "450m": 450e6, "900m": 900e6, "1.5b": 1.5e9}


def on_meta(config):
    with torch.device("meta"):
        return LanguageModel(config)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_equal_parameters(size):
    rows = {a: on_meta(preset(f"{a}-{size}")).count_parameters() for a in presets.ARCHITECTURES}
    target = rows["paper"]["non_embedding"]  # it sets the count of a row, as presets.py says
    for architecture, counts in rows.items():
        assert abs(counts["non_embedding"] / target - 1) < 0.01, architecture
        parts = {k: v for k, v in counts.items() if k not in ("total", "non_embedding")}
        assert sum(parts.values()) == counts["total"]
        if size in NAMED_TOTALS:
            assert abs(counts["total"] / NAMED_TOTALS[size] - 1) < 0.02, architecture


def test_rough_sizes_of_the_small_presets():
    for size, wanted in {"tiny": 0.5e6, "mini": 5e6, "small": 25e6}.items():
        count = on_meta(preset(f"metastate-{size}")).count_parameters()["non_embedding"]
        assert abs(count / wanted - 1) < 0.1, size


def test_the_paper_sizes():
    """12 heads, vocabulary 50,304, untied; head sizes 64, 128, 192, 256."""
    for size, N in {"150m": 64, "450m": 128, "900m": 192, "1.5b": 256}.items():
        config = preset(f"metastate-{size}")
        assert (config.num_heads, config.head_size, config.hidden_size) == (12, N, 12 * N)
        assert config.vocab_size == 50304
        for architecture in presets.ARCHITECTURES:
            other = preset(f"{architecture}-{size}")
            assert (other.hidden_size, other.num_heads) == (12 * N, 12)


def test_depth_is_the_one_nearest_to_the_name():
    for size, wanted in NAMED_TOTALS.items():
        config = preset(f"metastate-{size}")
        totals = {
            n: on_meta(config.replace(num_layers=n)).count_parameters()["total"]
            for n in range(config.num_layers - 1, config.num_layers + 2)
        }
        nearest = min(totals, key=lambda n: abs(totals[n] - wanted))
        assert nearest == config.num_layers, size


@pytest.mark.parametrize(
    ("L", "D", "ranks", "published"),
    [
        (12, 768, (64, 64, 32, 128), 167.66e6),
        (24, 1024, (64, 64, 64, 128), 421.13e6),
        (24, 2048, (96, 96, 64, 256), 1465.1e6),
    ],
)
def test_rwkv7_counts_of_its_paper(L, D, ranks, published):
    d_w, d_a, d_v, d_g = ranks
    V = 50304
    config = ModelConfig(
        architecture="rwkv7",
        vocab_size=V,
        hidden_size=D,
        num_layers=L,
        num_heads=D // 64,
        decay_rank=d_w,
        icl_rate_rank=d_a,
        value_rank=d_v,
        gate_rank=d_g,
    )
    formula = 2 * D * V + 4 * D + L * D * (12 * D + 2 * sum(ranks) + 19) - (2 * D * d_v + D)
    counts = on_meta(config).count_parameters()
    assert counts["total"] == formula
    assert abs(formula / published - 1) < 2e-4
    assert counts["embedding"] == counts["head"] == V * D
    assert counts["channel_mix"] == L * (8 * D * D + D)
    assert counts["norms"] == L * 4 * D + 4 * D


def test_the_paper_preset_is_the_literal_reading():
    assert preset("paper-tiny").meta_state == MetaStateConfig.paper()
    options = preset("metastate-tiny").meta_state
    assert options == MetaStateConfig()
    assert (options.readout, options.encoder_query) == ("encoding", "receptance")
    assert preset("metastate-tiny").ffn_size and preset("paper-tiny").ffn_size is None
    orders = [preset(f"{name}-tiny").ffn_order for name in ("metastate", "paper", "rwkv7")]
    assert orders == ["after", None, None]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("metastate-tinny", "did you mean 'metastate-tiny'"),
        ("RWKV7-mini", "did you mean 'rwkv7-mini'"),
        ("transformer-150M", "did you mean 'transformer-150m'"),
        ("gpt", "it is ARCHITECTURE-SIZE, one of metastate, .* and one of tiny, "),
    ],
)
def test_unknown_presets_name_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=hint):
        preset(name)


def test_overrides():
    config = preset("metastate-tiny", num_layers=2, meta_state={"read": "value"})
    assert config.num_layers == 2
    assert config.meta_state == MetaStateConfig(read="value")
    paper = preset("paper-tiny", meta_state={"output_norm": "group"}).meta_state
    assert (paper.update, paper.output_norm) == ("self", "group")  # the others stay the paper's
    wider = preset("metastate-tiny", hidden_size=256)
    assert (wider.head_size, wider.head_segments) == (128, (128,))
    grown = preset("metastate-tiny", head_size=96, head_segments=[64, 32])
    assert (grown.attention_size, grown.head_segments) == (192, (64, 32))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layer": 2}, "unknown key 'num_layer'.*did you mean 'num_layers'"),
        ({"num_layers": "2"}, "num_layers is '2'; int is needed"),
        ({"num_layers": True}, "num_layers is True; int is needed"),
        ({"num_layers": 0}, "num_layers is 0; it must be positive"),
        ({"num_heads": 3}, "hidden_size 128 is not a multiple of num_heads 3"),
        ({"head_size": 32}, "head_size 32 is below hidden_size / num_heads = 64"),
        ({"meta_state": {"updat": "self"}}, "unknown key 'updat'.*did you mean 'update'"),
        ({"meta_state": {"update": "none"}}, "'none'; allowed: 'delta', 'input', 'self'"),
        ({"meta_state": {"encoder_size": 65}}, "encoder_size 65 is above head_size 64"),
        ({"meta_state": {"encoder": "cross", "latent_size": 64}}, "latent_size 64"),
        ({"meta_state": {"variational": True}}, "variational needs"),
        ({"meta_state": {"update": "self"}}, "meta_state.update acts on M alone"),
        ({"meta_state": {"encoding_norm": "rms"}}, "meta_state.encoding_norm acts on M alone"),
        ({"meta_state": {"query": "encoding"}}, "meta_state.query acts on M alone"),
        ({"head_segments": [64, 1]}, "must be positive and sum to head_size 64"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        preset("metastate-tiny", **overrides)


def test_load_makes_a_fresh_preset():
    model = metastate.load("metastate-tiny")
    assert model.config == preset("metastate-tiny")
    assert model.lineage == []
    assert next(model.parameters()).device.type == "cpu"


SMALL = {
    "vocab_size": 10,
    "hidden_size": 4,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_size": 8,
    "decay_rank": 1,
    "icl_rate_rank": 1,
    "value_rank": 1,
    "gate_rank": 1,
}


WITH_M = MetaStateConfig(readout="both", encoder_query="input")


def small(**fields):
    """A model of SMALL; a Meta-State one has M and nothing beside, unless `fields` say so."""
    own = {} if "architecture" in fields else {"ffn_size": None, "meta_state": WITH_M}
    return LanguageModel(ModelConfig(**(SMALL | own | fields)))


def test_flops_of_a_transformer():
    # qkv 48, output 16, feed-forward 64, head 40; 4 D FLOPs a key, (3 + 1) / 2 keys on average
    assert small(architecture="transformer").flops_per_token(3) == (2 * 168 + 32, 4 * 168 + 64)


def test_flops_of_the_recurrent_models():
    # r, k, v, o 64; decay, rate and gate 8 each; head 40; H N^2 = 8
    matrices, state = 64 + 24 + 40, 8
    expected = 2 * (matrices + 64) + 10 * state, 4 * (matrices + 64) + 26 * state
    assert small(architecture="rwkv7").flops_per_token(512) == expected
    base = 2 * (matrices + 16) + 22 * state, 4 * (matrices + 16) + 62 * state
    assert small().flops_per_token(7) == small().flops_per_token(1024) == base
    encoding = small(meta_state=MetaStateConfig(encoder_query="input")).flops_per_token(7)
    assert encoding == (base[0] - 10 * state, base[1] - 26 * state)
    # Every head multiplies [x, e] (2 N) by W_z to one channel, and by W_u back to N = 2.
    cross = small(
        meta_state=MetaStateConfig(
            readout="both", encoder_query="input", encoder="cross", latent_size=1
        )
    ).flops_per_token(7)
    assert cross == (base[0] + 2 * 2 * (4 + 2), base[1] + 4 * 2 * (4 + 2))


def test_flops_of_a_second_question_and_of_a_layer_beside():
    # The receptance is a factor of one more product a token; the feed-forward layer is 2 D F.
    base = small().flops_per_token(7)
    for fields in (
        {"meta_state": MetaStateConfig(readout="both")},
        {"meta_state": dataclasses.replace(WITH_M, query="receptance")},
        {"meta_state": MetaStateConfig(readout="both", query="receptance")},
    ):
        assert small(**fields).flops_per_token(7) == (base[0] + 2 * 16, base[1] + 4 * 16)
        assert small(**fields).count_parameters() == small().count_parameters()
    beside = small(ffn_size=8)
    assert beside.flops_per_token(7) == (base[0] + 2 * 64, base[1] + 4 * 64)
    assert beside.count_parameters()["channel_mix"] == 64 + 4
    assert beside.state_bytes() == small().state_bytes() + 16  # its token shift
    after = small(ffn_size=8, ffn_order="after")
    assert after.flops_per_token(7) == beside.flops_per_token(7)
    assert after.count_parameters()["norms"] == beside.count_parameters()["norms"] + 2 * 4


def test_flops_of_a_widened_state():
    # N 3: r, k, v, o 96; ranks 4 + 6 each; head 40; meta output 24; W_p 2 x 3 for each of 2 heads
    matrices, state = 96 + 30 + 40 + 24 + 12, 2 * 9
    model = small(head_size=3, parameter_tokens=5)
    assert model.flops_per_token(7) == (2 * matrices + 22 * state, 4 * matrices + 62 * state)


@pytest.mark.parametrize(
    ("fields", "nbytes"),
    [
        ({}, 32 + 32 + 16),  # S and M: 2 heads of 2 x 2 floats; one shift of 4
        ({"num_layers": 3}, 3 * (32 + 32 + 16)),
        ({"head_size": 3}, 72 + 72 + 16),
        ({"meta_state": MetaStateConfig(readout="encoding")}, 32 + 16),
        ({"meta_state": dataclasses.replace(WITH_M, token_shift=True)}, 32 + 32 + 16 + 16),
        ({"architecture": "rwkv7"}, 32 + 16 + 16),
    ],
)
def test_state_bytes_of_recurrent_models(fields, nbytes):
    model = small(**fields)
    model.backend = "chunked"
    assert model.state_bytes() == model.state_bytes(1, 65536) == nbytes
    assert model.state_bytes(3) == 3 * nbytes
    _, state = model(torch.zeros(3, 5, dtype=torch.int64))
    assert state.num_bytes == model.init_state(3).num_bytes == 3 * nbytes
    assert model.double().state_bytes() == 2 * nbytes


def test_state_bytes_of_a_transformer():
    model = small(architecture="transformer", num_layers=3)
    assert model.state_bytes() == 0
    assert model.state_bytes(2, 5) == 2 * 3 * 4 * 4 * 2 * 5  # k and v, layers, D, bytes, B, T
    _, state = model(torch.zeros(2, 5, dtype=torch.int64))
    assert state.num_bytes == model.state_bytes(2, 5)
