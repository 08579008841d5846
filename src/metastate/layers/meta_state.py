"""The Meta-State layer: the WKV state itself is the weight matrix, a second state is its memory.

Source: arXiv:2504.08247, eqs 1-4 and 7-11. The paper's formulas are lost; every reading of its
prose is an option of MetaStateConfig. docs/architecture.md says which words each equation rests on.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metastate import ops
from metastate.config import ModelConfig
from metastate.layers.common import (
    IDENTITY,
    KEY,
    MATRIX,
    OUTPUT,
    RANDOM,
    VECTOR,
    GroupNorm,
    Growth,
    LowRank,
    Packing,
    handed_on,
    last_of_rows,
    linear,
    low_rank_size,
    normal_,
    parameter,
    segment_norm,
    token_shift,
)
from metastate.ops import fused


class MetaState(nn.Module):
    """Meta-State layer, per head (every bracket an option of `config.meta_state`).

    e_t = x_t S_t^T  or  (x_t W_r) S_t^T        self-state encoder (`encoder_query`, `read`,
                                                `encoder_size`); W_r is time mixing's receptance
    e_t = silu([x_t, e_t] W_z) W_u              compressing cross-encoder (`encoder="cross"`)
    M_t = M_{t-1} G_t + U_t                     meta state (`update`, `encoding_norm`)
    y_t = norm(q_t M_t^T) + norm(e_t)           readout (`readout`, `query`, `output_norm`)
    o_t = concat_h(y_t * act(x_t) [* g_t]) W_o  `modulation`, `activation`, `gate`

    W_o is zero at the start. A head's x_t is its slice of the input, D/H wide. Where N is larger
    the state reads x W_p, W_p = [I 0] at the start, and the modulation repeats the slice. With
    `token_shift`, x is lerp(x_t, x_{t-1}, mu).
    """

    GROWS: ClassVar[dict[str, Growth]] = {
        "output.weight": ("D H N", OUTPUT),
        "projection": ("D N", IDENTITY),
        "gate.B": ("R H N", RANDOM),
        "compress": ("H 2 N R", KEY),
        "expand": ("H R N", RANDOM),
        **{
            f"{norm}.{name}": ("H N", RANDOM)
            for norm in ("meta_norm", "encoding_norm")
            for name in ("weight", "bias")
        },
    }

    GROUPS: ClassVar[dict[str, str]] = {
        **{"projection": VECTOR, "mu": VECTOR},
        **{"compress": MATRIX, "expand": MATRIX},
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_size is not None and config.head_segments is not None
        assert config.input_slices is not None
        D, H, N = config.hidden_size, config.num_heads, config.head_size
        width = D // config.input_slices
        options = self.options = config.meta_state
        self.num_heads, self.head_size, self.segments = H, N, config.head_segments
        self.slices = config.input_slices
        self.has_meta = options.readout != "encoding"
        sees_slices = (
            self.has_meta or options.encoder_query == "input" or options.encoder == "cross"
        )
        is_grown = width != N and sees_slices
        self.projection = parameter(torch.eye(width, N, device="cpu")) if is_grown else None
        normed = options.output_norm == "group"
        gain = options.readout_gain
        self.meta_norm = (
            GroupNorm(H, self.segments, gain=gain) if normed and self.has_meta else None
        )
        reads_encoding = options.readout != "meta"
        self.encoding_norm = (
            GroupNorm(H, self.segments, gain=gain) if normed and reads_encoding else None
        )
        num_mixes = (1 + options.gate) if options.token_shift else 0
        self.mu = nn.Parameter(torch.full((num_mixes, D), 0.5)) if num_mixes else None
        self.gate = (
            LowRank(D, low_rank_size(config.gate_rank, 5.0, D), H * N) if options.gate else None
        )
        self.output = linear(H * N, D, 0.0)
        if options.encoder == "cross":
            width = options.latent_size or max(1, N // 2)
            latent = torch.empty(H, 2 * N, width * (1 + options.variational))
            self.compress = nn.Parameter(normal_(latent, (2 * N) ** -0.5))
            self.expand = nn.Parameter(normal_(torch.empty(H, width, N), width**-0.5))

    def forward(
        self,
        x: Tensor,
        trajectory: ops.Trajectory,
        M: Tensor | None,
        shift: Tensor | None,
        packing: Packing | None = None,
        backend: str = "auto",
        receptance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Read the WKV states with x and evolve the meta state.

        Args:
            x: [B, T, D].
            trajectory: of the block's time mixing over the same tokens.
            M: meta state before token 0, [B, H, N, N], or None where the readout has none.
            shift: x before token 0, [B, D], or None without `token_shift`.
            packing: where documents start.
            backend: of metastate.ops.
            receptance: x W_r, [B, T, H N], which reads S or M where `encoder_query` or `query` says
                so; None where neither does.

        Returns:
            y [B, T, D], M after the last token, the new shift, and the mean KL divergence a token
            of a variational encoder (nats), None without one.
        """
        options = self.options
        batch, length, width = x.shape
        x_g, new_shift = x, None
        if self.mu is not None:
            assert shift is not None
            new_shift, mixes = x[:, -1].clone(), token_shift(x, shift, self.mu, packing, backend)
            x, x_g = mixes[0], mixes[-1]
        by_head = x.view(batch, length, self.slices, width // self.slices)
        if self.slices < self.num_heads:  # grown heads read the slices of old ones
            by_head = by_head[:, :, torch.arange(self.num_heads, device=x.device) % self.slices]
        x_state = by_head if self.projection is None else by_head @ self.projection
        heads = (batch, length, self.num_heads, self.head_size)
        r = x_state if receptance is None else receptance.view(heads)
        asked = r if options.encoder_query == "receptance" else x_state
        e, kl = self.encode(x_state, asked, trajectory)
        q = r if options.query == "receptance" else None
        sources, M = self.evolve(x_state, e, q, trajectory, M, packing, backend)
        norms = [norm for norm in (self.meta_norm, self.encoding_norm) if norm is not None]
        factor = None
        if options.modulation == "input":
            repeats = -(-self.head_size // by_head.shape[-1])
            factor = by_head.repeat(1, 1, 1, repeats) if repeats > 1 else by_head
            factor = self.activate(factor[..., : self.head_size].flatten(2))
        if norms and factor is not None:
            fuse = fused.can_fuse(x, backend) and len(self.segments) == 1
            y = fused.norm_product(sources, norms, factor, fused=fuse)
        else:
            flat = [n(t) for n, t in zip(norms, sources, strict=True)] if norms else sources
            y = flat[0] if len(flat) == 1 else flat[0] + flat[1]
            y = y.reshape(batch, length, -1)
            y = self.activate(y) if factor is None else y * factor
        if self.gate is not None:
            y = y * self.gate(x_g, torch.sigmoid)
        # The kernels compute in float32, also of a model whose weights are stored in 16 bits.
        return self.output(y.to(self.output.weight.dtype)), M, new_shift, kl

    def encode(
        self, x: Tensor, asked: Tensor, trajectory: ops.Trajectory
    ) -> tuple[Tensor, Tensor | None]:
        """Return the state-encoded token e [B, T, H, N] and a variational encoder's KL term.

        The states are read with `asked`; the cross-encoder sees x besides.
        """
        options, size = self.options, self.options.encoder_size
        if size is None or size == self.head_size:
            e = trajectory.read(asked, by=options.read)
        else:  # the top-left size x size block of S: other channels neither ask nor answer
            kept = F.pad(asked[..., :size], (0, self.head_size - size))
            e = F.pad(
                trajectory.read(kept, by=options.read)[..., :size], (0, self.head_size - size)
            )
        if options.encoder == "self_state":
            return e, None
        pair = torch.cat([x, e.to(x.dtype)], -1)
        z = torch.einsum("bthn,hnr->bthr", pair, self.compress.to(pair.dtype))
        kl = None
        if options.variational:
            mean, log_var = z.to(ops.state_dtype(z.dtype)).chunk(2, -1)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((-1, -2)).mean()
            if self.training:
                mean = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
            z = mean.to(x.dtype)
        else:
            z = F.silu(z)
        return torch.einsum("bthr,hrn->bthn", z, self.expand.to(z.dtype)), kl

    def evolve(
        self,
        x: Tensor,
        e: Tensor,
        q: Tensor | None,
        trajectory: ops.Trajectory,
        M: Tensor | None,
        packing: Packing | None,
        backend: str,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return what the readout adds up, q M^T and e as `readout` says, and M after the end.

        Without a q M is read with what `query` names of x and the written e.
        """
        options, sources = self.options, []
        if self.has_meta:
            assert M is not None
            if options.encoding_norm == "l2" and len(self.segments) == 1:
                written = fused.unit(e, fused=fused.can_fuse(e, backend))
            else:
                written = segment_norm(e, options.encoding_norm, self.segments)
            if options.query == "encoding":
                q = written

            def run(e: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
                return ops.meta_state(
                    x,
                    e,
                    q,
                    trajectory,
                    before,
                    update=options.update,
                    first_size=self.segments[0],
                    backend=backend,
                )

            start = None if packing is None or packing.start is None else packing.start.M
            fresh = M.new_zeros(M.shape[1:]) if start is None else start[0]
            M = handed_on(lambda e, before: run(e, before)[1], written, M, fresh, packing)
            y, final = run(written, M if packing is None else packing.initial(M, fresh))
            M = last_of_rows(final, packing)
            sources.append(y)
        if options.readout != "meta":
            sources.append(e)
        return sources, M

    def activate(self, x: Tensor) -> Tensor:
        """Apply `activation`."""
        kind = self.options.activation
        if kind == "none":
            return x
        return F.silu(x) if kind == "silu" else fused.relu_squared(x)
