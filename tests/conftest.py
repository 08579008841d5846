"""Shared fixtures."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from metastate.data.prepare import prepare

# The same examples in every run: what fails fails again. `make explore` draws others.
settings.register_profile("same", derandomize=True, print_blob=True, deadline=None)
settings.register_profile("explore", print_blob=True, deadline=None)
settings.load_profile("same")


def pytest_configure(config):
    """Interpret the GPU kernels on the CPU, unless this run is for a GPU (`-m gpu`)."""
    if config.option.markexpr != "gpu":  # Triton looks once, when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
    if hasattr(config, "workerinput"):  # one of several processes: a share of the cores for each
        share = max(1, torch.get_num_threads() // config.workerinput["workercount"])
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)  # of the processes that tests start
    # What a shell starts with `&` ignores Ctrl-C, what nohup starts SIGHUP, and so would all that
    # the tests start, and send both to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item):
    """Tests marked `gpu` need one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def few_words(tmp_path_factory):
    """Forty short texts of a few words, prepared as bytes, a fifth of them held out."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "state", "reads", "the", "state", "and", "writes", "what", "it", "reads"]
    draw = random.Random(0)
    for i in range(40):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(3, 40)))
        (folder / f"{i}.txt").write_text(text)
    prepare([folder], "bytes", folder / "data", fractions=(0.8, 0.2, 0.0))
    return folder / "data"


@pytest.fixture
def disk_order(monkeypatch):
    """A list that grows by the inode of what is fsynced and the new name of what is renamed."""
    order, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        order.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(old, new):
        order.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return order
