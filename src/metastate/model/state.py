"""What a model carries from token to token: typed, immutable in use, saved as safetensors."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from metastate.config import ATTENTION, ModelConfig
from metastate.errors import StateError
from metastate.layers.attention import AttentionState
from metastate.layers.common import RecurrentState
from metastate.layers.surprise_memory import MemoryState
from metastate.model.state_file import StateFile, config_hash
from metastate.model.weights import weights_hash
from metastate.ops import state_dtype

if TYPE_CHECKING:
    from metastate.model.lm import LanguageModel

LayerState = RecurrentState | AttentionState
Part = LayerState | MemoryState
MEMORY = "memory"  # what the tensors of a MemoryState are called by, as layers.0 those of a layer


@dataclass(frozen=True, repr=False)
class ModelState:
    """The states of all layers after `tokens_seen` tokens, for a batch of B rows.

    A forward pass never changes the state that it was given; it returns a new one. So a state can
    be kept, forked and continued any number of times.

    Attributes:
        layers: one RecurrentState or AttentionState a block.
        tokens_seen: number of tokens consumed so far.
        extra: notes that travel with a saved state, text to text.
        memory: the state of the surprise memory, None in a model without one.
    """

    layers: tuple[LayerState, ...]
    tokens_seen: int = 0
    extra: dict[str, str] = field(default_factory=dict)
    memory: MemoryState | None = None

    def __repr__(self) -> str:
        """Return its sizes in a line; the numbers themselves would fill screens."""
        return (
            f"ModelState({len(self.layers)} layers, batch_size={self.batch_size}, "
            f"tokens_seen={self.tokens_seen}, num_bytes={self.num_bytes})"
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The states of the layers, and of the surprise memory where there is one."""
        return self.layers if self.memory is None else (*self.layers, self.memory)

    def with_parts(self, parts: Sequence[Part]) -> ModelState:
        """Return this state with other `parts`, as many and of the same kinds."""
        layers, rest = tuple(parts[: len(self.layers)]), parts[len(self.layers) :]
        return dataclasses.replace(self, layers=layers, memory=rest[0] if rest else None)  # type: ignore[arg-type]

    def map(self, fn: Callable[[Tensor], Tensor]) -> ModelState:
        """Return a state whose tensors are `fn` of this one's."""
        return self.with_parts([part.map(fn) for part in self.parts])

    def detach(self) -> ModelState:
        """Return the state cut off from the graph that made it."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> ModelState:
        """Return a copy that shares no memory."""
        return self.map(torch.clone)

    def to(self, device: torch.device | str) -> ModelState:
        """Return the state on `device`."""
        return self.map(lambda x: x.to(device))

    def __getitem__(self, rows: SupportsIndex | slice | Tensor) -> ModelState:
        """Return the state of some batch rows; one number, of any kind, keeps a batch of one."""
        if not isinstance(rows, slice | list) and not getattr(rows, "ndim", 0):
            rows = operator.index(rows)  # type: ignore[arg-type]
            if not -self.batch_size <= rows < self.batch_size:
                raise IndexError(f"row {rows} of a state with {self.batch_size} rows")
            rows = slice(rows, rows + 1 or None)
        return self.map(lambda x: x[rows])

    @classmethod
    def stack(cls, states: Sequence[ModelState]) -> ModelState:
        """Return the rows of all `states` as one batch, in order.

        tokens_seen is the largest of theirs; notes stay where all have the same.

        Raises:
            StateError: there are none, they are of different models, or key-value caches of
                different lengths, whose positions do not line up.
        """
        if not states:
            raise StateError("no states to stack; give at least one")
        joined: list[Part] = []
        for i, parts in enumerate(zip(*(s.parts for s in states), strict=False)):
            try:
                joined.append(_joined(parts))
            except (TypeError, RuntimeError):
                raise StateError(
                    f"layer {i} of the states has different shapes; only states of one model, "
                    "and key-value caches of one length, can be stacked"
                ) from None
        if any(len(s.parts) != len(joined) for s in states):
            raise StateError("the states have different numbers of layers: different models")
        extra = states[0].extra if all(s.extra == states[0].extra for s in states) else {}
        state = dataclasses.replace(states[0], tokens_seen=max(s.tokens_seen for s in states))
        return dataclasses.replace(state.with_parts(joined), extra=extra)

    def unstack(self) -> list[ModelState]:
        """Return every row as a state of its own that shares no memory with the others."""
        return [self[i].clone() for i in range(self.batch_size)]

    def expand(self, batch_size: int) -> ModelState:
        """Return a state of one row as `batch_size` equal rows, the memory shared.

        Raises:
            StateError: it has more rows than one.
        """
        self.check_single()
        return self.map(lambda x: x.expand(batch_size, *x.shape[1:]))

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        layer = self.layers[0]
        return (layer.S if isinstance(layer, RecurrentState) else layer.keys).shape[0]

    @property
    def tokens_held(self) -> int:
        """Tokens in a key-value cache; 0 in recurrent states, which hold none."""
        layer = self.layers[0]
        return layer.length if isinstance(layer, AttentionState) else 0

    @property
    def num_bytes(self) -> int:
        """Size in bytes: constant for a recurrent model, growing for a Transformer."""
        return sum(part.num_bytes for part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, `layers.0.S` and so on, buffers cut to what is in use."""
        named = {f"layers.{i}": vars(own.map(lambda x: x)) for i, own in enumerate(self.layers)}
        named[MEMORY] = {} if self.memory is None else vars(self.memory)
        return {
            f"{part}.{name}": x
            for part, fields in named.items()
            for name, x in fields.items()
            if isinstance(x, Tensor)
        }

    def save(self, path: str | os.PathLike[str], model: LanguageModel | ModelConfig) -> None:
        """Write the state as safetensors, atomically, with hashes of its `model`.

        A configuration alone will do where weights and state are kept together, as in a checkpoint:
        the file then fits any weights.

        Raises:
            StateError: the file cannot be written, or could not be read: the state is another
                model's, a value is not finite, or `extra` is not texts by name.
        """
        if isinstance(model, ModelConfig):
            config, weights = model, ""
        else:
            self.check(model)
            config, weights = model.config, weights_hash(model)
        if not all(isinstance(x, str) for note in self.extra.items() for x in note):
            raise StateError(f"the notes of a state are texts by name; got {self.extra!r:.80}")
        tensors = self.tensors()
        if bad := [name for name, x in tensors.items() if not bool(x.isfinite().all())]:
            raise StateError(f"{bad[0]} of the state is not finite; it cannot be gone on from")
        StateFile(
            tensors,
            self.tokens_seen,
            config.architecture,
            config_hash(config),
            weights,
            self.extra,
        ).write(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: LanguageModel,
        *,
        allow_other_weights: bool = False,
    ) -> ModelState:
        """Read a state for `model`, in the model's number format or float32, and on its device.

        A tuned start (`metastate tune-state`) saved as parameter tokens becomes one row that has
        seen nothing: S_0 + V_P^T K_P in every layer, S_0 the model's own.

        Args:
            path: the file.
            model: of the configuration that the state was made with.
            allow_other_weights: take a state that other weights of this configuration made, as
                those before more training; what it then means is for the caller to know.

        Raises:
            StateError: the file is missing, corrupt, no state, newer, or of another model.
        """
        file = StateFile.read(path)
        if file.config != config_hash(model.config):
            raise StateError(f"{path} was made by a model of another configuration; use that model")
        if file.weights and not allow_other_weights and file.weights != weights_hash(model):
            raise StateError(
                f"{path} was made with other weights of this configuration (before more training, "
                "or converted to another number format), to which its numbers need not mean the "
                "same; use that checkpoint (or allow_other_weights, which Python and the commands "
                "that continue a text have as --allow-other-weights)"
            )
        kind = AttentionState if model.config.architecture in ATTENTION else RecurrentState
        device = next(model.parameters()).device
        layers: list[LayerState] = []
        first = model.init_state(1)

        def fields(part: str) -> dict[str, Tensor]:
            prefix = f"{part}."
            named = file.tensors.items()
            return {k[len(prefix) :]: v.to(device) for k, v in named if k.startswith(prefix)}

        for i, fresh in enumerate(first.layers):
            own = fields(f"layers.{i}")
            try:
                layer = _expanded(fresh, **own) if file.is_start else kind(**own)  # type: ignore[arg-type]
            except (TypeError, IndexError):
                raise StateError(f"{path} holds no whole state of layer {i}") from None
            layers.append(layer)
        depth = len({x.split(".")[1] for x in file.tensors if x.startswith("layers.")})
        if depth > len(layers):
            raise StateError(f"{path} holds {depth} layers, the model {len(layers)}")
        own = fields(MEMORY)
        if file.is_start and own:
            raise StateError(f"{path} holds a tuned start and the state of a memory; of no model")
        try:
            memory = first.memory if file.is_start else MemoryState(**own) if own else None
        except TypeError:
            raise StateError(f"{path} holds no whole state of the surprise memory") from None
        state = cls(tuple(layers), file.tokens_seen, file.extra, memory)
        if not state.batch_size:
            raise StateError(f"{path} holds no rows; make the state again")
        state.check(model)
        pairs = zip(state.parts, model.empty_state.parts, strict=True)
        state = state.with_parts([_converted(*pair) for pair in pairs])
        for name, x in state.tensors().items():
            if not torch.isfinite(x).all():
                raise StateError(f"{path}: {name} is not finite everywhere; make the state again")
            if name.endswith(".start") and not bool(((x >= 0) & (x < state.tokens_held)).all()):
                raise StateError(f"{path}: {name} is outside the tokens that the cache holds")
        return state

    def check(self, model: LanguageModel) -> None:
        """Raise StateError unless this state fits `model`."""
        if len(self.layers) != model.config.num_layers:
            raise StateError(
                f"the state has {len(self.layers)} layers, the model {model.config.num_layers}"
            )
        empty = model.empty_state
        if (self.memory is None) != (empty.memory is None):
            raise StateError(
                "the state has no surprise memory, the model has one"
                if self.memory is None
                else "the state has a surprise memory, the model none"
            )
        for i, (own, fresh) in enumerate(zip(self.parts, empty.parts, strict=True)):
            part = f"layers.{i}" if i < len(self.layers) else MEMORY
            if type(own) is not type(fresh):
                raise StateError(
                    f"the state's layer {i} is a {type(own).__name__}, the model needs a "
                    f"{type(fresh).__name__}"
                )
            if isinstance(own, AttentionState) and isinstance(fresh, AttentionState):
                self._check_cache(own, fresh, i)
                continue
            for name, needed in vars(fresh).items():
                found = getattr(own, name)
                if found is not None and not found.is_floating_point():
                    raise StateError(f"the state's {part}.{name} is {found.dtype}; floats needed")
                found = None if found is None else list(found.shape)
                needed = None if needed is None else [self.batch_size, *needed.shape[1:]]
                if found != needed:
                    raise StateError(
                        f"the state's {part}.{name} is {found}, the model needs {needed}"
                    )

    def check_single(self, what: str = "the state") -> None:
        """Raise StateError, by the name `what`, unless this state is of one row."""
        if self.batch_size != 1:
            raise StateError(f"{what} holds {self.batch_size} rows; one is needed, as state[0]")

    def _check_cache(self, own: AttentionState, fresh: AttentionState, layer: int) -> None:
        """Raise StateError unless a cache, whose length is free, fits the layer."""
        heads, size = fresh.keys.shape[1], fresh.keys.shape[3]
        needed = [self.batch_size, heads, own.keys.shape[2], size]
        for name, x in (("keys", own.keys), ("values", own.values)):
            if list(x.shape) != needed or not x.is_floating_point():
                raise StateError(
                    f"the state's layers.{layer}.{name} is {x.dtype} {list(x.shape)}, the model "
                    f"needs floats {needed}"
                )
        if own.length != self.tokens_held:
            raise StateError(
                f"the state's layers.{layer} holds {own.length} tokens, its first layer "
                f"{self.tokens_held}"
            )
        start = own.start
        if start is not None and (start.dtype, list(start.shape)) != (torch.int64, needed[:1]):
            raise StateError(
                f"the state's layers.{layer}.start is {start.dtype} {list(start.shape)}, the model "
                f"needs int64 {needed[:1]}"
            )


