"""Time the recurrence: native kernels, chunked PyTorch and a plain token loop, in one run.

Every compared backend is first checked, at the timed size, against the float64 reference on one
head (heads are independent); a failed check prints what differs, no figure, and exits with 1. Then
the sides are timed in turn, round after round, and medians are reported: a table for people, one
JSON line last for scripts.

The floor of a forward pass is one pass over the state a token: five fused multiply-adds an element
(decay, removal, write, the read with r and the next removal read), at the rate that a probe of
independent multiply-adds in registers reaches here, in this run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate import ops
from metastate.cli import exit_code
from metastate.cli.options import positive

NAMES = ("r", "log_w", "k", "v", "kappa", "a")
TOLERANCE = 2e-5  # relative to the largest value, float32 against float64


def make_inputs(batch: int, length: int, heads: int, size: int) -> dict[str, Tensor]:
    """Draw op inputs of realistic scale, the reader's x and the output's gradients."""
    shape = (batch, length, heads, size)
    inputs = {name: torch.randn(shape) for name in (*NAMES, "x", "dy", "de")}
    inputs["log_w"] = -0.6065 * torch.sigmoid(2 * inputs["log_w"])
    inputs["k"] *= size**-0.5
    inputs["kappa"] = F.normalize(inputs["kappa"], dim=-1)
    inputs["a"] = torch.sigmoid(inputs["a"])
    return inputs


def token_loop(inputs: dict[str, Tensor]) -> Tensor:
    """Return y of the plain recurrence, token by token, keeping nothing but the state."""
    r, log_w, k, v, kappa, a = (inputs[n] for n in NAMES)
    w, b = log_w.exp(), a * kappa
    batch, length, heads, size = r.shape
    S = r.new_zeros(batch, heads, size, size)
    y = torch.empty_like(r)
    for t in range(length):
        u = S @ kappa[:, t, :, :, None]
        S = S * w[:, t, :, None] - u * b[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        y[:, t] = (S @ r[:, t, :, :, None]).squeeze(-1)
    return y


def wkv(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Run one forward pass."""
    y, state = ops.wkv7(*(inputs[n] for n in NAMES), backend=backend)
    return {"y": y, "state": state}


