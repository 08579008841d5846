"""Compile every GPU kernel for a compute capability, without a device; say what it takes.

python tests/ops/compile_kernels.py 90 64      capability 9.0, head size 64
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metastate.ops import triton as backend
from metastate.ops import triton_backward, triton_kernels

SHARED_BYTES = 99 * 1024  # what a program may have on the smallest GPUs of capability 8.6 and 8.9
STACK_BYTES = 2048  # of a thread: what did not fit its registers
HALF = ("x_", "r_", "k_", "v_", "kappa_", "a_", "g_", "h_", "dv_", "dk_", "dkappa_", "da_", "y_")


def compile_kernel(kernel, capability, size, dtype):
    """Return the bytes of shared memory that `kernel` takes, and of a thread's stack."""
    tile, whole, rows = backend.tile_sizes(size, dtype == "bf16")
    a_state = "BV" in kernel.arg_names
    double = dtype == "fp64"
    exact = "ieee" if double else "tf32x3"
    constants = {
        **{"N": size, "C": backend.CHUNK, "LEVELS": 5, "TWO": True, "SOLVE": exact},
        **{"BK": whole if a_state else tile, "BV": rows},
        "DTYPE": tl.float64 if double else tl.float32,
        "PRECISION": "tf32" if dtype == "bf16" else exact,
    }
    signature, given, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], given[(i,)] = "constexpr", constants[name]
        elif name in triton_kernels.COUNTS:
            signature[name] = "i32"
        else:
            aligned[(i,)] = [["tt.divisibility", 16]]
            coarse = dtype == "bf16" and name in HALF
            inputs = "fp64" if double else "fp32"
            signature[name] = "*i64" if name == "offsets_" else "*bf16" if coarse else f"*{inputs}"
    source = ASTSource(kernel, signature, constexprs=given, attrs=aligned)
    options = {
        "num_warps": backend.num_warps(constants["BK"]),
        "num_stages": 1,
        "maxnreg": backend.MAX_REGISTERS,
    }
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    tool = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return compiled.metadata.shared, int(re.search(r"STACK:(\d+)", usage)[1])


def main():
    capability, size = map(int, sys.argv[1:3])
    too_large = []
    for module in (triton_kernels, triton_backward):
        for name, kernel in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            for dtype in ("bf16", "fp32"):
                shared, stack = compile_kernel(kernel, capability, size, dtype)
                print(f"{name:24s} {dtype} {shared / 1024:.0f} KiB, stack {stack} B", flush=True)
                if shared > SHARED_BYTES or stack > STACK_BYTES:
                    too_large.append((name, dtype))
    sys.exit(f"too much shared memory or stack: {too_large}" if too_large else 0)


if __name__ == "__main__":
    main()
