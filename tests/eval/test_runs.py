"""What a run was made of; the recipes, which take a finished run for theirs only where it is."""

import argparse
import dataclasses
import importlib.util
import json
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import metastate
from metastate.config import TrainConfig
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import ConfigError
from metastate.eval import runs
from metastate.eval.runs import is_finished
from metastate.mapping import to_dict
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from metastate.train.trainer import train

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {"hidden_size": 16, "num_heads": 1, "num_layers": 1, "ffn_size": 16}


@pytest.fixture(scope="module")
def finished(few_words, tmp_path_factory):
    """The settings of a run that has come to its end."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        preset="metastate-tiny", model=SMALL, data=str(few_words), out=str(out), steps=2,
        batch_size=2, context=16, valid_tokens=64,
    )  # fmt: skip
    assert not is_finished(config)
    train(config)
    return config


def test_a_finished_run_is_found_finished_wherever_its_data_and_log_are(finished, tmp_path):
    moved = shutil.copytree(finished.data, tmp_path / "data")
    assert is_finished(finished)
    assert is_finished(dataclasses.replace(finished, data=str(moved), log_every=3))


@pytest.mark.parametrize(
    "changes", [{"lr": 1e-4}, {"steps": 1}, {"steps": 4}, {"valid_tokens": 32}, {"seed": 1}]
)
def test_a_run_of_other_settings_is_refused(finished, changes):
    with pytest.raises(ConfigError, match=f"other settings .{next(iter(changes))} .* --out"):
        is_finished(dataclasses.replace(finished, **changes))


def test_a_run_of_other_data_is_refused(finished, tmp_path):
    other = shutil.copytree(finished.data, tmp_path / "data")
    record = json.loads((other / "data.json").read_text())
    record["splits"]["train"]["text_bytes"] += 1
    (other / "data.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="other data than"):
        is_finished(dataclasses.replace(finished, data=str(other)))


def test_a_run_that_was_stopped_is_not_finished(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "run", symlinks=True)
    config = dataclasses.replace(finished, out=str(out))
    (folder,) = (out / "checkpoints").glob("step-*")
    record = json.loads((folder / "trainer.json").read_text()) | {"step": 1}
    (folder / "trainer.json").write_text(json.dumps(record))
    assert not is_finished(config)
    shutil.rmtree(out / "checkpoints")
    assert not is_finished(config)  # before its first checkpoint


def test_the_commit_is_the_checkout_s_own(tmp_path):
    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)

    file = tmp_path / "module.py"
    file.write_text("x = 1\n")
    assert runs._commit(file) is None
    git("init")
    assert runs._commit(file) is None  # the package is installed inside somebody's checkout
    git("add", "module.py")
    git("commit", "-m", "first")
    commit = runs._commit(file)
    assert len(commit) == 40
    file.write_text("x = 2\n")
    assert runs._commit(file) == f"{commit}-dirty"


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_growth_refuses_a_run_of_other_settings(few_words, tmp_path):
    growth = recipe("growth")
    args = argparse.Namespace(
        data=str(few_words), out=str(tmp_path), steps=4, lr=1e-3, valid_tokens=64
    )
    started(tmp_path / "small-0", few_words)
    with pytest.raises(ConfigError, match="small-0 was run with other settings"):
        growth.run("small", growth.cells(4)["small"], 0, args)


def test_growth_domains_refuses_a_run_of_other_settings(few_words, tmp_path):
    args = argparse.Namespace(steps=4, lr=1e-3, valid_tokens=64)
    started(tmp_path / "stage1-0", few_words)
    with pytest.raises(ConfigError, match="stage1-0 was run with other settings"):
        recipe("growth_domains").run(tmp_path / "stage1-0", few_words, (few_words,) * 2, args)


def test_growth_domains_refuses_the_halves_of_another_text(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            records = [{"text": name * 9, "meta": {"set": of}} for of in ("prose", "code")]
            with lzma.open(tmp_path / name / f"{split}.jsonl.xz", "wt") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
    halves = recipe("growth_domains").halves
    folders = halves(tmp_path / "a", tmp_path / "out")
    assert folders == halves(tmp_path / "a", tmp_path / "out")
    with pytest.raises(ConfigError, match="is of other text than .*; choose another --out"):
        halves(tmp_path / "b", tmp_path / "out")


def test_upgrade_refuses_a_run_of_other_settings(few_words, tmp_path):
    upgrade = recipe("upgrade")
    args = argparse.Namespace(data=str(few_words), valid_tokens=64)
    started(tmp_path / "parent-0", few_words)
    with pytest.raises(ConfigError, match="parent-0 was run with other settings"):
        upgrade.trained(upgrade.settings(args, tmp_path / "parent-0", 4, 0, 1e-3), "parent")


def started(out, data):
    """Leave what a run of other settings, with the right number of steps, leaves first."""
    out.mkdir()
    config = TrainConfig(data=str(data), out=str(out), steps=4, lr=9e-3)
    (out / "run.json").write_text(json.dumps({"train": to_dict(config)}))


def test_long_context_keeps_what_it_measured_apart_by_weights_and_text(tmp_path, monkeypatch):
    long_context = recipe("long_context")
    monkeypatch.setattr(long_context, "LENGTH", 8)
    calls = []

    def measure(model, text, title):
        calls.append(title)
        return {"mean": float(model.head.weight.detach().mean()), "first": int(text[0, 1])}

    monkeypatch.setattr(long_context, "measure", measure)
    tokenizer = ByteTokenizer()
    for i in range(2):
        torch.manual_seed(i)
        model = LanguageModel(preset("metastate-tiny", vocab_size=tokenizer.vocab_size, **SMALL))
        model.tokenizer_info = tokenizer.info()
        metastate.save(model, tmp_path / f"run{i}" / "best")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "valid.txt").write_text(name * 40)
        (tmp_path / name / "test.txt").write_text("")

    def ask(i, text):
        path = tmp_path / f"run{i}" / "best"
        found = long_context.measured(path, tmp_path / text, None, tmp_path)
        assert found["checkpoint"] == str(path)
        return found["mean"], found["first"]

    found = {(i, text): ask(i, text) for i in (0, 1) for text in "ab"}
    assert len(calls) == len(set(found.values())) == 4
    assert {(i, text): ask(i, text) for i, text in found} == found and len(calls) == 4


@pytest.mark.parametrize("texts", [1, 2])
def test_long_context_has_a_spread_only_of_several_texts(texts):
    own = {"checkpoint": "a"}
    for mode in ("carried", "warm", "windows"):
        own |= {mode: [1.0] * 7, f"{mode}_state_bytes": [8], f"{mode}_by_text": [1.0] * texts}
    table = recipe("long_context").table([own])
    assert ("(one text)" in table) == (texts == 1) and "nan" not in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
