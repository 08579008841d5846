"""What a comparison says: tables, power-law fits, figures, and one self-contained page."""

from __future__ import annotations

import html
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metastate.data.files import atomic_write
from metastate.errors import ConfigError, DataError
from metastate.eval.plots import comparison_figure, lead_figure

FIGURES = {  # x of a figure: (title, file)
    "parameters": ("Loss against parameters", "loss-by-parameters"),
    "tokens": ("Loss against training tokens", "loss-by-tokens"),
    "flops": ("Loss against training FLOPs", "loss-by-flops"),
    "seconds": ("Loss against training time", "loss-by-seconds"),
}
MEANING = (
    "Loss: text of the split {split}, windows of the training length, in float32. Mean ± standard "
    "deviation over seeds; gains are paired by seed. Another text: the standard error of the "
    "relative gain (seeds' mean) if the scored documents were drawn anew."
)
APART = 1.5  # factor between two sizes of a power law, and most between their tokens a parameter
REACH = 10.0  # how far a power law is drawn, times the largest measured x
NO_TEST = (
    "the data has no test split, so losses are of the validation text, by which learning rates are "
    "chosen too: `metastate prepare` makes one"
)

Table = list[list[str]]
Row = dict[str, Any]  # of results: a run


@dataclass(frozen=True)
class PowerLaw:
    """loss = scale * x^-exponent, by least squares of log loss on log x.

    Attributes:
        x: where the curve is evaluated.
        loss: the fit there.
        low, high: ends of the 95 % confidence band of the fitted line, by Student's t with n - 2
            degrees of freedom: of the noise of n independent points about an exact law, no more.
        fitted: the largest x that was measured; beyond it is extrapolation.
    """

    scale: float
    exponent: float
    x: list[float]
    loss: list[float]
    low: list[float]
    high: list[float]
    fitted: float


def power_law(x: Sequence[float], loss: Sequence[float]) -> PowerLaw | None:
    """Fit a power law to measured losses, drawn up to `REACH` times the largest x.

    Returns None for fewer than three x that are a factor of `APART` from one another: two points
    give a line and no doubt of it, and near ones a slope that is their noise.

    Raises:
        ConfigError: scipy is missing.
    """
    far: list[float] = []
    for v in sorted(x):
        if not far or v >= APART * far[-1]:
            far.append(v)
    if len(far) < 3:
        return None
    try:
        from scipy import stats
    except ImportError as cause:
        raise ConfigError("power-law fits need scipy: pip install 'metastate[cli]'") from cause
    logs = np.log(x)
    line, t = stats.linregress(logs, np.log(loss)), stats.t.ppf(0.975, len(x) - 2)
    at = np.linspace(logs.min(), logs.max() + math.log(REACH), 81)
    middle = line.intercept + line.slope * at
    half = t * line.stderr * np.sqrt(logs.var() + (at - logs.mean()) ** 2)
    curves = {"x": at, "loss": middle, "low": middle - half, "high": np.minimum(middle + half, 50)}
    return PowerLaw(
        scale=math.exp(line.intercept),
        exponent=-float(line.slope),
        fitted=max(x),
        **{name: np.exp(curve).tolist() for name, curve in curves.items()},
    )


def fits(results: dict[str, Any], key: str) -> dict[str, PowerLaw]:
    """Return the power law of each model over its sizes, each the mean of its seeds.

    By `parameters` it is one of the final losses, by `flops` of the last points of the curves; by
    anything else there is none, nor where sizes saw unlike numbers of tokens a parameter.
    """
    found: dict[str, PowerLaw] = {}
    if key not in ("parameters", "flops"):
        return found
    for name in results["suite"]["models"]:
        x, ends, shares = [], [], []
        for size in results["suite"]["sizes"]:
            if rows := _of(results, size, name):
                last = [r["loss"] if key == "parameters" else r["curve"][-1]["loss"] for r in rows]
                x.append(rows[0][key])
                ends.append(statistics.fmean(last))
                shares.append(rows[0]["tokens"] / rows[0]["parameters"])
        even = len(x) > 0 and max(shares) <= APART * min(shares)
        if even and (fit := power_law(x, ends)) is not None:
            found[name] = fit
    return found


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Return `mean ± standard deviation`, the deviation only where there are two or more."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _of(results: dict[str, Any], size: str, model: str) -> list[Row]:
    rows = [r for r in results["rows"] if (r["size"], r["model"]) == (size, model)]
    return [r for r in rows if r["loss"] is not None]


