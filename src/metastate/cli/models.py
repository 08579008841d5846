"""Models as the options `--device` and `--dtype` want them, and how these draw tokens."""

from __future__ import annotations

import argparse

from metastate.errors import ConfigError
from metastate.infer.sampling import SamplingConfig
from metastate.model.decode import store_bfloat16
from metastate.model.io import check_finite, load
from metastate.model.lm import LanguageModel
from metastate.train.distributed import device_of
from metastate.train.memory import keep_freed_memory


def load_model(path: str, args: argparse.Namespace, *, decoding: bool = False) -> LanguageModel:
    """Load the checkpoint `path` as `--device` and `--dtype` say, and let the process keep memory.

    With `decoding`, `--dtype bfloat16` stores the matrices so: every token reads all of them. The
    logits of each token are checked then; else it is the weights that must be finite.
    """
    device = device_of(args.device)
    keep_freed_memory()
    model = load(path)
    if not decoding:
        check_finite(model.state_dict(), path)
    try:
        model = model.to(device)
    except RuntimeError as error:
        raise ConfigError(f"device {args.device!r} cannot take the model: {error}") from error
    if args.dtype == "float64":
        model = model.double()
    elif (args.dtype == "float32" or decoding) and model.embedding.weight.element_size() < 4:
        model = model.float()  # stored in 16 bits
    if decoding and args.dtype == "bfloat16":
        store_bfloat16(model)
    return model.eval()


def sampling_of(args: argparse.Namespace) -> SamplingConfig:
    """Return how tokens are drawn, as the options of `add_sampling` say."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return SamplingConfig(**{name: getattr(args, name) for name in names})
