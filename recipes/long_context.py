"""Loss by position to 64 times the training length, on novels, with the memory that it takes.

    metastate compare recipes/compare.yaml --out runs/compare
    cd runs/compare/cells
    python ../../../recipes/long_context.py meta-state-tiny-seed0 rwkv-7-tiny-seed0 --text NOVELS14

The held-out novels are cut into texts of 32,768 bytes. Each is read three times: *carried*, the
state handed on from the first byte to the last; *windows*, where it starts from nothing every 512
bytes (the training length); *warm*, where it has read the 512 bytes before each window, and nothing
earlier. All score the same bytes, so the difficulty of a passage cancels: windows lose what a cold
start costs, and carried less warm is what the past beyond that is worth. Out come a table,
results.json and a figure. The text must be bytes: a model of another tokenizer is refused. Minutes
a recurrent model on one core, and far more for a Transformer, whose time grows with the square:
`--texts` takes fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.cli.progress import bar
from metastate.data.files import write_json
from metastate.errors import ConfigError
from metastate.eval.loss import token_losses
from metastate.mapping import to_dict
from metastate.model.io import load, tokenizer_of
from metastate.model.lm import LanguageModel
from metastate.model.weights import weights_hash

LENGTH, WINDOW, ROWS = 32768, 512, 4
MODES = ("carried", "warm", "windows")
EDGES = [0, 512, 1024, 2048, 4096, 8192, 16384, 32768]


def texts(folder: Path, count: int | None, eod: int) -> Tensor:
    """Return [n, LENGTH + 1] bytes of the held-out novels, each behind an end of document."""
    found = []
    for name in ("valid.txt", "test.txt"):
        if not (folder / name).is_file():
            raise ConfigError(f"--text {folder} has no {name}; it needs valid.txt and test.txt")
        raw = torch.tensor(list((folder / name).read_bytes()))
        found += [raw[i : i + LENGTH] for i in range(0, len(raw) - LENGTH + 1, LENGTH)]
    if not found:
        raise ConfigError(f"no text in {folder} has {LENGTH:,} bytes; give longer ones")
    found = found[:: max(1, len(found) // count)][:count] if count else found
    return torch.cat([torch.full((len(found), 1), eod), torch.stack(found)], 1)


@torch.no_grad()
def losses(model: LanguageModel, text: Tensor, mode: str, show: Any) -> tuple[Tensor, list[int]]:
    """Return the nats of every byte, [n, LENGTH], and the bytes of a text's state at each edge."""
    out, sizes = torch.empty(len(text), LENGTH), {}
    for row in range(0, len(text), ROWS):
        state = None
        for first in range(0, LENGTH, WINDOW):
            part = text[row : row + ROWS, first : first + WINDOW + 1]
            x, after, _ = model.features(part[:, :-1], None if mode == "windows" else state)
            state = model.features(part[:, :-1])[1] if mode == "warm" else after
            nats = token_losses(model, x.flatten(0, 1), part[:, 1:].flatten())
            out[row : row + ROWS, first : first + WINDOW] = nats.view(len(part), -1)
            sizes[first + WINDOW] = sum(
                x.numel() * x.element_size() for x in after.tensors().values()
            ) // len(part)
            show(row * LENGTH + (first + WINDOW) * len(part), text[:, 1:].numel())
    return out, [sizes[edge] for edge in EDGES[1:]]


def measured(path: Path, text_folder: Path, count: int | None, out: Path) -> dict[str, Any]:
    """Return the losses of one checkpoint by position, from `out` if it was measured on this text.

    A file there is named by what was measured: two runs each have a folder `best`.
    """
    model = load(path).eval()
    tokenizer = tokenizer_of(model, path)
    if tokenizer.name != "bytes":
        raise ConfigError(f"{path} reads {tokenizer.name}; this recipe needs a model of bytes")
    text = texts(text_folder, count, tokenizer.eod_id)
    made = {"config": to_dict(model.config), "weights": weights_hash(model)}
    made["text"] = sha256(text.numpy().tobytes()).hexdigest()
    key = sha256(json.dumps(made | {"modes": MODES}, sort_keys=True).encode()).hexdigest()
    file = out / f"{path.name}-{key[:16]}.json"
    if not file.exists():
        write_json(file, made | measure(model, text, path.name))
    return json.loads(file.read_text()) | {"checkpoint": str(path)}


def measure(model: LanguageModel, text: Tensor, title: str) -> dict[str, Any]:
    """Return the losses of a model by position, in every mode."""
    rows: dict[str, Any] = {"texts": len(text)}
    for mode in MODES:
        with bar(f"{title}, {mode}", "bytes") as show:
            nats, sizes = losses(model, text, mode, show)
        rows[f"{mode}_state_bytes"] = sizes
        rows[mode] = [float(nats[:, a:b].mean()) for a, b in zip(EDGES, EDGES[1:], strict=False)]
        # Position by position in steps of a window, for the spread over texts.
        rows[f"{mode}_by_text"] = nats[:, LENGTH // 2 :].mean(1).tolist()
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| model | | " + " | ".join(f"to {b:,}" for b in EDGES[1:]) + " | state bytes at the end |",
        "|---" * (len(EDGES) + 2) + "|",
    ]
    for own in results:
        for mode in MODES:
            figures = " | ".join(f"{x:.4f}" for x in own[mode])
            name = own["checkpoint"] if mode == "carried" else ""
            lines.append(f"| {name} | {mode} | {figures} | {own[f'{mode}_state_bytes'][-1]:,} |")
        for mode in MODES[1:]:
            pairs = zip(own["carried_by_text"], own[f"{mode}_by_text"], strict=True)
            gains = [b - a for a, b in pairs]
            spread = " (one text)"
            if len(gains) > 1:
                error = statistics.stdev(gains) / len(gains) ** 0.5
                spread = f" ± {error:.4f} (standard error over {len(gains)} texts)"
            lines.append(
                f"| | beyond 16,384, carried better than {mode} by {statistics.mean(gains):.4f}"
                f"{spread} |" + " |" * len(EDGES)
            )
    return "\n".join(lines)


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Draw loss by position, and the memory at each, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    middles = [(a + b) / 2 for a, b in zip(EDGES, EDGES[1:], strict=False)]
    for i, own in enumerate(results):
        name = own["checkpoint"]
        left.plot(middles, own["carried"], "o-", color=f"C{i}", label=name)
        left.plot(middles, own["warm"], "--", color=f"C{i}")
        left.plot(middles, own["windows"], ":", color=f"C{i}")
        sizes = [size / 1024 for size in own["carried_state_bytes"]]
        right.plot(EDGES[1:], sizes, "o-", color=f"C{i}", label=name)
    for axis, label in ((left, "held-out nats a byte"), (right, "state or cache, KiB a text")):
        axis.set(xscale="log", xlabel="bytes read before", ylabel=label)
        axis.axvline(WINDOW, color="0.7", lw=1)
        axis.legend()
    right.set_yscale("log")
    left.set_title(
        "solid: state carried; dashed: 512 bytes before; dotted: from nothing", fontsize=9
    )
    fig.savefig(path, dpi=130)


def main() -> None:
    """Measure the checkpoints that OUT does not hold yet; write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CKPT")
    parser.add_argument("--text", type=Path, required=True, help="folder with valid.txt, test.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/long-context"))
    parser.add_argument("--texts", type=positive, help="texts to read (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = [measured(path, args.text, args.texts, args.out) for path in args.checkpoints]
    write_json(args.out / "results.json", results)
    figure(results, args.out / "loss-by-position.png")
    text = table(results)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(exit_code(main))