def _sides(results: dict[str, Any]) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield each size and model that has finished runs, with these."""
    for size in results["suite"]["sizes"]:
        for model in results["suite"]["models"]:
            if rows := _of(results, size, model):
                yield size, model, rows


def _pairs(results: dict[str, Any], size: str, model: str) -> list[tuple[Row, Row]]:
    """Return the runs of a model, each with the baseline's run of its seed, where there is one."""
    base = {r["seed"]: r for r in _of(results, size, results["suite"]["baseline"])}
    return [(r, base[r["seed"]]) for r in _of(results, size, model) if r["seed"] in base]


def gains(results: dict[str, Any], size: str, model: str) -> tuple[list[float], list[float]]:
    """Return absolute and relative (in %) gains over the baseline, paired by seed."""
    losses = [(own["loss"], base["loss"]) for own, base in _pairs(results, size, model)]
    return [b - a for a, b in losses], [100 * (b - a) / b for a, b in losses]


def text_error(results: dict[str, Any], size: str, model: str) -> float | None:
    """Return the standard error, in %, of the relative gain over the documents that were scored.

    gain = sum_d diff_d / sum_d base_d, diff_d and base_d the seeds' mean of a document's nats; its
    error is that of a ratio of sums over n documents drawn as they come,
    sqrt(n / (n - 1) sum_d (diff_d - gain base_d)^2) / sum_d base_d.
    None where runs do not tell of the same two or more documents.
    """
    pairs = _pairs(results, size, model)
    told = [r.get("documents") or () for pair in pairs for r in pair]
    if not all(told) or len({tuple((i, n) for i, _, n in each) for each in told}) != 1:
        return None  # without a pair there is no text either
    own, other = (
        np.mean([[x[1] for x in pair[k]["documents"]] for pair in pairs], 0) for k in (0, 1)
    )
    n, whole = len(own), other.sum()
    if n < 2:
        return None
    rest = (other - own) - other * ((other - own).sum() / whole)
    return 100 * math.sqrt(n / (n - 1) * float((rest**2).sum())) / float(whole)


def leads(results: dict[str, Any], size: str, model: str) -> list[tuple[float, float]]:
    """Return (training tokens, lead over the baseline in % of its loss), held-out, seeds' means.

    A run's lead is over the baseline's run of its seed, whose curve is read off between its points.
    """

    def curves(name: str) -> dict[int, np.ndarray]:
        rows = [
            r for r in results["rows"] if (r["size"], r["model"]) == (size, name) and r["curve"]
        ]
        return {r["seed"]: np.array([(p["tokens"], p["loss"]) for p in r["curve"]]) for r in rows}

    own, base = curves(model), curves(results["suite"]["baseline"])
    lines = []
    for seed in own.keys() & base.keys():
        (tokens, loss), (seen, other) = own[seed].T, base[seed].T
        both = (seen[0] <= tokens) & (tokens <= seen[-1])
        lead = 100 * (1 - loss / np.interp(tokens, seen, other))
        lines.append(np.stack([tokens, lead])[:, both])
    shortest = min((line.shape[1] for line in lines), default=0)
    mean = np.mean([line[:, :shortest] for line in lines], 0) if shortest else np.empty((2, 0))
    return list(zip(*mean.tolist(), strict=True))


def main_table(results: dict[str, Any]) -> Table:
    """Return the layout of the paper's table 1: loss, absolute and relative gain.

    Gains are over the baseline's run of the same seed; FLOPs are those of the whole training run.
    """
    baseline = results["suite"]["baseline"]
    head = ["size", "model", "loss (nats a token)", f"gain over {baseline}", "relative"]
    head.append("another text")
    out = [[*head, "bits a byte", "parameters", "tokens", "training FLOPs", "seeds"]]
    for size, model, rows in _sides(results):
        absolute, relative = gains(results, size, model)
        is_base = model == baseline
        bits = [r["bits_per_byte"] for r in rows if r["bits_per_byte"]]
        error = None if is_base else text_error(results, size, model)
        unpaired = not is_base and absolute and len(absolute) < len(rows)
        seeds = f"{len(rows)} ({len(absolute)} paired)" if unpaired else str(len(rows))
        out.append(
            [
                *(size, model, mean_and_spread([r["loss"] for r in rows])),
                "" if is_base else mean_and_spread(absolute),
                "" if is_base else mean_and_spread(relative, 2) + " %" * bool(relative),
                "" if error is None else f"± {error:.2f} %",
                mean_and_spread(bits),
                *(f"{rows[0]['parameters']:,}", f"{rows[0]['tokens']:,}"),
                *(f"{rows[0]['flops']:.3g}", seeds),
            ]
        )
    return out


def seed_table(results: dict[str, Any]) -> Table:
    """Return the loss of every run, and in brackets its gain over the baseline of its seed."""
    baseline = results["suite"]["baseline"]
    seeds = sorted({r["seed"] for r in results["rows"]})
    out = [["size", "model", *(f"seed {seed}" for seed in seeds)]]
    for size, model, rows in _sides(results):
        shown = {r["seed"]: f"{r['loss']:.4f}" for r in rows}
        for own, base in _pairs(results, size, model) if model != baseline else ():
            shown[own["seed"]] += f" ({base['loss'] - own['loss']:+.4f})"
        out.append([size, model, *(shown.get(seed, "") for seed in seeds)])
    return out


