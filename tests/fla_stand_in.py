"""A stand-in of flash-linear-attention: its documented function, token by token, on any device."""

import sys
import types

import torch

from metastate.ops import fla


def chunk_rwkv7(
    r,
    w,
    k,
    v,
    a,
    b,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    safe_gate=False,
    chunk_size=None,
    disable_recompute=False,
    cp_context=None,
    lower_bound=None,
    **kwargs,
):
    """What fla documents: w a log decay, states [n, H, K, V], packed documents in one row.

    S_t = S_{t-1} (diag(exp w_t) + a_t^T b_t) + v_t^T k_t in [V, K]; o_t = scale r_t S_t^T.
    """
    assert not kwargs, f"would be swallowed: {kwargs}"
    assert all(x.dtype == torch.bfloat16 for x in (r, k, v, a, b)) and w.dtype == torch.float32
    if initial_state is None:
        rows = r.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = r.new_zeros(rows, r.shape[2], *2 * r.shape[3:], dtype=torch.float32)
    assert initial_state.dtype == torch.float32 and initial_state.is_contiguous()
    assert (safe_gate, chunk_size) == (True, 64) and lower_bound <= w.min() and w.max() < 0
    offsets = [0, r.shape[1]]
    if cu_seqlens is not None:
        assert r.shape[0] == 1 and len(initial_state) == len(cu_seqlens) - 1
        offsets = cu_seqlens.tolist()
    given = [x.double() for x in (r, w, k, v, a, b)]
    out, finals = [], []
    for i, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        first = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        S = first.double().mT
        for t in range(start, end):
            r_t, w_t, k_t, v_t, a_t, b_t = (x[:, t] for x in given)
            removed = torch.einsum("bhvk,bhk->bhv", S, a_t)
            S = S * w_t.exp()[..., None, :] + removed[..., None] * b_t[..., None, :]
            S = S + v_t[..., None] * k_t[..., None, :]
            out.append(scale * torch.einsum("bhvk,bhk->bhv", S, r_t))
        finals.append(S.mT.float())
    return torch.stack(out, 1).to(r.dtype), torch.cat(finals) if output_final_state else None


def install(monkeypatch):
    """Put a module of fla's names in its place; return it."""
    module = types.ModuleType("fla.ops.rwkv7")
    module.chunk_rwkv7 = chunk_rwkv7
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", module)
    monkeypatch.setattr(fla, "require", lambda device: None)
    return module
