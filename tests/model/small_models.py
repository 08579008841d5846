"""Small models for the tests of this folder: every option, no weight left at zero."""

import random

import torch

from metastate.config import MetaStateConfig, ModelConfig
from metastate.model.lm import LanguageModel

SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 20,
    "decay_rank": 3,
    "icl_rate_rank": 4,
    "value_rank": 2,
    "gate_rank": 5,
}
# Head size above D/H (so W_p and a repeated factor), grown once, with parameter tokens.
GROWN = {"head_size": 8, "head_segments": (6, 2), "parameter_tokens": 3}

CHOICES = {
    "readout": ["both", "meta", "encoding"],
    "modulation": ["input", "none"],
    "update": ["delta", "input", "self"],
    "query": ["input", "encoding", "receptance"],
    "encoder_query": ["input", "receptance"],
    "encoding_norm": ["l2", "rms", "none"],
    "output_norm": ["group", "none"],
    "read": ["key", "value"],
    "encoder_size": [None, 5],
    "encoder": ["self_state", "cross"],
    "activation": ["none", "relu2", "silu"],
    "gate": [False, True],
    "token_shift": [False, True],
}


WITH_M = {
    "readout": "both",
    "encoder_query": "input",
}  # more of the layer is at work than by default


def one_at_a_time():
    yield MetaStateConfig()
    yield MetaStateConfig(**WITH_M)
    yield MetaStateConfig.paper()
    for name, values in CHOICES.items():
        for value in values[1:]:
            yield MetaStateConfig(**WITH_M | {name: value})
    for base in ({}, WITH_M):
        yield MetaStateConfig(**base, modulation="none", activation="silu")
        yield MetaStateConfig(**base, gate=True, token_shift=True)
        yield MetaStateConfig(**base, encoder="cross", latent_size=2, variational=True)


def at_random(number):
    draw = random.Random(7)
    for _ in range(number):
        options = {name: draw.choice(values) for name, values in CHOICES.items()}
        if options["readout"] == "encoding":
            for name in ("query", "update", "encoding_norm"):  # these act on M alone
                del options[name]
        if options["encoder"] == "cross":
            options |= {"latent_size": draw.choice([2, 3]), "variational": draw.random() < 0.5}
        yield MetaStateConfig(**options)


def label(options):
    default = MetaStateConfig()
    changed = [f"{k}={v}" for k, v in vars(options).items() if v != getattr(default, k)]
    return ",".join(changed) or "default"


def randomise(model, seed=1):
    """Give every parameter random values, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            matrix = p.dim() > 1 and not name.endswith((".mu", ".r_k"))
            scale = p[0].numel() ** -0.5 if matrix else 0.3
            scale = 1.0 if name == "embedding.weight" else scale
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise * scale if matrix else p + noise * scale)


def build(**fields):
    options = fields.get("meta_state", MetaStateConfig())
    if fields.get("architecture", "metastate") == "metastate" and not options.token_shift:
        fields = {"ffn_order": "after"} | fields
    model = LanguageModel(ModelConfig(**(SIZES | fields))).double().eval()
    randomise(model)
    return model
