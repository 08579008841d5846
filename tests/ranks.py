"""Several processes for a test: each runs the same function, none outlives its deadline."""

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _one(rank, world, store, function, args, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        results.put((rank, function(rank, *args)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(function, world, *args, timeout=120):
    """Run function(rank, *args) in `world` gloo processes; return what each returned (no tensors).

    `function` must be importable, so at the top of its module.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        started = mp.start_processes(
            _one,
            (world, f"{folder}/store", function, args, results),
            nprocs=world,
            join=False,
            start_method="spawn",
        )
        try:
            found = {}
            deadline = timeout
            while not started.join(timeout=0.2):
                while not results.empty():
                    rank, value = results.get()
                    found[rank] = value
                deadline -= 0.2
                assert deadline > 0, f"{function.__name__} took longer than {timeout} s"
            while not results.empty():
                rank, value = results.get()
                found[rank] = value
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [found[rank] for rank in range(world)]
