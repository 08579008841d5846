"""Weights that the authors of RWKV-7 trained with their own kernels, run by ours.

    git clone --depth 1 https://github.com/BlinkDL/RWKV-LM
    python recipes/released_rwkv7.py RWKV-LM/RWKV-v8/260123_reverse_L2_only_rwkv7.pth

That file (32 channels, two heads of 16, two blocks) reverses numbers: "1234,4321#". Its authors
report every digit right for 10 numbers of each length from 1 to 60 (they print 396,500, since their
script adds up running totals; it is 18,900 digits). The same numbers are drawn here; --numbers asks
for more. Their script keeps the layers under names of its own, has no norm behind the embedding,
adds a constant behind each time mixing (its other layer there is switched off) and one to the
logits. The layers are renamed, read by the reader of `metastate convert` and run as they are; the
constants are added here.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.convert import blinkdl
from metastate.errors import CheckpointError
from metastate.model.lm import LanguageModel
from metastate.model.state import RecurrentState

SYMBOLS = "0123456789,#"
WANTED = "not 260123_reverse_L2_only_rwkv7.pth, which this recipe reads"
RENAMED = {"e": "emb", "lno": "ln_out", "o": "head"}
RENAMED |= {
    f"{theirs}{i + 1}": f"blocks.{i}.{official}"
    for i in (0, 1)
    for theirs, official in (("rwkv", "att"), ("ffn", "ffn"))
}
RENAMED |= {
    f"ln{i + 1}{letter}": f"blocks.{i}.ln{n}" for i in (0, 1) for n, letter in ((1, "a"), (2, "b"))
}


def opened(path: Path) -> tuple[LanguageModel, list[Tensor], Tensor]:
    """Return the model, what is added behind each time mixing, and what to the logits."""
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        known = not theirs["rosa1.rosa_qkv.emb"].any()
    except Exception as cause:  # torch raises many kinds
        raise CheckpointError(f"{path} is {WANTED}: {cause!r}") from cause
    if not known:
        raise CheckpointError(f"{path} is {WANTED}")
    official = {}
    for name, x in theirs.items():
        first, _, rest = name.partition(".")
        if first in RENAMED and name != "o.bias":
            official[f"{RENAMED[first]}.{rest}"] = x
    width = theirs["e.weight"].shape[1]
    official |= {"blocks.0.ln0.weight": torch.ones(width), "blocks.0.ln0.bias": torch.zeros(width)}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(official, f"{folder}/official.pth")
        model, _ = blinkdl.read(f"{folder}/official.pth")
    return model, [theirs[f"rosa{i}.o.bias"] for i in (1, 2)], theirs["o.bias"]


class Reverser:
    """The released model, by whole sequences or token by token."""

    def __init__(self, path: Path, backend: str, dtype: torch.dtype) -> None:
        self.model, self.constants, self.bias = opened(path)
        self.model.to(dtype)
        self.backend = backend

    @torch.inference_mode()
    def logits(self, tokens: Tensor, states: list[RecurrentState | None]) -> Tensor:
        """Return logits [B, T, 12] and leave in `states` what the next tokens go on from."""
        model, v_first = self.model, None
        x = model.embedding(tokens)
        for i, block in enumerate(model.blocks):
            state = states[i] or block.init_state(len(x))
            y, S, shift, v_first, _ = block.time_mix(
                block.ln1(x), state.S, state.time_shift, v_first, None, self.backend
            )
            x = x + y + self.constants[i].to(x.dtype)
            y, channel_shift = block.channel_mix(
                block.ln2(x), state.channel_shift, None, self.backend
            )
            x = x + y
            states[i] = RecurrentState(S, shift, None, channel_shift)
        return model.head(model.ln_out(x)) + self.bias.to(x.dtype)


def main() -> None:
    """Count right digits as the authors do; then write one number token by token."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--backend", default="cpu", help="of metastate.ops (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--numbers", type=positive, default=10, help="a length (default: 10)")
    args = parser.parse_args()
    theirs, draw = Reverser(args.file, args.backend, getattr(torch, args.dtype)), random.Random(42)
    right = total = 0
    for digits in range(1, 61):
        numbers = [
            str(draw.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))
            for _ in range(args.numbers)
        ]
        texts = [f"{n},{n[::-1]}#" for n in numbers]
        tokens = torch.tensor([[SYMBOLS.index(c) for c in text] for text in texts])
        told = theirs.logits(tokens[:, :-1], [None, None]).argmax(-1)[:, digits:]
        right += int((told == tokens[:, digits + 1 :]).sum())
        total += told.numel()
    print(f"{right:,} of {total:,} digits right (1 to 60 digits, {args.numbers} numbers each)")

    number, states, written = "31415926535897932384626433832795028841", [None, None], ""
    for c in f"{number},":
        logits = theirs.logits(torch.tensor([[SYMBOLS.index(c)]]), states)
    while not written.endswith("#") and len(written) < 60:
        written += SYMBOLS[int(logits[0, -1].argmax())]
        logits = theirs.logits(torch.tensor([[SYMBOLS.index(written[-1])]]), states)
    print(f"token by token: {number} -> {written}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
