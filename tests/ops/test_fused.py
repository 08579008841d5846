"""The native elementwise kernels against their PyTorch form in float64, outputs and gradients."""

import pytest
import torch

from metastate.layers.common import GroupNorm
from metastate.ops import fused
from tolerance import TOLERANCE, relative_error

H = 3


def leaves(*tensors):
    """Return float32 leaves and the same in float64."""
    single = [t.float().requires_grad_() for t in tensors]
    return single, [t.detach().double().requires_grad_() for t in single]


def compare(function, single, double):
    """Check outputs and every gradient of `function(fused, *tensors)`."""
    found, expected = function(True, *single), function(False, *double)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    weights = [torch.randn(y.shape, dtype=torch.float64) for y in expected]
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < TOLERANCE[torch.float32]
    torch.autograd.backward(found, [w.float() for w in weights])
    torch.autograd.backward(expected, weights)
    for i, (x, y) in enumerate(zip(single, double, strict=True)):
        assert relative_error(x.grad, y.grad) < TOLERANCE[torch.float32], i


@pytest.mark.parametrize("length", [1, 2, 65, 200])
@pytest.mark.parametrize("with_resets", [False, True])
def test_token_mix(length, with_resets):
    resets = torch.rand(2, length) < 0.2 if with_resets else None
    if with_resets:
        resets[1, 0] = True
    tensors = leaves(torch.randn(2, length, 10), torch.randn(2, 10), torch.rand(6, 10))
    compare(lambda fuse, x, last, mu: fused.token_mix(x, last, mu, resets, fused=fuse), *tensors)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_wkv_inputs(mixed, size):
    shape = (2, 70, H * size)
    tensors = [torch.randn(shape) for _ in range(4)] + [torch.randn(H * size) for _ in range(4)]
    tensors += [torch.randn(shape), torch.randn(shape), torch.randn(H * size)] if mixed else []

    def run(fuse, k, v, d, c, w0, a0, k_k, k_a, m=None, v_first=None, v0=None):
        args = (k, v, d, c, m, v_first, w0, a0, v0, k_k, k_a)
        out = fused.wkv_inputs(*args, head_size=size, fused=fuse)
        # In layer 0 the value passes through: a scaled copy keeps it a result with a gradient.
        return *out[:4], out[4] * 1

    if size == 1:  # the gradient through a unit vector of one channel is 0, rounding apart
        tensors[6] = tensors[6].abs() + 1
        single, double = leaves(*tensors)
        for x, y in zip(run(True, *single), run(False, *double), strict=True):
            assert relative_error(x, y) < TOLERANCE[torch.float32]
    else:
        compare(run, *leaves(*tensors))


@pytest.mark.parametrize("size", [2, 16, 63])
def test_wkv_output(size):
    shape = (2, 70, H, size)
    norms = [GroupNorm(H, (size,)), GroupNorm(H, (size,)).double()]

    def run(fuse, y, r, k, v, g, r_k, weight, bias):
        norm = norms[0] if fuse else norms[1]
        del norm._parameters["weight"], norm._parameters["bias"]
        norm.weight, norm.bias = weight, bias
        return fused.wkv_output(y, r, k, v, g, r_k, norm, dtype=y.dtype, fused=fuse)

    tensors = [torch.randn(shape) for _ in range(4)]
    tensors += [torch.randn(2, 70, H * size), torch.randn(H, size)]
    tensors += [torch.randn(H * size), torch.randn(H * size)]
    compare(run, *leaves(*tensors))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [2, 16, 63])
def test_norm_product(count, size):
    norms = {
        fuse: [GroupNorm(H, (size,)).to(dtype) for _ in range(count)]
        for fuse, dtype in ((True, torch.float32), (False, torch.float64))
    }

    def run(fuse, x, *rest):
        for i, norm in enumerate(norms[fuse]):
            del norm._parameters["weight"], norm._parameters["bias"]
            norm.weight, norm.bias = rest[count + 2 * i : count + 2 * i + 2]
        return fused.norm_product(rest[:count], norms[fuse], x, fused=fuse)

    tensors = [torch.randn(2, 70, H * size)]
    tensors += [torch.randn(2, 70, H, size) for _ in range(count)]
    tensors += [torch.randn(H * size) for _ in range(2 * count)]
    compare(run, *leaves(*tensors))


@pytest.mark.parametrize("size", [2, 16, 63])
def test_unit(size):
    compare(lambda fuse, x: fused.unit(x, fused=fuse), *leaves(torch.randn(2, 70, H, size)))


def test_a_zero_has_no_direction():
    x = torch.zeros(1, 3, H, 8, requires_grad=True)
    y = fused.unit(x, fused=True)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


@pytest.mark.parametrize("fuse", [False, True])
def test_the_shortest_vector_has_its_direction(fuse):
    x, vectors = torch.randn(2, 70, H, 8), [torch.randn(H * 8) for _ in range(4)]

    def directions(x):
        k = x.flatten(2)
        args = (k, k, k, k, None, None, *vectors[:2], None, *vectors[2:])
        kappa = fused.wkv_inputs(*args, head_size=8, fused=fuse)[2]
        return fused.unit(x, fused=fuse), kappa

    for small, whole in zip(directions(1e-9 * x), directions(x), strict=True):
        torch.testing.assert_close(small, whole)


@pytest.mark.parametrize("value", [float("nan"), 1e4, -1e4])
def test_extreme_logits(value):
    k = torch.randn(1, 3, 8)
    d = torch.full((1, 3, 8), value)
    zero = torch.zeros(8)
    args = (k, k, d, d, None, None, zero, zero, None, zero + 1, zero)
    found = fused.wkv_inputs(*args, head_size=8, fused=True)
    expected = fused.wkv_inputs(*args, head_size=8)
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, atol=1e-6, equal_nan=True)


