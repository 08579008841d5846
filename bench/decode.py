"""Decoding: time a token and memory at 100 ... 100,000 tokens, Meta-State beside a Transformer.

    python bench/decode.py [--size tiny] [--max-tokens 100000] [--transformer-tokens N] [--prefill]

Both models have equal non-embedding parameters. Meta-State really decodes every token (with
--prefill it does not). The Transformer's cache is filled by chunked prefill, which gives the same
cache, then single steps are timed; it may stop earlier, and the table then says so. Both step as
`generate` does, through `make_decoder`, and must first give the same logits so as in one pass;
otherwise there are no figures.

The median counts what other programs on the machine take; `quiet`, the fastest tenth, hardly does,
and the ratios to the first mark are made of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import deque

import torch

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.model.decode import Decoder, make_decoder
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from metastate.model.state import ModelState

MARKS = (100, 1_000, 10_000, 100_000)
TIMED = 128  # steps around a mark that its figures come from
PREFILL = 1024


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(architecture: str, size: str, vocab_size: int) -> LanguageModel:
    """Build a preset with random weights large enough that the state matters."""
    torch.manual_seed(0)
    model = LanguageModel(preset(f"{architecture}-{size}", vocab_size=vocab_size)).eval()
    for p in model.parameters():
        if p.dim() == 2 and not p.any():  # an output that starts at zero would hide its layer
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def stepwise_error(model: LanguageModel, length: int = 192) -> float:
    """Return max |logits step by step - logits in one pass|, relative to the largest logit."""
    tokens = torch.randint(model.config.vocab_size, (1, length))
    whole, _ = model(tokens)
    decoder = make_decoder(model, 1)
    steps = torch.cat([decoder.step([t]).clone() for t in tokens[0].tolist()])
    return float((steps - whole[0]).abs().max() / whole.abs().max())


def step(decoder: Decoder, token: int) -> tuple[torch.Tensor, float]:
    """Run one token; return its logits and the seconds."""
    started = time.perf_counter()
    logits = decoder.step([token])[0]
    return logits, time.perf_counter() - started


def row(model: LanguageModel, mark: int, seconds: list[float], state: ModelState) -> dict:
    """Return the figures of one mark."""
    gc.collect()
    return {
        "architecture": model.config.architecture,
        "tokens": mark,
        "ms_per_token": 1e3 * statistics.median(seconds),
        "quiet_ms_per_token": 1e3 * statistics.quantiles(seconds, n=10)[0],
        "state_bytes": state.num_bytes,
        "resident_mib": resident_bytes() / 2**20,
    }


def decode(model: LanguageModel, marks: list[int]) -> list[dict]:
    """Decode token by token up to the last mark; the figure of a mark is of the steps around it."""
    decoder, token = make_decoder(model, 1), 0
    rows, recent = [], deque[float](maxlen=TIMED)
    for t in range(1, marks[-1] + TIMED // 2 + 1):
        logits, seconds = step(decoder, token)
        token = int(logits.argmax())
        recent.append(seconds)
        if t - TIMED // 2 in marks:
            rows.append(row(model, t - TIMED // 2, list(recent), decoder.get(0)))
    return rows


def decode_after_prefill(model: LanguageModel, marks: list[int]) -> list[dict]:
    """Fill the state by chunked prefill up to each mark, then time single steps."""
    state, rows, consumed = model.init_state(1), [], 0
    for mark in marks:
        while consumed < mark - TIMED // 2:
            n = min(PREFILL, mark - TIMED // 2 - consumed)
            tokens = torch.randint(model.config.vocab_size, (1, n))
            _, state, _ = model.features(tokens, state)  # no logits: nobody reads them
            consumed += n
        decoder = make_decoder(model, 1)
        decoder.put(0, state)
        tokens = torch.randint(model.config.vocab_size, (TIMED,)).tolist()
        seconds = [step(decoder, token)[1] for token in tokens]
        state = decoder.get(0)
        consumed += TIMED
        rows.append(row(model, mark, seconds, state))
    return rows


@torch.no_grad()
def main() -> None:
    """Check, measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", help="preset size of both models")
    parser.add_argument("--vocab-size", type=positive, default=1024, help="vocabulary of both")
    parser.add_argument(
        "--max-tokens", type=positive, default=100_000, help="Meta-State's last mark"
    )
    parser.add_argument(
        "--transformer-tokens",
        type=positive,
        help="last mark of the Transformer, whose prefill is quadratic (default: as --max-tokens)",
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="prefill Meta-State too between the marks: minutes instead of an hour",
    )
    parser.add_argument("--backend", default="auto", help="of metastate.ops")
    args = parser.parse_args()
    limits = {
        "metastate": args.max_tokens,
        "transformer": args.transformer_tokens or args.max_tokens,
    }
    rows, parameters = [], {}
    for architecture, limit in limits.items():
        marks = [m for m in MARKS if m <= limit]
        if not marks:
            sys.exit(f"--max-tokens must be at least {MARKS[0]}")
        model = make(architecture, args.size, args.vocab_size)
        model.backend = args.backend
        error = stepwise_error(model)
        print(f"{architecture}: stepwise against parallel logits, relative error {error:.1e}")
        if not error < 1e-3:
            sys.exit("the two forms disagree: no figures")
        parameters[architecture] = model.count_parameters()["non_embedding"]
        really = architecture == "metastate" and not args.prefill
        measure = decode if really else decode_after_prefill
        rows += measure(model, marks)
        del model
    print(f"\nnon-embedding parameters {parameters}, {torch.get_num_threads()} threads, float32")
    print(
        f"{'':<12}{'token':>9}{'ms/token':>10}{'quiet':>9}{'of first':>10}{'state KiB':>12}"
        f"{'resident MiB':>14}{'of first':>10}"
    )
    first: dict[str, dict] = {}
    for r in rows:
        base = first.setdefault(r["architecture"], r)
        r["time_ratio"] = r["quiet_ms_per_token"] / base["quiet_ms_per_token"]
        r["resident_ratio"] = r["resident_mib"] / base["resident_mib"]
        print(
            f"{r['architecture']:<12}{r['tokens']:>9,}{r['ms_per_token']:>10.3f}"
            f"{r['quiet_ms_per_token']:>9.3f}{r['time_ratio']:>10.2f}"
            f"{r['state_bytes'] / 1024:>12,.0f}"
            f"{r['resident_mib']:>14.1f}{r['resident_ratio']:>10.3f}"
        )
    if limits["transformer"] < limits["metastate"]:
        print(f"the Transformer was stopped at {limits['transformer']:,} tokens: it gets too slow")
    print(
        json.dumps({"bench": "decode", "size": args.size, "parameters": parameters, "rows": rows})
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
