"""The recurrence by flash-linear-attention's kernels, for comparison; one of its calls a reader.

fla keeps S transposed, [n, H, N_k, N_v], and drives it with two vectors a token: S_t = S_{t-1}
(diag(exp w_t) + a_t^T b_t) + v_t^T k_t with a = -kappa, b = kappa * a in our letters. Its chunk
kernels take half precision on a GPU; float32 inputs are rounded to bfloat16 here, and come back as
float32. fla is imported when this backend is used, and belongs to nobody's `auto`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metastate.errors import ConfigError
from metastate.ops.reference import Trajectory

MODULE = "fla.ops.rwkv7"
# Every argument that is passed. fla takes **kwargs, so a name that it no longer knows would vanish
# in there; each must therefore stand in its signature.
ARGUMENTS = (*"rwkvab", "scale", "initial_state", "output_final_state", "cu_seqlens")
# What its own RWKV-7 layer says of the decay, and without which its kernels take a slower way;
# versions that do not know one of them go without.
HINTS = {"safe_gate": True, "lower_bound": -math.exp(-0.5), "chunk_size": 64}


def require(device: torch.device) -> None:
    """Raise ConfigError where fla is missing or cannot run on `device`."""
    if importlib.util.find_spec("fla") is None:
        raise ConfigError(
            "backend 'fla' needs flash-linear-attention: pip install 'metastate[cuda]'"
        )
    if device.type != "cuda":
        raise ConfigError(f"backend 'fla' runs on CUDA devices only, not on {device}; use 'auto'")


def chunk_function() -> Any:
    """Return fla's chunk_rwkv7 with `HINTS`, once it is known to take every argument by name."""
    function = importlib.import_module(MODULE).chunk_rwkv7
    known = inspect.signature(function).parameters
    missing = [name for name in ARGUMENTS if name not in known]
    if missing:
        raise ConfigError(
            f"the installed flash-linear-attention has no argument {', '.join(missing)} in "
            "chunk_rwkv7 (it would be ignored there); use backend 'triton'"
        )
    return partial(function, **{name: x for name, x in HINTS.items() if name in known})


@dataclass(frozen=True)
class FlaTrajectory(Trajectory):
    """The pass's own inputs: every further reader is another pass."""

    inputs: tuple[Tensor, ...]  # k, v, initial state

    def _read(self, x: Tensor, by: str) -> Tensor:
        if by != "key":
            raise ConfigError("backend 'fla' reads states by key only; use 'triton' or 'chunked'")
        k, v, state = self.inputs
        return _run(x, self.log_w, k, v, self.kappa, self.a, state, self.cu_seqlens)[0]

    def _recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _run(r, self.log_w, k, v, self.kappa, self.a, state, self.cu_seqlens)


def _run(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y in r's dtype and the final state in our layout."""
    half = r.dtype if r.element_size() == 2 else torch.bfloat16
    removal, shape = kappa.float(), r.shape
    given = {"r": r, "k": k, "v": v, "a": -removal, "b": removal * a.float()}
    given = {name: x.to(half) for name, x in given.items()}
    given["w"] = log_w.float()
    if cu_seqlens is not None:  # documents of all rows in one row
        given = {name: x.flatten(0, 1).unsqueeze(0) for name, x in given.items()}
    y, final = chunk_function()(
        **given,
        scale=1.0,
        initial_state=state.float().mT.contiguous(),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return y.reshape(shape).to(r.dtype), final.mT.to(state.dtype)


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, FlaTrajectory]:
    """Run the recurrence; arguments and result as ops.reference.wkv7."""
    y, final = _run(r, log_w, k, v, kappa, a, state, cu_seqlens)
    return y, FlaTrajectory(final, log_w, kappa, a, cu_seqlens, (k, v, state))
