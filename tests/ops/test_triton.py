"""The GPU kernels against the float64 reference, interpreted on a CPU or on a GPU (`gpu`)."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_parity import NAMES, check, make

from metastate import ops
from metastate.config import MetaStateConfig
from metastate.errors import ConfigError
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.presets import preset
from tolerance import TOLERANCE, relative_error

pytest.importorskip("triton", reason="Triton has no wheel for this system")
triton = importlib.import_module("metastate.ops.triton")

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="the kernels are compiled here")
F64 = torch.float64


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks of few tokens: an interpreted program takes tens of milliseconds."""
    monkeypatch.setattr(triton, "CHUNK", 16)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every new tensor with NaN: what a kernel does not write must not be read."""
    plain_empty, plain_like, plain_new = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(make_empty):
        def made(*args, **kwargs):
            x = make_empty(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(plain_empty))
    monkeypatch.setattr(torch, "empty_like", poison(plain_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(plain_new))


@pytest.fixture
def tensor_cores(monkeypatch):
    """Round the factors of every product as a GPU does: TF32 has 10 bits, here cut off."""
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime import interpreter

    def coarse(x):
        return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def product(self, x, y, total, precision, _):
        assert precision in (INPUT_PRECISION.TF32, INPUT_PRECISION.TF32x3)
        a, b = coarse(x.data), coarse(y.data)
        out = a @ b
        if precision == INPUT_PRECISION.TF32x3:
            out = out + (a @ coarse(y.data - b) + coarse(x.data - a) @ b)
        return interpreter.TensorHandle(out + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


@interpreted
@pytest.mark.parametrize("length", [1, 15, 49])
def test_lengths(length, poisoned, short_chunks):
    check("triton", 1, length, 2, 16, dtype=F64)


@interpreted
@pytest.mark.parametrize("size", [3, 32, 80])
def test_head_sizes(size, poisoned):
    check("triton", 1, 20, 1, size, dtype=F64)


@interpreted
@pytest.mark.parametrize("update", ["input", "self"])
@pytest.mark.parametrize("by", ["key", "value"])
def test_updates_and_readers(update, by, short_chunks):
    check("triton", 1, 20, 1, 16, dtype=F64, update=update, by=by)


@interpreted
def test_packed_documents(poisoned, short_chunks):
    check("triton", 2, 27, 1, 16, dtype=F64, lengths=[1, 33, 16, 4])
    check("triton", 1, 20, 1, 16, dtype=F64, lengths=[3, 17], update="input")


@interpreted
def test_a_state_alone_has_a_gradient(short_chunks):
    inputs = make(1, 20, 1, 16)
    found = []
    for backend in ("reference", "triton"):
        state = inputs["state"].clone().requires_grad_()
        y, final = ops.wkv7(*(inputs[n] for n in NAMES), state, backend=backend)
        found += torch.autograd.grad(y.sin().sum() + final.sin().sum(), state)
    assert relative_error(found[1], found[0]) < TOLERANCE[F64]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_dtypes(dtype, tensor_cores):
    check("triton", 1, 64, 1, 64, dtype=dtype)


@interpreted
@pytest.mark.parametrize(
    ("dtypes", "half"),
    [
        ({"r": torch.bfloat16}, True),  # what autocast makes of a block's inputs
        ({}, False),
        ({"r": torch.float16, "v": F64}, False),
    ],
)
def test_every_pass_has_one_precision(dtypes, half, monkeypatch):
    """Forward, backward and readers, whichever input is of half precision."""
    seen, of = [], triton.Launch.of
    monkeypatch.setattr(triton.Launch, "of", lambda *args: seen.append(of(*args)) or seen[-1])
    inputs = make(1, 20, 1, 16, torch.float32)
    given = {n: x.to(dtypes.get(n, x.dtype)) for n, x in inputs.items()}
    found = []
    for backend in ("triton", "reference"):
        leaves = {
            n: (x if backend == "triton" else x.double()).detach().clone().requires_grad_()
            for n, x in given.items()
        }
        args = [leaves[n] for n in NAMES]
        y, trajectory = ops.wkv7_trajectory(*args, leaves["state"], backend=backend)
        out = [y, trajectory.read(leaves["x"]), trajectory.state]
        sum(x.double().sin().sum() for x in out).backward()
        found.append(out + [leaves[n].grad for n in (*NAMES, "state", "x")])
    assert {run.half for run in seen} == {half} and len(seen) > 5
    coarse = TOLERANCE[torch.bfloat16 if "r" in dtypes else torch.float32]
    assert all(relative_error(x, y) < coarse for x, y in zip(*found, strict=True))


@interpreted
def test_float16():
    inputs = make(1, 20, 1, 16, torch.float16)
    y, state = ops.wkv7(*(inputs[n] for n in NAMES), inputs["state"], backend="triton")
    expected, final = ops.wkv7(*(inputs[n].double() for n in NAMES), inputs["state"].double())
    assert y.dtype == torch.float16 and state.dtype == torch.float32
    assert relative_error(y, expected) < 1e-3
    assert relative_error(state, final) < TOLERANCE[torch.float32]


@interpreted
def test_one_token_without_gradients():
    inputs = make(3, 1, 2, 24, torch.bfloat16)
    args = [inputs[n] for n in NAMES]
    y, trajectory = ops.wkv7_trajectory(*args, inputs["state"], backend="triton")
    wide = [x.double() for x in args]
    expected, truth = ops.wkv7_trajectory(*wide, inputs["state"].double(), backend="reference")
    assert y.dtype == torch.bfloat16 and trajectory.kept is None
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(trajectory.state, truth.state) < TOLERANCE[torch.float32]
    for by in ("key", "value"):
        e = truth.read(inputs["x"].double(), by=by)
        assert relative_error(trajectory.read(inputs["x"], by=by), e) < TOLERANCE[torch.bfloat16]
    z, meta = ops.meta_state(inputs["x"], y, None, trajectory, update="self", backend="triton")
    assert z.shape == y.shape and meta.shape == trajectory.state.shape


@interpreted
@pytest.mark.parametrize("length", [1, 9])
def test_autocast_rounds_nothing(length):
    inputs = make(1, length, 1, 16, torch.float32)

    def run():
        args = [inputs[n] for n in (*NAMES, "state")]
        y, trajectory = ops.wkv7_trajectory(*args, backend="triton")
        return [y, trajectory.read(inputs["x"], by="value"), trajectory.read(inputs["x"])]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@interpreted
def test_split_equals_whole(short_chunks):
    inputs = make(1, 40, 1, 16)
    args = [inputs[n] for n in NAMES]
    y, state = ops.wkv7(*args, inputs["state"], backend="triton")
    y_1, middle = ops.wkv7(*(x[:, :19] for x in args), inputs["state"], backend="triton")
    y_2, end = ops.wkv7(*(x[:, 19:] for x in args), middle, backend="triton")
    assert relative_error(torch.cat([y_1, y_2], 1), y) < TOLERANCE[F64]
    assert relative_error(end, state) < TOLERANCE[F64]


@interpreted
def test_three_readers_and_each_output_alone(short_chunks):
    """The links serve one reader besides r; a third one makes the pass run again."""
    inputs = make(1, 20, 1, 16)

    def grads(backend, chosen):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
        args = [leaves[n] for n in NAMES]
        y, trajectory = ops.wkv7_trajectory(*args, leaves["state"], backend=backend)
        e = trajectory.read(leaves["x"], by="value")
        f = trajectory.read(leaves["x"] * 2) if chosen == "all" else e
        out = {"y": y, "e": e, "state": trajectory.state}
        used = [*out.values(), f] if chosen == "all" else [out[chosen]]
        sum(x.sin().sum() for x in used).backward()
        return {n: x.grad for n, x in leaves.items() if x.grad is not None and x.grad.any()}

    for chosen in ("all", "y", "e", "state"):
        expected, found = grads("reference", chosen), grads("triton", chosen)
        assert expected.keys() == found.keys()
        for name, x in expected.items():
            assert relative_error(found[name], x) < TOLERANCE[F64], (chosen, name)


@interpreted
def test_strided_inputs_stay_as_they_are():
    inputs = make(2, 20, 2, 16)
    args = [inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in NAMES]
    before = [x.clone() for x in args]
    y, _ = ops.wkv7(*args, inputs["state"].mT, backend="triton")
    expected, _ = ops.wkv7(*args, inputs["state"].mT, backend="reference")
    assert relative_error(y, expected) < TOLERANCE[F64]
    assert all(torch.equal(x, z) for x, z in zip(args, before, strict=True))


@interpreted
def test_a_removal_that_powers_of_A_would_lose(tensor_cores):
    """All removal keys equal, rate 1, hardly a decay: A^16 is of the order 10^8, T of 1."""
    inputs = make(1, 32, 1, 16, torch.float32)
    inputs["kappa"] = F.normalize(torch.ones_like(inputs["kappa"]), dim=-1)
    inputs["a"] = torch.full_like(inputs["a"], 1.0)
    inputs["log_w"] = torch.full_like(inputs["log_w"], -1e-4)
    args = [inputs[n] for n in NAMES]
    y, state = ops.wkv7(*args, inputs["state"], backend="triton")
    expected, final = ops.wkv7(*(x.double() for x in args), inputs["state"].double())
    assert relative_error(y, expected) < TOLERANCE[torch.float32]
    assert relative_error(state, final) < TOLERANCE[torch.float32]


@interpreted
def test_custom_ops_keep_their_promises():
    inputs = make(1, 34, 1, 16, torch.float32, sequences=2)
    args = [inputs[n].requires_grad_() for n in NAMES]
    # Lengths at which every slot for a chunk is used: free ones hold whatever was there.
    state, offsets = inputs["state"].requires_grad_(), torch.tensor([0, 17, 34])
    transition = [x.detach() for x in (args[1], *args[4:], state)]
    torch.library.opcheck(triton.geometry, (*transition, offsets, 16, False))
    inverse = triton.geometry(*transition, offsets, 16, False)
    tests = ("test_schema", "test_faketensor")
    given = (*args, state, offsets, inverse, False)
    torch.library.opcheck(triton.wkv7_forward, given, test_utils=tests)


@interpreted
def test_compiles_into_one_graph():
    def layer(x, *inputs):
        y, trajectory = ops.wkv7_trajectory(*inputs, backend="triton")
        e = trajectory.read(x)
        z, state = ops.meta_state(x, e, None, trajectory, backend="triton")
        return y.sum() + (z * e).sum() + state.sum() + trajectory.state.sum()

    inputs = make(1, 9, 1, 16)
    given = [inputs[n] for n in ("x", *NAMES, "state")]
    plain, compiled = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    layer(*plain).backward()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(plain, compiled, strict=True):
        assert relative_error(b.grad, a.grad) < TOLERANCE[F64]


@interpreted
@pytest.mark.parametrize("options", [{}, {"readout": "both", "query": "receptance"}])
def test_a_model_with_documents(options, short_chunks):
    """The default layer reads S a second time; with a meta state there is a second memory."""
    config = preset(
        "metastate-tiny",
        **{"vocab_size": 31, "hidden_size": 32, "num_heads": 2, "num_layers": 1},
        meta_state=MetaStateConfig(**options),
    )
    model = LanguageModel(config).double()
    for p in model.parameters():
        if not p.any():  # an output that starts at zero would hide its layer
            torch.nn.init.normal_(p, std=0.1)
    tokens, resets = torch.randint(31, (2, 19)), torch.rand(2, 19) < 0.1
    found = {}
    for model.backend in ("reference", "triton"):
        loss = lm_loss(model, tokens, tokens.roll(-1, 1), resets=resets).loss
        found[model.backend] = torch.autograd.grad(loss, tuple(model.parameters()))
    for a, b in zip(found["reference"], found["triton"], strict=True):
        assert relative_error(b, a) < 1e-9


def check_training_under_autocast(device, **fields):
    """Hold it to float32: the worst gradient is off by less than twice what `chunked` is."""
    model = LanguageModel(preset("metastate-150m", vocab_size=97, **fields)).to(device)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    tokens = torch.randint(97, (2, 19 if device == "cpu" else 300), device=device)
    resets = torch.rand(tokens.shape, device=device) < 0.05

    def gradients(backend, half):
        model.backend = backend
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = lm_loss(model, tokens, tokens.roll(-1, 1), resets=resets).loss
        return torch.autograd.grad(loss, tuple(model.parameters()))

    exact = gradients("chunked", half=False)
    found, allowed = (
        max(float((x - y).norm() / y.norm()) for x, y in zip(grads, exact, strict=True))
        for grads in (gradients("triton", half=True), gradients("chunked", half=True))
    )
    assert found < 2 * allowed < 0.5


@interpreted
def test_training_under_autocast(short_chunks):
    check_training_under_autocast("cpu", num_layers=1, hidden_size=32, num_heads=2)


def test_where_it_runs(monkeypatch):
    with pytest.raises(ConfigError, match="cannot run on meta"):
        ops.resolve_backend("triton", torch.device("meta"))
    assert ops.resolve_backend("auto", torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, expected in (((7, 5), "chunked"), ((8, 0), "triton"), ((9, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ops.resolve_backend("auto", torch.device("cuda")) == expected
    assert ops.resolve_backend("auto", torch.device("cuda"), 256) == "triton"
    assert ops.resolve_backend("auto", torch.device("cuda"), 257) == "chunked"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)  # as on an AMD GPU
        assert ops.resolve_backend("auto", torch.device("cuda")) == "chunked"
    monkeypatch.setattr(ops, "TRITON_FOUND", False)
    assert ops.resolve_backend("auto", torch.device("cuda")) == "chunked"
    with pytest.raises(ConfigError, match=r"pip install 'metastate\[cuda\]'"):
        ops.resolve_backend("triton", torch.device("cuda"))


def test_heads_that_no_kernel_takes(monkeypatch):
    monkeypatch.setattr(ops, "_runs_triton", lambda device: True)
    monkeypatch.setattr(ops, "NUMBA_FOUND", False)
    inputs = [make(1, 2, 1, 257)[n] for n in NAMES]
    ops.wkv7(*inputs)
    with pytest.raises(ConfigError, match="heads of 257 channels are too wide .* 256 at most"):
        ops.wkv7(*inputs, backend="triton")


@interpreted
def test_compiled_kernels_are_not_for_a_cpu(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        ops.wkv7(*(make(1, 2, 1, 16)[n] for n in NAMES), backend="triton")


def run_compiled(script, *arguments):
    """Run a script of this folder whose kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [64, 256])
