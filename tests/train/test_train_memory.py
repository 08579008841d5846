"""Freed memory is kept where the C library can."""

import platform
import subprocess
import sys
import textwrap

import pytest

from metastate.train.memory import keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"


def test_says_whether_it_could_be_set():
    assert keep_freed_memory() == GLIBC


@pytest.mark.skipif(not GLIBC, reason="other C libraries have no mallopt")
def test_later_steps_touch_few_new_pages():
    code = """
        import resource, torch
        from metastate.train.memory import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            kept = [torch.empty(n * 2**20).fill_(1) for n in (5, 8, 16, 9, 8, 25, 8)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        usual = [faults() for _ in range(3)][-1]
        assert keep_freed_memory()
        kept = [faults() for _ in range(12)]
        print(usual, sum(kept[-4:]) // 4)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    usual, kept = map(int, out.stdout.split())
    assert kept < 0.5 * usual
