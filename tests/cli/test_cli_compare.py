"""`compare`, as a person runs it."""

import json

import pytest

from metastate.cli import comparing, main

SUITE = """
models:
  Meta-State: {preset: metastate}
  RWKV-7: {preset: rwkv7}
sizes:
  tiny: {model: {hidden_size: 16, num_heads: 2, num_layers: 2}}
tokens_per_parameter: 0.02
points: 2
test_tokens: 256
train: {batch_size: 2, context: 32, warmup: 1, valid_tokens: 256, log_every: 1}
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    return path


def test_a_suite_is_planned_run_and_reported(suite, tmp_path, data, run, capsys):
    argv = ("compare", suite, "--data", data, "--out", tmp_path / "out", "--match-params")
    planned = json.loads(run(*argv, "--dry-run", "--json"))
    assert planned["cells"] == 2 and not (tmp_path / "out").exists()
    table = run(*argv)
    assert "| tiny | Meta-State |" in table and "gain over RWKV-7" in table
    for name in ("results.json", "table.md", "report.html", "loss-by-flops.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    again = json.loads(run(*argv, "--report-only", "--json"))
    assert again == json.loads((tmp_path / "out/results.json").read_text())
    assert len(again["rows"]) == 2
    file = next((tmp_path / "out").glob("cells/*/score.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": None}))
    assert main([str(a) for a in (*argv, "--report-only")]) == 0
    said = capsys.readouterr().err
    assert "warning: finished cells come from different sources: " in said
    assert "unknown (1 cells)" in said


def test_data_without_a_test_split_are_said(suite, tmp_path, corpus, capsys):
    argv = ["prepare", corpus, "--out", tmp_path / "d", "--valid-fraction", 0.1]
    assert main([str(a) for a in (*argv, "--test-fraction", 0)]) == 0
    argv = ["compare", suite, "--data", tmp_path / "d", "--out", tmp_path / "out"]
    assert main([str(a) for a in argv]) == 0
    assert capsys.readouterr().err.count("warning: the data has no test split") == 2
    for page in ("table.md", "report.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "text of the split valid" in text and "no test split" in text


def test_unequal_counts_are_said_before_the_run(suite, tmp_path, data, capsys):
    argv = ["compare", suite, "--data", data, "--out", tmp_path / "out", "--dry-run"]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().err
    assert "parameters are not equal" in said and "--match-params" in said
    assert said.index("1 seed\n") < said.index("Measuring") < said.index("together about")


@pytest.mark.parametrize(("own", "warns"), [(900.0, True), (3600.0, False)])
def test_a_dry_run_says_where_the_machine_is_busy(
    own, warns, suite, tmp_path, data, monkeypatch, capsys
):
    monkeypatch.setattr("metastate.cli.comparing.estimate", lambda cells: {"a": (3600.0, own)})
    argv = ["compare", suite, "--data", data, "--out", tmp_path / "out", "--dry-run", "--json"]
    assert main([str(a) for a in argv]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["quiet_seconds"] == {"a": own}
    assert "together about 60 min" in said
    assert ("processors for 75% of the time of measuring; were it quiet, about 15 min" in said) == (
        warns
    )


def test_interrupted_it_says_that_the_same_command_goes_on(
    suite, tmp_path, data, monkeypatch, capsys
):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("metastate.cli.comparing.compare", interrupted)
    out = tmp_path / "out"
    assert main([str(a) for a in ["compare", suite, "--data", data, "--out", out]]) == 130
    said = capsys.readouterr().err
    assert said.endswith(f"work so far is in {out}; the same command goes on\ninterrupted\n")


def test_times_as_people_say_them():
    said = [comparing.duration(seconds) for seconds in (90, 600, 7199, 9000)]
    assert said == ["90 s", "10 min", "120 min", "2.5 h"]


def test_the_plan_names_learning_rates(suite, tmp_path, data, capsys):
    suite.write_text(SUITE + "lr: {values: [0.001, 0.002]}\n")
    argv = ["compare", suite, "--data", data, "--out", tmp_path / "out", "--dry-run"]
    assert main([str(a) for a in argv]) == 0
    assert "1 seed, 2 learning rates\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "models"),
        ("models: {a: {}}", "sizes"),
        (SUITE + "sedes: [1]", "did you mean 'seeds'"),
        (SUITE.replace("context: 32", "contxt: 32"), "did you mean 'context'"),
        ("- 1", "key: value"),
    ],
)
def test_a_bad_suite_is_refused_in_words(text, words, tmp_path, data, refused):
    (tmp_path / "bad.yaml").write_text(text)
    message = refused("compare", tmp_path / "bad.yaml", "--data", data, "--out", tmp_path / "o")
    assert words in message


def test_missing_data_out_and_cells_are_refused(suite, tmp_path, data, refused):
    assert "--out" in refused("compare", suite, "--data", data)
    assert "--data" in refused("compare", suite, "--out", tmp_path / "o")
    assert "no cell is finished" in refused(
        "compare", suite, "--data", data, "--out", tmp_path / "o", "--report-only"
    )
