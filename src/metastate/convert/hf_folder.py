"""Hugging Face folders of our models, written and read without transformers, bit by bit.

A folder holds `config.json` (`model_type` metastate, our ModelConfig under `model`),
`model.safetensors` (our parameter names behind `model.`), what AutoTokenizer needs, and a small
`modeling_metastate.py`, with which `trust_remote_code=True` finds the classes of
metastate.convert.hf. RWKV-7 folders of flash-linear-attention's layout are read and written too.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch

from metastate.config import ModelConfig
from metastate.convert import fla
from metastate.data.files import atomic_write, replacing, write_json, write_tensors
from metastate.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from metastate.errors import CheckpointError, ConfigError
from metastate.mapping import from_dict, to_dict
from metastate.model.io import (
    adopt_record,
    check_extent,
    check_finite,
    check_tensors,
    check_tokenizer,
    one_dtype,
    read_tensors,
)
from metastate.model.lm import LanguageModel, sketch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
MODEL_TYPE = "metastate"
PREFIX = "model."  # MetaStateForCausalLM holds the LanguageModel under this name
MODELING = "modeling_metastate"
CLASSES = {
    "AutoConfig": "MetaStateConfig",
    "AutoModelForCausalLM": "MetaStateForCausalLM",
}
AUTO_MAP = {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()}
WORLD = "MetaStateWorldTokenizer"
AUTO_TOKENIZER = {"AutoTokenizer": [f"{MODELING}.{WORLD}", None]}
END = "<|endoftext|>"  # what the byte tokenizer's id 0 is called there


def to_hf(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    layout: Literal["metastate", "fla"] = "metastate",
    allow_nan: bool = False,
) -> None:
    """Write `model` as a Hugging Face folder; `from_hf` gives it back bit by bit.

    Args:
        model: of any architecture and dtype; its lineage, step and tokenizer record go along.
        folder: made if it is missing; files of the same names are replaced once all new ones are
            whole, and weights in several files there are removed with their index.
        tokenizer: the model's own. None: the one that the model records, from where it was read;
            a model that records none gets no tokenizer files.
        layout: `fla` writes an rwkv7 as flash-linear-attention's RWKV7ForCausalLM, with the weights
            as they are and without lineage, step and tokenizer record.
        allow_nan: write weights that are NaN or infinite.

    A tokenizer.json is copied as it is, raw bytes are written as an equivalent tokenizer.json. RWKV
    World, whose greedy match no tokenizer.json can say, becomes a class of metastate.convert.hf.

    Raises:
        CheckpointError: a weight is not finite, or the folder cannot be written.
        DataError: the recorded tokenizer's file is gone. ConfigError: the tokenizer is another one
            than the model's, or the layout is unknown or cannot say what the model computes.
    """
    folder = Path(folder)
    if layout not in ("metastate", "fla"):
        raise ConfigError(f"layout is {layout!r}; allowed: metastate, fla")
    if not allow_nan:
        check_finite(model.state_dict(), "the model")
    if tokenizer is None and model.tokenizer_info is not None:
        tokenizer = load_tokenizer(model.tokenizer_info)
    elif tokenizer is not None:
        check_tokenizer(model, tokenizer)
    info = model.tokenizer_info if tokenizer is None else tokenizer.info()
    if layout == "fla":
        config, tensors = fla.to_fla(model)
        # fla's embedding never learns the row of `pad_token_id`, which here begins every document.
        config |= token_ids(info) | {"pad_token_id": None}
    else:
        tensors = {PREFIX + name: x for name, x in model.state_dict().items()}
        config = {
            "architectures": [CLASSES["AutoModelForCausalLM"]],
            "auto_map": AUTO_MAP,
            "model_type": MODEL_TYPE,
            **config_fields(model, info),
        }
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    with replacing(folder, CONFIG, error=CheckpointError) as new:
        write_tensors(new / WEIGHTS, tensors, {"format": "pt"}, error=CheckpointError)
        if tokenizer is not None:
            write_tokenizer(tokenizer, new)
        if layout == "metastate":
            write_modeling(new)
        write_json(new / CONFIG, config, error=CheckpointError)
    _drop_shards(folder)


def from_hf(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    allow_nan: bool = False,
) -> LanguageModel:
    """Return the model of a Hugging Face folder that `to_hf` or `save_pretrained` wrote.

    Weights may be cut into several files. Lineage and tokenizer record come along. An RWKV-7 of
    flash-linear-attention's layout becomes an rwkv7; it records no tokenizer.

    Args:
        folder: see above.
        dtype: of the model; None keeps that of the weights, all of which must then have one.
        allow_nan: take weights that are NaN or infinite.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or of another model, the config has
            unknown keys or is newer than this program, or a weight is not finite or beyond the
            range of `dtype`.
    """
    folder = Path(folder)
    info = read_hf_config(folder)
    weights = one_dtype(read_weights(folder), dtype, folder)
    try:
        if info["model_type"] in fla.MODEL_TYPES:
            config, found = fla.from_fla(info, weights)
            info = {}
        else:
            config, found = from_dict(ModelConfig, info["model"], "model"), _unprefixed(weights)
    except (CheckpointError, ConfigError) as cause:
        raise CheckpointError(f"{folder}: {cause}") from None
    check_extent(found, config, folder)
    model = sketch(config)
    check_tensors(found, dict(model.state_dict()), folder)
    model.load_state_dict(found, assign=True)
    adopt_record(model, info, folder / CONFIG)
    if not allow_nan:
        check_finite(model.state_dict(), folder)
    return model


def _unprefixed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a MetaStateForCausalLM by the names that its LanguageModel has."""
    for name in weights:
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{name!r} is no weight of ours, which begin with {PREFIX!r}")
    return {name.removeprefix(PREFIX): x for name, x in weights.items()}


