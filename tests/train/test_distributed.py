"""Many processes train as one does: the same losses, checkpoints for any number, kills, signals."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import metastate
from metastate.config import GrowthStep, TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import CheckpointError, ConfigError, TrainingError
from metastate.eval import loss
from metastate.growth import grow_in_training
from metastate.mapping import from_dict, to_dict
from metastate.model.io import read_tensors
from metastate.train import checkpoint, distributed
from metastate.train.checkpoint import Writer, read_trainer
from metastate.train.trainer import train
from ranks import PATIENCE_S, run_ranks
from train_runs import read_log, short_run

MODEL = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "head_size": 4, "ffn_size": 8}
VARIANTS = {
    "ddp": {"parallel": "ddp", "accumulate": 2},
    "ddp_carry": {"parallel": "ddp", "carry_state": True, "async_checkpoint": True},
    "ddp_growth": {
        "parallel": "ddp",
        "growth": (GrowthStep(4, num_heads=3, old_lr_scale=0.0),),
        "carry_state": True,
    },
    "fsdp": {"parallel": "fsdp", "accumulate": 2, "async_checkpoint": True},
    "fsdp_tokens": {
        "parallel": "fsdp",
        "model": MODEL | {"parameter_tokens": 3},
        "activation_checkpointing": True,
        "backend": "auto",
    },
    "hsdp": {"parallel": "hsdp", "shard_size": 1},
    "context": {"parallel": "ddp", "context_parallel": 2, "carry_state": True},
    "context_fsdp": {
        "parallel": "fsdp",
        "context_parallel": 2,
        "document_reset": False,
    },
    "transformer": {"parallel": "fsdp", "preset": "transformer-tiny"},
    "hsdp_4": {"parallel": "hsdp", "shard_size": 2},
    "grid_4": {"parallel": "fsdp", "context_parallel": 2, "carry_state": True},
}
ALONE = {"parallel": "none", "shard_size": 0, "context_parallel": 1, "async_checkpoint": False}
FAST = ("ddp_growth", "fsdp", "context")


@pytest.fixture
def config(few_words, tmp_path):
    asked = {"model": MODEL, "steps": 8, "batch_size": 4, "schedule": "constant"}
    return short_run(few_words, tmp_path, **asked, log_every=1, checkpoint_every=3)


def evaluate(model):
    """Score a fixed line with everything but the loss's own code."""
    tokens = torch.tensor([list(b"the state reads the state")])
    x, _, _ = model.features(tokens[:, :-1])
    nll = torch.nn.functional.cross_entropy(model.head(x)[0].float(), tokens[0, 1:])
    return {"nats_per_token": float(nll)}


def run(config, resume=False):
    grow = grow_in_training if config.growth else None
    return train(config, evaluate=evaluate, resume=resume, grow=grow)


def assert_close(a, b, rel=1e-5):
    mine, theirs = read_log(a), read_log(b)
    assert [(r["kind"], r["step"], r["tokens"]) for r in mine] == [
        (r["kind"], r["step"], r["tokens"]) for r in theirs
    ]
    for x, y in zip(mine, theirs, strict=True):
        for name in x.keys() & {"loss", "grad_norm", "lr", "nats_per_token"}:
            assert x[name] == pytest.approx(y[name], rel=rel), (name, x, y)


def files_of(out):
    return {n: read_tensors(Path(out, "last", f"{n}.safetensors")) for n in ("model", "optimizer")}


def assert_same_files(a, b):
    mine, theirs = files_of(a), files_of(b)
    for name in mine:
        assert mine[name].keys() == theirs[name].keys()
        for key, x in mine[name].items():
            assert torch.equal(x.flatten(), theirs[name][key].flatten()), key


def train_all(rank, jobs):
    """Run (config, resume) after (config, resume) in this process of several."""
    torch.set_num_threads(1)
    return [run(config, resume).step for config, resume in jobs]


def rejects(rank, config):
    own = TrainConfig(**to_dict(config) | {"seed": rank})
    with pytest.raises(ConfigError) as told:
        run(own)
    return str(told.value)


def losses_of(out):
    return [r["loss"] for r in read_log(out) if r["kind"] == "train"]


