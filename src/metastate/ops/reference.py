"""The token-by-token recurrence: THE meaning of every backend. Any dtype, plain autograd, slow.

Row vectors; `a^T b` is an outer product. Symbols are those of docs/notation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metastate.errors import ConfigError, ShapeError


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise ShapeError unless all are floating-point [B, T, H, N] on one device; by their names.

    Native kernels get addresses: what they would read beyond a tensor's end must be refused here.
    """
    (name, first), *rest = tensors.items()
    if first.dim() != 4 or 0 in first.shape:
        raise ShapeError(f"{name} must be [B, T, H, N]; got {list(first.shape)}")
    for other, x in rest:
        if x.shape != first.shape:
            raise ShapeError(f"{other} is {list(x.shape)}, but {name} is {list(first.shape)}")
        if x.device != first.device:
            raise ShapeError(f"{other} is on {x.device}, but {name} on {first.device}")
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ShapeError(f"{name} is {x.dtype}; a floating-point tensor is needed")


def check_state(state: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ShapeError unless a state is floating-point, of this shape and on this device."""
    if tuple(state.shape) != shape:
        raise ShapeError(f"state is {list(state.shape)}; {list(shape)} is needed")
    if not state.is_floating_point():
        raise ShapeError(f"state is {state.dtype}; a floating-point tensor is needed")
    if state.device != device:
        raise ShapeError(f"state is on {state.device}, but the inputs on {device}")


def without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Run `fn` in its tensors' own dtypes: rounded products would add up over the sequence."""

    @functools.wraps(fn)
    def exact(*args: Any, **kwargs: Any) -> Any:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return exact


@dataclass(frozen=True)
class Trajectory:
    """What one pass of the recurrence leaves behind for later readers of the same states S_t.

    Attributes:
        state: the state after the last token of every sequence, [n, H, N, N].
        log_w, kappa, a: the transition G_t = diag(w_t) - kappa_t^T (a_t * kappa_t), [B, T, H, N].
        cu_seqlens: [n + 1] int64 offsets of the sequences in the flattened B * T tokens, or None.

    A backend's subclass gives `_read` and `_recur`, which get what was checked here; for a single
    token, after which the last state is all there is, `_read_last` will do.
    """

    state: Tensor
    log_w: Tensor
    kappa: Tensor
    a: Tensor
    cu_seqlens: Tensor | None

    def read(self, x: Tensor, by: str = "key") -> Tensor:
        """Read every state: e_t = x_t S_t^T (`by="key"`) or x_t S_t (`by="value"`).

        Args:
            x: [B, T, H, N], as many as the pass had.
            by: what x_t names.

        Returns:
            e [B, T, H, N] in x's dtype.

        Raises:
            ShapeError: x is not of the pass's shape or device. ConfigError: `by` is neither.
        """
        check_tensors({"the trajectory": self.log_w, "x": x})
        if by not in ("key", "value"):
            raise ConfigError(f"by is {by!r}; allowed: 'key', 'value'")
        return self._read(x, by)

    def recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run M_t = M_{t-1} G_t + v_t^T k_t through the same transitions, read with r.

        Args:
            r: [B, T, H, N], as many as the pass had; so k and v.
            k: what M is written under.
            v: what is written.
            state: M before token 0 of every sequence, [n, H, N, N], any float dtype.

        Returns:
            r_t M_t^T [B, T, H, N] in r's dtype, and M after the last token of every sequence, in
            the dtype of the pass's own states.

        Raises:
            ShapeError: a shape or device is not the pass's.
        """
        check_tensors({"the trajectory": self.log_w, "r": r, "k": k, "v": v})
        check_state(state, tuple(self.state.shape), r.device)
        return self._recur(r, k, v, state.to(self.state.dtype))

    @without_autocast
    def _read_last(self, x: Tensor, by: str) -> Tensor:
        equation = "nhvk,nhk->nhv" if by == "key" else "nhvk,nhv->nhk"
        row = x[:, 0].to(self.state.dtype)
        return torch.einsum(equation, self.state, row).unsqueeze(1).to(x.dtype)

    def _read(self, x: Tensor, by: str) -> Tensor:
        raise NotImplementedError

    def _recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class ReferenceTrajectory(Trajectory):
    """Every state written out; `states` [B, T, H, N_v, N_k]."""

    states: Tensor

    @without_autocast
    def _read(self, x: Tensor, by: str) -> Tensor:
        equation = "bthvk,bthk->bthv" if by == "key" else "bthvk,bthv->bthk"
        return torch.einsum(equation, self.states, x.to(self.states.dtype)).to(x.dtype)

    def _recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, trajectory = wkv7(r, self.log_w, k, v, self.kappa, self.a, state, self.cu_seqlens)
        return y, trajectory.state


@without_autocast
def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ReferenceTrajectory]:
    """Run S_t = S_{t-1} (diag(exp log_w_t) - kappa_t^T (a_t * kappa_t)) + v_t^T k_t token by token.

    Args:
        r: receptance, [B, T, H, N], any float dtype; so all up to `a`.
        log_w: log decay a token, below 0.
        k: replacement key.
        v: value.
        kappa: removal key, unit norm over N.
        a: in-context learning rate.
        state: [n, H, N, N], one a sequence (n = B without cu_seqlens), float32 or float64.
        cu_seqlens: [n + 1] int64 or None.

    Returns:
        y_t = r_t S_t^T in r's dtype [B, T, H, N], and the trajectory.

    Source: RWKV-7, arXiv:2503.14456, eqs 16-21.
    """
    if cu_seqlens is None:
        states, final = _states(log_w, k, v, kappa, a, state)
    else:
        shape = log_w.shape
        parts, finals = [], []
        flat = [x.flatten(0, 1).unsqueeze(0) for x in (log_w, k, v, kappa, a)]
        offsets = cu_seqlens.tolist()
        for i, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            own = [*(x[:, start:end] for x in flat), state[i : i + 1]]
            part, last = _states(*own)
            parts.append(part)
            finals.append(last)
        states = torch.cat(parts, 1).view(*shape, shape[-1])
        final = torch.cat(finals)
    trajectory = ReferenceTrajectory(final, log_w, kappa, a, cu_seqlens, states)
    return trajectory.read(r), trajectory


def _states(
    log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return all states [B, T, H, N, N] and the last one of sequences that share their length."""
    w = log_w.to(S.dtype).exp()
    k, v, kappa, a = (x.to(S.dtype) for x in (k, v, kappa, a))
    b = a * kappa
    states = []
    for t in range(log_w.shape[1]):
        u = torch.einsum("bhvk,bhk->bhv", S, kappa[:, t])  # what S holds under the removal key
        S = (
            S * w[:, t, :, None, :]
            - u[..., :, None] * b[:, t, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )
        states.append(S)
    return torch.stack(states, 1), S
