"""Where in the text a model is ahead of another: by kind of token, by its place in its word.

    metastate compare recipes/depth.yaml --out runs/depth
    cd runs/depth/cells
    D=../../pilelite-bytes
    python ../../../recipes/word_places.py meta-state-wide-seed0 rwkv-7-wide-seed0 --data $D

Every model reads the same windows of held-out documents, equally many of each domain, each window
from nothing but the token before it (as `metastate eval --context`). A token is a space, the end of
a line, digits, a symbol, or letters, and letters are the first, second, third or a later token of
their word. Out come a table and a figure: the loss by kind, the lead over the last model given, and
what each kind makes of the whole lead (these sum to it). Minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
FIRST_BYTES, ROWS = 2048, 16  # tokens of a document that windows are taken from; windows a forward


def windows(split: Split, context: int, count: int) -> np.ndarray:
    """Return [n, context + 1] tokens: `count` windows of each domain, or as many as there are."""
    found, dataset = [], split.dataset
    for domain in range(len(split.domain_names)):
        own: list[np.ndarray] = []
        documents = np.flatnonzero(dataset.domains == domain)
        for i in np.random.default_rng(domain).permutation(documents):
            text = np.concatenate([[split.eod_id], dataset[i][:FIRST_BYTES]])
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
    """Return the results as Markdown; the last model is the one that others are held against."""
    base = rows[-1]
    lines = ["| | all | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    shares = " | ".join(f"{share:.1%}" for share in base["shares"])
    lines.append(f"| share of tokens | | {shares} |")
    for own in rows:
        figures = " | ".join("" if x is None else f"{x:.3f}" for x in own["nats"])
        lines.append(f"| {own['model']}, nats | {own['all']:.4f} | {figures} |")
        if own is not base:
            for name, of_all, values in (
                ("lead, %", own["lead"], own["leads"]),
                ("of the whole lead", own["lead"], own["parts"]),
            ):
                figures = " | ".join("" if x is None else f"{x:+.2f}" for x in values)
                lines.append(f"| {name} | {of_all:+.2f} | {figures} |")
    return "\n".join(lines)


def measured(name: str, nats: np.ndarray, base: np.ndarray, of: np.ndarray) -> dict[str, Any]:
    """Return a model's loss by kind and its lead over `base`, in per cent."""
    masks = [of == i for i in range(len(KINDS))]
    means = [(nats[m].mean(), base[m].mean()) if m.any() else None for m in masks]
    return {
        "model": name,
        "all": nats.mean(),
        "lead": 100 * (1 - nats.mean() / base.mean()),
        "shares": [m.mean() for m in masks],
        "nats": [None if pair is None else pair[0] for pair in means],
        "leads": [None if pair is None else 100 * (1 - pair[0] / pair[1]) for pair in means],
        "parts": [100 * (base - nats)[m].sum() / base.sum() for m in masks],
    }


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what each kind makes of the whole lead, a bar a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    others = rows[:-1]
    for i, own in enumerate(others):
        at = np.arange(len(KINDS)) + (i - (len(others) - 1) / 2) * 0.8 / len(others)
        label = f"{own['model']} ({own['lead']:+.2f} % in all)"
        axis.bar(at, own["parts"], width=0.8 / len(others), label=label)
    axis.set_xticks(range(len(KINDS)), [name.replace(", ", ",\n") for name in KINDS], fontsize=8)
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set_ylabel(f"% of the loss of\n{rows[-1]['model']}")
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=130)


def main() -> None:
    """Score the models on the same windows; write table, figure and results.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="CKPT", help="the last is the base")
    parser.add_argument("--data", required=True, help="prepared with the models' tokenizer")
    parser.add_argument("--split", default="test")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=40, help="of each domain")
    parser.add_argument("--out", type=Path, default=Path("runs/word-places"))
    args = parser.parse_args()
    data = PreparedData.open(args.data)
    tokens = windows(data.split(args.split), args.context, args.windows)
    models = [load(path).eval() for path in args.models]
    for model, path in zip(models, args.models, strict=True):
        if tokenizer_of(model, path).info()["sha256"] != data.tokenizer.info()["sha256"]:
            raise ConfigError(f"{path} has another tokenizer than {args.data}")
    nats = [losses(m, tokens, str(path)) for m, path in zip(models, args.models, strict=True)]
    of = kinds(tokens, data.tokenizer)
    names = [path.name if path.name != "last" else path.parent.name for path in args.models]
    rows = [measured(name, own, nats[-1], of) for name, own in zip(names, nats, strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", {"kinds": KINDS, "windows": len(tokens), "rows": rows})
    figure(rows, args.out / "lead-by-place.png")
    text = table(rows)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
