"""Named sizes, `architecture-size`; those of one size have equal non-embedding parameters (1 %).

The paper's literal layer, which has no hidden width to fit, sets the count of a row: it keeps D and
H, its depth comes nearest to the name (for 150m and above with the 50,304 x D embedding and head
counted in). The others keep D and H and meet the count by depth and FFN width: Meta-State's 1.3 to
1.6 D, which was tried at D 128 alone (docs/log.md), the others' as near to 4 D as the depth allows;
in `tiny` RWKV-7 has 1.8 D in 3 blocks, which did better than 4.3 D in 2, and the Transformer 3 D.
Meta-State alone has a surprise memory, before the top block and of as few heads as may be (before
the head, and with two heads of half the width, it measured worse: docs/log.md).
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from metastate.config import MetaStateConfig, ModelConfig, fewest_memory_heads
from metastate.errors import ConfigError
from metastate.mapping import coerce_fields, merge, to_dict

# size: D, H, depth of the paper's layer, (depth, FFN width) of Meta-State, RWKV-7, Transformer
SIZES: dict[str, tuple[int, int, int, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "tiny": (128, 2, 4, (3, 164), (3, 232), (3, 384)),
    "mini": (256, 4, 12, (8, 408), (6, 944), (6, 1104)),
    "small": (512, 8, 15, (10, 792), (7, 2064), (8, 1936)),
    "150m": (768, 12, 21, (14, 1112), (10, 2816), (10, 3104)),
    "450m": (1536, 12, 21, (14, 2288), (10, 5792), (10, 6464)),
    "900m": (2304, 12, 21, (14, 3488), (10, 8832), (11, 8704)),
    "1.5b": (3072, 12, 21, (14, 4720), (10, 11936), (11, 11872)),
}
ARCHITECTURES = ("metastate", "paper", "rwkv7", "transformer", "tokenformer")
NAMES = [f"{architecture}-{size}" for architecture in ARCHITECTURES for size in SIZES]
SPELLING = f"ARCHITECTURE-SIZE, one of {', '.join(ARCHITECTURES)} and one of {', '.join(SIZES)}"


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the configuration `name`, for example `metastate-mini`, with fields replaced.

    `paper-SIZE` is Meta-State in the paper's literal reading. A mapping given for `meta_state`
    replaces single options of it.

    Raises:
        ConfigError: no such preset (the nearest name is said), or an override is not valid.
    """
    if name not in NAMES:
        guess = near(name)
        hint = f"did you mean {guess!r}?" if guess else f"it is {SPELLING}"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    architecture, size = re.fullmatch(r"(\w+)-(.+)", name).groups()  # type: ignore[union-attr]
    D, H, depth, metastate, rwkv7, transformer = SIZES[size]
    layers, ffn = {
        "metastate": metastate,
        "rwkv7": rwkv7,
        "transformer": transformer,
        # As deep as the Transformer; 8 D attention_slots + 2 D ffn_size = 4 D^2 + 2 D F, 1 to 4.
        "tokenformer": (transformer[0], (4 * D + 2 * transformer[1]) // 16 * 4),
    }.get(architecture, (depth, None))
    fields = {
        "architecture": "metastate" if architecture == "paper" else architecture,
        "hidden_size": D,
        "num_heads": H,
        "num_layers": layers,
        "ffn_size": ffn,
        "attention_slots": ffn // 4 if architecture == "tokenformer" and ffn else None,
        "ffn_order": "after" if architecture == "metastate" else None,
        "memory_heads": fewest_memory_heads(D) if architecture == "metastate" else None,
        "memory_layer": -1 if architecture == "metastate" else None,
        "meta_state": MetaStateConfig.paper() if architecture == "paper" else MetaStateConfig(),
    }
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    if isinstance(meta := overrides.get("meta_state"), dict):
        overrides["meta_state"] = merge(to_dict(config.meta_state), meta)
    return config.replace(**coerce_fields(ModelConfig, overrides, "model"))


def near(name: str) -> str | None:
    """Return the preset that `name` may have been meant to be, None where none is alike."""
    return next(iter(difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.6)), None)
