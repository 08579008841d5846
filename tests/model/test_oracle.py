"""The model against the NumPy oracle: every option of the layer, states and documents."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import Oracle
from small_models import GROWN, at_random, build, label, one_at_a_time

from metastate.config import MetaStateConfig
from tolerance import TOLERANCE, relative_error

BACKENDS = ["reference", "chunked", "cpu"]


def numpy_weights(model):
    """Return the model's parameters under the oracle's names, matrices acting on the right."""
    own = {k: v.detach().numpy() for k, v in model.named_parameters()}
    out = {"emb": own.pop("embedding.weight"), "head": own.pop("head.weight").T}
    low_rank = {"decay": "w", "icl_rate": "a", "value_mix": "v", "gate": "g"}
    factor = {"A": "1", "B": "2", "bias": "0"}
    plain = {
        "norm": "ln_x",
        "token_keys": "K_P",
        "token_values": "V_P",
        "meta_norm": "norm_m",
        "encoding_norm": "norm_e",
        "projection": "W_p",
        "compress": "W_z",
        "expand": "W_u",
    }
    for name, value in own.items():
        if not name.startswith("blocks."):
            out[name] = value
            continue
        _, i, part, *rest = name.split(".")
        head, tail = rest[0], rest[1:]
        base = {"time_mix": f"{i}.att", "channel_mix": f"{i}.ffn", "meta_state": f"{i}.meta"}
        if part not in base:
            out[f"{i}.{part}.{head}"] = value
        elif head == "mu":
            letters = {"time_mix": "rwkvag", "channel_mix": "k", "meta_state": "xg"}[part]
            for letter, row in zip(letters, np.atleast_2d(value), strict=False):
                out[f"{base[part]}.x_{letter}"] = row
        elif head in low_rank:
            out[f"{base[part]}.{low_rank[head]}{factor[tail[0]]}"] = value
        elif part == "meta_state" and head == "output":
            out[f"{i}.meta.W_o"] = value.T
        elif head in ("receptance", "key", "value", "output"):
            out[f"{base[part]}.{head}"] = value.T
        else:
            out[".".join([base[part], plain.get(head, head), *tail])] = value
    return out


def check(model, length=9, carried=True, backends=BACKENDS[:2]):
    """Compare logits and states: no state then a carried one; documents start inside and at 0."""
    generator = torch.Generator().manual_seed(2)
    oracle = Oracle(model.config, numpy_weights(model))
    tokens = torch.randint(0, model.config.vocab_size, (2, 2 * length), generator=generator)
    resets = torch.rand(2, 2 * length, generator=generator) < 0.2
    resets[0, length] = True  # a carried state that is dropped; row 1 keeps its own
    resets[1, length] = False
    results = [oracle.forward(*row) for row in zip(tokens, [None] * 2, resets, strict=True)]
    expected = torch.from_numpy(np.stack([logits for logits, _ in results]))
    halves = [slice(0, length), slice(length, 2 * length)] if carried else [slice(None)]
    for backend in backends:
        model.backend, state, parts = backend, None, []
        with torch.no_grad():
            for half in halves:
                part, state = model(tokens[:, half], state, resets=resets[:, half])
                parts.append(part)
        assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE[torch.float64], backend
        names = {"S": "S", "time_shift": "time"}
        names |= {name: name for name in ("M", "key", "expected", "features")}
        for i, part in enumerate(state.parts):
            for name, key in names.items():
                mine = getattr(part, name, None)
                if mine is not None:
                    theirs = torch.from_numpy(np.stack([s[i][key] for _, s in results]))
                    assert relative_error(mine, theirs) < TOLERANCE[torch.float64], (i, name)
    return oracle, tokens


@pytest.mark.parametrize("fields", [{}, GROWN], ids=["plain", "grown"])
def test_rwkv7(fields):
    check(build(architecture="rwkv7", **fields), backends=BACKENDS)


@pytest.mark.parametrize("options", list(one_at_a_time()), ids=label)
@pytest.mark.parametrize("fields", [{}, GROWN], ids=["plain", "grown"])
def test_each_option(options, fields):
    check(build(meta_state=options, **fields))


@pytest.mark.parametrize("options", list(at_random(10)), ids=label)
def test_random_combinations(options):
    check(build(meta_state=options, **GROWN), backends=BACKENDS)


@pytest.mark.parametrize("fields", [{}, GROWN], ids=["plain", "grown"])
def test_feed_forward_layer_beside(fields):
    check(build(ffn_order="beside", **fields), backends=BACKENDS)


@pytest.mark.parametrize("layer", [None, 0, 1])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("fields", [{}, GROWN, {"architecture": "rwkv7"}], ids=str)
def test_surprise_memory(fields, heads, layer):
    check(build(memory_heads=heads, memory_layer=layer, **fields), backends=BACKENDS)


@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("options", [MetaStateConfig(), MetaStateConfig.paper()], ids=label)
def test_longer_than_a_chunk(options, heads):
    model = build(meta_state=options, num_layers=1, memory_heads=heads)
    check(model, length=75, carried=False, backends=BACKENDS)


def test_kl_term_of_the_variational_encoder():
    options = MetaStateConfig(encoder="cross", latent_size=2, variational=True, kl_weight=0.3)
    model = build(meta_state=options)
    tokens = torch.tensor([[1, 2, 3, 4]])
    model.backend = "reference"
    _, _, kl = model.features(tokens)
    oracle = Oracle(model.config, numpy_weights(model))
    oracle.forward(tokens[0])
    assert float(kl.detach()) == pytest.approx(0.3 * oracle.kl / 4, rel=1e-11)


def test_variational_encoder_draws_only_in_training(monkeypatch):
    options = MetaStateConfig(encoder="cross", latent_size=2, variational=True)
    model, tokens = build(meta_state=options), torch.tensor([[1, 2, 3, 4]])
    model.backend = "reference"
    expected, _ = model(tokens)
    assert torch.equal(expected, model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    assert torch.equal(model(tokens)[0], expected)


def test_variational_encoder_draws_by_its_own_deviation(monkeypatch):
    options = MetaStateConfig(encoder="cross", latent_size=2, variational=True)
    layer = build(meta_state=options).blocks[0].meta_state.train()
    x, e = torch.randn(2, 1, 4, 2, 6, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    found, _ = layer.encode(x, x, SimpleNamespace(read=lambda x, by: e))
    z = torch.einsum("bthn,hnr->bthr", torch.cat([x, e], -1), layer.compress)
    z = z[..., :2] + (z[..., 2:] / 2).exp()
    expected = torch.einsum("bthr,hrn->bthn", z, layer.expand)
    assert relative_error(found, expected) < TOLERANCE[torch.float64]


def test_a_meta_state_layer_alone():
    for options in (MetaStateConfig(), MetaStateConfig(encoder_query="receptance", gate=True)):
        model = build(ffn_size=None, meta_state=options)
        assert model.blocks[0].channel_mix is None
        check(model)
