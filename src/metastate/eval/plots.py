"""Figures: a run's loss, comparisons, made-up tasks. matplotlib without a display."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metastate.data.files import atomic_write
from metastate.errors import ConfigError, DataError

TRAIN, VALID = "#4c72b0", "#c44e52"
STYLES = ("-", "--", ":", "-.")  # of sizes
BEYOND = (0, (9, 6))  # long dashes, of a law beyond what was measured
MOST_LABELS = 12  # bars that there is room to write on
TITLE_WIDTH = 60  # characters of a line that a figure has room for
LEGEND = {"framealpha": 0.75, "edgecolor": "none"}  # readable also where it must cover a line


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL training log; a last line that was cut off is left out.

    Raises:
        DataError: the file is missing, or a line before the last is no JSON object.
    """
    try:
        lines = Path(path).read_bytes().splitlines()  # those of text end at U+2028 too
    except OSError as cause:
        raise DataError(f"cannot read the training log {path}: {cause}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(row)
        except ValueError as cause:
            if number < len(lines):  # the run may be writing the last line right now
                raise DataError(f"{path}, line {number} is no JSON object ({cause})") from None
    return rows


def loss_curve(
    log: str | os.PathLike[str], out: str | os.PathLike[str], title: str | None = None
) -> None:
    """Draw training and validation loss over tokens (below) and steps (above) as a PNG.

    Log lines hold `kind` (train or valid), `step`, `tokens` (seen so far) and, in nats a token,
    `loss` (train) or `nats_per_token` (valid). Where a step stands twice, the later line counts.

    Raises:
        DataError: the log is missing, broken, or holds no loss. ConfigError: matplotlib is missing.
    """
    rows = read_log(log)
    train, valid = _series(rows, "train", "loss"), _series(rows, "valid", "nats_per_token")
    if not train and not valid:
        raise DataError(f"{log} holds no finite loss yet; let the run log a step first")
    figure, axes = _figure()
    if train:
        _, tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color=TRAIN, alpha=0.35 if len(train) > 20 else 1, lw=1)
        if len(train) > 20:
            means, half = smooth(losses)
            inner = tokens[half : len(tokens) - half]
            axes.plot(inner, means, color=TRAIN, lw=1.6, label="train, smoothed")
        else:
            axes.lines[0].set_label("train")
    if valid:
        _, tokens, losses = zip(*valid, strict=True)
        axes.plot(tokens, losses, "o-", color=VALID, lw=1.6, ms=3.5, label="validation")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (tokens[-1], losses[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
            color=VALID,
        )
    for i, row in enumerate(r for r in rows if r.get("kind") == "growth"):
        label = "growth" if i == 0 else None
        axes.axvline(row["tokens"], color="#55a868", ls="--", lw=1.2, label=label)
    # A first loss near ln V would flatten the rest: leave it out of view once most is learned.
    values = sorted(loss for _, _, loss in train + valid)
    high = values[min(len(values) - 1, int(0.97 * len(values)))]
    margin = 0.08 * (high - values[0]) or 0.1
    axes.set_ylim(values[0] - 2 * margin, high + margin)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_formatter(_short)
    axes.legend(**LEGEND)
    last_step, last_tokens, _ = max(train + valid)
    if last_step and last_tokens:
        ratio = last_tokens / last_step
        above = axes.secondary_xaxis("top", functions=(lambda t: t / ratio, lambda s: s * ratio))
        above.set_xlabel("steps")
        above.xaxis.set_major_formatter(_short)
        above.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _name(axes, title or Path(log).resolve().parent.name)
    _write(figure, out)


def _series(rows: list[dict[str, Any]], kind: str, key: str) -> list[tuple[int, int, float]]:
    """Return (step, tokens, loss) of every step that a finite loss was logged at."""
    points = {
        row["step"]: (row["step"], row["tokens"], row[key])
        for row in rows
        if row.get("kind") == kind and isinstance(row.get(key), int | float)
    }
    return [points[step] for step in sorted(points) if math.isfinite(points[step][2])]


AXIS = {
    "parameters": "parameters without embedding and head",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "training seconds, beside whatever else ran",
}


def comparison_figure(
    results: Mapping[str, Any], key: str, laws: Mapping[str, Any], title: str
) -> tuple[bytes, str]:
    """Draw a comparison's losses against `key`, a colour a model, means over seeds.

    Args:
        results: from `metastate.eval.compare.collect`.
        key: "parameters", where a point is a size's final loss; or "tokens", "flops", "seconds",
            where a line is a run's held-out curve and a dot its end.
        laws: model -> fitted PowerLaw: a line with its band, in long dashes where it extrapolates.
        title: of the figure.

    Returns:
        The figure as PNG, and as the SVG element of a page.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, axes = _figure()
    models, sizes = list(results["suite"]["models"]), list(results["suite"]["sizes"])
    ends: list[float] = []
    for i, model in enumerate(models):
        colour = f"C{i % 10}"
        label: str | None = _as_text(model)
        by_size = [
            [r for r in results["rows"] if (r["model"], r["size"]) == (model, size) and r["curve"]]
            for size in sizes
        ]
        if key == "parameters":
            points = [(rows[0][key], [r["loss"] for r in rows]) for rows in by_size if rows]
            if points:
                means = [statistics.fmean(losses) for _, losses in points]
                spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
                line = "" if model in laws else "-"
                xs = [x for x, _ in points]
                axes.errorbar(xs, means, spread, fmt=f"o{line}", color=colour, ms=5, label=label)
                ends += means
        else:
            for j, rows in enumerate(by_size):
                if not rows:
                    continue
                shortest = min(len(r["curve"]) for r in rows)
                xs, ys = (
                    [statistics.fmean(r["curve"][k][what] for r in rows) for k in range(shortest)]
                    for what in (key, "loss")
                )
                axes.plot(xs, ys, STYLES[j % 4], color=colour, lw=1.5, label=label)
                axes.plot(xs[-1:], ys[-1:], "o", color=colour, ms=4)
                ends += [*ys[len(ys) // 4 :]]
                label = None  # one entry a model
        if model in laws:
            _draw_law(axes, laws[model], colour)
    axes.set_xscale("log")
    if key != "flops":
        axes.xaxis.set_major_formatter(_short)
        axes.xaxis.set_minor_formatter(
            lambda x, _: _short(x) if f"{x:e}"[0] in "25" and key == "parameters" else ""
        )
    if ends:
        margin = 0.06 * (max(ends) - min(ends)) or 0.05
        low = min([min(ends), *(law.loss[-1] for law in laws.values())])
        axes.set_ylim(low - margin, max(ends) + margin)
    axes.set_xlabel(AXIS[key])
    split = results["split"] if key == "parameters" else "valid"  # what curves are of
    axes.set_ylabel(f"loss of the {split} text (nats a token)")
    _name(axes, title)
    if key != "parameters" and len(sizes) > 1:
        for size, style in zip(sizes, STYLES, strict=False):
            axes.plot([], [], style, color="#555", label=_as_text(size))
    if laws:
        axes.plot([], [], ls=BEYOND, color="#555", label="law, beyond what was measured")
    axes.legend(**LEGEND)
    return _both(figure)


def lead_figure(
    lines: Mapping[tuple[str, str], Sequence[tuple[float, float]]], title: str
) -> tuple[bytes, str]:
    """Draw how far models are ahead of the baseline, (model, size) -> (tokens, lead in %).

    A colour a model, a style a size, or of one model a colour a size; below 0 a model is behind.
    Returned as by `comparison_figure`.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, axes = _figure()
    models, sizes = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    axes.axhline(0, color="#555", lw=1)
    for (model, size), points in lines.items():
        tokens, lead = zip(*points, strict=True)
        i, j, name = models.index(model), sizes.index(size), f"{model}, {size}"
        if len(models) == 1:  # colours are told apart better than styles
            i, j = j, 0
        axes.plot(tokens, lead, STYLES[j % 4], color=f"C{i % 10}", lw=1.5, label=_as_text(name))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_short)
    axes.xaxis.set_minor_formatter(lambda x, _: _short(x) if f"{x:e}"[0] in "25" else "")
    axes.set_xlabel(AXIS["tokens"])
    axes.set_ylabel("lead (% of the baseline's valid loss)")
    _name(axes, title)
    axes.legend(**LEGEND)
    return _both(figure)


