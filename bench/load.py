"""Load: many clients at once against a served model, beside one client alone.

    python bench/load.py CKPT [--clients 64] [--requests 256] [--tokens 32] [--slots 16]

Starts `metastate serve CKPT` in a process of its own. First one client asks for every prompt alone;
then all clients ask for the same prompts at once, streamed and whole in turn. No figures unless
every greedy answer of the crowd equals the one it had alone and nothing failed but by 429, which
clients answer by waiting and asking again. The clients' own work shares the machine, so a token's
processor time in the server says more of it than the throughput does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

PATIENCE_S = 0.05  # before a client that got 429 asks again


@dataclass
class Answer:
    """One request: its text and tokens, and seconds until the first text and the last."""

    text: str
    tokens: int
    first_s: float
    total_s: float


@contextlib.contextmanager
def serving(checkpoint: str, slots: int) -> Iterator[tuple[str, int]]:
    """Yield the url and the process of a server of `checkpoint`; it must leave with code 0."""
    command = [sys.executable, "-m", "metastate", "serve", checkpoint, "--port", "0"]
    command += ["--max-slots", str(slots), "--max-concurrent", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said, found = "", None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise SystemExit(said)  # it ended, and has said why
            said, found = said + line, re.search(r"^serving .* at (http://\S+)", line)
        yield found[1], process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(30):
            raise SystemExit(f"the server left with {process.returncode}")
    finally:
        process.kill()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def prompt(index: int) -> str:
    """Return a prompt that no other request has."""
    return f"Case {index:04d}. " + "The court held that the " * (index % 5)


async def ask(
    client: httpx.AsyncClient, index: int, tokens: int, stream: bool, refused: Counter[int]
) -> Answer:
    """Ask for one text, greedily; wait and ask again after 429."""
    body = {"prompt": prompt(index), "max_tokens": tokens, "temperature": 0, "stream": stream}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    started = time.perf_counter()
    while True:
        text, first_s, usage = "", 0.0, None
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                refused[429] += 1
                await answer.aread()
            elif answer.status_code != 200:
                raise SystemExit(f"{answer.status_code}: {(await answer.aread()).decode()}")
            elif not stream:
                whole = json.loads(await answer.aread())
                text, usage = whole["choices"][0]["text"], whole["usage"]
            else:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise SystemExit(f"a stream broke off: {event['error']}")
                        for choice in event["choices"]:
                            text += choice["text"]
                        usage = event["usage"] or usage
                        first_s = first_s or time.perf_counter() - started
        if usage is not None:
            total_s = time.perf_counter() - started
            return Answer(text, usage["completion_tokens"], first_s or total_s, total_s)
        await asyncio.sleep(PATIENCE_S)


async def run(url: str, clients: int, args: argparse.Namespace) -> tuple[list, float, int]:
    """Let `clients` share the requests; return the answers, the seconds, and how many 429."""
    refused: Counter[int] = Counter()
    left = iter(range(args.requests))
    answers: list[Answer | None] = [None] * args.requests
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def work() -> None:
            for index in left:
                answers[index] = await ask(client, index, args.tokens, index % 2 == 0, refused)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return answers, time.perf_counter() - started, refused[429]


def figures(
    clients: int, answers: list[Answer], seconds: float, refused: int, cpu_s: float
) -> dict:
    """Return one row of the table."""

    def percentile(values: list[float], q: float) -> float:
        return sorted(values)[min(len(values) - 1, int(q * len(values)))]

    totals, tokens = [a.total_s for a in answers], sum(a.tokens for a in answers)
    firsts = [a.first_s for a in answers[::2]]  # streamed ones
    return {
        "clients": clients,
        "requests": len(answers),
        "tokens_per_s": tokens / seconds,
        "cpu_us_per_token": 1e6 * cpu_s / tokens,
        "requests_per_s": len(answers) / seconds,
        "latency_p50_s": percentile(totals, 0.5),
        "latency_p90_s": percentile(totals, 0.9),
        "latency_p99_s": percentile(totals, 0.99),
        "first_text_p50_s": percentile(firsts, 0.5),
        "first_text_p99_s": percentile(firsts, 0.99),
        "refused_429": refused,
    }


def main() -> None:
    """Measure, check, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT")
    for flag, default, what in (
        ("--clients", 64, "clients at once"),
        ("--requests", 256, "requests of all clients together, and of the one alone"),
        ("--tokens", 32, "tokens of an answer"),
        ("--slots", 16, "requests that the server decodes together"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=what)
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", "src")
    rows, texts = [], []
    with serving(args.checkpoint, args.slots) as (url, pid):
        for clients in (1, args.clients):
            before = cpu_seconds(pid)
            answers, seconds, refused = asyncio.run(run(url, clients, args))
            texts.append([a.text for a in answers])
            cpu_s = cpu_seconds(pid) - before
            rows.append(figures(clients, answers, seconds, refused, cpu_s))
    wrong = [i for i, pair in enumerate(zip(*texts, strict=True)) if len(set(pair)) > 1]
    if wrong:
        raise SystemExit(
            f"{len(wrong)} answers differ from those alone, as that to {prompt(wrong[0])!r}: "
            f"alone {texts[0][wrong[0]]!r}, in the crowd {texts[1][wrong[0]]!r}"
        )
    names = [n for n in rows[0] if n != "requests"]
    print("  ".join(f"{n:>16}" for n in names))
    for row in rows:
        cells = (format(row[n], ",d" if isinstance(row[n], int) else ".3f") for n in names)
        print("  ".join(f"{cell:>16}" for cell in cells))
    ratio = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    cpu_ratio = rows[0]["cpu_us_per_token"] / rows[1]["cpu_us_per_token"]
    print(
        f"{args.clients} clients get {ratio:.2f} times the tokens a second of one, {cpu_ratio:.2f} "
        "times those of a second of the server's processor time; no text differs"
    )
    result = {"bench": "load", **vars(args), "rows": rows}
    result |= {"throughput_ratio": ratio, "cpu_ratio": cpu_ratio}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
