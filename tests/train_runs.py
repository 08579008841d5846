"""Short training runs of a few words, and what they leave."""

import json
from pathlib import Path

import torch

from metastate.config import TrainConfig
from metastate.model.loss import lm_loss
from metastate.train.trainer import WALL_CLOCK


def short_run(data, folder, **defaults):
    """Return what makes the settings of a short run in a folder below `folder`."""
    common = {
        "data": str(data),
        "batch_size": 2,
        "context": 16,
        "warmup": 3,
        "backend": "chunked",
        "valid_every": 4,
    }

    def make(out="run", **changes):
        return TrainConfig(**common | defaults | {"out": str(folder / out)} | changes)

    return make


def evaluate(model):
    """Score a fixed line; draws random numbers, as no evaluation may disturb the training."""
    torch.rand(3)
    tokens = torch.tensor([list(b"the state reads the state")])
    return {"nats_per_token": float(lm_loss(model, tokens[:, :-1], tokens[:, 1:]).nll)}


def read_log(out):
    """Return what two equal runs log alike."""
    records = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in records]