def config_fields(model: LanguageModel, info: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a MetaStateConfig holds of `model`; `info` is its tokenizer's record."""
    return {
        "model": to_dict(model.config),
        "lineage": model.lineage,
        "step": model.step,
        "tokenizer": info,
        **token_ids(info),
    }


def token_ids(info: dict[str, Any] | None) -> dict[str, int | None]:
    """Return the ids that transformers asks for: a tokenizer's end of document is all of them."""
    end = None if info is None else info["eod_id"]
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a Hugging Face folder of ours, `model` not yet checked.

    Raises:
        CheckpointError: it is missing, broken, or of another model type.
    """
    file = folder / CONFIG
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no Hugging Face folder at {folder}: no config.json there") from None
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{file} cannot be read ({cause}); the folder is corrupt") from None
    found = info.get("model_type") if isinstance(info, dict) else None
    if found not in (MODEL_TYPE, *fla.MODEL_TYPES) or (found == MODEL_TYPE and "model" not in info):
        raise CheckpointError(
            f"{file} has model_type {found!r}; readable are {MODEL_TYPE!r} (with a key 'model') "
            f"and flash-linear-attention's {fla.MODEL_TYPES[0]!r}"
        )
    return info


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of model.safetensors, or else of the files that an index names."""
    whole = folder / WEIGHTS
    if whole.exists() or not (folder / INDEX).exists():
        return read_tensors(whole)
    out: dict[str, torch.Tensor] = {}
    for file in _shards(folder / INDEX):
        out |= read_tensors(file)
    return out


def _shards(index: Path) -> list[Path]:
    """Return the files of weights that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(f"{index} cannot be read ({cause!r}); it is corrupt") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is no file of its own folder")
    return [index.parent / name for name in names]


def _drop_shards(folder: Path) -> None:
    """Remove the weights in several files that model.safetensors has replaced, and their index."""
    index, shards = folder / INDEX, []
    with contextlib.suppress(CheckpointError):  # no index, or a broken one, names no file
        shards = [f for f in _shards(index) if f.suffix == ".safetensors" and f.name != WEIGHTS]
    try:
        for file in (index, *shards):
            file.unlink(missing_ok=True)
    except OSError as cause:
        raise CheckpointError(f"{cause.filename} is of older weights and stays: {cause}") from cause


def write_modeling(folder: str | os.PathLike[str]) -> None:
    """Write the module that `trust_remote_code=True` imports; it imports metastate."""
    names = [*CLASSES.values(), WORLD]
    text = (
        '"""For transformers with trust_remote_code=True; needs pip install '
        '\'metastate[hf]\'."""\n\n'
        f"from metastate.convert.hf import {', '.join(names)}\n\n"
        f"__all__ = {names}\n"
    )
    atomic_write(Path(folder) / f"{MODELING}.py", text.encode(), error=CheckpointError)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files from which AutoTokenizer makes `tokenizer`.

    There its end of document also pads. Text that spells the end of document stays text, as it
    does here. A tokenizer.json is copied bit by bit: whether it begins a text with a token is its
    own affair, while bytes and RWKV World begin it with the end of document.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    tokenizer.save(folder)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    end = END
    if tokenizer.kind == "bytes":
        write_json(folder / "tokenizer.json", byte_tokenizer_json(), error=CheckpointError)
    elif tokenizer.kind == "world":
        settings = {"tokenizer_class": WORLD, "auto_map": AUTO_TOKENIZER}
        write_modeling(folder)
    else:
        found = JsonTokenizer((folder / "tokenizer.json").read_bytes(), tokenizer.name)
        end = str(found.id_to_token(found.eod_id))
    settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), end) | {
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings, error=CheckpointError)


def byte_tokenizer_json() -> dict[str, Any]:
    """Return a tokenizer.json with the ids of ByteTokenizer: byte b is id b, NUL is dropped.

    A text begins with the end of document, as in training, unless `add_special_tokens=False`.

    Byte-level BPE without merges. GPT-2's alphabet gives every byte a printable character: itself
    where it is printable in Latin-1, else the next one from U+0100 on. Byte 0 never occurs, so its
    id is the end of document's.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {END: 0} | {alphabet[b]: b for b in range(1, 256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    begin = {"SpecialToken": {"id": END, "type_id": 0}}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END, **special, "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": "\0"}, "content": ""},
        "pre_tokenizer": {**byte_level, "trim_offsets": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, *({"Sequence": {"id": i, "type_id": 0}} for i in "AB")],
            "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
        },
        "decoder": {**byte_level, "trim_offsets": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
