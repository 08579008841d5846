"""Saved continuations: states that have seen nothing begin a document; broken notes are refused."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from metastate.data.tokenizer import ByteTokenizer, StreamDecoder
from metastate.errors import StateError
from metastate.infer.generate import Continuation, generate
from metastate.infer.sampling import SamplingConfig
from metastate.model.state import ModelState
from tiny_models import tiny


@pytest.fixture
def model():
    return tiny(num_layers=1).eval()


@pytest.mark.parametrize("prompt", ["", "ab"])
def test_a_state_that_has_seen_nothing_begins_a_document(model, prompt, tmp_path):
    model.init_state(1).save(tmp_path / "s", model)
    loaded = Continuation.load(tmp_path / "s", model)
    runs = [
        generate(model, ByteTokenizer(), prompt, state=state, sampling=SamplingConfig(seed=3))
        for state in (None, model.init_state(1), loaded)
    ]
    tokens = [run.drain().tokens for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize(
    "notes",
    [
        "{",
        "[]",
        "7",
        "[" * 100_000,
        '{"unknown": 1}',
        '{"pending": 3}',
        '{"pending": ["a"]}',
        '{"pending": [-1]}',
        '{"pending": [256]}',
        '{"pending": [1.5]}',
        '{"history": [null]}',
        '{"recent": "ab"}',
        '{"shown": 7}',
        '{"seed": "x"}',
        '{"generator": "AAAA"}',
        '{"generator": 7}',
        '{"generator": "\\ud800"}',
    ],
)
def test_broken_notes_are_refused(model, notes, tmp_path):
    state = model.init_state(1)
    ModelState(state.layers, 5, {"generation": notes}).save(tmp_path / "s", model)
    with pytest.raises(StateError, match="the generation's notes are broken"):
        Continuation.load(tmp_path / "s", model)


def test_notes_of_any_length_cost_little(model, tmp_path):
    given = Continuation(model.init_state(1), pending=(65,), history=(66,) * 5000)
    given.save(tmp_path / "s", model)
    assert Continuation.load(tmp_path / "s", model).history == (66,) * StreamDecoder.LIMIT
    run = generate(model, ByteTokenizer(), "", state=given, max_tokens=0).drain()
    assert run.continuation.history == (66,) * StreamDecoder.LIMIT


@pytest.mark.parametrize(
    ("left", "place", "whole"),
    [(1, 0, True), (24, 601, True), (25, 601, False), (624, 600, False)],
)
def test_a_generator_that_would_read_behind_its_block(model, tmp_path, left, place, whole):
    generator = torch.Generator().manual_seed(0).get_state()
    generator[8:24].view(torch.int32)[::2] = torch.tensor([left, place], dtype=torch.int32)
    Continuation(model.init_state(1), (65,), generator=generator).save(tmp_path / "s", model)
    with contextlib.nullcontext() if whole else pytest.raises(StateError, match="notes are broken"):
        Continuation.load(tmp_path / "s", model)


def test_whole_notes_come_back(model, tmp_path):
    sampling = SamplingConfig(seed=0)
    run = generate(model, ByteTokenizer(), "ab", max_tokens=3, sampling=sampling, stop=["x" * 9])
    run.drain()
    state = replace(run.continuation.state, extra={"note": "kept"})
    replace(run.continuation, state=state).save(tmp_path / "s", model)
    again = Continuation.load(tmp_path / "s", model)
    assert again.state.extra["note"] == "kept"
    for name in ("pending", "history", "shown", "recent"):
        assert getattr(again, name) == getattr(run.continuation, name), name
        assert getattr(again, name), name
    notes = json.loads(again.state.extra["generation"])
    assert torch.equal(again.generator, run.continuation.generator) and notes["seed"] == run.seed


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_saved_half_goes_on_as_the_whole(model, tmp_path, backend, dtype):
    """Also where all weights are bfloat16: native decoding keeps float32 token shifts."""
    model.backend = backend
    model.to(dtype)
    sampling, tokenizer = SamplingConfig(seed=1), ByteTokenizer()
    whole = generate(model, tokenizer, "abc", sampling=sampling, max_tokens=8).drain()
    half = generate(model, tokenizer, "abc", sampling=sampling, max_tokens=4).drain()
    half.continuation.save(tmp_path / "s", model)
    again = Continuation.load(tmp_path / "s", model)
    rest = generate(model, tokenizer, state=again, sampling=sampling, max_tokens=4).drain()
    assert half.tokens + rest.tokens == whole.tokens
    theirs = rest.state.tensors()
    for name, x in whole.state.tensors().items():
        assert torch.equal(x, theirs[name]), name
