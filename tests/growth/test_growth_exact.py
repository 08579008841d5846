"""Growth changes the shape, never the function: every axis, every reading, mixed and repeated."""

import copy
import random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import metastate
from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ConfigError, StateError
from metastate.growth import grow, grow_state, growth_report, logits_change, upgrade
from metastate.layers.common import IDENTITY, KEY, OUTPUT, ZERO
from metastate.model.lm import LanguageModel
from metastate.model.regions import regions

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = {
    "vocab_size": 19,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 10,
    "decay_rank": 3,
    "icl_rate_rank": 3,
    "value_rank": 2,
    "gate_rank": 4,
}
AXES = {
    "head_size": {"head_size": 9},
    "num_heads": {"num_heads": 5},
    "parameter_tokens": {"parameter_tokens": 3},
    "num_layers": {"num_layers": 4},
    "ffn_size": {"ffn_size": 17},
    "memory_heads": {"memory_heads": 2},
    "all": {
        "head_size": 12,
        "num_heads": 3,
        "parameter_tokens": 2,
        "num_layers": 3,
        "ffn_size": 12,
    },
}
WITH_M = {"readout": "both", "encoder_query": "input"}
READINGS = {
    "default": {},
    "with M": WITH_M,
    "paper": vars(MetaStateConfig.paper()),
    "cross": WITH_M | {"encoder": "cross", "gate": True, "token_shift": True},
    "variational": WITH_M | {"encoder": "cross", "latent_size": 2, "variational": True},
    "by value": WITH_M | {"read": "value", "update": "input"},
    "own query": WITH_M | {"query": "encoding", "encoding_norm": "rms"},
    "part of the state": WITH_M | {"encoder_size": 4, "activation": "relu2"},
    "no meta state": {"encoder_query": "input"},
    "M asked by receptance": {"readout": "both", "query": "receptance"},
}


QUERIES = ["input", "encoding", "receptance"]


