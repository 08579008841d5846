"""RWKV-7 checkpoints as its authors publish them: one `.pth` file, read and written bit by bit.

A `.pth` is a zip archive of a pickle and one entry a tensor. A pickle can run code, so the names
that it asks for are checked before torch's restricted reader sees it, and nothing but tensors may
come out. Keys and layouts: `emb.weight`, `blocks.0.ln0`, `blocks.N.{ln1,ln2,att,ffn}`, `ln_out`,
`head.weight`; matrices [out, in] as in nn.Linear, low-rank factors [in, out], vectors [1, 1, D].

Source: RWKV-7, arXiv:2503.14456, and its training code's state dict.
"""

from __future__ import annotations

import difflib
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from metastate.config import ModelConfig
from metastate.data.files import atomic_write
from metastate.errors import CheckpointError, ConfigError
from metastate.mapping import unknown_key_message
from metastate.model.io import check_finite, one_dtype
from metastate.model.lm import LanguageModel, sketch

# What the pickle of a file of plain tensors may ask for, besides torch's storage types.
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Theirs and ours, in a block; `time_mix.mu` is the six mixes in this order.
MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
LOW_RANK = {"w": "decay", "a": "icl_rate", "v": "value_mix", "g": "gate"}
BLOCK = {
    **{f"{ln}.{x}": f"{ln}.{x}" for ln in ("ln1", "ln2") for x in ("weight", "bias")},
    **{f"att.{letter}1": f"time_mix.{name}.A" for letter, name in LOW_RANK.items()},
    **{f"att.{letter}2": f"time_mix.{name}.B" for letter, name in LOW_RANK.items()},
    **{f"att.{letter}0": f"time_mix.{LOW_RANK[letter]}.bias" for letter in "wav"},
    **{f"att.{name}": f"time_mix.{name}" for name in ("k_k", "k_a", "r_k")},
    **{
        f"att.{name}.weight": f"time_mix.{name}.weight"
        for name in ("receptance", "key", "value", "output")
    },
    **{f"att.ln_x.{x}": f"time_mix.norm.{x}" for x in ("weight", "bias")},
    "ffn.x_k": "channel_mix.mu",
    **{f"ffn.{name}.weight": f"channel_mix.{name}.weight" for name in ("key", "value")},
}
VECTORS = ("att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "ffn.x_k")  # [1, 1, D] there
VALUE_MIX = ("att.v0", "att.v1", "att.v2")
UNUSED = tuple(f"blocks.0.{key}" for key in VALUE_MIX)  # in many files, read by nobody


def read(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, allow_nan: bool = False
) -> tuple[LanguageModel, dict[str, Tensor]]:
    """Read an RWKV-7 `.pth` file; its tensors stay mapped from disk where they keep their dtype.

    Args:
        path: the file.
        dtype: of the model; None keeps the file's.
        allow_nan: take weights that are NaN or infinite.

    Returns:
        The model, and what the file holds for `UNUSED`: nothing computes with it, but `write` takes
        it back so that the way there and back is exact.

    Raises:
        CheckpointError: the file is missing, damaged, no RWKV-7 checkpoint, asks for code to be
            run, or holds weights that are not finite, or beyond the range of `dtype`.
    """
    tensors = _load(Path(path))
    config = infer_config(tensors, path)
    tensors = one_dtype(tensors, dtype, path)
    if not allow_nan:
        check_finite(tensors, path)
    unused = {key: tensors.pop(key) for key in UNUSED if key in tensors}
    model = sketch(config)
    model.load_state_dict(from_rwkv(tensors, config.num_layers), assign=True)
    return model, unused


def write(
    model: LanguageModel, path: str | os.PathLike[str], unused: Mapping[str, Tensor] | None = None
) -> None:
    """Write `model` as an RWKV-7 `.pth` file, atomically, in its own dtype.

    Args:
        model: an rwkv7 of the published shape.
        path: the file.
        unused: of `read`, written again as it was.

    Raises:
        ConfigError: RWKV-7 has no keys for something in the model.
        CheckpointError: the disk is full or the system refuses.
    """
    tensors = to_rwkv(model) | {key: x for key, x in (unused or {}).items() if key in UNUSED}
    # Copies: a view would be written with all of the memory that it is a part of.
    plain = {key: x.detach().cpu().clone() for key, x in tensors.items()}

    def content(file: BinaryIO) -> None:
        try:
            torch.save(plain, file)
        except RuntimeError as cause:  # torch hides what the system said, a full disk say
            hidden = cause.__context__
            raise hidden if isinstance(hidden, OSError) else OSError(str(cause)) from None

    atomic_write(path, content, error=CheckpointError)


def from_rwkv(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return the state dict of our rwkv7 from RWKV-7's own, without `UNUSED`."""
    out = {ours: tensors[theirs] for theirs, ours in _outer().items()}
    for i in range(num_layers):
        block = f"blocks.{i}."
        mixes = [tensors[f"{block}att.{name}"].flatten() for name in MIXES]
        out[f"{block}time_mix.mu"] = torch.stack(mixes)
        for key, name in _inner(i):
            x = tensors[block + key]
            out[block + name] = x.flatten() if key in VECTORS else x
    return out


def to_rwkv(model: LanguageModel) -> dict[str, Tensor]:
    """Return RWKV-7's state dict of our rwkv7; the inverse of `from_rwkv`.

    Raises:
        ConfigError: RWKV-7 has no keys for something in the model.
    """
    config = model.config
    if config.architecture != "rwkv7":
        raise ConfigError(
            f"a {config.architecture} has layers that RWKV-7 has no keys for; only an rwkv7 can be "
            "written as RWKV-7"
        )
    if config.memory_heads:
        raise ConfigError("the model has a surprise memory, for which RWKV-7 has no keys")
    if config.parameter_tokens or config.attention_size != config.hidden_size:
        raise ConfigError(
            f"the model has parameter_tokens {config.parameter_tokens} and heads of together "
            f"{config.attention_size} channels on a width of {config.hidden_size}; RWKV-7 has no "
            "parameter tokens and heads as wide as itself, so a model grown so cannot be written"
        )
    own = {name: p.detach() for name, p in model.named_parameters()}
    out = {theirs: own[ours] for theirs, ours in _outer().items()}
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        mu = own[f"{block}time_mix.mu"]
        out |= {f"{block}att.{name}": row[None, None] for name, row in zip(MIXES, mu, strict=True)}
        for key, name in _inner(i):
            x = own[block + name]
            out[block + key] = x[None, None] if key in VECTORS else x
    return out


def infer_config(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> ModelConfig:
    """Return the configuration that RWKV-7's tensors imply, every key and shape checked.

    Raises:
        CheckpointError: a key is missing or unknown, or a shape does not fit the others.
    """
    numbers = (re.match(r"blocks\.(\d+)\.", key) for key in tensors)
    num_layers = len({number[1] for number in numbers if number})
    if any(".att.time_" in key for key in tensors):
        raise CheckpointError(f"{path} is of an older RWKV; only RWKV-7 can be read")

    def shape(key: str, dim: int) -> list[int]:
        if key not in tensors:
            raise CheckpointError(_missing(key, tensors, path))
        found = list(tensors[key].shape)
        if len(found) != dim or 0 in found:
            raise CheckpointError(f"{path}: {key} is {found}; {dim} axes are needed, none empty")
        return found

    (V, D), (H, N) = shape("emb.weight", 2), shape("blocks.0.att.r_k", 2)
    ranks = {letter: shape(f"blocks.0.att.{letter}1", 2)[1] for letter in "wag"}
    F = shape("blocks.0.ffn.key.weight", 2)[0]
    if num_layers > 1:
        ranks["v"] = shape("blocks.1.att.v1", 2)[1]
    elif UNUSED[1] in tensors:
        ranks["v"] = shape(UNUSED[1], 2)[1]
    if H * N != D:
        raise CheckpointError(f"{path}: emb.weight is {D} wide, but blocks.0.att.r_k is {[H, N]}")
    config = ModelConfig(
        architecture="rwkv7",
        vocab_size=V,
        hidden_size=D,
        num_layers=num_layers,
        num_heads=H,
        ffn_size=F,
        decay_rank=ranks["w"],
        icl_rate_rank=ranks["a"],
        value_rank=ranks.get("v"),
        gate_rank=ranks["g"],
    )
    unused = [1, 1, D], [D, ranks.get("v", 0)], [ranks.get("v", 0), D]
    needed = {key: list(x.shape) for key, x in to_rwkv(sketch(config)).items()}
    needed |= dict(zip(UNUSED, unused, strict=True))
    for key, expected in needed.items():
        if key not in tensors:
            if key not in UNUSED:
                raise CheckpointError(_missing(key, tensors, path))
        elif list(tensors[key].shape) != expected:
            raise CheckpointError(
                f"{path}: {key} is {list(tensors[key].shape)}, the other tensors need {expected}"
            )
    if unknown := sorted(tensors.keys() - needed.keys()):
        raise CheckpointError(unknown_key_message(unknown[0], list(needed), str(path)))
    return config


def _outer() -> dict[str, str]:
    """Return their and our names outside of the blocks."""
    norms = (("blocks.0.ln0", "ln0"), ("ln_out", "ln_out"))
    return {
        "emb.weight": "embedding.weight",
        **{f"{a}.{x}": f"{b}.{x}" for a, b in norms for x in ("weight", "bias")},
        "head.weight": "head.weight",
    }


def _inner(layer: int) -> Iterable[tuple[str, str]]:
    """Return their and our names in a block, its mixes left out; block 0 has no value residual."""
    return [(a, b) for a, b in BLOCK.items() if layer > 0 or a not in VALUE_MIX]


def _missing(key: str, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    near = difflib.get_close_matches(key, list(tensors), n=1)
    nearest = f"; the nearest there is {near[0]!r}" if near else ""
    return f"{path} has no {key!r}, which RWKV-7 needs{nearest}"


def _load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` file, mapped from disk; CheckpointError says what is wrong."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; an RWKV-7 checkpoint is one .pth file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path)
        found = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as cause:  # whatever a damaged archive or pickle makes the readers raise
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        raise CheckpointError(
            f"{path} is no whole .pth file ({reason}); it is damaged, cut off or something else: "
            "fetch it again"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, no tensors by name")
    for key, x in found.items():
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or not x.is_cpu:
            raise CheckpointError(f"{path}: {key} is no plain tensor")
        if x.dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise CheckpointError(f"{path}: {key} is {x.dtype}; allowed: {allowed}")
    if sum(x.numel() * x.element_size() for x in found.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors overlap; an RWKV-7 checkpoint's do not")
    return {key: x.detach() for key, x in found.items()}


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Check, before torch reads it, that an archive is whole and that its pickle runs nothing."""
    entries = archive.infolist()
    pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip archive but no .pth file: {len(pickles)} data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed inside, which no .pth file is")
    for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
        is_name = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL")
        is_storage = re.fullmatch(r"torch \w+Storage", str(argument)) is not None
        if is_name and argument not in NAMES and not is_storage:
            name = str(argument).replace(" ", ".")
            raise CheckpointError(
                f"{path} asks for {name}, which no file of plain tensors needs; nothing was run"
            )
    if (bad := archive.testzip()) is not None:
        raise CheckpointError(f"{path} is damaged: {bad} is not what was written; fetch it again")
