"""`convert` and `upgrade`, as a person runs them."""

import json
import shutil

import pytest
import torch

import metastate
from metastate.cli import main
from metastate.config import ModelConfig
from metastate.data.tokenizer import load_tokenizer
from metastate.model.lm import LanguageModel
from rwkv_files import official
from tokenizer_files import tiny_json


@pytest.fixture
def pth(tmp_path):
    """A file of an RWKV-7 in bfloat16 that reads bytes."""
    torch.save(official(torch.bfloat16, V=256), tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.fixture
def trained(tmp_path, data, run):
    """The folder of a short run of an RWKV-7, with the carried state of a document."""
    out = tmp_path / "run"
    small = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "ffn_size": 20}
    run(
        *("train", "--data", data, "--out", out, "--steps", 3, "--batch-size", 2),
        *("--preset", "rwkv7-tiny", "--context", 16, "--warmup", 1, "--carry-state"),
        *("--valid-tokens", 512, "--set", f"model={json.dumps(small)}", "--json"),
    )
    return out


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_file_of_another_format_is_told_what_is_read(refused, tmp_path, kind):
    (tmp_path / f"m.{kind}").write_bytes(b"x")
    said = refused("convert", tmp_path / f"m.{kind}", "--out", tmp_path / "out")
    assert f"is a .{kind} file" in said and "folder with its config.json" in said


