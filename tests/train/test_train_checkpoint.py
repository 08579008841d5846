"""Checkpoints: what is saved comes back, and a kill or a full disk never harms the one before."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import metastate
from metastate.config import ModelConfig, TrainConfig
from metastate.data.files import write_tensors
from metastate.errors import CheckpointError, StateError, TrainingError
from metastate.model.io import read_tensors
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.state import ModelState
from metastate.train import checkpoint
from metastate.train.checkpoint import (
    Snapshot,
    TrainerState,
    find_checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from metastate.train.optim import make_optimizer

CONFIG = TrainConfig()


def make(seed=0):
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2))
    model.backend = "reference"
    return model, make_optimizer(model, CONFIG)


def step(model, optimizer):
    tokens = torch.randint(0, 11, (2, 5))
    out = lm_loss(model, tokens, tokens)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return out.state.detach()


def at(step, **fields):
    return TrainerState(step=step, tokens=step * 10, config=CONFIG, data="abc", **fields)


def save_checkpoint(out, *args):
    return write_checkpoint(out, Snapshot.of(*args))


def same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_everything_comes_back(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    carried = step(model, optimizer)
    trainer = at(2, best_step=2, best_loss=1 / 3, window_nats=0.1, window_tokens=7)
    folder = save_checkpoint(tmp_path, model, optimizer, trainer, carried)
    other, other_optimizer = make(seed=1)
    found, state = load_checkpoint(find_checkpoint(tmp_path), other, other_optimizer)
    assert found == trainer
    assert find_checkpoint(tmp_path) == folder
    same(model, other)
    assert state.tokens_seen == carried.tokens_seen
    for name, x in carried.tensors().items():
        assert torch.equal(state.tensors()[name], x), name
    for mine, theirs in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        for name, p, q in zip(mine["names"], mine["params"], theirs["params"], strict=True):
            a, b = optimizer.state[p], other_optimizer.state[q]
            assert a.keys() == b.keys() and len(a) == 3, name
            assert all(torch.equal(a[key], b[key]) for key in a), name
    torch.manual_seed(5)
    step(model, optimizer)
    torch.manual_seed(5)
    step(other, other_optimizer)
    same(model, other)


def test_last_and_best_are_model_folders(tmp_path):
    model, optimizer = make()
    models = {}
    for i in range(1, 5):
        step(model, optimizer)
        models[i] = {k: v.clone() for k, v in model.state_dict().items()}
        save_checkpoint(tmp_path, model, optimizer, at(i, best_step=min(i, 2), best_loss=1.0))
    for link, i in (("last", 4), ("best", 2)):
        loaded = metastate.load(tmp_path / link).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in models[i].items())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]
    assert not (tmp_path / "best" / "optimizer.safetensors").exists()


def test_the_newest_is_the_one_of_most_steps_however_many_digits_they_have(tmp_path):
    for name in ("step-99999999", "step-100000000", "step-0100000001"):  # the last is not ours
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert find_checkpoint(tmp_path) == checkpoint.checkpoint_of(tmp_path, 10**8)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot open a folder")
def test_a_checkpoint_is_on_the_disk_before_its_link_and_that_before_the_return(
    tmp_path, disk_order
):
    save_checkpoint(tmp_path, *make(), at(1))
    folder, out = (path.stat().st_ino for path in (tmp_path / "checkpoints", tmp_path))
    assert disk_order[-4:] == ["step-00000001", folder, "last", out]


def test_no_pickle_is_written(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    folder = save_checkpoint(tmp_path, model, optimizer, at(1))
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}


CALLS = ("fsync", "replace", "symlink", "unlink", "rmdir", "mkdir")


def save_in_a_child_that_dies(number, out, model, optimizer, trainer):
    """Save in a forked process that ends at system call `number`; return whether it lived."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(call):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)
                return call(*args, **kwargs)

            return wrapper

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            save_checkpoint(out, model, optimizer, trainer)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(tmp_path):
    old, old_optimizer = make()
    step(old, old_optimizer)
    save_checkpoint(tmp_path / "start", old, old_optimizer, at(1, best_step=1, best_loss=1.0))
    new, new_optimizer = make()
    step(new, new_optimizer)
    step(new, new_optimizer)
    found_steps = set()
    for number in range(1, 200):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", out, symlinks=True)
        trainer = at(2, best_step=2, best_loss=0.5)
        lived = save_in_a_child_that_dies(number, out, new, new_optimizer, trainer)
        metastate.load(out / "last")
        metastate.load(out / "best")
        model, optimizer = make(seed=3)
        found, _ = load_checkpoint(find_checkpoint(out), model, optimizer)
        same(model, {1: old, 2: new}[found.step])
        same(metastate.load(out / "last"), model)
        found_steps.add(found.step)
        if found.step == 1:  # the run goes on over the leftovers
            save_checkpoint(out, new, new_optimizer, trainer)
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
        shutil.rmtree(out)
        if lived:
            break
    assert lived and number > 15
    assert found_steps == {1, 2}


