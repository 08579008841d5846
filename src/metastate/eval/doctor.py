"""Does every backend compute what it should, on this machine? Outputs, gradients, speed, a verdict.

Wrong kernels have mostly been silent: a new GPU generation gave wrong gradients, an argument
vanished in somebody's **kwargs, two entry points scaled by different defaults. Here every backend
that can run is compared with the float64 token-by-token reference, through every entry point, and
so are whole small models, trained one step and decoding: there the rest of the native code runs.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate import __version__, ops
from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ConfigError
from metastate.infer.generate import inference
from metastate.model.decode import make_decoder, store_bfloat16
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss

# Largest |x - x_ref| / largest |x_ref| that counts as right; the tests' own table.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
NAMES = ("r", "log_w", "k", "v", "kappa", "a")
PACKAGES = ("torch", "numpy", "numba", "triton", "flash-linear-attention")
TIMED_TOKENS = {"reference": 16}  # of a speed test; 256 for the others


@dataclass(frozen=True)
class Case:
    """One set of inputs that every backend is given."""

    name: str
    batch: int
    length: int
    heads: int
    size: int
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = ()  # of packed documents; none means one a row
    update: str = "delta"
    by: str = "key"
    query: bool = False  # whether M is read with a query of its own
    layers: int = 0  # of a whole model, whose configuration the rest is; 0: operations alone
    readout: Literal["both", "encoding"] = "encoding"
    ffn_order: Literal["after"] | None = None
    architecture: Literal["metastate", "rwkv7"] = "metastate"
    memory_heads: int | None = None
    memory_layer: int | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Draw inputs of realistic scale, float64 but of the dtype's precision, on the CPU."""
        draw = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length, self.heads, self.size)
        out = {name: torch.randn(shape, generator=draw) for name in (*NAMES, "x", "q")}
        out["log_w"] = -0.6065 * torch.sigmoid(2 * out["log_w"])
        out["k"] *= self.size**-0.5
        out["kappa"] = F.normalize(out["kappa"], dim=-1)
        out["a"] = torch.sigmoid(out["a"])
        out = {name: x.to(self.dtype).double() for name, x in out.items()}
        rows = len(self.lengths) or self.batch
        for name in ("state", "meta"):
            shape = (rows, self.heads, self.size, self.size)
            out[name] = torch.randn(shape, generator=draw).double()
        return out

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        """Return the offsets of the documents."""
        if not self.lengths:
            return None
        return torch.tensor([0, *self.lengths], device=device).cumsum(0)

    def model(self) -> LanguageModel:
        """Return a float64 model whose values are float32's, none of them left at zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)  # rounding moves nothing by more than 2e-6 here
            shape: dict[str, Any] = {
                "hidden_size": self.heads * self.size,
                "num_heads": self.heads,
                "num_layers": self.layers,
                "ffn_size": 40,
                "ffn_order": self.ffn_order,
                "architecture": self.architecture,
                "memory_heads": self.memory_heads,
                "memory_layer": self.memory_layer,
            }
            if self.architecture == "metastate":
                shape["meta_state"] = MetaStateConfig(readout=self.readout)
            model = LanguageModel(ModelConfig(vocab_size=VOCABULARY, **shape))
            with torch.no_grad():
                for p in model.parameters():
                    # Small: the larger, the more a model makes of the rounding before it.
                    scale = 0.25 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
                    p.add_(torch.randn(p.shape), alpha=scale)
        return model.double()


BF16 = torch.bfloat16
VOCABULARY = 64  # of a model
DECODED = 5  # tokens a row
MODEL = "a model's loss, gradients and decoding"
LIKE_PRESETS = Case(
    *("two layers", 2, 67, 2, 16), layers=2, ffn_order="after", memory_heads=1, memory_layer=1
)
CASES = (
    Case("float32", 2, 67, 2, 64),
    Case("bfloat16", 2, 67, 1, 64, BF16, query=True),
    Case("packed documents", 2, 35, 1, 64, lengths=(1, 66, 3), update="input", query=True),
    Case("packed documents in bfloat16", 1, 40, 1, 64, BF16, (1, 20, 19)),
    Case("read by value", 1, 33, 2, 64, update="self", by="value"),
    Case("head size 24", 1, 17, 1, 24),
    LIKE_PRESETS,
    Case("two layers, all memories", 2, 67, 2, 16, layers=2, readout="both", memory_heads=2),
    Case("RWKV-7", 2, 17, 2, 16, layers=2, architecture="rwkv7"),
    replace(LIKE_PRESETS, name="two layers stored in bfloat16", length=DECODED, dtype=BF16),
)
GPU_CASES = (
    Case("head size 128", 1, 100, 2, 128),
    Case("head size 256 in bfloat16", 1, 100, 1, 256, BF16),
    Case("many programs", 4, 131, 12, 64, BF16),
)


def through_wkv7(x: dict[str, Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    """Return y and the final state of ops.wkv7."""
    options: Any = {"cu_seqlens": case.cu_seqlens(x["r"].device), "backend": backend}
    args: Any = [x[n] for n in (*NAMES, "state")]
    y, state = ops.wkv7(*args, **options)
    return {"y": y, "state": state}


def through_layer(x: dict[str, Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    """Return what two readers and the meta state make of one trajectory."""
    options: Any = {"cu_seqlens": case.cu_seqlens(x["r"].device), "backend": backend}
    args: Any = [x[n] for n in (*NAMES, "state")]
    y, trajectory = ops.wkv7_trajectory(*args, **options)
    e = trajectory.read(x["x"], by=case.by)
    z, meta = ops.meta_state(
        x["x"],
        F.normalize(e, dim=-1),
        x["q"] if case.query else None,
        trajectory,
        x["meta"],
        update=case.update,
        backend=backend,
    )
    return {"y": y, "e": e, "z": z, "state": trajectory.state, "meta": meta}


def through_one_token(x: dict[str, Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    """Return what decoding computes: one token, no gradients."""
    first = {n: t if n in ("state", "meta") else t[:, :1] for n, t in x.items()}
    with torch.no_grad():
        return through_layer(first, case, backend)


def through_model(like: Tensor, case: Case, backend: str) -> dict[str, Tensor]:
    """Return a model's loss, the gradient of every parameter, and the logits of decoding.

    Args:
        like: of the device and dtype to compute on and in.
        case: a model's; the second document of the last row starts in its middle. One in bfloat16
            is a model that stores its matrices so, which does nothing but decode.
        backend: of the model; it decides what decodes, too.
    """
    model, stored = case.model(), case.dtype == BF16
    if stored:
        store_bfloat16(model)  # for the measure as well: storing is not an error
    model = model.to(like.device, torch.float32 if like.dtype == BF16 else like.dtype)
    if like.dtype == BF16:
        store_bfloat16(model)
    model.backend = backend
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(VOCABULARY, (case.batch, case.length + 1), generator=draw).to(like.device)
    out = {}
    if not stored:
        resets = torch.zeros_like(text[:, 1:], dtype=torch.bool)
        resets[-1, case.length // 2] = True
        loss = lm_loss(model, text[:, :-1], text[:, 1:], resets=resets).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        out = {"loss": loss.detach()} | {f"gradient of {n}": grad for n, grad in grads.items()}
    with inference(model):
        decoder = make_decoder(model, case.batch)
        steps = [decoder.step(text[:, t].tolist()).clone() for t in range(DECODED)]
    return out | {"decoded logits": torch.stack(steps)}


PATHS: dict[str, Callable[[dict[str, Tensor], Case, str], dict[str, Tensor]]] = {
    "wkv7": through_wkv7,
    "wkv7_trajectory, read, meta_state": through_layer,
    "one token": through_one_token,
}


def values(path: str, x: dict[str, Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    """Return the outputs of one path and, where it has any, the gradient of every input."""
    if path == MODEL:
        return through_model(x["r"], case, backend)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items()}
    out = PATHS[path](leaves, case, backend)
    if path == "one token":
        return out
    loss = torch.zeros((), dtype=torch.float64, device=x["r"].device)
    for i, t in enumerate(out.values()):  # weights that no symmetry can hide behind
        wave = torch.arange(t.numel(), device=t.device, dtype=torch.float64).view(t.shape)
        loss = loss + (t.double() * (wave * 0.7 + i).sin()).sum()
    loss.backward()
    return out | {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}


def error_of(found: Tensor | None, expected: Tensor) -> float:
    """Return max |found - expected| / max |expected|; infinite where there is no comparing."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    found = found.detach().double().cpu()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")  # NaN is the worst of errors


