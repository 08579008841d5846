"""Attention: whole = split = stepwise, documents apart, states that never change."""

import pytest
import torch
import torch.nn.functional as F

from metastate.config import ModelConfig
from metastate.layers.attention import Attention, Mlp, Sight, rotary_table, rotate
from metastate.model.lm import LanguageModel

T = 23


@pytest.fixture
def layer():
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="transformer", vocab_size=32, hidden_size=24, num_layers=2, num_heads=3
    )
    layer = Attention(config).double()
    for p in layer.parameters():  # large enough that attention is far from uniform
        torch.nn.init.normal_(p, std=0.4)
    return layer


@pytest.fixture
def x():
    return torch.randn(2, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def oracle(layer, x):
    """Softmax attention, written out, for one document; positions from 0."""
    batch, length, _ = x.shape
    q, k, v = (
        p.view(batch, length, layer.num_heads, -1).transpose(1, 2)
        for p in layer.qkv(x).chunk(3, -1)
    )
    n = layer.head_size
    pos = torch.arange(length, dtype=torch.float64)
    angle = pos[:, None] * layer.theta ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)

    def turn(u):
        z = torch.complex(u[..., : n // 2], u[..., n // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([z.real, z.imag], -1)

    score = turn(q) @ turn(k).transpose(-1, -2) / n**0.5
    score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return layer.output((score.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


def run(layer, x, cuts, state=None, resets=None):
    out, position = [], 0
    for n in cuts:
        part = None if resets is None else resets[:, position : position + n]
        sight = Sight.of(n, state, part, x.device)
        y, state = layer(x[:, position : position + n], state, sight)
        out.append(y)
        position += n
    return torch.cat(out, 1), state


CUTS = [[T], [1] * T, [5, 1, 1, 10, 6], [20, 3]]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("cuts", CUTS)
def test_whole_split_stepwise(layer, x, cuts, grad):
    with torch.set_grad_enabled(grad):
        y, state = run(layer, x, cuts)
        torch.testing.assert_close(y, oracle(layer, x), rtol=0, atol=1e-12)
    assert state.length == T
    assert state.num_bytes == 2 * 2 * T * 24 * 8


def test_gradients_flow_through_the_state(layer, x):
    grads = []
    for cuts in [[T], [9, 1, 13]]:
        x = x.detach().requires_grad_()
        y, _ = run(layer, x, cuts)
        y.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cuts", CUTS)
def test_resets_are_separate_documents(layer, x, cuts):
    starts = [[0, 4, 5, 17], [8]]  # row 1 begins inside a document
    resets = torch.zeros(2, T, dtype=torch.bool)
    for row, positions in enumerate(starts):
        resets[row, positions] = True
    with torch.no_grad():
        y, state = run(layer, x, cuts, resets=resets)
        for row, positions in enumerate(starts):
            edges = sorted({0, *positions, T})
            for a, b in zip(edges, edges[1:], strict=False):
                expected = oracle(layer, x[row : row + 1, a:b])
                torch.testing.assert_close(y[row : row + 1, a:b], expected, rtol=0, atol=1e-12)
    assert state.start.tolist() == [17, 8]
    assert state.num_bytes == 2 * ((T - 17) + (T - 8)) * 24 * 8


def test_reset_at_the_first_token_hides_the_past(layer, x):
    with torch.no_grad():
        _, past = layer(x)
        resets = torch.zeros(2, T, dtype=torch.bool)
        resets[0, 0] = True
        y, state = layer(x, past, Sight.of(T, past, resets, x.device))
        torch.testing.assert_close(y[:1], oracle(layer, x[:1]), rtol=0, atol=1e-12)
        both = oracle(layer, torch.cat([x, x], 1))[1:, T:]
        torch.testing.assert_close(y[1:], both, rtol=0, atol=1e-12)
        step, _ = layer(x[:, :1], state)
        again = oracle(layer, torch.cat([x, x[:, :1]], 1))[:1, T:]
        torch.testing.assert_close(step[:1], again, rtol=0, atol=1e-12)


def test_plain_training_uses_is_causal_without_mask(layer, x, monkeypatch):
    calls = []
    inner = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kw: calls.append(kw) or inner(*args, **kw),
    )
    row_starts = torch.zeros(2, T, dtype=torch.bool)
    row_starts[0, 0] = True
    layer(x)
    layer(x, None, Sight.of(T, None, row_starts, x.device))
    assert [c["attn_mask"] is None and c["is_causal"] for c in calls] == [True, True]


def test_layers_share_one_mask_of_documents(monkeypatch):
    masks, inner = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kw: masks.append(kw["attn_mask"]) or inner(*args, **kw),
    )
    config = ModelConfig(
        architecture="transformer", vocab_size=32, hidden_size=24, num_layers=3, num_heads=3
    )
    tokens, resets = torch.randint(32, (2, T)), torch.zeros(2, T, dtype=torch.bool)
    resets[0, 9] = True
    LanguageModel(config)(tokens, resets=resets)
    assert [m.data_ptr() for m in masks] == [masks[0].data_ptr()] * 3
    assert masks[0].shape == (2, 1, T, T) and masks[0].dtype == torch.float32


def test_old_state_and_forks_stay_as_they_were(layer, x):
    with torch.no_grad():
        _, old = run(layer, x, [6, 1])  # the append left spare capacity behind
        assert old.keys.shape[2] > old.length
        before = old.map(torch.clone)
        y_a, fork_a = layer(x[:, 7:8], old)
        kept = fork_a.map(torch.clone)
        y_b, fork_b = layer(-x[:, 7:8], old)
        assert fork_a.keys.data_ptr() == old.keys.data_ptr() != fork_b.keys.data_ptr()
        assert not torch.equal(y_a, y_b)
        for state, copy in [(old, before), (fork_a, kept)]:
            for a, b in zip(state.visible(), copy.visible(), strict=True):
                assert torch.equal(a, b)
        again, _ = layer(x[:, 8:], fork_a)
        torch.testing.assert_close(again, oracle(layer, x)[:, 8:], rtol=0, atol=1e-12)


def test_only_one_of_two_threads_writes_behind_a_state(layer, x, monkeypatch):
    """While the first copies its keys into the buffer, the second goes on from the same state."""
    with torch.no_grad():
        _, old = run(layer, x, [6, 1])
        k, forks = torch.randn(3, *old.keys[:, :, :1].shape, dtype=old.keys.dtype), []
        real = torch.Tensor.__setitem__

        def second_comes_first(*args):
            monkeypatch.setattr(torch.Tensor, "__setitem__", real)
            forks.append(old.append(k[1], k[1], None))
            real(*args)

        monkeypatch.setattr(torch.Tensor, "__setitem__", second_comes_first)
        forks.insert(0, old.append(k[0], k[0], None))
    for i, fork in enumerate(forks):
        assert torch.equal(fork.visible()[0][:, :, 7:], k[i])


def test_appending_rarely_copies(layer, x):
    with torch.no_grad():
        state, buffers = None, set()
        for _ in range(600):
            _, state = layer(x[:1, :1], state)
            buffers.add(state.watermark)
    assert state.length == 600
    assert len(buffers) < 10


def test_state_of_inference_mode_can_be_continued(layer, x):
    with torch.inference_mode():
        _, state = run(layer, x, [6, 1])
    with torch.no_grad():
        y, _ = layer(x[:, 7:], state)
    torch.testing.assert_close(y, oracle(layer, x)[:, 7:], rtol=0, atol=1e-12)
    layer(x)[0].sum().backward()  # the rotary tables of that mode do not hinder training


def test_map_rows_detach(layer, x):
    with torch.no_grad():
        _, state = run(layer, x, [6, 1])
        row = state.map(lambda t: t[1:])
        assert row.keys.shape == (1, 3, 7, 8)
        y, _ = layer(x[1:, 7:], row)
        torch.testing.assert_close(y, oracle(layer, x)[1:, 7:], rtol=0, atol=1e-12)
    _, state = layer(x)
    assert state.keys.requires_grad and not state.map(torch.Tensor.detach).keys.requires_grad


def test_rotary_depends_on_distance_alone():
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    args = (16, 10000.0, torch.float64, torch.device("cpu"))

    def score(p, s):
        return rotate(q, *rotary_table(1, p, *args)) @ rotate(k, *rotary_table(1, s, *args)).mT

    torch.testing.assert_close(score(7, 3), score(100_007, 100_003), rtol=0, atol=1e-9)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_float32_and_autocast(layer, x):
    layer, x = layer.float(), x.float()
    y, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z, state = run(layer, x, [12, 1, 10])
    assert state.keys.dtype == torch.bfloat16
    assert (z.float() - y).norm() < 0.02 * y.norm()


def test_half_precision_turns_by_angles_that_are_not_rounded(layer, x):
    layer, x = layer.bfloat16(), x.bfloat16()
    _, state = layer(x)
    table = rotary_table(T, 0, 8, layer.theta, torch.float32, x.device)
    expected = rotate(layer.project(x)[1].float(), *table).bfloat16()
    assert torch.equal(state.visible()[0], expected)


def test_a_cache_of_another_dtype_is_left_alone(layer, x):
    layer, x = layer.float(), x.float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _, state = run(layer, x, [6, 1])
        assert state.keys.dtype == torch.bfloat16 and state.keys.shape[2] > state.length
        _, after = layer(x[:, 7:8], state)
        _, whole = layer(x[:, :8])
    assert torch.equal(after.visible()[0][:, :, :7], state.visible()[0].float())
    torch.testing.assert_close(after.visible()[0][:, :, 7], whole.visible()[0][:, :, 7])


def test_the_feed_forward_layer():
    config = ModelConfig(
        architecture="transformer", vocab_size=32, hidden_size=24, num_layers=2, num_heads=3
    )
    mlp = Mlp(config)
    assert mlp.key.weight.shape == (96, 24)
    assert Mlp(config.replace(ffn_size=40)).value.weight.shape == (24, 40)
    x = torch.randn(2, 5, 24)
    expected = F.gelu(x @ mlp.key.weight.T) @ mlp.value.weight.T
    torch.testing.assert_close(mlp(x), expected)
