"""Meta-State: an RWKV-7 language model whose second layer reads the WKV state itself.

    import metastate

    model = metastate.load("metastate-tiny")            # a preset, or the folder of a checkpoint
    logits, state = model(tokens)                       # tokens [B, T] int64 -> logits [B, T, V]
    metastate.save(model, "runs/mine")                  # model.safetensors + config.json
    larger = metastate.grow(model, head_size=128)       # the same function, more parameters

Importing this package is cheap: torch is loaded with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metastate import errors

if TYPE_CHECKING:
    from metastate import ops
    from metastate.growth import grow, grow_state, upgrade
    from metastate.model.io import load, save

__version__ = "0.1.0"
__all__ = ["__version__", "errors", "grow", "grow_state", "load", "ops", "save", "upgrade"]

_LAZY = {
    "grow": "metastate.growth",
    "grow_state": "metastate.growth",
    "load": "metastate.model.io",
    "save": "metastate.model.io",
    "upgrade": "metastate.growth",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("metastate.ops")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'metastate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
