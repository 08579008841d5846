"""`metastate tune-state`, and what loads its files: generate, eval, info."""

import json
import signal
import subprocess
import sys
import time

import pytest

from metastate.cli import main, training
from metastate.train.tune import TuneResult

FEW = ["--steps", "4", "--batch-size", "2", "--context", "16", "--valid-tokens", "300"]


@pytest.fixture(scope="module")
def tuned(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "a.state"
    argv = ["tune-state", checkpoint, "--data", data, "--out", out, *FEW]
    assert main([str(a) for a in argv]) == 0
    return out


def test_json_says_what_was_done(checkpoint, data, tmp_path, run):
    argv = ["tune-state", checkpoint, "--data", data, "--out", tmp_path / "s", *FEW]
    report = json.loads(run(*argv, "--what", "state", "--json"))
    assert report["step"] == 4 and report["tokens"] == 128 and report["best_step"] == 4
    assert report["file_bytes"] == (tmp_path / "s").stat().st_size
    assert report["before"] > 0 and report["best_loss"] > 0


@pytest.mark.parametrize(("after", "said"), [(1.5, False), (2.0, True), (2.5, True)])
def test_a_state_that_does_not_help_is_said(
    checkpoint, data, tmp_path, monkeypatch, capsys, after, said
):
    result = {"step": 4, "tokens": 9, "loss": 1.0, "before": 2.0, "best_loss": after}
    result |= {"best_step": 4, "file_bytes": 9, "interrupted": None, "signal": None}
    result = TuneResult(out=tmp_path, **result)
    monkeypatch.setattr(training, "tune", lambda *_, **__: result)
    argv = ["tune-state", checkpoint, "--data", data, "--out", tmp_path / "s"]
    assert main([str(a) for a in argv]) == 0
    assert ("does not help" in capsys.readouterr().err) is said


def test_eval_starts_from_it(checkpoint, data, tuned, run):
    argv = ["eval", checkpoint, "--data", data, "--context", "16", "--json"]
    plain, with_state = (json.loads(run(*argv, *more)) for more in ([], ["--state", tuned]))
    assert with_state["state"] == str(tuned) and plain["state"] is None
    for a, b in ((plain, with_state), (plain["windowed"], with_state["windowed"])):
        assert a["tokens"] == b["tokens"]
        assert a["nats_per_token"] != b["nats_per_token"]


def test_generate_begins_a_document_from_it(checkpoint, tuned, tmp_path, run):
    for prompt in ("the ", ""):
        argv = ["generate", checkpoint, "--prompt", prompt, "--max-tokens", "5", "--json"]
        argv += ["--seed", "1"]
        report = json.loads(run(*argv, "--state-in", tuned, "--state-out", tmp_path / "s"))
        assert report["tokens"] >= 1
        # the end of document that every document begins with, the prompt; the last one is pending
        info = json.loads(run("info", tmp_path / "s", "--json"))
        assert info["tokens_seen"] == len(prompt) + report["tokens"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_state_fits_its_checkpoint_in_any_number_format(checkpoint, stored, data, tmp_path, run):
    folder, tuned = tmp_path / "c", tmp_path / "s"
    run("convert", checkpoint, "--to", "metastate", "--dtype", stored, "--out", folder)
    run("tune-state", folder, "--data", data, "--out", tuned, *FEW, "--dtype", "bfloat16")
    for made in ("bfloat16", "float32"):
        argv = ["generate", folder, "--max-tokens", "3", "--temperature", "0", "--json"]
        out = tmp_path / f"{made}.state"
        run(*argv, "--state-in", tuned, "--prompt", "a", "--dtype", made, "--state-out", out)
        for asked in ("float32", "bfloat16"):
            assert json.loads(run(*argv, "--state-in", out, "--dtype", asked))["tokens"] == 3


def test_info_of_state_files(checkpoint, tuned, tmp_path, run):
    text = run("info", tuned)
    assert "parameter tokens" in text and "layers.1.token_values" in text and "tuning" in text
    argv = ["generate", checkpoint, "--prompt", "a", "--max-tokens", "2", "--seed", "1"]
    run(*argv, "--state-out", tmp_path / "s")
    info = json.loads(run("info", tmp_path / "s", "--json"))
    assert info["kind"] == "state" and info["architecture"] == "metastate"
    assert info["tensors"]["layers.0.S"] == [1, 2, 8, 8] and len(info["weights"]) == 64


def test_info_refuses_other_files(tmp_path, checkpoint, refused):
    (tmp_path / "x").write_text("no state")
    assert "no whole safetensors file" in refused("info", tmp_path / "x")
    assert "no metastate state" in refused("info", checkpoint / "model.safetensors")


def test_mistakes(checkpoint, data, tuned, tmp_path, refused):
    argv = ["tune-state", checkpoint, "--data", data]
    assert "--out is missing" in refused(*argv)
    out = ["--out", tmp_path / "s"]
    assert "exists already" in refused(*argv, "--out", tuned)
    assert "nothing to go on from" in refused(*argv, *out, "--resume")
    assert "has come to its end" in refused(*argv, "--out", tuned, "--resume")
    assert "parameter_tokens is 0" in refused(*argv, *out, "--parameter-tokens", "0")
    assert "train.steps is 0" in refused(*argv, *out, "--steps", "0")
    assert "not prepared data" in refused("tune-state", checkpoint, "--data", tmp_path, *out)
    assert "state file" in refused("eval", checkpoint, "--data", data, "--state", tmp_path / "no")
    assert not (tmp_path / "s").exists()


def test_ctrl_c_and_resume(checkpoint, data, tmp_path):
    argv = [sys.executable, "-m", "metastate", "tune-state", checkpoint, "--data", data]
    argv += [
        "--out",
        tmp_path / "s",
        *FEW,
        "--json",
        "--steps",
        "100000",
        "--checkpoint-every",
        "5",
    ]
    argv = [str(a) for a in argv]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "s.tuning"
    while not kept.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    report = json.loads(out)
    assert report["interrupted"] == signal.SIGINT and "go on with --resume" in err
    step = str(report["step"] + 1)
    done = subprocess.run(
        [*argv, "--steps", step, "--resume"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == int(step) and not kept.exists()
