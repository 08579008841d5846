"""RWKV-7 files for the tests, made from a list of keys that is not the library's."""

import numpy as np
import torch

from model.oracle import Oracle

SIZES = {"V": 23, "D": 16, "L": 3, "H": 2, "N": 8, "F": 24}
RANKS = {"w": 3, "a": 4, "v": 2, "g": 5}


def official(dtype=torch.float32, unused=True, seed=0, **sizes):
    """Return an RWKV-7 state dict with random weights, as its training code names and lays it."""
    V, D, L, H, N, F = (SIZES | sizes).values()
    draw = torch.Generator().manual_seed(seed)

    def some(*shape, scale=0.3, base=0.0):
        return (base + scale * torch.randn(shape, generator=draw)).to(dtype)

    out = {"emb.weight": some(V, D, scale=1.0)}
    for i in range(L):
        b = f"blocks.{i}."
        for norm in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            out[f"{b}{norm}.weight"], out[f"{b}{norm}.bias"] = some(D, base=1.0), some(D)
        for letter in "rwkvag":
            out[f"{b}att.x_{letter}"] = some(1, 1, D, base=0.5)
        for letter, rank in RANKS.items():
            if i == 0 and letter == "v" and not unused:
                continue
            if letter != "g":
                out[f"{b}att.{letter}0"] = some(1, 1, D)
            out[f"{b}att.{letter}1"] = some(D, rank)
            out[f"{b}att.{letter}2"] = some(rank, D)
        out[f"{b}att.k_k"], out[f"{b}att.k_a"] = some(1, 1, D, base=0.7), some(1, 1, D, base=1.0)
        out[f"{b}att.r_k"] = some(H, N)
        for name in ("receptance", "key", "value", "output"):
            out[f"{b}att.{name}.weight"] = some(D, D)
        out[f"{b}att.ln_x.weight"], out[f"{b}att.ln_x.bias"] = some(D, base=1.0), some(D)
        out[f"{b}ffn.x_k"] = some(1, 1, D, base=0.5)
        out[f"{b}ffn.key.weight"], out[f"{b}ffn.value.weight"] = some(F, D), some(D, F)
    out["ln_out.weight"], out["ln_out.bias"] = some(D, base=1.0), some(D)
    return out | {"head.weight": some(V, D)}


class Sizes:
    """What the NumPy oracle reads of a config, from the shapes of a file."""

    def __init__(self, tensors):
        self.architecture, self.parameter_tokens, self.ffn_size = "rwkv7", 0, None
        self.ffn_order = self.memory_heads = self.memory_layer = None
        self.hidden_size = tensors["emb.weight"].shape[1]
        self.num_heads, self.head_size = tensors["blocks.0.att.r_k"].shape
        self.head_segments = (self.head_size,)
        self.num_layers = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))


def numpy_logits(tensors, tokens):
    """Run RWKV-7's formulas in NumPy float64 on the file's own keys; [T, V]."""
    weights = {}
    for key, x in tensors.items():
        name = key.removeprefix("blocks.").replace("0.ln0", "ln0")
        array = x.double().numpy()
        if name in ("emb.weight", "head.weight"):
            name, array = name[:-7], array if name[0] == "e" else array.T
        elif array.ndim == 3:
            array = array.reshape(-1)
        elif name.split(".")[1] in ("att", "ffn") and name.endswith(".weight") and array.ndim == 2:
            name, array = name[:-7], array.T  # nn.Linear to a matrix that acts on the right
        weights[name] = array
    return Oracle(Sizes(tensors), weights).forward(np.asarray(tokens))[0]
