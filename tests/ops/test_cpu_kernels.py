"""What is the native kernels' own: links, threads, forks, caching, custom ops."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from metastate import ops
from metastate.ops import cpu, jit, threads
from tolerance import TOLERANCE, relative_error

NAMES = ("r", "log_w", "k", "v", "kappa", "a")


@pytest.fixture(autouse=True)
def _threads_even_for_little_work(monkeypatch):
    monkeypatch.setattr(cpu, "GRAIN", 1)


def make(batch=2, length=37, heads=3, size=16, dtype=torch.float64, decay=-0.6065):
    shape = (batch, length, heads, size)
    r, log_w, k, v, kappa, a = (torch.randn(shape, dtype=dtype) for _ in NAMES)
    log_w = decay * torch.sigmoid(log_w)
    kappa = F.normalize(kappa, dim=-1)
    state = torch.randn(batch, heads, size, size, dtype=dtype)
    return [r, log_w, k * size**-0.5, v, kappa, torch.sigmoid(a), state]


def leaves(inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


def both(function, inputs):
    """Return outputs and gradients of `function(backend, *inputs)` for reference and cpu."""
    found = []
    for backend in ("reference", "cpu"):
        given = leaves(inputs)
        out = function(backend, *given)
        loss = sum((x * torch.arange(x.numel()).view(x.shape).sin()).sum() for x in out)
        found.append([*out, *torch.autograd.grad(loss, given)])
    return zip(*found, strict=True)


def assert_same(pairs, dtype=torch.float64):
    for i, (expected, x) in enumerate(pairs):
        assert relative_error(x, expected) < TOLERANCE[dtype], i


@pytest.mark.parametrize("by", [("key", "value"), ("value", "key"), ("key", "key")])
def test_a_second_reader_gets_its_own_gradient(by):
    def function(backend, x_1, x_2, *inputs):
        y, trajectory = ops.wkv7_trajectory(*inputs, backend=backend)
        reads = [trajectory.read(x, by=b) for x, b in zip((x_1, x_2), by, strict=True)]
        return [y, *reads, trajectory.state]

    inputs = make()
    assert_same(both(function, [torch.randn_like(inputs[0]), torch.randn_like(inputs[0]), *inputs]))


@pytest.mark.parametrize("only", ["y", "e", "state"])
def test_each_output_alone_has_gradients(only):
    def function(backend, x, *inputs):
        y, trajectory = ops.wkv7_trajectory(*inputs, backend=backend)
        e = trajectory.read(x)
        zero = 0 * x.sum() + 0 * inputs[0].sum()  # every input takes part
        return [{"y": y, "e": e, "state": trajectory.state}[only] + zero]

    inputs = make()
    assert_same(both(function, [torch.randn_like(inputs[0]), *inputs]))


@pytest.mark.parametrize("decay", [-5.0, -40.0])
def test_decay_far_beyond_the_models_is_exact(decay):
    """Nothing divides by w, so decays that the chunked form cannot hold lose no digit."""

    def function(backend, x, *inputs):
        y, trajectory = ops.wkv7_trajectory(*inputs, backend=backend)
        return [y, trajectory.read(x), trajectory.state]

    inputs = make(decay=decay)
    assert_same(both(function, [torch.randn_like(inputs[0]), *inputs]))


@pytest.mark.parametrize("heads, size", [(3, 16), (1, 64), (2, 128)])
def test_bits_do_not_depend_on_threads(heads, size):
    inputs = make(1, 40, heads, size, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            given = leaves(inputs)
            y, trajectory = ops.wkv7_trajectory(*given, backend="cpu")
            e = trajectory.read(given[0])
            grads = torch.autograd.grad((y * e).sum() + trajectory.state.sum(), given)
            found.append([y, e, trajectory.state, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_several_callers_at_once():
    inputs = [make() for _ in range(8)]
    expected = [ops.wkv7(*x, backend="cpu")[0] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: ops.wkv7(*x, backend="cpu")[0], inputs))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _in_child(inputs, queue):
    seen = []
    threads.run_pieces(lambda i: seen.append(i), [(i,) for i in range(20)], 3)
    torch.set_num_threads(1)  # torch's own operators hang in a forked child with more
    queue.put((sorted(seen), ops.wkv7(*inputs, backend="cpu")[0].tolist()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_too():
    inputs = make()
    expected = ops.wkv7(*inputs, backend="cpu")[0]  # the parent's threads exist now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(inputs, queue))
    child.start()
    seen, found = queue.get(timeout=120)
    child.join(120)
    assert seen == list(range(20))
    assert torch.equal(torch.tensor(found, dtype=expected.dtype), expected)


@pytest.mark.parametrize("openmp", [True, False])
def test_pieces_all_run_and_errors_come_through(monkeypatch, openmp):
    if not openmp:
        monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    seen = []
    threads.run_pieces(lambda *args: seen.append(args), [(i, -i) for i in range(20)], 3)
    assert sorted(seen) == [(i, -i) for i in range(20)]

    def fail(i):
        if i == 7:
            raise ValueError("piece 7")

    with pytest.raises(ValueError, match="piece 7"):
        threads.run_pieces(fail, [(i,) for i in range(20)], 3)


def test_work_is_cut_by_tokens():
    offsets = torch.tensor([0, 1, 2, 1002, 1003]).numpy()
    cuts = cpu._cuts(offsets, 12, 8)
    assert cuts[0] == 0 and cuts[-1] == 4 * 12 and cuts == sorted(cuts)
    assert len(set(cuts)) == 9  # the one long document is shared by all


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_own_head_and_document(name):
    inputs = make(1, 40, 2, 16)
    inputs[-1] = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    i = NAMES.index(name)
    inputs[i][0, 5, 0, 3] = float("nan")
    given = leaves(inputs)
    cu_seqlens = torch.tensor([0, 20, 40])
    y, trajectory = ops.wkv7_trajectory(*given, cu_seqlens=cu_seqlens, backend="cpu")
    e = trajectory.read(given[0])
    grads = torch.autograd.grad(y.sum() + e.sum(), given[:6])
    assert y[0, 5, 0].isnan().any()
    assert y[:, :5].isfinite().all() and y[:, 20:].isfinite().all() and y[:, :, 1].isfinite().all()
    assert grads[i][:, 20:].isfinite().all() and grads[i][:, :, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_token_without_gradients(dtype):
    inputs = make(3, 1, 2, 24, torch.float32)
    inputs[:6] = [x.to(dtype) for x in inputs[:6]]
    x = torch.randn_like(inputs[0])
    y, trajectory = ops.wkv7_trajectory(*inputs, backend="cpu")
    expected, truth = ops.wkv7_trajectory(*[x.double() for x in inputs], backend="reference")
    assert y.dtype == dtype and trajectory.state.dtype == torch.float32
    assert_same([(expected, y), (truth.state, trajectory.state)], dtype)
    for by in ("key", "value"):
        assert_same([(truth.read(x.double(), by=by), trajectory.read(x, by=by))], dtype)


def test_expanded_and_transposed_inputs():
    inputs = make(4, 20, 3, 16)
    inputs[1] = inputs[1][:1].expand(4, -1, -1, -1)
    inputs[3] = inputs[3].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[6] = inputs[6].mT
    assert_same(both(lambda backend, *x: [ops.wkv7(*x, backend=backend)[0]], inputs), torch.float64)


def test_custom_ops_keep_their_promises():
    length = cpu.kernels.C + 2  # a length at which every place for a checkpoint is used
    *inputs, state = leaves(make(2, length, 2, 8, torch.float32))
    cu_seqlens = torch.tensor([0, length, 2 * length])
    torch.library.opcheck(cpu.wkv7_forward, (*inputs, state, cu_seqlens))
    _, _, w, u, checkpoints, *links = cpu.wkv7_forward(*inputs, state, cu_seqlens)
    kept = [x.detach() for x in (w, *inputs[2:], cu_seqlens, u, checkpoints)]
    for by_key in (True, False):
        args = (torch.randn_like(w, requires_grad=True), links, *kept, by_key)
        torch.library.opcheck(cpu.wkv7_read, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("by", ["key", "value"])
def test_compiles_into_one_graph(by):
    def layer(x, *inputs):
        y, trajectory = ops.wkv7_trajectory(*inputs, backend="cpu")
        e = trajectory.read(x, by=by)
        z, state = ops.meta_state(x, e, None, trajectory, backend="cpu")
        return y.sum() + (z * e).sum() + state.sum() + trajectory.state.sum()

    inputs = make()
    inputs = [torch.randn_like(inputs[0]), *inputs]
    plain, compiled = leaves(inputs), leaves(inputs)
    layer(*plain).backward()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(*compiled).backward()
    assert_same((a.grad, b.grad) for a, b in zip(plain, compiled, strict=True))


FORWARD = """
import numpy as np
import torch
from metastate import ops
from metastate.ops import cpu_kernels
x = [torch.rand(1, 3, 1, 8, requires_grad=True) for _ in range(6)]
y, trajectory = ops.wkv7_trajectory(*x, backend="cpu")
kernels = [cpu_kernels.forward_kernel(16, 16, True, np.float32)]
"""


REST = """
(y + trajectory.read(x[0])).sum().backward()
kernels += [cpu_kernels.backward_kernel(16, True, np.float32),
            cpu_kernels.read_kernel(16, True, np.float32)]
