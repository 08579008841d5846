"""`eval-tasks` and `lm-eval`, as a person runs them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import metastate
import zero_shot_files as files
from metastate.cli import main, zero_shot
from metastate.config import ModelConfig
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import DataError
from metastate.eval.zero_shot import evaluate_items
from metastate.eval.zero_shot_data import TASKS, load_items
from metastate.model.lm import LanguageModel


@pytest.fixture
def tasks(tmp_path):
    return files.write(tmp_path / "tasks")


def test_all_tasks_as_json_and_in_a_file(checkpoint, tasks, tmp_path, run):
    out = tmp_path / "scores.json"
    argv = ("eval-tasks", checkpoint, "--data", tasks, "--out", out, "--batch-size", 2)
    result = json.loads(run(*argv, "--json"))
    assert result == json.loads(out.read_text())
    assert list(result["tasks"]) == list(TASKS)
    assert result["limit"] is None and result["checkpoint"] == str(checkpoint)
    model, tokenizer = metastate.load(checkpoint).eval(), ByteTokenizer()
    for name, own in result["tasks"].items():
        expected = evaluate_items(model, tokenizer, name, load_items(name, tasks)).to_json()
        assert own["items"] == expected["items"]
        for key, metric in expected["metrics"].items():
            for what, value in metric.items():
                value = value and pytest.approx(value, rel=1e-4)
                assert own["metrics"][key][what] == value
    assert set(result["tasks"]["blimp"]["paradigms"]) == set(files.BLIMP)


def test_a_table_for_people(checkpoint, tasks, run):
    argv = (
        "eval-tasks",
        checkpoint,
        "--data",
        tasks,
        "--tasks",
        "lambada, piqa,piqa",
        "--limit",
        2,
    )
    lines = run(*argv).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "+-", "error", "chance", "items"]
    assert [line.split()[0] for line in lines[1:]] == ["lambada", "perplexity", "piqa", "acc_norm"]
    assert all(line.split()[-1] == "2" for line in lines[1:])
    chance = [line.split()[-2] for line in lines[1:]]
    assert chance[0] == "0.0000" and float(chance[1]) > 1e6 and chance[2:] == ["0.5000"] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_arithmetic_gives_about_the_same(checkpoint, tasks, run, dtype):
    argv = ("eval-tasks", checkpoint, "--data", tasks, "--tasks", "lambada", "--json")
    values = [
        json.loads(run(*argv, "--dtype", name))["tasks"]["lambada"]["metrics"]["perplexity"][
            "value"
        ]
        for name in ("float32", dtype)
    ]
    assert values[0] == pytest.approx(values[1], rel=0.5 if dtype == "bfloat16" else 1e-3)
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "lambda"], ["unknown task 'lambda'", "did you mean 'lambada'"]),
        (["--tasks", " , "], ["names no task"]),
        (["--tasks", "piqa", "--limit", "0"], ["limit is 0"]),
        (["--tasks", "piqa", "--batch-size", "0"], ["batch_size is 0"]),
        (["--tasks", "piqa", "--device", "abacus"], ["abacus"]),
        (["--taks", "piqa"], ["--tasks"]),
    ],
)
def test_mistakes(checkpoint, tasks, refused, argv, words):
    message = refused("eval-tasks", checkpoint, "--data", tasks, *argv)
    assert all(word in message for word in words)


def test_files_and_folders(checkpoint, tasks, tmp_path, refused, run):
    assert "--data" in refused("eval-tasks", checkpoint)
    # the missing file shows before anything is scored, and its task alone fails
    (tasks / "mc_eval" / "copa.jsonl").unlink()
    out = tmp_path / "scores.json"
    message = refused("eval-tasks", checkpoint, "--data", tasks, "--out", out)
    assert "task copa" in message and "copa.jsonl is missing" in message and not out.exists()
    assert run("eval-tasks", checkpoint, "--data", tasks, "--tasks", "piqa")
    argv = ("eval-tasks", checkpoint, "--data", tasks, "--tasks", "piqa", "--out")
    assert "is a folder" in refused(*argv, tmp_path)
    (tmp_path / "file").write_text("x")
    # before anything is scored, too
    assert "is no folder; give a file" in refused(*argv, tmp_path / "file" / "a" / "scores.json")
    assert "no checkpoint" in refused("eval-tasks", tmp_path / "none", "--data", tasks)


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("the disk is full"), 2), (KeyboardInterrupt, 130)]
)
def test_what_is_finished_is_shown_where_the_rest_fails(
    checkpoint, tasks, tmp_path, capsys, monkeypatch, error, code
):
    argv = ["eval-tasks", checkpoint, "--data", tasks, "--tasks", "copa,piqa"]

    def fail(*_, **__):
        raise error

    if code == 2:
        monkeypatch.setattr(zero_shot, "write_json", fail)
        argv += ["--out", tmp_path / "scores.json"]
    else:
        scores = iter([evaluate_items, fail])
        monkeypatch.setattr(zero_shot, "evaluate_items", lambda *a, **k: next(scores)(*a, **k))
    assert main([str(a) for a in argv]) == code
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["task", "copa"]


def test_a_model_without_a_tokenizer_cannot_read_tasks(tasks, tmp_path, refused):
    config = ModelConfig(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2)
    metastate.save(LanguageModel(config), tmp_path / "bare")
    assert "which tokenizer" in refused("eval-tasks", tmp_path / "bare", "--data", tasks)


def test_lm_eval_that_is_not_installed_is_named(checkpoint, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "metastate.eval.lm_eval_adapter", raising=False)
    message = refused("lm-eval", checkpoint, "--tasks", "piqa")
    assert "pip install 'metastate[lm-eval]'" in message
    assert "--tasks is missing" in refused("lm-eval", checkpoint)
    assert "limit is 0" in refused("lm-eval", checkpoint, "--tasks", "piqa", "--limit", 0)
    argv = ("lm-eval", checkpoint, "--tasks", "piqa", "--num-fewshot", -1)
    assert "num_fewshot is -1" in refused(*argv)


def test_lm_eval_gets_the_options_and_its_talk_stays_out_of_the_result(
    checkpoint, tmp_path, run, monkeypatch
):
    """With a stand-in, so that it runs without lm-evaluation-harness."""

    def evaluate_tasks(lm, tasks, **options):
        print("lm-eval talks")
        assert (lm.batch_size, tasks) == (3, ["a", "b"])
        assert torch.is_autocast_enabled("cpu")
        assert options == {
            "limit": 4,
            "include_path": "x",
            "num_fewshot": 5,
            "gen_kwargs": "top_p=0.5",
            "confirm_run_unsafe_code": True,
        }
        return {"a": {"items": 2, "metrics": {"acc": {"value": 0.5, "stderr": None}}}}

    def adapter(model, tokenizer, batch_size):
        return SimpleNamespace(batch_size=batch_size)

    stand_in = SimpleNamespace(MetaStateLM=adapter, evaluate_tasks=evaluate_tasks)
    monkeypatch.setitem(sys.modules, "metastate.eval.lm_eval_adapter", stand_in)
    monkeypatch.setattr("metastate.cli.zero_shot.metadata.version", lambda name: "1")
    argv = ("lm-eval", checkpoint, "--tasks", "a,b", "--limit", 4, "--include-path", "x")
    argv += ("--batch-size", 3, "--dtype", "bfloat16", "--out", tmp_path / "scores.json")
    argv += ("--num-fewshot", 5, "--gen-kwargs", "top_p=0.5", "--confirm-run-unsafe-code")
    result = json.loads(run(*argv, "--json"))
    assert result["tasks"]["a"]["items"] == 2 and result["limit"] == 4
    assert result["gen_kwargs"] == "top_p=0.5"
    assert result == json.loads((tmp_path / "scores.json").read_text())
    assert run(*argv).splitlines()[1].split()[:3] == ["a", "acc", "0.5000"]


def test_lm_eval_s_own_tasks(checkpoint, tasks, tmp_path, run, refused):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    file = tasks / "mc_eval" / "piqa.jsonl"
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ntest_split: test\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        'output_type: multiple_choice\ndoc_to_text: "{{query}}Answer:"\n'
        "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list:\n  - {metric: acc}\n"
    )
    argv = ("lm-eval", checkpoint, "--tasks", "mine", "--include-path", tmp_path)
    found = json.loads(run(*argv, "--json"))["tasks"]["mine"]
    ours = ("eval-tasks", checkpoint, "--data", tasks, "--tasks", "piqa", "--json")
    assert found["items"] == 2
    expected = json.loads(run(*ours))["tasks"]["piqa"]["metrics"]["acc"]["value"]
    assert found["metrics"]["acc"]["value"] == expected
    assert "mine" in run(*argv, "--limit", 1)
    assert "no task 'yours'" in refused("lm-eval", checkpoint, "--tasks", "yours")