def compare_with_one(config, names, world, steps=8, rel=1e-5, **more):
    """Train on `world` processes and on one; go on with the other number each time."""
    jobs = []
    for name in names:
        asked = VARIANTS[name] | more | {"steps": steps}
        run(config(f"one_{name}", **asked | ALONE))
        jobs += [
            (config(f"many_{name}", **asked), False),
            # the same in two parts, and the end of what one process began
            (config(f"parts_{name}", **asked | {"steps": steps - 2}), False),
            (config(f"parts_{name}", **asked), True),
        ]
        run(config(f"from_one_{name}", **asked | ALONE | {"steps": steps - 2}))
        jobs.append((config(f"from_one_{name}", **asked), True))
    found = run_ranks(train_all, world, jobs, timeout=400)
    assert found == [[c.steps for c, _ in jobs]] * world
    for name in names:
        one, many = config(f"one_{name}").out, config(f"many_{name}").out
        assert_close(one, many, rel)
        assert_same_files(many, config(f"parts_{name}").out)
        # Bit for bit what one process reads is what many wrote.
        model, tensors = metastate.load(Path(many, "last")), files_of(many)["model"]
        assert all(torch.equal(x, tensors[k]) for k, x in model.state_dict().items())
        assert model.step == steps
        asked = VARIANTS[name] | more | {"steps": steps + 2}
        run(config(f"many_{name}", **asked | ALONE), resume=True)
        run(config(f"one_{name}", **asked | ALONE), resume=True)
        assert_close(one, many, rel)
        from_one = losses_of(config(f"from_one_{name}").out)
        assert from_one == pytest.approx(losses_of(one)[:steps], rel=rel)


@pytest.mark.dist
def test_two_processes_train_as_one(config):
    compare_with_one(config, FAST, 2)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_train_as_one_in_every_way(config):
    compare_with_one(config, [n for n in VARIANTS if n not in FAST and "_4" not in n], 2)


@pytest.mark.dist
@pytest.mark.slow
def test_four_processes_train_as_one_over_fifty_steps(config):
    """In float64 to 1e-9, so that what is left in float32 is rounding; there the losses to 1e-5."""
    names = ("ddp", "fsdp", "hsdp_4", "transformer", "grid_4")
    compare_with_one(config, names, 4, steps=50, rel=1e-9, dtype="float64")
    jobs = [(config(f"many32_{n}", **VARIANTS[n] | {"steps": 50}), False) for n in names]
    run_ranks(train_all, 4, jobs, timeout=400)
    for name in names:
        one = config(f"one32_{name}", **VARIANTS[name] | ALONE | {"steps": 50})
        run(one)
        many = losses_of(config(f"many32_{name}").out)
        assert many == pytest.approx(losses_of(one.out), rel=1e-5)


def validates_both_ways(rank, jobs):
    """Train; return every validation's loss and forwards, divided and done by each process."""
    torch.set_num_threads(1)
    loss.CHUNK = 8  # so that a window takes two forwards
    found = []
    for config in jobs:
        data = PreparedData.open(config.data)
        ways = [loss.held_out(data, c) for c in (config, replace(config, parallel="none"))]

        def both(model, ways=ways):
            forwards = []
            hook = model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
            for score in ways:
                found.append((score(model)["nats_per_token"], len(forwards)))
                forwards.clear()
            hook.remove()
            return {"nats_per_token": found[-2][0]}

        train(config, evaluate=both, grow=grow_in_training if config.growth else None)
    return found


@pytest.mark.dist
def test_processes_divide_the_held_out_text(config):
    """FSDP's split weights are there only where all make as many forwards."""
    asked = {"dtype": "float64", "steps": 5, "valid_every": 5}
    jobs = [
        config("growth", **VARIANTS["ddp_growth"] | asked),
        config("context", **VARIANTS["context_fsdp"] | asked),
        config("one_token", **VARIANTS["fsdp"] | asked | {"valid_tokens": 1}),
    ]
    mine, theirs = run_ranks(validates_both_ways, 2, jobs)
    assert mine == theirs and len(mine) == 2 * (3 + 1 + 1)  # before and after growth, at the end
    for (divided, few), (alone, many) in zip(mine[::2], mine[1::2], strict=True):
        assert divided == pytest.approx(alone, rel=1e-12)
        assert few < many or many == 1


@pytest.mark.dist
def test_other_settings_on_another_process_are_told_to_all(config):
    told = run_ranks(rejects, 2, config(parallel="ddp"))
    assert all("process 1 has another seed than process 0" in message for message in told)
    assert not Path(config().out).exists()


