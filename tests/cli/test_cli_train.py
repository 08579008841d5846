"""`train` and `demo` on tiny data: what they write, how they resume, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import metastate
from metastate.cli import demo, main, training
from metastate.config import TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import MetaStateError
from metastate.train.trainer import TrainResult

SMALL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}


@pytest.fixture
def settings(tmp_path, data):
    """A config file of a tiny run."""
    path = tmp_path / "run.yaml"
    lines = [f"data: {data}", f"out: {tmp_path / 'run'}", f"model: {json.dumps(SMALL)}"]
    lines += ["steps: 4", "batch_size: 2", "context: 16", "warmup: 1", "log_every: 1"]
    lines += ["valid_every: 2", "checkpoint_every: 2", "valid_tokens: 2048"]
    path.write_text("\n".join(lines))
    return path


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_train_writes_a_run_that_the_other_commands_read(settings, tmp_path, data, run):
    out = tmp_path / "run"
    result = json.loads(run("train", "--config", settings, "--json"))
    assert result["step"] == 4 and result["tokens"] == 4 * 2 * 16
    assert result["interrupted"] is None and result["best_loss"] < 10
    log = read_log(out)
    assert [r["step"] for r in log if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["step"] for r in log if r["kind"] == "valid"] == [2, 4]
    assert set(log[-1]["domains"]) == {"prose", "verse"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for checkpoint in (out, out / "last", out / "best"):
        value = json.loads(run("eval", checkpoint, "--data", data, "--json"))
        assert value["tokens"] > 0
    assert json.loads(run("info", out, "--json"))["config"]["hidden_size"] == 16
    written = json.loads(
        run("generate", out / "best", "--prompt", "a", "--max-tokens", 3, "--json")
    )
    assert written["tokens"] <= 3


def test_resume_needs_only_the_folder_and_goes_on_exactly(settings, tmp_path, run):
    run("train", "--config", settings)
    straight = tmp_path / "run"
    parts = tmp_path / "parts"
    run("train", "--config", settings, "--out", parts, "--schedule", "constant", "--steps", 2)
    whole = tmp_path / "whole"
    run("train", "--config", settings, "--out", whole, "--schedule", "constant")
    run("train", "--resume", "--out", parts, "--steps", 4)
    weights = [(f / "last" / "model.safetensors").read_bytes() for f in (parts, whole, straight)]
    assert weights[0] == weights[1] != weights[2]


def test_it_says_what_is_trained_and_for_how_long(settings, tmp_path, data, capsys):
    def said(*argv):
        assert main(["train", *map(str, argv)]) == 0
        return capsys.readouterr().err

    first = said("--config", settings, "--warmup", 4)
    count = metastate.load(tmp_path / "run").count_parameters()["total"]
    assert f"metastate of width 16 and depth 1: {count:,} parameters" in first
    passes = 4 * 2 * 16 / PreparedData.open(data).split("train").num_tokens
    assert f"steps 1 to 4 of 2 x 16 tokens: 128 tokens in all, {passes:.1%} of the" in first
    assert "the warm-up of 4 steps is not over" in first and "laid anew" not in first
    assert "none left after 4 steps of 2 x 16" in said("--resume", "--out", tmp_path / "run")
    more = said("--resume", "--out", tmp_path / "run", "--steps", 200)
    assert "steps 5 to 200 of" in more and "6400 tokens" in more.replace(",", "")
    assert " times the training text" in more
    assert "the cosine schedule is laid anew over 200 steps in place of 4: a learning" in more


def test_a_run_that_cannot_go_on_says_what_can_be_done(
    settings, tmp_path, data, run, refused, monkeypatch
):
    losses = iter([1.0, 2.0, 3.0])  # the first checkpoint stays the best
    monkeypatch.setattr(
        training, "validation", lambda config: lambda model: {"nats_per_token": next(losses)}
    )
    assert refused("train", "--resume").startswith("error: --out is missing: the folder of the run")
    run("train", "--config", settings, "--valid-every", 3, "--steps", 3)
    out = tmp_path / "run"
    plain = (out / "run.json").read_text()
    (out / "run.json").write_text(plain.replace(json.dumps(str(data)), '"data/mine"'))
    moved = refused("train", "--resume", "--out", out)
    assert "started with --data data/mine, which is not there from here" in moved
    before = read_log(out)
    lines = [json.dumps(row | {"seconds": 1000.0}) + "\n" for row in before]
    (out / "log.jsonl").write_text("".join(lines))
    run("train", "--resume", "--out", out, "--data", data, "--steps", 4, "--valid-every", 99)
    later = read_log(out)[len(before) :]
    assert later and all(1000 < row["seconds"] < 1100 for row in later)  # those of the whole run
    os.truncate(out / "last" / "model.safetensors", 100)
    message = refused("train", "--resume", "--out", out, "--steps", 5)
    assert "cut off" in message and f"--from {out / 'best'} with another --out" in message
    (out / "last").unlink()
    assert f"--from {out / 'best'} with" in refused("train", "--resume", "--out", out)
    new = tmp_path / "new"
    run("train", "--from", out / "best", "--data", data, "--out", new, "--steps", 1)


def test_a_home_is_meant_also_where_the_shell_leaves_it(settings, tmp_path, run, monkeypatch, data):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(data)
    text = settings.read_text().replace(f"data: {data}", "data: ~/data")
    settings.write_text(text.replace(f"out: {tmp_path}", "out: ~"))
    run("train", "--config=~/run.yaml", "--steps", 1)
    assert json.loads(run("train", "--resume", "--out=~/run", "--steps", 2, "--json"))["step"] == 2
    assert run("eval", "~/run/last", "--data=~/data", "--json")
    config = TrainConfig(from_checkpoint="~/run", data="~/data", out="~/other", steps=1)
    assert (config.from_checkpoint, config.out) == (f"{tmp_path}/run", f"{tmp_path}/other")


def test_a_run_brings_its_vocabulary_along(corpus, settings, tmp_path, run, refused):
    """Data and tokenizer.json may go: the checkpoint still writes text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "<unk>", "the", "state", "token", "reads", "writes", "it", "every"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words_data = tmp_path / "words"
    run("prepare", corpus, "--tokenizer", tmp_path / "tokenizer.json", "--out", words_data)
    run("train", "--config", settings, "--data", words_data, "--context", 8, "--steps", 1)
    (tmp_path / "tokenizer.json").unlink()
    shutil.rmtree(words_data)
    argv = ["generate", tmp_path / "run" / "last", "--prompt", "the", "--max-tokens", 4]
    text = run(*argv)
    assert set(text.split()) <= set(words)
    assert run("generate", tmp_path / "run", *argv[2:], "--seed", 1)
    (tmp_path / "run" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(*argv)


def test_overrides_reach_the_model(settings, tmp_path, run):
    run("train", "--config", settings, "--set", "model.meta_state.read=value", "--steps", 1)
    config = json.loads((tmp_path / "run" / "last" / "config.json").read_text())["model"]
    assert config["meta_state"]["read"] == "value" and config["hidden_size"] == 16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "metastate-tyni"], ["'metastate-tyni'", "'metastate-tiny'"]),
        (["--set", "stpes=3"], ["'stpes'", "'steps'"]),
        (["--set", "from=runs/a"], ["'from'", "did you mean 'from_checkpoint'"]),
        (["--set", "model.hiden_size=3"], ["'hiden_size'", "'hidden_size'"]),
        (["--set", "model.meta_state.updat=self"], ["'updat'", "'update'"]),
        (["--set", "model.meta_state.update=delt"], ["'delt'", "'delta'"]),
        (["--dtype", "fp16"], ["'fp16'", "'bfloat16'"]),
        (["--schedule", "linear"], ["'linear'", "'cosine'"]),
        (["--steps", "0"], ["steps", "positive"]),
        (["--batch-size", "10000000000000000000"], ["batch_size", "at most"]),
        (["--lr", "0.00001"], ["min_lr"]),
        (["--context", "100000"], ["100000", "--context"]),
        (["--data", "nowhere"], ["nowhere", "prepare"]),
        (["--data", ""], ["--data is missing"]),
        (["--out", ""], ["--out is missing"]),
        (["--device", "abacus"], ["'abacus'"]),
        (["--set", "model.vocab_size=300"], ["256", "300"]),
        (["--backend", "tritn"], ["'tritn'", "triton"]),
        (["--seed", "100000000000000"], ["train.seed is 100000000000000; from 0 to"]),
        (["--resume"], ["no run"]),
    ],
)
def test_refusals_leave_nothing_behind(settings, tmp_path, refused, argv, words):
    message = refused("train", "--config", settings, *argv)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(settings, tmp_path, run, refused):
    run("train", "--config", settings, "--steps", 1)
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    assert "--resume" in refused("train", "--config", settings)
    assert "'prose'" not in refused("train", "--resume", "--out", tmp_path / "run", "--lr", 0.5)
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(settings, tmp_path, number):
    command = [sys.executable, "-m", "metastate", "train", "--config", str(settings)]
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--valid-every", "1000000", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err and "--resume" in err
    result = json.loads(out)
    assert result["interrupted"] == number
    assert read_log(tmp_path / "run")[-1]["step"] == result["step"]
    assert (tmp_path / "run" / "last" / "model.safetensors").exists()


