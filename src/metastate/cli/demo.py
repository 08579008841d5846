"""`metastate demo`: from nothing to a model that writes, in a few minutes on this machine."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metastate.cli.progress import bar, log, print_json
from metastate.cli.training import CURVE, train_with_bar
from metastate.config import TrainConfig
from metastate.data.files import write_json
from metastate.data.loader import PreparedData
from metastate.data.prepare import prepare
from metastate.errors import ConfigError
from metastate.eval.loss import evaluate
from metastate.infer.generate import generate
from metastate.infer.sampling import SamplingConfig
from metastate.mapping import from_dict, to_dict
from metastate.model.io import load
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from metastate.train.checkpoint import has_run
from metastate.train.trainer import LOG, train

# Chosen by trying, for two cores and five minutes.
SETTINGS = TrainConfig(
    preset="metastate-tiny", batch_size=8, context=256, lr=3e-3, min_lr=1e-4, valid_tokens=32768
)
PROBE_STEPS, PROBE_WARM = 10, 4  # steps that measure the speed; the first ones compile kernels
SCORED_TOKENS = 65536
PROMPT = "The "
SAMPLE_TOKENS = 400
PLAN = "demo.json"


def run_demo(args: argparse.Namespace) -> int:
    """Prepare, train, evaluate and sample; a second run goes on where the first one stopped."""
    if not 0 < args.minutes < math.inf:
        raise ConfigError(f"--minutes is {args.minutes}; a number above 0 is needed")
    out = Path(args.out)
    log("1. Text: documentation and sources of the Python that runs this, as bytes.")
    fractions = (0.9, 0.05, 0.05)
    with bar("prepare", "bytes") as read:
        data = prepare(["stdlib"], "bytes", out / "data", fractions=fractions, progress=read)
    for name, sizes in data.record["splits"].items():
        log(f"   {name}: {sizes['documents']} documents, {sizes['tokens']:,} bytes")
    plan = make_plan(out, data, args.minutes)
    config = from_dict(TrainConfig, plan["train"])
    log(
        f"3. Training: {config.steps:,} steps of {config.batch_size} x {config.context} bytes, "
        f"about {plan['minutes']:g} minutes; Ctrl-C stops, the same command goes on."
    )
    result = train_with_bar(config, resume=has_run(config.out))
    if result.signal is not None:
        log("Stopped; the same command goes on.")
        return 128 + result.signal
    run = Path(config.out)
    model = load(run / "best").eval()
    after = score(model, data)
    log(f"4. Held-out text: {after:.3f} bits per byte, {plan['before']:.3f} before training.")
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=config.seed)
    text = generate(model, data.tokenizer, PROMPT, sampling=sampling, max_tokens=SAMPLE_TOKENS)
    log(f"5. A sample, from {PROMPT!r} on:")
    pieces = [PROMPT]
    show = not args.json
    if show:
        print(PROMPT, end="")
    for piece in text:
        pieces.append(piece)
        if show:
            print(piece, end="", flush=True)
    if show:
        print()
    state_bytes = text.continuation.state.num_bytes
    log(
        f"6. All that the model remembers of a text, however long, is a state of {state_bytes:,} "
        f"bytes.\n   checkpoint {run / 'best'}\n   log {run / LOG}\n"
        f"   loss curve {run / CURVE}\n"
        f"Try: metastate generate {run / 'best'} --prompt 'import '"
    )
    if args.json:
        print_json(
            {
                "bits_per_byte_before": plan["before"],
                "bits_per_byte": after,
                "steps": result.step,
                "tokens": result.tokens,
                "checkpoint": str(run / "best"),
                "log": str(run / LOG),
                "curve": str(run / CURVE),
                "sample": "".join(pieces),
                "state_bytes": state_bytes,
            }
        )
    return 0


def make_plan(out: Path, data: PreparedData, minutes: float) -> dict[str, Any]:
    """Return what this demo does, from OUT/demo.json if it was begun before.

    The number of steps follows from the speed of this machine, so that the learning rate's
    schedule ends when the time does.
    """
    file = out / PLAN
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))
        log(f"2. Going on with the demo in {out}; remove that folder to start over.")
        return plan
    config = replace(SETTINGS, data=str(data.path), out=str(out / "run"))
    torch.manual_seed(config.seed)
    fresh = LanguageModel(preset(config.preset, vocab_size=data.vocab_size, **config.model))
    count = fresh.count_parameters()["total"]
    before = score(fresh, data)
    log(f"2. {config.preset}, {count:,} parameters, knows nothing: {before:.3f} bits per byte.")
    step_s = seconds_a_step(config, out / "probe")
    steps = max(20, round(0.95 * minutes * 60 / step_s))  # the rest of the time is validation
    log(f"   This machine makes {config.batch_size * config.context / step_s:,.0f} bytes a second.")
    config = replace(
        config,
        steps=steps,
        warmup=min(50, steps // 10),
        log_every=max(1, steps // 200),
        valid_every=max(1, steps // 8),
        checkpoint_every=max(1, steps // 8),
    )
    plan = {"train": to_dict(config), "minutes": minutes, "before": before}
    write_json(file, plan)
    return plan


def seconds_a_step(config: TrainConfig, folder: Path) -> float:
    """Train a few steps in `folder`, which is removed; return the mean time of the later ones."""
    ticks: list[float] = []
    log("   Measuring the speed of this machine ...")
    shutil.rmtree(folder, ignore_errors=True)
    probe = replace(config, out=str(folder), steps=PROBE_STEPS)
    try:
        result = train(probe, progress=lambda *_, **__: ticks.append(time.monotonic()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if result.signal is not None:
        raise KeyboardInterrupt
    return (ticks[-1] - ticks[PROBE_WARM - 1]) / (PROBE_STEPS - PROBE_WARM)


def score(model: LanguageModel, data: PreparedData) -> float:
    """Return bits per byte of the test split, the state carried through each document."""
    with bar("evaluating", "bytes") as show:
        result = evaluate(model, data.split("test"), limit_tokens=SCORED_TOKENS, progress=show)
    return result.to_json()["bits_per_byte"]