def goes_on_elsewhere(rank, config, folder):
    """Go on where rank 1 sees another folder; return what each was told."""
    torch.set_num_threads(1)
    os.chdir(folder if rank == 0 else Path(folder, "elsewhere"))
    try:
        return run(config, resume=True).step
    except CheckpointError as error:
        return str(error)


@pytest.mark.dist
def test_all_processes_go_on_from_the_first_ones_checkpoint(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    asked = TrainConfig(**vars(config()) | {"out": "run"})
    run(TrainConfig(**vars(asked) | {"steps": 3}))
    many = TrainConfig(**vars(asked) | {"parallel": "ddp", "steps": 4})

    def told():
        return run_ranks(goes_on_elsewhere, 2, many, str(tmp_path))

    not_seen = "process 1 does not see run/checkpoints/step-00000003 as process 0 does"
    assert all(not_seen in message and "share" in message for message in told())
    # Another run's checkpoint of that step, and a newer one that only process 1 has.
    shutil.copytree("run", "elsewhere/run", symlinks=True)
    os.rename("elsewhere/run/checkpoints/step-00000003", "elsewhere/run/checkpoints/step-00000005")
    shutil.copytree("run/last", "elsewhere/run/checkpoints/step-00000003")
    file = Path("elsewhere/run/checkpoints/step-00000003/trainer.json")
    file.write_text(file.read_text().replace('"window_nats": ', '"window_nats": 1'))
    assert all(not_seen in message for message in told())
    shutil.rmtree("elsewhere/run")
    os.symlink(tmp_path / "run", "elsewhere/run")
    assert told() == [4, 4]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_no_thread_of_a_group_outlives_the_run(config, monkeypatch):
    """One that is left can abort Python's end, and torchrun would start a finished run again."""

    def threads():
        names = (task.read_text() for task in Path("/proc/self/task").glob("*/comm"))
        return sum("gloo" in name for name in names)

    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = threads()

    def progress(done, total, **figures):
        assert threads() > before

    assert train(config(parallel="ddp", steps=2), progress=progress).step == 2
    end = time.monotonic() + 60  # a thread that has ended may be listed a little longer
    while threads() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == before


def torchrun(config, *more):
    """Start `metastate train` on two processes under torchrun, in a session of its own."""
    asked = to_dict(config)
    flags = [
        f"--set={key}={json.dumps(value)}"
        for key, value in asked.items()
        if value != to_dict(TrainConfig())[key] and key != "growth"
    ]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--max-restarts=1"),
            *("--monitor-interval=0.1", "-m", "metastate", "train", *flags, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )


def workers_of(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid)
        for pid in listed
        if b"metastate" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]


