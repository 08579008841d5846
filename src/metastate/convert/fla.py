"""RWKV-7 in the Hugging Face layout of flash-linear-attention: its keys and ours, both ways.

Matrices are [out, in] as in nn.Linear, also those of the low-rank maps, whose factors are ours
transposed; the six mixes are [1, 1, D] each, in old files one `x_x` [6, D]. The state dict alone
fixes the sizes; of the config only what would change the function is read.

Source: flash-linear-attention, fla/models/rwkv7 and fla/layers/rwkv7.py (its LoRA is a
Sequential of linear, activation, linear).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metastate.config import ModelConfig
from metastate.errors import CheckpointError, ConfigError
from metastate.model.lm import LanguageModel

MODEL_TYPES = ("rwkv7", "rwkv7_fla")
EPS = 1e-5  # of the layer norms; the group norm's is head_dim times it there, always 64e-5 here
# What changes the function: the value that ours has, and what theirs has where it is not given.
FUNCTION = {
    "attn": None,
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": EPS,
    "tie_word_embeddings": False,
}
OUTER = {
    "model.embeddings.weight": "embedding.weight",
    **{f"model.layers.0.pre_norm.{x}": f"ln0.{x}" for x in ("weight", "bias")},
    **{f"model.norm.{x}": f"ln_out.{x}" for x in ("weight", "bias")},
    "lm_head.weight": "head.weight",
}
MIXES = tuple(f"attn.x_{letter}" for letter in "rwkvag")  # the order of time_mix.mu
LOW_RANK = {"w": "decay", "a": "icl_rate", "v": "value_mix", "g": "gate"}
PROJECTIONS = {"r": "receptance", "k": "key", "v": "value", "o": "output"}
FACTORS = {
    **{f"attn.{a}_lora.lora.0.weight": f"time_mix.{b}.A" for a, b in LOW_RANK.items()},
    **{f"attn.{a}_lora.lora.2.weight": f"time_mix.{b}.B" for a, b in LOW_RANK.items()},
}
BLOCK = {
    **{f"attn_norm.{x}": f"ln1.{x}" for x in ("weight", "bias")},
    **{f"attn.{a}_proj.weight": f"time_mix.{b}.weight" for a, b in PROJECTIONS.items()},
    **FACTORS,
    **{f"attn.{a}_lora.lora.2.bias": f"time_mix.{LOW_RANK[a]}.bias" for a in "wav"},
    **{f"attn.{name}": f"time_mix.{name}" for name in ("k_k", "k_a", "r_k")},
    **{f"attn.g_norm.{x}": f"time_mix.norm.{x}" for x in ("weight", "bias")},
    **{f"ffn_norm.{x}": f"ln2.{x}" for x in ("weight", "bias")},
    "ffn.x_k": "channel_mix.mu",
    **{f"ffn.{name}.weight": f"channel_mix.{name}.weight" for name in ("key", "value")},
}
VECTORS = ("attn.k_k", "attn.k_a", "ffn.x_k")


def from_fla(
    info: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return our configuration and state dict from a config.json and its state dict.

    Raises:
        CheckpointError: a key is missing or unknown, or the config asks for another function.
    """
    for name, ours in FUNCTION.items():
        if (found := info.get(name, ours)) != ours:
            raise CheckpointError(
                f"the config says {name} {found!r}; only {ours!r} is RWKV-7 as this program "
                "computes it"
            )
    rest = dict(tensors)

    def take(key: str) -> Tensor:
        if key not in rest:
            raise CheckpointError(f"the weights have no {key!r}, which RWKV-7 needs")
        return rest.pop(key)

    out = {ours: take(theirs) for theirs, ours in OUTER.items()}
    layer = 0
    while f"model.layers.{layer}.attn_norm.weight" in rest:
        prefix = f"model.layers.{layer}."
        if f"{prefix}attn.x_x" in rest:
            mu = take(f"{prefix}attn.x_x")
        else:
            rows = [take(prefix + name).flatten() for name in MIXES]
            if len({len(row) for row in rows}) > 1:
                raise CheckpointError(f"the six mixes {prefix}{MIXES[0]} and so on differ in width")
            mu = torch.stack(rows)
        out[f"blocks.{layer}.time_mix.mu"] = mu
        for theirs, ours in _inner(layer):
            x = take(prefix + theirs)
            if theirs in FACTORS and x.dim() != 2:
                shape = list(x.shape)
                raise CheckpointError(f"{prefix}{theirs} is {shape}; two axes are needed")
            x = x.flatten() if theirs in VECTORS else x
            out[f"blocks.{layer}.{ours}"] = x.mT.contiguous() if theirs in FACTORS else x
        layer += 1
    if rest:
        raise CheckpointError(f"the weights hold {min(rest)!r}, which RWKV-7 does not have")
    if layer == 0:
        raise CheckpointError("the weights have no 'model.layers.0.attn_norm.weight'; no layers")
    return _config(out, layer), out


