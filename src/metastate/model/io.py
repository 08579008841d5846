"""Checkpoints: a folder of `model.safetensors` and `config.json`; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from metastate.config import ATTENTION, ModelConfig
from metastate.data.files import write_json, write_tensors
from metastate.data.tokenizer import Tokenizer, load_tokenizer
from metastate.errors import CheckpointError, ConfigError
from metastate.mapping import from_dict, to_dict
from metastate.model import presets
from metastate.model.lm import LanguageModel, sketch

FORMAT = "metastate"
VERSION = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a model has one of them
# What config.json may say of a tokenizer, besides other keys.
TOKENIZER = {"kind": str, "name": str, "sha256": str, "path": str, "vocab_size": int, "eod_id": int}
LINK = re.compile(rb"checkpoints/step-\d+")  # what a file in place of a run's link holds
CHEAP = 2**16  # values of a model that is built in no time


class Stored(dict[str, torch.Tensor]):
    """A model's tensors as its file has them, mapped from there: keeping them takes no memory."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        return self


def save(model: LanguageModel, path: str | os.PathLike[str]) -> None:
    """Write `model` to the folder `path` as model.safetensors and config.json, each atomically.

    Raises:
        CheckpointError: the weights are of several number formats; or the disk is full or the
            system refuses, and the previous file is untouched.
    """
    one_dtype(model.state_dict(), None, "the model")
    write_weights(model.state_dict(), Path(path) / "model.safetensors")
    write_record(record(model), Path(path))


