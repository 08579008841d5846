"""`metastate eval-tasks` and `metastate lm-eval`: zero-shot tasks, from files and from lm-eval."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from metastate.cli.models import load_model
from metastate.cli.options import check_file
from metastate.cli.progress import bar, print_json
from metastate.data.files import write_json
from metastate.errors import ConfigError, DataError
from metastate.eval.zero_shot import evaluate_items
from metastate.eval.zero_shot_data import TASKS, check_tasks, load_items
from metastate.model.io import tokenizer_of
from metastate.model.lm import arithmetic

Row = tuple[str, str, float, float | None, float | None, int | None]


def run_eval_tasks(args: argparse.Namespace) -> None:
    """`metastate eval-tasks`: zero-shot tasks from local files."""
    names = _names(args.tasks) if args.tasks else list(TASKS)
    check_tasks(names)
    keep = _keeper(args.out)
    model = load_model(args.checkpoint, args)
    tokenizer = tokenizer_of(model, args.checkpoint)
    # All files are read before the first text is scored: a missing one shows at once.
    items = {name: load_items(name, args.data, args.limit) for name in names}
    values: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        "data": args.data,
        "limit": args.limit,
        "tasks": {},
    }
    rows: list[Row] = []
    try:
        for name in names:
            with bar(name, "tokens") as show, arithmetic(args.device, args.dtype):
                result = evaluate_items(
                    model, tokenizer, name, items[name], batch_size=args.batch_size, progress=show
                )
            values["tasks"][name] = result.to_json()
            rows += [
                (name, key, m.value, m.stderr, m.chance, result.num_items)
                for key, m in result.metrics.items()
            ]
            keep(values)
    finally:  # what is finished is shown also after Ctrl-C, or where --out cannot be written
        if rows:
            show_scores(values, rows, args.json)


def run_lm_eval(args: argparse.Namespace) -> None:
    """`metastate lm-eval`: tasks of lm-evaluation-harness."""
    names, keep = _names(args.tasks), _keeper(args.out)
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"limit is {args.limit}; it must be 1 or more")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {args.num_fewshot}; it must be 0 or more")
    from metastate.eval.lm_eval_adapter import MetaStateLM, evaluate_tasks

    model = load_model(args.checkpoint, args)
    lm = MetaStateLM(model, tokenizer_of(model, args.checkpoint), batch_size=args.batch_size)
    lm.watch = bar
    # lm-eval prints as it goes; standard output is for the result.
    with arithmetic(args.device, args.dtype), contextlib.redirect_stdout(sys.stderr):
        tasks = evaluate_tasks(
            lm,
            names,
            limit=args.limit,
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            gen_kwargs=args.gen_kwargs,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
    values = {
        "checkpoint": args.checkpoint,
        "lm_eval": metadata.version("lm-eval"),
        "limit": args.limit,
        "gen_kwargs": args.gen_kwargs,
        "tasks": tasks,
    }
    rows: list[Row] = [
        (name, key, m["value"], m["stderr"], None, own["items"])
        for name, own in tasks.items()
        for key, m in own["metrics"].items()
    ]
    try:
        keep(values)
    finally:
        show_scores(values, rows, args.json)


def show_scores(values: dict[str, Any], rows: list[Row], as_json: bool) -> None:
    """Print results as one JSON object, or else their rows as a table."""
    if as_json:
        print_json(values)
    else:
        print(score_table(rows))


def score_table(rows: Iterable[Row]) -> str:
    """Return (task, metric, value, standard error, chance, items) as a table for people."""
    rows, before = list(rows), ""
    width = max([4, *(len(row[0]) for row in rows)])
    lines = [
        f"{'task':<{width}} {'metric':<14} {'value':>11} {'+-':^2} {'error':<11} {'chance':>11} "
        f"{'items':>8}"
    ]
    for task, metric, value, error, chance, items in rows:
        name, before = ("" if task == before else task), task
        count = "-" if items is None else f"{items:,}"
        lines.append(
            f"{name:<{width}} {metric:<14} {_number(value):>11} +- {_number(error):<11} "
            f"{_number(chance):>11} {count:>8}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value < 1e5 else f"{value:.3e}"


def _names(text: str) -> list[str]:
    """Return the names between commas, each once."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--tasks {text!r} names no task; give names with commas between")
    return names


def _keeper(out: str | None) -> Callable[[dict[str, Any]], None]:
    """Return what writes the results so far to `out`, where there is one."""
    if not out:
        return lambda values: None
    check_file("--out", out)
    return lambda values: write_json(out, values, error=DataError)
