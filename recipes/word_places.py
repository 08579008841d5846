"""Where in the text a model is ahead of another: by kind of token, by its place in its word.

    metastate compare recipes/depth.yaml --out runs/depth
    cd runs/depth/cells
    D=../../pilelite-bytes
    python ../../../recipes/word_places.py meta-state-wide-seed0 rwkv-7-wide-seed0 --data $D

Every model reads the same windows of held-out documents, as many of each domain as it has up to
`--windows`, each from nothing but the token before it (as `metastate eval --context`). A token is a
space, the end of a line, digits, a symbol, or letters, and letters are the first, second, third or
a later token of their word. Checkpoints are given in pairs, a model and the one it is held against.
Out come a table and a figure: the loss by kind, the lead, and what each kind makes of the whole
lead (these sum to it). Minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.cli.progress import bar
from metastate.data.files import write_json
from metastate.data.loader import PreparedData, Split
from metastate.data.tokenizer import Tokenizer
from metastate.errors import ConfigError
from metastate.eval.loss import token_losses
from metastate.model.io import load, tokenizer_of
from metastate.model.lm import LanguageModel

WORD = ["word, 1st token", "2nd", "3rd", "4th and later"]
KINDS = [*WORD, "space", "line end", "digits", "symbols", "other"]
LETTERS, SPACE, LINE, DIGITS, SYMBOL, OTHER = 0, 4, 5, 6, 7, 8
FIRST, ROWS = 2048, 16  # tokens of a document that windows are taken from; windows a forward


def windows(split: Split, context: int, count: int) -> np.ndarray:
    """Return [n, context + 1] tokens: `count` windows of each domain, or as many as there are."""
    found, dataset = [], split.dataset
    for domain in range(len(split.domain_names)):
        own: list[np.ndarray] = []
        documents = np.flatnonzero(dataset.domains == domain)
        for i in np.random.default_rng(domain).permutation(documents):
            text = np.concatenate([[split.eod_id], dataset[i][:FIRST]])
            starts = range(0, len(text) - context, context)
            own += [text[first : first + context + 1] for first in starts]
            if len(own) >= count:
                break
        found += own[:count]
    if not found:
        raise ConfigError(f"no document of {split.name} has {context} tokens; shorten --context")
    return np.stack(found).astype(np.int64)


def kinds(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the number in KINDS of every token but the first of each row, [n, T]."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    of_id = np.array([kind(text) for text in texts])
    spaced = np.array([text[:1].isspace() for text in texts])
    open_end = np.array([text[-1:].isalpha() for text in texts])
    out, place = of_id[tokens], np.zeros(len(tokens), int)
    for t in range(1, tokens.shape[1]):
        token = tokens[:, t]
        goes_on = open_end[tokens[:, t - 1]] & ~spaced[token]
        place = np.where(goes_on, np.minimum(place + 1, len(WORD) - 1), 0)
        out[:, t] = np.where(out[:, t] == LETTERS, place, out[:, t])
    return out[:, 1:]


def kind(text: str) -> int:
    """Return what a token is by its text, without the space that may stand before it."""
    rest = text.removeprefix(" ")
    if not rest or rest.isspace():
        return LINE if "\n" in text else SPACE if text else OTHER
    if "\N{REPLACEMENT CHARACTER}" in rest:
        return OTHER
    return LETTERS if rest.isalpha() else DIGITS if rest.isdigit() else SYMBOL


@torch.no_grad()
def losses(model: LanguageModel, tokens: np.ndarray, title: str) -> np.ndarray:
    """Return the nats of every token but the first of each row, [n, T]."""
    out = []
    with bar(title, "windows") as show:
        for first in range(0, len(tokens), ROWS):
            part = torch.from_numpy(tokens[first : first + ROWS])
            x, _, _ = model.features(part[:, :-1])
            nats = token_losses(model, x.flatten(0, 1), part[:, 1:].flatten())
            out.append(nats.view(len(part), -1).double().numpy())
            show(first + len(part), len(tokens))
    return np.concatenate(out)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown, four lines a pair."""

    def line(name: str, of_all: str, values: list[float | None], form: str) -> str:
        figures = ("" if x is None else format(x, form) for x in values)
        return f"| {name} | {of_all} | " + " | ".join(figures) + " |"

    out = ["| | all | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    out.append(line("share of tokens", "", rows[0]["shares"], ".1%"))
    for own in rows:
        out += [
            line(f"{own['model']}, nats", f"{own['loss']:.4f}", own["losses"], ".3f"),
            line(f"{own['base']}, nats", f"{own['base_loss']:.4f}", own["base_losses"], ".3f"),
            line("lead, %", f"{own['lead']:+.2f}", own["leads"], "+.2f"),
            line("of the whole lead, %", f"{own['lead']:+.2f}", own["parts"], "+.2f"),
        ]
    return "\n".join(out)


def measured(nats: np.ndarray, base: np.ndarray, of: np.ndarray) -> dict[str, Any]:
    """Return the losses of a pair by kind and the first one's lead, in per cent."""
    masks = [of == i for i in range(len(KINDS))]
    means = [(nats[m].mean(), base[m].mean()) if m.any() else (None, None) for m in masks]
    return {
        "loss": nats.mean(),
        "base_loss": base.mean(),
        "lead": 100 * (1 - nats.mean() / base.mean()),
        "shares": [m.mean() for m in masks],
        "losses": [own for own, _ in means],
        "base_losses": [other for _, other in means],
        "leads": [None if own is None else 100 * (1 - own / other) for own, other in means],
        "parts": [100 * (base - nats)[m].sum() / base.sum() for m in masks],
    }


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what each kind makes of the whole lead, a bar a pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for i, own in enumerate(rows):
        at = np.arange(len(KINDS)) + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
        label = f"{own['model']} over {own['base']}: {own['lead']:+.2f} in all"
        axis.bar(at, own["parts"], width=0.8 / len(rows), label=label)
    axis.set_xticks(range(len(KINDS)), [name.replace(", ", ",\n") for name in KINDS], fontsize=8)
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set_ylabel("part of the lead,\n% of the other's loss")
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=130)


def main() -> None:
    """Score the models on the same windows; write table, figure and results.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="CKPT BASE")
    parser.add_argument("--data", required=True, help="prepared with the models' tokenizer")
    parser.add_argument("--split", default="test")
    parser.add_argument("--context", type=positive, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=positive, default=40, help="of each domain at most")
    parser.add_argument("--out", type=Path, default=Path("runs/word-places"))
    args = parser.parse_args()
    if len(args.models) % 2:
        raise ConfigError("give checkpoints in pairs: a model, then the one it is held against")
    data = PreparedData.open(args.data)
    tokens = windows(data.split(args.split), args.context, args.windows)
    of = kinds(tokens, data.tokenizer)
    nats = []
    for path in args.models:
        model = load(path).eval()
        if tokenizer_of(model, path).info()["sha256"] != data.tokenizer.info()["sha256"]:
            raise ConfigError(f"{path} has another tokenizer than {args.data}")
        nats.append(losses(model, tokens, str(path)))
    names = [
        path.parent.name if path.name in ("last", "best") else path.name for path in args.models
    ]
    rows = [
        {"model": names[i], "base": names[i + 1]} | measured(nats[i], nats[i + 1], of)
        for i in range(0, len(names), 2)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", {"kinds": KINDS, "windows": len(tokens), "rows": rows})
    figure(rows, args.out / "lead-by-place.png")
    text = table(rows)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(exit_code(main))
