"""What a person sees while a command works."""

import io
import json
import logging
import math
import sys

import pytest

from metastate.cli import progress


def test_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.bar("train", "steps") as show:
        show(1, 3, loss="2.5")
        show(2, 3, loss="2.2")
        show(3, 3, loss="2.0")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3
    # There is no speed before the second call, so nothing is said of the time left.
    assert lines[0].startswith("train: 1/3 steps") and lines[0].endswith(" s, loss 2.5")
    assert lines[1].endswith("left, loss 2.2")
    assert "3/3" in lines[2] and " 0 s left" in lines[2]


def test_the_end_is_said_once(capsys):
    with progress.bar("compare", "GFLOP") as show:
        for _ in range(5):
            show(12, 12)
    assert capsys.readouterr().err.count("compare: ") == 1


def test_quiet_between_lines_but_not_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", math.inf)
    with progress.bar("eval", "tokens") as show:
        show(10, 20)
        show(20, 20)
    assert capsys.readouterr().err.count("eval: ") == 1


@pytest.mark.parametrize(
    ("what", "unit", "done", "total", "seen"),
    [
        ("train", "steps", 5, 10, "5/10"),
        ("prepare", "bytes", 1_500_000, 2_000_000, "1.50M/2.00M"),  # in larger units
    ],
)
def test_a_bar_on_a_terminal(monkeypatch, what, unit, done, total, seen):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.bar(what, unit) as show:
        show(done, total, loss="2.5")
        show(total, total, loss="2.0")
    assert what in screen.getvalue() and seen in screen.getvalue()


def test_lines_where_the_total_is_not_known(capsys, monkeypatch):
    clock = iter([0.0, 11.0, 15.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("prepare", "bytes") as show:
        for done in (1000, 2000, 3000):
            show(done, None)
    said = ["prepare: 1,000 bytes in 11 s", "prepare: 3,000 bytes in 22 s"]
    assert capsys.readouterr().err.splitlines() == said


def test_a_bar_of_a_resumed_run_does_not_count_what_was_done_before(monkeypatch):
    made = []

    class Bar:
        def __init__(self, **settings):
            made.append(settings)
            self.n = settings["initial"]

        def update(self, more):
            self.n += more

        set_postfix = close = lambda self, *_, **__: None

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.bar("train", "steps") as show:
        show(90, 100)
        show(95, 100)
    assert [(s["initial"], s["total"]) for s in made] == [(90, 100)]


def test_a_line_every_ten_seconds_and_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 11.0, 15.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("train", "steps") as show:
        show(50, 100)  # a resumed run had these; they are not its speed
        show(52, 100)
        show(60, 100)
    said = ["train: 50/100 steps in 11 s", "train: 60/100 steps in 22 s, 44 s left"]
    assert capsys.readouterr().err.splitlines() == said


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError("input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    progress.log("hello")


def test_json_holds_no_number_that_json_cannot_say(capsys):
    progress.print_json({"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf, "d": 3}})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": [None, 1.5, [None]], "b": {"c": None, "d": 3}}


def test_a_first_run_is_told_that_it_waits_for_the_compiler(capsys, monkeypatch):
    event = pytest.importorskip("numba.core.event")
    from metastate.ops.jit import Telling

    logger = logging.getLogger("metastate.ops")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    telling = Telling()
    for rank in ("1", "0", "0"):
        monkeypatch.setenv("RANK", rank)
        progress.hear_kernels()
        assert len(logger.handlers) == (rank == "0")
    for _ in range(2):
        telling.notify(event.Event("numba:compile", event.EventStatus.START, {}))
        telling.notify(event.Event("numba:compile", event.EventStatus.END, {}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiling native kernels for this processor")
