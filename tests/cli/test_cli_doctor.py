"""`doctor`, as a person runs it."""

import json

import pytest
import torch

from metastate.cli import main
from metastate.eval import doctor
from metastate.model.decode import NativeDecoder
from metastate.ops import cpu, fused


@pytest.fixture(autouse=True)
def _small_cases(monkeypatch):
    cases = (doctor.Case("plain", 1, 5, 1, 16), doctor.Case("coarse", 1, 5, 1, 16, torch.bfloat16))
    monkeypatch.setattr(doctor, "CASES", cases)
    monkeypatch.setattr(doctor, "TIMED_TOKENS", dict.fromkeys(("reference", "chunked", "cpu"), 4))


def test_a_table_and_a_verdict(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "cpu*" in out and "us/token" in out
    assert out.splitlines()[-1].startswith("metastate doctor: OK | ")
    assert "checks" in err


def test_json_and_the_exit_code_of_a_wrong_machine(capsys, monkeypatch):
    plain = cpu.wkv7
    nan = float("nan")
    monkeypatch.setattr(cpu, "wkv7", lambda r, *rest: plain(r * nan, *rest))
    assert main(["doctor", "--device", "cpu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and "WRONG" in report["verdict"]
    wrong = next(b for b in report["backends"] if b["name"] == "cpu")
    assert wrong["failures"][0]["error"] is None and wrong["us_per_token"] is None


def test_the_exit_code_of_wrong_training_and_of_wrong_decoding(capsys, monkeypatch):
    """Each fault alone, in code that the operations themselves do not run."""
    case = doctor.Case("model", 1, 5, 1, 16, layers=2)
    monkeypatch.setattr(doctor, "CASES", (*doctor.CASES, case))
    backward, step = fused._TokenMix.backward, NativeDecoder.step
    with monkeypatch.context() as patch:
        patch.setattr(
            fused._TokenMix,
            "backward",
            staticmethod(lambda ctx, *grads: (0.5 * (out := backward(ctx, *grads))[0], *out[1:])),
        )
        assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG: gradient of " in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(NativeDecoder, "step", lambda self, tokens: -step(self, tokens))
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG: decoded logits off by 2e+00" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [("abacus", "cannot be used"), ("hpu", "cannot be used"), ("meta", "only cpu")],
)
def test_a_device_that_is_not_here(capsys, given, said):
    assert main(["doctor", "--device", given]) == 2
    assert said in capsys.readouterr().err


def test_one_gpu_is_not_checked_in_the_place_of_another(capsys, monkeypatch):
    devices = [torch.device("cpu"), torch.device("cuda:0")]
    monkeypatch.setattr("metastate.cli.commands.devices_here", lambda: devices)
    assert main(["doctor", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err
