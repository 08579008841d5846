"""States in other programs' layouts: RWKV's own package goes on exactly where we stopped."""

import pytest
import torch

from metastate.config import MetaStateConfig, ModelConfig
from metastate.convert.states import from_fla, from_rwkv, to_fla, to_rwkv
from metastate.errors import StateError
from metastate.model.lm import LanguageModel
from tolerance import relative_error

RWKV = ModelConfig("rwkv7", vocab_size=40, hidden_size=128, num_layers=2, num_heads=2)
TOKENS = torch.tensor([[0, 7, 3, 39, 12, 5, 5, 21, 30, 1, 17, 2]])


def filled(config):
    """A model in which nothing is hidden behind a zero."""
    torch.manual_seed(3)
    model = LanguageModel(config).eval()
    model.backend = "chunked"
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.5 if name == "embedding.weight" else 0.05))
    return model


@pytest.fixture(scope="module")
def model():
    return filled(RWKV)


def run(model, tokens, state=None):
    with torch.no_grad():
        return model(tokens, state)


def rwkv_weights(model):
    """The weights under the names of RWKV's own checkpoints."""
    out = {
        "emb.weight": model.embedding.weight,
        "head.weight": model.head.weight,
        "ln_out.weight": model.ln_out.weight,
        "ln_out.bias": model.ln_out.bias,
        "blocks.0.ln0.weight": model.ln0.weight,
        "blocks.0.ln0.bias": model.ln0.bias,
    }
    low_rank = {"w": "decay", "a": "icl_rate", "v": "value_mix"}
    for i, block in enumerate(model.blocks):
        mix, at = block.time_mix, f"blocks.{i}.att."
        for norm in ("ln1", "ln2"):
            out[f"blocks.{i}.{norm}.weight"] = getattr(block, norm).weight
            out[f"blocks.{i}.{norm}.bias"] = getattr(block, norm).bias
        for letter, mu in zip("rwkvag", mix.mu, strict=True):
            out[f"{at}x_{letter}"] = mu.view(1, 1, -1)
        for letter, name in low_rank.items():
            part = getattr(mix, name)
            if part is not None:
                out[f"{at}{letter}0"] = part.bias.view(1, 1, -1)
                out[f"{at}{letter}1"], out[f"{at}{letter}2"] = part.A, part.B
        out[f"{at}g1"], out[f"{at}g2"] = mix.gate.A, mix.gate.B
        out[f"{at}k_k"], out[f"{at}k_a"] = mix.k_k.view(1, 1, -1), mix.k_a.view(1, 1, -1)
        out[f"{at}r_k"] = mix.r_k
        for name in ("receptance", "key", "value", "output"):
            out[f"{at}{name}.weight"] = getattr(mix, name).weight
        out[f"{at}ln_x.weight"], out[f"{at}ln_x.bias"] = mix.norm.weight, mix.norm.bias
        ffn = dict(block.channel_mix.named_parameters())
        out[f"blocks.{i}.ffn.x_k"] = ffn["mu"].view(1, 1, -1)
        out[f"blocks.{i}.ffn.key.weight"] = ffn["key.weight"]
        out[f"blocks.{i}.ffn.value.weight"] = ffn["value.weight"]
    return {name: p.detach().clone() for name, p in out.items()}


@pytest.fixture(scope="module")
def official(model, tmp_path_factory):
    """The same weights in the `rwkv` package."""
    pytest.importorskip("rwkv", reason="the rwkv package is not installed")
    path = tmp_path_factory.mktemp("rwkv") / "model"
    torch.save(rwkv_weights(model), f"{path}.pth")
    with pytest.MonkeyPatch.context() as patch:  # what it is, it reads from the environment
        for name, value in (("V7", "1"), ("JIT", "0"), ("CUDA", "0")):
            patch.setenv(f"RWKV_{name}_ON", value)
        from rwkv.model import RWKV as Official

        return Official(model=str(path), strategy="cpu fp32")


def test_the_weights_are_the_same_model(model, official):
    theirs, _ = official.forward(TOKENS[0].tolist(), None, full_output=True)
    assert relative_error(theirs, run(model, TOKENS)[0][0]) < 1e-4