def same(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_there_and_back(pth, tmp_path, run):
    ours, back = tmp_path / "ours", tmp_path / "back.pth"
    argv = ("convert", pth, "--out", ours, "--tokenizer", "bytes", "--json")
    facts = json.loads(run(*argv))
    assert (facts["from"], facts["to"], facts["dtype"]) == ("rwkv", "metastate", "bfloat16")
    assert facts["tokenizer"] == "bytes" and facts["parameters"] > 10_000
    assert "rwkv7" in run("info", ours)
    assert "bfloat16" in run("convert", ours, "--to", "rwkv", "--out", back)
    assert same(pth, back)
    # It can be used as any of ours: in float32 and with autocast.
    for dtype in ("float32", "bfloat16", "float64"):
        argv = ("generate", ours, "--prompt", "the", "--max-tokens", 4, "--dtype", dtype, "--json")
        assert 1 <= json.loads(run(*argv, "--seed", 1))["tokens"] <= 4  # it may end the document


def test_eval_and_training_of_a_converted_model(pth, data, tmp_path, run):
    ours = tmp_path / "ours"
    run("convert", pth, "--out", ours)
    argv = ("eval", ours, "--data", data, "--limit-tokens", 200, "--json")
    assert 0 < json.loads(run(*argv))["nats_per_token"] < 20
    run(
        *("train", "--from", ours, "--data", data, "--out", tmp_path / "run", "--steps", 2),
        *("--batch-size", 2, "--context", 16, "--warmup", 0, "--valid-tokens", 512),
    )
    assert metastate.load(tmp_path / "run").embedding.weight.dtype == torch.float32


def test_another_dtype_and_a_copy(pth, tmp_path, run):
    run("convert", pth, "--out", tmp_path / "wide", "--dtype", "float32")
    assert metastate.load(tmp_path / "wide").head.weight.dtype == torch.float32
    argv = ("convert", tmp_path / "wide", "--to", "rwkv", "--dtype", "bfloat16")
    run(*argv, "--out", tmp_path / "b.pth")
    assert same(pth, tmp_path / "b.pth")
    argv = ("convert", tmp_path / "wide", "--to", "metastate", "--tokenizer", "bytes")
    run(*argv, "--out", tmp_path / "copy")
    assert metastate.load(tmp_path / "copy").tokenizer_info["kind"] == "bytes"


def test_a_world_model_brings_its_vocabulary(tmp_path, run):
    torch.save(official(V=65_536), tmp_path / "a.pth")
    ours = tmp_path / "ours"
    run("convert", tmp_path / "a.pth", "--out", ours, "--tokenizer", "world")
    assert (ours / "rwkv_vocab.txt").exists()
    assert run("generate", ours, "--prompt", "the", "--max-tokens", 2)


@pytest.mark.parametrize("size", [282, 284, 384])
def test_a_model_that_pads_its_vocabulary_otherwise(size, corpus, tmp_path, run, refused):
    """GPT-2's 50,257 ids are 50,257 or 50,304 of a model, Qwen's 151,665 are 151,936."""
    vocabulary, data, ours = (tmp_path / name for name in ("tokenizer.json", "data", "ours"))
    vocabulary.write_bytes(tiny_json())
    run("prepare", corpus, "--tokenizer", vocabulary, "--valid-fraction", 0.1, "--out", data)
    for V in (size, 281, 400):
        torch.save(official(V=V), tmp_path / f"{V}.pth")
    argv = ("convert", tmp_path / f"{size}.pth", "--tokenizer", vocabulary, "--out", ours)
    assert f"vocabulary {size}" in run(*argv)
    assert run("generate", ours, "--prompt", "the", "--max-tokens", 2, "--seed", 1)
    argv = ("eval", ours, "--data", data, "--split", "valid", "--limit-tokens", 200, "--json")
    before = json.loads(run(*argv))["nats_per_token"]
    run(
        *("train", "--from", ours, "--data", data, "--out", tmp_path / "run", "--steps", 2),
        *("--batch-size", 2, "--context", 16, "--warmup", 0, "--valid-tokens", 512),
    )
    argv = ("eval", tmp_path / "run", *argv[2:])
    assert json.loads(run(*argv))["nats_per_token"] < before
    assert metastate.load(tmp_path / "run").config.vocab_size == size
    for V in (281, 400):
        argv = ("convert", tmp_path / f"{V}.pth", "--tokenizer", vocabulary)
        assert "vocabulary of 282" in refused(*argv, "--out", tmp_path / "no")


def test_to_hugging_face_and_back(checkpoint, pth, tmp_path, run, refused):
    run("convert", checkpoint, "--to", "hf", "--out", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "metastate"
    run("convert", tmp_path / "hf", "--out", tmp_path / "back")
    one, other = metastate.load(checkpoint), metastate.load(tmp_path / "back")
    assert one.config == other.config and one.tokenizer_info == other.tokenizer_info
    for name, x in one.state_dict().items():
        assert torch.equal(x, other.state_dict()[name])
    argv = ("generate", tmp_path / "back", "--prompt", "the", "--max-tokens", 3, "--seed", 1)
    assert run(*argv) == run("generate", checkpoint, *argv[2:])
    assert "64 channels" in refused("convert", pth, "--to", "fla", "--out", tmp_path / "no")
    pth = tmp_path / "heads-of-64.pth"
    torch.save(official(V=256, D=128, H=2, N=64, unused=False), pth)
    run("convert", pth, "--to", "fla", "--out", tmp_path / "fla")
    run("convert", tmp_path / "fla", "--to", "rwkv", "--out", tmp_path / "again.pth")
    assert same(pth, tmp_path / "again.pth")
    assert "no keys" in refused("convert", checkpoint, "--to", "fla", "--out", tmp_path / "no")


def test_what_has_no_place_in_a_folder_is_said(pth, tmp_path, capsys):
    for target, said in (("hf", True), ("metastate", False)):
        path = str(tmp_path / target)
        assert main(["convert", str(pth), "--to", target, "--out", path]) == 0
        out, err = capsys.readouterr()
        names = "left out: blocks.0.att.v0, blocks.0.att.v1, blocks.0.att.v2"
        assert (names in err) is said and ("no tokenizer recorded" in err) is not said
        assert out.count("\n") == 1


def test_unused_tensors_of_any_layout_go_along(tmp_path, run):
    tensors = official()
    for name in ("v1", "v2"):  # as a file may hold them that was made by transposing
        tensors[f"blocks.0.att.{name}"] = tensors[f"blocks.0.att.{name}"].t().contiguous().t()
    torch.save(tensors, tmp_path / "a.pth")
    run("convert", tmp_path / "a.pth", "--out", tmp_path / "ours")
    run("convert", tmp_path / "ours", "--to", "rwkv", "--out", tmp_path / "b.pth")
    assert same(tmp_path / "a.pth", tmp_path / "b.pth")


def test_convert_refuses_and_writes_nothing(pth, checkpoint, tmp_path, refused):
    out = tmp_path / "out"
    (tmp_path / "cut.pth").write_bytes(pth.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("text")
    (tmp_path / "folder").mkdir()
    for argv, word in (
        ((tmp_path / "cut.pth",), "cut off"),
        ((tmp_path / "text.pth",), "no whole .pth"),
        ((tmp_path / "none.pth",), "does not exist"),
        ((tmp_path / "none",), "no checkpoint"),
        ((tmp_path / "folder",), "no checkpoint"),
        ((checkpoint,), "--to says"),
        ((checkpoint, "--to", "rwkv"), "metastate has layers"),
        ((checkpoint, "--to", "onnx"), "invalid choice"),
        ((pth, "--tokenizer", "world"), "vocabulary of 65,536"),
        ((pth, "--to", "rwkv", "--tokenizer", "bytes"), "no place"),
        ((pth, "--dtype", "int8"), "invalid choice"),
        ((pth, "--dtipe", "float32"), "--dtype"),
    ):
        assert word in refused("convert", *argv, "--out", out), argv
    assert not out.exists() and not list(tmp_path.glob(".*"))
    assert "--out" in refused("convert", pth)
    assert "another --out" in refused("convert", pth, "--out", pth)


def test_a_pickle_that_would_run_code(tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return shutil.copy, (str(tmp_path / "a"), str(tmp_path / "marker"))

    (tmp_path / "a").write_text("a")
    torch.save({"emb.weight": Evil()}, tmp_path / "evil.pth")
    message = refused("convert", tmp_path / "evil.pth", "--out", tmp_path / "out")
    assert "shutil.copy" in message and "nothing was run" in message
    assert not (tmp_path / "marker").exists()


def test_weights_that_are_not_finite_need_a_word(tmp_path, run, refused):
    tensors = official(V=256)
    tensors["ln_out.bias"][0] = torch.nan
    torch.save(tensors, tmp_path / "a.pth")
    argv = ("convert", tmp_path / "a.pth", "--out", tmp_path / "ours")
    assert "ln_out.bias" in refused(*argv)
    run(*argv, "--allow-nan")
    back = ("convert", tmp_path / "ours", "--to", "rwkv", "--out", tmp_path / "b.pth")
    assert "--allow-nan" in refused(*back)
    run(*back, "--allow-nan")
    assert torch.load(tmp_path / "b.pth", weights_only=True)["ln_out.bias"][0].isnan()


# Upgrade.


def test_upgrade_is_exact_and_trains_what_is_new(trained, tmp_path, data, run):
    big, out = tmp_path / "big", tmp_path / "second"
    argv = ("upgrade", trained, "--layers", "0,2", "--set", "meta_state.readout=both")
    report = json.loads(run(*argv, "--out", big, "--data", data, "--json"))
    assert report["logits"]["max_abs"] == 0 and report["logits"]["tokens"] > 50
    assert report["meta_layers"] == [[], [0, 2]] and report["ffn_layers"] == [[0, 1, 2]] * 2
    for key in ("parameters", "state_bytes", "flops_per_token"):
        assert report[key][1] > report[key][0]
    assert (big / "state.safetensors").exists() and (big / "optimizer.safetensors").exists()
    assert "meta_layers" in run("info", big)
    run(
        *("train", "--from", big, "--data", data, "--out", out, "--steps", 2, "--carry-state"),
        *("--batch-size", 2, "--context", 16, "--warmup", 0, "--valid-tokens", 512),
        *("--old-lr-scale", 0),
    )
    before, after = metastate.load(big), metastate.load(out)
    moved = {n for n, p in after.named_parameters() if (p != before.get_parameter(n)).any()}
    assert moved == {n for n, _ in after.named_parameters() if ".meta_state." in n}
    assert run("generate", out, "--prompt", "the", "--max-tokens", 5)


def test_replace_says_what_it_costs(trained, tmp_path, data, run):
    argv = ("upgrade", trained, "--replace", "--out", tmp_path / "a", "--data", data)
    report = json.loads(run(*argv, "--json"))
    before, after = report["nats_per_token"]
    assert before > 0 and after > 0 and before != after and report["ffn_layers"] == [[0, 1, 2], []]
    assert metastate.load(tmp_path / "a").config.ffn_size is None
    table = run(*argv[:3], "--layers", "1", "--out", tmp_path / "b", "--data", data)
    assert "held-out loss" in table and "0, 1, 2 -> 0, 2" in table
    assert "held-out loss" not in run("upgrade", trained, "--replace", "--out", tmp_path / "c")


def test_upgrade_of_a_converted_file(pth, tmp_path, run):
    run("convert", pth, "--out", tmp_path / "ours", "--tokenizer", "bytes")
    table = run("upgrade", tmp_path / "ours", "--out", tmp_path / "up")
    assert "0.00e+00 of the largest" in table and "Python's documentation" in table
    assert metastate.load(tmp_path / "up").head.weight.dtype == torch.bfloat16
    # Growth of 16-bit weights is measured in float32, where it is exact.
    run("grow", tmp_path / "up", "--head-size", 12, "--out", tmp_path / "grown")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--layers", "0,9"], ["[0, 9]", "0 to 2"]),
        (["--layers", "one"], ["--layers is 'one'"]),
        (["--set", "meta_state.readot=both"], ["'readot'", "'readout'"]),
        (["--set", "meta_state=both"], ["only meta_state.KEY=VALUE"]),
        (["--set", "ffn_size=9"], ["only meta_state.KEY=VALUE"]),
        (["--set", "meta_state.readout=most"], ["'most'", "'both'"]),
        (["--repalce"], ["--replace"]),
    ],
)
def test_upgrade_refuses_and_writes_nothing(tmp_path, refused, argv, words):
    small = {"vocab_size": 256, "num_layers": 3, "hidden_size": 16, "num_heads": 2}
    model = LanguageModel(ModelConfig(architecture="rwkv7", **small))
    model.tokenizer_info = load_tokenizer("bytes").info()
    metastate.save(model, tmp_path / "small")
    message = refused("upgrade", tmp_path / "small", *argv, "--out", tmp_path / "big")
    assert all(word in message for word in words), message
    assert not (tmp_path / "big").exists() and not list(tmp_path.glob(".big*"))


def test_upgrade_refuses_other_architectures_and_an_upgrade_that_moved(
    checkpoint, trained, tmp_path, refused, monkeypatch
):
    out = ("--out", tmp_path / "big")
    assert "nothing changes" in refused("upgrade", checkpoint, *out)
    assert "no checkpoint" in refused("upgrade", "rwkv7-tiny", *out)

    for moved in (1e-3, torch.nan):
        report = {"logits": {"relative": moved}}
        monkeypatch.setattr("metastate.cli.growing.growth_report", lambda *_, r=report: r)
        logits = report["logits"]  # in float64
        monkeypatch.setattr("metastate.cli.growing.logits_change", lambda *_, x=logits: x)
        assert "does not compute" in refused("upgrade", trained, *out)
        assert "does not compute" in refused("grow", trained, "--layers", 4, *out)
    assert not (tmp_path / "big").exists()