def test_relu_squared():
    compare(lambda fuse, x: fused.relu_squared(x, fused=fuse), *leaves(torch.randn(2, 70, H * 5)))


@pytest.mark.parametrize("fuse", [False, True])
def test_results_have_the_dtype_that_is_asked_for(fuse):
    x, last, mu = narrow(1, 4, 8), torch.zeros(1, 8), torch.rand(2, 8)
    for dtype in (torch.bfloat16, torch.float32):
        mixed = fused.token_mix(x.float(), last, mu, dtype=dtype, fused=fuse)
        assert [y.dtype for y in mixed] == [dtype] * 2
        heads = [torch.randn(1, 4, 2, 4) for _ in range(4)]
        args = (*heads, torch.randn(1, 4, 8), torch.randn(2, 4), GroupNorm(2, (4,)))
        assert fused.wkv_output(*args, dtype=dtype, fused=fuse).dtype == dtype
    own = mu.dtype if fuse else x.dtype  # autocast's weights stay wide
    assert fused.token_mix(x, last, mu, fused=fuse)[0].dtype == own


def test_rows_are_cut_into_a_piece_a_thread(monkeypatch):
    """No row is left out or taken twice, and each piece has an accumulator of its own."""
    found = []
    monkeypatch.setattr(fused, "run_pieces", lambda kernel, calls, count: found.append(calls))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for num_rows in (200, 100, 1):
        fused._spread("token_mix_backward", num_rows, "x", numbered=True)
    assert found[0] == [("x", 0, 0, 66), ("x", 1, 66, 133), ("x", 2, 133, 200)]
    assert found[1:] == [[("x", 0, 0, 100)], [("x", 0, 0, 1)]]


SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -1e-40, 0.0, 1.0, -2.0])


def narrow(*shape):
    return torch.randn(shape).bfloat16()


def test_bfloat16_is_rounded_as_torch_rounds():
    x = torch.randn(2, 70, 24) * torch.logspace(-38, 38, 24)
    x[0, 3, :8], x[1, 5, 8:16] = SPECIAL, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8] * 4)  # ties
    args = (x, torch.zeros(2, 24), torch.zeros(2, 24))  # mu 0 gives x, but for what is not finite
    wide = fused.token_mix(*args, fused=True)
    for y, expected in zip(
        fused.token_mix(*args, dtype=torch.bfloat16, fused=True), wide, strict=True
    ):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_kernels_on_bfloat16_give_what_they_give_on_float32():
    projections = [narrow(2, 70, 24) for _ in range(6)]
    vectors = [torch.randn(24) for _ in range(5)]
    widened = [p.float() for p in projections]
    for y, expected in zip(
        fused.wkv_inputs(*projections, *vectors, head_size=8, fused=True),
        fused.wkv_inputs(*widened, *vectors, head_size=8, fused=True),
        strict=True,
    ):
        assert y.dtype == torch.float32
        assert relative_error(y, expected) < TOLERANCE[torch.float32]

    norm, r_k = GroupNorm(3, (8,)), torch.randn(3, 8)
    heads, g = [narrow(2, 70, 3, 8) for _ in range(4)], narrow(2, 70, 24)
    y = fused.wkv_output(*heads, g, r_k, norm, dtype=torch.bfloat16, fused=True)
    wide = (t.float() for t in (*heads, g))
    expected = fused.wkv_output(*wide, r_k, norm, dtype=torch.float32, fused=True)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]


def test_relu_squared_on_bfloat16_is_torch_s_bit_by_bit():
    h, grad = narrow(2, 70, 24), narrow(2, 70, 24)
    h[0, 0, :8] = grad[0, 1, :8] = SPECIAL.bfloat16()
    h[0, 2, :8], grad[0, 2, :8] = 0, SPECIAL.bfloat16()  # 0 stays 0 whatever comes
    h[0, 0, 3] = grad[0, 1, 3] = 1e18  # twice 3e38 overflows or not as the order has it
    expected = h.clone().requires_grad_()
    h.requires_grad_()
    y, other = fused.relu_squared(h, fused=True), fused.relu_squared(expected)
    torch.testing.assert_close(y, other, rtol=0, atol=0, equal_nan=True)
    y.backward(grad)
    other.backward(grad)
    torch.testing.assert_close(h.grad, expected.grad, rtol=0, atol=0, equal_nan=True)


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.randn(1, 4, 8)
    last, mu = torch.randn(1, 8), torch.rand(2, 8)
    norm = GroupNorm(2, (4,))
    heads = x.view(1, 4, 2, 4)
    functions = [
        lambda s: fused.relu_squared(x * s, fused=True),
        lambda s: fused.unit(heads * s, fused=True),
        lambda s: fused.token_mix(x * s, last, mu, fused=True)[0],
        lambda s: fused.norm_product([heads * s], [norm], x, fused=True),
        lambda s: fused.wkv_output(
            heads * s, heads, heads, heads, x, mu[:, :4], norm, dtype=x.dtype, fused=True
        ),
        lambda s: fused.wkv_inputs(
            x, x, x * s, x, None, None, *[last[0]] * 2, None, *mu, head_size=4, fused=True
        )[0],
    ]
    for function in functions:
        s = torch.ones((), requires_grad=True)
        (gradient,) = torch.autograd.grad(function(s).square().sum(), s, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