@pytest.mark.parametrize("at", [1, 6, 11])
def test_the_official_package_goes_on_from_our_state(model, official, at):
    whole, end = run(model, TOKENS)
    _, state = run(model, TOKENS[:, :at])
    theirs, their_end = official.forward(TOKENS[0, at:].tolist(), to_rwkv(state), full_output=True)
    assert relative_error(theirs.view(-1, 40), whole[0, at:]) < 1e-4
    for mine, own in zip(to_rwkv(end), their_end, strict=True):
        assert relative_error(own, mine) < 1e-4


@pytest.mark.parametrize("at", [1, 6, 11])
def test_we_go_on_from_the_official_packages_state(model, official, at):
    whole, _ = run(model, TOKENS)
    _, theirs = official.forward(TOKENS[0, :at].tolist(), None)
    state = from_rwkv(theirs, RWKV, tokens_seen=at)
    logits, end = run(model, TOKENS[:, at:], state)
    assert relative_error(logits, whole[:, at:]) < 1e-4
    assert end.tokens_seen == TOKENS.shape[1]


def test_there_and_back_is_exact_and_shares_no_memory(model):
    _, state = run(model, TOKENS)
    there = to_rwkv(state)
    assert [list(x.shape) for x in there] == [[128], [2, 64, 64], [128]] * 2
    back = from_rwkv(there, RWKV, tokens_seen=state.tokens_seen)
    for x in there:
        x.zero_()
    _, both = run(model, TOKENS.repeat(3, 1), None)
    fla = from_fla(to_fla(both), RWKV, tokens_seen=state.tokens_seen)
    assert fla.batch_size == 3
    for name, x in state.tensors().items():
        assert x.any() and torch.equal(back.tensors()[name], x), name
        assert torch.equal(fla.tensors()[name], both.tensors()[name]), name


def test_fla_keeps_key_before_value(model):
    _, state = run(model, TOKENS.repeat(3, 1))
    first = to_fla(state)[0]
    assert torch.equal(first["recurrent_state"][1, 0, 5, 9], state.layers[0].S[1, 0, 9, 5])
    assert first["recurrent_state"].is_contiguous()
    assert first["conv_state"].shape == first["ffn_state"].shape == (3, 128)


def test_other_states_are_refused(model):
    small = {"vocab_size": 40, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    both = MetaStateConfig(readout="both")
    for config in (
        ModelConfig("metastate", **small, meta_state=both, ffn_size=8),
        ModelConfig("metastate", **small),
        ModelConfig("transformer", **small),
    ):
        state = run(LanguageModel(config), TOKENS)[1]
        for convert in (to_rwkv, to_fla):
            with pytest.raises(StateError, match="layer 0 is no RWKV-7's"):
                convert(state)
        for convert in (from_rwkv, from_fla):
            with pytest.raises(StateError, match=f"a {config.architecture}; this layout"):
                convert([], config)
    with pytest.raises(StateError, match="holds 2 rows; one is needed"):
        to_rwkv(run(model, TOKENS.repeat(2, 1))[1])


def test_broken_lists_are_refused(model):
    good = to_rwkv(run(model, TOKENS)[1])
    for bad, message in [
        (good[:-1], "5 tensors given; 2 layers have 6"),
        ([good[1], *good[1:]], "tensor 0 is torch.float32 .2, 64, 64.; floats .128."),
        ([good[0], good[1][:1], *good[2:]], "tensor 1 is"),
        ([good[0], good[1].long(), *good[2:]], "tensor 1 is torch.int64"),
        ([good[0], None, *good[2:]], "tensor 1 is NoneType"),
        ([good[0] / 0, *good[1:]], "tensor 0 holds numbers that are not finite"),
    ]:
        with pytest.raises(StateError, match=message):
            from_rwkv(bad, RWKV)
    layers = to_fla(run(model, TOKENS)[1])
    for bad, message in [
        (layers[:1], "1 layers given; the model has 2"),
        ([layers[0], {}], "layer 1's recurrent_state is NoneType"),
        ([layers[0], layers[1] | {"ffn_state": None}], "layer 1's ffn_state is NoneType"),
        ([layers[0], layers[1] | {"conv_state": torch.ones(2, 128)}], "layer 1's conv_state is"),
    ]:
        with pytest.raises(StateError, match=message):
            from_fla(bad, RWKV)
