"""`metastate tasks`: cells, resuming, tables, mistakes."""

import json

import pytest

from metastate.cli import build_parser, main, tasks
from metastate.config import ModelConfig
from metastate.data.files import alone_in
from metastate.errors import ConfigError
from metastate.eval.suite import count
from metastate.mapping import from_dict
from metastate.model.presets import ARCHITECTURES

SMALL = ["--width", "8", "--steps", "3", "--batch-size", "4", "--out"]
WORDS = ["tasks", "state-tracking", "--group", "Z3", "--length", "4"]


@pytest.fixture
def trained(monkeypatch):
    """Count the cells that are trained."""
    found, real = [], tasks.train_and_score

    def train(problem, model, *rest):
        found.append((problem.name, model.architecture, model.num_layers))
        return real(problem, model, *rest)

    monkeypatch.setattr(tasks, "train_and_score", train)
    return found


def test_state_tracking_end_to_end(tmp_path, run, trained):
    names = ["rwkv7", "rwkv7+memory"]
    argv = [*WORDS, "--architectures", *names, "--layers", "2", "1", *SMALL, tmp_path]
    text = run(*argv)
    assert len(trained) == 4 and trained[0] == ("Z3", "rwkv7", 1)
    assert "fewest layers above 90% at length 4" in text and "length 16" in text
    assert text == (tmp_path / "results.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    value = json.loads(run(*argv, "--json"))
    assert len(trained) == 4  # finished before: nothing is trained again
    assert value["cells"] == json.loads((tmp_path / "results.json").read_text())["cells"]
    assert len(value["cells"][0]["by_length"]) == 16
    assert value["summary"]["rwkv7+memory"]["Z3"]["most_layers"] == 2
    assert [cell["model"].get("memory_heads") for cell in value["cells"][::2]] == [None, 1]


def test_recall_end_to_end(tmp_path, run, trained):
    argv = ["tasks", "recall", "--level", "16x2", "16x4", "--vocab-size", "20"]
    argv += ["--architectures", "transformer", "--layers", "1", "--lr", "1e-3", "1e-2"]
    text = run(*argv, *SMALL, tmp_path)
    assert [name for name, *_ in trained] == ["16x2", "16x2", "16x4", "16x4"]
    rows = [line for line in text.splitlines() if "transformer" in line]
    assert len(rows) == 3  # the summary, and of the rates the better one for each level
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    best = max(cell["accuracy"] for cell in cells[:2])
    assert f"none up to 1 ({best:.1%})" in rows[0]


def test_recall_with_another_filler_is_another_problem(tmp_path, run, trained):
    argv = ["tasks", "recall", "--level", "16x2", "--vocab-size", "20", "--layers", "1"]
    argv += ["--architectures", "rwkv7", *SMALL, tmp_path]
    run(*argv)
    assert "| 16x2 random |" in run(*argv, "--filler", "random")
    assert [name for name, *_ in trained] == ["16x2", "16x2 random"]
    assert "random" not in run(*argv) and len(trained) == 2


def test_a_rate_is_chosen_by_other_sequences_than_it_is_scored_on():
    def cell(rate, accuracy, **more):
        names = {"problem": "S3", "architecture": "rwkv7", "model": {"num_layers": 1}}
        return names | {"train": {"lr": rate}, "accuracy": accuracy} | more

    lucky, better = cell(1e-3, 0.9, choice=0.7), cell(1e-2, 0.8, choice=0.8)
    assert tasks.best_rates([lucky, better]) == tasks.best_rates([better, lucky]) == [better]
    old = [cell(1e-3, 0.6), cell(1e-2, 0.7)]  # written before there was a choice
    assert tasks.best_rates(old) == old[1:]


def test_match_params_gives_every_architecture_the_parameters_of_the_first():
    argv = [*WORDS, "--width", "32", "--layers", "1", "2", "--match-params"]
    args = build_parser()[0].parse_args([*argv, "--architectures", "rwkv7", *ARCHITECTURES])
    tasks.fill_defaults(args)
    counts = {}
    for _, cell in tasks.cells(args):
        model = from_dict(ModelConfig, cell["model"])
        counts.setdefault(model.num_layers, {})[cell["architecture"]] = count(model)
    for layers, own in counts.items():
        alone = tasks.task_model("rwkv7", layers, 32, 1, 3)
        assert own["rwkv7"] == count(alone)
        paper = own.pop("paper")
        assert paper == count(tasks.task_model("paper", layers, 32, 1, 3)) < own["rwkv7"] / 1.2
        assert all(abs(n / own["rwkv7"] - 1) <= 0.01 for n in own.values()), own
    assert sorted(counts) == [1, 2]


def test_match_params_says_what_cannot_be_fitted(tmp_path, capsys):
    argv = [*WORDS, "--width", "8", "--layers", "1", "--match-params", "--out", str(tmp_path)]
    argv += ["--architectures", "transformer", "rwkv7"]  # fewer than its attention part has
    assert main(argv) == 2
    assert "no hidden width of 1 block(s) of this rwkv7 (D 8)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_interrupted_it_goes_on_where_it_was(tmp_path, run, capsys, monkeypatch):
    argv = [*WORDS, "--architectures", "rwkv7", "transformer", "--layers", "1", *SMALL, tmp_path]
    real, calls = tasks.train_and_score, []

    def interrupted(problem, model, *rest):
        calls.append(model.architecture)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(problem, model, *rest)

    monkeypatch.setattr(tasks, "train_and_score", interrupted)
    assert main([str(a) for a in argv]) == 130
    said = capsys.readouterr().err
    assert f"finished cells are in {tmp_path / 'results.json'}, a running one starts over" in said
    assert "the same command goes on\ninterrupted\n" in said
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [cell["architecture"] for cell in cells] == ["rwkv7"]
    run(*argv)
    assert calls == ["rwkv7", "transformer", "transformer"]
    after = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert after[0] == cells[0] and len(after) == 2


def test_other_settings_are_other_cells(tmp_path, run, trained):
    argv = [*WORDS, "--architectures", "rwkv7", "--layers", "1", *SMALL, tmp_path, "--json"]
    first = json.loads(run(*argv))["cells"]
    second = json.loads(run(*argv, "--seed", "1"))["cells"]
    assert len(trained) == 2 and len(first) == len(second) == 1
    assert second[0]["train"]["seed"] == 1 and second != first
    kept = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert kept == first + second


def test_deeper_models_are_left_out_where_fewer_layers_pass(tmp_path, run, monkeypatch):
    def train(problem, model, *_):
        accuracy = 0.95 if model.num_layers > 1 or model.architecture == "rwkv7" else 0.5
        scores = {
            "accuracy": accuracy,
            "passed": accuracy > 0.9,
            "by_length": [1.0] * 3 + [accuracy],
        }
        return scores | {
            "steps": 3,
            "threshold": 0.9,
            "diverged": False,
            "parameters": 9,
            "seconds": 0.0,
        }

    monkeypatch.setattr(tasks, "train_and_score", train)
    argv = [*WORDS[:-1], "4", "--architectures", "rwkv7", "metastate", "--layers", "1", "2", "3"]
    value = json.loads(run(*argv, *SMALL, tmp_path, "--json"))
    layers = [(cell["architecture"], cell["model"]["num_layers"]) for cell in value["cells"]]
    assert layers == [("rwkv7", 1), ("metastate", 1), ("metastate", 2)]
    fewest = {name: own["Z3"]["fewest_layers"] for name, own in value["summary"].items()}
    assert fewest == {"rwkv7": 1, "metastate": 2}


def test_a_cell_is_known_again_whatever_device_it_ran_on(tmp_path):
    argv = [*WORDS, "--architectures", "rwkv7", "--layers", "1", *SMALL, str(tmp_path)]
    args = build_parser()[0].parse_args(argv)
    tasks.fill_defaults(args)
    ((_, cell),) = tasks.cells(args)
    there = cell | {"train": cell["train"] | {"device": "cuda"}}
    assert tasks.is_same(there, cell) and there != cell
    assert not tasks.is_same(cell | {"train": cell["train"] | {"lr": 0.5}}, cell)


def test_what_passed_on_one_problem_says_nothing_of_another():
    done = {"problem": "Z3", "architecture": "rwkv7", "passed": True}
    assert tasks.solved_before(done, [done]) is done
    for other in ({"problem": "S3"}, {"architecture": "paper"}):
        assert tasks.solved_before(done | other, [done]) is None
    assert tasks.solved_before(done, [done | {"passed": False}]) is None


def test_a_missing_figure_fails_nothing(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ConfigError("no matplotlib")

    monkeypatch.setattr(tasks, "task_figure", missing)
    argv = [*WORDS, "--architectures", "rwkv7", "--layers", "1", *SMALL, tmp_path]
    assert main([str(a) for a in argv]) == 0
    assert "no figure: no matplotlib" in capsys.readouterr().err


def test_fewest_layers_by_length():
    def cell(layers, by_length):
        passed = by_length[-1] > 0.9
        scores = {"accuracy": by_length[-1], "by_length": by_length, "passed": passed}
        names = {"problem": "S5", "length": 7, "architecture": "rwkv7"}
        return names | {"model": {"num_layers": layers}} | scores

    done = [cell(1, [1.0] * 5 + [0.8, 0.1]), cell(2, [1.0] * 6 + [0.85])]
    value = tasks.summary(done)["rwkv7"]["S5"]
    assert value["fewest_layers_by_length"] == {"5": 1, "6": 2, "7": None}
    assert value["fewest_layers"] is None and value["accuracy"] == 0.85


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tasks"], ["required: task"]),
        (["tasks", "sorting"], ["sorting", "recall"]),
        (["tasks", "state-tracking", "--group", "Q8"], ["Q8", "A4xZ5"]),
        (["tasks", "state-tracking", "--architectures", "mamba"], ["mamba", "rwkv7"]),
        (["tasks", "state-tracking", "--layers", "0"], ["num_layers", "positive"]),
        (["tasks", "state-tracking", "--width", "10", "--heads", "3"], ["hidden_size 10"]),
        (["tasks", "state-tracking", "--vocab-size", "64"], ["--vocab-size", "recall"]),
        (["tasks", "state-tracking", "--steps", "0"], ["steps"]),
        (["tasks", "state-tracking", "--seed", "-1"], ["--seed"]),
        (["tasks", "state-tracking", "--device", "abacus"], ["abacus"]),
        (["tasks", "recall", "--group", "S5"], ["--group is an option", "state-tracking"]),
        (["tasks", "recall", "--level", "64x17"], ["64", "17"]),
        (["tasks", "recall", "--level", "easy"], ["easy", "64x4"]),
        (["tasks", "recall", "--vocab-size", "8"], ["vocabulary"]),
        (["tasks", "recall", "--filler", "noise"], ["noise", "random"]),
        (["tasks", "state-tracking", "--filler", "zero"], ["--filler", "recall"]),
        (["tasks", "recall", "--levels", "64x4"], ["--level"]),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(argv, words, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*argv)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"cells": [{"a": 1}]}', '{"cells": 5}'])
def test_a_file_of_something_else_is_not_overwritten(text, tmp_path, refused):
    (tmp_path / "results.json").write_text(text)
    assert "results.json" in refused(*WORDS, *SMALL, tmp_path)
    assert (tmp_path / "results.json").read_text() == text


def test_two_processes_do_not_share_a_folder(tmp_path, refused, trained):
    with alone_in(tmp_path):
        assert "another process" in refused(*WORDS, *SMALL, tmp_path)
    assert not trained
