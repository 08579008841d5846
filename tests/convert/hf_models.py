"""Tiny models of every architecture with random weights, for the tests of this folder."""

import torch

from metastate.config import MetaStateConfig, ModelConfig
from metastate.data.tokenizer import ByteTokenizer
from metastate.mapping import to_dict
from metastate.model.lm import LanguageModel

SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 20,
    "decay_rank": 4,
    "icl_rate_rank": 4,
    "value_rank": 4,
    "gate_rank": 4,
}
CONFIGS = {
    "metastate": ModelConfig(**SIZES, ffn_order="after"),
    "with-M": ModelConfig(
        **SIZES | {"head_size": 10, "head_segments": (8, 2), "parameter_tokens": 3},
        meta_state=MetaStateConfig(readout="both", token_shift=True),
    ),
    "rwkv7": ModelConfig(architecture="rwkv7", **SIZES),
    "transformer": ModelConfig(architecture="transformer", **SIZES),
    "tokenformer": ModelConfig(architecture="tokenformer", **SIZES),
    "memory": ModelConfig(**SIZES, ffn_order="after", memory_heads=2, memory_layer=1),
}
RECURRENT = ("metastate", "with-M", "rwkv7", "memory")


def language_model(name, seed=1):
    """Return a model in eval mode, no parameter left at zero, that records the byte tokenizer."""
    model = LanguageModel(CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            scale = (
                p[0].numel() ** -0.5 if p.dim() > 1 and not key.endswith((".mu", ".r_k")) else 0.2
            )
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise if key == "embedding.weight" else p + noise * scale)
        model.head.weight.mul_(3)  # clear winners, so that two ways of rounding choose the same
    model.tokenizer_info = ByteTokenizer().info()
    model.lineage, model.step = [{"step": 7, "before": to_dict(model.config)}], 11
    return model
