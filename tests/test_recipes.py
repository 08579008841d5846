"""A mistake in a recipe's or a benchmark's arguments is a line and exit code 2, no traceback."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import metastate
from metastate.data.tokenizer import ByteTokenizer
from metastate.model.lm import LanguageModel
from metastate.model.presets import preset

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden_size": 16, "num_heads": 1, "num_layers": 1, "ffn_size": 16}
# DATA is prepared, CKPT a checkpoint, `plain` a folder of a text, `curve` a log, the rest not there
MISTAKES = {
    "recipes/dynamic_evaluation.py": [
        ("CKPT --data nowhere", "nowhere is not prepared data"),
        ("CKPT --data DATA --context 4", "has no 'test' split"),
        ("CKPT --data DATA --context 0", "--context: '0' is no whole number of at least 1"),
        ("CKPT --data DATA --context 9999", "no document of train has 9999 tokens"),
    ],
    "recipes/growth.py": [
        ("--data nowhere", "nowhere is not prepared data"),
        ("--data DATA --cells grow", "invalid choice: 'grow'"),
        ("--data DATA --lr -1", "lr is -1.0; it must be positive"),
    ],
    "recipes/growth_domains.py": [
        ("--text nowhere", "no such folder: nowhere"),
        ("--text plain", "the train split of plain has no records of other domains"),
    ],
    "recipes/lead.py": [
        ("--pair a nowhere nowhere", "cannot read the training log nowhere"),
        ("--pair a curve curve --positions nowhere nowhere", "nowhere is not what `metastate eval"),
        ("--pair a curve curve --positions {} {}", "{} is not what `metastate eval"),
    ],
    "recipes/long_context.py": [
        ("nowhere --text plain", "no checkpoint at nowhere"),
        ("CKPT --text plain", "plain has no valid.txt"),
        ("CKPT --text novels", "no text in novels has 32,768 bytes"),
    ],
    "recipes/released_rwkv7.py": [
        ("nowhere", "nowhere is not 260123_reverse_L2_only_rwkv7.pth"),
        ("{}", "{} is not 260123_reverse_L2_only_rwkv7.pth"),
    ],
    "recipes/train_bpe.py": [
        ("--data nowhere --out bpe.json", "nowhere is not prepared data"),
        ("--data DATA --out plain", "cannot write plain"),
    ],
    "recipes/upgrade.py": [
        ("--data nowhere", "nowhere is not prepared data"),
        ("--data DATA --steps none", "'none' is no whole number of at least 1"),
    ],
    "recipes/word_places.py": [
        ("CKPT --data DATA", "give checkpoints in pairs"),
        ("CKPT CKPT --data DATA --split more", "no 'more' split; it has train, valid"),
        ("nowhere CKPT --data DATA --split valid --context 4", "no checkpoint at nowhere"),
    ],
    "bench/decode.py": [("--size large", "unknown preset 'metastate-large'")],
    "bench/distributed.py": [("--predict 0", "'0' is no whole number of at least 1")],
    "bench/fla_ready.py": [("--layer 8 0", "'0' is no whole number of at least 1")],
    "bench/gpu.py": [("--dry --device nowhere", "device 'nowhere' cannot be used here")],
    "bench/ops.py": [("--heads 0", "'0' is no whole number of at least 1")],
    "bench/serve.py": [("--batches 1,0", "'0' is no whole number of at least 1")],
    "bench/train.py": [("--tokens 0", "'0' is no whole number of at least 1")],
}


def test_every_recipe_is_here():
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")} < MISTAKES.keys()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with what MISTAKES names."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "novels"):
        Path(name).mkdir()
    Path("plain/a.txt").write_text("one text")
    for name in ("valid", "test"):
        Path(f"novels/{name}.txt").write_text("short")
    Path("{}").write_text("{}")
    rows = [{"kind": "valid", "tokens": i, "nats_per_token": 1.0} for i in (1, 2)]
    Path("curve").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = ByteTokenizer()
    model = LanguageModel(preset("metastate-tiny", vocab_size=tokenizer.vocab_size, **SMALL))
    model.tokenizer_info = tokenizer.info()
    metastate.save(model, "checkpoint")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [(script, *case) for script, cases in MISTAKES.items() for case in cases],
)
def test_a_mistake_is_a_line(script, arguments, said, few_words, monkeypatch, capsys):
    given = {"DATA": str(few_words), "CKPT": "checkpoint"}
    argv = [given.get(word, word) for word in arguments.split()]
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.setattr(sys, "path", [str(ROOT / script.split("/")[0]), *sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2
    assert "error: " in last and said in last
