"""Initial values of every layer, channel by channel, as RWKV-7's training code has them."""

import dataclasses
import math

import pytest
import torch

from metastate.config import MetaStateConfig, ModelConfig
from metastate.model.lm import LanguageModel

L, D, H, V = 3, 12, 2, 50
N = D // H


def initial(**fields):
    sizes = {"vocab_size": V, "hidden_size": D, "num_layers": L, "num_heads": H}
    return LanguageModel(ModelConfig(**(sizes | fields)))


def is_orthogonal(weight, gain):
    """Whether the rows or the columns, whichever are fewer, are orthogonal of length `gain`."""
    weight = weight.detach().double()
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    unit = gain**2 * torch.eye(len(short), dtype=torch.float64)
    return torch.allclose(short @ short.T, unit, atol=1e-5 * gain**2, rtol=0)


@pytest.mark.parametrize("layer", range(L))
def test_initial_time_mixing(layer):
    mix = initial(architecture="rwkv7").blocks[layer].time_mix
    r01, r10 = layer / (L - 1), 1 - layer / L
    power = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    for row, p in zip(mix.mu, power.values(), strict=True):
        assert row.tolist() == pytest.approx([1 - (n / D) ** (p * r10) for n in range(D)], abs=1e-6)
    for n in range(D):
        z = (n % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag, line = z * abs(z), n / (D - 1) - 0.5
        w0 = -6 + 6 * (n / (D - 1)) ** (1 + r01**0.3) + 0.5 + 2.5 * zigzag
        assert mix.decay.bias[n].item() == pytest.approx(w0, abs=1e-5)
        a0 = -0.19 + 0.3 * zigzag + 0.4 * line
        assert mix.icl_rate.bias[n].item() == pytest.approx(a0, abs=1e-6)
        assert mix.k_k[n].item() == pytest.approx(0.71 - 0.1 * line, abs=1e-6)
        if layer:
            assert mix.value_mix.bias[n].item() == pytest.approx(0.73 - 0.4 * line, abs=1e-6)
    assert (mix.value_mix is None) == (layer == 0)
    assert mix.gate.bias is None
    assert torch.equal(mix.k_a, torch.full((D,), 1.02))
    assert torch.equal(mix.r_k, torch.full((H, N), -0.04))
    assert is_orthogonal(mix.receptance.weight, 1.0)
    assert is_orthogonal(mix.key.weight, 0.1)
    assert is_orthogonal(mix.value.weight, 1.0)
    assert not mix.output.weight.any()
    assert mix.norm.weight.tolist() == pytest.approx([((1 + layer) / L) ** 0.7] * D)
    assert not mix.norm.bias.any()
    assert mix.norm.eps == 64e-5
    for low_rank in (mix.decay, mix.icl_rate, mix.value_mix, mix.gate):
        if low_rank is not None:
            rank, out = low_rank.B.shape  # 32 rows on 12 columns: above 1
            assert not low_rank.A.any()
            assert is_orthogonal(low_rank.B, 0.1 * max(1, rank / out) ** 0.5)


def test_initial_channel_mixing():
    for layer, block in enumerate(initial(architecture="rwkv7").blocks):
        mix = block.channel_mix
        expected = [1 - (n / D) ** ((1 - layer / L) ** 4) for n in range(D)]
        assert mix.mu.tolist() == pytest.approx(expected, abs=1e-6)
        assert mix.key.weight.shape == (4 * D, D)
        assert is_orthogonal(mix.key.weight, 1.0)
        assert not mix.value.weight.any()


@pytest.mark.parametrize("vocab_size", [V, 5])
def test_initial_embedding_and_head(vocab_size):
    model = initial(vocab_size=vocab_size)
    assert 0 < model.embedding.weight.abs().max() <= 1e-4
    assert is_orthogonal(model.head.weight, 0.5 * max(1, vocab_size / D) ** 0.5)


@pytest.mark.parametrize("gain", [None, 2.0])
def test_initial_meta_state(gain):
    options = MetaStateConfig(readout="both", encoder_query="input", token_shift=True, gate=True)
    options = options if gain is None else dataclasses.replace(options, readout_gain=gain)
    model = initial(meta_state=options, head_size=8, parameter_tokens=2)
    for block in model.blocks:
        meta = block.meta_state
        assert not meta.output.weight.any()
        assert torch.equal(meta.projection, torch.eye(N, 8))
        assert torch.equal(meta.mu, torch.full((2, D), 0.5))
        assert torch.equal(meta.meta_norm.weight, torch.full((H * 8,), gain or 0.5))
        assert torch.equal(meta.encoding_norm.weight, torch.full((H * 8,), gain or 0.5))
        assert not block.time_mix.initial_state().any()  # k_p random, v_p zero
        assert block.time_mix.token_keys.any()
    assert initial().blocks[0].meta_state.projection is None


def assert_normal(weight, std):
    assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert abs(weight.mean().item()) < 0.1 * std


def test_initial_transformer():
    """Normal, std 1/sqrt(fan-in), what ends in the residual stream 1/sqrt(2 L) of that."""
    model, D = initial(architecture="transformer", vocab_size=300, hidden_size=48), 48
    assert_normal(model.embedding.weight, 0.02)
    assert_normal(model.head.weight, 0.02)
    for block in model.blocks:
        assert_normal(block.attention.qkv.weight, D**-0.5)
        assert_normal(block.attention.output.weight, (D * 2 * L) ** -0.5)
        assert_normal(block.mlp.key.weight, D**-0.5)
        assert_normal(block.mlp.value.weight, (4 * D * 2 * L) ** -0.5)


def test_initial_tokenformer():
    """A grown one has more slots, and no weight larger for it: the first slots give the scale."""
    fields = {"hidden_size": 48, "attention_slots": 60, "ffn_size": 80, "first_slots": (36, 40)}
    for block in initial(architecture="tokenformer", **fields).blocks:
        attention = block.attention
        for part in (attention.query, attention.key, attention.value, attention.output, block.mlp):
            slots = 40 if part is block.mlp else 36
            ends = part is attention.output or part is block.mlp
            assert_normal(part.keys, 48**-0.5)
            assert_normal(part.values, (slots * (2 * L if ends else 1)) ** -0.5)
            assert part.scale == slots**0.5


def test_initial_cross_encoder():
    options = MetaStateConfig(encoder="cross", latent_size=6)
    for block in initial(meta_state=options, hidden_size=96).blocks:
        assert_normal(block.meta_state.compress, (2 * 48) ** -0.5)
        assert_normal(block.meta_state.expand, 6**-0.5)


def test_initial_surprise_memory():
    model = initial(memory_heads=2)
    memory = model.surprise_memory
    assert (math.log(0.5) / memory.log_w()).tolist() == pytest.approx([25_173] * D, rel=1e-3)
    assert memory.rate.sigmoid().tolist() == pytest.approx([0.1192] * D, rel=1e-3)
    assert torch.equal(memory.gain, torch.full((D,), 1.5))
    assert torch.equal(memory.logit, torch.full((2,), -0.5))
    assert torch.equal(memory.scale, torch.ones(D))
    for name in ("center", "place", "token", "bias"):
        assert not getattr(memory, name).any(), name


def test_an_untrained_model_predicts_from_the_embedding_alone():
    """All outputs are zero, so logits are head(ln_out(ln0(embedding)))."""
    model = initial()
    model.backend = "chunked"
    tokens = torch.arange(12).view(2, 6)
    expected = model.head(model.ln_out(model.ln0(model.embedding(tokens))))
    torch.testing.assert_close(model(tokens)[0], expected)


def test_ranks_follow_the_training_code():
    with torch.device("meta"):
        model = LanguageModel(
            ModelConfig(architecture="rwkv7", hidden_size=1024, num_heads=16, num_layers=2)
        )
        wide = LanguageModel(ModelConfig(hidden_size=1536, num_heads=12, num_layers=2))
    for each, factor in ((model, 1.0), (wide, 2.0)):  # N = 64, then 128
        mix, root = each.blocks[1].time_mix, each.config.hidden_size**0.5
        for low_rank, scale in ((mix.decay, 2.5), (mix.icl_rate, 2.5), (mix.value_mix, 1.7)):
            assert low_rank.A.shape[1] == round(scale * root * factor / 32) * 32
        assert mix.gate.A.shape[1] == round(5 * root / 32) * 32