def finish(process, timeout=400):
    """Return what the process said; nothing of it is left running."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(process, config, step, timeout=400):
    log, end = Path(config.out, "log.jsonl"), time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(json.loads(x)["step"] >= step for x in lines[-1:] if x.endswith("}")):
            return
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"step {step} was never reached: {process.communicate()[0][-3000:]}")


def under_torchrun(monkeypatch, restarts, name="none", agent=7, machines=1):
    for key, value in {"RUN_ID": name, "RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{key}", str(value))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1 // machines))
    monkeypatch.setattr(distributed.os, "getppid", lambda: agent)


@pytest.mark.parametrize(
    ("first", "again", "goes_on"),
    [
        ({"agent": 7}, {"agent": 7}, True),
        ({"agent": 7}, {"agent": 8}, False),  # another command
        ({"name": "a", "agent": 7}, {"name": "a", "agent": 8}, False),
        ({"name": "a", "machines": 2}, {"name": "a", "machines": 2, "agent": 8}, True),
        ({"name": "a", "machines": 2}, {"name": "b", "machines": 2}, False),
    ],
)
def test_only_the_command_that_began_a_run_restarts_it(config, monkeypatch, first, again, goes_on):
    under_torchrun(monkeypatch, 0, **first)
    run(config(steps=3))
    under_torchrun(monkeypatch, 0, **again)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config())
    under_torchrun(monkeypatch, 1, **again)
    if goes_on:
        assert run(config()).step == 8
        return
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config())
    under_torchrun(monkeypatch, 0, **again)
    assert run(config(steps=6), resume=True).step == 6
    under_torchrun(monkeypatch, 1, **again)
    assert run(config()).step == 8  # this command went on with it, and was started again


def test_a_run_from_before_commands_were_told_apart_goes_on(config, monkeypatch):
    run(config(steps=3))
    file = Path(config().out, "run.json")
    record = json.loads(file.read_text())
    assert record.pop("launch") == ""
    file.write_text(json.dumps(record))
    under_torchrun(monkeypatch, 1)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config())
    assert run(config(), resume=True).step == 8


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_kill_9_of_one_process_and_torchrun_restarts_all(config):
    asked = {"parallel": "fsdp", "steps": 80, "checkpoint_every": 10, "valid_every": 1000}
    broken = config("broken", **asked)
    process = torchrun(broken)
    wait_for_step(process, broken, 25)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    assert read_trainer(Path(broken.out, "last")).step == 80
    steps = [r["step"] for r in read_log(broken.out) if r["kind"] == "train"]
    assert steps == list(range(1, 81))  # lines after the checkpoint were made again
    run(config("one", **asked | ALONE))
    # Over 80 steps rounding grows; a batch read twice or left out would show at once.
    mine, one = (
        {r["step"]: r["loss"] for r in read_log(out) if r["kind"] == "train"}
        for out in (broken.out, config("one").out)
    )
    assert all(mine[i] == pytest.approx(one[i], rel=1e-3) for i in one)


@pytest.mark.dist
def test_a_signal_stops_all_after_the_same_step(config):
    asked = {"parallel": "ddp", "steps": 100_000, "checkpoint_every": 100_000}
    asked |= {"valid_every": 100_000}
    process = torchrun(config(**asked))
    wait_for_step(process, config(), 3)
    process.send_signal(signal.SIGINT)
    said = finish(process)
    assert "stopped by SIG" in said, said
    step = read_trainer(Path(config().out, "last")).step
    assert step >= 3
    assert read_log(config().out)[-1]["step"] == step
    run(config(**asked | ALONE | {"steps": step + 2}), resume=True)
    assert read_log(config().out)[-1]["step"] == step + 2


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"parallel": "ddp"}, {}, "start it with `torchrun"),
        ({}, {"WORLD_SIZE": "2"}, "parallel is 'none'"),
        ({"context_parallel": 2}, {}, "add --parallel ddp"),
        ({"parallel": "ddp", "shard_size": 2}, {"WORLD_SIZE": "2"}, "shard_size is of parallel"),
        ({"parallel": "fsdp", "batch_size": 3}, {"WORLD_SIZE": "2"}, "batch_size is 3, with 2"),
        ({"parallel": "ddp", "context_parallel": 3}, {"WORLD_SIZE": "2"}, "divide the number"),
        ({"parallel": "ddp", "context_parallel": 3}, {"WORLD_SIZE": "3"}, "context is 16, with 3"),
        ({"parallel": "hsdp", "shard_size": 3}, {"WORLD_SIZE": "4"}, "shard_size is 3, with 4"),
        (
            {"parallel": "fsdp", "growth": (GrowthStep(4, num_heads=3),)},
            {"WORLD_SIZE": "2"},
            "cannot grow inside a run; use --parallel ddp",
        ),
        ({"parallel": "fsdp", "old_lr_scale": 0.5}, {"WORLD_SIZE": "2"}, "--parallel ddp"),
        ({"parallel": "dp"}, {}, "allowed: 'none', 'ddp', 'fsdp', 'hsdp'"),
        ({"shard_size": -1}, {}, "shard_size is -1"),
        ({"context_parallel": 0}, {}, "context_parallel is 0"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    config, monkeypatch, changes, environment, message
):
    for name, value in ({"RANK": "0"} | environment if environment else {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        run(from_dict(TrainConfig, to_dict(config()) | changes))
    assert not Path(config().out).exists()


def test_a_checkpoint_beside_the_training_is_the_same(config):
    run(config("beside", async_checkpoint=True, carry_state=True))
    run(config("plain", carry_state=True))
    assert_same_files(config("beside").out, config("plain").out)
    assert read_log(config("beside").out) == read_log(config("plain").out)
    states = [Path(config(x).out, "last", "state.safetensors") for x in ("beside", "plain")]
    a, b = map(read_tensors, states)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_training_goes_on_while_a_checkpoint_is_written(config, monkeypatch, tmp_path):
    """A write that takes until step 6: what it writes is step 3, and no newer folder is half."""
    go_on, written, real = threading.Event(), [], checkpoint.write_checkpoint

    def slow(out, snapshot, group):
        assert go_on.wait(300)
        written.append(snapshot.trainer.step)
        shutil.copytree(real(out, snapshot, group), tmp_path / f"{written[-1]}" / "last")

    monkeypatch.setattr("metastate.train.trainer.write_checkpoint", slow)

    def progress(done, total, **figures):
        if done == 5:
            assert written == [] and checkpoint.find_checkpoint(config().out) is None
            go_on.set()

    train(config(async_checkpoint=True), progress=progress)
    assert written == [3, 6, 8]
    monkeypatch.undo()
    for step in written:
        run(config(f"to_{step}", steps=step))
        assert_same_files(tmp_path / f"{step}", config(f"to_{step}").out)


def test_an_error_of_the_background_write_comes_up(config, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(source).endswith(".tmp") and Path(source).is_dir() and "step-" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    run(config(async_checkpoint=True, steps=3))
    before = files_of(config().out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", full)
        with pytest.raises(TrainingError, match=r"step \d could not be written.*step-00000003"):
            run(config(async_checkpoint=True, steps=8, valid_every=1000), resume=True)
    after = files_of(config().out)
    assert all(torch.equal(before["model"][k], x) for k, x in after["model"].items())
    assert run(config(steps=8), resume=True).step == 8


def test_the_writer_runs_one_job_at_a_time():
    order, writer = [], Writer(beside=True)
    gate = threading.Event()
    writer.write(lambda: (gate.wait(300), order.append(1)))
    assert order == []
    gate.set()
    writer.write(lambda: order.append(2))
    writer.wait()
    writer.wait()
    assert order == [1, 2]
    for told in (writer.wait, lambda: writer.write(lambda: order.append(3))):
        writer.write(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            told()
    writer.wait()
    assert order == [1, 2]


def disk_full_for_the_first(rank, config, name):
    """Train where only rank 0 cannot put the file or folder `name` in place."""
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    if rank == 0:
        checkpoint.os.replace = full
    with pytest.raises(TrainingError) as told:
        run(config)
    return str(told.value)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("variant", "name"),
    [("ddp", "step-00000003"), ("fsdp", "step-00000003"), ("fsdp", "optimizer.safetensors")],
)
def test_what_the_first_process_alone_cannot_write_all_are_told(config, variant, name):
    settings = VARIANTS[variant] | {"steps": 3, "valid_every": 1000, "async_checkpoint": False}
    told = run_ranks(disk_full_for_the_first, 2, config(**settings), name)
    assert told[0] == told[1]
    assert "the checkpoint of step 3 could not be written: the disk is full" in told[0]


def waits_for_files(rank, config):
    """Write for longer than the processes wait for each other's tensors."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    with distributed.join(config) as team:
        _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        team.write(lambda: time.sleep(3))
        _set_pg_timeout(timedelta(seconds=PATIENCE_S), dist.group.WORLD)
        return len(team.everyone(rank))


