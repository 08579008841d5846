"""GPU: the layer's kernels against flash-linear-attention, training and decoding speed.

    python bench/gpu.py [--size 150m] [--lengths 1024 4096 16384 65536] [--batches 1 16 256]
    python bench/gpu.py --device cpu --dry      tiny shapes, anywhere; its figures mean nothing

First `metastate doctor`'s checks of the device and a model's stepwise against its parallel logits:
where they fail there are no figures. A table for people, one JSON line last for scripts. Without
a CUDA device the exit code is 2.

Ceilings are measured here: a device-to-device copy and a large bfloat16 matrix product. The bytes
of an operation are those it cannot avoid (every input read once forward and once backward, every
output and gradient written once, in bfloat16), its FLOPs those of the recurrence (10 N^2 a head and
token forward, 26 N^2 backward, 2 and 10 N^2 for another reader); MFU counts a model's own FLOPs
(`LanguageModel.flops_per_token`) against the measured matrix product.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from metastate import ops
from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.config import TrainConfig
from metastate.eval.doctor import NAMES, Case, diagnose
from metastate.infer.generate import inference
from metastate.model.decode import BatchDecoder, store_bfloat16
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.presets import preset
from metastate.train.distributed import device_of
from metastate.train.optim import make_optimizer

ARCHITECTURES = ("metastate", "transformer")
# Operations of the layer: the pass, further readers of its states, whether there is a meta state.
OPERATIONS = {
    "wkv7": (0, False),
    "wkv7 + read": (1, False),
    "wkv7 + read + meta state": (1, True),
}


class Bench:
    """The device, its clock and its ceilings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.rounds, self.dry = torch.device(args.device), args.rounds, args.dry
        elements = 2**20 if self.dry else 2**30
        x = torch.zeros(elements, dtype=torch.bfloat16, device=self.device)
        y = torch.empty_like(x)
        self.bytes_per_s = 2 * x.nbytes / self.seconds(lambda: y.copy_(x))
        size = 128 if self.dry else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.flops_per_s = 2 * size**3 / self.seconds(lambda: a @ b)

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median seconds of `run`, after two rounds that compile and warm up."""
        taken = []
        for _ in range(self.rounds + 2):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[2:])


def operation(x: dict[str, Tensor], backend: str, readers: int, meta: bool) -> list[Tensor]:
    """Return the outputs of one of OPERATIONS."""
    args = [x[n] for n in NAMES]
    if not readers:
        return [ops.wkv7(*args, backend=backend)[0]]
    y, trajectory = ops.wkv7_trajectory(*args, backend=backend)
    e = trajectory.read(x["x"])
    if not meta:
        return [y, e]
    return [y, e, ops.meta_state(x["x"], e, None, trajectory, backend=backend)[0]]


def kernels(bench: Bench, args: argparse.Namespace, backends: list[str]) -> list[dict]:
    """Time the layer's operations forward and backward on every backend."""
    tokens, heads, size = (256, 2, 16) if bench.dry else (args.tokens, 12, args.head_size)
    case = Case("bench", max(1, tokens // 4096), min(tokens, 4096), heads, size)
    x = {n: t.to(bench.device, torch.bfloat16) for n, t in case.inputs().items()}
    x = {n: t.requires_grad_() for n, t in x.items() if n not in ("state", "meta")}
    per_token = heads * size**2
    rows = []
    print(f"\n{tokens} tokens, {heads} heads of {size}, bfloat16, forward + backward")
    print(f"{'operation':<28}{'backend':<10}{'ms':>9}{'of copy':>9}{'of matmul':>11}{'times':>8}")
    for name, (readers, meta) in OPERATIONS.items():
        base = None
        for backend in backends:

            def run(backend: str = backend, readers: int = readers, meta: bool = meta) -> None:
                out = operation(x, backend, readers, meta)
                torch.autograd.backward(out, [torch.ones_like(t) for t in out])
                for t in x.values():
                    t.grad = None

            seconds = bench.seconds(run)
            base = base or seconds
            flops = per_token * (36 + 12 * readers + 36 * meta) * tokens
            moved = tokens * heads * size * 2 * (20 + 4 * readers + 4 * meta)
            row = {"operation": name, "backend": backend, "ms": 1e3 * seconds}
            row["of_copy"] = moved / seconds / bench.bytes_per_s
            row["of_matmul"] = flops / seconds / bench.flops_per_s
            row["times_the_first"] = seconds / base
            rows.append(row)
            print(
                f"{name:<28}{backend:<10}{row['ms']:>9.2f}{row['of_copy']:>9.1%}"
                f"{row['of_matmul']:>11.1%}{row['times_the_first']:>8.2f}",
                flush=True,
            )
    return rows


def make(architecture: str, args: argparse.Namespace) -> LanguageModel:
    """Build a preset on the device."""
    torch.manual_seed(0)
    fields = {"num_layers": 2, "hidden_size": 32, "num_heads": 2} if args.dry else {}
    config = preset(f"{architecture}-{args.size}", vocab_size=args.vocab_size, **fields)
    with torch.device(args.device):
        return LanguageModel(config)


def training(bench: Bench, args: argparse.Namespace) -> list[dict]:
    """Time training steps of both architectures at every length."""
    print(f"\ntraining, {args.size}, bfloat16, {args.tokens} tokens a step")
    print(f"{'architecture':<14}{'T':>8}{'batch':>7}{'tokens/s':>12}{'MFU':>8}{'GiB':>8}")
    rows = []
    for architecture in ARCHITECTURES:
        model = make(architecture, args)
        optimizer = make_optimizer(model, TrainConfig())
        for length in args.lengths:
            batch = max(1, args.tokens // length)

            def step(model=model, optimizer=optimizer, shape=(batch, length)) -> None:
                tokens = torch.randint(args.vocab_size, shape, device=bench.device)
                with torch.autocast(bench.device.type, torch.bfloat16):
                    out = lm_loss(model, tokens, tokens.roll(-1, 1), z_loss=1e-4)
                out.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if not 0 < (nll := float(out.nll)) < 50:
                    sys.exit(f"{model.config.architecture}: the loss is {nll}; no figures")

            row = {"architecture": architecture, "length": length, "batch": batch}
            rows.append(row)
            start = f"{architecture:<14}{length:>8,}{batch:>7}"
            try:
                if bench.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(bench.device)
                per_s = batch * length / bench.seconds(step)
            except torch.cuda.OutOfMemoryError:
                optimizer.zero_grad()
                row["out_of_memory"] = True
                print(f"{start}  out of memory", flush=True)
                continue
            row["tokens_per_s"] = per_s
            row["mfu"] = per_s * sum(model.flops_per_token(length)) / bench.flops_per_s
            if bench.device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device)
            memory = row.get("peak_bytes", 0) / 2**30
            print(f"{start}{per_s:>12,.0f}{row['mfu']:>8.1%}{memory:>8.1f}", flush=True)
        del model, optimizer
        gc.collect()
    return rows


def stepwise_error(model: LanguageModel, length: int) -> float:
    """Return max |logits step by step - logits in one pass|, relative to the largest logit."""
    tokens = torch.randint(model.config.vocab_size, (2, length), device=model.head.weight.device)
    whole, _ = model(tokens)
    state, steps = model.init_state(2), []
    for t in range(length):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    return float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())


def decoding_at(
    bench: Bench, model: LanguageModel, batch: int, prompt: int, steps: int
) -> list[dict]:
    """Time `steps` greedy tokens of `batch` rows, each way there is."""
    shape, vocab_size = (batch, prompt), model.config.vocab_size
    logits, first = model(torch.randint(vocab_size, shape, device=bench.device))
    last = logits[:, -1].argmax(-1)

    def eager() -> None:
        token, state = last[:, None], first
        for _ in range(steps):
            out, state = model(token, state)
            token = out.argmax(-1)

    ways = {"eager": eager}
    if model.recurrent:
        decoder, start = BatchDecoder(model, batch), last.tolist()

        def in_place() -> None:
            given = start
            for _ in range(steps):
                given = decoder.step(given).argmax(-1).tolist()

        in_place()  # captures
        for row in range(batch):
            decoder.put(row, first[row])
        found, expected = decoder.step(start), model(last[:, None], first)[0][:, -1]
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < 0.05:
            sys.exit(f"the captured graph's logits differ by {error:.1e}: no figures")
        ways["in place"] = in_place
    rows = []
    for way, run in ways.items():
        seconds = bench.seconds(run) / steps
        architecture = model.config.architecture
        row = {"architecture": architecture, "way": way, "batch": batch}
        rows.append(row | {"tokens_per_s": batch / seconds})
        print(
            f"{architecture:<14}{way:<20}{batch:>7}{batch / seconds:>12,.0f}{1e3 * seconds:>10.2f}",
            flush=True,
        )
    return rows


@torch.no_grad()
def decoding(bench: Bench, args: argparse.Namespace) -> list[dict]:
    """Time greedy decoding at every batch size, after a prompt of 1,024 tokens.

    `eager` launches kernel by kernel; `in place` is the decoder of `metastate generate`, which
    replays a captured graph, and here hands one token a row to the host every step.
    """
    prompt, steps = (32, 4) if bench.dry else (1024, 64)
    print(f"\ndecoding, {args.size}, bfloat16, float32 states, after {prompt} tokens")
    print(f"{'architecture':<14}{'way':<20}{'batch':>7}{'tokens/s':>12}{'ms/step':>10}")
    rows = []
    for architecture in ARCHITECTURES:
        model = make(architecture, args).eval()
        for p in model.parameters():
            if p.dim() == 2 and not p.any():  # an output that starts at zero would hide its layer
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        error = stepwise_error(model, 96)
        if not error < 1e-3:
            sys.exit(f"{architecture}: stepwise logits differ from parallel ones by {error:.1e}")
        store_bfloat16(model)
        if bench.device.type == "cpu":  # whose fused elementwise work gives float32
            model.backend = "chunked"
        with inference(model):
            for batch in args.batches:
                rows += decoding_at(bench, model, batch, prompt, steps)
    return rows


def main() -> int:
    """Check, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu only with --dry")
    parser.add_argument("--size", default="150m", help="preset size of both models")
    parser.add_argument("--vocab-size", type=positive, default=50304)
    parser.add_argument("--tokens", type=positive, default=65536, help="batch x T")
    parser.add_argument("--head-size", type=positive, default=64, help="N of the kernels' table")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args()
    if args.dry:
        args.size, args.vocab_size, args.tokens, args.rounds = "tiny", 61, 64, 1
        args.lengths, args.batches = [16, 32], [1, 2]
    if not args.dry and (not torch.cuda.is_available() or torch.device(args.device).type != "cuda"):
        print("no CUDA device here: nothing to measure (--device cpu --dry shows that it runs)")
        return 2
    torch.manual_seed(0)
    report = diagnose([device_of(args.device)])
    print(report["verdict"])
    if not report["ok"]:
        print("a check failed: no figures", file=sys.stderr)
        return 1
    own = ops.resolve_backend("auto", torch.device(args.device))
    right = [b["name"] for b in report["backends"] if b["runs"] and b["right"]]
    bench = Bench(args)
    print(
        f"ceilings measured here: copy {bench.bytes_per_s / 1e9:,.0f} GB/s, bfloat16 matrix "
        f"product {bench.flops_per_s / 1e12:,.2f} TFLOP/s"
    )
    compared = [own, *(b for b in ("fla", "chunked") if b in right and b != own)]
    figures = {
        "bytes_per_s": bench.bytes_per_s,
        "flops_per_s": bench.flops_per_s,
        "kernels": kernels(bench, args, compared),
        "training": training(bench, args),
        "decoding": decoding(bench, args),
    }
    record = {"bench": "gpu", "dry": args.dry, "verdict": report["verdict"]}
    print(json.dumps(record | figures))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
