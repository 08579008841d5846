"""Checkpoints: a folder of `model.safetensors` and `config.json`; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import safetensors
import safetensors.torch
import torch

from metastate.config import ModelConfig, from_dict, to_dict
from metastate.data.files import atomic_write, write_json
from metastate.data.tokenizer import Tokenizer, load_tokenizer
from metastate.errors import CheckpointError, ConfigError
from metastate.model import presets
from metastate.model.lm import LanguageModel

FORMAT = "metastate"
VERSION = 1
# The weights hash of each model, and what its weights looked like then.
_HASHES: WeakKeyDictionary[LanguageModel, tuple[list[Any], str]] = WeakKeyDictionary()
# The tensors of each model that `load` made as its file has them: mapped from there, so that
# keeping them takes no memory.
_STORED: WeakKeyDictionary[LanguageModel, dict[str, torch.Tensor]] = WeakKeyDictionary()


def save(model: LanguageModel, path: str | os.PathLike[str]) -> None:
    """Write `model` to the folder `path` as model.safetensors and config.json, each atomically.

    Raises:
        CheckpointError: the disk is full or the system refuses; the previous file is untouched.
    """
    write_tensors(model.state_dict(), Path(path) / "model.safetensors")
    write_record(record(model), Path(path))


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a model's tensors to `file`; the errors of `save`."""
    content = safetensors.torch.save(dense(tensors), {"format": FORMAT})
    atomic_write(file, content, error=CheckpointError)


def dense(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous."""
    return {k: x.detach().contiguous().cpu() for k, x in tensors.items()}


def record(model: LanguageModel) -> dict[str, Any]:
    """Return what config.json says of a model."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": to_dict(model.config),
        "lineage": list(model.lineage),
        "step": model.step,
        "tokenizer": model.tokenizer_info,
    }


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write `record` to config.json in `folder`; the errors of `save`."""
    write_json(folder / "config.json", record, error=CheckpointError)


def weights_hash(model: LanguageModel) -> str:
    """Return the SHA-256 of a model's weights, names and shapes included, in hexadecimal.

    A model that `load` made has the hash of the weights in its file as long as its own are these,
    in whatever number format: what was made in float32 fits the same checkpoint in bfloat16. Which
    it is, is seen by comparing them, so that no change of the weights goes by.

    Kept for each model and made again when the weights have changed. Fused optimizers do not raise
    a tensor's version counter, so the sum of its bits is compared too: one pass at the speed of
    memory, a fifteenth of the time of the hash on a CPU.
    """
    tensors = {name: x.detach() for name, x in sorted(model.state_dict().items())}
    marks = [(name, x.dtype, *_mark(x)) for name, x in tensors.items()]
    known = _HASHES.get(model)
    if known is None or known[0] != marks:
        stored = _STORED.get(model)
        if stored is not None and _is_cast(stored, tensors):
            tensors = {name: stored[name] for name in tensors}
        digest = hashlib.sha256()
        for name, x in tensors.items():
            digest.update(f"{name}{list(x.shape)}{x.dtype}".encode())
            digest.update(x.cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        known = _HASHES[model] = marks, digest.hexdigest()
    return known[1]


def _is_cast(stored: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> bool:
    """Say whether each of a model's tensors is the stored one, but for device and dtype."""
    return stored.keys() == own.keys() and all(
        stored[name].shape == x.shape and torch.equal(_raw(stored[name].to(x)), _raw(x))
        for name, x in own.items()
    )