def test_kernels_compile_for_gpus_that_are_not_here(capability, size):
    """Triton's compiler needs no device; shared memory must fit the smallest GPUs' 99 KiB.

    A thread's stack holds what its registers could not: it was 10 KB in a kernel of head size 64.
    """
    run_compiled("compile_kernels.py", str(capability), str(size))


@pytest.mark.slow
def test_another_batch_compiles_nothing_anew():
    """Nor do other documents, lengths and numbers of heads: a GPU would wait for seconds."""
    run_compiled("launch_kernels.py")


# On a GPU every dtype, head size and length of chunk is compiled, for seconds a kernel: here by one
# test each, which `make gpu` gives to processes of their own. 24, 64 and 128 are the doctor's, too.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 63, 192, 256])
def test_head_sizes_on_a_gpu(dtype, size):
    for by in ("key", "value"):
        check("triton", 2, 200, 2, size, dtype=dtype, by=by, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1, 5), (31, 32, 33, 1000)])
def test_lengths_on_a_gpu(lengths):
    for length in lengths:
        for update in ("delta", "input", "self"):
            check("triton", 2, length, 3, 64, dtype=torch.float32, update=update, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_on_a_gpu(dtype):
    for lengths in ([140], [1, 1, 138], [3, 67, 64, 6]):
        check("triton", 2, 70, 2, 64, dtype=dtype, lengths=lengths, device="cuda")


@pytest.mark.gpu
def test_training_under_autocast_on_a_gpu():
    check_training_under_autocast("cuda", num_layers=2)


@pytest.mark.gpu
def test_bits_repeat_on_a_gpu():
    inputs = {n: x.cuda() for n, x in make(2, 500, 3, 64, torch.bfloat16).items()}
    args = [inputs[n] for n in NAMES]
    first, state = ops.wkv7(*args, inputs["state"], backend="triton")
    for _ in range(20):
        again, other = ops.wkv7(*args, inputs["state"], backend="triton")
        assert torch.equal(first, again) and torch.equal(state, other)
