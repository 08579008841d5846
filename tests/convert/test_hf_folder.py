"""Hugging Face folders: there and back bit by bit, in a fresh process, and when they are broken."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hf_models import CONFIGS, language_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from metastate.config import ModelConfig
from metastate.convert.hf import MetaStateConfig, MetaStateForCausalLM, MetaStateWorldTokenizer
from metastate.convert.hf_folder import from_hf, to_hf, write_tokenizer
from metastate.data import files
from metastate.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from metastate.errors import CheckpointError, ConfigError, DataError
from metastate.infer.generate import generate
from metastate.infer.sampling import SamplingConfig
from metastate.model.io import load, save, tokenizer_of
from metastate.model.lm import LanguageModel
from metastate.model.weights import weights_hash
from tokenizer_files import unigram

ALL = pytest.mark.parametrize("name", CONFIGS)


def assert_equal(found, model):
    assert found.config == model.config
    assert weights_hash(found) == weights_hash(model)
    for name in ("lineage", "step", "tokenizer_info"):
        assert getattr(found, name) == getattr(model, name)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_there_and_back_is_bit_exact(name, dtype, tmp_path):
    model = language_model(name).to(dtype)
    to_hf(model, tmp_path / "hf")
    assert_equal(from_hf(tmp_path / "hf"), model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(loaded) is MetaStateForCausalLM and not loaded.training
    assert loaded.dtype == dtype
    assert_equal(loaded.model, model)
    # What transformers saves is the same again, in one file or in several.
    loaded.save_pretrained(tmp_path / "again")
    assert_equal(from_hf(tmp_path / "again"), model)
    loaded.save_pretrained(tmp_path / "cut", max_shard_size="4KB")
    assert (tmp_path / "cut" / "model.safetensors.index.json").exists()
    assert_equal(from_hf(tmp_path / "cut"), model)
    # And so is our own checkpoint of it.
    save(from_hf(tmp_path / "cut"), tmp_path / "ours")
    assert_equal(load(tmp_path / "ours"), model)


def test_a_used_folder_holds_the_new_weights_alone(tmp_path):
    old, new = language_model("rwkv7"), language_model("rwkv7", seed=2)
    MetaStateForCausalLM.wrap(old).save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    content = index.read_bytes()
    to_hf(new, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_equal(from_hf(tmp_path), new)
    index.write_bytes(content)  # of another program: transformers reads the whole file too
    assert_equal(from_hf(tmp_path), new)
    index.write_text("{")
    (tmp_path / "notes.safetensors").write_text("mine")
    to_hf(old, tmp_path)
    assert not index.exists() and (tmp_path / "notes.safetensors").exists()


@ALL
def test_configuration_is_lossless(name, tmp_path):
    to_hf(language_model(name), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MetaStateConfig and config.model_config == CONFIGS[name]
    assert (config.vocab_size, config.hidden_size) == (256, 16)
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 2)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "config.json").read_text())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written.items() <= again.items()
    model = AutoModelForCausalLM.from_config(config)
    assert model.model.config == CONFIGS[name]


def test_a_fresh_model_starts_as_ours_does():
    """transformers must not initialise anything anew."""
    config = ModelConfig(vocab_size=256, hidden_size=16, num_heads=2)
    torch.manual_seed(5)
    ours = LanguageModel(config)
    torch.manual_seed(5)
    theirs = MetaStateForCausalLM(MetaStateConfig(model={"vocab_size": 256, "hidden_size": 16}))
    assert weights_hash(theirs.model) == weights_hash(ours)


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, world = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(world, trust_remote_code=True)
assert tokenizer.encode("the") == [0, 8801], tokenizer.encode("the")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("héllo", return_tensors="pt")
print(model.generate(**ids, max_new_tokens=6, do_sample=False).tolist())
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert torch.equal(again.model.head.weight, model.model.head.weight)
"""


def test_a_fresh_process_loads_the_folder(tmp_path):
    model = language_model("metastate")
    to_hf(model, tmp_path / "hf")
    write_tokenizer(load_tokenizer("world"), tmp_path / "world")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "hf", tmp_path / "world"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[0, *"héllo".encode()]])
    wrapped = MetaStateForCausalLM.wrap(model)
    expected = wrapped.generate(ids, max_new_tokens=6, do_sample=False)
    assert json.loads(done.stdout) == expected.tolist()
    again = sorted(p.name for p in (tmp_path / "hf" / "again").iterdir())
    assert again == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_metastate.py",
    ]


