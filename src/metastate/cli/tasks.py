"""`metastate tasks`: small models of every architecture on state tracking and recall.

A cell is one architecture of one size, trained on one problem at one learning rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from metastate.cli.progress import bar, log, print_json, told_if_interrupted
from metastate.config import ModelConfig, TrainConfig
from metastate.data.files import alone_in, atomic_write, write_json
from metastate.errors import ConfigError, DataError
from metastate.eval.plots import task_figure
from metastate.eval.report import markdown as table
from metastate.eval.suite import count, fit_parameters
from metastate.eval.tasks import Problem, Recall, WordProblem, task_model, train_and_score
from metastate.mapping import from_dict, to_dict
from metastate.model.presets import ARCHITECTURES
from metastate.train.distributed import device_of
from metastate.train.memory import keep_freed_memory

Cell = dict[str, Any]

# What belongs to one task alone, and the defaults of what does not.
OWN = {"state-tracking": ("groups", "length"), "recall": ("levels", "vocab_size", "filler")}
FLAGS = {"groups": "--group", "levels": "--level"}  # where the name is not the flag's
DEFAULTS: dict[str, dict[str, Any]] = {
    "state-tracking": {"groups": ["S3"], "length": 20, "layers": [1, 2], "batch_size": 64},
    "recall": {
        "levels": ["64x4"],
        "vocab_size": 8192,
        "filler": "zero",
        "layers": [2],
        "batch_size": 32,
    },
}
RESULTS, TABLE, FIGURE = "results.json", "results.md", "accuracy.png"


def run_tasks(args: argparse.Namespace) -> None:
    """Run the cells that OUT does not hold yet; write results, table and figure; print them."""
    fill_defaults(args)
    planned = cells(args)  # all of them first: a mistake shows before hours of work
    out = Path(args.out or f"runs/{args.task}")
    kept = f"finished cells are in {out / RESULTS}, a running one starts over"
    with alone_in(out), told_if_interrupted(kept):
        done = finish(planned, out)
    best = best_rates(done)
    text = markdown(best)
    atomic_write(out / TABLE, text.encode("utf-8"))
    try:
        task_figure(best, out / FIGURE)
        log(f"figure {out / FIGURE}")
    except ConfigError as error:  # a missing figure must not fail finished work
        log(f"no figure: {error}")
    log(f"table {out / TABLE}, all figures {out / RESULTS}")
    if args.json:
        print_json({"task": args.task, "summary": summary(best), "cells": done})
    else:
        print(text, end="")


def finish(planned: list[tuple[Problem, Cell]], out: Path) -> list[Cell]:
    """Return the planned cells, finished; train those that OUT does not hold, and add them."""
    known = read_results(out / RESULTS)
    keep_freed_memory()
    done: list[Cell] = []
    for i, (problem, cell) in enumerate(planned, 1):
        name = f"{i}/{len(planned)} {name_of(cell)}"
        found = next((c for c in known if is_same(c, cell)), None)
        if found is None and (easier := solved_before(cell, done)):
            log(f"{name}: left out, {layers_of(easier)} passed already")
            continue
        if found is None:
            model = from_dict(ModelConfig, cell["model"])
            train = from_dict(TrainConfig, cell["train"])
            with bar(name, "steps") as show:
                found = cell | train_and_score(problem, model, train, show)
            known.append(found)
            write_json(out / RESULTS, {"cells": known})
        log(f"{name}: {verdict(found)}")
        done.append(found)
    return done


def fill_defaults(args: argparse.Namespace) -> None:
    """Give each option that was left out its default; refuse those of the other task."""
    for task, names in OWN.items():
        for name in names:
            if task != args.task and getattr(args, name) is not None:
                flag = FLAGS.get(name, "--" + name.replace("_", "-"))
                raise ConfigError(f"{flag} is an option of `metastate tasks {task}` alone")
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}; 0 or more")
    device_of(args.device)
    if args.warmup is None:
        args.warmup = min(100, args.steps // 10)


def cells(args: argparse.Namespace) -> list[tuple[Problem, Cell]]:
    """Return every cell that the options ask for, fewer layers before more, with its problem.

    With `match_params` a layer without a hidden part (the paper's) stays as it is; the table says
    how many parameters each has.
    """
    problems: list[Problem] = []
    if args.task == "recall":
        problems += [Recall.parse(level, args.vocab_size, args.filler) for level in args.levels]
    else:
        problems += [WordProblem(group, args.length) for group in args.groups]
    planned = []
    architectures = list(dict.fromkeys(args.architectures or ARCHITECTURES))
    for problem in dict.fromkeys(problems):
        for architecture in architectures:
            for layers in sorted(set(args.layers)):
                size = layers, args.width, args.heads, problem.vocab_size
                model = task_model(architecture, *size)
                if args.match_params and model.hidden_channels:
                    target = count(task_model(architectures[0], *size))
                    model = fit_parameters(model, target, depths=[layers])
                for rate in dict.fromkeys(args.lr):
                    train = TrainConfig(
                        steps=args.steps,
                        batch_size=args.batch_size,
                        context=problem.length,
                        lr=rate,
                        min_lr=rate / 10,
                        warmup=args.warmup,
                        weight_decay=args.weight_decay,
                        z_loss=0.0,
                        seed=args.seed,
                        device=args.device,
                        valid_every=50,
                    )
                    cell = {
                        "task": args.task,
                        "problem": problem.name,
                        "length": problem.length,
                        "architecture": architecture,
                        "model": to_dict(model),
                        "train": to_dict(train),
                    }
                    planned.append((problem, cell))
    return planned


def read_results(path: Path) -> list[Cell]:
    """Return the finished cells in `path`, none where there is no such file.

    Raises:
        DataError: the file is not what this command writes.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if not all("accuracy" in cell and "problem" in cell for cell in found):
            raise ValueError("a cell has no accuracy")
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise DataError(
            f"{path} holds no results of this command ({cause}); move it away, or choose another "
            "--out"
        ) from None
    return found


def is_same(found: Cell, cell: Cell) -> bool:
    """Say whether a finished cell is `cell`: same problem, model and training, wherever it ran."""

    def identity(one: Cell) -> tuple[Any, ...]:
        train = from_dict(TrainConfig, one["train"] | {"device": "cpu"})
        model = from_dict(ModelConfig, one["model"])  # settings that came later have their defaults
        return one["task"], one["problem"], one["architecture"], model, train

    try:
        return identity(found) == identity(cell)
    except (ConfigError, KeyError, TypeError):  # written by another version
        return False


def solved_before(cell: Cell, done: list[Cell]) -> Cell | None:
    """Return the cell that makes this one needless: same problem, no more layers, passed."""
    for other in done:
        same = all(other[key] == cell[key] for key in ("problem", "architecture"))
        if same and other["passed"]:
            return other
    return None


def best_rates(done: list[Cell]) -> list[Cell]:
    """Return the cells, of those that differ by learning rate alone the most accurate.

    They are chosen by other sequences than their accuracy is reported on: the best of many noisy
    figures would flatter whoever tried more rates.
    """
    best: dict[tuple[Any, ...], Cell] = {}
    for cell in done:
        key = (cell["problem"], cell["architecture"], cell["model"]["num_layers"])
        if key not in best or choice(cell) > choice(best[key]):
            best[key] = cell
    return list(best.values())


def choice(cell: Cell) -> float:
    """Return what a learning rate is chosen by; cells of older versions have their accuracy."""
    return float(cell["choice"] if "choice" in cell else cell["accuracy"])


def layers_of(cell: Cell) -> str:
    """Return `1 layer`, `2 layers`."""
    layers = cell["model"]["num_layers"]
    return f"{layers} layer{'s' * (layers > 1)}"


def name_of(cell: Cell) -> str:
    """Return what the cell is, in a few words."""
    rate = f"lr {cell['train']['lr']:g}"
    return f"{cell['problem']} {cell['architecture']}, {layers_of(cell)}, {rate}"


def verdict(cell: Cell) -> str:
    """Return how the cell ended, in a few words."""
    end = "diverged" if cell["diverged"] else "passed" if cell["passed"] else "not passed"
    return f"accuracy {cell['accuracy']:.1%}, {end} after {cell['steps']:,} steps"


def summary(best: list[Cell]) -> dict[str, dict[str, Any]]:
    """Return architecture -> problem -> fewest_layers that pass, or None; and the best accuracy.

    For word problems also fewest_layers_by_length, from 5 to the length learned.
    """
    out: dict[str, dict[str, Any]] = {}
    for cell in best:
        own = out.setdefault(cell["architecture"], {})
        own.setdefault(cell["problem"], {"fewest_layers": None, "most_layers": 0, "accuracy": 0.0})
        value, layers = own[cell["problem"]], cell["model"]["num_layers"]
        value["most_layers"] = layers
        value["accuracy"] = max(value["accuracy"], cell["accuracy"])
        if cell["passed"] and value["fewest_layers"] is None:
            value["fewest_layers"] = layers
        for n in range(5, cell["length"] + 1) if cell["by_length"] else ():
            fewest = value.setdefault("fewest_layers_by_length", {}).setdefault(str(n), None)
            if fewest is None and cell["by_length"][n - 1] > WordProblem.threshold:
                value["fewest_layers_by_length"][str(n)] = layers
    return out


def markdown(best: list[Cell]) -> str:
    """Return the fewest layers that pass, and a row for each cell, as Markdown tables."""
    words = best[0]["by_length"] is not None
    problems = list(dict.fromkeys(cell["problem"] for cell in best))
    threshold = (WordProblem if words else Recall).threshold
    at = f" at length {best[0]['length']}" if words else ""
    rows = [[f"fewest layers above {threshold:.0%}{at}", *problems]]
    for architecture, own in summary(best).items():
        row = [architecture]
        for value in (own[problem] for problem in problems):
            none = f"none up to {value['most_layers']} ({value['accuracy']:.1%})"
            row.append(none if value["fewest_layers"] is None else str(value["fewest_layers"]))
        rows.append(row)
    last, learned = len(best[0]["by_length"] or ()), best[0]["length"]
    shown = sorted({n for n in (5, 10, 15, learned, 2 * learned, 4 * learned) if n <= last})
    columns = [f"length {n}" for n in shown] if words else ["accuracy"]
    head = ["problem", "architecture", "layers", "parameters", "lr", "steps", *columns]
    each = [head]
    for cell in best:
        scores = [cell["by_length"][n - 1] for n in shown] if words else [cell["accuracy"]]
        values = [
            *(cell["problem"], cell["architecture"], cell["model"]["num_layers"]),
            *(f"{cell['parameters']:,}", f"{cell['train']['lr']:g}", f"{cell['steps']:,}"),
            *(f"{score:.1%}" for score in scores),
        ]
        each.append([str(value) for value in values])
    return f"{table(rows)}\n\n{table(each)}\n"
