"""A trained RWKV-7 gets Meta-State layers and computes the same; blocks that differ."""

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import metastate
from metastate.config import MetaStateConfig, ModelConfig, TrainConfig
from metastate.errors import ConfigError, StateError
from metastate.growth import grow, grow_moments, grow_state, upgrade
from metastate.mapping import from_dict, to_dict
from metastate.model.lm import LanguageModel
from metastate.model.regions import regions
from metastate.model.state import ModelState, config_hash
from metastate.train.optim import make_optimizer, moments, whole_moments
from metastate.train.trainer import train

SIZES = {"vocab_size": 19, "hidden_size": 12, "num_layers": 4, "num_heads": 2, "ffn_size": 10}
READINGS = [
    MetaStateConfig(),
    MetaStateConfig(readout="both"),
    MetaStateConfig(readout="both", encoder_query="input", gate=True, token_shift=True),
    MetaStateConfig(encoder="cross", latent_size=2, encoder_query="input"),
    MetaStateConfig.paper(),
]


def rwkv7(dtype=torch.float32, **fields):
    """An RWKV-7 none of whose weights is what it was made with."""
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(**{"architecture": "rwkv7"} | SIZES | fields))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype).eval()


def text(length=33):
    return torch.randint(19, (2, length)), torch.rand(2, length) < 0.1