def layer(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Run the pass, the self-state encoder's read and the meta recurrence (update `delta`)."""
    y, trajectory = ops.wkv7_trajectory(*(inputs[n] for n in NAMES), backend=backend)
    e = trajectory.read(inputs["x"])
    z, meta = ops.meta_state(inputs["x"], e, None, trajectory, backend=backend)
    return {"y": y, "e": e, "z": z, "state": trajectory.state, "meta": meta}


def with_gradients(
    run: Callable[[dict[str, Tensor], str], dict[str, Tensor]],
    inputs: dict[str, Tensor],
    backend: str,
) -> dict[str, Tensor]:
    """Run forward and backward; return the outputs and every input's gradient."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in (*NAMES, "x")}
    out = run(leaves, backend)
    loss = (out["y"] * inputs["dy"]).sum()
    if "z" in out:
        loss = loss + (out["z"] * inputs["de"]).sum()
    loss.backward()
    grads = {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}
    return {n: x.detach() for n, x in out.items()} | grads


def check(inputs: dict[str, Tensor]) -> list[str]:
    """Compare head 0 of row 0 of every backend with the float64 reference; return what differs."""
    head = {n: x[:1, :, :1].double() for n, x in inputs.items()}
    expected = with_gradients(layer, head, "reference")
    plain = with_gradients(wkv, head, "reference")
    found = {
        "token loop": ({"y": token_loop(inputs)}, expected),
        "cpu forward": (wkv(inputs, "cpu"), expected),
        "chunked forward": (wkv(inputs, "chunked"), expected),
        "cpu wkv7": (with_gradients(wkv, inputs, "cpu"), plain),
        "chunked wkv7": (with_gradients(wkv, inputs, "chunked"), plain),
        "cpu layer": (with_gradients(layer, inputs, "cpu"), expected),
    }
    wrong = []
    for side, (values, truth) in found.items():
        for name, x in values.items():
            want = truth[name]
            part = x[:1, :1] if name in ("state", "meta") else x[:1, :, :1]
            error = float((part.double() - want).abs().max() / want.abs().max())
            if not error < TOLERANCE:
                wrong.append(f"{side}: {name} is off by {error:.1e} (allowed {TOLERANCE:.0e})")
    return wrong


def multiply_adds_a_second() -> float:
    """Return the fused multiply-adds a second of one core, float32, from registers."""
    import numba
    import numpy as np

    @numba.njit(fastmath={"contract"})
    def probe(x, rounds):
        scale, shift = np.float32(0.999), np.float32(0.1)
        for _ in range(rounds):
            for i in range(256):
                x[i] = x[i] * scale + shift

    x, rounds, seconds = np.ones(256, np.float32), 200_000, []
    probe(x, 1)
    for _ in range(7):
        start = time.perf_counter()
        probe(x, rounds)
        seconds.append(time.perf_counter() - start)
    return 256 * rounds / min(seconds)


def time_in_turn(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run all sides round after round; return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> int:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=positive, default=2, help="rows (default 2)")
    parser.add_argument("--length", type=positive, default=1024, help="tokens a row (default 1024)")
    parser.add_argument("--heads", type=positive, default=12, help="heads (default 12)")
    parser.add_argument("--size", type=positive, default=64, help="head size N (default 64)")
    parser.add_argument("--rounds", type=positive, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=positive, help="threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    inputs = make_inputs(args.batch, args.length, args.heads, args.size)
    wrong = check(inputs)
    if wrong:
        print("a check failed, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1

    def quietly(run: Callable[..., object], *arguments: object) -> Callable[[], object]:
        return torch.no_grad()(lambda: run(*arguments))

    ms = time_in_turn(
        {
            "token loop forward": quietly(token_loop, inputs),
            "chunked forward": quietly(wkv, inputs, "chunked"),
            "cpu forward": quietly(wkv, inputs, "cpu"),
            "chunked forward + backward": lambda: with_gradients(wkv, inputs, "chunked"),
            "cpu forward + backward": lambda: with_gradients(wkv, inputs, "cpu"),
            "cpu layer forward + backward": lambda: with_gradients(layer, inputs, "cpu"),
        },
        args.rounds,
    )
    ms = {name: 1e3 * seconds for name, seconds in ms.items()}
    threads = torch.get_num_threads()
    head_tokens = args.batch * args.length * args.heads
    floor_us = 1e6 * 5 * args.size**2 / multiply_adds_a_second()
    forward_us = 1e3 * ms["cpu forward"] * threads / head_tokens
    both = ms["cpu forward + backward"]
    figures = {
        "forward_vs_token_loop": ms["token loop forward"] / ms["cpu forward"],
        "forward_vs_chunked": ms["chunked forward"] / ms["cpu forward"],
        "both_vs_chunked": ms["chunked forward + backward"] / both,
        "read_and_meta_vs_wkv7": (ms["cpu layer forward + backward"] - both) / both,
        "forward_us_a_head_token_core": forward_us,
        "floor_us_a_head_token_core": floor_us,
        "forward_vs_floor": forward_us / floor_us,
    }
    sizes = f"batch {args.batch}, T {args.length}, H {args.heads}, N {args.size}"
    print(f"{sizes}, float32, {threads} threads, medians of {args.rounds} rounds in turn\n")
    for name, value in ms.items():
        print(f"{name:34s} {value:9.2f} ms")
    print()
    for name, value in figures.items():
        print(f"{name:34s} {value:9.2f}")
    report = {"bench": "ops", **vars(args), "threads": threads, "ms": ms, **figures}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
