"""bench/gpu.py and bench/fla_ready.py, on a CPU: no figure of theirs means anything here."""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

import fla_stand_in
from metastate import ops

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """bench/ as a script there finds it, and fla's stand-in."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.delitem(sys.modules, "fla_ready", raising=False)
    fla_stand_in.install(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sharing work this small takes longer than doing it
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def report(bench):
    """Make a report of two tables, begun so many seconds ago, of one minute."""
    make = runpy.run_path(str(BENCH / "gpu.py"))["Report"]

    def made(path=None, ago=0.0):
        args = argparse.Namespace(out=path, minutes=1, tables=["kernels", "decoding"])
        return make(args, time.monotonic() - ago)

    return made


def test_every_row_is_measured_and_kept(bench, monkeypatch, tmp_path, capsys):
    right = [{"name": n, "runs": True, "right": True} for n in ("chunked", "fla", "cpu")]
    found = {"ok": True, "verdict": "right", "backends": right}
    monkeypatch.setattr("metastate.eval.doctor.diagnose", lambda devices: found)
    monkeypatch.setattr(ops, "NUMBA_FOUND", False)  # whose kernels take long to compile
    out = tmp_path / "rows.jsonl"
    argv = ["gpu.py", "--dry", "--device", "cpu", "--minutes", "60", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCH / "gpu.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip().splitlines()
    assert left.value.code == 0, printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == json.loads(printed[-1])["rows"]
    assert not [row for row in rows if "left_out" in row]
    tables = {name: [r for r in rows if r["table"] == name] for name in {r["table"] for r in rows}}
    assert {name: len(found) for name, found in tables.items()} == {
        **{"ceilings": 2, "kernels": 3 * 3 + 2},
        **{"training": 2 * 2, "decoding": 2 + 3 * 2},
    }
    sides = {r["backend"] for r in tables["kernels"] if r["operation"].startswith("layer: ")}
    assert sides == {"chunked", "fla", "fla, bare calls", "fla, one bare call"}
    figures = {"kernels": "times own", "training": "MFU", "decoding": "of copy"}
    for name, column in figures.items():
        assert all(r[column] > 0 for r in tables[name] if r.get("way") != "checked")
    text = [line for line in printed if line.startswith("| layer")]
    assert len(text) == 5 and all(line.count("|") == 8 for line in text)


def test_a_row_that_fails_or_has_no_time_leaves_the_others(report, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    made = report(path, ago=20)  # 40 seconds are left, 20 of them for the first table
    for name, given in (("kernels", "first"), ("decoding", "second")):
        made.table(name, "about", {"side": "{}", "ms": "{:.1f}"})
        assert 19 < made.left() < (21 if name == "kernels" else 41)

        def wrong(given=given):
            raise RuntimeError(f"{given} is wrong\nand more")

        made.row({"side": given}, wrong)
        made.row({"side": given}, lambda: {"ms": 3.0})
    made = report(path, ago=61)
    made.table("decoding", "about", {"side": "{}", "ms": "{:.1f}"})
    made.row({"side": "third"}, lambda: pytest.fail("there is no time"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("ms") for row in rows] == [None, 3.0, None, 3.0, None]
    assert rows[0]["left_out"] == "FAILED: RuntimeError: first is wrong"
    assert rows[-1]["left_out"] == "left out: --minutes 1" and not made.failed
    assert "| third | left out: --minutes 1 |" in capsys.readouterr().out


def test_a_row_that_would_outlast_the_time_is_left_out(report):
    made = report(ago=59)
    made.table("decoding", "about", {"side": "{}", "ms": "{:.1f}"})
    args = argparse.Namespace(device="cpu", rounds=50, dry=False)
    clock = type(made).row.__globals__["Bench"](args, made)
    calls = []
    row = made.row({}, lambda: {"ms": clock.seconds(lambda: calls.append(time.sleep(0.03)))})
    assert row["left_out"] == "left out: --minutes 1" and len(calls) <= 2


def test_fla_s_forms_are_compiled_by_shares(bench, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    from triton.runtime.autotuner import Autotuner, Config

    import fla_ready

    seen = []

    class Kernel:
        def run(self, *given, num_warps, grid, warmup, **options):
            seen.append((given, num_warps, warmup))
            if num_warps == 2:
                raise RuntimeError("too many resources")

    tuner = object.__new__(Autotuner)
    tuner.arg_names, tuner.fn = ["x"], Kernel()
    tuner.configs = [Config({}, num_warps=n) for n in range(1, 8)]
    tuner.early_config_prune = tuner.perf_model = None
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)  # put back afterwards
    monkeypatch.setattr(fla_ready, "all_calls", lambda shape, device: tuner[1,]("x"))
    for share in range(3):
        fla_ready.compile_share(share, 3, (1, 2, 1, 16), "cpu")
    assert sorted(seen) == [(("x",), n, True) for n in range(1, 8)]


def test_fla_s_bare_calls_have_gradients(bench):
    import fla_ready

    fla_ready.all_calls((1, 3, 1, 16), torch.device("cpu"))
    x = fla_ready.as_fla_wants(fla_ready.draw((1, 3, 1, 16), "cpu"))
    sum(y.sum() for y in fla_ready.bare_calls(x, 3)).backward()
    assert all(t.grad.any() for t in x.values())


def test_fla_that_fails_is_said(bench, monkeypatch, capsys):
    import fla_ready

    monkeypatch.setattr(fla_ready, "all_calls", lambda *_: 1 / 0)
    fla_ready.choose((1, 3, 1, 16), torch.device("cpu"))
    assert "fla failed: ZeroDivisionError" in capsys.readouterr().out


def test_fla_is_made_ready_by_every_process(bench, monkeypatch, capsys):
    import fla_ready

    class Here:
        """A context whose processes are calls."""

        def Process(self, target, args):
            self.start, self.join, self.exitcode = (lambda: target(*args)), lambda: None, 0
            return self

    shares = []
    monkeypatch.setattr(fla_ready.multiprocessing, "get_context", lambda kind: Here())
    monkeypatch.setattr(fla_ready, "compile_share", lambda *given: shares.append(given))
    monkeypatch.setattr(fla_ready.importlib.util, "find_spec", lambda name: object())
    options = ["--device", "cpu", "--layer", "1", "3", "--head-size", "16", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["fla_ready.py", *options])
    assert fla_ready.main() == 0
    assert shares == [(0, 1, (1, 3, 12, 16), "cpu")]
    assert "0 processes failed" in capsys.readouterr().out