def disturb(model, seed=1):
    """Move every weight, as training does: nothing stays at the value that it was made with."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return model


def build(dtype=torch.float64, **fields):
    meta = fields.pop("meta_state", {})
    if fields.get("architecture", "metastate") == "metastate" and not meta.get("token_shift"):
        fields = {"ffn_order": "after"} | fields
    config = ModelConfig(**SIZES | {"meta_state": MetaStateConfig(**meta)} | fields)
    return disturb(LanguageModel(config).to(dtype)).eval()


def text(batch=2, length=37):
    tokens = torch.randint(19, (batch, length))
    resets = torch.rand(batch, length) < 0.1
    return tokens, resets


def change(a, b):
    return float(((b - a).abs().max() / a.abs().max()).detach())


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("reading", READINGS)
def test_every_axis_of_every_reading(reading, axis, dtype):
    grows_exactly(build(dtype, meta_state=READINGS[reading]), dtype, AXES[axis])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "memory_heads"])
@pytest.mark.parametrize("layer", [None, 1])
def test_every_axis_with_a_surprise_memory(layer, axis, dtype):
    grows_exactly(build(dtype, memory_heads=2, memory_layer=layer), dtype, AXES[axis])


def grows_exactly(model, dtype, sizes):
    grown = grow(model, **sizes)
    tokens, resets = text()
    before, _ = model(tokens, resets=resets)
    after, _ = grown(tokens, resets=resets)
    assert change(before, after) <= EXACT[dtype]
    assert grown.count_parameters()["total"] > model.count_parameters()["total"]
    state = model(tokens[:, :20], resets=resets[:, :20])[1]
    rest = {"resets": resets[:, 20:]}
    before, _ = model(tokens[:, 20:], state, **rest)
    after, _ = grown(tokens[:, 20:], grow_state(state, grown), **rest)
    assert change(before, after) <= EXACT[dtype]


RECURRENT = {"num_layers": 3, "head_size": 9, "num_heads": 3, "parameter_tokens": 2}
LARGER = {
    "metastate": RECURRENT | {"ffn_size": 17},
    "rwkv7": RECURRENT | {"ffn_size": 17},
    "transformer": {"num_layers": 3, "ffn_size": 17, "memory_heads": 1},
    "tokenformer": {"attention_slots": 13, "ffn_size": 17, "memory_heads": 3},
}


@pytest.mark.parametrize("architecture", LARGER)
def test_a_carried_state_goes_on(architecture):
    model = build(architecture=architecture)
    sizes = LARGER[architecture]
    grown = grow(model, **sizes)
    tokens, resets = text()
    _, state = model(tokens[:, :20], resets=resets[:, :20])
    whole, last = model(tokens[:, 20:], state, resets=resets[:, 20:])
    carried = grow_state(state, grown)
    assert carried.tokens_seen == 20
    if architecture == "transformer":  # a new block has seen nothing
        assert carried.layers[2].length == 20 and not carried.layers[2].keys.any()
    after, larger = grown(tokens[:, 20:], carried, resets=resets[:, 20:])
    assert change(whole, after) <= 1e-12
    # The state after the end holds the parent's as its corner.
    if sizes.get("head_size"):
        S = larger.layers[1].S[:, :2, :6, :6]
        assert change(last.layers[1].S, S) <= 1e-12


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("architecture", ["rwkv7", "transformer", "tokenformer"])
def test_baselines_grow_as_well(architecture, dtype):
    model = build(dtype, architecture=architecture)
    tokens, resets = text()
    for axis, n in LARGER[architecture].items():
        grown = grow(model, **{axis: n})
        before, after = model(tokens, resets=resets)[0], grown(tokens, resets=resets)[0]
        assert change(before, after) <= EXACT[dtype], axis
        assert getattr(grown.config, axis) == n
        model = disturb(grown)


@pytest.mark.parametrize(
    ("order", "token_shift"), [("after", False), ("beside", False), ("beside", True)]
)
def test_a_first_feed_forward_layer(order, token_shift):
    model = build(ffn_size=None, ffn_order=order, meta_state={"token_shift": token_shift})
    assert model.blocks[0].channel_mix is None
    grown = grow(model, ffn_size=8)
    tokens, resets = text()
    before, state = model(tokens, resets=resets)
    assert change(before, grown(tokens, resets=resets)[0]) <= 1e-12
    carried = grow_state(state, grown)
    assert change(model(tokens, state)[0], grown(tokens, carried)[0]) <= 1e-12
    assert grown.blocks[1].channel_mix.key.weight.shape == (8, 12)


def test_a_tokenformer_grown_as_released_jumps():
    model = build(architecture="tokenformer")
    tokens, _ = text()
    right, released = (grow(model, ffn_size=17, init=i) for i in ("zero", "released"))
    assert right.config.first_slots == (9, 10) and released.config.first_slots == (9, 17)
    assert logits_change(model, right, tokens)["relative"] < 1e-12
    assert logits_change(model, released, tokens)["relative"] > 1e-2
    with pytest.raises(ConfigError, match="TokenFormer"):
        grow(build(), head_size=9, init="released")


def test_several_steps_with_training_between():
    model = build(parameter_tokens=1)
    tokens, resets = text()
    steps = [{"head_size": 8}, {"num_heads": 3, "head_size": 10}, {"num_layers": 3}, AXES["all"]]
    for i, sizes in enumerate(steps):
        grown = grow(model, **sizes, seed=i)
        before, after = model(tokens, resets=resets)[0], grown(tokens, resets=resets)[0]
        assert change(before, after) <= 1e-12, sizes
        model = disturb(grown, seed=i)
    assert [step["parent"] == "" for step in model.lineage] == [False] * 4
    assert model.config.head_segments == (6, 2, 2, 2)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_any_config_any_mixture(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)  # before the weights are made: a failing seed fails again
    meta = {
        "readout": draw.choice(["both", "meta", "encoding"]),
        "modulation": draw.choice(["input", "none"]),
        "update": draw.choice(["delta", "input", "self"]),
        "encoding_norm": draw.choice(["l2", "rms", "none"]),
        "output_norm": draw.choice(["group", "none"]),
        "read": draw.choice(["key", "value"]),
        "activation": draw.choice(["none", "relu2", "silu"]),
        "gate": draw.random() < 0.5,
        "token_shift": draw.random() < 0.5,
        "encoder_size": draw.choice([None, None, 3]),
        "encoder_query": draw.choice(["input", "receptance"]),
    }
    if draw.random() < 0.3:
        meta |= {"encoder": "cross", "latent_size": 2, "variational": draw.random() < 0.5}
    heads = draw.choice([1, 2, 3])
    if meta["readout"] == "encoding":  # no M, so what acts on it alone stays at its default
        del meta["update"], meta["encoding_norm"]
    else:
        meta["query"] = draw.choice(QUERIES)
    dtype = draw.choice(list(EXACT))
    model = build(
        dtype,
        hidden_size=12,
        num_heads=heads,
        num_layers=draw.choice([1, 2]),
        parameter_tokens=draw.choice([0, 2]),
        ffn_size=draw.choice([None, 5]),
        ffn_order="beside" if meta["token_shift"] else draw.choice(["beside", "after"]),
        meta_state=meta,
        memory_heads=draw.choice([None, 2]),
    )
    size = model.config.head_size
    has_meta, asks = meta["readout"] != "encoding", meta["encoder_query"] == "receptance"
    refused = has_meta and meta["update"] == "self" and meta["query"] != "input"
    refused |= asks and (meta["read"] == "value" or meta.get("encoder") == "cross")
    refused |= asks and has_meta and meta["query"] == "input" and meta["update"] != "self"
    sizes = {
        "head_size": None if refused else size + draw.choice([0, 2, size]),
        "num_heads": heads + draw.choice([0, 1, 3]),
        "parameter_tokens": model.config.parameter_tokens + draw.choice([0, 2]),
        "num_layers": model.config.num_layers + draw.choice([0, 1]),
        "ffn_size": draw.choice([None, 7]),
        "memory_heads": None if model.config.memory_heads else draw.choice([None, 3]),
    }
    if all(n in (None, getattr(model.config, axis)) for axis, n in sizes.items()):
        return
    grown = grow(model, **sizes, seed=seed)
    tokens, resets = text(batch=2, length=21)
    before, state = model(tokens, resets=resets)
    after, _ = grown(tokens, resets=resets)
    # A drawn model can be so ill-conditioned that its own rounding is near the bound: draw again.
    rounding = change(before, copy.deepcopy(model).double()(tokens, resets=resets)[0])
    assume(rounding <= EXACT[dtype] / 4)
    assert change(before, after) <= EXACT[dtype]
    more, _ = text(length=9)
    carried = grow_state(state, grown)
    assert change(model(more, state)[0], grown(more, carried)[0]) <= EXACT[dtype]


@pytest.mark.parametrize(
    ("architecture", "reading"),
    [(name, "default") for name in LARGER]
    # Channels outside of encoder_size encode nothing, in a fresh model as well.
    + [("metastate", name) for name in READINGS if name != "part of the state"],
)
def test_nothing_is_born_dead(architecture, reading):
    model = build(architecture=architecture, meta_state=READINGS[reading])
    grown = grow(model, **LARGER[architecture])
    new = regions(grown, model.config)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)
    alive = set()
    # Read by value, a new channel of e is zero until its key has moved: one step more.
    for _ in range(3 if reading == "by value" else 2):
        tokens, resets = text()
        grown(tokens, resets=resets)[0].square().mean().backward()
        for name, part in new.items():
            for axis, region in part.new.items():
                grad = grown.get_parameter(name).grad
                if grad is not None and region.of(grad).abs().max() > 0:
                    alive.add((name, axis))
        optimizer.step()
        optimizer.zero_grad()
    born = {(name, axis) for name, part in new.items() for axis in part.new}
    assert born and born - alive == set()


@pytest.mark.parametrize(
    "fields", [{"parameter_tokens": 2}, {"architecture": "transformer"}], ids=["metastate", "other"]
)
def test_a_new_block_is_the_top_one_that_says_nothing_yet(fields):
    model = build(**fields)
    grown = grow(model, num_layers=4)
    top = dict(grown.blocks[1].named_parameters())
    silent = ("output.weight", "channel_mix.value.weight", "mlp.value.weight")
    for block in grown.blocks[2:]:
        for name, p in block.named_parameters():
            expected = torch.zeros_like(p) if name.endswith(silent) else top[name]
            assert torch.equal(p, expected), name


def test_random_values_do_change_the_function():
    model = build()
    tokens, _ = text()
    grown = grow(model, head_size=9, init="random")
    assert logits_change(model, grown, tokens)["relative"] > 1e-4


def test_random_values_stand_wherever_zeros_would():
    model = build(meta_state=WITH_M, parameter_tokens=1)
    grown = grow(model, head_size=9, parameter_tokens=3, init="random")
    rules, seen = {name: rule for name, (_, rule) in grown.growth_axes().items()}, set()
    for name, part in regions(grown, model.config).items():
        for axis, region in part.new.items():
            if rules[name] in (OUTPUT, ZERO) or (rules[name] in (KEY, IDENTITY) and axis == "N"):
                x = region.of(grown.get_parameter(name)).abs()
                assert x.min() > 0 and x.max() < 0.1, (name, axis)
                seen.add(rules[name])
    assert seen == {OUTPUT, ZERO, KEY, IDENTITY}


def test_the_parent_is_not_changed_and_the_seed_decides():
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    a, b, c = (grow(model, head_size=9, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_grown_saved_loaded_and_grown_again(tmp_path):
    model = build(torch.float32)
    grown = disturb(grow(model, head_size=9, num_heads=3))
    metastate.save(grown, tmp_path / "m")
    loaded = metastate.load(tmp_path / "m").eval()
    tokens, _ = text()
    assert torch.equal(loaded(tokens)[0], grown(tokens)[0])
    assert loaded.lineage == grown.lineage and loaded.lineage[0]["head_size"] == [6, 9]
    again = metastate.grow(loaded, head_size=12)
    assert change(loaded(tokens)[0], again(tokens)[0]) <= 1e-5
    assert again.lineage[1]["parent"] != again.lineage[0]["parent"]
    # Whole = split, as in a model that was born that size.
    _, state = again(tokens[:, :11])
    split = torch.cat([again(tokens[:, :11])[0], again(tokens[:, 11:], state)[0]], 1)
    assert change(again(tokens)[0], split) <= 1e-5


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ({}, "nothing grows"),
        ({"head_size": 6}, "nothing grows"),
        ({"head_size": 4}, "below the present"),
        ({"head_size": 7}, "by one channel: a norm of one number is always zero"),
        ({"num_layers": 1}, "below the present"),
        ({"attention_slots": 99}, "cannot grow exactly"),
        ({"ffn_size": 9}, "below the present"),
        ({"num_heads": 3, "init": "one"}, "allowed"),
        ({"num_heads": 3, "seed": 2**64}, "seed is 18446744073709551616; from 0 to"),
        ({"num_heads": 3, "seed": -1}, "seed is -1"),
        ({"head_size": 20.5}, "growth.head_size is 20.5; int is needed"),
        ({"num_layers": "3"}, "growth.num_layers is '3'; int is needed"),
    ],
)
def test_refused(sizes, word):
    with pytest.raises(ConfigError, match=word):
        grow(build(), **sizes)


def test_a_feed_forward_layer_of_the_usual_width_is_as_wide_as_it_is():
    model = build(architecture="rwkv7", ffn_size=None)  # 4 D
    for n, word in ((40, "below the present 48"), (48, "nothing grows")):
        with pytest.raises(ConfigError, match=word):
            grow(model, ffn_size=n)
    assert grow(model, ffn_size=50).blocks[0].channel_mix.key.out_features == 50


def test_refused_where_it_cannot_be_exact():
    for meta, word in (
        ({"readout": "both", "update": "self", "query": "encoding"}, "read back"),
        ({"readout": "meta", "update": "self", "query": "receptance"}, "read back"),
        ({"read": "value"}, "through new values"),
        ({"readout": "both"}, "never learn"),
        ({"encoder": "cross"}, "never learn"),
    ):
        model = build(meta_state=meta)
        with pytest.raises(ConfigError, match=word):
            grow(model, head_size=9)
        assert grow(model, num_heads=3).config.num_heads == 3
    with pytest.raises(ConfigError, match="transformer cannot grow"):
        grow(build(architecture="transformer"), num_heads=4)


def test_more_pairs_of_tokens_are_alive():
    model = build(parameter_tokens=2)
    grown = grow(model, parameter_tokens=5)
    values = regions(grown, model.config)["blocks.0.time_mix.token_values"].new["P"]
    tokens, _ = text()
    grown(tokens)[0].square().mean().backward()
    assert values.of(grown.blocks[0].time_mix.token_values.grad).any()


def test_a_state_of_another_model_is_refused():
    model, other = build(), build(architecture="transformer")
    grown = grow(model, head_size=9)
    with pytest.raises(StateError):
        grow_state(other(text()[0])[1], grown)
    with pytest.raises(StateError):
        grow_state(grow(model, head_size=20).init_state(1), grown)
    with pytest.raises(StateError, match="layers"):
        grow_state(grow(model, num_layers=9).init_state(1), grown)
    with pytest.raises(StateError, match="another model"):
        grow_state(build(hidden_size=6, head_size=6).init_state(1), grown)


def test_what_was_frozen_stays_so():
    model = build(architecture="rwkv7")
    model.embedding.weight.requires_grad_(False)
    for larger in (grow(model, num_layers=3), upgrade(model)):
        for name, p in larger.named_parameters():
            assert p.requires_grad == (name != "embedding.weight"), name


def test_a_grown_model_is_run_and_known_as_its_parent_was():
    model = build(architecture="rwkv7")
    model.backend, model.activation_checkpointing = "reference", True
    model.step, model.tokenizer_info = 7, {"kind": "bytes"}
    for larger in (grow(model, num_layers=3), upgrade(model)):
        assert (larger.backend, larger.activation_checkpointing) == ("reference", True)
        assert (larger.step, larger.tokenizer_info) == (7, {"kind": "bytes"})
        assert larger.lineage[0]["step"] == 7 and not larger.training


def test_comparing_logits_leaves_every_module_in_its_mode():
    model = build().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    logits_change(model, model, torch.zeros(1, 3, dtype=torch.int64))
    assert [module.training for module in model.modules()] == modes


def test_logits_of_16_bit_weights_are_compared_in_float32():
    model = build(torch.float32).bfloat16()
    wide = copy.deepcopy(model).float()
    assert logits_change(model, wide, text()[0])["max_abs"] == 0
    assert model.embedding.weight.dtype == torch.bfloat16


def test_how_far_logits_moved_is_relative_to_the_parents():
    model = build()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.mul_(-3)
    tokens = text()[0]
    found, largest = logits_change(model, other, tokens), model(tokens)[0].abs().max().item()
    assert found["max_abs"] == pytest.approx(4 * largest)
    assert found["relative"] == pytest.approx(4) and found["tokens"] == 2 * 37


def test_a_report_counts_the_cache_of_a_training_context():
    model = build(architecture="transformer")
    grown = grow(model, num_layers=3)
    report = growth_report(model, grown, text()[0])
    assert report["state_bytes"] == [2 * 1024 * 12 * 8 * layers for layers in (2, 3)]
