"""fla: get its kernels ready on all cores, for the tests on a GPU and for bench/gpu.py.

    python bench/fla_ready.py [--layer 8 4096] [--head-size 64]

flash-linear-attention compiles and times hundreds of forms of its kernels before its first result
(version 0.6: 424 at one head size), which takes one process many minutes. Here as many processes as
there are cores compile a share each; then calls at the size that bench/gpu.py times let
it choose. Triton keeps both on the disk. Without fla there is nothing to do.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate import ops
from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.errors import ConfigError
from metastate.ops import fla
from metastate.train.distributed import device_of

HEADS = 12
NAMES = ("r", "log_w", "k", "v", "kappa", "a", "x")


def draw(shape: tuple[int, ...], device: torch.device | str) -> dict[str, Tensor]:
    """Return inputs of the layer [B, T, H, N] of realistic scale, in bfloat16."""
    x = {n: torch.randn(shape, device=device) for n in NAMES}
    x["log_w"] = -0.6065 * torch.sigmoid(2 * x["log_w"])
    x["k"] *= shape[-1] ** -0.5
    x["kappa"] = F.normalize(x["kappa"], dim=-1)
    x["a"] = torch.sigmoid(x["a"])
    return {n: t.bfloat16() for n, t in x.items()}


def as_fla_wants(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves r, w, k, v, a, b of fla's function, and x."""
    own = {n: x[n] for n in ("r", "k", "v", "x")}
    own |= {"w": x["log_w"].float(), "a": -x["kappa"], "b": x["kappa"] * x["a"]}
    return {n: t.detach().requires_grad_() for n, t in own.items()}


def bare_calls(x: dict[str, Tensor], calls: int) -> list[Tensor]:
    """Return the outputs of one to three calls of fla: the pass, a reader, and one as M's."""
    function = fla.chunk_function()
    w, k, v, a, b = (x[n] for n in "wkvab")
    asked = ((x["r"], k, v), (x["x"], k, v), (x["x"], k, x["x"]))[:calls]
    options = {"scale": 1.0, "initial_state": None, "output_final_state": True}
    return [function(r=r, w=w, k=k, v=v, a=a, b=b, **options)[0] for r, k, v in asked]


def all_calls(shape: tuple[int, ...], device: torch.device | str) -> None:
    """Call fla in every way that tests, doctor and benchmark do, forward and backward.

    Its choices depend on which arguments are there: bare, from a state, with its gradient.
    """
    x = draw(shape, device)
    y = bare_calls(as_fla_wants(x), 1)[0]
    y.backward(torch.randn_like(y))
    for whole in (False, True):
        leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
        state = torch.randn(shape[0], *shape[2:], shape[3], device=device, requires_grad=whole)
        y, final = ops.wkv7(*(leaves[n] for n in NAMES[:-1]), state, backend="fla")
        out = (y, final) if whole else (y,)
        torch.autograd.backward(out, [torch.randn_like(t) for t in out])


def choose(shape: tuple[int, ...], device: torch.device) -> None:
    """Let fla, where it runs, choose its kernels' forms at this size, before another call does."""
    try:
        fla.require(device)
    except ConfigError as error:
        print(error)
        return
    print("fla chooses its kernels: minutes, unless bench/fla_ready.py did that", flush=True)
    try:
        all_calls(shape, device)
    except Exception as error:  # its rows will say so; ours are none the worse
        print(f"fla failed: {type(error).__name__}: {error}")


def compile_share(share: int, shares: int, shape: tuple[int, ...], device: str) -> None:
    """Compile every `shares`-th form that fla's kernels have to choose from, and launch none."""
    from triton.runtime.autotuner import Autotuner

    def compile_some(self: Any, *given: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, given, strict=False))
        options["warmup"] = True
        for config in self.prune_configs(options)[share::shares]:
            try:
                self.fn.run(*given, **options, **config.all_kwargs())
            except Exception as error:  # a form for another GPU: fla passes over it as well
                print(f"not compiled: {str(error)[:100]!r}", file=sys.stderr)

    Autotuner.run = compile_some
    all_calls(shape, device)


def main() -> int:
    """Compile, then let fla choose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1")
    parser.add_argument("--layer", type=positive, nargs=2, default=[8, 4096], metavar=("B", "T"))
    parser.add_argument("--head-size", type=positive, default=64, help="N")
    cores = os.cpu_count() or 1
    parser.add_argument("--processes", type=positive, default=cores, help="that compile")
    args = parser.parse_args()
    if importlib.util.find_spec("fla") is None:
        print("fla is not installed: nothing to get ready")
        return 0
    fla.require(device_of(args.device))
    shape, begin = (*args.layer, HEADS, args.head_size), time.monotonic()
    start, given = multiprocessing.get_context("spawn"), (args.processes, shape, args.device)
    tasks = [start.Process(target=compile_share, args=(i, *given)) for i in range(args.processes)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    compiled = time.monotonic()
    failed = sum(task.exitcode != 0 for task in tasks)
    print(f"fla: compiled in {compiled - begin:.0f} s, {failed} processes failed", flush=True)
    all_calls(shape, args.device)
    print(f"fla: chose in {time.monotonic() - compiled:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
