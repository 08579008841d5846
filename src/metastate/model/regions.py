"""Which entries of each parameter a grown model has from its parent, and which are new."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from metastate.config import ModelConfig
from metastate.layers.common import IDENTITY
from metastate.model.lm import LanguageModel, sketch

# Growth leaves the vocabulary; resize_token_embeddings of convert/hf.py does not.
VOCABULARY = {"embedding.weight": "V D", "head.weight": "V D"}


@dataclass(frozen=True)
class Region:
    """A box of a parameter's entries.

    Attributes:
        shape: the parameter's axes taken apart, as [H, N, D] for a projection [H N, D].
        box: first and last + 1 index of each axis.
    """

    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]

    def of(self, x: Tensor) -> Tensor:
        """Return the region's entries of x, a parameter or what is laid out like one, as a view."""
        return x.view(self.shape)[tuple(slice(*ends) for ends in self.box)]


@dataclass(frozen=True)
class Regions:
    """The entries of one parameter, in disjoint regions that cover it.

    Attributes:
        old: what the parent had too, in the parent's order; None where it had no such parameter.
        new: what was added, by the axis it was added along ("" for a whole new parameter). A box
            covers only old entries of the axes before its own.
    """

    old: Region | None
    new: dict[str, Region] = field(default_factory=dict)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the length of each axis that can grow: H, N, P, F, A and V of docs/notation.md."""
    assert config.head_size is not None
    return {
        "H": config.num_heads,
        "N": config.head_size,
        "P": config.parameter_tokens,
        "F": config.hidden_channels,
        "A": config.attention_slots or 0,
        "V": config.vocab_size,
    }


def regions(model: LanguageModel, parent: ModelConfig) -> dict[str, Regions]:
    """Split the parameters of a grown `model` into what a model of the config `parent` had and not.

    A vocabulary resized after the growth is split too: rows that `parent` had not are new.

    Returns:
        Regions by parameter name. Without growth between the two, everything is old.
    """
    before = dict(sketch(parent).named_parameters())
    sizes, old_sizes = axis_sizes(model.config), axis_sizes(parent)
    axes, out = model.growth_axes(), {}
    for name, p in model.named_parameters():
        whole = Region(tuple(p.shape), tuple((0, n) for n in p.shape))
        layer = name[: name.rindex(".") + 1]  # what the names of its parameters begin with
        letters, rule = axes.get(name, (VOCABULARY.get(name, ""), ""))
        if name in before:
            old = _apart(before[name], letters.split(), old_sizes)
        elif rule == IDENTITY and any(n.startswith(layer) for n in before):
            old = (p.shape[0], old_sizes["N"])
        else:
            out[name] = Regions(None, {"": whole})
            continue
        shape = _apart(p, letters.split(), sizes)
        old = tuple(map(min, old, shape))  # a vocabulary can become smaller
        if p.numel() == math.prod(old):
            out[name] = Regions(whole)
            continue
        box = tuple((0, n) for n in old)
        new = {
            letter: Region(shape, (*box[:i], (old[i], n), *((0, m) for m in shape[i + 1 :])))
            for i, (letter, n) in enumerate(zip(letters.split(), shape, strict=True))
            if old[i] < n
        }
        out[name] = Regions(Region(shape, box), new)
    return out


def _apart(p: Tensor, letters: list[str], sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape of p with one axis a letter; at most one letter is of unknown length."""
    if not letters:
        return tuple(p.shape)
    known = [int(a) if a.isdigit() else sizes.get(a, -1) for a in letters]
    rest = p.numel()
    for n in known:
        rest = rest // n if n > 0 else rest
    return tuple(rest if n < 0 else n for n in known)