def _draw_law(axes: Any, law: Any, colour: str) -> None:
    """Draw a fit: solid where it was measured, in long dashes beyond, its band lightly."""
    measured = sum(x <= law.fitted * 1.001 for x in law.x)
    axes.plot(law.x[:measured], law.loss[:measured], "-", color=colour, lw=1.3)
    axes.plot(law.x[measured - 1 :], law.loss[measured - 1 :], ls=BEYOND, color=colour, lw=1.1)
    axes.fill_between(law.x, law.low, law.high, color=colour, alpha=0.1, lw=0)


def task_figure(cells: Sequence[Mapping[str, Any]], out: str | os.PathLike[str]) -> None:
    """Draw the accuracy of small models on state tracking or recall as a PNG.

    Word problems get a panel each, lines of accuracy by length; recall gets one, bars by problem,
    side by side, since solved ones would hide each other as points. A colour is an architecture, a
    line style or hatch a depth.

    Args:
        cells: of one task: problem, length, architecture, model, and what
            `metastate.eval.tasks.train_and_score` returned.
        out: path of the PNG.

    Raises:
        DataError: there are no cells. ConfigError: matplotlib is missing.
    """
    if not cells:
        raise DataError("there are no results to draw; finish a cell first")
    problems = list(dict.fromkeys(cell["problem"] for cell in cells))
    names = list(dict.fromkeys(cell["architecture"] for cell in cells))
    depths = sorted({cell["model"]["num_layers"] for cell in cells})
    words = cells[0]["by_length"] is not None
    panels = problems if words else [""]
    figure, first = _figure()
    first.remove()
    figure.set_size_inches(7 if len(panels) == 1 else 4.4 * len(panels), 4.2)
    sides = list(dict.fromkeys((c["architecture"], c["model"]["num_layers"]) for c in cells))
    sides.sort(key=lambda side: (names.index(side[0]), side[1]))
    width = 0.8 / len(sides)  # of a bar
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, depth) in enumerate(sides):
            own = [
                cell
                for cell in cells
                if (cell["architecture"], cell["model"]["num_layers"]) == (name, depth)
                and panel in ("", cell["problem"])
            ]
            if not own:
                continue
            color, look = f"C{names.index(name)}", depths.index(depth) % 4
            label = f"{name}, {depth} layer{'s' * (depth > 1)}"
            if words:
                ys = [100 * y for y in own[0]["by_length"]]
                style = STYLES[look]
                axes.plot(range(1, len(ys) + 1), ys, style, color=color, lw=1.6, label=label)
                continue
            xs = [problems.index(cell["problem"]) + (i + 0.5) * width - 0.4 for cell in own]
            ys = [100 * cell["accuracy"] for cell in own]
            hatch = ("", "//", "xx", "..")[look]
            bars = axes.bar(xs, ys, width, color=color, hatch=hatch, ec="white", label=label)
            if len(cells) <= MOST_LABELS:
                axes.bar_label(bars, fmt="%.1f", fontsize=8)
        if words:
            axes.axvline(cells[0]["length"], color="#999", lw=1)
            axes.text(cells[0]["length"], 103, " longest learned", color="#777", fontsize=8)
            axes.set_xlabel("elements multiplied")
        else:
            axes.set_xticks(range(len(problems)), problems)
            axes.set_xlabel("tokens x pairs")
        axes.axhline(100 * cells[0]["threshold"], color="#999", lw=1, ls=(0, (2, 3)))
        axes.set_ylim(0, 102 if words else 106)
        axes.set_ylabel("accuracy (%)")
        axes.set_title(panel, pad=16)
        _plain(axes)
        beside = {} if words else {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(frameon=False, fontsize=8, **beside)
    _write(figure, out)


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Return the means of windows a 20th of all values wide, and how many values each end lacks.

    No window is narrower there: one value's noise would be drawn as a bend of the curve.
    """
    n, given = len(values), np.asarray(values, float)
    half = max(1, n // 40)
    return [float(given[i - half : i + half + 1].mean()) for i in range(half, n - half)], half


def _as_text(name: str) -> str:
    r"""Return a name so that matplotlib shows it: $ starts its formulas, _ its hidden labels."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _name(axes: Any, title: str) -> None:
    """Set a title, broken where a line would be cut off at the figure's sides."""
    axes.set_title("\n".join(map(_as_text, textwrap.wrap(title, TITLE_WIDTH))))


def _short(value: float, _: Any = None) -> str:
    """Format a count: 1500 -> 1.5K."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise ConfigError("figures need matplotlib: pip install 'metastate[cli]'") from cause
    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Any, out: str | os.PathLike[str]) -> None:
    atomic_write(out, _bytes(figure, "png"), error=DataError)


def _both(figure: Any) -> tuple[bytes, str]:
    """Return a figure as PNG, and as SVG without the XML prologue, which HTML does not know."""
    svg = _bytes(figure, "svg").decode("utf-8")
    return _bytes(figure, "png"), svg[svg.index("<svg") :]


def _bytes(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()
