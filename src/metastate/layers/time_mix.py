"""RWKV-7 time mixing: token shift, low-rank data-dependent decay and rates, the WKV recurrence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metastate import ops
from metastate.config import ModelConfig
from metastate.layers.common import (
    DECAY_BASE,
    KEY,
    OUTPUT,
    RANDOM,
    VECTOR,
    ZERO,
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
    token_shift,
)
from metastate.ops import fused


class TimeMix(nn.Module):
    """Time mixing of RWKV-7 (arXiv:2503.14456), D_att = H N channels of state on a width of D.

    x^i = x_t + (x_{t-1} - x_t) mu_i,  i in r, w, k, v, a, g
    a = sigmoid(lowrank(x^a))      log_w = -exp(-0.5) sigmoid(lowrank(x^w; tanh))
    kappa = unit(k * k_k)          k~ = k (1 + (a - 1) k_a)
    v = v' + (v_first - v') sigmoid(lowrank(x^v))
    S_t = S_{t-1} (diag(w) - kappa^T (a * kappa)) + v^T k~
    o = (g * (group_norm(r S^T) + (sum_N r r_k k~) v)) W_o

    `parameter_tokens` pairs (k_p, v_p) give the state before the first token, S_0 = V_P^T K_P.
    """

    GROWS: ClassVar[dict[str, Growth]] = {
        "receptance.weight": ("H N D", RANDOM),
        "key.weight": ("H N D", KEY),
        "value.weight": ("H N D", RANDOM),
        "output.weight": ("D H N", OUTPUT),
        **{f"{name}.B": ("R H N", RANDOM) for name in ("decay", "icl_rate", "value_mix", "gate")},
        **{f"{name}.bias": ("H N", RANDOM) for name in ("decay", "icl_rate", "value_mix")},
        **dict.fromkeys(("k_k", "k_a", "r_k", "norm.weight", "norm.bias"), ("H N", RANDOM)),
        "token_keys": ("H P N", KEY),
        "token_values": ("H P N", ZERO),
    }

    GROUPS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("mu", "k_k", "k_a", "r_k", "token_keys", "token_values"), VECTOR),
        "decay.bias": DECAY_BASE,
    }

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, A, H = config.hidden_size, config.attention_size, config.num_heads
        assert config.head_size is not None and config.head_segments is not None
        N = config.head_size
        self.num_heads, self.head_size = H, N
        depth = layer / max(config.num_layers - 1, 1)  # 0 -> 1 over the layers
        rest = 1 - layer / config.num_layers  # 1 -> 0
        c = torch.arange(D, device="cpu") / D
        power = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        self.mu = parameter(torch.stack([1 - c ** (p * rest) for p in power.values()]))
        n = torch.arange(A, device="cpu")
        line = n / max(A - 1, 1)
        z = (n % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
        zigzag = z * z.abs()
        self.decay = LowRank(
            D,
            low_rank_size(config.decay_rank, 2.5, D, N),
            A,
            -6 + 6 * line ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
        )
        self.icl_rate = LowRank(
            D,
            low_rank_size(config.icl_rate_rank, 2.5, D, N),
            A,
            -0.19 + 0.3 * zigzag + 0.4 * (line - 0.5),
        )
        self.value_mix = (
            LowRank(
                D,
                low_rank_size(config.value_rank, 1.7, D, N),
                A,
                0.73 - 0.4 * (line - 0.5),
            )
            if layer > 0
            else None
        )
        self.gate = LowRank(D, low_rank_size(config.gate_rank, 5.0, D), A)
        self.k_k = parameter(0.71 - 0.1 * (line - 0.5))
        self.k_a = nn.Parameter(torch.full((A,), 1.02))
        self.r_k = nn.Parameter(torch.full((H, N), -0.04))
        self.receptance = linear(D, A, 1.0)
        self.key = linear(D, A, 0.1)
        self.value = linear(D, A, 1.0)
        self.output = linear(A, D, 0.0)
        self.norm = GroupNorm(
            H, config.head_segments, gain=((1 + layer) / config.num_layers) ** 0.7
        )
        P = config.parameter_tokens
        self.token_keys = nn.Parameter(normal_(torch.empty(H, P, N), N**-0.5)) if P else None
        self.token_values = nn.Parameter(torch.zeros(H, P, N)) if P else None

    def initial_state(self) -> Tensor:
        """Return S_0 = V_P^T K_P, [H, N, N]; zeros without parameter tokens."""
        dtype = ops.state_dtype(self.k_k.dtype)
        if self.token_keys is None or self.token_values is None:
            shape = (self.num_heads, self.head_size, self.head_size)
            return torch.zeros(shape, dtype=dtype, device=self.k_k.device)
        with torch.autocast(self.k_k.device.type, enabled=False):  # a state is never rounded
            return self.token_values.to(dtype).mT @ self.token_keys.to(dtype)

    def forward(
        self,
        x: Tensor,
        S: Tensor,
        shift: Tensor,
        v_first: Tensor | None,
        packing: Packing | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, ops.Trajectory]:
        """Mix x over time.

        Args:
            x: [B, T, D].
            S: state before token 0, [B, H, N, N].
            shift: x before token 0, [B, D].
            v_first: layer 0's value, [B, T, H N]; None in layer 0.
            packing: where documents start; None means nowhere.
            backend: of metastate.ops.

        Returns:
            y [B, T, D], the state S after the last token, the new shift, v_first, and the WKV
            trajectory that the Meta-State layer reads.
        """
        batch, length, _ = x.shape
        heads = (batch, length, self.num_heads, self.head_size)
        fuse = fused.can_fuse(x, backend)
        dtype = self.key.weight.dtype
        x_r, x_w, x_k, x_v, x_a, x_g = token_shift(x, shift, self.mu, packing, backend, dtype)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        log_w, a, kappa, k, v = fused.wkv_inputs(
            k,
            v,
            self.decay(x_w, torch.tanh),
            self.icl_rate(x_a),
            None if self.value_mix is None else self.value_mix(x_v),
            v_first,
            self.decay.bias,
            self.icl_rate.bias,
            None if self.value_mix is None else self.value_mix.bias,
            self.k_k,
            self.k_a,
            head_size=self.head_size,
            fused=fuse,
        )
        v_first = v if v_first is None else v_first
        r, log_w, k, v, kappa, a = (t.view(heads) for t in (r, log_w, k, v, kappa, a))
        start = None if packing is None else packing.start
        fresh = self.initial_state() if start is None else start.S[0]
        options: Any = {"backend": backend}
        if packing is not None:
            options |= {"cu_seqlens": packing.cu_seqlens, "offsets_checked": True}

        def write(v: Tensor, before: Tensor) -> Tensor:
            return ops.wkv7(r, log_w, k, v, kappa, a, before, **options)[1]

        S = handed_on(write, v, S, fresh, packing)
        initial = S if packing is None else packing.initial(S, fresh)
        y, trajectory = ops.wkv7_trajectory(r, log_w, k, v, kappa, a, initial, **options)
        fuse = fuse and len(self.norm.segments) == 1
        g = self.gate(x_g, torch.sigmoid)
        out = self.output(
            fused.wkv_output(y, r, k, v, g, self.r_k, self.norm, dtype=dtype, fused=fuse)
        )
        shift = x[:, -1].clone()  # a view would keep all of x alive in the state
        return out, last_of_rows(trajectory.state, packing), shift, v_first, trajectory
