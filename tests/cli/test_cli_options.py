"""The command line's own mistakes and help: nothing here needs a model."""

import dataclasses

import pytest

from metastate.cli import build_parser, main
from metastate.cli.options import HELP, flag_of, parse_override, settings_of
from metastate.config import TrainConfig
from metastate.errors import ConfigError


def train_settings(*argv):
    parser, _ = build_parser()
    return settings_of(parser.parse_args(["train", *argv]))


def test_no_arguments_print_help_with_a_quick_start(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "quick start" in out and "metastate demo" in out


@pytest.mark.parametrize("command", ["demo", "prepare", "train", "eval", "generate", "info"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out and len(out) > 300


def test_every_training_setting_has_a_flag_and_a_help_text():
    _, commands = build_parser()
    flags = commands["train"].format_help()
    for field in dataclasses.fields(TrainConfig):
        if field.name != "model":
            assert HELP[field.name]
            assert f"{flag_of(field.name)} " in flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train", "--stpes", "5"], ["'--stpes'", "--steps"]),
        (["train", "--stpes=5"], ["'--stpes'", "--steps"]),
        (["eval", "x", "--by-domian"], ["'--by-domian'", "--by-domain"]),
        (["train", "--steps", "many"], ["--steps", "many"]),
        (["prepare"], ["INPUT", "prepare --help"]),
        (["prepare", "stdlib"], ["--out"]),
        (["eval", "x"], ["--data"]),
        (["info", "a", "b"], ["'b'"]),
    ],
)
def test_mistakes_name_what_was_meant(argv, words, refused):
    message = refused(*argv)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["tasks", "recall", "--learnrate", "1"], "--lr"),
        (["train", "--learning-rate=1"], "--lr"),
        (["train", "--warmup-steps", "9"], "--warmup"),
        (["generate", "x", "--temp", "1"], "--temperature"),
        (["tasks", "recall", "--hidden-size", "64"], None),  # as near to --batch-size as to --width
        (["train", "--gpu"], None),
        (["train", "--hidden-size", "9"], "--set model.hidden_size=..."),
        (["train", "--set", "learning_rate=1"], "'lr'"),
        (["train", "--set", "num_layers=1"], "'model.num_layers'"),
        (["eval", "x", "--hidden-size", "9"], None),  # it has no --set
        (["eval", "x", "--learning-rate", "1"], None),  # it has none
        (["train", "--valid", "9"], None),  # several begin so
        (["info", "a", "help"], None),  # no flag was meant
    ],
)
def test_a_hint_is_near_or_none(argv, meant, refused):
    message = refused(*argv)
    assert f"did you mean {meant}?" in message if meant else "did you mean" not in message


def test_settings_are_laid_over_each_other(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\nlr: 6e-4\nmodel:\n  num_layers: 3\n  meta_state: {read: value}\n")
    settings = train_settings(
        "--config", str(path), "--steps", "7", "--set", "model.meta_state.update=self"
    )
    assert settings["steps"] == 7
    assert float(settings["lr"]) == 6e-4
    assert settings["model"] == {"num_layers": 3, "meta_state": {"read": "value", "update": "self"}}


def test_set_has_the_last_word():
    assert train_settings("--set", "steps=9", "--steps", "7") == {"steps": 9}


def test_a_flag_that_is_not_given_leaves_the_file_alone(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 3\ncarry_state: true\n")
    settings = train_settings("--config", str(path), "--no-document-reset")
    assert settings == {"batch_size": 3, "carry_state": True, "document_reset": False}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", {"a": 1}),
        ("a.b=true", {"a": {"b": True}}),
        ("a=1e-3", {"a": 1e-3}),
        ("a=self", {"a": "self"}),
        ("a=x=y", {"a": "x=y"}),
        ("a=[1, 2]", {"a": [1, 2]}),
    ],
)
def test_overrides(text, value):
    assert parse_override(text) == value


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1"])
def test_what_is_no_override(text):
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_override(text)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"- 1\n- 2\n", "list"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe\x00", "YAML"),
        (b"lr: 1e-3\nsteps: 3\nlr: 2e-3\n", "line 3: 'lr' is there already"),
        (b"model: {num_layers: 2, num_layers: 3}\n", "line 1: 'num_layers' is there"),
    ],
)
def test_broken_config_files(tmp_path, content, word):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=word):
        train_settings("--config", str(path))


def test_missing_config_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        train_settings("--config", str(tmp_path / "none.yaml"))