class Examiner:
    """Compares backends with the reference, whose values are computed once a case and path."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], dict[str, Tensor]] = {}

    def check(self, backend: str, device: torch.device, case: Case, path: str) -> dict[str, Any]:
        """Return {case, path, what, error, allowed, message} of the worst value of one path."""
        key = (case.name, path)
        if key not in self.known:
            truth = values(path, case.inputs(), case, "reference")
            self.known[key] = {n: t.detach() for n, t in truth.items()}
        expected, allowed = self.known[key], ALLOWED[case.dtype]
        given = {
            n: t.to(device, torch.float32 if n in ("state", "meta") else case.dtype)
            for n, t in case.inputs().items()
        }
        row: dict[str, Any] = {"case": case.name, "path": path, "allowed": allowed}
        try:
            found = values(path, given, case, backend)
        except Exception as error:  # whatever a broken kernel raises is the finding
            said = (str(error).splitlines() or [""])[0]
            message = f"raised {type(error).__name__}: {said}"
            return row | {"what": "call", "error": float("inf"), "message": message}
        errors = {n: error_of(found.get(n), t) for n, t in expected.items()}
        what = max(errors, key=lambda n: errors[n])
        return row | {"what": what, "error": errors[what], "message": None}


def why_not(backend: str, device: torch.device) -> str | None:
    """Return why `backend` is not checked on `device`; None where it can be."""
    if backend == "triton" and device.type == "cpu":
        return "its kernels run on an NVIDIA GPU"
    try:
        ops.resolve_backend(backend, device)
    except (ConfigError, ImportError) as error:
        return str(error)
    return None


def cases_of(backend: str, device: torch.device) -> list[Case]:
    """Return what `backend` is given on `device`."""
    cases = [*CASES, *(GPU_CASES if device.type == "cuda" else ())]
    if backend == "reference":  # the others' measure: its float32 form is checked once
        return cases[:1]
    if backend == "fla":  # half precision, reads by key; for every other kind it tunes for minutes
        fit = {"dtype": BF16, "by": "key", "layers": 0, "size": 64, "lengths": ()}
        cases = [c for c in cases if fit.items() <= vars(c).items()]
    return cases


def speeds(backends: list[str], device: torch.device) -> dict[str, float]:
    """Return microseconds a token of the layer, forward and backward, H 4, N 64.

    The backends take turns, the first of which compiles, and the quickest one counts: other work on
    the machine then hardly decides who is ahead.
    """
    best = dict.fromkeys(backends, float("inf"))
    for turn in range(4):
        for backend in backends:
            case = Case("speed", 1, TIMED_TOKENS.get(backend, 256), 4, 64)
            x = {n: t.to(device, torch.float32) for n, t in case.inputs().items()}
            begin = time.perf_counter()
            values("wkv7_trajectory, read, meta_state", x, case, backend)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                us = 1e6 * (time.perf_counter() - begin) / case.length
                best[backend] = min(best[backend], us)
    return best


def devices_here() -> list[torch.device]:
    """Return the CPU and one GPU of each model."""
    found, names = [torch.device("cpu")], set()
    for i in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(i)
        if name not in names:
            names.add(name)
            found.append(torch.device("cuda", i))
    return found


def environment() -> dict[str, Any]:
    """Return versions, platform, threads and devices."""
    versions: dict[str, str | None] = {"metastate": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_bytes": facts.total_memory,
            }
        )
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def diagnose(
    devices: list[torch.device] | None = None, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Check every backend that can run on `devices` (default: those here) against float64.

    Before every check `progress(done, total, now=what)` is called.

    Returns:
        environment(), `backends` (one entry a device and backend: device, name, auto, runs,
        why_not, right, checks, worst_error, failures, us_per_token), `ok` (whether what `auto`
        chooses is right everywhere) and `verdict`, one line.
    """
    pairs = [(d, b) for d in devices or devices_here() for b in ops.BACKENDS if b != "auto"]
    reasons = {pair: why_not(pair[1], pair[0]) for pair in pairs}
    checks = {
        pair: [(c, path) for c in cases_of(pair[1], pair[0]) for path in paths_of(c)]
        for pair, reason in reasons.items()
        if reason is None
    }
    total, done, examiner = sum(map(len, checks.values())), 0, Examiner()
    backends = []
    for device, name in pairs:
        reason = reasons[device, name]
        entry: dict[str, Any] = {
            "device": str(device),
            "name": name,
            "auto": ops.resolve_backend("auto", device) == name,
            "runs": reason is None,
            "why_not": reason,
        }
        backends.append(entry)
        if reason is not None:
            continue
        rows = []
        for case, path in checks[device, name]:
            if progress is not None:
                progress(done, total, now=f"{name} on {device}: {case.name}")
            rows.append(examiner.check(name, device, case, path))
            done += 1
        failures = [row for row in rows if not row["error"] < row["allowed"]]
        exact = [row["error"] for row in rows if row["allowed"] == ALLOWED[torch.float32]]
        entry |= {
            "right": not failures,
            "checks": len(rows),
            "worst_error": max(exact or [row["error"] for row in rows]),
            "failures": failures,
            "us_per_token": None,
        }
    for device in dict.fromkeys(d for d, _ in pairs):
        own = [b for b in backends if b["device"] == str(device) and b.get("right")]
        found = speeds([b["name"] for b in own], device)  # a wrong result has no speed
        for b in own:
            b["us_per_token"] = found[b["name"]]
    if progress is not None:
        progress(total, total)
    report = environment() | {"backends": backends}
    report["ok"] = all(b["right"] for b in backends if b["auto"])
    report["verdict"] = verdict(report)
    return report


