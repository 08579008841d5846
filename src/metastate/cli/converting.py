"""`metastate convert`: checkpoints of other programs to ours and back."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from metastate.cli.progress import log, print_json
from metastate.convert import blinkdl
from metastate.convert.hf_folder import from_hf, to_hf
from metastate.data.files import check_free, whole_folder, write_tensors
from metastate.data.tokenizer import Tokenizer, is_vocabulary, load_tokenizer
from metastate.errors import CheckpointError, ConfigError
from metastate.model.io import (
    check_finite,
    checkpoint_folder,
    load,
    one_dtype,
    pinned,
    read_config,
    read_tensors,
    save,
    tokenizer_of,
)
from metastate.model.lm import LanguageModel

UNUSED = "unused.safetensors"  # what an RWKV-7 file holds and nothing computes with


def run_convert(args: argparse.Namespace) -> None:
    """Read SRC as what it is, write it as what is asked for, and say what it was."""
    source, out = checkpoint_folder(args.source), Path(args.out)
    check_free(out)
    kind, target = kind_of(source), args.to or "metastate"
    if kind == "metastate" and args.to is None:
        raise ConfigError(f"{source} is ours already; --to says what to make of it")
    if args.tokenizer and target == "rwkv":
        raise ConfigError("--tokenizer is for folders; a .pth file has no place for it")
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    model, unused = read(kind, source, dtype, args.allow_nan)
    tokenizer = tokenizer_for(model, source, args.tokenizer)
    write(target, model, unused, tokenizer, out)
    facts = {
        "out": str(out),
        "from": kind,
        "to": target,
        "architecture": model.config.architecture,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "parameters": model.count_parameters()["total"],
        "tokenizer": tokenizer.name if tokenizer else None,
    }
    if args.json:
        print_json(facts)
        return
    c = model.config
    print(
        f"{out}: {c.architecture}, {facts['parameters']:,} parameters in {facts['dtype']}, "
        f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads of {c.head_size}, "
        f"vocabulary {c.vocab_size:,}"
    )
    if target == "metastate" and tokenizer is None:
        log("no tokenizer recorded (--tokenizer): it can be evaluated and trained, not talk")


def kind_of(source: Path) -> str:
    """Return the format of SRC: `rwkv`, `hf` or `metastate`.

    Raises:
        CheckpointError: it is none.
    """
    if source.is_file() and source.suffix in (".safetensors", ".gguf"):
        raise CheckpointError(
            f"{source} is a {source.suffix} file; readable are an RWKV-7 .pth file, a Hugging Face "
            "folder with its config.json, and a checkpoint folder of ours"
        )
    if source.is_file() or source.suffix == ".pth":
        return "rwkv"
    with contextlib.suppress(OSError, ValueError):
        info = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if isinstance(info, dict) and "model_type" in info:
            return "hf"
    read_config(source)
    return "metastate"


def read(
    kind: str, source: Path, dtype: torch.dtype | None, allow_nan: bool
) -> tuple[LanguageModel, dict[str, Tensor]]:
    """Return the model of SRC, and the tensors that travel with it to a file of the same kind."""
    if kind == "rwkv":
        return blinkdl.read(source, dtype=dtype, allow_nan=allow_nan)
    if kind == "hf":
        return from_hf(source, dtype=dtype, allow_nan=allow_nan), {}
    folder = pinned(source)
    model = load(folder, dtype=dtype)
    file = folder / UNUSED
    unused = one_dtype(read_tensors(file), dtype, file) if file.exists() else {}
    if not allow_nan:
        check_finite(model.state_dict(), source)
    return model, unused


def tokenizer_for(model: LanguageModel, source: Path, spec: str | None) -> Tokenizer | None:
    """Return the tokenizer that `spec` names, or the model's own, and record it in the model.

    Raises:
        ConfigError: its vocabulary is not the model's.
    """
    if spec is None:
        return tokenizer_of(model, source) if model.tokenizer_info is not None else None
    tokenizer = load_tokenizer(spec)
    if not is_vocabulary(model.config.vocab_size, tokenizer.num_ids):
        raise ConfigError(
            f"tokenizer {tokenizer.name!r} has a vocabulary of {tokenizer.num_ids:,}, the model "
            f"one of {model.config.vocab_size:,}; give the one that the model was trained with"
        )
    model.tokenizer_info = tokenizer.info()
    return tokenizer


def write(
    target: str,
    model: LanguageModel,
    unused: dict[str, Tensor],
    tokenizer: Tokenizer | None,
    out: Path,
) -> None:
    """Write DST, whole or not at all; NaN was refused when it was read."""
    if target == "rwkv":
        blinkdl.write(model, out, unused)
        return
    if unused and target != "metastate":
        log(
            f"left out: {', '.join(sorted(unused))}, which RWKV-7 never uses and a Hugging Face "
            "folder has no place for; a .pth file made from it will not hold them"
        )
    with whole_folder(out, error=CheckpointError) as temporary:
        if target != "metastate":
            layout: Literal["metastate", "fla"] = "fla" if target == "fla" else "metastate"
            to_hf(model, temporary, tokenizer, layout=layout, allow_nan=True)
            return
        save(model, temporary)
        if unused:
            write_tensors(temporary / UNUSED, unused, error=CheckpointError)
        if tokenizer is not None:
            tokenizer.save(temporary)
