"""`grow`, `train --from` and `train --growth`, as a person runs them."""

import json
import shutil

import pytest
import safetensors.torch
import torch

import metastate
from metastate.cli import growing, main
from metastate.config import ModelConfig
from metastate.data.tokenizer import load_tokenizer
from metastate.model.io import read_tensors
from metastate.model.lm import LanguageModel

SMALL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}


@pytest.fixture
def trained(tmp_path, data, run):
    """The folder of a short run, with the carried state of a document."""
    out = tmp_path / "run"
    run(
        *("train", "--data", data, "--out", out, "--steps", 3, "--batch-size", 2),
        *("--context", 16, "--warmup", 1, "--carry-state", "--valid-tokens", 512),
        *("--set", f"model={json.dumps(SMALL)}", "--json"),
    )
    return out


def test_grow_reports_and_writes_a_whole_checkpoint(trained, tmp_path, data, run):
    big = tmp_path / "big"
    sizes = ("--head-size", 12, "--heads", 3, "--layers", 2, "--parameter-tokens", 2)
    report = json.loads(run("grow", trained, *sizes, "--out", big, "--data", data, "--json"))
    assert report["logits"]["relative"] <= 1e-5 and report["logits"]["tokens"] > 50
    for key in ("parameters", "state_bytes", "flops_per_token"):
        assert report[key][1] > report[key][0]
    model = metastate.load(big)
    assert (model.config.head_size, model.config.num_heads, model.config.num_layers) == (12, 3, 2)
    assert model.lineage[0]["step"] == 3 and model.lineage[0]["num_heads"] == [2, 3]
    # Moments and the carried state grew too, and the folder can write without its run.
    assert len(read_tensors(big / "optimizer.safetensors")) > 50
    assert (big / "state.safetensors").exists()
    shutil.rmtree(trained)
    assert "head_size" in run("info", big) and "lineage" in run("info", big)
    assert run("generate", big, "--prompt", "the", "--max-tokens", 5)


def test_grow_compares_on_training_text_where_none_is_held_out(trained, corpus, tmp_path, run):
    argv = ("prepare", corpus, "--out", tmp_path / "all", "--valid-fraction", 0)
    run(*argv, "--test-fraction", 0)
    out = ("--out", tmp_path / "big", "--data", tmp_path / "all")
    assert f"train text of {tmp_path / 'all'}" in run("grow", trained, "--heads", 3, *out)


def test_grow_takes_what_sharded_processes_wrote(trained, tmp_path, run):
    """Their counts of steps are vectors of one."""
    folder = trained / "last"
    run("grow", folder, "--heads", 3, "--out", tmp_path / "whole")
    tensors = read_tensors(folder / "optimizer.safetensors")
    as_written = {k: x.reshape(1) if k.startswith("step:") else x for k, x in tensors.items()}
    safetensors.torch.save_file(as_written, folder / "optimizer.safetensors")
    run("grow", folder, "--heads", 3, "--out", tmp_path / "parts")
    whole, parts = (
        read_tensors(tmp_path / x / "optimizer.safetensors") for x in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[key]) for key, x in whole.items())


def test_rounding_is_told_from_another_function(tmp_path, run, refused, monkeypatch):
    """A deep model of unruly weights rounds by more than a small one; float64 says what it is."""
    monkeypatch.setattr(growing, "EXACT", 0.0)  # as if all of it were too much
    torch.manual_seed(0)
    fields = {"vocab_size": 256, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = LanguageModel(ModelConfig(**fields))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.tokenizer_info = load_tokenizer("bytes").info()
    metastate.save(model, tmp_path / "a")
    argv = ("grow", tmp_path / "a", "--head-size", 12)
    assert "logits moved" in run(*argv, "--out", tmp_path / "b")
    grow = growing.grow

    def wrong(*args, **settings):
        out = grow(*args, **settings)
        out.head.weight.data[0, 0] += 1e-3
        return out

    monkeypatch.setattr(growing, "grow", wrong)
    assert "fault of this program" in refused(*argv, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_table_for_people_and_the_paper_s_random_choice(
    trained, checkpoint, tmp_path, run, capsys
):
    assert main(["grow", str(trained), "--head-size", "12", "--out", str(tmp_path / "a")]) == 0
    exact, said = capsys.readouterr()
    assert "logits moved by at most" in exact and "Python's documentation" in exact
    _, before, after, ratio = exact.splitlines()[1].replace(",", "").split()
    assert float(ratio) == pytest.approx(int(after) / int(before), abs=0.01) and float(ratio) > 1
    assert "no moments" not in said and "metastate train --from" in said
    assert main(["grow", str(checkpoint), "--layers", "3", "--out", str(tmp_path / "c")]) == 0
    assert "no moments" in capsys.readouterr().err
    argv = ("grow", trained, "--head-size", 12, "--init", "random", "--json")
    report = json.loads(run(*argv, "--out", tmp_path / "b"))
    assert report["logits"]["relative"] > 1e-5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["nothing grows", "least one of --head-size, --heads, ", "(--head-size 8, --heads 2"]),
        (["--head-size", "4"], ["--head-size 4 is below the present 8"]),
        (["--layers", "99999"], ["--layers is 99999"]),
        (["--attention-slots", "99"], ["--attention-slots of a metastate cannot grow"]),
        (["--hed-size", "9"], ["--head-size"]),
        (["--head-size", "9", "--init", "released"], ["--init released", "TokenFormer"]),
        (["--head-size", "9"], ["--head-size cannot grow by one channel", "two or more"]),
        (["--head-size", "10", "--seed", "99999999999999999999"], ["seed is 9999", "2^64 - 1"]),
    ],
)
def test_grow_refuses_and_writes_nothing(checkpoint, tmp_path, refused, argv, words):
    message = refused("grow", checkpoint, *argv, "--out", tmp_path / "big")
    assert all(word in message for word in words)
    assert not (tmp_path / "big").exists() and not list(tmp_path.glob(".big*"))


