"""Hashes of tensors: which weights a model has, and so whose a state is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metastate.model.lm import LanguageModel

# The weights hash of each model, and what its weights looked like then.
_HASHES: WeakKeyDictionary[LanguageModel, tuple[list[Any], str]] = WeakKeyDictionary()
WORDS = 2**16  # of a tensor that `_mark` weighs at once; what a core's cache holds
ODD = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio


def weights_hash(model: LanguageModel) -> str:
    """Return the SHA-256 of a model's weights, names and shapes included, in hexadecimal.

    A model that `load` made has the hash of the weights in its file as long as its own are these,
    in whatever number format: what was made in float32 fits the same checkpoint in bfloat16. Which
    it is, is seen by comparing them, so that no change of the weights goes by.

    Kept for each model and made again when the weights have changed. Fused optimizers and `.data`
    do not raise a tensor's version counter, so a checksum is compared too: a third of the time of
    the hash on a CPU that has instructions for it.
    """
    tensors = {name: x.detach() for name, x in model.state_dict().items()}
    marks = [(name, x.dtype, *_mark(x)) for name, x in tensors.items()]
    known = _HASHES.get(model)
    if known is None or known[0] != marks:
        if model.stored is not None and _is_cast(model.stored, tensors):
            tensors = {name: model.stored[name] for name in tensors}
        known = _HASHES[model] = marks, digest_of(tensors)
    return known[1]


def digest_of(tensors: Mapping[str, Tensor], head: bytes = b"") -> str:
    """Return the SHA-256 of `head` and of tensors by name, shapes and dtypes included."""
    digest = hashlib.sha256(head)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name}{list(x.shape)}{x.dtype}".encode())
        digest.update(_raw(x).cpu().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _is_cast(stored: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Say whether each of a model's tensors is the stored one, but for device and dtype."""
    return stored.keys() == own.keys() and all(
        stored[name].shape == x.shape and torch.equal(_raw(stored[name].to(x)), _raw(x))
        for name, x in own.items()
    )


def _raw(x: Tensor) -> Tensor:
    """Return a tensor's bytes, [num_bytes] uint8."""
    return x.contiguous().view(-1).view(torch.uint8)


def _mark(x: Tensor) -> tuple[Any, ...]:
    """Return the version of a tensor and a checksum of its bits that sees their order.

    sum_i m_i x_i mod 2^64 over words x_i of eight bytes; m_i odd, so that no single change is lost,
    and different everywhere: those of one run of words, times a power of ODD for the run.
    """
    raw = _raw(x)
    if raw.storage_offset() % 8:
        raw = raw.clone()  # a view of eight bytes must begin at a multiple of eight
    whole = len(raw) // 8 * 8
    words = raw[:whole].view(torch.int64)
    weights = torch.arange(min(len(words), WORDS), device=x.device) * ODD
    weights = (weights ^ (weights >> 29)) | 1
    buffer, sums = torch.empty_like(weights), []  # fresh memory would cost more than the rest
    for run in words.split(WORDS):
        n = len(run)
        sums.append(torch.mul(run, weights[:n], out=buffer[:n]).sum())
    total = 0
    for found in torch.stack(sums).tolist() if sums else ():
        total = (total * ODD + found) % 2**64
    return 0 if x.is_inference() else x._version, total, *raw[whole:].tolist()
