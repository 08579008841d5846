"""The training loop: exact resume, real kills, signals, numbers that are not finite, full disks."""

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import metastate
from metastate import cli
from metastate.config import GrowthStep, TrainConfig
from metastate.data.loader import BatchSource, PreparedData
from metastate.data.prepare import prepare
from metastate.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
)
from metastate.eval import plots
from metastate.growth import grow_in_training
from metastate.mapping import from_dict, to_dict
from metastate.model.io import checkpoint_folder, read_tensors, tokenizer_of
from metastate.model.loss import lm_loss
from metastate.model.presets import preset
from metastate.train import checkpoint, distributed, log, trainer
from metastate.train.checkpoint import find_checkpoint, read_trainer, saved_config
from metastate.train.optim import set_learning_rate
from metastate.train.signals import signals
from metastate.train.trainer import train
from tolerance import TOLERANCE, relative_error
from train_runs import evaluate, read_log, short_run

MODEL = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "head_size": 4, "ffn_size": 8}


@pytest.fixture
def config(few_words, tmp_path):
    return short_run(few_words, tmp_path, model=MODEL, steps=12, log_every=3, checkpoint_every=5)


def assert_same_run(a, b):
    assert read_log(a) == read_log(b)
    for name in ("model", "optimizer"):
        mine, theirs = (read_tensors(Path(x, "last", f"{name}.safetensors")) for x in (a, b))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    best = [read_tensors(Path(x, "best", "model.safetensors")) for x in (a, b)]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])


class Stop(Exception):
    """Ends a run where no handler saves anything, as a kill does."""


def run_killed_after(config, step):
    def progress(done, total, **figures):
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        train(config, evaluate=evaluate, progress=progress)


