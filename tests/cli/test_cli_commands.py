"""The commands on tiny data, as a person runs them: results, messages, exit codes."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save

import metastate
from metastate.cli import main
from metastate.config import ModelConfig
from metastate.model.lm import LanguageModel
from metastate.model.state_file import StateFile

# prepare


def test_prepare_says_what_it_made(corpus, tmp_path, run):
    out = run("prepare", corpus, "--out", tmp_path / "d", "--json")
    made = json.loads(out)
    assert made["domains"] == ["prose", "verse"]
    assert sum(split["documents"] for split in made["splits"].values()) == 60
    table = run("prepare", corpus, "--out", tmp_path / "d")  # finished: at once
    assert "prose" in table and "train" in table


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("binary.txt", b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe" * 50, "binary.txt"),
        ("empty.txt", b"", "no text"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "text"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00broken", "cut.jsonl.gz"),
    ],
)
def test_prepare_refuses_what_is_no_text(tmp_path, name, content, word, refused):
    (tmp_path / name).write_bytes(content)
    message = refused("prepare", tmp_path / name, "--out", tmp_path / "d")
    assert word in message
    assert not (tmp_path / "d" / "data.json").exists()


def test_prepare_reads_another_field_and_says_what_it_leaves_out(tmp_path, capsys):
    folder = tmp_path / "\udcffd"
    try:
        folder.mkdir()
    except OSError:
        folder = tmp_path
    (folder / "a.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n')
    (folder / "a.parquet").write_bytes(b"PAR1\0")
    argv = ["prepare", str(folder), "--out", str(folder / "d"), "--text-field", "content"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "d/d: bytes" in out and "left out, no UTF-8 text: 1 .parquet" in err.splitlines()
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(folder / "d")


def test_info_of_prepared_data_is_what_prepare_said(tmp_path, corpus, run):
    said = run("prepare", corpus, "--out", tmp_path / "d")
    assert run("info", tmp_path / "d") == said
    facts = json.loads(run("info", tmp_path / "d", "--json"))
    assert facts["data"] == str(tmp_path / "d") and facts["splits"]["train"]["tokens"] > 0


def test_prepare_refuses_a_missing_file_and_a_missing_tokenizer(tmp_path, corpus, refused):
    out = tmp_path / "d"
    assert "none.txt" in refused("prepare", tmp_path / "none.txt", "--out", out)
    tokenizer = tmp_path / "tokenizer.json"
    assert "tokenizer.json" in refused("prepare", corpus, "--out", out, "--tokenizer", tokenizer)
    assert not out.exists()


def test_prepare_names_the_flags_of_fractions_that_cannot_be(tmp_path, corpus, refused):
    for valid, test in ((-1, 0.1), (0.7, 0.7), (1, 0), (math.nan, 0)):
        argv = ("--valid-fraction", valid, "--test-fraction", test)
        assert "--valid-fraction is" in refused("prepare", corpus, "--out", tmp_path / "d", *argv)


# info


def test_info_of_a_preset_and_of_a_checkpoint(checkpoint, run):
    facts = json.loads(run("info", "metastate-150m", "--json"))
    assert 147e6 < facts["parameters"]["total"] < 153e6
    assert facts["state_bytes"]["1024"] == facts["state_bytes"]["65536"]
    assert "training at 64 tokens" in run("info", checkpoint, "--context", "64")
    facts = json.loads(run("info", checkpoint, "--json", "--context", "64"))
    assert facts["flops_per_token"]["context"] == 64
    assert facts["config"]["hidden_size"] == 16 and facts["tokenizer"]["name"] == "bytes"
    assert "Transformer cache" in run("info", checkpoint)


def test_info_says_where_numbers_are_not_finite(checkpoint, tmp_path, run):
    model = metastate.load(checkpoint)
    state = model.init_state(1)
    assert json.loads(run("info", checkpoint, "--json"))["not_finite"] == {}
    assert "warning" not in run("info", checkpoint)
    with torch.no_grad():
        model.head.weight[0, :2] = torch.tensor([torch.nan, -torch.inf])
        model.ln_out.bias[3] = torch.inf
    metastate.save(model, tmp_path / "bad")
    facts = json.loads(run("info", tmp_path / "bad", "--json"))
    assert facts["not_finite"] == {"head.weight": 2, "ln_out.bias": 1}
    table = run("info", tmp_path / "bad")
    assert "NaN or infinite in " in table and " and in 1 other tensor" in table
    state.save(tmp_path / "state", model)  # which refuses such values: another program wrote them
    file = StateFile.read(tmp_path / "state")
    file.tensors["layers.1.S"][0, 0, 0, 0] = torch.nan
    file.write(tmp_path / "state")
    assert json.loads(run("info", tmp_path / "state", "--json"))["not_finite"] == {"layers.1.S": 1}
    assert "warning: 1 values NaN or infinite in layers.1.S\n" in run("info", tmp_path / "state")


def test_unknown_preset_names_the_nearest(refused):
    assert "'metastate-tiny'" in refused("info", "metastat-tiny")


# eval


def test_eval_reports_both_ways_of_reading(checkpoint, data, run):
    argv = ["eval", checkpoint, "--data", data, "--context", "16", "--by-domain", "--by-position"]
    value = json.loads(run(*argv, "--json"))
    assert {"nats_per_token", "bits_per_byte", "tokens", "domains"} <= value.keys()
    assert value["mode"] == "stateful" and value["windowed"]["mode"] == "windowed"
    assert (value["data"], value["split"]) == (str(data), "valid") and value["positions"]
    assert value["tokens"] == value["windowed"]["tokens"] > 0
    assert set(value["domains"]) == {"prose", "verse"}
    assert 4 < value["nats_per_token"] < 8
    table = run(*argv)
    assert "stateful" in table and "windowed, context 16" in table and "verse" in table


def test_eval_of_a_part_and_in_other_arithmetic(checkpoint, data, run):
    argv = ["eval", checkpoint, "--data", data, "--json"]
    part = json.loads(run(*argv, "--limit-tokens", "40"))
    assert 40 <= part["tokens"] <= 80
    exact = json.loads(run(*argv, "--dtype", "float64"))
    coarse = json.loads(run(*argv, "--dtype", "bfloat16"))
    assert exact["nats_per_token"] == pytest.approx(coarse["nats_per_token"], abs=0.05)
    assert exact["nats_per_token"] != coarse["nats_per_token"]


def test_eval_refuses_data_of_another_vocabulary(data, tmp_path, refused):
    metastate.save(
        LanguageModel(ModelConfig(vocab_size=300, hidden_size=16, num_layers=1)), tmp_path / "m"
    )
    message = refused("eval", tmp_path / "m", "--data", data)
    assert "256" in message and "300" in message


def damaged(data, tmp_path, name, change):
    """Copy the prepared folder, one of its files changed by `change`."""
    out = tmp_path / "damaged"
    out.mkdir()
    for path in data.iterdir():
        content = path.read_bytes()
        (out / path.name).write_bytes(change(content) if path.name == name else content)
    return out


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("valid.bin", lambda b: b[:-2], ["valid.bin", "truncated"]),
        ("valid.idx", lambda b: b"garbage" + b[7:], ["valid.idx"]),
        ("valid.idx", lambda b: b[:-5], ["valid.idx", "truncated"]),
        ("data.json", lambda b: b[:50], ["data.json"]),
    ],
)
def test_eval_refuses_damaged_data(checkpoint, data, tmp_path, name, change, words, refused):
    folder = damaged(data, tmp_path, name, change)
    message = refused("eval", checkpoint, "--data", folder)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("model.safetensors", lambda b: b[: len(b) // 2], "model.safetensors"),
        ("model.safetensors", lambda b: b"PK\x03\x04" + b[4:], "model.safetensors"),
        ("config.json", lambda b: b.replace(b'"version": 1', b'"version": 99'), "newer"),
        ("config.json", lambda b: b.replace(b"hidden_size", b"hiden_size"), "'hidden_size'"),
        ("config.json", lambda b: b"{}", "config"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, data, tmp_path, name, change, word, refused):
    folder = damaged(checkpoint, tmp_path, name, change)
    assert word in refused("eval", folder, "--data", data)


def test_foreign_safetensors_are_refused(checkpoint, data, tmp_path, refused):
    content = save({"transformer.h.0.weight": torch.zeros(2, 2)})
    folder = damaged(checkpoint, tmp_path, "model.safetensors", lambda _: content)
    assert "model.safetensors" in refused("eval", folder, "--data", data)


# generate


def test_generate_streams_and_draws_the_same_text_again(checkpoint, run):
    argv = ["generate", checkpoint, "--prompt", "the", "--max-tokens", "20", "--seed", "3"]
    first = run(*argv)
    assert first == run(*argv)
    value = json.loads(run(*argv, "--json"))
    assert value["text"] + "\n" == first
    assert value["tokens"] == 20 and value["state_bytes"] > 0
    assert (value["seed"], value["finish_reason"]) == (3, "length")
    assert first != run(*argv[:-1], "4")
    drawn = json.loads(run(*argv[:-2], "--json"))
    assert drawn["text"] == json.loads(run(*argv[:-1], drawn["seed"], "--json"))["text"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_generate_in_other_arithmetic(checkpoint, tmp_path, run, dtype):
    argv = ["generate", checkpoint, "--max-tokens", "8", "--temperature", "0", "--dtype", dtype]
    state = tmp_path / "state.safetensors"
    value = json.loads(run(*argv, "--prompt", "the state", "--json", "--state-out", state))
    assert value["tokens"] == 8
    assert run(*argv, "--state-in", state)


def test_generate_goes_on_from_a_saved_state(checkpoint, tmp_path, run):
    def write(count, *more):
        argv = ["generate", checkpoint, "--max-tokens", str(count), "--temperature", "0", "--json"]
        return json.loads(run(*argv, *more))["text"]

    state = tmp_path / "state.safetensors"
    whole = write(24, "--prompt", "the state")
    begun = write(10, "--prompt", "the state", "--state-out", state)
    assert whole == begun + write(14, "--state-in", state)


def test_generate_reads_standard_input(checkpoint, monkeypatch, run):
    argv = ["generate", checkpoint, "--max-tokens", "5", "--temperature", "0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the token"))
    assert run(*argv) == run(*argv, "--prompt", "the token")


def test_generate_refuses_bad_options_and_states(checkpoint, tmp_path, refused):
    argv = ["generate", checkpoint, "--prompt", "a"]
    assert "temperature" in refused(*argv, "--temperature", "-1")
    assert "top_p" in refused(*argv, "--top-p", "0")
    assert "seed" in refused(*argv, "--seed", 2**64)
    assert "repetition_penalty" in refused(*argv, "--repetition-penalty", "inf")
    assert "none.st" in refused(*argv, "--state-in", tmp_path / "none.st")
    (tmp_path / "bad.st").write_bytes(b"not a state")
    assert "bad.st" in refused(*argv, "--state-in", tmp_path / "bad.st")
    assert "is a folder; name a state file" in refused(*argv, "--state-in", tmp_path)
    assert "is a folder; give the name of a file" in refused(*argv, "--state-out", tmp_path)
    assert "device" in refused(*argv, "--device", "abacus")
    assert "device 'cuda:99' cannot be used" in refused(*argv, "--device", "cuda:99")
    said = refused(*argv, "--dtype", "fp16")
    assert "--dtype" in said and "'fp16'" in said and "bfloat16" in said


def test_generate_refuses_what_is_no_text(checkpoint, refused, monkeypatch):
    argv = ["generate", checkpoint, "--max-tokens", "2"]
    assert "no UTF-8 text" in refused(*argv, "--prompt", os.fsdecode(b"caf\xe9"))
    for errors in ("strict", "surrogateescape"):  # as in a UTF-8 locale, and in the locale C
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "no UTF-8 text" in refused(*argv)


def test_a_state_of_other_weights_needs_leave(checkpoint, data, tmp_path, run, refused):
    model = metastate.load(checkpoint)
    with torch.no_grad():
        model.head.weight += 0.1
    model.init_state(1).save(tmp_path / "s", model)
    for argv in (
        ("generate", checkpoint, "--max-tokens", 1, "--state-in", tmp_path / "s", "--prompt", "a"),
        ("eval", checkpoint, "--data", data, "--limit-tokens", 40, "--state", tmp_path / "s"),
    ):
        assert "--allow-other-weights" in refused(*argv)
        assert run(*argv, "--allow-other-weights")


def test_generate_needs_a_tokenizer(tmp_path, refused):
    metastate.save(
        LanguageModel(ModelConfig(vocab_size=256, hidden_size=16, num_layers=1)), tmp_path / "m"
    )
    assert "tokenizer" in refused("generate", tmp_path / "m", "--prompt", "a")
    assert "is a preset, which nothing has trained" in refused(
        "generate", "metastate-tiny", "--prompt", "a"
    )


# the process


def start(*argv, **settings):
    """Start a command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "metastate", *map(str, argv)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def test_the_process_prints_one_json_object_and_errors_apart(checkpoint, data):
    process = start("eval", checkpoint, "--data", data, "--json", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and json.loads(out)["tokens"] > 0
    process = start("eval", checkpoint, "--data", "nowhere", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and err.startswith("error: nowhere")


def test_a_reader_that_goes_away_is_no_traceback(checkpoint):
    reader, writer = os.pipe()
    process = start("generate", checkpoint, "--prompt", "a", stdout=writer)
    os.close(writer)
    os.close(reader)  # long before the first word: behind it, the text could end first
    _, err = process.communicate(timeout=120)
    assert process.returncode == 141 and err == ""


def test_a_reader_that_goes_away_leaves_a_state_to_go_on_from(checkpoint, tmp_path, run):
    at = tmp_path / "at.state"
    argv = ("generate", checkpoint, "--prompt", "a", "--max-tokens", 100_000, "--state-out", at)
    reader, writer = os.pipe()
    process = start(*argv, stdout=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 141 and "goes on from here" in err
    assert run("generate", checkpoint, "--state-in", at, "--max-tokens", 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_behind_standard_output_is_an_error(checkpoint, more):
    with open("/dev/full", "w") as full:
        process = start("info", checkpoint, *more, stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == "error: standard output could not be written: No space left on device\n"


@pytest.mark.parametrize(
    "own,spins",
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
    ],
)
def test_threads_that_wait_long_sleep_unless_the_user_says_how(own, spins):
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = start(
        "info", "metastate-tiny", stdout=subprocess.DEVNULL,
        env=plain | {"OMP_DISPLAY_ENV": "VERBOSE"} | own,
    ).communicate(timeout=99)[1]  # fmt: skip
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch's OpenMP runtime is not GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown


def test_ctrl_c_is_exit_code_130(checkpoint, tmp_path):
    model = metastate.load(checkpoint)
    with torch.no_grad():  # no document ends: the logit of its end is about -1,600
        model.ln_out.bias.fill_(1)
        model.head.weight[0] = -100
    metastate.save(model, tmp_path / "endless")
    process = start(
        *("generate", tmp_path / "endless", "--prompt", "a", "--max-tokens", "100000000"),
        stdout=subprocess.PIPE,
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err


def test_ctrl_c_keeps_the_state_that_generate_was_to_write(checkpoint, tmp_path, run):
    model = metastate.load(checkpoint)
    with torch.no_grad():
        model.ln_out.bias.fill_(1)
        model.head.weight[0] = -100
    metastate.save(model, tmp_path / "endless")
    argv, file = ("generate", tmp_path / "endless", "--seed", 1), tmp_path / "now.state"
    begin = (*argv, "--prompt", "a", "--max-tokens")
    with open(tmp_path / "text", "w") as out:
        process = start(*begin, "100000000", "--state-out", file, stdout=out)
        while not os.path.getsize(out.name) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "now.state goes on from here" in err
    with open(out.name, newline="") as written:
        first = written.read()
    second = run(*argv, "--state-in", file, "--max-tokens", 40)
    whole = run(*begin, 4 * len(first) + 160)
    assert whole.startswith(first)
    # Ctrl-C may strike between taking the state behind a piece of text and showing that piece.
    assert whole.index(second[:20], len(first)) - len(first) < 8


@pytest.mark.parametrize("context", [0, -3])
def test_a_context_that_is_no_length_is_refused_before_anything_is_read(
    checkpoint, data, refused, monkeypatch, context
):
    monkeypatch.setattr("metastate.cli.commands.evaluate", None)
    for argv in (("info", checkpoint), ("info", "150m"), ("eval", checkpoint, "--data", data)):
        assert "it must be 1 or more" in refused(*argv, "--context", context)
