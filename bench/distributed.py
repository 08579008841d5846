"""What many processes hold and send: bytes of a training step on two, counted and computed.

    python bench/distributed.py                the model of memory and traffic against the counts
    python bench/distributed.py --predict 8 64 what the same model says of 1.5B on 8 and 64 GPUs

Held bytes are those of the local tensors after a step; sent ones are the sizes of what PyTorch's
collectives were given, counted where they are dispatched; activations are the storages autograd
saved. With --predict nothing runs: the formulas alone, so a prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.config import ModelConfig, TrainConfig
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from metastate.train.distributed import Team
from metastate.train.optim import make_optimizer, moments

BATCH, LENGTH = 4, 128
KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
}
MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "ddp, context": {"parallel": "ddp", "context_parallel": 2},
}


def small() -> ModelConfig:
    """Return the model that is measured."""
    return preset("metastate-tiny", vocab_size=512, hidden_size=128, num_heads=2)


class Counting(TorchDispatchMode):
    """Adds up the whole size of what each collective makes equal, spreads or sums, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d" and (kind := KINDS.get(func._schema.name.split("::")[1])):
            sizes = [
                sum(x.nbytes for x in torch.utils._pytree.tree_leaves(a) if torch.is_tensor(x))
                for a in args[:2]
            ]
            self.bytes[kind] += max(sizes) if kind != "all-reduce" else sizes[0]
        return func(*args, **(kwargs or {}))


def local_bytes(tensors) -> int:  # type: ignore[no-untyped-def]
    """Return the bytes that this process holds of `tensors`."""
    return sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)


def measure(rank: int, store: str, mode: str, out: str) -> None:
    """Make two steps and write down the second one's figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = TrainConfig(context=LENGTH, batch_size=BATCH, **MODES[mode])
    team = Team(config, torch.device("cpu"), rank, 2)
    torch.manual_seed(0)
    model = LanguageModel(small())
    model.backend = "chunked"
    team.shard(model)
    optimizer = make_optimizer(model, config)
    objective = team.objective(model)
    rows = BATCH // team.data_size
    tokens = torch.randint(0, 512, (rows, LENGTH + 1))
    for _ in range(2):
        optimizer.zero_grad()
        saved: dict[int, int] = {}

        def pack(x: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if not hasattr(x, "full_tensor"):
                storage = x.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        with Counting() as counting, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = objective(
                team.columns(tokens[:, :-1]), team.columns(tokens[:, 1:]), group=team.group
            ).loss
            loss.backward()
        optimizer.step()
    whole = {p.data_ptr() for p in model.parameters()} if mode != "fsdp" else set()
    figures = {
        "parameters": local_bytes(model.parameters()),
        "gradients": local_bytes(p.grad for p in model.parameters()),
        "moments": local_bytes(x for k, x in moments(optimizer).items() if k[:4] != "step"),
        "activations a token": sum(n for at, n in saved.items() if at not in whole)
        / (rows * LENGTH / config.context_parallel),
        **counting.bytes,
    }
    if rank == 0:
        with open(out, "w") as file:
            json.dump(figures, file)
    dist.barrier()
    dist.destroy_process_group()


def computed(config: ModelConfig, mode: str, ranks: int, rows: int) -> dict[str, float]:
    """Return the model of memory and traffic: bytes of one of `ranks` processes in a step."""
    with torch.device("meta"):
        model = LanguageModel(config)
    whole = 4 * sum(p.numel() for p in model.parameters())
    blocks = 4 * sum(p.numel() for p in model.blocks.parameters())
    part = whole / ranks if mode == "fsdp" else whole
    out = {"parameters": part, "gradients": part, "moments": 2 * part}
    if mode == "fsdp":  # blocks forward and backward, the rest once
        out |= {"all-gather": whole + blocks, "reduce-scatter": whole}
    else:
        out["all-reduce"] = whole
    if mode == "ddp, context":
        D, L, N = config.hidden_size, config.num_layers, config.head_size
        assert N is not None
        shifts = 1 + (config.hidden_channels > 0)  # layers that look one token back
        memories = 1 + (config.meta_state.readout != "encoding")
        handed = 4 * ranks * rows * L * (memories * 2 * config.num_heads * N * N + shifts * D)
        if config.memory_heads:  # its M, and two vectors of the token before
            handed += 4 * ranks * rows * (2 * D * D // config.memory_heads + 2 * D)
        out |= {"all-gather": handed, "reduce-scatter": handed}
    return out


def predict(ranks: int) -> dict[str, float]:
    """Return GiB of one of `ranks` GPUs that train metastate-1.5b by FSDP, sent ones a step."""
    config = preset("metastate-1.5b")
    GiB = 2**30
    found = {k: v / GiB for k, v in computed(config, "fsdp", ranks, 1).items()}
    with torch.device("meta"):
        model = LanguageModel(config)
    block = 4 * max(sum(p.numel() for p in b.parameters()) for b in model.blocks)
    outer = 4 * sum(p.numel() for n, p in model.named_parameters() if n.split(".")[0] != "blocks")
    # Two blocks at a time, one in use and the next, and the outer weights; gradients of both.
    return found | {"gathered": 2 * (2 * block + outer) / GiB}


def main() -> None:
    """Print a table for people, then one JSON line for scripts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predict", type=positive, nargs="+", metavar="GPUS")
    args = parser.parse_args()
    if args.predict:
        rows = {str(n): predict(n) for n in args.predict}
        for n, row in rows.items():
            print(
                f"{n} GPUs (prediction, GiB): " + ", ".join(f"{k} {v:.2f}" for k, v in row.items())
            )
        print(json.dumps(rows))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {}
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (f"{folder}/store", mode, f"{folder}/out"), nprocs=2)
            with open(f"{folder}/out") as file:
                found = json.load(file)
        rows = BATCH if "context" in mode else BATCH // 2
        expected = computed(small(), mode, 2, rows)
        print(f"\n{mode:24}{'counted':>14}{'computed':>14}{'ratio':>9}")
        for key, n in found.items():
            known = expected.get(key)
            tail = "" if known is None else f"{known:14,.0f}{n / known:9.3f}"
            print(f"{key:24}{n:14,.0f}{tail}")
        results[mode] = {"counted": found, "computed": expected}
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(exit_code(main))
