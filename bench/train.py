"""Training step: tokens/s of Meta-State beside a Transformer with SDPA at equal parameters.

    python bench/train.py [--size small] [--tokens 16384] [--lengths 512 1024 4096 16384]
    python bench/train.py --peer metastate-memory   beside itself without the surprise memory
    python bench/train.py --profile 4096        where the time of a step goes
    python bench/train.py --memory              peak memory of a step by length, and its slope

A step is loss, backward, clipping and AdamW on batch x T = --tokens tokens. Both models take turns
in one run and figures are medians; on a shared machine rely on the ratios. First the gradients of a
small float64 model must equal those of the reference backend; otherwise there are no figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.config import ModelConfig, TrainConfig
from metastate.model import loss as loss_module
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.presets import preset
from metastate.train.memory import keep_freed_memory
from metastate.train.optim import make_optimizer

PEERS = ("transformer", "metastate-memory", "rwkv7")
DTYPES = ("float32", "bfloat16")


def config_of(name: str, args: argparse.Namespace) -> ModelConfig:
    """Return the preset of an architecture; NAME-memory is without the surprise memory."""
    bare = name.removesuffix("-memory")
    config = preset(f"{bare}-{args.size}", vocab_size=args.vocab_size)
    return config if bare == name else config.replace(memory_heads=None)


class Step:
    """A model, its optimizer, and one training step of them."""

    def __init__(self, architecture: str, args: argparse.Namespace, dtype: str) -> None:
        torch.manual_seed(0)
        self.model, self.dtype = LanguageModel(config_of(architecture, args)), dtype
        self.model.backend = args.backend
        self.model.activation_checkpointing = args.activation_checkpointing
        if args.compile:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = make_optimizer(self.model, TrainConfig())

    def __call__(self, batch: int, length: int) -> float:
        """Make a step on random tokens; return its loss."""
        tokens = torch.randint(self.model.config.vocab_size, (batch, length))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            out = lm_loss(self.model, tokens, tokens.roll(-1, 1), z_loss=1e-4)
        out.loss.backward()
        with record_function("bench.optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(out.nll)


def gradient_error(backend: str) -> float:
    """Return the largest relative error of any gradient of a small float64 model."""
    gradients = []
    for used in ("reference", backend):
        torch.manual_seed(0)
        model = LanguageModel(
            preset("metastate-tiny", vocab_size=61, hidden_size=16, num_layers=2, num_heads=2)
        ).double()
        for p in model.parameters():
            if not p.any():  # an output that starts at zero would hide its layer
                torch.nn.init.normal_(p, std=0.1)
        model.backend = used
        tokens = torch.randint(61, (2, 70))
        resets = torch.rand(2, 70) < 0.05
        lm_loss(model, tokens, tokens.roll(-1, 1), resets=resets, z_loss=1e-2).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    return max(
        float((b - a).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(*gradients, strict=True)
    )


def speed(args: argparse.Namespace) -> list[dict]:
    """Time steps at every length and dtype, the models in turn."""
    print(f"{'dtype':<10}{'T':>7}{'batch':>6}", end="")
    print(
        f"{'metastate tok/s':>17}{args.peer + ' tok/s':>24}{'ratio':>8}{'us/token':>10}{'flat':>7}"
    )
    rows: list[dict] = []
    for dtype in args.dtypes:
        steps = {a: Step(a, args, dtype) for a in args.sides}
        # The first steps compile kernels, make the moments and touch the machine's memory, which a
        # virtual machine hands out slowly: of full size, or that would count for who comes first.
        for step in steps.values():
            step(1, min(args.lengths))
            step(max(1, args.tokens // min(args.lengths)), min(args.lengths))
        base = None
        for length in args.lengths:
            batch = max(1, args.tokens // length)
            seconds: dict[str, list[float]] = {a: [] for a in args.sides}
            for _ in range(args.repeats):
                for a in args.sides:
                    begin = time.perf_counter()
                    nll = steps[a](batch, length)
                    if not 0 < nll < 50:
                        sys.exit(f"{a}: loss {nll} is no loss of random text; no figures")
                    seconds[a].append(time.perf_counter() - begin)
            tokens_per_s = {a: batch * length / statistics.median(s) for a, s in seconds.items()}
            us = 1e6 / tokens_per_s["metastate"]
            base = base or us
            row = {"dtype": dtype, "length": length, "batch": batch, "tokens_per_s": tokens_per_s}
            row["ratio"] = tokens_per_s["metastate"] / tokens_per_s[args.peer]
            row["us_per_token"], row["of_first_length"] = us, us / base
            rows.append(row)
            print(
                f"{dtype:<10}{length:>7,}{batch:>6}{tokens_per_s['metastate']:>17,.0f}"
                f"{tokens_per_s[args.peer]:>24,.0f}{row['ratio']:>8.2f}{us:>10.1f}"
                f"{us / base:>7.2f}",
                flush=True,
            )
    return rows


def group_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """Return the part of a step that an event belongs to, by its own name and its callers'."""
    names, at = [], event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    for name in names:
        if name == "bench.loss" or "LinearCrossEntropy" in name:
            return "loss"
        if name == "bench.optimizer":
            return "optimizer"
        if name.startswith("metastate::"):
            return f"kernel {name.removeprefix('metastate::')}"
    own = names[0]
    if own.startswith(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn")):
        return "matrix products"
    if "attention" in own:
        return "attention"
    return "norms" if "norm" in own else f"elementwise {own.removeprefix('aten::')}"


def profile_step(args: argparse.Namespace) -> list[dict]:
    """Print where the time of one step goes, by part, and the largest elementwise operations."""
    plain = loss_module.linear_cross_entropy

    def named(*inputs: torch.Tensor) -> tuple:
        with record_function("bench.loss"):
            return plain(*inputs)

    loss_module.linear_cross_entropy = named  # type: ignore[assignment]
    rows = []
    for dtype in args.dtypes:
        for architecture in args.sides:
            step = Step(architecture, args, dtype)
            batch = max(1, args.tokens // args.profile)
            step(batch, args.profile)
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                step(batch, args.profile)
            parts: Counter[str] = Counter()
            for event in recorded.events():
                parts[group_of(event)] += event.self_cpu_time_total / 1e6
            total = sum(parts.values())
            print(f"\n{architecture}, {dtype}, T {args.profile:,}, batch {batch}: {total:.2f} s")
            merged: Counter[str] = Counter()
            for name, s in parts.items():
                merged[name.split()[0] if name.startswith("elementwise") else name] += s
            for name, s in merged.most_common():
                print(f"  {name:<40}{s:>9.3f} s{s / total:>8.1%}")
            print("  of elementwise:")
            for name, s in parts.most_common(40):
                if name.startswith("elementwise") and s > 0.01 * total:
                    print(
                        f"    {name.removeprefix('elementwise '):<38}{s:>9.3f} s{s / total:>8.1%}"
                    )
            rows.append({"architecture": architecture, "dtype": dtype, "seconds": dict(merged)})
    loss_module.linear_cross_entropy = plain
    return rows


def memory(args: argparse.Namespace) -> list[dict]:
    """Print the peak resident memory of a step on one row, each in its own process."""
    rows = []
    print(f"{'architecture':<14}{'T':>7}{'peak MiB':>11}{'KiB a token since the row before':>34}")
    for architecture in args.sides:
        before: dict | None = None
        for length in args.lengths:
            command = [sys.executable, __file__, "--one-step", architecture, "--lengths"]
            command += [str(length), "--size", args.size, "--vocab-size", str(args.vocab_size)]
            command += ["--dtypes", args.dtypes[0], "--backend", args.backend]
            command += ["--activation-checkpointing"] * args.activation_checkpointing
            command += ["--compile"] * args.compile
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{architecture} at T {length}: {done.stderr or 'killed'}")
            row = {"architecture": architecture, "length": length, **json.loads(done.stdout)}
            if before is not None:
                grown = row["peak_bytes"] - before["peak_bytes"]
                row["slope_bytes"] = grown / (length - before["length"])
            slope = f"{row['slope_bytes'] / 1024:.1f}" if "slope_bytes" in row else "-"
            peak = row["peak_bytes"] / 2**20
            print(f"{architecture:<14}{length:>7,}{peak:>11,.0f}{slope:>34}", flush=True)
            rows.append(row)
            before = row
    return rows


def one_step(args: argparse.Namespace) -> None:
    """Make a single step and print the peak memory of this process."""
    Step(args.one_step, args, args.dtypes[0])(1, args.lengths[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}))


def main() -> None:
    """Check, measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="preset size of both models")
    parser.add_argument("--peer", choices=PEERS, default="transformer", help="the other model")
    parser.add_argument("--vocab-size", type=positive, default=50304, help="vocabulary of both")
    parser.add_argument("--tokens", type=positive, default=16384, help="batch x T")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[512, 1024, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=positive, default=3, help="timed steps of each")
    parser.add_argument("--backend", default="auto", help="of metastate.ops")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--profile", type=positive, metavar="T", help="profile a step of T tokens")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step, batch 1")
    parser.add_argument("--one-step", choices=("metastate", *PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sides = ("metastate", args.peer)
    keep_freed_memory()  # as training does
    if args.one_step:
        one_step(args)
        return
    error = gradient_error(args.backend)
    print(f"gradients of a float64 model against the reference backend: {error:.1e}")
    if not error < 1e-8:
        sys.exit("the gradients disagree: no figures")
    parameters = {}
    for a in args.sides:
        with torch.device("meta"):
            model = LanguageModel(config_of(a, args))
        parameters[a] = model.count_parameters()["non_embedding"]
    print(f"non-embedding parameters {parameters}, {torch.get_num_threads()} threads\n")
    kind = "profile" if args.profile else "memory" if args.memory else "speed"
    rows = {"profile": profile_step, "memory": memory, "speed": speed}[kind](args)
    settings = {k: getattr(args, k) for k in ("size", "tokens", "backend", "compile")}
    record = {"bench": "train", "kind": kind, **settings, "parameters": parameters, "rows": rows}
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(exit_code(main))