def cost_table(results: dict[str, Any]) -> Table:
    """Return what each model costs here: speed, state, and the learning rate it got."""
    out = [["size", "model", "lr", "tokens/s here", "state bytes (one row)"]]
    for size, model, rows in _sides(results):
        speed = statistics.fmean(r["tokens_per_s"] for r in rows)
        figures = f"{rows[0]['lr']:.3g}", f"{speed:,.0f}", f"{rows[0]['state_bytes']:,}"
        out.append([size, model, *figures])
    return out


def domain_table(results: dict[str, Any], size: str) -> Table:
    """Return the mean loss of each domain at one size."""
    models = [m for m in results["suite"]["models"] if _of(results, size, m)]
    names = sorted({n for m in models for r in _of(results, size, m) for n in r["domains"]})
    out = [["domain", *models]]
    for name in names:
        cells = [
            [r["domains"][name] for r in _of(results, size, m) if name in r["domains"]]
            for m in models
        ]
        out.append([name, *(mean_and_spread(c) for c in cells)])
    return out


def sweep_table(results: dict[str, Any]) -> Table:
    """Return the held-out loss of every learning rate that was tried."""
    rates = sorted({s["lr"] for s in results["sweep"]})
    losses = {(s["model"], s["lr"]): s["loss"] for s in results["sweep"]}

    def shown(model: str, rate: float) -> str:
        loss = losses.get((model, rate), "")
        return "diverged" if loss is None else f"{loss:.4f}" if loss != "" else ""

    models = dict.fromkeys(s["model"] for s in results["sweep"])
    body = [[model, *(shown(model, rate) for rate in rates)] for model in models]
    return [["model", *(f"lr {rate:g}" for rate in rates)], *body]


def remarks(results: dict[str, Any]) -> list[str]:
    """Return what a reader must know: cells that failed, are not run or differ in their making.

    Named are what is not equal between the models (`suite.uneven`), cells of several sources or
    scored on several pieces of the test text, and models whose best learning rate is the last of a
    sweep of three or more, on either side.
    """
    done = [r for r in results["rows"] if r["loss"] is not None]
    made = Counter(_source(r.get("source")) for r in done)
    pieces = {json.dumps(r.get("domain_tokens"), sort_keys=True) for r in done}
    said = [*results.get("uneven", ()), *failures(results), *_at_edges(results)]
    if results["split"] != "test":
        said.append(NO_TEST)
    if len(made) > 1:
        each = ", ".join(f"{name} ({n} cells)" for name, n in made.items())
        said.append(f"finished cells come from different sources: {each}")
    if len(pieces) > 1:
        said.append(
            "finished cells were scored on different pieces of the test text, so that their losses "
            "do not compare: remove their score.json, and compare will score them again"
        )
    return said


def _at_edges(results: dict[str, Any]) -> list[str]:
    """Return a sentence for each model whose finished sweep ends where it does best."""
    said, values = [], results["suite"]["lr"]["values"]
    for model in results["suite"]["models"]:
        losses = {r["lr"]: r["loss"] for r in results["sweep"] if r["model"] == model}
        ran = {rate: loss for rate, loss in losses.items() if loss is not None}  # None: it diverged
        if len(losses) < max(3, len(values)) or not ran:
            continue
        best = min(ran, key=ran.__getitem__)
        for end, side in ((min(values), "smallest"), (max(values), "largest")):
            if best == end:
                said.append(
                    f"{model}: the best learning rate, {best:g}, is the {side} of the sweep; one "
                    "beyond it may be better"
                )
    return said


def _source(given: Any) -> str:
    """Return the sources that a cell was run and scored with, in words."""
    said = []
    for source in given if isinstance(given, list) else [given]:  # an older cell names one
        commit = (source or {}).get("commit") or ""
        short = commit[:12] + "-dirty" * commit.endswith("-dirty")
        named = filter(None, [(source or {}).get("metastate"), short])
        said.append(" ".join(named) or "unknown")
    return ", then ".join(said)


def failures(results: dict[str, Any]) -> list[str]:
    """Return a sentence for each cell that failed, and one for cells that are not run yet."""
    said = [
        f"{r['model']}, {r['size']}, seed {r['seed']}: {r['failed']}"
        for r in results["rows"]
        if r["failed"]
    ]
    missing = results["cells"] - len(results["rows"])
    return [*said, f"{missing} of {results['cells']} cells are not run yet"] if missing else said


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def budget(results: dict[str, Any]) -> str:
    """Return what all finished cells took together."""
    rows = [r for r in results["rows"] if r["curve"]]
    hours = sum(r["curve"][-1]["seconds"] for r in rows) / 3600
    tokens, flops = sum(r["tokens"] for r in rows), sum(r["flops"] for r in rows)
    return (
        f"{len(rows)} of {results['cells']} cells; {tokens:,} training tokens, {flops:.3g} FLOPs, "
        f"{hours:.2f} hours of training (the sweep of learning rates not counted)"
    )


