"""What a model carries from token to token: typed, immutable in use, saved as safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metastate.config import ATTENTION, ModelConfig
from metastate.data.files import atomic_write
from metastate.errors import StateError
from metastate.layers.attention import AttentionState
from metastate.layers.common import RecurrentState

if TYPE_CHECKING:
    from metastate.model.lm import LanguageModel

LayerState = RecurrentState | AttentionState
FORMAT = "metastate-state"
VERSION = 1


@dataclass(frozen=True)
class ModelState:
    """The states of all layers after `tokens_seen` tokens, for a batch of B rows.

    A forward pass never changes the state that it was given; it returns a new one. So a state can
    be kept, forked and continued any number of times.

    Attributes:
        layers: one RecurrentState or AttentionState a block.
        tokens_seen: number of tokens consumed so far.
        extra: notes that travel with a saved state, text to text.
    """

    layers: tuple[LayerState, ...]
    tokens_seen: int = 0
    extra: dict[str, str] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> ModelState:
        """Return a state whose tensors are `fn` of this one's."""
        return dataclasses.replace(self, layers=tuple(layer.map(fn) for layer in self.layers))

    def detach(self) -> ModelState:
        """Return the state cut off from the graph that made it."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> ModelState:
        """Return a copy that shares no memory."""
        return self.map(torch.clone)

    def to(self, device: torch.device | str) -> ModelState:
        """Return the state on `device`."""
        return self.map(lambda x: x.to(device))

    def __getitem__(self, rows: int | slice | Tensor) -> ModelState:
        """Return the state of some batch rows; an int keeps a batch of one."""
        if isinstance(rows, int):
            if not -self.batch_size <= rows < self.batch_size:
                raise IndexError(f"row {rows} of a state with {self.batch_size} rows")
            rows = slice(rows, rows + 1 or None)
        return self.map(lambda x: x[rows])

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        layer = self.layers[0]
        return (layer.S if isinstance(layer, RecurrentState) else layer.keys).shape[0]

    @property
    def num_bytes(self) -> int:
        """Size in bytes: constant for a recurrent model, growing for a Transformer."""
        return sum(layer.num_bytes for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, `layers.0.S` and so on, buffers cut to what is in use."""
        out = {}
        for i, layer in enumerate(self.layers):
            whole = layer.map(lambda x: x)
            for f in dataclasses.fields(whole):
                value = getattr(whole, f.name)
                if isinstance(value, Tensor):
                    out[f"layers.{i}.{f.name}"] = value
        return out

    def save(self, path: str | os.PathLike[str], config: ModelConfig) -> None:
        """Write the state as safetensors, atomically, with a hash of its model's `config`."""
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "tokens_seen": str(self.tokens_seen),
            "config": config_hash(config),
            "extra": json.dumps(self.extra),
        }
        # Copies, since tensors of a state may share memory, which safetensors refuses.
        tensors = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in self.tensors().items()
        }
        atomic_write(path, safetensors.torch.save(tensors, header), error=StateError)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel) -> ModelState:
        """Read a state for `model`.

        Raises:
            StateError: the file is missing, corrupt, no state, newer, or of another model.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise StateError(f"no state file at {path}") from None
        except (safetensors.SafetensorError, OSError) as cause:
            raise StateError(
                f"{path} is no whole safetensors file ({cause}); it is corrupt or cut "
                "off: make the state again"
            ) from None
        if header.get("format") != FORMAT:
            raise StateError(f"{path} is a safetensors file but no metastate state")
        try:
            version, tokens_seen = int(header["version"]), int(header["tokens_seen"])
            made_by, extra = header["config"], json.loads(header["extra"])
            if not 0 <= tokens_seen < 2**63:
                raise ValueError(f"{tokens_seen} tokens seen")
            if not isinstance(extra, dict) or any(not isinstance(v, str) for v in extra.values()):
                raise ValueError("its notes must be text by name")
        except (KeyError, ValueError, RecursionError) as cause:
            raise StateError(
                f"{path} has a broken header ({cause!r}); make the state again"
            ) from None
        if version > VERSION:
            raise StateError(f"{path} has version {version}; install a newer metastate")
        if made_by != config_hash(model.config):
            raise StateError(f"{path} was made by a model of another configuration; use that model")
        kind = AttentionState if model.config.architecture in ATTENTION else RecurrentState
        layers = []
        for i in range(model.config.num_layers):
            prefix = f"layers.{i}."
            fields = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            # A cache's own counters are no tensors of a file, nor is a tensor without dimensions.
            own = fields.keys().isdisjoint(("length", "watermark"))
            try:
                if not own or not all(x.dim() for x in fields.values()):
                    raise TypeError
                layers.append(kind(**fields))
            except (TypeError, IndexError):
                raise StateError(f"{path} holds no whole state of layer {i}") from None
        state = cls(tuple(layers), tokens_seen, extra)
        state.check(model)
        return state.to(next(model.parameters()).device)

    def check(self, model: LanguageModel) -> None:
        """Raise StateError unless this state fits `model`."""
        if len(self.layers) != model.config.num_layers:
            raise StateError(
                f"the state has {len(self.layers)} layers, the model {model.config.num_layers}"
            )
        for i, (own, fresh) in enumerate(zip(self.layers, model.empty_state.layers, strict=True)):
            if type(own) is not type(fresh):
                raise StateError(
                    f"the state's layer {i} is a {type(own).__name__}, the model needs a "
                    f"{type(fresh).__name__}"
                )
            if isinstance(own, AttentionState):
                self._check_cache(i, own, fresh)
                continue
            for name, needed in vars(fresh).items():
                found = getattr(own, name)
                if found is not None and not found.is_floating_point():
                    raise StateError(
                        f"the state's layers.{i}.{name} is {found.dtype}; floats needed"
                    )
                found = None if found is None else list(found.shape)
                needed = None if needed is None else [self.batch_size, *needed.shape[1:]]
                if found != needed:
                    raise StateError(
                        f"the state's layers.{i}.{name} is {found}, the model needs {needed}"
                    )

    def _check_cache(self, i: int, own: AttentionState, fresh: LayerState) -> None:
        assert isinstance(fresh, AttentionState)
        rows, (_, heads, _, size) = self.batch_size, fresh.keys.shape
        for name, x in (("keys", own.keys), ("values", own.values)):
            fits = x.is_floating_point() and x.shape == own.keys.shape  # of any length
            if not fits or x.shape != (rows, heads, *x.shape[2:3], size):
                raise StateError(
                    f"the state's layers.{i}.{name} is {x.dtype} {list(x.shape)}, the model needs "
                    f"floats [{rows}, {heads}, tokens, {size}], as many tokens in keys and values"
                )
        if own.start is not None and (own.start.dtype, own.start.shape) != (torch.int64, (rows,)):
            raise StateError(
                f"the state's layers.{i}.start is {own.start.dtype} {list(own.start.shape)}, the "
                f"model needs int64 [{rows}]"
            )


def config_hash(config: ModelConfig) -> str:
    """Return the SHA-256 of a configuration, in hexadecimal."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
