"""What an option says arrives where the work is done: a flag that nothing reads looks as one."""

import io

import pytest
import torch
from test_cli_compare import SUITE

import zero_shot_files
from metastate.cli import build_parser
from metastate.cli.options import PATHS
from metastate.errors import ConfigError
from metastate.infer.sampling import SamplingConfig
from metastate.mapping import to_dict

DRAWN = ("--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--repetition-penalty", "1.5")
SAMPLING = SamplingConfig(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.5, seed=7)


@pytest.fixture
def handed(monkeypatch, refused):
    """Run a command line up to its call of `target`; return what that is given."""

    def call(target, *argv):
        got = {}

        def record(*args, **options):
            got.update(options, args=args, rounds=torch.is_autocast_enabled("cpu"))
            raise ConfigError("recorded")

        monkeypatch.setattr(f"metastate.{target}", record)
        assert refused(*argv) == "error: recorded\n"
        return got

    return call


def test_how_tokens_are_drawn(checkpoint, handed):
    argv = ("generate", checkpoint, "--prompt", "a", *DRAWN, "--seed", 7, "--max-tokens", 9)
    got = handed("cli.commands.generate", *argv, "--stop", "x", "--stop", "y")
    assert (got["sampling"], got["max_tokens"], got["stop"]) == (SAMPLING, 9, ["x", "y"])


@pytest.mark.parametrize(
    ("argv", "text", "stop"),
    [
        ([], "User: {message}\n\nAssistant:", ["\n\nUser:"]),
        (["--template", "Q {message}\\nA"], "Q {message}\nA", ["\n\nQ"]),
        (["--stop", "x", "--stop", "y"], "User: {message}\n\nAssistant:", ["x", "y"]),
        (["--plain"], "{message}", []),
        (["--plain", "--stop", "x"], "{message}", ["x"]),
    ],
)
def test_chat(checkpoint, handed, argv, text, stop):
    got = handed("cli.chat.Chat", "chat", checkpoint, *DRAWN, "--seed", 7, *argv)
    *_, template, sampling, max_tokens = got["args"]
    assert (template.text, template.stop) == (text, stop)
    assert (sampling, max_tokens) == (SAMPLING, 512)