def _converted(own: Part, fresh: Part) -> Part:
    """Return a layer's loaded state in the number formats of a fresh one.

    Shifts of a model in 16 bits become float32 like S: native decoding leaves such ones behind, and
    what it goes on from must not be rounded.
    """
    is_cache = isinstance(own, AttentionState)
    dtypes = {name: x.dtype for name, x in vars(fresh).items() if isinstance(x, Tensor)}
    changes = {
        name: x.to(dtypes[name] if is_cache else state_dtype(dtypes[name]))
        for name, x in vars(own).items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return dataclasses.replace(own, **changes)  # type: ignore[arg-type]


def _expanded(fresh: LayerState, token_keys: Tensor, token_values: Tensor) -> RecurrentState:
    """Return a fresh layer's state with S_0 + V_P^T K_P for factors [H, P, N]."""
    if not isinstance(fresh, RecurrentState):
        raise TypeError("a key-value cache has no S")
    H, N = fresh.S.shape[1:3]
    for name, x in (("token_keys", token_keys), ("token_values", token_values)):
        if x.dim() != 3 or x.shape != (H, token_keys.shape[1], N) or not x.is_floating_point():
            raise StateError(
                f"{name} is {x.dtype} {list(x.shape)}; floats [{H}, P, {N}] are needed"
            )
    S = fresh.S + token_values.to(fresh.S.dtype).mT @ token_keys.to(fresh.S.dtype)
    return dataclasses.replace(fresh, S=S)


def _joined(parts: Sequence[Part]) -> Part:
    """Return one layer's rows of several states; TypeError or RuntimeError where they differ."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise TypeError("recurrent states and caches")
    if isinstance(first, AttentionState):
        caches: list[AttentionState] = list(parts)  # type: ignore[arg-type]
        keys, values = (torch.cat(t) for t in zip(*(c.visible() for c in caches), strict=True))
        start = None
        if any(c.start is not None for c in caches):
            none = [c.keys.new_zeros(len(c.keys), dtype=torch.int64) for c in caches]
            pairs = zip(caches, none, strict=True)
            start = torch.cat([zero if c.start is None else c.start for c, zero in pairs])
        return AttentionState(keys, values, start)
    fields: dict[str, Tensor | None] = {}
    for name in vars(first):
        own = [getattr(part, name) for part in parts]
        fields[name] = None if all(x is None for x in own) else torch.cat(own)
    return type(first)(**fields)  # type: ignore[arg-type]
