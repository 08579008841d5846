"""GPU: the layer's kernels against flash-linear-attention, training and decoding speed.

    python bench/fla_ready.py                   before it, where fla is installed
    python bench/gpu.py [--minutes 4] [--out rows.jsonl] [--tables kernels training decoding]
    python bench/gpu.py --device cpu --dry      tiny shapes, anywhere; its figures mean nothing

First `metastate doctor`'s checks of the device: where they fail there are no figures. Every row is
printed (as a row of docs/results.md) and, as JSON, appended to --out as soon as it is measured; one
JSON line of all of them comes last. A row that fails says so and the others go on: exit code 1
then, 2 without a CUDA device. Each table has its share of --minutes; a row that would outlast it is
left out and says so. The longest come last.

Ceilings are measured here: a device-to-device copy and a large bfloat16 matrix product. All sides
are counted alike: FLOPs are the model's own, a backward pass twice its forward one, and nothing
that is computed again to save memory: a head and token forward 10 N^2 for a recurrence and 2 N^2
for another reader, whatever form computes it (`LanguageModel.flops_per_token` has the rest). Bytes
are those that cannot be avoided: of an operation every input once forward and once backward, every
output, its gradient and every input's gradient once, in bfloat16, no states; of a decoding step
every weight but the embedding once, and the states or the cache (a recurrent state twice).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fla_ready import HEADS, as_fla_wants, bare_calls, choose, draw
from metastate import ops
from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.config import TrainConfig
from metastate.eval.doctor import NAMES, diagnose
from metastate.infer.generate import inference
from metastate.model.decode import BatchDecoder, store_bfloat16
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.presets import preset
from metastate.train.distributed import device_of
from metastate.train.optim import make_optimizer

TABLES = ("kernels", "training", "decoding")
ARCHITECTURES = ("metastate", "transformer")
ALLOWED = 0.05  # |x - x_float32| / |x_float32| in bfloat16; what is wrong is off by about 1
# fla's function on inputs as it wants them, without our conversions: as often as needed, or once.
BARE, ONE = "fla, bare calls", "fla, one bare call"


@dataclass(frozen=True)
class Operation:
    """The layer or a part of it: the pass, further readers of its states, the meta state."""

    name: str
    readers: int = 0
    meta: bool = False
    packed: bool = False

    @property
    def calls(self) -> int:
        """Calls that fla needs."""
        return 1 + self.readers + self.meta

    @property
    def flops(self) -> int:
        """FLOPs forward and backward, over N^2, a head and token."""
        return 3 * (10 * (1 + self.meta) + 2 * self.readers)

    @property
    def moved(self) -> int:
        """Numbers read and written forward and backward, a channel and token."""
        inputs, outputs = 6 + self.readers, self.calls
        return 3 * inputs + 2 * outputs


OPERATIONS = (
    Operation("wkv7"),
    Operation("wkv7 + read", 1),
    Operation("layer: wkv7 + read + meta state", 1, True),
    Operation("layer, packed documents", 1, True, packed=True),
)


class OutOfTimeError(Exception):
    """What is measured would outlast its share of --minutes."""


class WrongError(Exception):
    """What would be timed computes something else than it should."""


class Report:
    """The rows, shown and kept as soon as they are there, and the time left for more."""

    def __init__(self, args: argparse.Namespace, begun: float) -> None:
        self.path, self.minutes = args.out, args.minutes
        self.begin, self.end = time.monotonic(), begun + 60 * args.minutes
        self.tables = [t for t in TABLES if t in args.tables]
        self.name, self.columns = "", dict[str, str]()
        self.rows, self.failed = list[dict[str, Any]](), False

    def table(self, name: str, about: str, columns: dict[str, str]) -> None:
        """Begin a table; `columns` names its columns and how their values are written."""
        self.name, self.columns = name, columns
        print(f"\n{about}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def left(self) -> float:
        """Return the seconds left for the table at hand."""
        share = 1.0
        if self.name in self.tables:
            share = (1 + self.tables.index(self.name)) / len(self.tables)
        return self.begin + share * (self.end - self.begin) - time.monotonic()

    def row(self, given: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a row, show it and keep it, whatever happens in it."""
        row: dict[str, Any] = {"table": self.name, **given}
        try:
            if self.left() < 0:
                raise OutOfTimeError
            row |= measure()
        except OutOfTimeError:
            row["left_out"] = f"left out: --minutes {self.minutes:g}"
        except torch.cuda.OutOfMemoryError:
            row["left_out"] = "out of memory"
        except Exception as error:  # the other rows must not be lost
            said = (str(error).splitlines() or [""])[0]
            row["left_out"], self.failed = f"FAILED: {type(error).__name__}: {said}", True
        cells = [form.format(row[n]) if n in row else "" for n, form in self.columns.items()]
        if "left_out" in row:
            cells[cells.index("") if "" in cells else -1] = row["left_out"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a device that an error has stopped
            torch.cuda.empty_cache()  # nothing without one
        return row


class Bench:
    """The device, its clock and its ceilings."""

    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        self.device, self.rounds, self.dry = torch.device(args.device), args.rounds, args.dry
        self.report, self.bytes_per_s, self.flops_per_s = report, math.nan, math.nan

    def ceilings(self) -> None:
        """Measure what nothing can be faster than."""
        about = "ceilings: a device-to-device copy, a bfloat16 matrix product"
        self.report.table("ceilings", about, {"ceiling": "{}", "GB/s or TFLOP/s": "{:,.1f}"})

        def copy() -> dict[str, float]:
            x = torch.rand(2**20 if self.dry else 2**30, device=self.device).bfloat16()
            y = torch.empty_like(x)
            self.bytes_per_s = 2 * x.nbytes / self.seconds(lambda: y.copy_(x))
            return {"GB/s or TFLOP/s": self.bytes_per_s / 1e9}

        def product() -> dict[str, float]:
            n = 128 if self.dry else 8192
            a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
            self.flops_per_s = 2 * n**3 / self.seconds(lambda: a @ b)
            return {"GB/s or TFLOP/s": self.flops_per_s / 1e12}

        self.report.row({"ceiling": "copy"}, copy)
        self.report.row({"ceiling": "matrix product"}, product)

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, run: Callable[[], object], calls: int) -> float:
        """Return the seconds that a call takes when `calls` follow each other."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        self.wait()
        return (time.perf_counter() - begin) / calls

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median seconds of a call, over rounds of a tenth of a second or more.

        Two calls before them compile and warm up; of long ones there are three rounds at most.
        """
        self.timed(run, 1)
        once = self.timed(run, 1)
        calls = 1 if self.dry else max(1, min(100, int(0.1 / once)))
        rounds = self.rounds if once < 0.5 else min(3, self.rounds)
        if once * calls * rounds > self.report.left():
            raise OutOfTimeError
        return statistics.median(self.timed(run, calls) for _ in range(rounds))


