"""The doctor finds what has been wrong elsewhere, and finds nothing where nothing is."""

import dataclasses
import json

import pytest
import torch

from metastate import ops
from metastate.eval import doctor
from metastate.model.decode import NativeDecoder
from metastate.model.presets import preset
from metastate.ops import chunked, cpu, fused
from tolerance import TOLERANCE

CPU = [torch.device("cpu")]
ALL_CASES = doctor.CASES
F32 = torch.float32


@pytest.fixture(autouse=True)
def _small_cases(monkeypatch):
    cases = (
        doctor.Case("plain", 2, 5, 2, 16),
        doctor.Case("packed", 2, 6, 1, 16, F32, (1, 7, 4), "input", "value"),
        doctor.Case("coarse", 1, 5, 1, 16, torch.bfloat16),
    )
    monkeypatch.setattr(doctor, "CASES", cases)
    monkeypatch.setattr(doctor, "speeds", lambda names, device: dict.fromkeys(names, 1.0))


@pytest.fixture
def _models(monkeypatch):
    """A whole model alone, with M and without."""
    cases = (
        doctor.Case("model", 2, 9, 2, 16, layers=2),
        doctor.Case("model with M", 2, 9, 2, 16, layers=2, readout="both"),
    )
    monkeypatch.setattr(doctor, "CASES", cases)


@pytest.fixture
def _kinds(monkeypatch):
    """Models of every kind that doctor's own cases have, small."""
    monkeypatch.setattr(
        doctor,
        "CASES",
        tuple(dataclasses.replace(c, length=9) for c in ALL_CASES if c.layers),
    )


def entry(report, name):
    return next(b for b in report["backends"] if b["name"] == name)


def test_a_healthy_machine():
    seen = []
    report = doctor.diagnose(CPU, progress=lambda done, total, **_: seen.append((done, total)))
    assert report["ok"] and "OK |" in report["verdict"] and "\n" not in report["verdict"]
    for name in ("chunked", "cpu"):
        found = entry(report, name)
        assert found["right"] and 0 < found["worst_error"] < TOLERANCE[F32]
        assert found["checks"] == 8 and found["us_per_token"] == 1.0
    assert [b["name"] for b in report["backends"] if b["auto"]] == ["cpu"]
    assert "GPU" in entry(report, "triton")["why_not"]
    assert "fla" in entry(report, "fla")["why_not"]
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1
    assert json.loads(json.dumps(report)) == report
    assert doctor.doctor_table(report).endswith(report["verdict"])


def test_every_gradient_is_compared():
    case = doctor.CASES[0]
    x = {n: t.float() for n, t in case.inputs().items()}
    found = doctor.values("wkv7_trajectory, read, meta_state", x, case, "chunked")
    assert {f"d{n}" for n in (*doctor.NAMES, "x", "state", "meta")} < found.keys()
    assert {"y", "e", "z", "state", "meta"} < found.keys()


def test_the_allowed_errors_are_the_tests_own():
    assert all(TOLERANCE[dtype] == allowed for dtype, allowed in doctor.ALLOWED.items())


