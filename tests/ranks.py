"""Several processes for a test: each runs the same function, none outlives its deadline."""

import os
import signal
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from metastate.train.distributed import end_groups, start_group

PATIENCE_S = 300  # guards against waiting for ever, also where many share a core


def _one(rank, world, store, function, args, results):
    torch.set_num_threads(1)
    try:
        start_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE_S),
        )
        try:
            value = function(rank, *args)
            dist.barrier()
        finally:
            end_groups()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_ranks(function, world, *args, timeout=PATIENCE_S):
    """Run function(rank, *args) in `world` gloo processes; return what each returned (no tensors).

    `function` must be importable, so at the top of its module. Where one fails, the message says
    what became of each; the others wait for it no longer than it takes them to end by themselves.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context, found = mp.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        given = (world, f"{folder}/store", function, args, results)
        processes = [context.Process(target=_one, args=(rank, *given)) for rank in range(world)]
        for process in processes:
            process.start()
        end, waits = time.monotonic() + timeout, True
        try:
            while waits and time.monotonic() < end:
                waits = any(process.is_alive() for process in processes)
                while not results.empty():
                    rank, *told = results.get()
                    found[rank] = told
                if any(process.exitcode for process in processes):
                    end = min(end, time.monotonic() + 10)  # the others may still say why
                time.sleep(0.05)
        finally:
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
                process.join()
    said = [_said(rank, code, found.get(rank)) for rank, code in enumerate(codes)]
    assert not any(said), "\n".join([f"{function.__name__}, after {timeout} s at most:", *said])
    return [found[rank][1] for rank in range(world)]


def _said(rank, code, told):
    """Return what is wrong with a process, "" where nothing is."""
    ok, value = told or (False, "it said nothing")
    if code == 0 and ok:
        return ""
    how = "still running" if code is None else f"exit code {code}"
    if code is not None and code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    return f"process {rank}, {how}: {f'it returned {value!r}' if ok else value}"