def test_a_carried_state_that_cannot_be_written_or_read_is_a_checkpoint_s_fault(
    tmp_path, monkeypatch
):
    model, optimizer = make()
    step(model, optimizer)
    state = model.init_state(2)
    first = save_checkpoint(tmp_path, model, optimizer, at(1), state)

    def full(*args, **kwargs):
        raise StateError("no room") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ModelState, "save", full)
        with pytest.raises(TrainingError, match="step 2 could not be written"):
            save_checkpoint(tmp_path, model, optimizer, at(2), state)
    assert [first] == list((tmp_path / "checkpoints").iterdir())
    (first / "state.safetensors").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load_checkpoint(find_checkpoint(tmp_path), *make(seed=1))


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    model, optimizer = make()
    step(model, optimizer)
    before = save_checkpoint(tmp_path, model, optimizer, at(1))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, optimizer)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(
            TrainingError, match=r"step 2 could not be written.*make room.*--resume"
        ):
            save_checkpoint(tmp_path, model, optimizer, at(2))
    assert [before] == list((tmp_path / "checkpoints").iterdir())
    other, other_optimizer = make(seed=1)
    load_checkpoint(find_checkpoint(tmp_path), other, other_optimizer)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in weights.items())
    assert save_checkpoint(tmp_path, model, optimizer, at(2)).exists()


def test_a_real_limit_on_file_sizes(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    before = save_checkpoint(tmp_path, model, optimizer, at(1))
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from test_train_checkpoint import at, make, save_checkpoint, step
        from metastate.errors import TrainingError

        model, optimizer = make()
        step(model, optimizer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        try:
            save_checkpoint(sys.argv[1], model, optimizer, at(2))
        except TrainingError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path, Path(__file__).parent],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2 could not be written" in done.stdout and str(before) in done.stdout
    assert [before] == list((tmp_path / "checkpoints").iterdir())
    load_checkpoint(find_checkpoint(tmp_path), *make())


def damage(name, change):
    def apply(folder):
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return apply


def moments(change):
    def apply(folder):
        file = folder / "optimizer.safetensors"
        found = {name: x.clone() for name, x in read_tensors(file).items()}
        write_tensors(file, found | change(found))

    return apply


def newer(content):
    return json.dumps(json.loads(content) | {"version": 99}).encode()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage("model.safetensors", lambda b: b[:-1]), "model.safetensors"),
        (damage("optimizer.safetensors", lambda b: b[:50]), "optimizer.safetensors"),
        (damage("optimizer.safetensors", lambda b: b.replace(b"exp_avg:", b"exp_abc:")), "lacks"),
        (
            moments(lambda t: {"exp_avg:ln0.bias": t["exp_avg:ln0.bias"][:1]}),
            r"exp_avg of ln0.bias is \[1\], the model needs \[8\]",
        ),
        (moments(lambda t: {"step:x": t["step:ln0.bias"]}), "holds 'step:x', which this model"),
        (damage("trainer.json", lambda b: b[:-5]), "trainer.json is missing or broken"),
        (damage("trainer.json", lambda b: b"[" * 200_000), "trainer.json is missing or broken"),
        (damage("trainer.json", newer), "version 99.*newer metastate"),
        (damage("trainer.json", lambda b: b.replace(b'"tokens"', b'"token"')), "'token'"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.*missing"),
    ],
)
def test_damage_is_named(tmp_path, spoil, message):
    model, optimizer = make()
    step(model, optimizer)
    spoil(save_checkpoint(tmp_path, model, optimizer, at(1)))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(find_checkpoint(tmp_path), *make())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = make()
    save_checkpoint(tmp_path, model, optimizer, at(1))
    other = LanguageModel(ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2))
    with pytest.raises(CheckpointError, match="does not have"):
        load_checkpoint(find_checkpoint(tmp_path), other, make_optimizer(other, CONFIG))


def test_every_setting_may_change_or_not():
    fields = set(TrainConfig.__dataclass_fields__)
    assert fields > checkpoint.MAY_CHANGE
