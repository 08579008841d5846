"""`metastate grow` and `upgrade`: larger checkpoints that compute what the smaller ones did."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metastate.cli.options import parse_override
from metastate.cli.progress import bar, log, print_json
from metastate.config import ATTENTION, LARGEST_HEAD, MetaStateConfig
from metastate.data.files import check_free, whole_folder, write_tensors
from metastate.data.loader import PreparedData
from metastate.errors import CheckpointError, ConfigError, DataError
from metastate.eval.loss import evaluate
from metastate.growth import (
    grow,
    grow_moments,
    grow_state,
    growth_report,
    logits_change,
    upgrade,
)
from metastate.growth.expand import AXES
from metastate.mapping import from_dict
from metastate.model.io import (
    check_finite,
    load,
    pinned,
    read_config,
    read_tensors,
    save,
    tokenizer_of,
)
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState
from metastate.train.checkpoint import CARRIED, MOMENTS
from metastate.train.optim import whole_moments

# Largest relative changes of the logits that still count as rounding, in float32 and in float64.
EXACT, EXACT_DOUBLE = 1e-5, 1e-10
SAMPLE_TOKENS = 512
FLAGS = {axis: "--" + axis.removeprefix("num_").replace("_", "-") for axis in AXES}
VALID_TOKENS, CONTEXT = 65_536, 512  # what the loss before and after --replace is measured on


def run_grow(args: argparse.Namespace) -> None:
    """Grow the checkpoint, check that its function stayed, write it whole, and report."""
    folder, out = Path(args.checkpoint), Path(args.out)
    check_free(out)
    model, folder = open_parent(folder)
    sizes = {axis: getattr(args, axis) for axis in AXES}
    try:
        grown = grow(model, **sizes, init=args.init, seed=args.seed)
    except ConfigError as error:
        raise ConfigError(by_flags(str(error))) from error
    if warning := too_wide(grown):
        log(warning)
    tokens, of_what = sample_tokens(model, folder, args.data)
    report = growth_report(model, grown, tokens)
    if args.init == "zero":
        check_exact(model, grown, tokens, report, folder)
    write(out, folder, model, grown)
    if args.json:
        print_json({"out": str(out), "checkpoint": str(folder), "init": args.init, **report})
    else:
        print(report_table(report, of_what))
        say_written(out, folder)


def by_flags(message: str) -> str:
    """Return a message of `grow` with the flags that its arguments are on the command line."""
    message = re.sub(r"init='(\w+)'", r"--init \1", message)
    names = rf"(?:\b(?:model|growth)\.)?\b({'|'.join(FLAGS)})\b"
    return re.sub(names, lambda found: FLAGS[found[1]], message)


def too_wide(grown: LanguageModel) -> str:
    """Return a warning where the heads are wider than the GPU kernels are made for, else ""."""
    size = grown.config.head_size
    if grown.config.architecture in ATTENTION or size is None or size <= LARGEST_HEAD:
        return ""
    return (
        f"warning: the heads are {size} channels wide; the GPU kernels (backend triton) take at "
        f"most {LARGEST_HEAD}, so that a GPU runs this model by the backend chunked"
    )


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


def open_parent(path: str | os.PathLike[str]) -> tuple[LanguageModel, Path]:
    """Return the model of a checkpoint, its weights finite, and the folder that it lies in."""
    read_config(path)  # a preset's name is no checkpoint
    folder = pinned(path)
    model = load(folder).eval()
    check_finite(model.state_dict(), path)
    return model, folder


def check_exact(
    model: LanguageModel,
    grown: LanguageModel,
    tokens: torch.Tensor,
    report: dict[str, Any],
    folder: Path,
) -> None:
    """Raise CheckpointError if `grown` computes another function than `model`.

    Deep models may round by more than EXACT in float32, grown or not; float64 tells that apart.
    """
    change = report["logits"]["relative"]
    if change <= EXACT:
        return
    before, after = (copy.deepcopy(x).double() for x in (model, grown))
    if not logits_change(before, after, tokens)["relative"] <= EXACT_DOUBLE:
        raise CheckpointError(
            f"the new model's logits differ by {change:.1e} of the largest (rounding is below "
            f"{EXACT:.0e}), so it does not compute what {folder} does; nothing was written. This "
            "is a fault of this program: please report it with this message and the command"
        )


def say_written(out: Path, folder: Path) -> None:
    """Say where the new checkpoint is, and what to do with it."""
    if not (out / MOMENTS).exists():
        log(f"{folder} has no moments of the optimizer (RUN/last has): training starts new ones")
    log(f"written to {out}; train it with: metastate train --from {out} --data ... --out ...")


def write(out: Path, folder: Path, model: LanguageModel, grown: LanguageModel) -> None:
    """Write the grown checkpoint, with the moments and the carried state of the old one if any."""
    with whole_folder(out, error=CheckpointError) as temporary:
        save(grown, temporary)
        if (folder / MOMENTS).exists():
            known = whole_moments(read_tensors(folder / MOMENTS), model)
            moments = grow_moments(known, grown, model.config)
            write_tensors(temporary / MOMENTS, moments, error=CheckpointError)
        if (folder / CARRIED).exists():
            state = grow_state(ModelState.load(folder / CARRIED, model), grown)
            state.save(temporary / CARRIED, grown.config)
        if model.tokenizer_info is not None:
            tokenizer_of(model, folder).save(temporary)


def sample_tokens(model: LanguageModel, folder: Path, data: str | None) -> tuple[Tensor, str]:
    """Return [1, T] tokens to compare the logits on, and what they are.

    Held-out text of `data`, or else English from Python's own documentation, or random ids without
    a tokenizer.
    """
    if data:
        prepared = PreparedData.open(data)
        prepared.check_vocab(model.config.vocab_size, model.tokenizer_info)
        name = next(filter(prepared.has, ("valid", "test")), "train")
        for document in prepared.split(name).documents():
            if len(document.tokens) > 1:
                ids = torch.from_numpy(document.tokens[:SAMPLE_TOKENS].astype("int64"))
                return ids[None], f"{name} text of {data}"
        raise DataError(f"{data} has no document to compare the logits on")
    if model.tokenizer_info is None:
        ids = torch.randint(model.config.vocab_size, (1, SAMPLE_TOKENS))
        return ids, "random tokens (the checkpoint names no tokenizer)"
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n".join(topics[key] for key in sorted(topics)[:8])
    ids = torch.tensor([tokenizer_of(model, folder).encode(text)[:SAMPLE_TOKENS]])
    return ids, "Python's documentation"


def report_table(report: dict[str, Any], of_what: str) -> str:
    """Return a growth report as text for people."""
    lines = [f"{'':<18}{'before':>16}{'after':>16}{'ratio':>8}"]
    for key in ("parameters", "non_embedding", "state_bytes", "flops_per_token"):
        a, b = report[key]
        lines.append(f"{key.replace('_', ' '):<18}{a:>16,}{b:>16,}{b / max(a, 1):>8.2f}")
    logits = report["logits"]
    lines.append(
        f"logits moved by at most {logits['max_abs']:.2e}, {logits['relative']:.2e} of the largest "
        f"({logits['tokens']} tokens, {of_what})"
    )
    return "\n".join(lines)


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