def document_lengths(tokens: int, longest: int) -> list[int]:
    """Return lengths, most of them short, of together `tokens`; the longest is 64 times as long."""
    draw, lengths = random.Random(0), list[int]()
    while left := tokens - sum(lengths):
        length = math.exp(draw.uniform(math.log(max(1, longest // 64)), math.log(longest)))
        lengths.append(min(left, round(length)))
    return lengths


def layer(
    x: dict[str, Tensor], backend: str, op: Operation, offsets: Tensor | None
) -> list[Tensor]:
    """Return the outputs of an operation."""
    options: Any = {"cu_seqlens": offsets, "backend": backend}
    args: Any = [x[n] for n in NAMES]
    if not op.readers:
        return [ops.wkv7(*args, **options)[0]]
    y, trajectory = ops.wkv7_trajectory(*args, **options)
    e = trajectory.read(x["x"])
    if not op.meta:
        return [y, e]
    return [y, e, ops.meta_state(x["x"], e, None, trajectory, backend=backend)[0]]


def forward_backward(
    run: Callable[[], list[Tensor]], leaves: dict[str, Tensor], given: list[Tensor]
) -> list[Tensor]:
    """Return the outputs and every leaf's gradient, where the outputs' are the first of `given`."""
    for t in leaves.values():
        t.grad = None
    out = run()
    torch.autograd.backward(out, given[: len(out)])
    return [*out, *(t.grad for t in leaves.values() if t.grad is not None)]


def compare(
    x: dict[str, Tensor], given: list[Tensor], found: list[Tensor], op: Operation, packing: Any
) -> float:
    """Return the error of outputs and gradients on two heads, beside float32 by `chunked`.

    Raises:
        WrongError: it is larger than ALLOWED.
    """
    head = {n: t[:, :, :2].detach().float().requires_grad_() for n, t in x.items()}
    grads = [t[:, :, :2].float() for t in given]
    truth = forward_backward(lambda: layer(head, "chunked", op, packing), head, grads)
    errors = [
        float((t.detach()[:, :, :2].float() - exact.detach()).norm() / exact.detach().norm())
        for t, exact in zip(found, truth, strict=True)
    ]
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if not worst < ALLOWED:
        raise WrongError(f"off by {worst:.1e}, allowed {ALLOWED}")
    return worst


def kernels(bench: Bench, args: argparse.Namespace, backends: list[str]) -> None:
    """Time the layer's operations forward and backward on every backend."""
    batch, length, heads, size = args.shape
    drawn = draw(args.shape, bench.device)
    given = [torch.randn_like(drawn["r"]) for _ in range(3)]
    documents = document_lengths(batch * length, length)
    offsets = torch.tensor([0, *documents], device=bench.device).cumsum(0)
    about = (
        f"B {batch}, T {length:,}, H {heads}, N {size}, bfloat16, forward + backward; packed: "
        f"{len(documents)} documents of {min(documents)} to {max(documents):,} tokens"
    )
    columns = {"operation": "{}", "backend": "{}", "ms": "{:.3f}", "of copy": "{:.1%}"}
    columns |= {"of matrix product": "{:.1%}", "times own": "{:.2f}", "error": "{:.1e}"}
    bench.report.table("kernels", about, columns)

    def measure(op: Operation, backend: str, own: float | None) -> dict[str, float]:
        used = drawn if op.readers else {n: drawn[n] for n in NAMES}
        packing, row = offsets if op.packed else None, dict[str, float]()
        if backend in (BARE, ONE):
            x, calls = as_fla_wants(drawn), 1 if backend == ONE else op.calls
            run = partial(forward_backward, lambda: bare_calls(x, calls), x, given)
        else:
            x = {n: t.detach().requires_grad_() for n, t in used.items()}
            run = partial(forward_backward, lambda: layer(x, backend, op, packing), x, given)
            row["error"] = compare(used, given, run(), op, packing)
        seconds = bench.seconds(run)
        row["ms"] = 1e3 * seconds
        row["times own"] = row["ms"] / (own or row["ms"])
        if backend != ONE:  # which does a third of the work
            per_s = batch * length * heads * size / seconds
            row["of copy"] = 2 * op.moved * per_s / bench.bytes_per_s
            row["of matrix product"] = op.flops * size * per_s / bench.flops_per_s
        return row

    for op in OPERATIONS:
        sides = [*backends, *((BARE, ONE)[: 1 + op.meta] if "fla" in backends else ())]
        if op.packed:  # to fla another kind of input, for which it would tune anew for minutes
            sides = [side for side in backends if side != "fla"]
        own: float | None = None
        for side in sides:
            named = {"operation": op.name, "backend": side}
            row = bench.report.row(named, partial(measure, op, side, own))
            own = row.get("ms") if side == backends[0] else own


def make(architecture: str, args: argparse.Namespace) -> LanguageModel:
    """Build a preset on the device."""
    torch.manual_seed(0)
    fields = {"num_layers": 2, "hidden_size": 32, "num_heads": 2} if args.dry else {}
    config = preset(f"{architecture}-{args.size}", vocab_size=args.vocab_size, **fields)
    with torch.device(args.device):
        return LanguageModel(config)


def train_row(bench: Bench, args: argparse.Namespace, name: str, length: int) -> dict[str, float]:
    """Time training steps of a new model; attention is flash attention or fails."""
    model = make(name, args)
    optimizer = make_optimizer(model, TrainConfig())
    shape = (max(1, args.tokens // length), length)

    def step() -> None:
        tokens = torch.randint(args.vocab_size, shape, device=bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16):
            out = lm_loss(model, tokens, tokens.roll(-1, 1), z_loss=1e-4)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not 0 < (nll := float(out.nll)) < 50:
            raise WrongError(f"the loss is {nll}")

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        per_s = shape[0] * length / bench.seconds(step)
    mfu = per_s * 3 * model.flops_per_token(length)[0] / bench.flops_per_s
    row = {"tokens/s": per_s, "MFU": mfu}
    if bench.device.type == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
    return row


def training(bench: Bench, args: argparse.Namespace) -> None:
    """Time training steps of both architectures at every length."""
    about = f"training, {args.size}, bfloat16 autocast, not compiled, {args.tokens:,} tokens a step"
    columns = {"architecture": "{}", "T": "{:,}", "batch": "{}", "tokens/s": "{:,.0f}"}
    bench.report.table("training", about, columns | {"MFU": "{:.1%}", "peak GiB": "{:.1f}"})
    for length in sorted(args.lengths):
        for name in ARCHITECTURES:
            row = {"architecture": name, "T": length, "batch": max(1, args.tokens // length)}
            bench.report.row(row, partial(train_row, bench, args, name, length))


def stepwise_error(model: LanguageModel, length: int) -> dict[str, float]:
    """Return max |logits step by step - logits in one pass|, relative to the largest logit."""
    tokens = torch.randint(model.config.vocab_size, (2, length), device=model.head.weight.device)
    whole, _ = model(tokens)
    state, steps = model.init_state(2), []
    for t in range(length):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    error = float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())
    if not error < 1e-3:
        raise WrongError(f"stepwise logits differ from parallel ones by {error:.1e}")
    return {"error": error}


def decode_row(
    bench: Bench, model: LanguageModel, way: str, batch: int, prompt: int, steps: int
) -> dict[str, float]:
    """Time `steps` greedy tokens of `batch` rows that have all read one prompt."""
    tokens = torch.randint(model.config.vocab_size, (1, prompt), device=bench.device)
    logits, read = model(tokens)
    first, token = read.expand(batch).clone(), logits[:, -1].argmax(-1).expand(batch)
    row: dict[str, float] = {}
    if way == "eager":
        now = [token[:, None], first]

        def run() -> None:
            for _ in range(steps):
                out, now[1] = model(*now)
                now[0] = out.argmax(-1)
    else:
        decoder, handed = BatchDecoder(model, batch), [token.tolist()]

        def run() -> None:
            for _ in range(steps):
                handed[0] = decoder.step(handed[0]).argmax(-1).tolist()

        run()  # captures
        for i in range(batch):
            decoder.put(i, read)
        found, expected = decoder.step(token.tolist()), model(token[:, None], first)[0][:, -1]
        row["error"] = float((found - expected).abs().max() / expected.abs().max())
        if not row["error"] < ALLOWED:
            raise WrongError(f"its logits differ from the plain pass's by {row['error']:.1e}")
    seconds = bench.seconds(run) / steps
    weights = sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes
    moved = weights + first.num_bytes * (2 if model.recurrent else 1)
    row |= {"tokens/s": batch / seconds, "ms a step": 1e3 * seconds}
    return row | {"of copy": moved / seconds / bench.bytes_per_s}


@torch.no_grad()
def decoding(bench: Bench, args: argparse.Namespace) -> None:
    """Time greedy decoding at every batch size.

    `eager` launches kernel by kernel; `in place` is the decoder of `metastate generate`, which
    replays a captured graph, and here hands one token a row to the host every step.
    """
    prompt, steps = (32, 4) if bench.dry else (1024, 32)
    about = f"decoding, {args.size}, matrices in bfloat16, states in float32, after {prompt} tokens"
    columns = {"architecture": "{}", "way": "{}", "batch": "{}", "tokens/s": "{:,.0f}"}
    columns |= {"ms a step": "{:.2f}", "of copy": "{:.1%}", "error": "{:.1e}"}
    bench.report.table("decoding", about, columns)
    for name in ARCHITECTURES:
        model = make(name, args).eval()
        for p in model.parameters():
            if p.dim() == 2 and not p.any():  # an output that starts at zero would hide its layer
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        checked = bench.report.row(
            {"architecture": name, "way": "checked"}, partial(stepwise_error, model, 96)
        )
        if "error" not in checked:
            continue
        store_bfloat16(model)
        if bench.device.type == "cpu":  # whose fused elementwise work gives float32
            model.backend = "chunked"
        with inference(model):
            for batch in sorted(args.batches):
                for way in ("in place", "eager") if model.recurrent else ("eager",):
                    row = {"architecture": name, "way": way, "batch": batch}
                    measure = partial(decode_row, bench, model, way, batch, prompt, steps)
                    bench.report.row(row, measure)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu only with --dry")
    parser.add_argument("--size", default="150m", help="preset size of both models")
    parser.add_argument("--vocab-size", type=positive, default=50304)
    parser.add_argument("--layer", type=positive, nargs=2, default=[8, 4096], metavar=("B", "T"))
    parser.add_argument("--head-size", type=positive, default=64, help="N of the kernels' table")
    parser.add_argument("--tokens", type=positive, default=65536, help="batch x T in training")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--minutes", type=positive, default=4, help="in which it ends")
    parser.add_argument("--out", help="file to append every row to, as JSON")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args()
    args.shape = (*args.layer, HEADS, args.head_size)
    if args.dry:
        args.shape = (2, 32, 2, 16)
        args.size, args.vocab_size, args.tokens, args.rounds = "tiny", 61, 64, 1
        args.lengths, args.batches = [16, 32], [1, 2]
    return args


def main() -> int:
    """Check, measure, report."""
    begun, args = time.monotonic(), parse()
    if not args.dry and (not torch.cuda.is_available() or torch.device(args.device).type != "cuda"):
        print("no CUDA device here: nothing to measure (--device cpu --dry shows that it runs)")
        return 2
    device = device_of(args.device)
    torch.manual_seed(0)
    choose(args.shape, device)
    found = diagnose([device])
    print(found["verdict"], flush=True)
    if not found["ok"]:
        print("a check failed: no figures", file=sys.stderr)
        return 1
    own = ops.resolve_backend("auto", device)
    right = [b["name"] for b in found["backends"] if b["runs"] and b["right"]]
    backends = [own, *(b for b in ("fla", "chunked") if b in right and b != own)]
    report = Report(args, begun)
    bench = Bench(args, report)
    bench.ceilings()
    if "kernels" in args.tables:
        kernels(bench, args, backends)
    if "training" in args.tables:
        training(bench, args)
    if "decoding" in args.tables:
        decoding(bench, args)
    record = {"bench": "gpu", "dry": args.dry, "verdict": found["verdict"], "rows": report.rows}
    print("\n" + json.dumps(record))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(exit_code(main))
