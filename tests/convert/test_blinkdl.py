"""RWKV-7's own files: exact both ways, the formulas' logits, and every way a file can be wrong."""

import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import metastate
from metastate.config import ModelConfig
from metastate.convert import blinkdl
from metastate.errors import CheckpointError, ConfigError, MetaStateError
from metastate.growth import grow
from metastate.model.lm import LanguageModel
from rwkv_files import numpy_logits, official

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [(5 * i + i * i) % 23 for i in range(40)]


def saved(tensors, folder, name="a.pth"):
    torch.save(tensors, folder / name)
    return folder / name


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def back(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("unused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_is_exact(tmp_path, dtype, unused):
    tensors = official(dtype, unused)
    model, kept = blinkdl.read(saved(tensors, tmp_path))
    assert (len(kept), model.embedding.weight.dtype) == (3 if unused else 0, dtype)
    # By way of our own folder, as the command goes.
    metastate.save(model, tmp_path / "ours")
    again = metastate.load(tmp_path / "ours")
    blinkdl.write(again, tmp_path / "b.pth", kept)
    assert equal(tensors, back(tmp_path / "b.pth"))
    blinkdl.write(again, tmp_path / "c.pth")
    assert equal({k: x for k, x in tensors.items() if k not in kept}, back(tmp_path / "c.pth"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_the_formulas(tmp_path, dtype):
    tensors = official(dtype)
    expected = numpy_logits(tensors, TOKENS)
    path = saved(tensors, tmp_path)
    own, _ = blinkdl.read(path)
    model, _ = blinkdl.read(path, dtype=torch.float32)
    tokens = torch.tensor([TOKENS])
    for backend in ("auto", "reference", "chunked"):
        model.backend = own.backend = backend
        with torch.no_grad():
            logits, state = model(tokens[:, :17])
            rest, _ = model(tokens[:, 17:], state)
            rounded, _ = own(tokens)
        difference = np.abs(torch.cat([logits, rest], 1)[0].numpy() - expected).max()
        assert difference <= 1e-4 and np.abs(expected).max() > 1, backend
        # In the file's own 16 bits the model runs too, as near as they allow.
        assert rounded.dtype == dtype
        assert np.abs(rounded[0].double().numpy() - expected).max() < 0.3, backend


def test_the_shape_is_read_off_the_tensors(tmp_path):
    model, _ = blinkdl.read(saved(official(), tmp_path))
    c = model.config
    assert (c.architecture, c.vocab_size, c.hidden_size, c.num_layers) == ("rwkv7", 23, 16, 3)
    assert (c.num_heads, c.head_size, c.ffn_size) == (2, 8, 24)
    assert (c.decay_rank, c.icl_rate_rank, c.value_rank, c.gate_rank) == (3, 4, 2, 5)
    for unused in (True, False):  # a single block says its value rank only where that is unused
        tensors = official(L=1, unused=unused)
        one, _ = blinkdl.read(saved(tensors, tmp_path))
        assert (one.config.num_layers, one.config.value_rank) == (1, 2 if unused else None)
        logits = one(torch.tensor([TOKENS]))[0][0].detach().numpy()
        assert np.abs(logits - numpy_logits(tensors, TOKENS)).max() <= 1e-4


def test_a_model_of_ours_goes_there_and_back(tmp_path):
    model = LanguageModel(ModelConfig(architecture="rwkv7", vocab_size=40, num_layers=2))
    blinkdl.write(model, tmp_path / "a.pth")
    again, _ = blinkdl.read(tmp_path / "a.pth")
    assert equal(model.state_dict(), again.state_dict())
    tokens = torch.tensor([TOKENS])
    assert torch.equal(model(tokens)[0], again(tokens)[0])
    assert again.config == model.config.replace(
        ffn_size=512, decay_rank=32, icl_rate_rank=32, value_rank=32, gate_rank=64
    )


def test_what_has_no_keys_there_is_refused(tmp_path):
    small = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    rwkv = LanguageModel(ModelConfig(architecture="rwkv7", **small))
    for model, word in (
        (LanguageModel(ModelConfig(**small)), "metastate has layers"),
        (LanguageModel(ModelConfig(architecture="transformer", **small)), "transformer"),
        (grow(rwkv, head_size=12), "24 channels on a width of 16"),
        (grow(rwkv, num_heads=3), "24 channels"),
        (grow(rwkv, parameter_tokens=2), "parameter_tokens 2"),
    ):
        with pytest.raises(ConfigError, match=word):
            blinkdl.write(model, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())
    blinkdl.write(grow(rwkv, num_layers=3, ffn_size=99), tmp_path / "x.pth")  # these have keys


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):  # as torch does it
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    small = {"vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(CheckpointError, match="disk full"):
        blinkdl.write(LanguageModel(ModelConfig(architecture="rwkv7", **small)), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


# Files that are wrong.


class Evil:
    """Unpickled by a reader that believes it, this makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


class System(Evil):
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", [Evil, System])
@pytest.mark.parametrize("whole", [True, False])
def test_no_code_is_run(tmp_path, kind, whole):
    marker = tmp_path / "marker"
    tensors = official()
    path = saved(kind(marker) if whole else tensors | {"emb.weight": kind(marker)}, tmp_path)
    with pytest.raises(CheckpointError, match="which no file of plain tensors needs"):
        blinkdl.read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.att.x_r": None}, ["has no 'blocks.1.att.x_r'", "nearest", "x_"]),
        ({"blocks.1.att.x_q": torch.ones(1)}, ["'blocks.1.att.x_q'", "did you mean", "x_"]),
        ({"blocks.7.ln1.weight": torch.ones(16)}, ["has no 'blocks.3."]),
        ({"emb.weight": None}, ["has no 'emb.weight'"]),
        ({"head.weight": torch.ones(22, 16)}, ["head.weight is [22, 16]", "[23, 16]"]),
        ({"blocks.2.att.w1": torch.ones(16, 9)}, ["blocks.2.att.w1 is [16, 9]", "[16, 3]"]),
        ({"blocks.0.att.x_r": torch.ones(16)}, ["x_r is [16]", "[1, 1, 16]"]),
        ({"blocks.0.att.r_k": torch.ones(3, 8)}, ["16 wide", "[3, 8]"]),
        ({"blocks.0.att.r_k": torch.ones(16)}, ["r_k is [16]", "2 axes"]),
        ({"emb.weight": torch.ones(0, 16)}, ["emb.weight is [0, 16]"]),
        ({"emb.weight": torch.ones(23, 16, dtype=torch.int64)}, ["emb.weight is torch.int64"]),
        ({"emb.weight": torch.ones(23, 16, dtype=torch.bool)}, ["torch.bool", "bfloat16"]),
        ({"ln_out.bias": torch.ones(16, dtype=torch.float64)}, ["torch.float64"]),
        ({"ln_out.bias": torch.ones(16, dtype=torch.float16)}, ["several types", "float16"]),
        ({"emb.weight": torch.full((23, 16), torch.nan)}, ["368 values", "--allow-nan"]),
        ({"emb.weight": torch.ones(1, 1).expand(23, 999_999)}, ["overlap"]),
        ({"emb.weight": torch.eye(23).to_sparse()}, ["asks for torch._utils._rebuild_sparse"]),
        ({"emb.weight": "text"}, ["emb.weight is no plain tensor"]),
        ({"emb.weight": torch.ones(23, 16, device="meta")}, ["asks for", "meta"]),
        ({3: torch.ones(1)}, ["no tensors by name"]),
        ({"blocks.0.att.time_decay": torch.ones(1)}, ["older RWKV"]),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, words):
    tensors = {k: x for k, x in (official() | change).items() if x is not None}
    with pytest.raises(CheckpointError) as caught:
        blinkdl.read(saved(tensors, tmp_path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_parameter_is_a_tensor_and_a_dtype_settles_several(tmp_path):
    tensors = official() | {"ln_out.bias": torch.ones(16, dtype=torch.float16)}
    tensors["head.weight"] = torch.nn.Parameter(tensors["head.weight"])
    model, kept = blinkdl.read(saved(tensors, tmp_path), dtype=torch.bfloat16)
    found = {x.dtype for x in [*model.parameters(), *kept.values()]}
    assert found == {torch.bfloat16}


def test_values_that_are_not_finite(tmp_path):
    tensors = official()
    tensors["emb.weight"][3, 3] = torch.inf
    path = saved(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"emb.weight \(float32\) has 1 values"):
        blinkdl.read(path)
    model, kept = blinkdl.read(path, allow_nan=True)
    blinkdl.write(model, tmp_path / "b.pth", kept)
    assert equal(tensors, back(tmp_path / "b.pth"))
    tensors["emb.weight"][3, 3] = 1e5  # too large for the type that is asked for
    with pytest.raises(
        CheckpointError, match="emb.weight has 1 values beyond 65504, the range of float16"
    ):
        blinkdl.read(saved(tensors, tmp_path), dtype=torch.float16)


def test_files_that_are_no_checkpoint(tmp_path):
    def refused(path, word):
        with pytest.raises(CheckpointError, match=word):
            blinkdl.read(path)

    refused(tmp_path / "none.pth", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth", "no whole .pth")
    (tmp_path / "text.pth").write_text(json.dumps({"a": 1}))
    refused(tmp_path / "text.pth", "not a zip")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "no tensors here")
    refused(tmp_path / "zip.pth", "no .pth file")
    torch.save(official(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", "not a zip")
    refused(saved([torch.ones(2)], tmp_path), "holds a list")
    refused(saved({}, tmp_path), "has no 'emb.weight'")
    packed = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(saved(official(), tmp_path)) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for entry in archive.namelist():
            other.writestr(entry, archive.read(entry))
    refused(packed, "compressed")


def test_damage_in_the_weights_is_found(tmp_path):
    tensors = official()
    path = saved(tensors, tmp_path)
    content = bytearray(path.read_bytes())
    at = content.index(tensors["head.weight"].numpy().tobytes())
    content[at + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        blinkdl.read(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9), what=st.sampled_from(["bytes", "cut", "pickle"]))
def test_any_damage_is_refused_or_harmless(tmp_path, seed, what):
    draw = random.Random(seed)
    tensors = official(L=1)
    path = saved(tensors, tmp_path)
    content = bytearray(path.read_bytes())

    def damaged(content):
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        return bytes(content)

    if what == "bytes":
        path.write_bytes(damaged(content))
    elif what == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:  # an archive that is whole, so that the readers of the pickle must see the damage
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                is_pickle = name.endswith("data.pkl")
                archive.writestr(name, damaged(bytearray(data)) if is_pickle else data)
    try:
        model, _ = blinkdl.read(path, allow_nan=True)
    except MetaStateError as error:
        assert str(path) in str(error) or isinstance(error, ConfigError)
    else:
        assert sum(p.numel() for p in model.parameters()) < 10_000