def paths_of(case: Case) -> list[str]:
    """Return the entry points that take `case`: a packed batch has no single token."""
    if case.layers:
        return [MODEL]
    return [p for p in PATHS if p != "one token" or not case.lengths]


def describe_failure(row: dict[str, Any]) -> str:
    """Return one failed check as text."""
    found = row["message"] or f"{row['what']} off by {row['error']:.0e}"
    return f"{found} (allowed {row['allowed']:.0e}; {row['path']}; {row['case']})"


def verdict(report: dict[str, Any]) -> str:
    """Return the one line for a bug report."""
    found = []
    for b in report["backends"]:
        if not b["runs"]:
            continue
        place = f"{b['name']}{' (auto)' if b['auto'] else ''} on {b['device']}"
        if b["right"]:
            found.append(f"{place} right to {b['worst_error']:.0e}")
        else:
            more = f" and {len(b['failures']) - 1} more" if len(b["failures"]) > 1 else ""
            worst = max(b["failures"], key=lambda row: row["error"])
            found.append(f"{place} WRONG: {describe_failure(worst)}{more}")
    installed = [f"{name} {v}" for name, v in report["versions"].items() if v]
    system = [f"Python {report['python']}", report["platform"], f"{report['threads']} threads"]
    gpus = [f"{g['name']} ({g['capability']}, CUDA {report['cuda']})" for g in report["gpus"]]
    wrong = not all(b["right"] for b in report["backends"] if b["runs"])
    head = "OK" if not wrong else "WRONG" if not report["ok"] else "OK, but a backend is wrong"
    return f"metastate doctor: {head} | {'; '.join(found)} | {', '.join(installed + system + gpus)}"