def write_weights(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a model's tensors to `file`; the errors of `save`."""
    write_tensors(file, tensors, {"format": FORMAT}, error=CheckpointError)


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


def load(
    path_or_preset: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Return a trained model from a checkpoint folder, or a fresh one from the name of a preset.

    The folder of a training run stands for its last checkpoint.

    Args:
        path_or_preset: the folder or the name.
        device: of the model.
        dtype: of the model; None keeps that of the weights, all of which must then have one.

    Raises:
        CheckpointError: nothing is there, or it is truncated, corrupt, foreign or newer than this
            program, or a weight is beyond the range of `dtype`. ConfigError: the dtype is none of
            DTYPES, or there is no such device.
    """
    path = Path(path_or_preset)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(map(str, DTYPES))}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device}, but there is no GPU that PyTorch can use here")
    if not os.path.exists(path) and str(path_or_preset) in presets.NAMES:
        return LanguageModel(presets.preset(str(path_or_preset))).to(device, dtype)
    path = pinned(path)
    info = read_config(path)
    file = path / "model.safetensors"
    tensors = read_tensors(file)
    check_extent(tensors, info["model"], file)
    model = sketch(info["model"])
    check_tensors(tensors, dict(model.state_dict()), file)
    model.load_state_dict(one_dtype(tensors, dtype, file), assign=True)
    adopt_record(model, info, path / "config.json")
    model.stored = Stored(tensors)
    return model.to(device)


def adopt_record(
    model: LanguageModel, info: Mapping[str, Any], where: str | os.PathLike[str] = "config.json"
) -> None:
    """Give `model` what a checkpoint's config.json says of its weights; `where` it is, for people.

    Raises:
        CheckpointError: the lineage is no list of growths, each with the step of training and the
            config before it, the step no count, or the tokenizer no record of one. Its name alone
            would be read as what a person asks for: any file, or a download.
    """
    lineage, step, tokenizer = info.get("lineage"), info.get("step"), info.get("tokenizer")
    lineage, step = [] if lineage is None else lineage, 0 if step is None else step
    if not isinstance(lineage, list) or not all(isinstance(x, dict) for x in lineage):
        raise CheckpointError(f"{where}: lineage is {lineage!r:.80}; a list of mappings is needed")
    for growth in lineage:
        if type(growth.get("step")) is not int or growth["step"] < 0:
            raise CheckpointError(f"{where}: lineage has {growth!r:.80} without the step it was at")
        try:
            from_dict(ModelConfig, growth.get("before"), "lineage.before")
        except ConfigError as cause:
            raise CheckpointError(f"{where}: {cause}") from None
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{where}: step is {step!r:.80}; a count of updates is needed")
    if tokenizer is not None and not isinstance(tokenizer, dict):
        raise CheckpointError(f"{where}: tokenizer is {tokenizer!r:.80}; its record is needed")
    for key, kind in TOKENIZER.items():
        value = (tokenizer or {}).get(key)
        if value is not None and type(value) is not kind:
            raise CheckpointError(
                f"{where}: tokenizer.{key} is {value!r:.80}; {kind.__name__} is needed"
            )
    model.lineage, model.step, model.tokenizer_info = lineage, step, tokenizer


def tokenizer_of(model: LanguageModel, path: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer of a checkpoint at `path`; its vocabulary may lie in the run's folder.

    Raises:
        CheckpointError: the checkpoint names none. DataError: its file is gone, or another one.
    """
    if model.tokenizer_info is None:
        if not os.path.exists(path):
            raise CheckpointError(_untrained(path))
        raise CheckpointError(
            f"{path} does not say which tokenizer it was trained with; `metastate convert --to "
            "metastate --tokenizer ...` writes a copy that does"
        )
    folder = _followed(Path(path).absolute()).resolve()
    return load_tokenizer(model.tokenizer_info, [folder, *folder.parents[:2]])


def check_tokenizer(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the tokenizer has ids that the model lacks."""
    if tokenizer.num_ids > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.name} has {tokenizer.num_ids} ids, the model only "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that holds a checkpoint: `path`, or the last one of the run in `path`."""
    path = Path(path)
    own, last = _followed(path), _followed(path / "last")
    known = [os.path.exists(folder / "config.json") for folder in (own, last)]
    return last if known == [False, True] else own


def pinned(path: str | os.PathLike[str]) -> Path:
    """Return the folder that a checkpoint's links lead to now; a run that goes on moves them."""
    path = checkpoint_folder(path)
    return path.resolve() if os.path.islink(path) else path


def _followed(path: Path) -> Path:
    """Return the folder that the file `path` names, as a run's `last` where links are refused."""
    with contextlib.suppress(OSError):
        small = path.is_file() and path.stat().st_size < 99
        if small and LINK.fullmatch(path.read_bytes()):
            return path.parent / path.read_text(encoding="utf-8")
    return path


def _untrained(name: str | os.PathLike[str]) -> str:
    return (
        f"{name} is a preset, which nothing has trained: `metastate train --preset {name}` "
        "makes a checkpoint of it"
    )


def _what_else(path: Path) -> str:
    """Return what to do where `path` is no checkpoint."""
    if path.is_file():
        return "a file of weights becomes a checkpoint by `metastate convert`"
    if path.name == "best" and os.path.exists(_followed(path.parent / "last") / "config.json"):
        last = path.parent / "last"
        return f"this run has not been validated yet, its last checkpoint is {last}"
    if not os.path.exists(path) and (near := presets.near(str(path))):
        if near == str(path):
            return _untrained(path)
        return f"did you mean the preset {near!r}?"
    return "name the folder of a run, RUN (its last checkpoint), RUN/best or RUN/last"


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
        raise CheckpointError(
            f"no checkpoint at {path}: no config.json there; {_what_else(path)}"
        ) from None
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(
            f"{file} cannot be read ({cause}); the checkpoint is corrupt"
        ) from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        hint = ""
        if isinstance(info, dict) and "model_type" in info:
            hint = "; a Hugging Face folder: make a checkpoint of it with `metastate convert`"
        raise CheckpointError(f"{file} is no metastate checkpoint's config{hint}")
    if type(info.get("version")) is not int or not 1 <= info["version"] <= VERSION:
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


def check_extent(found: Mapping[str, torch.Tensor], config: ModelConfig, file: Path) -> None:
    """Raise CheckpointError if a config needs far more than a file holds.

    What building a model costs grows with these sizes, even without its values: a wrong config is
    refused before.
    """
    width = 1 if config.architecture in ATTENTION else config.attention_size
    least = config.hidden_size * (config.vocab_size + config.num_layers * width)
    held = sum(x.numel() for x in found.values())
    if least > max(held, CHEAP):
        raise CheckpointError(
            f"{file} holds {held:,} values, the config needs more than {least:,}; one of the two "
            "is of another model, or damaged"
        )
    if config.num_layers > len(found):
        raise CheckpointError(
            f"{file} holds {len(found):,} tensors, the config says {config.num_layers:,} blocks; "
            "one of the two is of another model, or damaged"
        )


def check_tensors(
    found: dict[str, torch.Tensor], needed: dict[str, torch.Tensor], file: Path
) -> None:
    """Raise CheckpointError unless `found` has the names and shapes of `needed`, in DTYPES."""
    for name, x in needed.items():
        if name not in found:
            raise CheckpointError(f"{file} has no tensor {name!r}; it is of another model")
        if found[name].shape != x.shape:
            raise CheckpointError(
                f"{file}: {name} is {list(found[name].shape)}, the config needs {list(x.shape)}"
            )
        if found[name].dtype not in DTYPES:
            raise CheckpointError(f"{file}: {_not_allowed(name, found[name])}")
    extra = sorted(found.keys() - needed.keys())
    if extra:
        raise CheckpointError(f"{file} holds {extra[0]!r}, which this model does not have")


def one_dtype(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, where: str | os.PathLike[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors in `dtype`; None keeps theirs, of which there must be one.

    Raises:
        CheckpointError: a dtype is not one of DTYPES, there are several and None to choose, or a
            value is beyond the range of `dtype`. `where` they are from, for people.
    """
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise CheckpointError(f"{where}: {_not_allowed(name, x)}")
    if dtype is None:
        if len(found := {x.dtype for x in tensors.values()}) > 1:
            raise CheckpointError(
                f"{where} holds tensors of several types ({', '.join(sorted(map(_name, found)))}); "
                "choose a dtype (`metastate convert --dtype float32` writes a copy of one)"
            )
        return dict(tensors)
    out = {name: x.to(dtype) for name, x in tensors.items()}
    for name, x in out.items():
        if torch.finfo(dtype).max < torch.finfo(tensors[name].dtype).max:
            lost = int((x.isinf() & tensors[name].isfinite()).sum())
            if lost:
                raise CheckpointError(
                    f"{where}: {name} has {lost:,} values beyond {torch.finfo(dtype).max:.5g}, the "
                    f"range of {_name(dtype)}; take bfloat16 or float32"
                )
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_allowed(name: str, x: torch.Tensor) -> str:
    return f"{name} is {_name(x.dtype)}; allowed: {', '.join(map(_name, DTYPES))}"


def not_finite(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return how many values of each tensor are NaN or infinite, by name, where any is.

    It reads every value once, a tensor at a time; a model laid out on the meta device has none.
    """
    counts = {n: x.numel() - int(x.isfinite().sum()) for n, x in tensors.items() if not x.is_meta}
    return {name: count for name, count in counts.items() if count}


def check_finite(tensors: Mapping[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a value is NaN or infinite; `where` they are from, for people."""
    if counts := not_finite(tensors):
        name, bad = next(iter(counts.items()))
        raise CheckpointError(
            f"{where}: {name} ({_name(tensors[name].dtype)}) has {bad:,} values that "
            "are NaN or infinite; training diverged or the file is damaged: take another "
            "(`metastate convert --allow-nan` takes it as it is)"
        )