"""


HITS = """
print(*(sum(k.stats.cache_hits.values()) for k in kernels))
"""


CHANGED = """
from metastate.ops import jit
sources = jit._sources()
jit._sources = lambda: sources + "another file changed"
"""


def test_compiled_code_survives_the_process_and_no_change_of_the_sources(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    hits = [
        subprocess.run(
            [sys.executable, "-c", program + HITS], env=environment, capture_output=True, text=True
        ).stdout.split()
        for program in (FORWARD + REST, FORWARD + REST, CHANGED + FORWARD)
    ]
    assert hits == [["0", "0", "0"], ["1", "1", "1"], ["0"]]


@pytest.mark.parametrize("another", [False, True], ids=["nowhere-to-write", "another-numba"])
def test_kernels_compile_where_nothing_can_be_cached(monkeypatch, another):
    real = jit.nb.njit

    def njit(*args, **options):
        if options.get("cache"):
            if another:
                return lambda function: function  # which has no such attributes as are looked for
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(jit.nb, "njit", njit)
    compiled = jit.kernel(lambda x: x + 1)
    assert compiled(2) == 3
    assert compiled.signatures


def test_ctrl_c_is_not_lost_between_kernels(monkeypatch):
    """A KeyboardInterrupt raised where C calls Python, before any `try`, would be swallowed."""
    lost = []
    monkeypatch.setattr("sys.unraisablehook", lost.append)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for i in range(30):
            timer = threading.Timer(1e-3 * (1 + i % 7), os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                timer.start()
                for _ in range(100_000):
                    threads.run_pieces(lambda _: None, [(0,), (1,)], 2)
            timer.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not lost