def test_greedy_text_is_the_text_of_our_own_generate(tmp_path):
    model = language_model("metastate")
    to_hf(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = MetaStateForCausalLM.wrap(model)
    ids = tokenizer("The state", return_tensors="pt")
    out = theirs.generate(**ids, max_new_tokens=20, do_sample=False)
    ours = generate(
        model, ByteTokenizer(), "The state", sampling=SamplingConfig(temperature=0), max_tokens=20
    )
    text = "".join(ours)
    new = out[0, ids.input_ids.shape[1] :]
    assert new.tolist() == ours.tokens
    theirs_text = tokenizer.decode(new, skip_special_tokens=True)
    # A character that the end cuts is not in our text, and U+FFFD in theirs.
    assert text and theirs_text.rstrip("\ufffd") == text.rstrip("\ufffd")


# Tokenizers


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    to_hf(language_model("rwkv7"), folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.binary())
@example("<|endoftext|> Ā \0 \r\n  a\u0301 한 👩‍👩‍👧 ", b"\xf0\x9f\x91\xff\x80 \xe2\x82 ,'s")
def test_the_byte_tokenizer_is_ours(byte_tokenizer, text, raw):
    ours = ByteTokenizer()
    assert byte_tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)
    assert byte_tokenizer.encode(text) == [0, *ours.encode(text)]
    for ids in (ours.encode(text), list(raw)):
        assert byte_tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_the_byte_tokenizer_pads_on_the_left(byte_tokenizer):
    batch = byte_tokenizer(["abc", "d"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["input_ids"].tolist() == [[0, 97, 98, 99], [0, 0, 0, 100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert byte_tokenizer.vocab_size == 256 and len(byte_tokenizer) == 256


def json_tokenizer(folder):
    """Return a small byte-level BPE with an end of document, as a file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the state reads the state"] * 4, trainer)
    tokenizer.save(str(folder / "mine.json"))
    return JsonTokenizer((folder / "mine.json").read_bytes(), "mine", str(folder / "mine.json"))


def test_a_vocabulary_that_is_a_list_goes_along(tmp_path):
    tokenizer = JsonTokenizer(unigram(), "words")
    to_hf(LanguageModel(CONFIGS["rwkv7"].replace(vocab_size=128)), tmp_path / "hf", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.eod_id


def test_a_tokenizer_json_goes_along(tmp_path):
    tokenizer = json_tokenizer(tmp_path)
    model = LanguageModel(CONFIGS["rwkv7"].replace(vocab_size=tokenizer.vocab_size))
    model.tokenizer_info = tokenizer.info()
    to_hf(model, tmp_path / "hf")  # found where it was read
    (tmp_path / "mine.json").unlink()
    back = from_hf(tmp_path / "hf")
    assert_equal(back, model)
    text = "the state, <|endoftext|> héllo"
    for found in (tokenizer_of(back, tmp_path / "hf"), tokenizer):
        assert found.encode(text) == tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eod_id
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == tokenizer.eod_id
    with pytest.raises(DataError, match="put its file there"):
        to_hf(model, tmp_path / "again")
    to_hf(model, tmp_path / "again", tokenizer)
    assert_equal(from_hf(tmp_path / "again"), model)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with the World vocabulary, what AutoTokenizer makes of it, and ours."""
    folder, ours = tmp_path_factory.mktemp("world"), load_tokenizer("world")
    model = LanguageModel(CONFIGS["rwkv7"].replace(vocab_size=65_536))
    to_hf(model, folder, ours)
    return folder, AutoTokenizer.from_pretrained(folder), ours


def test_the_world_vocabulary_goes_along(world, tmp_path):
    folder, theirs, ours = world
    assert type(theirs) is MetaStateWorldTokenizer
    assert tokenizer_of(from_hf(folder), folder).encode("the state") == ours.encode("the state")
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == 0
    assert theirs.vocab_size == 65_536 and len(theirs.get_vocab()) == 65_530
    batch = theirs(["the state reads", "it"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    theirs.save_pretrained(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["modeling_metastate.py", "rwkv_vocab.txt", "tokenizer_config.json"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is MetaStateWorldTokenizer
    assert again.encode("the state") == [0, *ours.encode("the state")]
    with pytest.raises(ConfigError, match="has 65536 ids, the model only 256"):
        to_hf(language_model("rwkv7"), tmp_path / "other", ours)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.integers(0, 65_535)))
@example("<|endoftext|> the state\r\n  한국어 👩‍👩‍👧", [0, 65_535, 224, 7, 300])
def test_the_world_tokenizer_is_ours(world, text, ids):
    _, theirs, ours = world
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.encode(text) == [0, *ours.encode(text)]
    for tokens in (ours.encode(text), ids):
        assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens)


def test_a_model_without_a_tokenizer(tmp_path):
    model = language_model("metastate")
    model.tokenizer_info = None
    to_hf(model, tmp_path)
    assert_equal(from_hf(tmp_path), model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id is None
    assert not (tmp_path / "tokenizer.json").exists()


# Broken folders


@pytest.fixture
def folder(tmp_path):
    to_hf(language_model("metastate"), tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def both_refuse(folder, error, message, theirs=None):
    with pytest.raises(CheckpointError, match=message):
        from_hf(folder)
    with pytest.raises(error, match=theirs or message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_weights_are_refused(folder, keep):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    both_refuse(folder, CheckpointError, "no whole safetensors file")


@pytest.mark.parametrize(
    ("change", "message", "theirs"),
    [
        (lambda t: t.pop("model.ln_out.bias"), "no tensor 'ln_out.bias'", "missing keys"),
        (
            lambda t: t.update({"model.more": torch.ones(1)}),
            "holds 'more', which this model does not have",
            "unexpected keys: model.more",
        ),
        (
            lambda t: t.update({"model.ln_out.bias": torch.ones(3)}),
            r"ln_out.bias is \[3\], the config needs \[16\]",
            "mismatched keys",
        ),
        (
            lambda t: t["model.head.weight"].view(-1)[5:6].fill_(float("nan")),
            r"head.weight .* 1 values that are NaN or infinite",
            None,
        ),
        (
            lambda t: t["model.head.weight"].view(-1)[5:6].fill_(-float("inf")),
            r"head.weight .* 1 values that are NaN or infinite",
            None,
        ),
    ],
    ids=["missing", "unexpected", "shape", "nan", "infinity"],
)
def test_wrong_weights_are_refused(folder, change, message, theirs):
    edit_weights(folder, change)
    both_refuse(folder, CheckpointError, message, theirs)


@pytest.mark.parametrize("names", [{"a": 1, "b": "x"}, {"a": ["x"]}, {"a": 1}])
def test_an_index_of_the_wrong_kind_is_refused(folder, names):
    (folder / "model.safetensors").unlink()  # which would be read first
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"index.json (cannot be read|names 1)"):
        from_hf(folder)


def test_integer_and_foreign_weights_are_refused(folder):
    edit_weights(
        folder, lambda t: t.update({"model.ln_out.bias": torch.ones(16, dtype=torch.int8)})
    )
    with pytest.raises(CheckpointError, match="ln_out.bias is int8; allowed: float16"):
        from_hf(folder)
    foreign = {"lm_head.weight": torch.ones(1), "model.ln_out.bias": torch.ones(16)}
    edit_weights(folder, lambda t: t.update(foreign))
    with pytest.raises(CheckpointError, match="'lm_head.weight' is no weight of ours"):
        from_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(hiden_size=3), "did you mean 'hidden_size'"),
        (lambda c: c["model"].update(version=2), "install a newer metastate"),
        (lambda c: c["model"].update(rope_theta=float("nan")), "a finite number is needed"),
        (lambda c: c["model"].update(num_layers="2"), "num_layers is '2'; int is needed"),
        (lambda c: c["model"]["meta_state"].update(gate=3), "bool is needed"),
        (lambda c: c.update(model=[1]), "a mapping of settings is needed"),
    ],
    ids=["unknown", "newer", "nan", "type", "layer", "list"],
)
def test_wrong_settings_are_refused(folder, change, message):
    edit_config(folder, change)
    both_refuse(folder, ConfigError, message)


@pytest.mark.parametrize("change", [{"num_layers": 1000}, {"vocab_size": 2**31 - 1}], ids=str)
def test_settings_far_beyond_the_weights_are_refused_before_anything_is_built(
    folder, change, monkeypatch
):
    file = folder / "config.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"model": info["model"] | change}))
    monkeypatch.setattr("metastate.convert.hf_folder.sketch", None)
    with pytest.raises(CheckpointError, match="holds .*, the config (needs|says)"):
        from_hf(folder)


def test_folders_that_are_none_of_ours_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        from_hf(tmp_path / "nothing")
    save(language_model("metastate"), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="has model_type None"):
        from_hf(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="is no metastate checkpoint.*Hugging Face.*convert"):
        load(folder)
    edit_config(folder, lambda c: c.update(model_type="llama"))
    with pytest.raises(CheckpointError, match="has model_type 'llama'"):
        from_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_hf(folder)


def test_a_broken_index_is_refused(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for content, message in [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": {"a": "../secret"}}', "no file of its own folder"),
        ('{"weight_map": {"a": "model-2.safetensors"}}', "is missing"),
    ]:
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            from_hf(folder)


def test_a_diverged_model_is_not_written(tmp_path):
    model = language_model("metastate")
    with torch.no_grad():
        model.head.weight[3, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"head\.weight .* 1 values that are NaN or infinite"):
        to_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_metastate.py", "config.json"])
def test_a_full_disk_leaves_the_folder_that_was_there(name, folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    plain = files.os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(CheckpointError, match="disk full"):
        to_hf(language_model("rwkv7", seed=2), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_kill_never_leaves_old_files_beside_new_ones(folder, monkeypatch):
    plain, done = os.replace, []

    def killed(source, target):
        if Path(target).parent == folder:
            done.append(Path(target).name)
            if len(done) == kill_at:
                raise KeyboardInterrupt
        plain(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    new = language_model("metastate", seed=2)
    for kill_at in range(1, 7):
        done.clear()
        with contextlib.suppress(KeyboardInterrupt):
            to_hf(new, folder)
        if len(done) == kill_at:
            with pytest.raises(CheckpointError, match=r"no config\.json there"):
                from_hf(folder)
    assert done[-1] == "config.json"
    assert_equal(from_hf(folder), new)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        to_hf(language_model("metastate"), tmp_path / "file")
