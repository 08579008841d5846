"""The inspector's numbers against slow direct computation."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metastate.config import MetaStateConfig
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import ConfigError, StateError
from metastate.infer.inspect import (
    LEVELS,
    MAP_SIZE,
    effective_rank,
    heat_map,
    inspect_prompt,
    inspect_state,
    readers,
)
from metastate.model.lm import LanguageModel
from tiny_models import tiny
from tolerance import TOLERANCE, relative_error

TOKENIZER = ByteTokenizer()
TEXT = "über den Zustand 🙂"
DIGITS = 1e-4  # relative; the answers are rounded to five digits


def make(architecture="metastate", dtype=torch.float32, memory_heads=None, **options):
    fields = {"memory_heads": memory_heads, "meta_state": MetaStateConfig(**options)}
    return tiny(architecture=architecture, **fields).to(dtype).eval()


@pytest.fixture(params=["encoding", "both", "memory", "rwkv7"])
def model(request):
    if request.param == "rwkv7":
        return make("rwkv7")
    if request.param == "memory":
        return make(memory_heads=1)
    return make(readout=request.param)


def with_memory(told):
    """Return what an answer tells of all matrices: of the layers', then of the memory's."""
    return [*told["layers"], *([] if told["memory"] is None else [told["memory"]])]


def direct_map(x, size):
    """Block by block, entry by entry."""
    block = math.ceil(x.shape[0] / size)
    out = []
    for i in range(0, x.shape[0], block):
        row = []
        for j in range(0, x.shape[1], block):
            entries = x[i : i + block, j : j + block].flatten().tolist()
            row.append(max(entries, key=abs))
        out.append(row)
    return block, torch.tensor(out, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3 * MAP_SIZE), seed=st.integers(0, 99))
def test_a_cell_is_the_largest_entry_of_its_block(n, seed):
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = heat_map(x)
    block, peaks = direct_map(x, MAP_SIZE)
    assert found["block"] == block and len(found["cells"]) <= MAP_SIZE
    cells = torch.tensor(found["cells"], dtype=torch.float64) * found["scale"] / LEVELS
    # half a step of the scale, and the rounding of the scale itself
    assert (cells - peaks).abs().max() <= found["scale"] * (0.5 / LEVELS + DIGITS)
    assert max(abs(c) for row in found["cells"] for c in row) == LEVELS


def test_a_zero_matrix_is_a_blank_picture_of_rank_zero():
    assert heat_map(torch.zeros(3, 3)) == {
        "size": 3,
        "scale": 0.0,
        "block": 1,
        "cells": [[0] * 3] * 3,
    }
    assert effective_rank(torch.zeros(2, 3, 3)).tolist() == [0, 0]


def test_effective_rank_counts_equal_directions():
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    for rank in range(1, 7):
        x = q[:, :rank] @ q[:, :rank].T
        assert float(effective_rank(x)) == pytest.approx(rank, rel=1e-9)
    values = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)  # entropy 1.5 ln 2
    assert float(effective_rank(torch.diag(7 * values))) == pytest.approx(2**1.5, rel=1e-12)


def test_a_state_is_described_as_it_is(model):
    _, state = model(torch.randint(1, 256, (1, 7)))
    found = inspect_state(state.detach(), model.config)
    json.dumps(found, allow_nan=False)
    assert found["tokens_seen"] == 7
    assert found["state_bytes"] == state.num_bytes == model.state_bytes()
    # keys and values, float32, of 2 layers of width 16, 7 tokens
    assert found["cache_bytes"] == 2 * 4 * 2 * 16 * 7
    assert len(found["layers"]) == 2
    assert (found["memory"] is None) == (model.config.memory_heads is None)
    for part, shown in zip(state.parts, with_memory(found), strict=True):
        assert set(shown) == {name for name in ("S", "M") if getattr(part, name, None) is not None}
        for name, heads in shown.items():
            matrices = getattr(part, name)[0].detach().double()
            assert [head["size"] for head in heads] == [x.shape[0] for x in matrices]
            for x, head in zip(matrices, heads, strict=True):
                norm = sum(float(entry) ** 2 for entry in x.flatten()) ** 0.5
                assert head["norm"] == pytest.approx(norm, rel=DIGITS)
                p = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
                p = p / p.sum()
                rank = math.exp(-sum(v * math.log(v) for v in p.tolist() if v > 0))
                assert head["effective_rank"] == pytest.approx(rank, rel=1e-3)
                cells = torch.tensor(head["cells"]) * head["scale"] / LEVELS
                assert (cells - x).abs().max() <= head["scale"] * (0.5 / LEVELS + DIGITS)


def test_the_cache_is_counted_in_the_models_own_number_format():
    model = make(dtype=torch.float64)
    _, state = model(torch.ones(1, 5, dtype=torch.int64))
    assert inspect_state(state.detach(), model.config)["cache_bytes"] == 2 * 8 * 2 * 16 * 5


def test_who_reads_what_follows_the_config():
    both = ["time mixing", "the Meta-State layer"]
    assert readers(make("rwkv7").config) == {"S": ["time mixing"]}
    assert readers(make().config) == {"S": both}  # the default layer has no M: S is read twice
    assert readers(make(readout="both").config) == {"S": both, "M": both[1:]}
    part = readers(make(encoder_size=4).config)["S"][1]
    assert part == "the Meta-State layer (its top-left 4 x 4 block)"
    assert readers(make("transformer").config) == {}
    corrects = ["what corrects the features before the head"]
    assert readers(make(memory_heads=1).config) == {"S": both, "memory": corrects}
    assert readers(make("transformer", memory_heads=2).config) == {"memory": corrects}


def test_a_transformers_state_has_no_pictures_but_bytes():
    model = make("transformer")
    _, state = model(torch.ones(1, 5, dtype=torch.int64))
    found = inspect_state(state.detach(), model.config)
    assert found["layers"] == [] and found["reads"] == {} and found["memory"] is None
    assert found["state_bytes"] == found["cache_bytes"] == 2 * 4 * 2 * 16 * 5
    with pytest.raises(ConfigError, match="keeps keys and values"):
        inspect_prompt(model, TOKENIZER, "ab")
    given = make("transformer", memory_heads=2)
    _, state = given(torch.ones(1, 5, dtype=torch.int64))
    found = inspect_state(state.detach(), given.config)
    assert found["layers"] == [] and [head["size"] for head in found["memory"]["M"]] == [8, 8]


def test_several_rows_are_refused(model):
    with pytest.raises(ConfigError, match=r"2 rows; inspect one"):
        inspect_state(model.init_state(2), model.config)


def test_a_prompt_token_by_token_equals_the_whole_text_run_again(model):
    found = inspect_prompt(model, TOKENIZER, TEXT)
    json.dumps(found, allow_nan=False)
    ids = [0, *TEXT.encode()]
    assert [token["id"] for token in found["tokens"]] == ids
    assert "".join(token["text"] for token in found["tokens"]) == TEXT
    states = [model.init_state(1)]
    with torch.no_grad():
        for end in range(1, len(ids) + 1):
            logits, state = model(torch.tensor([ids[:end]]))
            states.append(state)
    nats = torch.nn.functional.cross_entropy(
        logits[0, :-1].double(), torch.tensor(ids[1:]), reduction="none"
    )
    assert found["tokens"][0]["nats"] is None
    shown = torch.tensor([token["nats"] for token in found["tokens"][1:]])
    assert relative_error(shown, nats) < DIGITS
    for i, told in enumerate(with_memory(found)):
        first = states[0].parts[i]
        assert set(told) == {name for name in ("S", "M") if getattr(first, name, None) is not None}
        for name, record in told.items():
            run = torch.stack([getattr(s.parts[i], name)[0] for s in states]).double()
            norms = run[1:].square().sum((-1, -2)).sqrt()
            changes = (run[1:] - run[:-1]).square().sum((-1, -2)).sqrt()
            assert relative_error(torch.tensor(record["norms"]), norms) < DIGITS
            assert relative_error(torch.tensor(record["changes"]), changes) < DIGITS
    at_end = inspect_state(states[-1], model.config)
    assert found["state"].keys() == at_end.keys()
    assert found["state"]["tokens_seen"] == at_end["tokens_seen"] == len(ids)
    for shown, expected in zip(with_memory(found["state"]), with_memory(at_end), strict=True):
        for name in expected:
            for a, b in zip(shown[name], expected[name], strict=True):
                cells = torch.tensor(a.pop("cells")) - torch.tensor(b.pop("cells"))
                assert cells.abs().max() <= 1  # one step, where rounding falls the other way
                assert a == pytest.approx(b, rel=DIGITS)


def test_going_on_from_a_state_is_the_same_run(model):
    whole = inspect_prompt(model, TOKENIZER, "abcdef")
    first = torch.tensor([[0, *b"abc"]])
    with torch.no_grad():
        _, state = model(first)
    kept = {name: x.clone() for name, x in state.tensors().items()}
    rest = inspect_prompt(model, TOKENIZER, "def", state)
    assert [token["text"] for token in rest["tokens"]] == ["d", "e", "f"]
    for long, short in zip(with_memory(whole), with_memory(rest), strict=True):
        for name in long:
            for key in ("norms", "changes"):
                a, b = torch.tensor(short[name][key]), torch.tensor(long[name][key][4:])
                assert relative_error(a, b) < max(DIGITS, TOLERANCE[torch.float32])
    assert rest["state"]["tokens_seen"] == 7
    assert all(torch.equal(x, state.tensors()[name]) for name, x in kept.items())


def test_what_cannot_be_read_is_refused(model, monkeypatch):
    with pytest.raises(ConfigError, match="0 tokens; the inspector reads 1 to 511"):
        inspect_prompt(model, TOKENIZER, "")
    monkeypatch.setattr("metastate.infer.inspect.MAX_TOKENS", 4)
    with pytest.raises(ConfigError, match="4 tokens; the inspector reads 1 to 3"):
        inspect_prompt(model, TOKENIZER, "abcd")
    assert len(inspect_prompt(model, TOKENIZER, "abc")["tokens"]) == 4
    other = LanguageModel(model.config.replace(num_layers=3)).init_state(1)
    with pytest.raises(StateError):
        inspect_prompt(model, TOKENIZER, "abc", other)


def test_a_cut_character_is_told_at_the_end():
    found = inspect_prompt(make(), TOKENIZER, [0xC3, 0xBC, 0xC3])
    assert [token["text"] for token in found["tokens"]] == ["", "", "ü", "\ufffd"]