def test_chat_in_bfloat16(checkpoint, handed, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        got = handed("cli.chat.answer", "chat", checkpoint, "--dtype", dtype)
        assert got["rounds"] == (dtype == "bfloat16") and got["args"][1] == "hello"


def test_eval(checkpoint, data, handed):
    argv = ("eval", checkpoint, "--data", data, "--split", "test", "--batch-size", 3)
    got = handed("cli.commands.evaluate", *argv, "--by-position", "--limit-tokens", 40)
    assert got["args"][1].name == "test" and got["args"][0].embedding.weight.dtype == torch.float32
    assert (got["batch_size"], got["limit_tokens"]) == (3, 40)
    assert (got["by_position"], got["by_domain"]) == (True, False)
    got = handed("cli.commands.evaluate", *argv, "--by-domain", "--dtype", "float64")
    assert (got["by_position"], got["by_domain"]) == (False, True)
    assert got["args"][0].embedding.weight.dtype == torch.float64 and not got["rounds"]
    assert handed("cli.commands.evaluate", *argv, "--dtype", "bfloat16")["rounds"]


def test_prepare(tmp_path, handed):
    argv = ("prepare", "a", "b", "--out", tmp_path, "--valid", "v", "w", "--test", "t")
    argv += ("--valid-fraction", 0.25, "--test-fraction", 0.125, "--text-field", "body")
    got = handed("cli.commands.prepare", *argv, "--tokenizer", "world")
    assert got["args"] == (["a", "b"], "world", str(tmp_path)) and not got["overwrite"]
    assert (got["valid"], got["test"], got["text_field"]) == (["v", "w"], ["t"], "body")
    assert got["fractions"] == (0.625, 0.25, 0.125)
    assert handed("cli.commands.prepare", *argv, "--overwrite")["overwrite"]


def test_grow(checkpoint, tmp_path, handed):
    sizes = {"head_size": 1, "heads": 2, "layers": 3, "parameter_tokens": 4, "ffn_size": 5}
    sizes |= {"attention_slots": 6, "memory_heads": 7}
    argv = [x for k, n in sizes.items() for x in (f"--{k.replace('_', '-')}", n)]
    argv += ["--init", "random", "--seed", 8, "--out", tmp_path / "big"]
    got = handed("cli.growing.grow", "grow", checkpoint, *argv)
    sizes |= {"num_heads": sizes.pop("heads"), "num_layers": sizes.pop("layers")}
    del got["args"], got["rounds"]
    assert got == sizes | {"init": "random", "seed": 8}


def test_upgrade(checkpoint, tmp_path, handed):
    argv = ("upgrade", checkpoint, "--out", tmp_path / "big", "--seed", 7, "--layers", "0,1")
    got = handed("cli.growing.upgrade", *argv, "--set", "meta_state.readout=both", "--replace")
    assert (got["args"][1], got["seed"], got["replace"]) == ([0, 1], 7, True)
    assert got["meta_state"].readout == "both"


def test_tune_state(checkpoint, data, tmp_path, handed):
    settings = {"steps": 11, "batch_size": 3, "context": 17, "accumulate": 2, "seed": 7}
    settings |= {"schedule": "constant", "warmup": 1, "clip": 0.5, "valid_every": 4}
    settings |= {"valid_tokens": 99, "checkpoint_every": 6, "dtype": "float64"}
    argv = ["tune-state", checkpoint, "--data", data, "--out", tmp_path / "s"]
    more = [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", v)]
    got = handed("cli.training.tune", *argv, *more, "--parameter-tokens", 5)
    config = to_dict(got["args"][1])
    assert settings.items() <= config.items()
    assert (config["lr"], config["min_lr"], config["out"]) == (0.3, 0.03, str(tmp_path / "s"))
    assert (got["what"], got["parameter_tokens"], got["resume"]) == ("tokens", 5, False)
    got = handed("cli.training.tune", *argv, "--what", "state", "--resume")
    assert (got["what"], got["resume"], got["args"][1].lr) == ("state", True, 1.0)
    assert handed("cli.training.tune", *argv, "--lr", 0.5)["args"][1].lr == 0.5


def test_tasks(tmp_path, handed):
    argv = ("tasks", "recall", "--level", "16x2", "--vocab-size", 20, "--layers", 3, "--lr", 0.5)
    argv += ("--architectures", "rwkv7", "--width", 12, "--heads", 3, "--steps", 90)
    argv += ("--batch-size", 5, "--weight-decay", 0.25, "--seed", 7, "--out", tmp_path)
    _, model, train, _ = handed("cli.tasks.train_and_score", *argv)["args"]
    assert (model.hidden_size, model.num_heads, model.num_layers) == (12, 3, 3)
    assert (train.steps, train.batch_size, train.weight_decay, train.seed) == (90, 5, 0.25, 7)
    assert (train.lr, train.warmup) == (0.5, 9)
    *_, train, _ = handed("cli.tasks.train_and_score", *argv, "--warmup", 4)["args"]
    assert train.warmup == 4


def test_compare(tmp_path, data, handed):
    (tmp_path / "suite.yaml").write_text(f"data: nowhere\n{SUITE}")
    argv = ("compare", tmp_path / "suite.yaml", "--out", tmp_path / "out", "--data", data)
    got = handed("cli.comparing.compare", *argv)
    assert got["args"][0].data == str(data) and not got["match_params"]
    assert handed("cli.comparing.compare", *argv, "--match-params")["match_params"]


def test_serve(checkpoint, tmp_path, handed):
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    flags = {"max_slots": 2, "max_waiting": 3, "max_concurrent": 4, "max_prompt_tokens": 5}
    flags |= {"max_tokens": 6, "max_states": 7, "max_state_mib": 8, "timeout": 9.5, "grace": 0.5}
    argv = [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v)]
    argv = ["serve", checkpoint, "--port", 0, "--state-dir", tmp_path / "states", *argv]
    (tmp_path / "template").write_text("mine")
    argv += ["--template", tmp_path / "template"]
    engine, store, config, template = handed("infer.server.create_app", *argv)["args"]
    assert (engine.max_slots, engine.max_waiting) == (2, 3)
    assert (store.max_states, store.max_bytes) == (7, 8 * 2**20)
    assert store.folder == tmp_path / "states"
    assert (config.max_concurrent, config.max_prompt_tokens, config.max_tokens) == (4, 5, 6)
    assert (config.timeout_s, config.grace_s, config.keys) == (9.5, 0.5, ())
    assert config.model_name == checkpoint.name and "127.0.0.1" in config.hosts
    assert template.render([], continued=False)[0] == "mine"
    argv = ("serve", checkpoint, "--port", 0, "--model-name", "other")
    (tmp_path / "keys").write_text("a-key-of-enough-characters")
    for more in (("--host", "0.0.0.0"), ("--api-key-file", tmp_path / "keys")):
        config = handed("infer.server.create_app", *argv, *more)["args"][2]
        assert config.model_name == "other" and not config.hosts


def test_eval_tasks(checkpoint, tmp_path, handed):
    tasks = zero_shot_files.write(tmp_path / "tasks")
    argv = ("eval-tasks", checkpoint, "--data", tasks, "--tasks", "piqa", "--limit", 1)
    got = handed("cli.zero_shot.evaluate_items", *argv, "--batch-size", 3)
    assert (got["args"][2], len(got["args"][3]), got["batch_size"]) == ("piqa", 1, 3)
    assert handed("cli.zero_shot.evaluate_items", *argv, "--dtype", "bfloat16")["rounds"]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("prepare", "out"), ("eval", "data"), ("eval-tasks", "data"), ("lm-eval", "tasks")),
        *(("tune-state", "data"), ("tune-state", "out"), ("grow", "out"), ("upgrade", "out")),
        *(("convert", "out"), ("compare", "out")),
    ],
)
def test_what_a_command_cannot_do_without_is_asked_for(command, name, refused):
    others = {"data", "out"} & set(vars(build_parser()[1][command].parse_args(["x"]))) - {name}
    given = [x for other in others for x in (f"--{other}", "x")]
    assert f"--{name} is missing" in refused(command, "x", *given)


def test_a_tilde_is_a_home_in_every_path():
    kinds = {"CKPT", "CKPT|PRESET|STATE|DATA", "SRC", "DST"}
    kinds |= {"SUITE.yaml", "FILE", "DIR", "DATA", "OUT"}
    _, commands = build_parser()
    paths = {a.dest for c in commands.values() for a in c._actions if a.metavar in kinds}
    assert paths == {*PATHS, "template"}  # which is expanded where it is read
