"""What every layer shares: optimizer groups, document packing, token shift, per-segment norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate.errors import ShapeError

# Optimizer groups. A layer's `optimizer_groups()` names one for each parameter that it owns.
MATRIX = "matrix"  # weight decay, learning rate x 1
VECTOR = "vector"  # no weight decay, learning rate x 1
DECAY_BASE = "decay_base"  # no weight decay, learning rate x 2 (w0 of RWKV-7)


@dataclass(frozen=True)
class Packing:
    """Where documents start inside a [B, T] batch; sequences are counted row after row.

    Attributes:
        resets: [B, T] bool, True where a document starts.
        cu_seqlens: [n + 1] int64 offsets of the n sequences in the flattened [B * T] tokens. A row
            start is always an offset; it resets the state only where `resets` says so.
        first: [B] int64, the index of the sequence that starts row b.
        last: [B] int64, the index of the sequence that ends row b.
    """

    resets: Tensor
    cu_seqlens: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def from_resets(cls, resets: Tensor) -> Packing:
        """Compute the offsets once for all layers from `resets` [B, T] bool."""
        if resets.dtype != torch.bool or resets.dim() != 2:
            raise ShapeError(
                f"resets must be bool [B, T]; got {resets.dtype} {list(resets.shape)}"
            )
        batch, length = resets.shape
        starts = resets.clone()
        starts[:, 0] = True
        end = torch.tensor([batch * length], device=resets.device)
        cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), end])
        last = starts.sum(1).cumsum(0) - 1
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        return cls(resets, cu_seqlens, first, last)

    def initial(self, state: Tensor, fresh: Tensor) -> Tensor:
        """Return one initial state a sequence, [n, ...].

        `state` [B, ...] is what row b carries in, `fresh` [...] what a new document starts from.
        """
        n = self.cu_seqlens.numel() - 1
        out = fresh.to(state).expand(n, *fresh.shape)
        keep = ~self.resets[:, 0]
        rows = torch.where(keep.view(-1, *[1] * fresh.dim()), state, fresh.to(state))
        return out.index_copy(0, self.first, rows)
