"""`metastate compare`: a suite of equal comparisons, run cell by cell."""

from __future__ import annotations

import argparse
from pathlib import Path

from metastate.cli.options import read_yaml
from metastate.cli.progress import bar, log, print_json, told_if_interrupted
from metastate.data.files import in_turn
from metastate.data.loader import PreparedData
from metastate.errors import ConfigError, DataError
from metastate.eval.compare import collect, compare, estimate
from metastate.eval.report import NO_TEST, main_table, markdown, remarks, write_report
from metastate.eval.suite import Cell, Suite, plan, uneven
from metastate.mapping import from_dict

BUSY = 0.8  # share of the time with a processor, under which the machine is called busy


def run_compare(args: argparse.Namespace) -> None:
    """Plan, then (unless told to plan or report only) run, then report."""
    settings = read_yaml(args.suite)
    if args.data:
        settings["data"] = args.data
    if not settings.get("data"):
        raise ConfigError("--data is missing, and the suite names none either")
    suite, out = from_dict(Suite, settings, "suite"), Path(args.out)
    cells = plan(suite, out, match_params=args.match_params)
    log(plan_text(cells))
    warnings = uneven(cells)
    if not PreparedData.open(suite.data).has("test"):
        warnings.append(NO_TEST)
    for warning in warnings:
        log(f"warning: {warning}")
    if args.dry_run:
        log("Measuring the speed of this machine, a few batches of every model ...")
        found = estimate(cells)
        for title, (each, _) in found.items():
            log(f"{title}: about {duration(each)}")
        seconds, quiet = ({k: v[i] for k, v in found.items()} for i in (0, 1))
        now, alone = sum(seconds.values()), sum(quiet.values())
        log(f"together about {duration(now)} on this machine")
        if alone < BUSY * now:
            log(
                f"warning: other programs had its processors for {1 - alone / now:.0%} of the time "
                f"of measuring; were it quiet, about {duration(alone)}"
            )
        if args.json:
            print_json({"cells": len(cells), "seconds": seconds, "quiet_seconds": quiet})
        return
    if args.report_only:
        results = collect(suite, cells, out)
    else:
        with told_if_interrupted(f"the work so far is in {out}"), bar("compare", "GFLOP") as show:
            results = compare(suite, out, match_params=args.match_params, progress=show, say=log)
    for remark in remarks(results):
        log(f"warning: {remark}")
    with in_turn(out, error=DataError):  # as in collect
        paths = write_report(results, out)
    if args.json:
        print_json(results)
    else:
        print(markdown(main_table(results)))
    log("written: " + ", ".join(map(str, paths)))


def plan_text(cells: list[Cell]) -> str:
    """Return what will be run, a line for each model and size."""
    lines = []
    for key in dict.fromkeys((c.size, c.model) for c in cells):
        own = [c for c in cells if (c.size, c.model) == key]
        main, config = [c for c in own if c.rate is None], own[0].config
        shape = f"D {config.hidden_size}, L {config.num_layers}, H {config.num_heads}"
        if config.ffn_size:
            shape += f", F {config.ffn_size}"
        rates = len(own) - len(main)
        seeds = "1 seed" if len(main) == 1 else f"{len(main)} seeds"
        more = f", {rates} learning rates" if rates else ""
        lines.append(
            f"{key[0]}, {key[1]}: {own[0].parameters:,} parameters ({shape}), "
            f"{main[0].tokens:,} tokens, {seeds}{more}"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
