"""States in the layouts of other programs: RWKV's own `rwkv` package and flash-linear-attention.

S is [B, H, N_v, N_k] here and, without B, in RWKV; flash-linear-attention keeps [B, H, N_k, N_v].
Only what an RWKV-7 carries has a counterpart there: S and both token shifts, no meta state. An
upgraded RWKV-7 that has no M carries just that, and a state does not say which model made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metastate.config import ModelConfig
from metastate.errors import StateError
from metastate.layers.common import RecurrentState
from metastate.model.state import ModelState


def to_rwkv(state: ModelState) -> list[Tensor]:
    """Return a state of one row as the `rwkv` package keeps it.

    Args:
        state: of an RWKV-7, one row.

    Returns:
        Three tensors a layer: the last input of time mixing [D], S [H, N_v, N_k] float32, the last
        input of channel mixing [D]. They share no memory with `state`, which that package would
        change in place.

    Raises:
        StateError: the state has more rows than one, or is not S and two token shifts a layer.

    Source: rwkv 0.8 (PyPI), rwkv/model.py, RWKV_x070.generate_zero_state.
    """
    state.check_single()
    out: list[Tensor] = []
    for own, channel_shift in _rwkv7_layers(state):
        out += [own.time_shift[0].clone(), own.S[0].to(torch.float32, copy=True)]
        out.append(channel_shift[0].clone())
    return out


def from_rwkv(
    tensors: Sequence[Tensor], config: ModelConfig, *, tokens_seen: int = 0
) -> ModelState:
    """Return the `rwkv` package's state as ours, one row; the inverse of `to_rwkv`.

    Args:
        tensors: three a layer, as `to_rwkv` returns them, of any float dtype.
        config: of the RWKV-7 that made them.
        tokens_seen: tokens that led to it, which that layout does not record; `generate` begins a
            document where it is 0.

    Raises:
        StateError: the number or a shape of the tensors is not this configuration's, or a number is
            not finite.
    """
    _check_config(config)
    D, H, N = config.hidden_size, config.num_heads, config.head_size
    if len(tensors) != 3 * config.num_layers:
        raise StateError(
            f"{len(tensors)} tensors given; {config.num_layers} layers have {3 * config.num_layers}"
        )
    for i, x in enumerate(tensors):
        _check(x, [H, N, N] if i % 3 == 1 else [D], f"tensor {i}")
    rows = [x.detach()[None].clone() for x in tensors]
    layers = [
        RecurrentState(rows[i + 1].float(), rows[i], None, rows[i + 2])
        for i in range(0, len(rows), 3)
    ]
    return ModelState(tuple(layers), tokens_seen)


def to_fla(state: ModelState) -> list[dict[str, Tensor]]:
    """Return a state of B rows as the layers of flash-linear-attention's cache.

    Args:
        state: of an RWKV-7.

    Returns:
        For each layer `recurrent_state` [B, H, N_k, N_v] float32, `conv_state` and `ffn_state`
        [B, D], the last inputs of time and channel mixing; no memory is shared.

    Raises:
        StateError: the state is not S and two token shifts a layer.

    Source: flash-linear-attention, fla/layers/rwkv7.py, what RWKV7Attention.forward hands to
    past_key_values.update.
    """
    out = []
    for own, channel_shift in _rwkv7_layers(state):
        S = own.S.mT.to(torch.float32).clone(memory_format=torch.contiguous_format)
        shifts = {"conv_state": own.time_shift.clone(), "ffn_state": channel_shift.clone()}
        out.append({"recurrent_state": S} | shifts)
    return out


def from_fla(
    layers: Sequence[dict[str, Any]], config: ModelConfig, *, tokens_seen: int = 0
) -> ModelState:
    """Return flash-linear-attention's state as ours; the inverse of `to_fla`.

    Args:
        layers: one mapping a layer, as `to_fla` returns them; other keys are passed over.
        config: of the RWKV-7 that made them.
        tokens_seen: as in `from_rwkv`.

    Raises:
        StateError: as `from_rwkv`, or a layer lacks one of the three tensors.
    """
    _check_config(config)
    D, H, N = config.hidden_size, config.num_heads, config.head_size
    if len(layers) != config.num_layers:
        raise StateError(f"{len(layers)} layers given; the model has {config.num_layers}")
    out = []
    for i, layer in enumerate(layers):
        S = layer.get("recurrent_state")
        batch = S.shape[0] if isinstance(S, Tensor) and S.dim() else 1
        _check(S, [batch, H, N, N], f"layer {i}'s recurrent_state")
        shifts = [layer.get(name) for name in ("conv_state", "ffn_state")]
        for name, x in zip(("conv_state", "ffn_state"), shifts, strict=True):
            _check(x, [batch, D], f"layer {i}'s {name}")
        assert isinstance(S, Tensor)
        S = S.detach().mT.float().clone(memory_format=torch.contiguous_format)
        time_shift, channel_shift = (x.detach().clone() for x in shifts)  # type: ignore[union-attr]
        out.append(RecurrentState(S, time_shift, None, channel_shift))
    return ModelState(tuple(out), tokens_seen)


def _rwkv7_layers(state: ModelState) -> Iterator[tuple[RecurrentState, Tensor]]:
    """Yield an RWKV-7's layers and their channel shifts."""
    if state.memory is not None:
        raise StateError("the state has a surprise memory, for which this layout has no place")
    for i, own in enumerate(state.layers):
        if not isinstance(own, RecurrentState) or own.M is not None or own.channel_shift is None:
            raise StateError(
                f"layer {i} is no RWKV-7's: S and two token shifts are all that this layout holds"
            )
        yield own, own.channel_shift


def _check_config(config: ModelConfig) -> None:
    if config.architecture != "rwkv7":
        raise StateError(f"the config is of a {config.architecture}; this layout is an RWKV-7's")
    if config.memory_heads:
        raise StateError("the config has a surprise memory, for which this layout has no place")


def _check(x: Any, shape: list[int | None], what: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or list(x.shape) != shape:
        found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise StateError(f"{what} is {found}; floats {shape} are needed")
    if not torch.isfinite(x).all():
        raise StateError(f"{what} holds numbers that are not finite")
