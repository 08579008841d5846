"""Checkpoints and states on disk: bitwise round trips, and every way a file can be wrong."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import GROWN, SIZES, WITH_M, build

import metastate
from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import CheckpointError, StateError
from metastate.growth import grow
from metastate.mapping import to_dict
from metastate.model import io
from metastate.model.decode import store_bfloat16
from metastate.model.io import pinned
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState
from metastate.model.weights import _mark, weights_hash
from state_files import signed
from tolerance import TOLERANCE, relative_error

MODELS = {
    "metastate": GROWN | {"meta_state": MetaStateConfig(**WITH_M)},
    "cross": {
        "meta_state": MetaStateConfig(**WITH_M, encoder="cross", latent_size=2, token_shift=True)
    },
    "encoding": {"meta_state": MetaStateConfig(readout="encoding")},
    "rwkv7": {"architecture": "rwkv7"},
    "transformer": {"architecture": "transformer"},
    "memory": {"memory_heads": 2},
    "memory-inside": {"memory_heads": 2, "memory_layer": 1},
}
TOKENS = torch.arange(24).view(2, 12) % SIZES["vocab_size"]


@pytest.fixture(params=MODELS)
def model(request):
    return made(request.param)


def made(name, dtype=torch.float32, **fields):
    model = build(**(MODELS[name] | fields)).to(dtype)
    model.backend = "chunked"
    return model


@pytest.fixture
def saved(tmp_path):
    model = made("metastate")
    metastate.save(model, tmp_path / "a")
    return tmp_path / "a"


def edit(folder, **changes):
    file = folder / "config.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | changes))


# Checkpoints.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_model_comes_back_bitwise(model, tmp_path, dtype):
    model.to(dtype)
    model.lineage = [{"parent": "0" * 64, "step": 0, "before": to_dict(model.config)}]
    model.tokenizer_info = {"kind": "bytes", "vocab_size": 256}
    metastate.save(model, tmp_path / "deep" / "er")
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = metastate.load(str(tmp_path / "deep" / "er"))
    again.backend = "chunked"
    assert again.config == model.config
    assert again.lineage == model.lineage
    assert again.tokenizer_info == model.tokenizer_info
    own, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert own.keys() == theirs.keys()
    for name, p in own.items():
        assert p.dtype == theirs[name].dtype and torch.equal(p, theirs[name]), name
        assert theirs[name].requires_grad
    if dtype != torch.bfloat16:
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


def test_saving_again_replaces_and_the_loaded_model_stays_itself(saved):
    first = metastate.load(saved)
    other = made("metastate")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    metastate.save(other, saved)
    assert torch.equal(metastate.load(saved).head.weight, other.head.weight)
    assert torch.equal(first.head.weight, made("metastate").head.weight)


def test_a_run_folder_stands_for_its_last_checkpoint(tmp_path):
    model = made("metastate")
    metastate.save(model, tmp_path / "run" / "last")
    assert torch.equal(metastate.load(tmp_path / "run").head.weight, model.head.weight)


def test_a_link_that_moves_is_followed_once(tmp_path):
    """As RUN/last while a run goes on."""
    for name in ("one", "two"):
        metastate.save(made("metastate"), tmp_path / name)
    (tmp_path / "last").symlink_to("one")
    for path in (tmp_path, tmp_path / "last"):
        assert pinned(path) == tmp_path / "one"
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("two")
    assert pinned(tmp_path) == tmp_path / "two" == pinned(tmp_path / "two")


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        metastate.load(path)
    assert str(path) in str(caught.value)


def test_nothing_there(tmp_path):
    refused(tmp_path / "none", "no checkpoint at .* no config.json there")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json there; name the folder of a run, RUN .*RUN/best")
    with pytest.raises(CheckpointError) as caught:
        metastate.load("runs/mine/bst")
    assert len(str(caught.value)) < 150  # it once listed every preset
    with pytest.raises(CheckpointError, match="did you mean the preset 'metastate-tiny'"):
        metastate.load("metastate-tinny")
    with pytest.raises(CheckpointError, match="is a preset, which nothing has trained"):
        io.read_config("metastate-tiny")
    (tmp_path / "file.pth").write_text("x")
    refused(tmp_path / "file.pth", "no config.json there; .*`metastate convert`")


def test_a_run_without_a_best_checkpoint_has_a_last_one(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "last")
    refused(tmp_path / "run" / "best", "not been validated yet, its last checkpoint is .*last")


def test_missing_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors is missing; the checkpoint is not whole")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_weights(saved, keep):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(saved, "no whole safetensors file .* corrupt or cut off")


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\xff" * 64, bytes(64)])
def test_garbage_weights(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    refused(saved, "corrupt or cut off")


def test_a_pickle_is_never_read(saved):
    torch.save({"x": torch.ones(2)}, saved / "model.safetensors")
    refused(saved, "no whole safetensors file")


def test_foreign_weights(saved):
    other = {f"x{i}": torch.ones(2) for i in range(9)}
    safetensors.torch.save_file(other, saved / "model.safetensors")
    refused(saved, "has no tensor 'embedding.weight'; it is of another model")


def test_weights_of_another_size_and_kind(saved):
    metastate.save(made("metastate", vocab_size=24), saved / "b")
    (saved / "b" / "config.json").write_text((saved / "config.json").read_text())
    refused(saved / "b", r"embedding.weight is \[24, 12\], the config needs \[23, 12\]")
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    extra = tensors | {"blocks.7.ln1.weight": torch.ones(2)}
    safetensors.torch.save_file(extra, saved / "model.safetensors")
    refused(saved, "'blocks.7.ln1.weight', which this model does not have")
    whole = tensors | {"ln0.bias": torch.ones(12, dtype=torch.int64)}
    safetensors.torch.save_file(whole, saved / "model.safetensors")
    refused(saved, "ln0.bias is int64; allowed: float16, bfloat16, float32, float64")
    odd = tensors["head.weight"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors | {"head.weight": odd}, saved / "model.safetensors")
    refused(saved, "head.weight is float8_e4m3fn; allowed")


def test_weights_of_several_number_formats(saved, tmp_path):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    mixed = tensors | {"head.weight": tensors["head.weight"].half()}
    safetensors.torch.save_file(mixed, saved / "model.safetensors")
    refused(saved, r"several types \(float16, float32\); choose a dtype")
    model = metastate.load(saved, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    store_bfloat16(model)
    with pytest.raises(CheckpointError, match="several types"):
        metastate.save(model, tmp_path / "mixed")
    tensors["head.weight"][0, :2] = torch.tensor([7e4, torch.inf])
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="head.weight has 1 values beyond 65504.*float16"):
        metastate.load(saved, dtype=torch.float16)
    assert metastate.load("rwkv7-tiny", dtype=torch.float16).head.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lineage": 5}, "lineage is 5; a list of mappings"),
        ({"lineage": [5]}, "lineage is .5.; a list of mappings"),
        ({"lineage": {}}, "lineage is {}"),
        ({"lineage": [{"before": {}}]}, "config.json: lineage has .* without the step"),
        ({"lineage": [{"step": 3}]}, "config.json: lineage.before"),
        ({"lineage": [{"step": 3, "before": {"x": 1}}]}, "config.json: .*lineage.before"),
        ({"step": "x"}, "step is 'x'; a count"),
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"tokenizer": "bytes"}, "tokenizer is 'bytes'; its record"),
        ({"tokenizer": [1]}, r"tokenizer is \[1\]"),
        ({"tokenizer": {"kind": ["json"]}}, "tokenizer.kind is .*; str is needed"),
        ({"tokenizer": {"kind": "json", "path": 5}}, "tokenizer.path is 5"),
    ],
    ids=str,
)
def test_a_record_of_the_wrong_kind(saved, change, message):
    edit(saved, **change)
    refused(saved, message)


def test_a_record_may_say_nothing(saved):
    edit(saved, lineage=None, step=None, tokenizer=None)
    model = metastate.load(saved)
    assert (model.lineage, model.step, model.tokenizer_info) == ([], 0, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no metastate checkpoint's config"),
        ('{"architectures": ["LlamaForCausalLM"]}', "no metastate checkpoint's config"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("[" * 200_000, "cannot be read"),
    ],
)
def test_broken_or_foreign_config(saved, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (saved / "config.json").write_bytes(content)
    refused(saved, message)


def test_newer_versions(saved):
    original = (saved / "config.json").read_text()
    for version in (2, "1", None, True, 0, -3):
        edit(saved, version=version)
        refused(saved, "reads up to 1; install a newer metastate")
    (saved / "config.json").write_text(original)
    edit(saved, model=json.loads(original)["model"] | {"version": 2})
    refused(saved, "version 2, this program reads up to 1; install a newer metastate")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 10_000},
        {"hidden_size": 2**30, "head_size": None, "input_slices": None, "head_segments": None},
        {"num_heads": 2**20, "head_size": 2**10, "head_segments": [2**10]},
        {"vocab_size": 2**31 - 1},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_a_config_far_beyond_its_file_is_refused_before_anything_is_built(
    saved, sizes, monkeypatch
):
    fields = json.loads((saved / "config.json").read_text())["model"]
    edit(saved, model=fields | sizes)
    monkeypatch.setattr("metastate.model.io.LanguageModel", None)
    refused(saved, "values, the config needs more than")


def test_more_blocks_than_the_file_has_tensors_are_refused_before_they_are_built(
    tmp_path, monkeypatch
):
    metastate.save(LanguageModel(ModelConfig(vocab_size=8, hidden_size=4, num_heads=1)), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())["model"]
    edit(tmp_path, model=fields | {"num_layers": 1000})
    monkeypatch.setattr("metastate.model.io.LanguageModel", None)
    monkeypatch.setattr("metastate.model.io.sketch", None)
    refused(tmp_path, "tensors, the config says 1,000 blocks")


def test_a_name_that_no_folder_can_have():
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be read|no checkpoint at"):
            metastate.load(name)


def test_unknown_and_wrong_settings(saved):
    fields = json.loads((saved / "config.json").read_text())["model"]
    edit(saved, model=fields | {"num_layer": 3})
    refused(saved, "unknown key 'num_layer' in model; did you mean 'num_layers'")
    edit(saved, model=fields | {"meta_state": {"upadte": "self"}})
    refused(saved, "unknown key 'upadte'.*'update'")
    edit(saved, model=fields | {"num_layers": "two"})
    refused(saved, "num_layers is 'two'; int is needed")
    edit(saved, model=None)
    refused(saved, "mapping of settings is needed")


# States.


def parts_of(path):
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    return header, safetensors.torch.load_file(path)


def write_signed(path, header, tensors):
    path.write_bytes(signed(tensors, header))


def run(model, state=None, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, state)


def test_a_saved_state_continues_bitwise(model, tmp_path):
    _, state = run(model)
    state.extra["pending"] = "7"
    state.save(tmp_path / "s.safetensors", model.config)
    again = ModelState.load(tmp_path / "s.safetensors", model)
    assert again.tokens_seen == 12
    assert again.extra == {"pending": "7"}
    assert again.num_bytes == state.num_bytes
    for name, x in state.tensors().items():
        assert torch.equal(again.tensors()[name], x), name
    assert torch.equal(run(model, again)[0], run(model, state)[0])


def test_the_first_state_can_be_saved(model, tmp_path):
    for batch in (1, 3):
        state = model.init_state(batch)
        state.save(tmp_path / "s", model.config)
        again = ModelState.load(tmp_path / "s", model)
        tokens = TOKENS[:1].expand(batch, -1)
        assert torch.equal(run(model, again, tokens)[0], run(model, None, tokens)[0])


def test_a_state_of_packed_documents_can_be_saved(model, tmp_path):
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 5] = True
    with torch.no_grad():
        _, state = model(TOKENS, resets=resets)
    state.save(tmp_path / "s", model.config)
    again = ModelState.load(tmp_path / "s", model)
    assert torch.equal(run(model, again)[0], run(model, state)[0])


def test_rows(model):
    _, state = run(model)
    logits, _ = run(model, state)
    for rows in (slice(0, 1), slice(1, None), torch.tensor([1, 0, 1])):
        part = state[rows]
        assert part.batch_size == len(TOKENS[rows])
        torch.testing.assert_close(run(model, part, TOKENS[rows])[0], logits[rows])
    for row in (0, 1, -1):
        assert state[row].batch_size == 1
        torch.testing.assert_close(run(model, state[row], TOKENS[row][None])[0][0], logits[row])
    for row in (np.int64(1), torch.tensor(1), np.array(1)):
        assert all(torch.equal(x, state[1].tensors()[n]) for n, x in state[row].tensors().items())
    for row in (2, -3, np.int64(2), torch.tensor(-3)):
        with pytest.raises(IndexError, match=f"row {row} of a state with 2 rows"):
            state[row]
    assert state[:].num_bytes == state.num_bytes
    if model.recurrent:
        assert state[0].num_bytes * 2 == state.num_bytes


def test_clone_detach_and_freezing(model):
    _, state = model(TOKENS)
    assert any(x.requires_grad for x in state.tensors().values())
    cut = state.detach()
    assert not any(x.requires_grad for x in cut.tensors().values())
    assert cut.tokens_seen == state.tokens_seen == 12
    copy = cut.clone()
    for name, x in copy.tensors().items():
        assert x.data_ptr() != cut.tensors()[name].data_ptr()
        x.zero_()
    assert any(x.any() for x in cut.tensors().values())
    with pytest.raises(AttributeError):
        state.tokens_seen = 0
    with pytest.raises(AttributeError):
        state.layers[0].time_shift = None
    assert {x.device.type for x in state.to("meta").tensors().values()} == {"meta"}


@pytest.mark.parametrize("other", MODELS)
def test_a_state_of_another_configuration_is_refused(model, other, tmp_path):
    other = made(other)
    run(other)[1].save(tmp_path / "s", other.config)
    if other.config == model.config:
        ModelState.load(tmp_path / "s", model)
        return
    with pytest.raises(StateError, match="made by a model of another configuration"):
        ModelState.load(tmp_path / "s", model)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_states(model, tmp_path, keep):
    run(model)[1].save(tmp_path / "s", model.config)
    content = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(content[:keep])
    with pytest.raises(StateError, match="no whole safetensors file"):
        ModelState.load(tmp_path / "s", model)


def test_foreign_states(model, tmp_path):
    with pytest.raises(StateError, match="no state file at"):
        ModelState.load(tmp_path / "none", model)
    metastate.save(model, tmp_path)
    with pytest.raises(StateError, match="no metastate state"):
        ModelState.load(tmp_path / "model.safetensors", model)
    run(model)[1].save(tmp_path / "s", model.config)
    header, tensors = parts_of(tmp_path / "s")
    for change, message in [
        ({"version": "3"}, "version 3; install a newer"),
        ({"version": "x"}, "broken header"),
        ({"version": "0"}, "broken header"),
        ({"version": "-1"}, "broken header"),
        ({"tokens_seen": "many"}, "broken header"),
        ({"tokens_seen": "-1"}, "broken header"),
        ({"tokens_seen": "9" * 30}, "broken header"),
        ({"tokens_seen": "9" * 9999}, "broken header"),
        ({"extra": "{"}, "broken header"),
        ({"extra": "[]"}, "broken header"),
        ({"extra": '{"a": 1}'}, "broken header"),
        ({"extra": "[" * 100_000}, "broken header"),
        ({"config": None}, "broken header"),
    ]:
        write_signed(tmp_path / "t", header | change, tensors)
        with pytest.raises(StateError, match=message):
            ModelState.load(tmp_path / "t", model)
    for change in ({"digest": None}, {"digest": "0"}, {"tokens_seen": "7"}, {"weights": "0"}):
        new = {k: v for k, v in (header | change).items() if v is not None}
        safetensors.torch.save_file(tensors, tmp_path / "t", new)
        with pytest.raises(StateError, match="changed or damaged|broken header"):
            ModelState.load(tmp_path / "t", model)


def test_states_with_wrong_tensors(tmp_path):
    model = made("metastate")
    run(model)[1].save(tmp_path / "s", model.config)
    header, tensors = parts_of(tmp_path / "s")
    S = tensors["layers.1.S"]
    poisoned = S.clone()
    poisoned[0, 0, 0, 0] = torch.nan
    missing = {k: v for k, v in tensors.items() if k != "layers.1.S"}
    none = {k: v[:0].clone() for k, v in tensors.items()}
    factors = {f"layers.{i}.token_{k}": S[0, :, :3] for i in (0, 1) for k in ("keys", "values")}
    for wrong, message in [
        (missing, "no whole state of layer 1"),
        ({}, "no whole state of layer 0"),
        (none, "holds no rows"),
        (tensors | {"layers.1.keys": S.clone()}, "no whole state of layer 1"),
        (tensors | {"layers.1.token_keys": S.clone()}, "no whole state of layer 0"),
        (tensors | {"layers.2.S": S.clone()}, "holds 3 layers, the model 2"),
        (tensors | {"layers.99999999.S": S.clone()}, "which no state has"),
        (tensors | {"layers.0.length": S.clone()}, "which no state has"),
        (tensors | {"x" * 999: S.clone()}, "which no state has"),
        (tensors | {"layers.1.S": S[:1].clone()}, "layers.1.S is .1, 2, 8, 8., the model needs"),
        (tensors | {"layers.1.S": S[..., :3].clone()}, "layers.1.S is .2, 2, 8, 3."),
        ({k: v for k, v in tensors.items() if k != "layers.0.M"}, "layers.0.M is None"),
        (tensors | {"layers.0.S": S.long()}, "layers.0.S is torch.int64"),
        (tensors | {"layers.0.S": S.to(torch.float8_e5m2)}, "float16 to float64 needed"),
        (tensors | {"layers.0.S": S[0, 0, 0, 0]}, "layers.0.S is a single number"),
        (tensors | {"layers.1.S": poisoned}, "layers.1.S is not finite"),
        (factors | {"layers.0.token_keys": S[0, :, :2]}, "token_values is .*; floats .2, P, 8."),
        (factors | {"layers.1.token_values": S[:, :, :3]}, "token_values is .*; floats"),
        (factors | {"layers.1.token_keys": S[0, 0, 0]}, "token_keys is .*; floats"),
        (factors | {"layers.1.token_keys": S[0, :, :3] * torch.inf}, "not finite"),
        ({k: v for k, v in factors.items() if "1.token_v" not in k}, "no whole state of layer 1"),
    ]:
        write_signed(tmp_path / "t", header, wrong)
        with pytest.raises(StateError, match=message):
            ModelState.load(tmp_path / "t", model)


def test_memories_with_wrong_tensors(tmp_path):
    model = made("memory")
    run(model)[1].save(tmp_path / "s", model.config)
    header, tensors = parts_of(tmp_path / "s")
    M, S = tensors["memory.M"], tensors["layers.0.S"]
    factors = {f"layers.{i}.token_{k}": S[0, :, :3] for i in (0, 1) for k in ("keys", "values")}
    for wrong, message in [
        *(
            ({k: v for k, v in tensors.items() if k != f"memory.{name}"}, "no whole state of the")
            for name in ("M", "key", "features")
        ),
        (tensors | {"memory.expected": M.clone()}, "which no state has"),
        (tensors | {"errors.M": M.clone()}, "which no state has"),
        (tensors | {"memory.M": M[:, :1].clone()}, "memory.M is .2, 1, 6, 6., the model needs"),
        ({k: v for k, v in tensors.items() if "memory" not in k}, "no surprise memory, the model"),
        (factors | {"memory.M": M.clone()}, "of a memory; of no model"),
    ]:
        write_signed(tmp_path / "t", header, wrong)
        with pytest.raises(StateError, match=message):
            ModelState.load(tmp_path / "t", model)


def test_caches_with_wrong_tensors(tmp_path):
    model = made("transformer")
    run(model)[1].save(tmp_path / "s", model.config)
    header, tensors = parts_of(tmp_path / "s")
    keys = tensors["layers.1.keys"]
    for wrong, message in [
        ({"layers.1.keys": keys[0, 0, 0]}, "no whole state of layer 1"),
        ({"layers.1.keys": keys[:, :, :5]}, "layers.1.values is"),
        ({"layers.1.values": keys[:, :1]}, "layers.1.values is"),
        ({"layers.1.values": keys.long()}, "layers.1.values is"),
        ({"layers.1.start": torch.tensor([0, 12])}, "layers.1.start is outside"),
        ({"layers.1.start": torch.tensor([-1, 0])}, "layers.1.start is outside"),
        ({"layers.1.start": torch.tensor([0.0, 0.0])}, "layers.1.start is"),
        ({"layers.1.start": torch.tensor([0])}, "layers.1.start is"),
        ({"layers.1.values": keys / 0}, "not finite"),
        ({f"layers.{i}.{k}": keys[:, :, :7] for i in (1,) for k in ("keys", "values")}, "tokens"),
    ]:
        write_signed(tmp_path / "t", header, tensors | wrong)
        with pytest.raises(StateError, match=message):
            ModelState.load(tmp_path / "t", model)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damaged_bit_goes_unseen(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    model = made("rwkv7")
    if not (folder / "whole").exists():
        state = run(model)[1]
        state.extra["note"] = "some text"
        state.save(folder / "whole", model.config)
    content = bytearray((folder / "whole").read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    most = data.draw(st.sampled_from([16, header_end, len(content)]))
    place = data.draw(st.integers(0, most - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "flipped").write_bytes(content)
    with pytest.raises(StateError):
        ModelState.load(folder / "flipped", model)


def test_files_of_version_1_still_load(model, tmp_path):
    state = run(model)[1]
    state.save(tmp_path / "s", model.config)
    header, tensors = parts_of(tmp_path / "s")
    old = {k: header[k] for k in ("format", "tokens_seen", "config", "extra")}
    safetensors.torch.save_file(tensors, tmp_path / "old", old | {"version": "1"})
    again = ModelState.load(tmp_path / "old", model)
    assert again.tokens_seen == 12
    assert torch.equal(run(model, again)[0], run(model, state)[0])


def test_a_state_of_other_weights_needs_leave(model, tmp_path):
    state = run(model)[1]
    state.save(tmp_path / "s", model)
    ModelState.load(tmp_path / "s", model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-3
    with pytest.raises(StateError, match="other weights of this configuration.*--allow-other"):
        ModelState.load(tmp_path / "s", model)
    again = ModelState.load(tmp_path / "s", model, allow_other_weights=True)
    for name, x in state.tensors().items():
        assert torch.equal(again.tensors()[name], x), name


def test_a_state_comes_in_the_models_number_format(tmp_path):
    model = made("metastate", torch.float64)
    state = run(model)[1]
    state.save(tmp_path / "s", model)
    single = made("metastate", torch.float32)
    with pytest.raises(StateError, match="to another number format"):
        ModelState.load(tmp_path / "s", single)
    again = ModelState.load(tmp_path / "s", single, allow_other_weights=True)
    assert {x.dtype for x in again.tensors().values()} == {torch.float32}
    logits, expected = run(single, again)[0], run(model, state)[0]
    assert relative_error(logits, expected) < TOLERANCE[torch.float32]


def test_a_state_in_float32_is_not_rounded_to_a_model_of_16_bits(tmp_path):
    """Native decoding leaves such states behind."""
    state, half = run(made("metastate", torch.float32))[1], made("metastate", torch.bfloat16)
    state.save(tmp_path / "s", half)
    again = ModelState.load(tmp_path / "s", half)
    for name, x in again.tensors().items():
        assert torch.equal(x, state.tensors()[name]), name


def test_the_weights_hash_is_kept_until_the_weights_change(monkeypatch):
    model = made("metastate")
    made_anew = []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda head: made_anew.append(0) or real(head))
    first = weights_hash(model)
    assert weights_hash(model) == first and len(made_anew) == 1
    assert weights_hash(copy.deepcopy(model)) == first and len(made_anew) == 2
    weight = model.head.weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]  # the sum of the bits stays
    second = weights_hash(model)
    assert second != first
    weight.data.mul_(2)  # no version counter is raised
    third = weights_hash(model)
    assert third not in (first, second)
    weight.data = weight.data.flip(0)  # nor here, and the sum of the bits stays too
    assert weights_hash(model) not in (first, second, third)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)  # nor by fused optimizers
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weights_hash(model) not in (first, second, third)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_model_has_the_hash_of_its_file(stored, tmp_path):
    """However the weights were cast for the work at hand; but any change of them is seen."""
    original = made("metastate", stored)
    first = weights_hash(original)
    metastate.save(original, tmp_path / "a")
    casts = [
        lambda m: m,
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: store_bfloat16(m.float()) or m,
    ]
    for cast in casts:
        model = cast(metastate.load(tmp_path / "a"))
        assert weights_hash(model) == first
        name, p = list(model.named_parameters())[3]
        with torch.no_grad():
            p.view(-1)[0] *= 2
        assert weights_hash(model) != first, name
    model = metastate.load(tmp_path / "a").float()
    p = model.blocks[0].time_mix.key.weight
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=1e-3, fused=True).step()
    assert weights_hash(model) != first
    assert weights_hash(grow(model, num_layers=3)) != weights_hash(model)
    other = metastate.load(tmp_path / "a")
    with torch.no_grad():
        other.ln0.bias[0] += 1  # in memory that the tensors of the file share
    assert weights_hash(other.float()) != first
    metastate.save(model, tmp_path / "b")
    assert weights_hash(metastate.load(tmp_path / "b")) == weights_hash(model)


@pytest.mark.parametrize("size", [5, 8, 41, 2**17 + 3])
def test_a_mark_sees_where_bits_are(size):
    x = torch.randn(size).bfloat16()
    seen = {_mark(x)}
    for a, b in ((0, 1), (0, size - 1), (size // 2, size - 2)):
        other = x.clone()
        other[a], other[b] = x[b], x[a]
        seen.add(_mark(other.clone()))
    assert len({mark[1:] for mark in seen}) == 4


def test_a_copy_of_a_loaded_model_has_the_hash_of_the_file(saved):
    first = weights_hash(metastate.load(saved))
    model = metastate.load(saved)
    other = copy.deepcopy(model).bfloat16()
    assert weights_hash(other) == first
    assert other.stored is model.stored


def test_a_cast_model_takes_states_of_its_new_number_format(tmp_path):
    model = made("metastate")
    run(model)  # which looks at what its states are like
    model.double()
    _, state = run(model, run(model)[1])
    state.save(tmp_path / "s", model)
    again = ModelState.load(tmp_path / "s", model)
    for name, x in state.tensors().items():
        assert torch.equal(x, again.tensors()[name]) and x.dtype == again.tensors()[name].dtype


# Rows.


def test_a_state_is_shown_in_a_line(model):
    _, state = model(torch.zeros(2, 3, dtype=torch.long))
    size = f"tokens_seen=3, num_bytes={state.num_bytes})"
    assert repr(state) == f"ModelState({len(state.layers)} layers, batch_size=2, {size}"


def test_stacked_states_are_the_batch(model):
    alone = [run(model, None, TOKENS[i : i + 1])[1] for i in (0, 1)]
    both = ModelState.stack(alone)
    assert both.batch_size == 2 and both.tokens_seen == 12
    logits, _ = run(model, both)
    for i, part in enumerate(both.unstack()):
        torch.testing.assert_close(run(model, part, TOKENS[i : i + 1])[0][0], logits[i])
        for name, x in part.tensors().items():
            assert torch.equal(x, alone[i].tensors()[name]), name
            assert x.data_ptr() != both.tensors()[name].data_ptr()
    assert ModelState.stack([both, both[0]]).batch_size == 3
    later = replace(alone[1], tokens_seen=20)
    assert ModelState.stack([alone[0], later]).tokens_seen == 20
    noted = [replace(part, extra={"pending": "7"}) for part in alone]
    assert ModelState.stack(noted).extra == {"pending": "7"}
    assert ModelState.stack([noted[0], alone[1]]).extra == {}


def test_stacking_keeps_document_starts():
    model = made("transformer")
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 5] = True
    with torch.no_grad():
        _, state = model(TOKENS, resets=resets)
        plain = run(model)[1]
    mixed = ModelState.stack([plain, state])
    assert torch.equal(mixed.layers[0].start, torch.tensor([0, 0, 5, 0]))
    assert torch.equal(run(model, mixed[2:])[0], run(model, state)[0])


def test_what_cannot_be_stacked_is_refused():
    state, cache = run(made("metastate"))[1], run(made("transformer"))[1]
    longer = run(made("transformer"), cache)[1]
    deep = run(made("metastate", num_layers=3))[1]
    without = run(made("encoding", **GROWN))[1]
    for states, message in [
        ([], "no states"),
        ([state, cache], "different shapes"),
        ([cache, longer], "different shapes"),
        ([state, without], "different shapes"),
        ([state, deep], "different numbers of layers"),
    ]:
        with pytest.raises(StateError, match=message):
            ModelState.stack(states)


def test_one_row_expands(model):
    state = run(model, None, TOKENS[:1])[1]
    rows = state.expand(2)
    logits, end = run(model, rows)
    for i in (0, 1):
        torch.testing.assert_close(run(model, state, TOKENS[i : i + 1])[0][0], logits[i])
    assert end.batch_size == 2
    with pytest.raises(StateError, match="holds 2 rows; one is needed"):
        rows.expand(2)


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    model = LanguageModel(ModelConfig(**SIZES))
    state = model.init_state(1)
    state.save(tmp_path / "s", model.config)
    before = (tmp_path / "s").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="[Nn]o space left|disk"):
        state.save(tmp_path / "s", model.config)
    with pytest.raises(CheckpointError, match="[Nn]o space left|disk"):
        metastate.save(model, tmp_path)
    assert (tmp_path / "s").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