VARIANTS = {
    "plain": {},
    "carry": {"carry_state": True},
    "no_reset": {"carry_state": True, "document_reset": False},
    "accumulate": {"accumulate": 3, "schedule": "wsd"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64", "activation_checkpointing": True},
    "noise": {"model": MODEL | {"meta_state": {"encoder": "cross", "variational": True}}},
    "rwkv7": {"preset": "rwkv7-tiny", "model": MODEL},
    "transformer": {"preset": "transformer-tiny", "model": MODEL},
}


# Killed before, at and after a checkpoint; the variants after one, amid a line of the log.
@pytest.mark.parametrize(
    ("variant", "killed_after"), [("plain", 3), ("plain", 5), *((v, 7) for v in VARIANTS)]
)
def test_resuming_is_exact(config, variant, killed_after):
    straight = config("straight", **VARIANTS[variant])
    result = train(straight, evaluate=evaluate)
    assert (result.step, result.tokens) == (12, 12 * 32 * straight.accumulate)
    assert result.interrupted is None
    broken = config("broken", **VARIANTS[variant])
    run_killed_after(broken, killed_after)
    torch.manual_seed(99)
    train(broken, evaluate=evaluate, resume=True)
    assert_same_run(straight.out, broken.out)


def test_the_log_tells_the_run(config):
    train(config(), evaluate=evaluate)
    log = read_log(config().out)
    steps = [(r["kind"], r["step"]) for r in log]
    assert steps == [
        *(("train", 3), ("valid", 4), ("train", 6), ("valid", 8), ("train", 9)),
        *(("train", 12), ("valid", 12)),
    ]
    assert all(r["tokens"] == r["step"] * 32 for r in log)
    assert log[0]["lr"] == config().lr  # the last step of the warm-up
    assert log[-2]["lr"] == pytest.approx(config().min_lr)
    assert log[-1]["nats_per_token"] < log[1]["nats_per_token"]
    best = min(r["nats_per_token"] for r in log if r["kind"] == "valid")
    assert read_trainer(Path(config().out, "last")).best_loss == best
    for line in Path(config().out, "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["seconds"] >= 0
        assert record["kind"] == "valid" or record["tokens_per_s"] > 0


def test_the_checkpoint_writes_text(config, few_words):
    train(config())
    model = metastate.load(Path(config().out, "last"))
    assert model.tokenizer_info == PreparedData.open(few_words).record["tokenizer"]
    assert model.config.vocab_size == 256
    assert not Path(config().out, "best").exists()  # nothing was validated


def test_a_cut_line_of_the_log_is_dropped(config):
    train(config("straight"), evaluate=evaluate)
    run_killed_after(config(), 7)
    with open(Path(config().out, "log.jsonl"), "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    train(config(), evaluate=evaluate, resume=True)
    assert_same_run(config("straight").out, config().out)


def test_a_run_killed_before_its_first_checkpoint_starts_again(config):
    train(config("straight"), evaluate=evaluate)
    run_killed_after(config(), 2)
    train(config(), evaluate=evaluate, resume=True)
    assert_same_run(config("straight").out, config().out)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_fell_before_its_first_line_is_begun_again(config, monkeypatch, resume):
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "update", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config(steps=2, batch_size=3))
    assert Path(config().out, "run.json").exists()
    assert train(config(steps=2), resume=resume).step == 2
    assert saved_config(config().out) == config(steps=2)


def test_a_finished_run_goes_on_with_more_steps(config):
    train(config())
    assert train(config(), resume=True).step == 12
    result = train(config(steps=15, log_every=1), resume=True)
    assert result.step == 15
    assert [r["step"] for r in read_log(config().out)][-3:] == [13, 14, 15]
    assert saved_config(config().out).steps == 15


def test_out_and_resume_must_agree(config):
    with pytest.raises(ConfigError, match="there is no run in .*leave out --resume"):
        train(config(), resume=True)
    with pytest.raises(ConfigError, match="no run"):
        saved_config(config().out)
    train(config(steps=2))
    with pytest.raises(ConfigError, match=r"--resume.*another --out"):
        train(config())
    assert saved_config(config().out) == config(steps=2)


CHANGED = {
    "from_checkpoint": "elsewhere",
    "old_lr_scale": 0.5,
    "growth": (GrowthStep(9, num_layers=3),),
    **{"preset": "metastate-mini", "model": MODEL | {"num_layers": 1}, "batch_size": 3},
    **{"context": 15, "accumulate": 2, "lr": 2e-3, "min_lr": 1e-5, "schedule": "wsd", "warmup": 4},
    **{"decay_fraction": 0.3, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "eps": 1e-8},
    **{"clip": 2.0, "z_loss": 0.0, "seed": 1, "dtype": "bfloat16"},
    **{"document_reset": False, "carry_state": True},
}


def test_every_setting_is_checked_or_free():
    free = trainer.check_same_run.__globals__["MAY_CHANGE"]
    assert CHANGED.keys() | free == {f.name for f in dataclasses.fields(TrainConfig)}
    assert not CHANGED.keys() & free


@pytest.mark.parametrize("name", CHANGED)
def test_resuming_with_a_changed_setting_names_it(config, name):
    before = trainer.TrainerState(1, 32, config(), "abc")
    with pytest.raises(ConfigError, match=f"has {name} "):
        trainer.check_same_run(before, config(**{name: CHANGED[name]}), "abc", "runs/x")


def test_what_means_the_same_may_be_spelt_otherwise(config):
    """Lists for tuples, defaults named, and what a preset says anyway."""
    before = trainer.TrainerState(1, 32, config(model=MODEL | {"meta_layers": (0,)}), "abc")
    full = preset("metastate-tiny", **MODEL, meta_layers=(0,))
    for model in (MODEL | {"meta_layers": [0]}, to_dict(full)):
        trainer.check_same_run(before, config(model=model), "abc", "runs/x")
    record = to_dict(before)
    del record["config"]["context_parallel"]  # written before there was such a setting
    old = from_dict(trainer.TrainerState, record)
    trainer.check_same_run(old, config(model=MODEL | {"meta_layers": [0]}), "abc", "runs/x")


def test_another_backend_goes_on_with_the_same_run_up_to_rounding(config):
    whole, split = config("whole", dtype="float64"), config("split", dtype="float64")
    train(whole, evaluate=evaluate)
    run_killed_after(split, 5)
    train(dataclasses.replace(split, backend="reference"), evaluate=evaluate, resume=True)
    mine, theirs = (read_tensors(Path(x.out, "last", "model.safetensors")) for x in (whole, split))
    for name, x in mine.items():
        assert relative_error(theirs[name], x) < TOLERANCE[torch.float64], name


def test_a_run_that_runs_out_of_memory_goes_on_with_less(config):
    whole, split = config("whole"), config("split")
    train(whole, evaluate=evaluate)
    run_killed_after(split, 5)
    less = dataclasses.replace(split, activation_checkpointing=True)
    train(less, evaluate=evaluate, resume=True)
    assert_same_run(whole.out, split.out)


def test_fewer_steps_than_are_made_are_refused(config):
    train(config(steps=5))
    with pytest.raises(ConfigError, match="has made 5 steps, this command asks for 3"):
        train(config(steps=3), resume=True)
    assert saved_config(config().out).steps == 5
    assert train(config(steps=5), resume=True).step == 5


@pytest.mark.parametrize(("tokens", "best"), [(65536, (4, 1.0)), (64, (8, 2.0))])
def test_held_out_losses_of_other_tokens_are_not_compared(config, tokens, best):
    train(config(steps=4), evaluate=lambda model: {"nats_per_token": 1.0})
    more = config(steps=8, valid_tokens=tokens)
    result = train(more, evaluate=lambda model: {"nats_per_token": 2.0}, resume=True)
    assert (result.best_step, result.best_loss) == best
    assert read_trainer(Path(config().out, "best")).step == best[0]


def test_a_file_stands_where_links_are_refused(config, monkeypatch, capsys):
    """As on exFAT, SMB and Windows; a run that began with links goes on with files."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    train(config("links"), evaluate=evaluate)
    run_killed_after(config(), 5)
    monkeypatch.setattr(os, "symlink", refuse)
    train(config(), evaluate=evaluate, resume=True)
    out, straight = Path(config().out), Path(config("links").out)
    assert (out / "last").read_text() == "checkpoints/step-00000012"
    for name in ("last", "best", ""):
        mine, theirs = metastate.load(out / name), metastate.load(straight / name)
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        assert tokenizer_of(mine, out / name).decode([116]) == "t"
        assert cli.main(["info", str(out / name)]) == 0
        assert "parameters" in capsys.readouterr().out
    assert read_trainer(checkpoint_folder(out / "last")).step == 12
    moments = config("from", from_checkpoint=str(out / "last"), model={}, steps=1)
    assert train(moments).step == 1
    assert train(config(steps=14), evaluate=evaluate, resume=True).step == 14
    (out / "last").write_text("../elsewhere")  # no name that `last` can have
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        metastate.load(out / "last")


def test_a_run_copied_with_its_links_followed_goes_on(config):
    train(config("whole"), evaluate=evaluate)
    train(config("first", steps=8), evaluate=evaluate)
    shutil.copytree(config("first").out, config("copy").out)
    last = Path(config("copy").out, "last")
    assert not last.is_symlink()
    (last / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="last is a folder, not a link.*move it elsewhere"):
        train(config("copy"), evaluate=evaluate, resume=True)
    assert (last / "notes").read_text() == "mine" and read_trainer(last).step == 8
    (last / "notes").unlink()
    train(config("copy", schedule="cosine"), evaluate=evaluate, resume=True)
    assert last.is_symlink() and Path(config("copy").out, "best").is_symlink()
    assert read_trainer(last).step == 12


def test_a_disk_that_cannot_be_written_is_said_on_resume(config, monkeypatch):
    train(config(steps=5))
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, "replace", raising(refused))
    with pytest.raises(CheckpointError, match=r"cannot be written.*Read-only.*mend that"):
        train(config(), resume=True)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_the_folder_is_held_until_its_writer_is_done(config, monkeypatch):
    """An error of the training does not leave a checkpoint half published to whoever is next."""
    fell, written, real = threading.Event(), [], checkpoint.write_checkpoint

    def slow(*args):
        assert fell.wait(300)
        time.sleep(0.5)
        written.append(real(*args))

    def progress(done, total, **figures):
        if done == 7:
            fell.set()
            raise Stop

    monkeypatch.setattr(trainer, "write_checkpoint", slow)
    with pytest.raises(Stop):
        train(config(async_checkpoint=True), progress=progress)
    assert [folder.name for folder in written] == ["step-00000005"]


def test_signals_that_are_ignored_stay_so():
    noted, before = [], signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals(noted.append):
            signal.raise_signal(signal.SIGINT)
            assert noted == []
            signal.raise_signal(signal.SIGHUP)
            assert noted == [signal.SIGHUP]
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_line_of_the_log_ends_at_its_end_alone(tmp_path):
    rows = [{"kind": "valid", "step": i, "domains": {"a\u2028b\x85": 1.0}} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "log").write_text("".join(lines), encoding="utf-8")
    assert plots.read_log(tmp_path / "log") == rows
    log.cut_log(tmp_path / "log", 1)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "".join(lines[:2])


def test_resuming_on_other_data_is_refused(config, tmp_path):
    train(config(steps=5))
    (tmp_path / "other.txt").write_text("something else " * 50)
    prepare([tmp_path / "other.txt"], "bytes", tmp_path / "other")
    with pytest.raises(ConfigError, match="not the data"):
        train(config(data=str(tmp_path / "other")), resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": ""}, ConfigError, "out is missing"),
        ({"data": "nowhere"}, DataError, "nowhere"),
        ({"seed": -1}, ConfigError, "seed is -1"),
        ({"seed": 10**14}, ConfigError, "seed is 1000.*; from 0 to"),
        ({"backend": "tritn"}, ConfigError, "backend is 'tritn'; allowed"),
        ({"tensorboard": True}, ConfigError, r"metastate\[tensorboard\]"),
        ({"preset": "metastat-tiny"}, ConfigError, "metastate-tiny"),
        ({"context": 100_000}, DataError, "context"),
        ({"model": {"vocab_size": 300}}, DataError, "vocabulary"),
        ({"model": {"num_layer": 3}}, ConfigError, "num_layers"),
        ({"device": "tpux"}, ConfigError, "tpux"),
        ({"preset": "transformer-tiny", "carry_state": True}, ConfigError, "recurrent"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(config, monkeypatch, changes, error, message):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(error, match=message):
        train(config(**changes) if "out" not in changes else TrainConfig(**changes))
    assert not Path(config().out).exists()


def test_the_largest_seed_trains(config):
    seed = metastate.config.SEEDS - 1
    growth = (GrowthStep(1, num_heads=3),)
    assert train(config(seed=seed, steps=2, growth=growth), grow=grow_in_training).step == 2


def test_a_run_that_ended_while_another_began_is_not_touched(config, monkeypatch):
    """The lock is taken before the folder is looked at and the model built."""
    first_model, finished = trainer._Run.first_model, []

    def late(self, *args):
        monkeypatch.undo()
        with pytest.raises(BusyError, match="another process works in"):
            train(config(steps=2))
        finished.append(self.out)
        return first_model(self, *args)

    monkeypatch.setattr(trainer._Run, "first_model", late)
    assert train(config()).step == 12 and finished
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config())


def test_a_users_folder_beside_the_checkpoints_stays(config):
    train(config(steps=5))
    folder = Path(config().out, "checkpoints")
    for name in ("step-00000005-keep", "step-7", "step-00000099.bak"):
        shutil.copytree(folder / "step-00000005", folder / name)
    assert train(config(), resume=True).step == 12
    names = ["step-00000005-keep", "step-00000012", "step-00000099.bak", "step-7"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "step-7" / "optimizer.safetensors").exists()
    shutil.rmtree(folder / "step-00000012")
    assert find_checkpoint(config().out) is None


def test_accumulation_equals_a_big_batch(config):
    weights = []
    for out, batch_size, accumulate in (("big", 6, 1), ("small", 2, 3)):
        settings = {"dtype": "float64", "batch_size": batch_size, "accumulate": accumulate}
        train(config(out, **settings, steps=3))
        weights.append(read_tensors(Path(config(out).out, "last", "model.safetensors")))
    for name, x in weights[0].items():
        assert torch.allclose(weights[1][name], x, rtol=1e-6, atol=1e-9), name


def test_the_first_steps_are_those_of_a_plain_loop(config, few_words):
    """The trainer against a loop that shares neither its loss nor its accumulation."""
    asked = config(dtype="float64", steps=3, z_loss=0.0, clip=0.5, warmup=0, schedule="constant")
    asked, losses = dataclasses.replace(asked, log_every=2), []
    torch.manual_seed(asked.seed)
    model = metastate.model.lm.LanguageModel(
        metastate.model.presets.preset(asked.preset, vocab_size=256, **MODEL)
    ).double()
    model.backend = "chunked"
    source = BatchSource(PreparedData.open(few_words).split("train"), 2, 16, asked.seed)
    optimizer = trainer.make_optimizer(model, asked)
    for i in range(3):
        batch = source.batch(i)
        logits, _ = model(batch.tokens, resets=batch.resets)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        set_learning_rate(optimizer, asked.lr)
        optimizer.step()
        optimizer.zero_grad()
    train(asked)
    found = read_tensors(Path(asked.out, "last", "model.safetensors"))
    for name, x in model.state_dict().items():
        assert torch.allclose(found[name], x, rtol=1e-6, atol=1e-9), name
    logged = [line["loss"] for line in read_log(asked.out)]  # means since the line before
    assert logged == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]])


def test_carried_state_is_used_and_matters(config, monkeypatch):
    seen = []

    def spy(model, tokens, targets, state=None, **options):
        seen.append(
            (None if state is None else state.tokens_seen, options["resets"][:, 0].tolist())
        )
        assert state is None or not any(x.requires_grad for x in state.tensors().values())
        return lm_loss(model, tokens, targets, state, **options)

    monkeypatch.setattr(distributed, "lm_loss", spy)
    train(config(steps=4, carry_state=True, document_reset=False))
    assert seen == [(None, [True, True]), *((16 * i, [False, False]) for i in (1, 2, 3))]


def test_a_loss_that_is_not_finite_stops_before_the_weights(config, monkeypatch):
    def evaluate_then_break(model):
        with torch.no_grad():
            model.blocks[1].ln1.weight[3] = math.inf
        return {"nats_per_token": 1.0}

    weights = {}

    def remember(model, optimizer, *rest):
        weights.update({k: v.clone() for k, v in model.state_dict().items()})

    asked = config(valid_every=7, checkpoint_every=5, steps=20)
    with pytest.raises(TrainingError, match="step 8: the loss is nan") as caught:
        train(asked, evaluate=evaluate_then_break)
    assert "Largest gradients: " in str(caught.value)
    assert "blocks." in str(caught.value)
    good = Path(asked.out, "last")
    assert str(good.resolve().name) in str(caught.value)
    assert good.resolve().name == "step-00000007"
    monkeypatch.undo()


def test_a_gradient_that_is_not_finite_names_its_parameter(config):
    steps = 0

    def progress(done, total, **figures):
        nonlocal steps
        steps = done

    torch.manual_seed(0)
    model = metastate.model.lm.LanguageModel(
        metastate.model.presets.preset("metastate-tiny", vocab_size=256, **MODEL)
    )
    before = None

    def poison(gradient):
        nonlocal before
        if steps == 6:
            before = {k: v.clone() for k, v in model.state_dict().items()}
            return gradient * math.nan
        return gradient

    model.blocks[0].ln2.bias.register_hook(poison)
    match = (
        r"step 7: .*Largest gradients: blocks.0.ln2.bias nan.*metastate train --from (.*) --data"
    )
    with pytest.raises(TrainingError, match=match) as told:
        train(config(), model=model, progress=progress)
    start = re.search(match, str(told.value))[1]  # what the message says works
    assert train(config("again", from_checkpoint=start, model={}, lr=5e-4)).step == 12
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    last = read_tensors(Path(config().out, "last", "model.safetensors"))
    assert all(torch.isfinite(x).all() for x in last.values())
    assert read_trainer(Path(config().out, "last")).step == 5


def test_held_out_loss_that_is_not_finite_is_never_the_best(config):
    losses = iter([math.nan, 2.0, math.inf])
    train(config(), evaluate=lambda model: {"nats_per_token": next(losses)})
    last = read_trainer(Path(config().out, "last"))
    assert (last.best_step, last.best_loss) == (8, 2.0)
    assert read_trainer(Path(config().out, "best")).step == 8


def test_of_equal_held_out_losses_the_first_is_the_best_whatever_mode_it_leaves(config):
    model = metastate.model.lm.LanguageModel(preset("metastate-tiny", vocab_size=256, **MODEL))
    modes = []

    def evaluate(model):
        model.eval()
        return {"nats_per_token": 2.0}

    def progress(*done, **figures):
        modes.append(model.training)

    train(config(), evaluate=evaluate, model=model, progress=progress)
    assert read_trainer(Path(config().out, "last")).best_step == 4
    assert modes == [True] * 12


def test_the_speed_is_of_all_batches_and_of_the_steps_alone(config, monkeypatch):
    clock = types.SimpleNamespace(monotonic=iter(range(99)).__next__)
    monkeypatch.setattr(trainer, "time", clock)  # looked at twice a step
    train(config(accumulate=3), evaluate=evaluate)
    lines = Path(config().out, "log.jsonl").read_text().splitlines()
    speeds = [row["tokens_per_s"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert speeds == [3 * 2 * 16] * 4


def test_weights_that_are_not_finite_are_no_start(config, tmp_path):
    model = metastate.model.lm.LanguageModel(preset("metastate-tiny", vocab_size=256, **MODEL))
    with torch.no_grad():
        model.head.weight[3, 3] = math.nan
    metastate.save(model, tmp_path / "broken")
    with pytest.raises(CheckpointError, match="head.weight"):
        train(config(from_checkpoint=str(tmp_path / "broken"), model={}))
    assert not Path(config().out, "run.json").exists()


def test_tensorboard_gets_the_same_figures(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tensorboard=True), evaluate=evaluate)
    events = EventAccumulator(str(Path(config().out, "tensorboard"))).Reload()
    shown = {e.step: e.value for e in events.Scalars("train/loss")}
    log = {r["step"]: r["loss"] for r in read_log(config().out) if r["kind"] == "train"}
    assert shown == pytest.approx(log)


SCRIPT = """
    import json, sys, torch
    sys.path[:0] = [sys.argv[2]]
    from train_runs import evaluate
    from metastate.config import TrainConfig
    from metastate.mapping import from_dict
    from metastate.errors import TrainingError
    from metastate.train.trainer import train

    torch.set_num_threads(1)
    config = from_dict(TrainConfig, json.loads(sys.argv[1]))
    exec(sys.argv[4])
    try:
        result = train(config, evaluate=evaluate, resume=sys.argv[3] == "resume")
        print(json.dumps([result.step, result.interrupted]))
    except TrainingError as error:
        print(error)
"""


def start(config, resume=False, before="pass"):
    arguments = [json.dumps(to_dict(config)), str(Path(__file__).parents[1])]
    arguments += ["resume" if resume else "start", before]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(process, config, step):
    log = Path(config.out, "log.jsonl")
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(json.loads(x)["step"] >= step for x in lines[-1:] if x.endswith("}")):
            return
        time.sleep(0.005)


def test_kill_9_at_random_moments(config):
    asked = {"steps": 24, "checkpoint_every": 1, "log_every": 1, "valid_every": 7}
    done = start(config("straight", **asked)).communicate()
    assert done[0] == "[24, null]\n", done[1]
    broken, resume, draw = config("broken", **asked), False, random.Random(0)
    for _ in range(3):
        process = start(broken, resume)
        reached = read_trainer(Path(broken.out, "last")).step if resume else 0
        wait_for_step(process, broken, reached + 5)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        metastate.load(Path(broken.out, "last"))
        resume = True
    done = start(broken, resume).communicate()
    assert done[0] == "[24, null]\n", done[1]
    assert_same_run(config("straight").out, broken.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(config, number):
    asked = {"steps": 100_000, "checkpoint_every": 100_000, "valid_every": 100_000, "log_every": 1}
    process = start(config(**asked))
    wait_for_step(process, config(), 3)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 0, err
    step, interrupted = json.loads(out)
    assert interrupted == number and 3 <= step < 100_000
    assert "finishing the step" in err
    assert read_trainer(Path(config().out, "last")).step == step
    train(config(**asked | {"steps": step + 2}), resume=True)
    asked["steps"] = step + 2
    assert [r["step"] for r in read_log(config().out)][-3:] == [step, step + 1, step + 2]


def test_the_second_signal_kills(config):
    slow = """if True:
        import metastate.train.trainer as t, time
        t._Run.update = lambda self: (print("in a step", flush=True), time.sleep(600))
    """
    process = start(config(), before=textwrap.dedent(slow))
    assert process.stdout.readline() == "in a step\n"  # by now signals are the run's own
    process.send_signal(signal.SIGINT)
    assert "finishing" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_at_a_line_of_the_log(config):
    Path(config().out).mkdir()
    Path(config().out, "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot write .*log\.jsonl: No space.*--resume"):
        train(config())


def test_a_log_that_cannot_be_synced_is_told(config, monkeypatch):
    def full(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def progress(done, total, **figures):
        monkeypatch.setattr(log.os, "fsync", full)

    with pytest.raises(TrainingError, match=r"cannot write .*log\.jsonl: Input/output.*mend that"):
        train(config(steps=1), progress=progress)


def test_a_full_disk_while_training(config):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))"
    asked = config(steps=10, checkpoint_every=5)
    process = start(asked, before=limit)
    out, err = process.communicate()
    assert "checkpoint of step 4 could not be written" in out, err
    assert not list(Path(asked.out, "checkpoints").iterdir())
    done = start(asked, resume=True).communicate()
    assert done[0] == "[10, null]\n", done[1]