@pytest.mark.parametrize("options", READINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_upgraded_model_is_bit_by_bit_the_same(options, dtype):
    model = rwkv7(dtype)
    tokens, resets = text()
    for layers in (None, [0, 2]):
        upgraded = upgrade(model, layers, meta_state=options)
        before, state = model(tokens, resets=resets)
        assert torch.equal(before, upgraded(tokens, resets=resets)[0])
        # And it goes on so from a state that the parent carried.
        carried = grow_state(state, upgraded)
        assert torch.equal(model(tokens, state)[0], upgraded(tokens, carried)[0])
        assert upgraded.embedding.weight.dtype == dtype
        has = [block.meta_state is not None for block in upgraded.blocks]
        assert has == [layers is None or i in layers for i in range(4)]


def test_a_feed_forward_layer_of_the_usual_width_stays():
    model = rwkv7(ffn_size=None)  # 4 D
    upgraded = upgrade(model)
    assert upgraded.config.ffn_size == 48
    tokens, _ = text()
    assert torch.equal(model(tokens)[0], upgraded(tokens)[0])


def test_a_model_that_grew_before_and_one_that_grows_afterwards():
    model = grow(rwkv7(torch.float64), head_size=9, num_heads=3, parameter_tokens=2)
    tokens, resets = text()
    options = MetaStateConfig(readout="both", encoder_query="input")  # it reads x W_p
    upgraded = upgrade(model, [1, 3], meta_state=options)
    expected = model(tokens, resets=resets)[0]
    assert torch.equal(expected, upgraded(tokens, resets=resets)[0])
    with torch.no_grad():  # what was just added must not have to be zero
        for p in upgraded.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = upgraded(tokens, resets=resets)[0]
    for sizes in (
        {"head_size": 11},
        {"num_heads": 4},
        {"parameter_tokens": 3},
        {"num_layers": 6},
        {"ffn_size": 13},
    ):
        grown = grow(upgraded, **sizes)
        found = grown(tokens, resets=resets)[0]
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max(), sizes
    # New blocks are as the top one.
    assert grow(upgraded, num_layers=6).config.meta_layers == (1, 3, 4, 5)
    assert grow(upgrade(model, [1]), num_layers=6).config.meta_layers == (1,)


def test_a_layer_before_a_feed_forward_layer_that_stood_alone():
    torch.manual_seed(2)
    model = LanguageModel(ModelConfig(**SIZES, meta_layers=(1,), ffn_order="after"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    tokens, resets = text()
    upgraded = upgrade(model.eval(), [0, 3])
    assert [b.ln3 is not None for b in model.blocks] == [False, True, False, False]
    assert [b.ln3 is not None for b in upgraded.blocks] == [True, True, False, True]
    assert torch.equal(model(tokens, resets=resets)[0], upgraded(tokens, resets=resets)[0])
    assert upgraded.blocks[0].ln3.weight is not upgraded.blocks[0].ln2.weight
    moved = upgrade(upgraded, [1], replace=True)
    assert moved.blocks[1].ln3 is None and moved.blocks[1].channel_mix is None
    assert torch.isfinite(moved(tokens)[0]).all()


def test_replaced_layers_are_gone():
    model = rwkv7()
    some = upgrade(model, [0, 3], replace=True)
    assert (some.config.meta_layers, some.config.ffn_layers) == ((0, 3), (1, 2))
    assert [block.channel_mix is None for block in some.blocks] == [True, False, False, True]
    assert [block.meta_state is None for block in some.blocks] == [False, True, True, False]
    state = some.init_state(1)
    assert [layer.channel_shift is None for layer in state.layers] == [True, False, False, True]
    whole = upgrade(model, replace=True)
    assert (whole.config.meta_layers, whole.config.ffn_layers) == (None, None)
    assert whole.config.ffn_size is None and whole.config.num_layers == 4
    tokens, _ = text()
    _, carried = model(tokens)
    for new in (some, whole):
        assert torch.isfinite(new(tokens, grow_state(carried, new))[0]).all()
        for name, p in new.named_parameters():
            if ".meta_state." not in name:
                assert torch.equal(p, model.get_parameter(name))
    assert whole.count_parameters()["total"] < model.count_parameters()["total"]


def test_in_two_steps_beside_and_then_alone():
    options = MetaStateConfig(readout="both")
    beside = upgrade(rwkv7(), [0, 1], meta_state=options)
    with torch.no_grad():  # the first layers have learned
        for p in beside.parameters():
            p.add_(0.1 * torch.randn_like(p))
    more = upgrade(beside, [2])
    tokens, _ = text()
    assert torch.equal(more(tokens)[0], beside(tokens)[0])
    assert upgrade(beside, [2], meta_state=options).config == more.config
    assert more.config.meta_layers == (0, 1, 2) and more.config.meta_state == options
    alone = upgrade(more, [0, 1, 2], replace=True)
    assert (alone.config.meta_layers, alone.config.ffn_layers) == ((0, 1, 2), (3,))
    assert [step["meta_layers"][1] for step in alone.lineage] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert alone.lineage[2]["ffn_layers"] == [[0, 1, 2, 3], [3]]


def test_refused():
    model = rwkv7()
    transformer = LanguageModel(ModelConfig(architecture="transformer", **SIZES))
    for parent, arguments, word in (
        (transformer, {}, "no WKV state"),
        (model, {"layers": []}, "at least one"),
        (model, {"layers": [0, 4]}, "from 0 to 3"),
        (model, {"layers": [-1]}, "from 0 to 3"),
        (upgrade(model), {}, "nothing changes"),
        (upgrade(model, [1]), {"layers": [1]}, "nothing changes"),
        (upgrade(model, [1]), {"meta_state": MetaStateConfig(gate=True)}, "one kind"),
        (upgrade(model, replace=True), {"replace": True}, "no feed-forward layer already"),
    ):
        with pytest.raises(ConfigError, match=word):
            upgrade(parent, **arguments)


def test_the_parent_is_not_touched_and_the_seed_decides():
    model = rwkv7()
    options = MetaStateConfig(encoder="cross", encoder_query="input")
    state = torch.get_rng_state()
    a, b, c = (upgrade(model, meta_state=options, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(p, b.get_parameter(n)) for n, p in a.named_parameters()]
    assert all(same) and any(
        not torch.equal(p, c.get_parameter(n)) for n, p in a.named_parameters()
    )
    with torch.no_grad():
        a.embedding.weight.zero_()
    assert model.embedding.weight.any()


def test_all_of_the_parent_is_old_and_all_of_the_layers_new():
    model = grow(rwkv7(), head_size=9)
    model.step = 5  # trained since; else what it grew by were new too
    options = MetaStateConfig(readout="both", encoder_query="input", token_shift=True)
    upgraded = upgrade(model, [1], meta_state=options)
    for name, part in regions(upgraded, model.config).items():
        assert (part.old is None) == (".meta_state." in name), name
        assert part.old is None or not part.new
    # W_p, which growth counts as old where a Meta-State layer was there, is new here.
    assert "blocks.1.meta_state.projection" in dict(upgraded.named_parameters())
    optimizer = make_optimizer(upgraded, TrainConfig(), old_lr_scale=0.0)
    names = {name for group in optimizer.param_groups for name in group["names"]}
    assert names and all(name.startswith("blocks.1.meta_state.") for name in names)


@pytest.mark.parametrize("replace", [False, True])
def test_training_with_the_rest_frozen(few_words, tmp_path, replace):
    config = TrainConfig(
        data=str(few_words),
        out=str(tmp_path / "first"),
        preset="rwkv7-tiny",
        model={**SIZES, "vocab_size": 256},
        steps=3,
        batch_size=2,
        context=16,
        warmup=1,
        weight_decay=0.5,
        lr=1e-2,
    )
    train(config)
    parent = metastate.load(tmp_path / "first")
    upgraded = upgrade(parent, [1, 2], replace=replace)
    metastate.save(upgraded, tmp_path / "big")
    changes = {"out": str(tmp_path / "second"), "from_checkpoint": str(tmp_path / "big")}
    train(dataclasses.replace(config, **changes, model={}, old_lr_scale=0.0))
    after = metastate.load(tmp_path / "second")
    assert after.lineage == upgraded.lineage and after.config == upgraded.config
    for name, p in after.named_parameters():
        moved = not torch.equal(p, upgraded.get_parameter(name))
        assert moved == (".meta_state." in name), name


def test_moments_go_along():
    model = rwkv7()
    optimizer = make_optimizer(model, TrainConfig())
    model(text()[0])[0].square().mean().backward()
    optimizer.gather()
    optimizer.step()
    known = whole_moments(moments(optimizer), model)
    for replace in (False, True):
        upgraded = upgrade(model, [0], replace=replace)
        found = grow_moments(known, upgraded, model.config)
        gone = {k for k in known if replace and "blocks.0.channel_mix." in k}
        assert found.keys() == known.keys() - gone
        assert all(torch.equal(found[k], known[k]) for k in found)


# Blocks that differ, in any model.


def test_old_hashes_and_files_stay():
    # Taken before there were meta_layers, ffn_layers and ffn_order: saved states hold them.
    for fields, start in (
        ({}, "c4a28f2349a2ec0a"),
        ({"architecture": "rwkv7"}, "f2ebd012d512e557"),
        ({"head_size": 80, "parameter_tokens": 3, "ffn_size": 100}, "acbebd7805ddc057"),
    ):
        assert config_hash(ModelConfig(**fields)).startswith(start)
        assert not {"meta_layers", "ffn_order"} & to_dict(ModelConfig(**fields)).keys()
    loud = ModelConfig(meta_state=MetaStateConfig(readout_gain=2.0))  # first values alone
    assert config_hash(loud) == config_hash(ModelConfig()) and loud != ModelConfig()
    config = ModelConfig(ffn_size=9, meta_layers=(1,))
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config_hash(config) != config_hash(ModelConfig(ffn_size=9))
    after, beside = (ModelConfig(ffn_size=9, ffn_order=order) for order in ("after", "beside"))
    assert beside == ModelConfig(ffn_size=9) and config_hash(after) != config_hash(beside)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(after)))) == after


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"meta_layers": (4,), "ffn_size": 9}, "0 to 3"),
        ({"meta_layers": (-1,), "ffn_size": 9}, "0 to 3"),
        ({"meta_layers": (), "ffn_size": 9}, "at least one"),
        ({"meta_layers": (1,)}, "block 0 has neither"),
        ({"ffn_layers": (1,)}, "needs model.ffn_size"),
        ({"ffn_order": "after", "architecture": "rwkv7"}, "for metastate"),
        (
            {"ffn_order": "after", "ffn_size": 9, "meta_state": MetaStateConfig(token_shift=True)},
            "needs model.ffn_order='beside'",
        ),
        ({"meta_layers": (0, 1), "ffn_layers": (1, 2), "ffn_size": 9}, "block 3 has neither"),
        ({"meta_layers": (1,), "architecture": "rwkv7"}, "not for rwkv7"),
    ],
)
def test_layers_are_checked(fields, word):
    with pytest.raises(ConfigError, match=word):
        ModelConfig(**fields)


