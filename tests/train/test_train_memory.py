"""Freed memory is kept where the C library can."""

import platform
import subprocess
import sys
import textwrap

from metastate.train.memory import keep_freed_memory


def test_says_whether_it_could_be_set():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_second_allocation_touches_no_new_page():
    if platform.libc_ver()[0] != "glibc":
        return
    code = """
        import resource, torch
        from metastate.train.memory import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        usual = [faults() for _ in range(3)][-1]
        assert keep_freed_memory()
        kept = [faults() for _ in range(3)][-1]
        print(usual, kept)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    usual, kept = map(int, out.stdout.split())
    assert kept < 0.1 * usual
