"""The file of a state: safetensors with a header that says whose it is, and a digest of it all.

Tensors are named `layers.I.FIELD`, those of a surprise memory `memory.FIELD`. A file holds either
the fields of a RecurrentState or an AttentionState, or the factors of a tuned start, `token_keys`
and `token_values`, [H, P, N] each.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metastate.config import ModelConfig
from metastate.data.files import write_tensors
from metastate.errors import StateError
from metastate.mapping import to_dict
from metastate.model.weights import digest_of

FORMAT = "metastate-state"
VERSION = 2  # 1 had neither weights nor digest
LAYOUT = (
    "S, M [B, H, N_v, N_k]; keys, values [B, H, T, N]; token_* [H, P, N]; "
    "shifts, key, features [B, D]"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FIELDS = "S|M|time_shift|channel_shift|keys|values|start|token_keys|token_values"
NAME = re.compile(rf"layers\.(0|[1-9][0-9]{{0,5}})\.({FIELDS})|memory\.(M|key|features)")
MOST_TOKENS = 2**63 - 1


@dataclass(frozen=True)
class StateFile:
    """What a state file says.

    Attributes:
        tensors: by name, on the CPU.
        tokens_seen: tokens that led to the state; 0 where every document may start from it.
        architecture: of the model, as in ModelConfig; "" in version 1.
        config: `config_hash` of the model.
        weights: `weights_hash` of the model; "" where it was not recorded.
        extra: notes, text to text.
        version: of the format.
    """

    tensors: dict[str, Tensor]
    tokens_seen: int
    architecture: str
    config: str
    weights: str
    extra: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def is_start(self) -> bool:
        """Whether it holds the factors of a tuned start in place of states."""
        return any(name.endswith(".token_keys") for name in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Return the header and the sizes as plain JSON values."""
        values = vars(self) | {"tensors": {k: list(x.shape) for k, x in self.tensors.items()}}
        kind = "parameter tokens" if self.is_start else "state"
        sizes = (x.numel() * x.element_size() for x in self.tensors.values())
        return {"kind": kind, "layout": LAYOUT, "state_bytes": sum(sizes)} | values

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically.

        Raises:
            StateError: the disk is full or the system refuses; the previous file is untouched.
        """
        tensors = {name: x.detach().cpu() for name, x in self.tensors.items()}
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "tokens_seen": str(self.tokens_seen),
            "architecture": self.architecture,
            "layout": LAYOUT,
            "config": self.config,
            "weights": self.weights,
            "extra": json.dumps(self.extra),
        }
        header["digest"] = _digest(header, tensors)
        write_tensors(path, tensors, header, error=StateError)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> StateFile:
        """Read a file; whether it fits a model is for ModelState.load to say.

        Raises:
            StateError: it is missing, cut off, changed since it was written, no state, newer than
                this program, or holds what no state does.
        """
        try:
            if os.path.isdir(path):  # of which safetensors says: no such device
                raise IsADirectoryError
            with safetensors.safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise StateError(f"no state file at {path}") from None
        except IsADirectoryError:
            raise StateError(f"{path} is a folder; name a state file") from None
        except (safetensors.SafetensorError, OSError) as cause:
            raise StateError(
                f"{path} is no whole safetensors file ({cause}); it is corrupt or cut "
                "off: make the state again"
            ) from None
        if header.get("format") != FORMAT:
            raise StateError(f"{path} is a safetensors file but no metastate state")
        try:
            version, tokens_seen = int(header["version"]), int(header["tokens_seen"])
            if version > VERSION:
                raise StateError(f"{path} has version {version}; install a newer metastate")
            if version >= 2 and header.pop("digest") != _digest(header, tensors):
                raise StateError(f"{path} was changed or damaged; make the state again")
            extra = json.loads(header["extra"])
            texts = isinstance(extra, dict) and all(isinstance(x, str) for x in extra.values())
            if version < 1 or not 0 <= tokens_seen <= MOST_TOKENS or not texts:
                raise ValueError("a number or a note is out of range")
            file = cls(
                tensors,
                tokens_seen,
                header.get("architecture", ""),
                header["config"],
                header.get("weights", ""),
                extra,
                version,
            )
        except (KeyError, ValueError, RecursionError) as cause:
            raise StateError(
                f"{path} has a broken header ({cause!r}); make the state again"
            ) from None
        file.check_tensors(path)
        return file

    def check_tensors(self, path: str | os.PathLike[str]) -> None:
        """Raise StateError unless names, axes and dtypes are such as a state can have."""
        for name, x in self.tensors.items():
            if not NAME.fullmatch(name):
                raise StateError(f"{path} holds {name[:80]!r}, which no state has")
            if not x.dim():
                raise StateError(f"{path}: {name} is a single number; no state holds one")
            if x.is_floating_point() and x.dtype not in DTYPES:
                raise StateError(f"{path}: {name} is {x.dtype}; float16 to float64 needed")


def config_hash(config: ModelConfig) -> str:
    """Return the SHA-256 of a configuration, in hexadecimal; first values are no part of it."""
    fields = to_dict(config)
    del fields["meta_state"]["readout_gain"]
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a header and tensors, so that no changed bit goes unseen."""
    return digest_of(tensors, json.dumps(header, sort_keys=True).encode())
