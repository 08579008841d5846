"""Launch the GPU kernels as a GPU would have them launched, without one: compiled, never run.

python tests/ops/launch_kernels.py      says how many kernels each set of inputs compiled
"""

import contextlib
import sys

import torch
import triton
from test_parity import layer, make
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from metastate.ops import triton as backend


class Driver:
    """What Triton asks of a driver before it launches: capability 9.0."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def main():
    launch, compiled = JITFunction.run, []

    def only_compile(self, *args, warmup, **options):
        return launch(self, *args, warmup=True, **options)

    JITFunction.run = only_compile
    triton.knobs.runtime.jit_cache_hook = lambda *, repr, **_: compiled.append(repr)
    triton.runtime.driver.set_active(Driver())
    backend.INTERPRETED, backend._on = True, lambda x: contextlib.nullcontext()
    # batch, tokens, heads, lengths of packed documents
    for shape in ((2, 70, 2, None), (1, 33, 1, None), (3, 40, 16, None), (1, 70, 3, [3, 67])):
        batch, length, heads, lengths = shape
        before = len(compiled)
        inputs = make(batch, length, heads, 16, torch.bfloat16, lengths and len(lengths))
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        offsets = lengths and torch.tensor([0, *lengths]).cumsum(0)
        out = layer(leaves, offsets, "triton", "delta", "key")
        sum(x.float().sum() for x in out.values()).backward()
        print(shape, len(compiled) - before, flush=True)
        if (len(compiled) > before) != (before == 0):
            sys.exit(f"{shape} compiled {compiled[before:]}")


if __name__ == "__main__":
    main()