@pytest.mark.dist
def test_all_wait_for_files_longer_than_for_each_other(config):
    assert run_ranks(waits_for_files, 2, config(parallel="ddp")) == [2, 2]


def sharded_disk_full(rank, folder):
    """Save parts where only rank 1 cannot write; both must hear of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x = torch.arange(5.0).view(5, 1)
    mesh = init_device_mesh("cpu", (2,))
    tensors = {"x": distribute_tensor(x, mesh, [Shard(0)]), "n": torch.tensor(3.0)}
    distributed.save_sharded(Path(folder, "a"), {"model.safetensors": tensors}, dist.group.WORLD)
    dist.barrier()
    found = read_tensors(Path(folder, "a", "model.safetensors"))
    assert torch.equal(found["x"], x) and found["n"].tolist() == [3.0]
    assert sorted(p.name for p in Path(folder, "a").iterdir()) == ["model.safetensors"]
    like = distributed.placed(found["x"], tensors["x"])
    assert torch.equal(distributed.whole(like), x)
    if rank == 1:
        import torch.distributed.checkpoint.filesystem as filesystem

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        filesystem._write_files_from_queue = full
    with pytest.raises(metastate.errors.CheckpointError, match="No space left"):
        distributed.save_sharded(
            Path(folder, "b"), {"model.safetensors": tensors}, dist.group.WORLD
        )
    return math.isfinite(float(x.sum()))


@pytest.mark.dist
def test_parts_are_put_together_and_a_full_disk_is_heard_by_all(tmp_path):
    assert run_ranks(sharded_disk_full, 2, str(tmp_path)) == [True, True]