def doctor_table(report: dict[str, Any]) -> str:
    """Return `diagnose`'s report as text for people; the last line is the verdict."""
    versions = ", ".join(f"{n} {v or 'not installed'}" for n, v in report["versions"].items())
    lines = [
        versions,
        f"Python {report['python']}, {report['platform']}, {report['threads']} threads",
    ]
    for g in report["gpus"]:
        memory = g["memory_bytes"] / 2**30
        lines.append(f"{g['name']}, capability {g['capability']}, {memory:.0f} GiB")
    lines += ["", f"{'device':<9}{'backend':<12}{'checks':>7}{'worst error':>13}{'us/token':>10}"]
    for b in report["backends"]:
        start = f"{b['device']:<9}{b['name'] + ('*' if b['auto'] else ''):<12}"
        if not b["runs"]:
            lines.append(f"{start}      - {b['why_not']}")
            continue
        us = "wrong" if b["us_per_token"] is None else f"{b['us_per_token']:.1f}"
        lines.append(f"{start}{b['checks']:>7}{b['worst_error']:>13.1e}{us:>10}")
        lines += [f"{'':<9}  {describe_failure(row)}" for row in b["failures"]]
    lines += ["* what `auto` chooses; us/token: forward and backward, 4 heads of 64, float32", ""]
    return "\n".join([*lines, report["verdict"]])
