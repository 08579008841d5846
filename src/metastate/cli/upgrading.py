"""`metastate upgrade`: Meta-State layers for a trained RWKV-7 that goes on computing the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metastate.cli.growing import (
    check_exact,
    open_parent,
    report_table,
    sample_tokens,
    say_written,
    write,
)
from metastate.cli.options import parse_override
from metastate.cli.progress import bar, print_json
from metastate.config import MetaStateConfig
from metastate.data.files import check_free
from metastate.data.loader import PreparedData
from metastate.errors import ConfigError
from metastate.eval.loss import evaluate
from metastate.growth import growth_report, upgrade
from metastate.mapping import from_dict
from metastate.model.lm import LanguageModel

VALID_TOKENS, CONTEXT = 65_536, 512  # what the loss before and after --replace is measured on


def run_upgrade(args: argparse.Namespace) -> None:
    """Upgrade the checkpoint, check that its function stayed, write it whole, and report."""
    out = Path(args.out)
    check_free(out)
    model, folder = open_parent(args.checkpoint)
    upgraded = upgrade(
        model,
        layers_of(args.layers),
        replace=args.replace,
        meta_state=options_of(args.set),
        seed=args.seed,
    )
    tokens, of_what = sample_tokens(model, folder, args.data)
    report = growth_report(model, upgraded, tokens)
    if args.replace and args.data:
        report["nats_per_token"] = [held_out_loss(m, args.data) for m in (model, upgraded)]
    if not args.replace:
        check_exact(model, upgraded, tokens, report, folder)
    write(out, folder, model, upgraded)
    changed = {name: upgraded.lineage[-1][name] for name in ("meta_layers", "ffn_layers")}
    if args.json:
        print_json({"out": str(out), "checkpoint": str(folder), **changed, **report})
        return
    print(report_table(report, of_what))
    for name, (before, after) in changed.items():
        was, now = (", ".join(map(str, layers)) or "none" for layers in (before, after))
        print(f"{name.replace('_', ' '):<18}{was} -> {now}")
    if "nats_per_token" in report:
        before, after = report["nats_per_token"]
        print(f"{'held-out loss':<18}{before:.4f} -> {after:.4f} nats/token")
    say_written(out, folder)


def layers_of(text: str) -> list[int] | None:
    """Return the blocks in `all` (None) or `0,3,5`; ConfigError if it is neither."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers is {text!r}; all, or numbers as in 0,3,5") from None


def options_of(overrides: list[str]) -> MetaStateConfig | None:
    """Return the layer's options from `meta_state.KEY=VALUE`, None where nothing is set."""
    options: dict[str, Any] = {}
    for text in overrides:
        (part, value), *_ = parse_override(text).items()
        if part != "meta_state" or not isinstance(value, dict):
            raise ConfigError(f"--set {text!r}: only meta_state.KEY=VALUE, the layer's options")
        options |= value
    return from_dict(MetaStateConfig, options, "meta_state") if options else None


def held_out_loss(model: LanguageModel, data: str) -> float:
    """Return nats a token on the valid split."""
    split = PreparedData.open(data).split("valid")
    with bar("held-out loss", "tokens") as show:
        result = evaluate(
            model, split, mode="windowed", context=CONTEXT, limit_tokens=VALID_TOKENS, progress=show
        )
    return result.nats_per_token