def test_grow_refuses_an_existing_folder_and_a_missing_checkpoint(checkpoint, tmp_path, refused):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "mine.txt").write_text("mine")
    argv = ("--head-size", "9", "--out", tmp_path / "big")
    assert "another --out" in refused("grow", checkpoint, *argv)
    assert (tmp_path / "big" / "mine.txt").read_text() == "mine"
    missing = ("grow", tmp_path / "none", "--head-size", "9", "--out", tmp_path / "new")
    assert "no checkpoint" in refused(*missing)
    assert "--out" in refused("grow", checkpoint, "--head-size", "9")


def test_train_from_a_grown_checkpoint(trained, tmp_path, data, run, refused):
    big, out = tmp_path / "big", tmp_path / "second"
    run("grow", trained, "--head-size", 12, "--out", big)
    argv = ("train", "--from", big, "--data", data, "--out", out, "--steps", 2)
    argv += ("--batch-size", 2, "--context", 16, "--warmup", 0, "--valid-tokens", 512)
    result = json.loads(run(*argv, "--old-lr-scale", 0, "--json"))
    assert result["step"] == 2
    before, after = metastate.load(big), metastate.load(out)
    assert after.lineage == before.lineage
    assert (after.embedding.weight == before.embedding.weight).all()
    changed = [n for n, p in after.named_parameters() if (p != before.get_parameter(n)).any()]
    assert "blocks.0.time_mix.key.weight" in changed
    assert "--from" in refused(*argv[:7], "--preset", "metastate-mini")
    ungrown = ("train", "--from", trained, "--data", data, "--out", tmp_path / "third")
    assert "never grew" in refused(*ungrown, "--old-lr-scale", 0.5)


def test_growth_inside_a_run_from_a_file(tmp_path, data, run, refused):
    schedule = tmp_path / "growth.yaml"
    schedule.write_text(
        "growth:\n- {step: 2, head_size: 12, warmup: 2}\n- {step: 3, num_layers: 2}\n"
    )
    argv = ("train", "--data", data, "--out", tmp_path / "run", "--steps", 4, "--batch-size", 2)
    argv += ("--context", 16, "--warmup", 1, "--valid-tokens", 512, "--valid-every", 1)
    argv += ("--set", f"model={json.dumps(SMALL)}")
    run(*argv, "--growth", schedule, "--json")
    model = metastate.load(tmp_path / "run")
    assert (model.config.head_size, model.config.num_layers) == (12, 2)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    jumps = [row["nats_per_token"] for row in log if row["kind"] == "growth"]
    assert len(jumps) == 2 and all(abs(b - a) < 1e-4 for a, b in jumps)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    again = json.loads(run("train", "--resume", "--out", tmp_path / "run", "--steps", 5, "--json"))
    assert again["step"] == 5
    schedule.write_text("growth:\n- {step: 2, hed_size: 12}\n")
    other = (*argv[:3], "--out", tmp_path / "other", "--growth", schedule)
    assert "'head_size'" in refused(*other)
    schedule.write_text("steps: 3\n")
    assert "named `growth`" in refused(*other)


def test_weights_that_are_not_finite_are_named(checkpoint, tmp_path, data, refused):
    """A loss of NaN is no result, and neither is a larger model of them."""
    bad = metastate.load(checkpoint)
    with torch.no_grad():
        bad.blocks[0].time_mix.k_k[0] = torch.nan
    metastate.save(bad, tmp_path / "bad")
    for argv in (
        ("eval", tmp_path / "bad", "--data", data, "--json"),
        ("grow", tmp_path / "bad", "--layers", 3, "--out", tmp_path / "out"),
        ("upgrade", tmp_path / "bad", "--out", tmp_path / "out"),
    ):
        assert "blocks.0.time_mix.k_k" in refused(*argv), argv
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "warns"), [(256, False), (257, True)])
def test_grow_warns_of_heads_wider_than_the_gpu_kernels_are_made_for(
    checkpoint, tmp_path, capsys, size, warns
):
    argv = ["grow", str(checkpoint), "--head-size", str(size), "--out", str(tmp_path / "big")]
    assert main(argv) == 0
    assert (f"heads are {size} channels wide" in capsys.readouterr().err) == warns