@pytest.fixture
def ended(monkeypatch, tmp_path):
    """Put a run that ends at once, with these results, in the place of training."""

    def set_result(**values):
        values = {
            "step": 3,
            "tokens": 9,
            "loss": 1.0,
            "best_loss": None,
            "best_step": None,
        } | values
        result = TrainResult(out=tmp_path, **({"interrupted": None, "signal": None} | values))
        monkeypatch.setattr(training, "train", lambda *_, **__: result)
        monkeypatch.setattr(training, "validation", lambda _: None)
        monkeypatch.setattr(training, "say_plan", lambda *_: None)  # there are no data

    return set_result


@pytest.mark.parametrize(("parallel", "code"), [("none", 143), ("ddp", 0), ("fsdp", 0)])
def test_torchrun_does_not_start_again_what_a_signal_ended(ended, capsys, parallel, code):
    ended(interrupted=signal.SIGTERM)
    assert main(["train", "--data", "d", "--out", "o", "--parallel", parallel]) == code
    said = capsys.readouterr().err
    assert "stopped by SIGTERM after step 3; go on with --resume" in said
    assert "no loss curve: " in said  # there is no log: that alone fails nothing


def test_a_resumed_run_does_not_ask_for_what_it_began_from(ended):
    config = TrainConfig(
        data="d", out="o", from_checkpoint="gone", growth=[{"step": 2, "num_layers": 9}]
    )
    ended()
    assert training.train_with_bar(config, resume=True).step == 3
    with pytest.raises(MetaStateError, match="gone"):
        training.train_with_bar(config, resume=False)


