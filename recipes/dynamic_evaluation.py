"""What a model gains by ordinary dynamic evaluation, beside what a surprise memory gives it.

    metastate compare recipes/compare.yaml --out runs/compare
    cd runs/compare/cells
    python ../../../recipes/dynamic_evaluation.py rwkv-7-250k-seed0 --beside meta-state-250k-seed0 \
        --data ../../pilelite-bytes

Dynamic evaluation (Krause et al., arXiv:1709.07432) trains on what it has just been scored on:
after every segment of a text a gradient step on its loss, at every new text from the weights that
the training left. The step is SGD (theta - rate g) or its scaled form (theta - rate g /
(sqrt(mean g^2) + eps), the mean over training text), of all weights or the head's alone. Each
window of held-out text is read from nothing, as `metastate eval --context` does, its state carried
over segments; the best rate of every form is chosen on the validation split, and what it gives is
told of the test split. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import Tensor
from word_places import losses, windows

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.cli.progress import bar, log
from metastate.data.loader import PreparedData
from metastate.model.io import load
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss

RATES = {"SGD": (0.01, 0.03, 0.1), "scaled": (1e-4, 3e-4, 1e-3)}
WHAT = ("all weights", "the head")
EPS = 0.1  # of the scaled form, in units of the root of all weights' mean g^2
Weights = dict[str, Tensor]


def chosen(model: LanguageModel, what: str) -> Weights:
    """Return the weights that are stepped."""
    every = dict(model.named_parameters())
    return every if what == WHAT[0] else {n: w for n, w in every.items() if n == "head.weight"}


def scales(model: LanguageModel, weights: Weights, tokens: np.ndarray) -> Weights:
    """Return 1 / (sqrt(mean g^2) + eps) of every weight, over rows [n, T + 1] of training text."""
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    for row in torch.from_numpy(tokens):
        loss = lm_loss(model, row[None, :-1], row[None, 1:]).loss
        for name, g in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
            squares[name] += g.square() / len(tokens)
    count = sum(x.numel() for x in squares.values())
    eps = EPS * (sum(float(x.sum()) for x in squares.values()) / count) ** 0.5
    return {name: 1 / (x.sqrt() + eps) for name, x in squares.items()}


def adapted(
    model: LanguageModel,
    weights: Weights,
    segment: int,
    scale: Weights | None,
    tokens: np.ndarray,
    rate: float,
    title: str,
) -> float:
    """Return nats a token of windows [n, T + 1], a step of `rate` after every segment of each."""
    first = {name: w.detach().clone() for name, w in weights.items()}
    total = 0.0
    with bar(title, "windows") as show:
        for done, row in enumerate(torch.from_numpy(tokens), 1):
            state = None
            for at in range(0, len(row) - 1, segment):
                part = row[None, at : at + segment + 1]
                out = lm_loss(model, part[:, :-1], part[:, 1:], state)
                state = out.state.detach()
                total += float(out.nll) * out.num_tokens
                steps = torch.autograd.grad(out.loss, [*weights.values()])
                with torch.no_grad():
                    for (name, w), g in zip(weights.items(), steps, strict=True):
                        w -= rate * (g if scale is None else g * scale[name])
            with torch.no_grad():
                for name, w in weights.items():
                    w.copy_(first[name])
            show(done, len(tokens))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def main() -> None:
    """Score each model as it is, then with every form of dynamic evaluation; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="checkpoints that are evaluated dynamically")
    parser.add_argument("--beside", nargs="*", default=[], help="those that are scored as they are")
    parser.add_argument("--data", required=True, help="prepared with the models' tokenizer")
    parser.add_argument("--context", type=positive, default=512, help="tokens of a window")
    parser.add_argument("--segment", type=positive, default=32, help="tokens between two steps")
    parser.add_argument("--windows", type=positive, default=16, help="of each domain at most")
    args = parser.parse_args()
    data = PreparedData.open(args.data)
    tokens = {
        name: windows(data.split(name), args.context, args.windows)
        for name in ("train", "valid", "test")
    }
    lines = ["| model | weights | step | rate | nats a token | gain, % |", "|---" * 6 + "|"]
    for path in args.beside:
        loss = losses(load(path).eval(), tokens["test"], path).mean()
        lines.append(f"| {path} | | none | | {loss:.4f} | |")
    for path in args.models:
        model = load(path).eval()
        plain = losses(model, tokens["test"], path).mean()
        lines.append(f"| {path} | | none | | {plain:.4f} | |")
        for what in WHAT:
            weights = chosen(model, what)
            for form, rates in RATES.items():
                scale = scales(model, weights, tokens["train"]) if form == "scaled" else None
                settings = (model, weights, args.segment, scale)
                found = {
                    rate: adapted(*settings, tokens["valid"], rate, f"{what}, {form}, {rate:g}")
                    for rate in rates
                }
                best = rates[int(np.nanargmin([*found.values()]))]  # nan: it diverged
                log(f"{what}, {form}: " + ", ".join(f"{r:g} {x:.4f}" for r, x in found.items()))
                loss = adapted(*settings, tokens["test"], best, f"{what}, {form}, test")
                gain = 100 * (1 - loss / plain)
                lines.append(f"| {path} | {what} | {form} | {best:g} | {loss:.4f} | {gain:.1f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(exit_code(main))