def write_report(results: dict[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write table.md, the figures (PNG) and report.html into `out`; return their paths.

    Raises:
        DataError: no cell is finished, or a file cannot be written. ConfigError: matplotlib or
            scipy is missing.
    """
    out = Path(out)
    if not any(r["curve"] for r in results["rows"]):
        raise DataError("no cell is finished yet, so there is nothing to report")
    tables = [("", main_table(results))]
    if len({r["seed"] for r in results["rows"]}) > 1:
        tables.append(
            (f"Seed by seed (gain over {results['suite']['baseline']})", seed_table(results))
        )
    tables.append(("What it costs", cost_table(results)))
    if results["sweep"]:
        tables.append(("Learning rates tried (held-out loss)", sweep_table(results)))
    tables += [
        (f"Domains, {size} (nats a token)", domain_table(results, size))
        for size in results["suite"]["sizes"]
        if len(domain_table(results, size)) > 2
    ]
    notes = [MEANING.format(split=results["split"]), budget(results), *remarks(results)]
    text = [f"### {title}\n\n{markdown(t)}" if title else markdown(t) for title, t in tables]
    paths = [out / "table.md"]
    atomic_write(paths[0], "\n\n".join([*text, *notes, ""]).encode("utf-8"), error=DataError)
    pictures = []
    for key, (title, file) in FIGURES.items():
        laws = fits(results, key)
        png, svg = comparison_figure(results, key, laws, title)
        paths.append(out / f"{file}.png")
        atomic_write(paths[-1], png, error=DataError)
        pictures.append((title, svg, laws))
    lines = {
        (model, size): line
        for model in results["suite"]["models"]
        for size in results["suite"]["sizes"]
        if model != results["suite"]["baseline"] and (line := leads(results, size, model))
    }
    if lines:
        title = f"Lead over {results['suite']['baseline']} as training goes on"
        png, svg = lead_figure(lines, title)
        paths.append(out / "lead-by-tokens.png")
        atomic_write(paths[-1], png, error=DataError)
        pictures.append((title, svg, {}))
    paths.append(out / "report.html")
    page = _page(results, tables, notes, pictures)
    atomic_write(paths[-1], page.encode("utf-8"), error=DataError)
    return paths


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 60rem;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child, .models :nth-child(2) { text-align: left; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem; font-size: .8rem; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding: .3rem; white-space: normal; overflow-wrap: break-word; }
}
"""


def _page(
    results: dict[str, Any],
    tables: list[tuple[str, Table]],
    notes: list[str],
    pictures: list[tuple[str, str, dict[str, PowerLaw]]],
) -> str:
    suite = results["suite"]
    title = "Compared: " + ", ".join(suite["models"])
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    parts.append(_table(tables[0][1]))
    for name, svg, laws in pictures:
        parts.append(f"<h2>{html.escape(name)}</h2><figure>{svg}")
        for model, law in laws.items():
            parts.append(
                f"<figcaption>{html.escape(model)}: loss = {law.scale:.3g} x^-{law.exponent:.4f}; "
                "through the sizes' means; band: 95 % confidence as if the law were exact and the "
                "distances from it independent; long dashes: extrapolation, not measured"
                "</figcaption>"
            )
        parts.append("</figure>")
    for name, table in tables[1:]:
        parts.append(f"<h2>{html.escape(name)}</h2>{_table(table)}")
    parts.append("<h2>Settings</h2>")
    configs = {f"{r['model']}, {r['size']}": r["config"] for r in results["rows"]}
    blocks = {"suite": suite, "environment": results["environment"], **configs}
    for name, value in blocks.items():
        body = html.escape(json.dumps(value, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{body}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        + "".join(parts)
        + "</body></html>\n"
    )


def _table(table: Table) -> str:
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{html.escape(_unbroken(c))}</{tag}>" for c in row) + "</tr>"
        for tag, row in [("th", table[0]), *(("td", row) for row in table[1:])]
    )
    rows = f"<thead>{head}</thead><tbody>{''.join(body)}</tbody>"
    kind = ' class="models"' if table[0][1] == "model" else ""
    return f'<div class="wide"><table{kind}>{rows}</table></div>'


def _unbroken(cell: str) -> str:
    """Keep a figure and its spread or unit on one line of a narrow screen."""
    return cell.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")
