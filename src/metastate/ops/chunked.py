"""Chunk-parallel form of the recurrence in PyTorch: linear in T, any device, autograd.

Inside a chunk of C tokens with cumulative decay W_i = prod_{j<=i} w_j write

    alpha_i = -kappa_i W_{i-1}    beta_j = (kappa_j a_j) / W_j    A = strict_lower(alpha beta^T)

The correction rows are U = (I - A)^{-1} (alpha S_0^T + strict_lower(alpha (k/W)^T) V), a reader q
gets (q W) S_0^T + lower((q W) (k/W)^T) V + lower((q W) beta^T) U, and the state moves on by
S_C = (S_0 + V^T (k/W) + U^T beta) diag(W_C). (I - A)^{-1}, alpha, beta and W depend on the
transition alone: the `Geometry` is built once and serves every reader and every second memory.
RWKV-7's log w > -exp(-0.5) keeps 1/W below exp(0.61 C): float32 holds C = 64. Decays
that it does not hold give results that are not finite: looking would make the host wait for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate.ops.reference import Trajectory, without_autocast

CHUNK = 64


@dataclass(frozen=True)
class Layout:
    """How tokens [B, T, H, N] lie in dense chunks [n, H, T'/C, C, N], rows padded by zeros."""

    shape: tuple[int, int]
    num_sequences: int
    length: int
    chunk: int
    positions: Tensor | None  # [B * T] place of every token in the dense rows; None without packing

    @classmethod
    def of(cls, batch: int, length: int, cu_seqlens: Tensor | None) -> Layout:
        """Lay out B rows of T tokens, or the sequences between the offsets `cu_seqlens`."""
        if cu_seqlens is None:
            return cls((batch, length), batch, *_padded(length), None)
        lengths = cu_seqlens.diff()
        padded, chunk = _padded(int(lengths.max()))
        which = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        token = torch.arange(batch * length, device=lengths.device)
        positions = which * padded + token - cu_seqlens[:-1][which]
        return cls((batch, length), len(lengths), padded, chunk, positions)

    def chunks(self, x: Tensor) -> Tensor:
        """[B, T, H, N] -> [n, H, T'/C, C, N]."""
        batch, length, heads, size = x.shape
        if self.positions is None:
            dense = F.pad(x, (0, 0, 0, 0, 0, self.length - length))
        else:
            dense = x.new_zeros(self.num_sequences * self.length, heads, size)
            dense = dense.index_copy(0, self.positions, x.reshape(-1, heads, size))
        dense = dense.view(self.num_sequences, -1, self.chunk, heads, size)
        return dense.permute(0, 3, 1, 2, 4)

    def tokens(self, x: Tensor) -> Tensor:
        """[n, H, T'/C, C, N] -> [B, T, H, N]."""
        heads, size = x.shape[1], x.shape[-1]
        dense = x.permute(0, 2, 3, 1, 4).reshape(-1, self.length, heads, size)
        if self.positions is None:
            return dense[:, : self.shape[1]]
        return dense.reshape(-1, heads, size)[self.positions].view(*self.shape, heads, size)


def _padded(length: int) -> tuple[int, int]:
    """Return the padded length and the chunk size for `length` tokens."""
    chunk = min(CHUNK, length)
    return -(-length // chunk) * chunk, chunk


@dataclass(frozen=True)
class Geometry:
    """What depends on the transition alone; [n, H, T'/C, C, N] or [.., C, C]."""

    layout: Layout
    W: Tensor
    beta: Tensor
    P: Tensor  # (I - A)^{-1} alpha: correction rows that a unit S_0 causes
    inverse: Tensor  # (I - A)^{-1}
    alpha: Tensor

    @classmethod
    def of(cls, layout: Layout, log_w: Tensor, kappa: Tensor, a: Tensor) -> Geometry:
        """Build the geometry of `log_w`, `kappa`, `a` [B, T, H, N] in the state's dtype."""
        log_w, kappa, a = (layout.chunks(x) for x in (log_w, kappa, a))
        log_W = log_w.cumsum(-2)
        W = log_W.exp()
        alpha = -kappa * (log_W - log_w).exp()
        beta = kappa * a / W
        A = torch.tril(alpha @ beta.mT, -1)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        inverse = torch.linalg.solve_triangular(eye - A, eye, upper=False, unitriangular=True)
        return cls(layout, W, beta, inverse @ alpha, inverse, alpha)


@dataclass(frozen=True)
class ChunkedTrajectory(Trajectory):
    """Chunk-start states and correction rows; any number of readers."""

    geometry: Geometry
    starts: Tensor  # S_0 of every chunk, [n, H, T'/C, N, N]
    k_W: Tensor  # k / W
    V: Tensor
    U: Tensor

    @without_autocast
    def _read(self, x: Tensor, by: str) -> Tensor:
        g = self.geometry
        q = g.layout.chunks(x.to(self.starts.dtype))
        if by == "key":
            q = q * g.W
            e = q @ self.starts.mT
            e = e + torch.tril(q @ self.k_W.mT) @ self.V + torch.tril(q @ g.beta.mT) @ self.U
        else:
            e = q @ self.starts
            e = e + torch.tril(q @ self.V.mT) @ self.k_W + torch.tril(q @ self.U.mT) @ g.beta
            e = e * g.W
        return g.layout.tokens(e).to(x.dtype)

    @without_autocast
    def _recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, trajectory = self._run(self.geometry, r, k, v, state, self)
        return y, trajectory.state

    @classmethod
    def _run(
        cls, g: Geometry, r: Tensor, k: Tensor, v: Tensor, state: Tensor, like: Trajectory
    ) -> tuple[Tensor, ChunkedTrajectory]:
        k_W = g.layout.chunks(k.to(state.dtype)) / g.W
        V = g.layout.chunks(v.to(state.dtype))
        U_0 = g.inverse @ (torch.tril(g.alpha @ k_W.mT, -1) @ V)  # correction rows for S_0 = 0
        W_C = g.W[..., -1:, :]
        eye = torch.eye(W_C.shape[-1], dtype=W_C.dtype, device=W_C.device)
        move = (eye + g.P.mT @ g.beta) * W_C  # a chunk is the affine map S -> S move + shift
        shift = (V.mT @ k_W + U_0.mT @ g.beta) * W_C
        S, starts = state, []
        for c in range(move.shape[2]):
            starts.append(S)
            S = S @ move[:, :, c] + shift[:, :, c]
        before = torch.stack(starts, 2)
        U = g.P @ before.mT + U_0
        trajectory = cls(S, like.log_w, like.kappa, like.a, like.cu_seqlens, g, before, k_W, V, U)
        return trajectory.read(r), trajectory


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
) -> tuple[Tensor, ChunkedTrajectory]:
    """Run the recurrence chunk by chunk; arguments and result as ops.reference.wkv7."""
    layout = Layout.of(log_w.shape[0], log_w.shape[1], cu_seqlens)
    geometry = Geometry.of(layout, *(x.to(state.dtype) for x in (log_w, kappa, a)))
    like = Trajectory(state, log_w, kappa, a, cu_seqlens)
    return ChunkedTrajectory._run(geometry, r, k, v, state, like)