def test_data_without_held_out_text_are_trained_on(corpus, tmp_path, capsys):
    argv = ["prepare", corpus, "--out", tmp_path / "all", "--valid-fraction", 0]
    assert main([str(a) for a in (*argv, "--test-fraction", 0)]) == 0
    assert training.validation(TrainConfig(data=str(tmp_path / "all"))) is None
    assert "has no valid split: training goes on without" in capsys.readouterr().err


def test_demo_goes_from_nothing_to_a_sample_and_can_be_run_again(tmp_path, monkeypatch, run, data):
    """The whole path on the tiny corpus, with the model and the times made small."""
    small = replace(demo.SETTINGS, batch_size=2, context=16, model=SMALL, valid_tokens=64)
    monkeypatch.setattr(demo, "SETTINGS", small)
    monkeypatch.setattr(demo, "prepare", lambda *args, **settings: PreparedData.open(data))
    monkeypatch.setattr(demo, "seconds_a_step", lambda config, folder: 0.5)
    argv = ["demo", "--out", tmp_path / "demo", "--minutes", "0.2", "--json"]
    first = json.loads(run(*argv))
    assert first["steps"] == 23 and first["state_bytes"] > 0
    assert first["bits_per_byte"] < first["bits_per_byte_before"]
    for key in ("checkpoint", "log", "curve"):
        assert os.path.exists(first[key])
    assert first["sample"].startswith(demo.PROMPT)
    assert json.loads(run(*argv)) == first
    assert run(*argv[:-1]) == first["sample"] + "\n"
    stopped = SimpleNamespace(signal=signal.SIGINT)
    monkeypatch.setattr(demo, "train_with_bar", lambda *_, **__: stopped)
    assert main([str(a) for a in argv]) == 130


def test_the_speed_is_that_of_the_steps_after_the_first_ones(tmp_path, monkeypatch):
    clock = iter([9.0, 9.0, 9.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0])
    came = None

    def train(config, progress):
        for step in range(config.steps):
            progress(step + 1, config.steps)
        return SimpleNamespace(signal=came)

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    assert demo.seconds_a_step(demo.SETTINGS, tmp_path / "probe") == 2
    clock, came = iter(range(10)), signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        demo.seconds_a_step(demo.SETTINGS, tmp_path / "probe")


def test_demo_measures_the_speed_by_training(tmp_path, data):
    config = replace(
        demo.SETTINGS, batch_size=2, context=16, model=SMALL, data=str(data), out="unused"
    )
    assert demo.seconds_a_step(config, tmp_path / "probe") > 0
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_demo_refuses_no_time(tmp_path, capsys, minutes):
    assert main(["demo", f"--minutes={minutes}", "--out", str(tmp_path / "demo")]) == 2
    assert "--minutes" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_checkpoint_with_a_nan_is_not_trained_from(checkpoint, data, tmp_path, refused):
    model = metastate.load(checkpoint)
    model.head.weight.data[3, 5] = torch.nan
    metastate.save(model, tmp_path / "nan")
    argv = ("train", "--from", tmp_path / "nan", "--data", data, "--out", tmp_path / "run")
    said = refused(*argv, "--steps", 2, "--context", 16, "--warmup", 0)
    assert "head.weight" in said and "--lr" not in said