def _raw(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, [num_bytes] uint8."""
    return x.contiguous().view(-1).view(torch.uint8)


def _mark(x: torch.Tensor) -> tuple[int, int]:
    """Return the version of a tensor and the sum of its bits, eight bytes at a time."""
    raw = _raw(x)
    if raw.storage_offset() % 8:
        raw = raw.clone()  # a view of eight bytes must begin at a multiple of eight
    whole = len(raw) // 8 * 8
    total = int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())
    return 0 if x.is_inference() else x._version, total


def load(
    path_or_preset: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> LanguageModel:
    """Return a trained model from a checkpoint folder, or a fresh one from the name of a preset.

    The folder of a training run stands for its last checkpoint.

    Raises:
        CheckpointError: nothing is there, or it is truncated, corrupt, foreign or newer than this
            program.
    """
    path = Path(path_or_preset)
    if not path.exists() and str(path_or_preset) in presets.NAMES:
        return LanguageModel(presets.preset(str(path_or_preset))).to(device)
    info, path = read_config(path), checkpoint_folder(path)
    with torch.device("meta"):
        model = LanguageModel(info["model"])
    tensors = read_tensors(path / "model.safetensors")
    check_tensors(tensors, dict(model.state_dict()), path / "model.safetensors")
    model.load_state_dict(tensors, assign=True)
    adopt_record(model, info)
    _STORED[model] = tensors
    return model.to(device)


def adopt_record(model: LanguageModel, info: dict[str, Any]) -> None:
    """Give `model` what a checkpoint's config.json says of its weights."""
    model.lineage, model.step = info.get("lineage") or [], info.get("step") or 0
    model.tokenizer_info = info.get("tokenizer")


def tokenizer_of(model: LanguageModel, path: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer of a checkpoint at `path`; its vocabulary may lie in the run's folder.

    Raises:
        CheckpointError: the checkpoint names none. DataError: its file is gone, or another one.
    """
    if model.tokenizer_info is None:
        raise CheckpointError(
            f"{path} does not say which tokenizer it was trained with; `metastate convert --to "
            "metastate --tokenizer ...` writes a copy that does"
        )
    folder = Path(path).absolute().resolve()
    return load_tokenizer(model.tokenizer_info, [folder, *folder.parents[:2]])


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that holds a checkpoint: `path`, or the last one of the run in `path`."""
    path = Path(path)
    is_run = not (path / "config.json").exists() and (path / "last" / "config.json").exists()
    return path / "last" if is_run else path


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a checkpoint's config.json with `model` as a ModelConfig.

    Raises:
        CheckpointError: as `load`.
    """
    path = Path(path)
    file = checkpoint_folder(path) / "config.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        hint = (
            "" if path.exists() else f" and no preset has that name ({presets.nearest(str(path))})"
        )
        raise CheckpointError(f"no checkpoint at {path}: no config.json there{hint}") from None
    except (OSError, ValueError) as cause:
        raise CheckpointError(
            f"{file} cannot be read ({cause}); the checkpoint is corrupt"
        ) from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no metastate checkpoint's config")
    if not isinstance(info.get("version"), int) or info["version"] > VERSION:
        raise CheckpointError(
            f"{file} has version {info.get('version')}, this program reads up to {VERSION}; "
            "install a newer metastate"
        )
    try:
        info["model"] = from_dict(ModelConfig, info.get("model"), "model")
    except ConfigError as cause:
        raise CheckpointError(f"{file}: {cause}") from None
    return info


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return a safetensors file's tensors; CheckpointError if it is missing, cut or corrupt."""
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; the checkpoint is not whole") from None
    except (safetensors.SafetensorError, OSError) as cause:
        raise CheckpointError(
            f"{file} is no whole safetensors file ({cause}); it is corrupt or cut off: use another "
            "checkpoint"
        ) from None


def check_tensors(
    found: dict[str, torch.Tensor], needed: dict[str, torch.Tensor], file: Path
) -> None:
    """Raise CheckpointError unless `found` has exactly the names and shapes of `needed`."""
    for name, x in needed.items():
        if name not in found:
            raise CheckpointError(f"{file} has no tensor {name!r}; it is of another model")
        if found[name].shape != x.shape:
            raise CheckpointError(
                f"{file}: {name} is {list(found[name].shape)}, the config needs {list(x.shape)}"
            )
        if not found[name].is_floating_point():
            raise CheckpointError(f"{file}: {name} is {found[name].dtype}, not floating point")
    extra = sorted(found.keys() - needed.keys())
    if extra:
        raise CheckpointError(f"{file} holds {extra[0]!r}, which this model does not have")


def check_finite(tensors: Mapping[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a value is NaN or infinite; `where` they are from, for people."""
    for name, x in tensors.items():
        bad = 0 if x.is_meta else x.numel() - int(x.isfinite().sum())
        if bad:
            raise CheckpointError(
                f"{where}: {name} ({str(x.dtype).removeprefix('torch.')}) has {bad:,} values that "
                "are NaN or infinite; training diverged or the file is damaged: take another "
                "(`metastate convert --allow-nan` takes it as it is)"
            )
