"""One template: every backend against ops/reference.py, on outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from metastate import ops
from metastate.errors import ConfigError, ShapeError
from tolerance import TOLERANCE, relative_error

# Interpreted GPU kernels are slow: tests/ops/test_triton.py runs the template at their sizes. fla
# runs on GPUs only: tests/ops/test_fla_backend.py.
BACKENDS = [b for b in ops.BACKENDS if b not in ("auto", "reference", "triton", "fla")]
NAMES = ("r", "log_w", "k", "v", "kappa", "a")


def make(batch, length, heads, size, dtype=torch.float64, sequences=None):
    """Draw op inputs of realistic scale, plus x for the reader and both initial states."""
    shape = (batch, length, heads, size)
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name in (*NAMES, "x")}
    inputs["log_w"] = -0.6065 * torch.sigmoid(2 * inputs["log_w"])
    inputs["k"] = inputs["k"] * size**-0.5
    inputs["kappa"] = F.normalize(inputs["kappa"], dim=-1)
    inputs["a"] = torch.sigmoid(inputs["a"])
    for name in ("state", "meta"):
        inputs[name] = torch.randn(sequences or batch, heads, size, size, dtype=torch.float64)
    for name in inputs:
        if name not in ("state", "meta"):
            inputs[name] = inputs[name].to(dtype)
        elif dtype != torch.float64:
            inputs[name] = inputs[name].float()
    return inputs


def layer(inputs, cu_seqlens, backend, update, by):
    """Run WKV, a second reader and the meta recurrence; return every output by name."""
    y, trajectory = ops.wkv7_trajectory(
        *(inputs[n] for n in NAMES), inputs["state"], cu_seqlens=cu_seqlens, backend=backend
    )
    e = trajectory.read(inputs["x"], by=by)
    e = F.normalize(e, dim=-1)
    z, meta = ops.meta_state(
        inputs["x"], e, None, trajectory, inputs["meta"], update=update, backend=backend
    )
    return {"y": y, "e": e, "z": z, "state": trajectory.state, "meta": meta}


def outputs_and_gradients(inputs, weights, cu_seqlens, backend, update, by):
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    out = layer(leaves, cu_seqlens, backend, update, by)
    loss = sum((out[n] * weights[n].to(out[n].dtype)).sum() for n in out)
    loss.backward()
    return out | {f"d{n}": x.grad for n, x in leaves.items()}


def check(
    backend,
    batch,
    length,
    heads,
    size,
    *,
    dtype,
    lengths=None,
    update="delta",
    by="key",
    device="cpu",
):
    cu_seqlens = None
    if lengths:
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    inputs = make(batch, length, heads, size, dtype, len(lengths) if lengths else None)
    inputs = {n: x.to(device) for n, x in inputs.items()}
    exact = {n: x.double() for n, x in inputs.items()}
    probe = layer(exact, cu_seqlens, "reference", update, by)
    weights = {n: torch.randn_like(x) for n, x in probe.items()}
    expected = outputs_and_gradients(exact, weights, cu_seqlens, "reference", update, by)
    found = outputs_and_gradients(inputs, weights, cu_seqlens, backend, update, by)
    for name in probe:
        own = inputs["state"].dtype if name in ("state", "meta") else dtype
        assert found[name].dtype == own, name
    for name, value in expected.items():
        error = relative_error(found[name], value)
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 1000])
def test_lengths(backend, length):
    check(backend, 2, length, 2, 16, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 3, 16, 32, 63, 64, 128, 256])
def test_head_sizes(backend, size):
    check(backend, 1, 20, 1, size, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update", ["delta", "input", "self"])
@pytest.mark.parametrize("by", ["key", "value"])
def test_updates_and_readers(backend, update, by):
    check(backend, 2, 70, 3, 16, dtype=torch.float64, update=update, by=by)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[140], [1, 1, 138], [3, 67, 64, 6], [65, 1, 74]])
def test_packed_documents(backend, lengths):
    check(backend, 2, 70, 2, 16, dtype=torch.float64, lengths=lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_memory_of_packed_documents(backend):
    check(backend, 2, 70, 2, 16, dtype=torch.float64, lengths=[3, 67, 64, 6], update="input")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_strongest_decay_of_a_model_in_float32(backend):
    inputs = make(1, 300, 1, 16, torch.float32)
    args = [torch.full_like(x, -0.6065) if n == "log_w" else x for n, x in inputs.items()][:6]
    y, state = ops.wkv7(*args, inputs["state"], backend=backend)
    exact = [x.double() for x in (*args, inputs["state"])]
    expected, final = ops.wkv7(*exact, backend="reference")
    assert relative_error(y, expected) < TOLERANCE[torch.float32]
    assert relative_error(state, final) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_alone_has_a_gradient(backend, length):
    """As where a first state is tuned and no weight is: nothing else asks for one."""
    inputs = make(1, length, 2, 16)
    found = []
    for name in ("reference", backend):
        state = inputs["state"].clone().requires_grad_()
        y, final = ops.wkv7(*(inputs[n] for n in NAMES), state, backend=name)
        found += torch.autograd.grad(y.sin().sum() + final.sin().sum(), state)
    assert relative_error(found[1], found[0]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_inputs_say_what_states_are_computed_in_whatever_is_given(backend, length, given):
    inputs = make(1, length, 2, 16, torch.float32)
    args, x, state = [inputs[n] for n in NAMES], inputs["x"], inputs["state"].to(given)
    found = []
    for start in (state, state.float()):
        _, trajectory = ops.wkv7_trajectory(*args, start, backend=backend)
        y, meta = trajectory.recur(x, x, x, start)
        z, other = ops.meta_state(x, x, None, trajectory, start, update="input", backend=backend)
        assert all(t.dtype == torch.float32 for t in (trajectory.state, y, meta, z, other))
        found.append([trajectory.state, y, meta, z, other])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for update in ("input", "delta"):
        e = x.bfloat16()
        z, _ = ops.meta_state(x, e, None, trajectory, update=update, backend=backend)
        assert z.dtype == torch.bfloat16
    args[2] = args[2].double()
    assert ops.wkv7(*args, backend=backend)[1].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 64])
def test_coarse_dtypes(backend, dtype, size):
    check(backend, 2, 100, 2, size, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("cut", [1, 37, 64, 99])
def test_split_equals_whole(backend, cut):
    inputs = make(2, 100, 2, 16)
    args = [inputs[n] for n in NAMES]
    y, state = ops.wkv7(*args, inputs["state"], backend=backend)
    y_1, middle = ops.wkv7(*(x[:, :cut] for x in args), inputs["state"], backend=backend)
    y_2, end = ops.wkv7(*(x[:, cut:] for x in args), middle, backend=backend)
    assert relative_error(torch.cat([y_1, y_2], 1), y) < TOLERANCE[torch.float64]
    assert relative_error(end, state) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_documents_equal_separate_runs(backend):
    lengths = [7, 65, 28]
    inputs = make(1, 100, 2, 16, sequences=3)
    args = [inputs[n] for n in NAMES]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, state = ops.wkv7(*args, inputs["state"], cu_seqlens=cu_seqlens, backend=backend)
    for i, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        alone, last = ops.wkv7(
            *(x[:, start:end] for x in args), inputs["state"][i : i + 1], backend=backend
        )
        assert relative_error(y[:, start:end], alone) < TOLERANCE[torch.float64]
        assert relative_error(state[i : i + 1], last) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_inputs_are_not_changed(backend):
    inputs = make(1, 20, 1, 16)
    before = {n: x.clone() for n, x in inputs.items()}
    layer(inputs, None, backend, "delta", "key")
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_inputs(backend):
    inputs = make(2, 30, 2, 16)
    args = [inputs[n] for n in NAMES]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]
    y, _ = ops.wkv7(*args, backend=backend)
    assert relative_error(ops.wkv7(*strided, backend=backend)[0], y) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    inputs = make(1, 10, 1, 16)
    inputs["v"][0, 4, 0, 3] = float("nan")
    y, _ = ops.wkv7(*(inputs[n] for n in NAMES), backend=backend)
    assert y[0, 4:].isnan().any(-1).all()


def test_wrong_arguments_are_named():
    inputs = make(1, 10, 1, 16)
    args = [inputs[n] for n in NAMES]
    with pytest.raises(ShapeError, match=r"k is \[1, 9, 1, 16\]"):
        ops.wkv7(*args[:2], args[2][:, :9], *args[3:])
    with pytest.raises(ShapeError, match=r"r must be \[B, T, H, N\]; got \[1, 0, 1, 16\]"):
        ops.wkv7(*[x[:, :0] for x in args])
    with pytest.raises(ShapeError, match="state is"):
        ops.wkv7(*args, inputs["state"][:, :, :8])
    with pytest.raises(ShapeError, match="int64"):
        ops.wkv7(*[x.long() for x in args])
    with pytest.raises(ShapeError, match="cu_seqlens must rise"):
        ops.wkv7(*args, cu_seqlens=torch.tensor([0, 5, 5, 10]))
    with pytest.raises(ShapeError, match="from 0 to B . T = 10; it runs from 1 to 10"):
        ops.wkv7(*args, cu_seqlens=torch.tensor([1, 10]))
    with pytest.raises(ShapeError, match="cu_seqlens must be int64"):
        ops.wkv7(*args, cu_seqlens=torch.tensor([0, 10], dtype=torch.int32))
    with pytest.raises(ShapeError, match="k is on meta, but r on cpu"):
        ops.wkv7(*args[:2], args[2].to("meta"), *args[3:])
    with pytest.raises(ConfigError, match="allowed: auto, reference"):
        ops.wkv7(*args, backend="gpu")
    _, trajectory = ops.wkv7_trajectory(*args)
    with pytest.raises(ConfigError, match="allowed: auto, reference"):
        ops.meta_state(inputs["x"], inputs["x"], None, trajectory, backend="gpu")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_states_and_offsets_that_kernels_could_not_address_are_refused(backend):
    inputs = make(1, 10, 1, 16, torch.float32)
    args, state = [inputs[n] for n in NAMES], inputs["state"]
    for wrong, message in [
        (state.to("meta"), "state is on meta, but the inputs on cpu"),
        (state.bool(), "state is torch.bool; a floating-point"),
        (state.long(), "state is torch.int64"),
        (state.to(torch.complex64), "state is torch.complex64"),
    ]:
        with pytest.raises(ShapeError, match=message):
            ops.wkv7(*args, wrong, backend=backend)
    offsets = torch.tensor([[0, 9], [4, 9], [10, 9]])[:, 0]
    with pytest.raises(ShapeError, match="cu_seqlens is on meta, the inputs on cpu"):
        ops.wkv7(*args, cu_seqlens=offsets.to("meta"), backend=backend)
    found = ops.wkv7(*args, cu_seqlens=offsets, backend=backend)
    expected = ops.wkv7(*args, cu_seqlens=offsets.contiguous(), backend="reference")
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [1, 10])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_readers_must_have_the_shape_of_their_pass(backend, length):
    inputs = make(1, length, 2, 16, torch.float32)
    _, trajectory = ops.wkv7_trajectory(*(inputs[n] for n in NAMES), backend=backend)
    x, state = inputs["x"], inputs["state"]
    pass_shape = rf"but the trajectory is \[1, {length}, 2, 16\]"
    for other in (torch.cat([x, x], 1), x[:, :, :1], x[..., :8], torch.cat([x, x])):
        with pytest.raises(ShapeError, match=pass_shape):
            trajectory.read(other)
        with pytest.raises(ShapeError, match=pass_shape):
            trajectory.recur(other, other, other, state)
        for update in ("self", "input", "delta"):
            with pytest.raises(ShapeError, match=pass_shape):
                ops.meta_state(other, other, None, trajectory, update=update, backend=backend)
    with pytest.raises(ShapeError, match="state is"):
        trajectory.recur(x, x, x, state[:, :1])
    with pytest.raises(ConfigError, match="allowed: 'key', 'value'"):
        trajectory.read(x, by="row")
