"""Put Meta-State layers into a trained RWKV-7: beside its feed-forward layers, or in their place.

Beside them nothing changes: x += MetaState(ln2(x), S) + ChannelMix(ln2(x)), and a Meta-State
layer's W_o is zero at the start. (A parent with `ffn_order="after"` gets the layer before the
feed-forward layer, which keeps its norm.) This is growth: a change of shape that keeps the
function, with what the parent had as old entries and the layers as new ones, so `old_lr_scale` can
freeze or slow the parent and train what was added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ConfigError
from metastate.growth.expand import drawing, inherit
from metastate.layers.meta_state import MetaState
from metastate.model.block import RecurrentBlock
from metastate.model.lm import LanguageModel, sketch


def upgraded_config(
    config: ModelConfig,
    layers: Iterable[int] | None = None,
    *,
    replace: bool = False,
    meta_state: MetaStateConfig | None = None,
) -> ModelConfig:
    """Return the configuration of an upgraded model; arguments as `upgrade`.

    Raises:
        ConfigError: as `upgrade`.
    """
    kind, depth = config.architecture, range(config.num_layers)
    if kind not in ("rwkv7", "metastate"):
        raise ConfigError(f"a {kind} has no WKV state to read; only rwkv7 can be upgraded")
    chosen = sorted(set(depth if layers is None else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] > depth[-1]:
        raise ConfigError(f"layers are {chosen}; blocks from 0 to {depth[-1]}, at least one")
    before = [config.second_layers(i) for i in depth]
    if any(meta for meta, _ in before) and meta_state not in (None, config.meta_state):
        raise ConfigError(
            "the model has Meta-State layers already, and all are of one kind; leave its options "
            "out"
        )
    after = [
        (meta or i in chosen, ffn and not (replace and i in chosen))
        for i, (meta, ffn) in enumerate(before)
    ]
    if after == before:
        raise ConfigError(
            f"nothing changes: blocks {', '.join(map(str, chosen))} have a Meta-State "
            f"layer{' and no feed-forward layer' if replace else ''} already"
        )
    ffn_layers = tuple(i for i, (_, ffn) in enumerate(after) if ffn)
    return config.replace(
        architecture="metastate",
        meta_state=meta_state or (config.meta_state if kind == "metastate" else MetaStateConfig()),
        meta_layers=tuple(i for i, (meta, _) in enumerate(after) if meta),
        ffn_layers=ffn_layers or None,
        ffn_size=config.hidden_channels if ffn_layers else None,
    )


@torch.no_grad()
def upgrade(
    model: LanguageModel,
    layers: Iterable[int] | None = None,
    *,
    replace: bool = False,
    meta_state: MetaStateConfig | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Return an RWKV-7 with Meta-State layers; `model` is not changed.

    Args:
        model: the parent, an rwkv7, or a metastate some of whose blocks were upgraded before.
        layers: blocks that get the layer, from 0; None means all.
        replace: take the feed-forward layer of these blocks out. That changes the function.
        meta_state: options of the layer; None means the default layer, or the parent's.
        seed: of the new entries.

    Returns:
        The upgraded model on the parent's device and in its dtype; its lineage has one more step.
        Without `replace` its logits are the parent's bit by bit.

    Raises:
        ConfigError: another architecture, no such block, nothing to change, or other options than
            the layers that are there; or torch takes no such seed.

    Source: arXiv:2504.08247, eqs 5 and 6, for the block; the upgrade is ours.
    """
    config = upgraded_config(model.config, layers, replace=replace, meta_state=meta_state)
    upgraded = sketch(config)
    needed = upgraded.state_dict().keys()
    own = {k: v.detach().clone() for k, v in model.state_dict().items() if k in needed}
    upgraded.load_state_dict(own, strict=False, assign=True)
    like = model.embedding.weight
    with drawing(seed):
        for i, block in enumerate(upgraded.blocks):
            assert isinstance(block, RecurrentBlock)
            if block.meta_state is not None and not model.config.second_layers(i)[0]:
                block.meta_state = MetaState(config).to(like)
                if block.ln3 is not None:  # the norm of what was there alone
                    block.ln3 = copy.deepcopy(block.ln2)
    both = (model.config, config)
    step: dict[str, Any] = {
        name: [[i for i in range(c.num_layers) if c.second_layers(i)[which]] for c in both]
        for which, name in enumerate(("meta_layers", "ffn_layers"))
    }
    inherit(upgraded, model, step | {"seed": seed})
    return upgraded.train(model.training)