class _WrongGradient(torch.autograd.Function):
    """The identity; half a percent is missing of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.995


def test_a_wrong_gradient(monkeypatch):
    plain = chunked.wkv7
    monkeypatch.setattr(
        chunked, "wkv7", lambda r, w, k, *rest: plain(r, w, _WrongGradient.apply(k), *rest)
    )
    report = doctor.diagnose(CPU)
    failures = entry(report, "chunked")["failures"]
    assert {row["what"] for row in failures} == {"dk"}
    assert all(4e-3 < row["error"] < 6e-3 for row in failures)
    assert report["ok"]  # nobody is given this backend who does not ask for it
    assert "OK, but a backend is wrong" in report["verdict"]
    assert "chunked on cpu WRONG: dk off by 5e-03" in report["verdict"]
    assert entry(report, "chunked")["us_per_token"] is None


def test_an_argument_swallowed_by_kwargs(monkeypatch):
    """`cu_seqlens` falls into **kwargs: documents run into each other."""
    plain = chunked.wkv7

    def swallowing(r, log_w, k, v, kappa, a, state, *_, **kwargs):
        return plain(r, log_w, k, v, kappa, a, state[: r.shape[0]], None)

    monkeypatch.setattr(chunked, "wkv7", swallowing)
    failures = entry(doctor.diagnose(CPU), "chunked")["failures"]
    assert failures and {row["case"] for row in failures} == {"packed"}


def test_an_initial_state_that_is_ignored(monkeypatch):
    plain = chunked.wkv7
    monkeypatch.setattr(
        chunked, "wkv7", lambda *args: plain(*args[:6], torch.zeros_like(args[6]), args[7])
    )
    assert len(entry(doctor.diagnose(CPU), "chunked")["failures"]) == 8


def test_entry_points_that_scale_differently(monkeypatch):
    """One of two entry points divides by sqrt(N), as a default elsewhere does."""
    plain = cpu.wkv7_without_trajectory

    def scaled(r, *rest):
        return plain(r * r.shape[-1] ** -0.5, *rest)

    monkeypatch.setattr(cpu, "wkv7_without_trajectory", scaled)
    report = doctor.diagnose(CPU)
    failures = entry(report, "cpu")["failures"]
    assert "wkv7" in {row["path"] for row in failures}
    assert not report["ok"] and "doctor: WRONG |" in report["verdict"]
    assert "cpu (auto) on cpu WRONG" in report["verdict"]


def test_decoding_that_differs_from_training(monkeypatch):
    plain = cpu.wkv7_step
    monkeypatch.setattr(cpu, "wkv7_step", lambda r, *rest: plain(r * 1.001, *rest))
    failures = entry(doctor.diagnose(CPU), "cpu")["failures"]
    assert {row["path"] for row in failures} == {"one token"}


def test_a_meta_state_that_forgets_to_normalise(monkeypatch):
    monkeypatch.setattr(fused, "_Unit", type("_Wrong", (), {"apply": staticmethod(lambda x: x)}))
    failures = entry(doctor.diagnose(CPU), "cpu")["failures"]
    assert failures and "wkv7" not in {row["path"] for row in failures}


@pytest.mark.usefixtures("_models")
def test_a_whole_model_is_trained_and_decodes():
    report = doctor.diagnose(CPU)
    assert report["ok"], report["verdict"]
    for name in ("chunked", "cpu"):
        assert entry(report, name)["checks"] == 2
        assert entry(report, name)["worst_error"] < TOLERANCE[F32] / 2  # not by a hair
    case, like = doctor.CASES[1], torch.empty(0)
    found = doctor.through_model(like, case, "cpu")
    assert found.keys() == {"loss", "decoded logits"} | {
        f"gradient of {name}" for name, _ in case.model().named_parameters()
    }
    assert all(x.count_nonzero() for x in found.values())


FUSED = ("_TokenMix", "_WkvInputs", "_WkvOutput", "_NormProduct", "_Unit")


@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize("name", FUSED)
def test_a_wrong_gradient_of_native_elementwise_work(name, monkeypatch):
    function = getattr(fused, name)
    plain = function.backward

    def wrong(ctx, *grads):
        out = plain(ctx, *grads)
        scaled = [
            0.995 * x if torch.is_tensor(x) else x for x in (out if name != "_Unit" else [out])
        ]
        return tuple(scaled) if name != "_Unit" else scaled[0]

    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    report = doctor.diagnose(CPU)
    assert not report["ok"] and "doctor: WRONG |" in report["verdict"]
    failures = entry(report, "cpu")["failures"]
    # Only M's update takes a unit vector.
    assert {row["case"] for row in failures} == {"model", "model with M"} - (
        {"model"} if name == "_Unit" else set()
    )
    assert all(row["what"].startswith("gradient of ") for row in failures)
    assert entry(report, "chunked")["right"]


@pytest.mark.usefixtures("_models")
def test_a_native_decoder_that_is_wrong(monkeypatch):
    plain = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, tokens: plain(self, tokens) * 1.001)
    report = doctor.diagnose(CPU)
    assert not report["ok"]
    assert {row["what"] for row in entry(report, "cpu")["failures"]} == {"decoded logits"}


def test_models_are_of_the_kinds_that_people_decode():
    """The presets' own options among them, and matrices stored in bfloat16."""
    cases = [c for c in ALL_CASES if c.layers]
    for name in ("metastate-tiny", "rwkv7-tiny"):
        kinds = [
            (
                *(c.architecture, c.ffn_order, c.memory_heads, c.meta_state),
                c.memory_layer == c.num_layers - 1,
            )
            for c in (preset(name), *(case.model().config for case in cases))
        ]
        assert kinds[0] in kinds[1:]
    assert {c.ffn_order for c in cases if c.dtype == torch.bfloat16} == {"after"}


