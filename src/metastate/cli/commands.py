"""`metastate prepare`, `info`, `eval`, `generate` and `doctor`: from options to the library."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from metastate.cli.models import load_model, sampling_of
from metastate.cli.options import check_file
from metastate.cli.progress import bar, log, print_json, told_if_interrupted
from metastate.data.loader import RECORD, PreparedData
from metastate.data.prepare import prepare
from metastate.errors import ConfigError
from metastate.eval.describe import describe, describe_table, not_finite_lines
from metastate.eval.doctor import devices_here, diagnose, doctor_table
from metastate.eval.loss import EvalResult, evaluate
from metastate.infer.generate import Continuation, generate, inference
from metastate.model import presets
from metastate.model.io import checkpoint_folder, load, not_finite, tokenizer_of
from metastate.model.lm import arithmetic
from metastate.model.state import ModelState
from metastate.model.state_file import StateFile
from metastate.train.distributed import device_of


def run_prepare(args: argparse.Namespace) -> None:
    """`metastate prepare`: text to token files."""
    held_out = (args.valid_fraction, args.test_fraction)
    if not (min(held_out) >= 0 and sum(held_out) < 1):
        raise ConfigError(
            f"--valid-fraction is {held_out[0]}, --test-fraction {held_out[1]}; neither may be "
            "below 0, and both together must leave something to train"
        )
    kept = f"what was tokenised is in {args.out}"
    with told_if_interrupted(kept), bar("prepare", "bytes") as show:
        data = prepare(
            args.inputs,
            args.tokenizer,
            args.out,
            valid=args.valid,
            test=args.test,
            fractions=(1 - sum(held_out), *held_out),
            text_field=args.text_field,
            overwrite=args.overwrite,
            progress=show,
            say=log,
        )
    print_data(data, args.json, "out")


def print_data(data: PreparedData, as_json: bool, name: str) -> None:
    """Print what prepared data hold; `name` is what JSON calls their folder."""
    record = data.record
    if as_json:
        values = {key: record[key] for key in ("tokenizer", "domains", "splits")}
        print_json({name: str(data.path)} | values)
        return
    print(f"{data.path}: {record['tokenizer']['name']}, vocabulary {data.vocab_size:,}")
    print(f"{'':<20} {'documents':>12} {'tokens':>15} {'bytes of text':>15}")
    for split, sizes in record["splits"].items():
        domains = sizes["domains"].items() if len(record["domains"]) > 1 else ()
        for name, own in ((split, sizes), *((f"  {domain}", own) for domain, own in domains)):
            counts = (own["documents"], own["tokens"], own["text_bytes"])
            print(f"{name:<20} {counts[0]:>12,} {counts[1]:>15,} {counts[2]:>15,}")


def check_context(context: int) -> None:
    """Raise ConfigError where `--context` is no length."""
    if context < 1:
        raise ConfigError(f"--context is {context}; it must be 1 or more")


def run_info(args: argparse.Namespace) -> None:
    """`metastate info`: what a checkpoint, a preset, a state file or prepared data are."""
    check_context(args.context)
    if (Path(args.model) / RECORD).is_file():
        print_data(PreparedData.open(args.model), args.json, "data")
        return
    if checkpoint_folder(args.model).is_file():
        print_state(args)
        return
    is_preset = args.model in presets.NAMES and not Path(args.model).exists()
    # A preset is described from its config alone: the large ones would not fit in memory.
    model = presets.preset(args.model) if is_preset else load(args.model)
    if args.json:
        print_json({"model": args.model} | describe(model, args.context))
    else:
        print(describe_table(model, args.context))


def print_state(args: argparse.Namespace) -> None:
    """Print what the state file `args.model` says."""
    file = StateFile.read(args.model)
    values, counts = file.to_json(), not_finite(file.tensors)
    if args.json:
        print_json({"file": args.model, "not_finite": counts} | values)
        return
    for line in not_finite_lines(counts):
        print(line)
    tensors, extra = values.pop("tensors"), values.pop("extra")
    for key, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else value or "not recorded"
        print(f"{key.replace('_', ' '):<14}{shown}")
    for name, shape in tensors.items():
        print(f"  {name:<28}{shape}")
    for name, text in extra.items():
        print(f"  note {name:<23}{text if len(text) < 120 else f'{len(text):,} characters'}")


def run_eval(args: argparse.Namespace) -> None:
    """`metastate eval`: stateful and windowed loss on a split."""
    check_context(args.context)
    model = load_model(args.checkpoint, args)
    data = PreparedData.open(args.data)
    data.check_vocab(model.config.vocab_size, model.tokenizer_info)
    split = data.split(args.split)
    start = None
    if args.state:
        start = ModelState.load(
            args.state, model, allow_other_weights=args.allow_other_weights
        ).expand(1)
    results = []
    for mode, context in (("stateful", None), ("windowed", args.context)):
        with bar(f"eval, {mode}", "tokens") as show, arithmetic(args.device, args.dtype):
            result = evaluate(
                model,
                split,
                context=context,
                mode=mode,  # type: ignore[arg-type]
                by_domain=args.by_domain,
                by_position=args.by_position,
                limit_tokens=args.limit_tokens,
                batch_size=args.batch_size,
                start=start,
                progress=show,
            )
        results.append(result)
    stateful, windowed = results
    if args.json:
        names = ("checkpoint", "data", "split", "state")
        values = {name: getattr(args, name) for name in names}
        print_json(values | stateful.to_json() | {"windowed": windowed.to_json()})
    else:
        print(eval_table(results))


def eval_table(results: list[EvalResult]) -> str:
    """Return results as lines for people: totals, then domains, then positions."""

    def row(name: str, value: dict[str, Any]) -> str:
        bits = value["bits_per_byte"]
        return (
            f"{name:<28} {value['nats_per_token']:>9.4f} {value['perplexity']:>12.2f} "
            f"{'-' if bits is None else format(bits, '.4f'):>10} {value['tokens']:>12,}"
        )

    lines = [f"{'':<28} {'nats/token':>9} {'perplexity':>12} {'bits/byte':>10} {'tokens':>12}"]
    for result in results:
        value = result.to_json()
        name = result.mode + (f", context {result.context}" if result.context else "")
        lines.append(row(name, value))
        lines += [row(f"  {domain}", own) for domain, own in value["domains"].items()]
        for own in value["positions"]:
            name = f"  tokens {own['first']:,} to {own['last']:,} before"
            lines.append(f"{name:<38} {own['nats_per_token']:>9.4f} {own['tokens']:>23,}")
    return "\n".join(lines)


def run_generate(args: argparse.Namespace) -> None:
    """`metastate generate`: stream a continuation to standard output."""
    sampling = sampling_of(args)
    if args.state_out:
        check_file("--state-out", args.state_out)
    model = load_model(args.checkpoint, args, decoding=True)
    tokenizer = tokenizer_of(model, args.checkpoint)
    state = None
    if args.state_in:
        leave = args.allow_other_weights
        state = Continuation.load(args.state_in, model, allow_other_weights=leave)
    prompt = read_prompt(args.prompt, use_stdin=not state)
    with inference(model):  # loads the kernels, whose time is no part of reading the prompt
        model.read(torch.zeros(1, 2, dtype=torch.int64, device=model.embedding.weight.device))
    pieces = []
    text = generate(
        model,
        tokenizer,
        prompt,
        state=state,
        sampling=sampling,
        max_tokens=args.max_tokens,
        stop=args.stop,
    )
    # A continuation is never changed: the last is whole wherever Ctrl-C strikes or the output ends.
    at = None
    try:
        for piece in text:
            pieces.append(piece)
            if args.state_out:
                at = text.continuation
            if not args.json:
                print(piece, end="", flush=True)
    except (KeyboardInterrupt, OSError):
        if at is not None:
            at.save(args.state_out, model)
            log(f"\n{args.state_out} goes on from here")
        raise
    if not args.json:
        print()
    continuation = text.continuation
    if args.state_out:
        continuation.save(args.state_out, model)
    if args.json:
        print_json(
            {
                "text": "".join(pieces),
                "tokens": len(text.tokens),
                "finish_reason": text.finish_reason,
                "seed": text.seed,
                "state_bytes": continuation.state.num_bytes,
                **text.statistics.to_json(),
            }
        )


def read_prompt(prompt: str | None, *, use_stdin: bool) -> str:
    """Return the prompt given, or else standard input's text unless a person types there.

    Raises:
        ConfigError: it is no UTF-8 text.
    """
    try:
        if prompt is None:
            prompt = sys.stdin.read() if use_stdin and not sys.stdin.isatty() else ""
        prompt.encode("utf-8")  # bytes of a command line that are no text are half characters
    except UnicodeError as cause:
        raise ConfigError(f"the prompt is no UTF-8 text ({cause}); convert it first") from None
    return prompt


def run_doctor(args: argparse.Namespace) -> int:
    """Check and report; 1 where a backend that `auto` chooses is wrong."""
    devices = devices_here()
    if args.device:
        wanted = device_of(args.device)
        devices = [d for d in devices if d.type == wanted.type]
        if not devices:
            raise ConfigError(f"--device {args.device}: only cpu and cuda have backends to check")
        devices = devices if wanted.index is None else [wanted]
    with bar("doctor", "checks") as show:
        report = diagnose(devices, progress=show)
    if args.json:
        print_json(report)
    else:
        print(doctor_table(report))
    return 0 if report["ok"] else 1