def test_all_blocks_are_written_as_none_and_the_order_does_not_matter():
    config = ModelConfig(ffn_size=9, meta_layers=(3, 1, 2, 0), ffn_layers=(2, 0))
    assert (config.meta_layers, config.ffn_layers) == (None, (0, 2))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.lists(st.sampled_from([(1, 0), (0, 1), (1, 1)]), min_size=3, max_size=3),
    options=st.sampled_from(READINGS),
    order=st.sampled_from(["beside", "after"]),
)
def test_any_mixture_of_blocks(which, options, order, tmp_path_factory):
    """Whole = split = saved and loaded, counts add up, and a state fits its own model alone."""
    if not any(meta for meta, _ in which):
        return
    layers = {
        name: tuple(i for i, has in enumerate(which) if has[kind])
        for kind, name in enumerate(("meta_layers", "ffn_layers"))
    }
    if not layers["ffn_layers"]:
        layers["ffn_layers"] = None
    sizes = SIZES | {"num_layers": 3, "ffn_size": 10 if layers["ffn_layers"] else None}
    sizes["ffn_order"] = "beside" if options.token_shift else order
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(**sizes, **layers, meta_state=options)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    tokens, resets = text(20)
    whole, last = model(tokens, resets=resets)
    first, state = model(tokens[:, :9], resets=resets[:, :9])
    file = tmp_path_factory.mktemp("state") / "s.safetensors"
    state.save(file, model.config)
    rest, end = model(tokens[:, 9:], ModelState.load(file, model), resets=resets[:, 9:])
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 1e-10
    assert end.num_bytes == last.num_bytes == 2 * model.state_bytes()
    full = LanguageModel(ModelConfig(**sizes | {"ffn_size": 10}, meta_state=options))
    assert (sum(model.flops_per_token(8)) < sum(full.flops_per_token(8))) == (which != [(1, 1)] * 3)
    if which != [(1, 1)] * 3 and not options.token_shift:
        other = full.double()
        if any(not meta and other.init_state(1).layers[0].M is not None for meta, _ in which):
            with pytest.raises(StateError):
                state.check(other)