@pytest.mark.usefixtures("_kinds")
def test_models_of_every_kind_decode_rightly():
    report = doctor.diagnose(CPU)
    assert report["ok"], report["verdict"]
    assert entry(report, "cpu")["checks"] == entry(report, "chunked")["checks"] == 4


def _third_norm(block, dtype, rows):
    if block.ln3 is not None:
        rows[-1]["ln2_weight"] = 2 * rows[-1]["ln2_weight"] + 1


def _keys_in_bfloat16(block, dtype, rows):
    if dtype == torch.bfloat16:
        rows[0]["key"] = torch.zeros_like(rows[0]["key"])


def _recurrence_of_rwkv7(block, dtype, rows):
    if block.meta_state is None:
        rows[0]["w0"] = rows[0]["w0"] + 1


@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (_third_norm, {"two layers", "two layers stored in bfloat16"}),
        (_keys_in_bfloat16, {"two layers stored in bfloat16"}),
        (_recurrence_of_rwkv7, {"RWKV-7"}),
    ],
)
def test_a_native_decoder_that_is_wrong_for_one_kind_of_model(fault, found, monkeypatch):
    plain = NativeDecoder._layers

    def wrong(self, block, state, dtype):
        rows = plain(self, block, state, dtype)
        fault(block, dtype, rows)
        return rows

    monkeypatch.setattr(NativeDecoder, "_layers", wrong)
    report = doctor.diagnose(CPU)
    assert not report["ok"] and "WRONG: decoded logits off by" in report["verdict"]
    failures = entry(report, "cpu")["failures"]
    assert {row["case"] for row in failures} == found
    assert {row["what"] for row in failures} == {"decoded logits"}


def test_a_query_of_its_own_reaches_the_meta_state(monkeypatch):
    cases = (doctor.Case("asked", 1, 5, 1, 16, query=True), doctor.Case("unasked", 1, 5, 1, 16))
    monkeypatch.setattr(doctor, "CASES", cases)
    path = "wkv7_trajectory, read, meta_state"
    found = [doctor.values(path, c.inputs(), c, "reference") for c in cases]
    assert "dq" in found[0] and "dq" not in found[1]
    plain = ops.meta_state
    monkeypatch.setattr(
        ops,
        "meta_state",
        lambda x, e, q, *rest, backend, **named: plain(
            x, e, q if backend == "reference" else None, *rest, backend=backend, **named
        ),
    )
    failures = entry(doctor.diagnose(CPU), "cpu")["failures"]
    assert failures and {row["case"] for row in failures} == {"asked"}


def test_a_kernel_that_crashes_or_gives_nan(monkeypatch):
    def crash(*args):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(cpu, "wkv7_without_trajectory", crash)
    plain = chunked.wkv7

    def nan(*args):
        y, trajectory = plain(*args)
        return y * float("nan"), trajectory

    monkeypatch.setattr(chunked, "wkv7", nan)
    report = doctor.diagnose(CPU)
    assert not report["ok"]
    messages = [row["message"] for row in entry(report, "cpu")["failures"]]
    assert "raised RuntimeError: no kernel image is available" in messages
    assert entry(report, "chunked")["worst_error"] == float("inf")
    assert "no kernel image" in doctor.doctor_table(report)


def test_a_backend_whose_package_is_broken(monkeypatch):
    def resolve(backend, device):
        if backend == "triton":
            raise ImportError("libcuda.so.1 not found")
        return plain(backend, device)

    plain = ops.resolve_backend
    monkeypatch.setattr(ops, "resolve_backend", resolve)
    assert doctor.why_not("triton", torch.device("meta")) == "libcuda.so.1 not found"


def test_inputs_do_not_touch_the_callers_random_numbers():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    doctor.diagnose(CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_a_gpu(monkeypatch):
    monkeypatch.undo()
    report = doctor.diagnose([d for d in doctor.devices_here() if d.type == "cuda"])
    assert report["ok"], report["verdict"]
