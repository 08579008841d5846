"""What is handed to flash-linear-attention, checked with a stand-in of its documented signature."""

import pytest
import torch
from test_parity import NAMES, check, layer, make

import fla_stand_in
from metastate import ops
from metastate.errors import ConfigError
from metastate.ops import fla
from tolerance import TOLERANCE, relative_error


@pytest.fixture
def stand_in(monkeypatch):
    return fla_stand_in.install(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [3, 17, 20]])
@pytest.mark.parametrize("update", ["delta", "input"])
def test_arguments_mean_the_same(stand_in, dtype, lengths, update):
    """Only bfloat16 comes in between, so the stand-in must agree with the reference."""
    sequences = len(lengths) if lengths else None
    inputs = make(2, 20, 2, 16, dtype, sequences)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if lengths else None
    found = layer(inputs, cu_seqlens, "fla", update, "key")
    exact = {n: x.double() for n, x in inputs.items()}
    expected = layer(exact, cu_seqlens, "reference", update, "key")
    for name, x in expected.items():
        assert found[name].dtype == (torch.float32 if name in ("state", "meta") else dtype)
        assert relative_error(found[name], x) < TOLERANCE[torch.bfloat16], name


def test_gradients_reach_every_input(stand_in):
    check("fla", 1, 12, 1, 16, dtype=torch.bfloat16)


def test_an_argument_that_would_be_swallowed_is_an_error(stand_in):
    def older(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, **kwargs):
        raise AssertionError("must not be called")

    stand_in.chunk_rwkv7 = older
    inputs = make(1, 3, 1, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match="no argument cu_seqlens"):
        ops.wkv7(*(inputs[n] for n in NAMES), backend="fla")


def test_a_version_without_the_hints_goes_without(stand_in):
    def older(
        r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        return torch.zeros_like(v), initial_state

    stand_in.chunk_rwkv7 = older
    inputs = make(1, 3, 1, 16, torch.bfloat16)
    assert ops.wkv7(*(inputs[n] for n in NAMES), backend="fla")[0].shape == (1, 3, 1, 16)


def test_reading_by_value_is_refused(stand_in):
    inputs = make(1, 3, 1, 16, torch.bfloat16)
    _, trajectory = ops.wkv7_trajectory(*(inputs[n] for n in NAMES), backend="fla")
    with pytest.raises(ConfigError, match="by key only"):
        trajectory.read(inputs["x"], by="value")


def test_missing_or_without_a_gpu(monkeypatch):
    find = fla.importlib.util.find_spec
    monkeypatch.setattr(
        fla.importlib.util, "find_spec", lambda name: None if name == "fla" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'metastate\[cuda\]'"):
        ops.resolve_backend("fla", torch.device("cpu"))
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="CUDA devices only, not on cpu"):
        ops.resolve_backend("fla", torch.device("cpu"))


@pytest.mark.gpu
def test_fla_itself(monkeypatch):
    """With the first form of each kernel: to compile and time all hundreds takes minutes."""
    pytest.importorskip("fla")
    from triton.runtime.autotuner import Autotuner

    all_forms = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda *args: all_forms(*args)[:1])
    for lengths in (None, [3, 67, 64, 6]):
        check("fla", 2, 70, 2, 64, dtype=torch.bfloat16, lengths=lengths, device="cuda")
