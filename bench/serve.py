"""Serving: tokens/s of the engine by batch size, beside a Transformer and the `rwkv` package.

    python bench/serve.py [--size 150m] [--batches 1,4,16,64] [--contexts 4096,32768] [--skip-rwkv]

Three comparisons, each only after both sides gave the same logits:

- Meta-State: a step of the engine with n requests against a step with one, float32 and bfloat16
  matrices; state bytes and resident memory over the tokens.
- A Transformer of equal non-embedding parameters, one request at each context. Its cache is filled
  with random keys and values, since reading such a prompt would take hours.
- RWKV-7 of 12 x 768 with vocabulary 65,536, the same random weights here and in the official
  package (`pip install rwkv`, strategy "cpu fp32", its JIT on), which gets them as a `.pth` file.
  The package runs in a process of its own, as its users run it, ours with the allocator's settings
  of `metastate generate` (which would serve the package as well, in part). Sides take turns; a
  figure is the fastest tenth of the turns, which other programs on the machine hardly touch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import torch

from metastate.cli import exit_code
from metastate.cli.options import positive
from metastate.config import ModelConfig
from metastate.convert import blinkdl
from metastate.data.tokenizer import ByteTokenizer
from metastate.infer.engine import Engine
from metastate.infer.generate import inference
from metastate.infer.sampling import SamplingConfig
from metastate.layers.attention import AttentionState
from metastate.layers.common import MATRIX
from metastate.model.decode import Decoder, NativeDecoder, make_decoder, store_bfloat16
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from metastate.model.state import ModelState
from metastate.train.memory import keep_freed_memory

GREEDY = SamplingConfig(temperature=0)


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(config: ModelConfig) -> LanguageModel:
    """Build a model with random weights, large enough that everything matters."""
    torch.manual_seed(0)
    with torch.device("meta"):  # the real first values take longer than the measurement
        model = LanguageModel(config).eval()
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        if p.dim() == 1 and name.endswith(".weight"):
            torch.nn.init.ones_(p)  # of a norm
        elif p.dim() == 1 or name.endswith((".mu", ".r_k")):
            torch.nn.init.uniform_(p, -0.5, 0.5)
        else:
            torch.nn.init.normal_(p, std=max(p.shape[1], 100) ** -0.5)
    return model


def in_bfloat16(model: LanguageModel) -> LanguageModel:
    """Return a copy whose matrices are bfloat16; the rest is shared."""
    with torch.device("meta"):
        copy = LanguageModel(model.config).eval()
    copy.load_state_dict(model.state_dict(), assign=True)
    store_bfloat16(copy)
    return copy


def rounded(half: LanguageModel) -> LanguageModel:
    """Return a float32 copy of a bfloat16 model, its low-rank factors rounded as decoding does."""
    with torch.device("meta"):
        copy = LanguageModel(half.config).eval()
    state = half.state_dict().items()
    factors = (".A", ".B")
    copy.load_state_dict(
        {k: x.bfloat16().float() if k.endswith(factors) else x.float() for k, x in state},
        assign=True,
    )
    return copy


def quiet(seconds: list[float]) -> float:
    """Return the fastest tenth of the timings."""
    return statistics.quantiles(seconds, n=10, method="inclusive")[0]


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time the sides in turns; return the quiet seconds of each.

    A side that returns a float has timed itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, side in sides.items():
            time.sleep(0.02)  # the threads of the side before have stopped looking for work
            started = time.perf_counter()
            own = side()
            taken = own if isinstance(own, float) else time.perf_counter() - started
            if i >= 2:
                seconds[name].append(taken)
    figures = {name: quiet(values) for name, values in seconds.items()}
    print(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in figures.items()))
    return figures


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())


def check(model: LanguageModel, half: LanguageModel, length: int = 24) -> dict[str, float]:
    """Compare decoding with the parallel form, in both dtypes, and rows with each other."""
    tokens = torch.randint(model.config.vocab_size, (4, length))
    errors = {}
    for name, own, whole in (("float32", model, model), ("bfloat16", half, rounded(half))):
        expected, _ = whole(tokens)
        batch, alone = make_decoder(own, 4), make_decoder(own, 1)
        if not isinstance(batch, NativeDecoder):
            sys.exit("the native decoder cannot run here (Numba on a CPU): no figures")
        errors[name] = 0.0
        for t in range(length):
            logits = batch.step(tokens[:, t].tolist())
            errors[name] = max(errors[name], relative(logits, expected[:, t]))
            if not torch.equal(alone.step([int(tokens[2, t])])[0], logits[2]):
                sys.exit("a row's logits depend on its batch: no figures")
    print(f"{model.config.architecture}: decoding against one pass {errors}, rows equal bit by bit")
    if not max(errors.values()) < 1e-3:
        sys.exit("the forms disagree: no figures")
    return errors


def running(model: LanguageModel, n: int) -> Engine:
    """Return an engine in which n requests have begun to write and will never end."""
    model.head.weight.data[0] = 0  # never the likeliest: greedy decoding finds no end
    engine = Engine(model, ByteTokenizer(), max_slots=n, max_waiting=n)
    for i in range(n):
        engine.submit(f"request {i}", sampling=GREEDY, max_tokens=10**9)
    while engine.totals["generated_tokens"] == 0 or engine.num_waiting:
        engine.step()
    engine.step()
    return engine


def after_context(model: LanguageModel, context: int) -> Decoder:
    """Return a Transformer's decoder with a full cache."""
    config = model.config
    shape = (1, config.num_heads, context, config.attention_size // config.num_heads)
    layers = (AttentionState(torch.randn(shape), torch.randn(shape)) for _ in model.blocks)
    decoder = make_decoder(model, 1)
    decoder.put(0, ModelState(tuple(layers), context))
    return decoder


def read(model: LanguageModel, decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Read a prompt as generation does, all but the last token in one piece; return the logits."""
    with inference(model):
        decoder.put(0, model.read(torch.tensor([tokens[:-1]])))
        return decoder.step(tokens[-1:])[0]


def products_alone(model: LanguageModel, length: int) -> Callable[[], None]:
    """Return what multiplies `length` tokens by the blocks' large matrices and does nothing else.

    The low-rank factors and what `read` leaves out are left out, so it cannot be faster than this.
    """
    groups, last = model.optimizer_groups(), f"blocks.{len(model.blocks) - 1}.channel_mix."
    matrices = [
        w.detach()
        for name, w in model.named_parameters()
        if name.startswith("blocks.") and groups[name] == MATRIX and not name.startswith(last)
    ]
    pairs = [(torch.randn(length, w.shape[1]).to(w.dtype), w.T) for w in matrices]

    def run() -> None:
        with torch.inference_mode():
            for x, w in pairs:
                x @ w

    return run


def run_package(pipe: Connection, model: str) -> None:
    """Be the package: for every list of tokens answer with (seconds, logits) of going on with it.

    A prompt begins anew; single tokens follow the last prompt.
    """
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
        package, state = RWKV(model, "cpu fp32"), None
        while tokens := pipe.recv():
            state = state if len(tokens) == 1 else None
            started = time.perf_counter()
            logits, state = package.forward(list(tokens), state)
            pipe.send((time.perf_counter() - started, logits.numpy()))


def rwkv_package(rounds: int, prompt: int) -> dict | None:
    """Compare with the official package on the same weights; None where it is not installed."""
    if importlib.util.find_spec("rwkv") is None:
        return None
    ranks = {"decay_rank": 64, "icl_rate_rank": 64, "value_rank": 32, "gate_rank": 128}
    sizes = {"vocab_size": 65536, "hidden_size": 768, "num_layers": 12, "num_heads": 12}
    model = make(ModelConfig(architecture="rwkv7", **sizes, **ranks))
    half = in_bfloat16(model)
    check(model, half)
    with tempfile.TemporaryDirectory() as folder:
        blinkdl.write(model, f"{folder}/m.pth")
        pipe, end = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        spawn.Process(target=run_package, args=(end, f"{folder}/m"), daemon=True).start()
        end.close()
        result = against_package(model, half, pipe, rounds, prompt)
        pipe.send([])  # the end
        return result


def against_package(
    model: LanguageModel, half: LanguageModel, pipe: Connection, rounds: int, prompt: int
) -> dict:
    """Compare logits, then times."""

    def theirs(tokens: list[int]) -> tuple[float, torch.Tensor]:
        pipe.send(tokens)
        seconds, logits = pipe.recv()
        return seconds, torch.from_numpy(logits)

    tokens = torch.randint(65536, (prompt,)).tolist()
    ours, half_decoder = make_decoder(model, 1), make_decoder(half, 1)
    read(half, half_decoder, tokens)
    errors = [relative(read(model, ours, tokens), theirs(tokens)[1])]
    for token in tokens[:8]:
        errors.append(relative(ours.step([token])[0], theirs([token])[1]))
    print(f"against the rwkv package: logits differ by {max(errors):.1e}")
    if not max(errors) < 1e-4:
        sys.exit("ours and the package's logits disagree: no figures")
    decode = in_turns(
        {
            "rwkv": lambda: theirs([5])[0],
            "float32": lambda: ours.step([5]),
            "bfloat16": lambda: half_decoder.step([5]),
        },
        rounds,
    )
    prefill = in_turns(
        {
            "rwkv": lambda: theirs(tokens)[0],
            "float32": lambda: read(model, ours, tokens),
            "bfloat16": lambda: read(half, half_decoder, tokens),
            "float32, products alone": products_alone(model, prompt),
            "bfloat16, products alone": products_alone(half, prompt),
        },
        max(3, rounds // 8),
    )
    return {"decode_s": decode, "prefill_s": prefill, "prompt": prompt, "error": max(errors)}


def meta_state(args: argparse.Namespace) -> dict:
    """Measure Meta-State by batch size and the Transformer at each context, all in turns."""
    model, other = make(preset(f"metastate-{args.size}")), make(preset(f"transformer-{args.size}"))
    half = in_bfloat16(model)
    errors = check(model, half)
    engines = {
        (name, n): running(own, n)
        for name, own in (("float32", model), ("bfloat16", half))
        for n in args.batches
    }
    decoders = {context: after_context(other, context) for context in args.contexts}
    sides: dict[str, Callable[[], object]] = {
        f"{name} x {n}": engine.step for (name, n), engine in engines.items()
    }
    for context, decoder in decoders.items():
        sides[f"Transformer {context}"] = partial(decoder.step, [5])
    before = resident_bytes()
    seconds = in_turns(sides, args.rounds)
    rows = []
    for (name, n), engine in engines.items():
        if engine.num_running != n:
            sys.exit(f"{n} requests were to run, {engine.num_running} do: no figures")
        taken, alone = seconds[f"{name} x {n}"], seconds[f"{name} x {args.batches[0]}"]
        gain = n / taken * alone / args.batches[0]
        rows.append({"matrices": name, "batch": n, "ms": 1e3 * taken, "gain": gain})
    grown = resident_bytes()
    state_bytes = [model.init_state(1).num_bytes]
    single = engines["float32", args.batches[0]]
    for _ in range(args.more):
        single.step()
    state_bytes.append(single._running[0].draft.state.num_bytes)
    print(f"\n{'matrices':<10}{'batch':>6}{'ms/step':>10}{'tokens/s':>10}{'gain':>8}")
    for row in rows:
        rate = 1e3 * row["batch"] / row["ms"]
        print(
            f"{row['matrices']:<10}{row['batch']:>6}{row['ms']:>10.1f}{rate:>10.1f}{row['gain']:>8.2f}"
        )
    contexts = []
    for context, decoder in decoders.items():
        taken, cache = seconds[f"Transformer {context}"], decoder.get(0).num_bytes
        ratio = taken / seconds[f"float32 x {args.batches[0]}"]
        contexts.append({"context": context, "ms": 1e3 * taken, "bytes": cache, "ratio": ratio})
        print(f"Transformer at {context:,}: {1e3 * taken:.1f} ms, cache {cache / 2**20:,.0f} MiB")
    memory = {
        "state_bytes": state_bytes,
        "resident_mib": [before / 2**20, grown / 2**20, resident_bytes() / 2**20],
    }
    print(
        f"state after 0 and {args.more} more tokens {state_bytes}; resident MiB before, after the"
    )
    print(f"turns and after those {[round(x, 1) for x in memory['resident_mib']]}")
    return {"rows": rows, "transformer": contexts, "errors": errors, **memory}


@torch.no_grad()
def main() -> None:
    """Check, measure, print tables, ratios and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [positive(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--size", default="150m", help="preset size of Meta-State and Transformer")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=numbers, default=[4096, 32768])
    parser.add_argument("--rounds", type=positive, default=20, help="timed steps a figure")
    parser.add_argument("--more", type=positive, default=200, help="tokens between looks at memory")
    parser.add_argument("--prompt", type=positive, default=256, help="tokens of the rwkv prefill")
    parser.add_argument("--skip-rwkv", action="store_true")
    parser.add_argument("--only-rwkv", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    result: dict = {"bench": "serve", "size": args.size, "threads": torch.get_num_threads()}
    ratios: dict[str, float] = {}
    if not args.only_rwkv:
        result["metastate"] = meta_state(args)
        for row in result["metastate"]["rows"]:
            if row["batch"] == max(args.batches):
                name = f"{row['batch']} requests against one at a time, {row['matrices']}"
                ratios[name] = row["gain"]
        for row in result["metastate"]["transformer"]:
            name = f"one token against the Transformer's at context {row['context']:,}"
            ratios[name] = row["ratio"]
    rwkv = None if args.skip_rwkv else rwkv_package(args.rounds, args.prompt)
    if rwkv is not None:
        result["rwkv"], seconds = rwkv, rwkv["decode_s"]
        ratios["decoding in float32 against the rwkv package (wanted 1.0)"] = (
            seconds["rwkv"] / seconds["float32"]
        )
        ratios["decoding with bfloat16 matrices against it (wanted 1.6)"] = (
            seconds["rwkv"] / seconds["bfloat16"]
        )
        prefill = rwkv["prefill_s"]
        for name in ("float32", "bfloat16"):
            for what, wanted in ((name, "wanted 5"), (f"{name}, products alone", "the most")):
                ratios[f"reading {args.prompt} tokens against it, {what} ({wanted})"] = (
                    prefill["rwkv"] / prefill[what]
                )
    print()
    for name, ratio in ratios.items():
        print(f"ratio {ratio:6.2f}  {name}")
    print(json.dumps(result | {"ratios": ratios}))


if __name__ == "__main__":
    sys.exit(exit_code(main))