def to_fla(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the state dict of an rwkv7; the inverse of `from_fla`.

    Raises:
        ConfigError: that layout cannot say what the model computes.
    """
    config = model.config
    if config.architecture != "rwkv7" or config.parameter_tokens:
        raise ConfigError(
            f"the layout of flash-linear-attention is RWKV-7's; a {config.architecture} with "
            f"{config.parameter_tokens} parameter tokens has parts that it has no keys for"
        )
    if config.memory_heads:
        raise ConfigError("the model has a surprise memory, for which that layout has no keys")
    if config.head_size != 64 or config.attention_size != config.hidden_size:
        raise ConfigError(
            f"the layout of flash-linear-attention needs heads of 64 channels (its norm's eps "
            f"follows them) that fill the width; the model has {config.num_heads} of "
            f"{config.head_size} on {config.hidden_size}"
        )
    own = {name: x.detach() for name, x in model.state_dict().items()}
    out = {theirs: own[ours] for theirs, ours in OUTER.items()}
    for i in range(config.num_layers):
        mu = own[f"blocks.{i}.time_mix.mu"]
        for name, row in zip(MIXES, mu, strict=True):
            out[f"model.layers.{i}.{name}"] = row[None, None]
        for theirs, ours in _inner(i):
            x = own[f"blocks.{i}.{ours}"]
            out[f"model.layers.{i}.{theirs}"] = x.mT.contiguous() if theirs in FACTORS else x
    last = f"model.layers.{config.num_layers - 1}.attn."
    ranks = {
        name: out[f"{last}{letter}_lora.lora.0.weight"].shape[0]
        for letter, name in zip("wag", ("decay", "a", "gate"), strict=True)
    }
    if config.num_layers > 1:
        ranks["v"] = out[f"{last}v_lora.lora.0.weight"].shape[0]
    info = {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": MODEL_TYPES[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "hidden_ratio": config.hidden_channels / config.hidden_size,
        "intermediate_size": config.hidden_channels,
        "num_hidden_layers": config.num_layers,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
        "value_dim": [config.hidden_size] * config.num_layers,
        **{f"{name}_low_rank_dim": rank for name, rank in ranks.items()},
        **FUNCTION,
    }
    return info, out


def _inner(layer: int) -> list[tuple[str, str]]:
    """Return their and our names in a block, its mixes left out; block 0 has no value residual."""
    return [(a, b) for a, b in BLOCK.items() if layer > 0 or "v_lora" not in a]


def _config(own: Mapping[str, Tensor], num_layers: int) -> ModelConfig:
    """Return the configuration that our state dict implies; its shapes are checked later."""

    def size(name: str, axis: int) -> int:
        shape = own[name].shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"the weight {name} is {list(shape)}; two axes are needed")
        return shape[axis]

    mix = "blocks.0.time_mix"
    value_rank = size("blocks.1.time_mix.value_mix.A", 1) if num_layers > 1 else None
    if size(f"{mix}.r_k", 1) != 64:
        raise CheckpointError(
            f"its heads have {size(f'{mix}.r_k', 1)} channels; the group norm's eps follows them "
            "in flash-linear-attention, so that only 64 give the same function here"
        )
    try:
        return ModelConfig(
            architecture="rwkv7",
            vocab_size=size("embedding.weight", 0),
            hidden_size=size("embedding.weight", 1),
            num_layers=num_layers,
            num_heads=size(f"{mix}.r_k", 0),
            head_size=size(f"{mix}.r_k", 1),
            ffn_size=size("blocks.0.channel_mix.key.weight", 0),
            decay_rank=size(f"{mix}.decay.A", 1),
            icl_rate_rank=size(f"{mix}.icl_rate.A", 1),
            value_rank=value_rank,
            gate_rank=size(f"{mix}.gate.A", 1),
        )
    except ConfigError as cause:
        raise CheckpointError(f"the sizes of the weights do not fit each other: {cause}") from None
