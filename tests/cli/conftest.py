"""A tiny corpus, prepared data and a checkpoint; ways to run a command line."""

import json

import pytest
import torch

import metastate
from metastate.cli import main
from metastate.config import ModelConfig
from metastate.data.tokenizer import load_tokenizer
from metastate.model.lm import LanguageModel

WORDS = ["the", "state", "reads", "a", "token", "and", "every", "token", "writes", "it"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of JSON lines with two domains."""
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "text.jsonl", "w") as file:
        for i in range(60):
            text = " ".join(WORDS[(i * j) % len(WORDS)] for j in range(20, 20 + i % 7 * 5 + 10))
            domain = ("prose", "verse")[i % 2]
            file.write(json.dumps({"text": text, "meta": {"set": domain}}) + "\n")
    return folder


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory):
    """The corpus, prepared as bytes."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    argv = ["prepare", str(corpus), "--out", str(out)]
    assert main([*argv, "--valid-fraction", "0.1", "--test-fraction", "0.1"]) == 0
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small model of bytes with random weights."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_layers=2, num_heads=2)
    model = LanguageModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.tokenizer_info = load_tokenizer("bytes").info()
    path = tmp_path_factory.mktemp("run") / "model"
    metastate.save(model, path)
    return path


@pytest.fixture
def run(capsys):
    """Run a command line that must succeed; return standard output."""

    def call(*argv):
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def refused(capsys):
    """Run a command line that must fail with exit code 2; return its message."""

    def call(*argv):
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        message = captured.err[captured.err.index("error: ") :]
        assert "Traceback" not in message
        return message

    return call
