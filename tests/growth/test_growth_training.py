"""Training a grown model: frozen, slowed or free; growth inside a run; resume."""

import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import metastate
from metastate.config import GrowthStep, ModelConfig, TrainConfig
from metastate.errors import CheckpointError, ConfigError
from metastate.growth import grow, grow_in_training, grow_moments
from metastate.mapping import from_dict
from metastate.model.io import read_tensors
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.regions import regions
from metastate.train.optim import (
    adopt_moments,
    grown_regions,
    learning_rate,
    make_optimizer,
    moments,
    whole_moments,
)
from metastate.train.trainer import train
from train_runs import evaluate, read_log, short_run

SIZES = {
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "head_size": 4,
    "parameter_tokens": 1,
    "meta_state": {"readout": "both", "encoder_query": "input"},
}


@pytest.fixture
def config(few_words, tmp_path):
    asked = {"model": SIZES, "steps": 10, "warmup": 2, "lr": 1e-2, "weight_decay": 0.5}
    return short_run(few_words, tmp_path, **asked, log_every=2, checkpoint_every=4)


def fresh(**changes):
    torch.manual_seed(0)
    return LanguageModel(from_dict(ModelConfig, {"vocab_size": 256} | SIZES | changes))


def grown_checkpoint(config, tmp_path, **sizes):
    """Train a little, grow, save with moments; return the folder, the parent's and its weights."""
    train(config("first"))
    folder = tmp_path / "first" / "last"
    model = metastate.load(folder)
    grown = grow(model, **sizes)
    metastate.save(grown, tmp_path / "big")
    return model, grown


ALL = {"head_size": 7, "num_heads": 3, "parameter_tokens": 3, "num_layers": 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_entries_stay_bit_by_bit(config, tmp_path, dtype, checkpointing):
    model, grown = grown_checkpoint(config, tmp_path, **ALL)
    settings = {
        "from_checkpoint": str(tmp_path / "big"),
        "old_lr_scale": 0.0,
        "model": {},
        "dtype": dtype,
        "activation_checkpointing": checkpointing,
    }
    train(config("second", **settings))
    after = metastate.load(tmp_path / "second")
    moved = 0
    for name, part in regions(grown, model.config).items():
        old, new = grown.get_parameter(name), after.get_parameter(name)
        if part.old is not None:
            assert torch.equal(part.old.of(old), part.old.of(new)), name
        moved += sum(not torch.equal(r.of(old), r.of(new)) for r in part.new.values())
    assert moved > 20


def test_frozen_entries_have_no_moments_and_whole_parameters_no_gradient(config, tmp_path):
    model, grown = grown_checkpoint(config, tmp_path, **ALL)
    optimizer = make_optimizer(grown, config(), old_lr_scale=0.0)
    count = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    old = model.count_parameters()["total"] + 2 * 4 * 4  # and the identity that W_p begins with
    assert count == grown.count_parameters()["total"] - old
    assert (
        not grown.embedding.weight.requires_grad
        and grown.get_parameter("blocks.0.time_mix.key.weight").requires_grad
    )


@pytest.mark.parametrize("with_closure", [False, True])
def test_regions_learn_in_a_loop_that_knows_of_none(with_closure):
    """As in transformers' Trainer: backward, step, zero_grad; or as in Lightning, in a closure."""
    grown = grow(fresh(), head_size=7)
    before = {n: p.detach().clone() for n, p in grown.named_parameters()}
    optimizer = make_optimizer(grown, TrainConfig(lr=1e-3), old_lr_scale=0.1)
    tokens = torch.arange(40).view(2, 20)

    def closure():
        optimizer.zero_grad()
        loss = lm_loss(grown, tokens, tokens).loss
        loss.backward()
        return loss

    for _ in range(3):
        if with_closure:
            assert optimizer.step(closure) > 0
        else:
            closure()
            optimizer.step()
    found = regions(grown, fresh().config)["blocks.0.time_mix.receptance.weight"]
    p = grown.get_parameter("blocks.0.time_mix.receptance.weight")
    for part in (found.old, *found.new.values()):
        assert not torch.equal(part.of(p), part.of(before["blocks.0.time_mix.receptance.weight"]))


def test_a_torch_checkpoint_of_regions_goes_on(tmp_path):
    """As transformers' Trainer resumes: its reader takes plain values alone."""
    tokens = torch.arange(40).view(2, 20)

    def made():
        grown = grow(fresh(), head_size=7)
        return grown, make_optimizer(grown, TrainConfig(lr=1e-3), old_lr_scale=0.1)

    def learn(grown, optimizer):
        lm_loss(grown, tokens, tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    first = made()
    learn(*first)
    torch.save([x.state_dict() for x in first], tmp_path / "both.pt")
    again = made()
    for x, kept in zip(again, torch.load(tmp_path / "both.pt", weights_only=True), strict=True):
        x.load_state_dict(kept)
    for pair in (first, again):
        learn(*pair)
    for name, p in first[0].named_parameters():
        assert torch.equal(p, again[0].get_parameter(name)), name


def test_slowed_entries_move_less():
    grown = grow(fresh(), head_size=7)
    start = {n: p.detach().clone() for n, p in grown.named_parameters()}
    steps = {}
    for scale in (1.0, 0.1):
        grown.load_state_dict(start)
        settings = TrainConfig(weight_decay=0.0, lr=1e-3)
        optimizer = make_optimizer(grown, settings, old_lr_scale=scale)
        tokens = torch.arange(40).view(2, 20)
        lm_loss(grown, tokens, tokens).loss.backward()
        optimizer.step()
        steps[scale] = {n: (p.detach() - start[n]) for n, p in grown.named_parameters()}
    part = regions(grown, fresh().config)["blocks.0.time_mix.output.weight"]
    name = "blocks.0.time_mix.output.weight"
    full, slow = part.old.of(steps[1.0][name]), part.old.of(steps[0.1][name])
    assert full.abs().max() > 0
    torch.testing.assert_close(slow, 0.1 * full, rtol=1e-3, atol=1e-8)
    new = part.new["N"]
    torch.testing.assert_close(new.of(steps[0.1][name]), new.of(steps[1.0][name]))
    embedding = steps[0.1]["head.weight"], 0.1 * steps[1.0]["head.weight"]
    torch.testing.assert_close(*embedding, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("size", [300, 200])
def test_rows_of_a_resized_vocabulary_are_new(size):
    grown = grow(fresh(), head_size=7)
    for matrix in (grown.embedding, grown.head):  # as resize_token_embeddings does
        matrix.weight = torch.nn.Parameter(torch.randn(size, 8))
    grown.config = grown.config.replace(vocab_size=size)
    optimizer = make_optimizer(grown, TrainConfig(), old_lr_scale=0.1)
    found = {
        name: (tuple(p.shape), group["scale"])
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if name.startswith(("embedding", "head"))
    }
    expected = {}
    for name in ("embedding.weight", "head.weight"):
        rows = {"[old]": ((256, 8), 0.1), "[V]": ((44, 8), 1.0)} if size > 256 else {}
        expected |= {name + k: v for k, v in (rows or {"": ((200, 8), 0.1)}).items()}
    assert found == expected


def test_old_lr_scale_needs_growth(config):
    with pytest.raises(ConfigError, match="never grew"):
        train(config(old_lr_scale=0.5))


def test_moments_grow_with_the_model(config, tmp_path):
    model, grown = grown_checkpoint(config, tmp_path, **ALL)
    found = read_tensors(tmp_path / "first" / "last" / "optimizer.safetensors")
    larger = grow_moments(whole_moments(found, model), grown, model.config)
    for name, part in regions(grown, model.config).items():
        key = f"exp_avg_sq:{name}"
        assert (key in larger) == (key in found)
        if key in found:
            assert larger[key].shape == grown.get_parameter(name).shape
            box = part.old.of(larger[key])
            assert torch.equal(box.flatten(), found[key].flatten())
            for region in part.new.values():
                mean = float(found[key].mean())
                assert float(region.of(larger[key]).mean()) == pytest.approx(mean, rel=1e-4)
                assert not region.of(larger[f"exp_avg:{name}"]).any()
    # From the moments of regions back to those of whole parameters.
    optimizer = make_optimizer(grown, config(), old_lr_scale=0.5)
    adopt_moments(optimizer, larger)
    again = whole_moments(moments(optimizer), grown)
    assert again.keys() == larger.keys()
    assert all(torch.equal(again[k], larger[k]) for k in larger)


SCHEDULE = (
    GrowthStep(3, head_size=6, parameter_tokens=2, warmup=2),
    GrowthStep(6, num_layers=3, num_heads=3, old_lr_scale=0.1),
)


def test_growth_inside_a_run(config):
    result = train(config(growth=SCHEDULE), evaluate=evaluate, grow=grow_in_training)
    model = metastate.load(result.out)
    assert (model.config.head_size, model.config.num_heads, model.config.num_layers) == (6, 3, 3)
    assert [step["step"] for step in model.lineage] == [3, 6]
    rows = [row for row in read_log(result.out) if row["kind"] == "growth"]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        before, after = row["nats_per_token"]
        assert after == pytest.approx(before, rel=1e-5)
        assert row["parameters"][1] > row["parameters"][0]
        assert row["flops_per_token"][1] > row["flops_per_token"][0]
    assert rows[0]["sizes"] == {"head_size": 6, "parameter_tokens": 2}


def test_a_memory_comes_inside_a_run_and_learns(config):
    growth = GrowthStep(3, memory_heads=2)
    settings = {"model": SIZES | {"memory_heads": None}, "growth": (growth,), "carry_state": True}
    result = train(config(**settings), evaluate=evaluate, grow=grow_in_training)
    model = metastate.load(result.out)
    assert model.config.memory_heads == 2
    assert model.surprise_memory.gain.all() and model.surprise_memory.place.all()
    (row,) = (row for row in read_log(result.out) if row["kind"] == "growth")
    assert row["sizes"] == {"memory_heads": 2}
    before, after = row["nats_per_token"]
    assert after == pytest.approx(before, rel=1e-5)


def test_frozen_entries_stay_when_the_run_is_resumed(config, tmp_path):
    _, grown = grown_checkpoint(config, tmp_path, **ALL)
    settings = {"from_checkpoint": str(tmp_path / "big"), "old_lr_scale": 0.0, "model": {}}
    settings["schedule"] = "constant"
    whole = train(config("whole", **settings))
    train(config("part", **settings | {"steps": 4}))
    shutil.rmtree(tmp_path / "big")  # a run that has a checkpoint needs its start no more
    again = train(config("part", **settings), resume=True)
    a, b = (metastate.load(r.out) for r in (whole, again))
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in a.named_parameters())
    assert torch.equal(b.embedding.weight, grown.embedding.weight)


def test_of_the_counts_of_steps_of_one_parameter_the_largest_stays():
    grown, name = grow(fresh(), head_size=7), "blocks.0.time_mix.key.weight"
    found = {f"step:{name}[old]": torch.tensor(9.0), f"step:{name}[N]": torch.tensor(4.0)}
    assert whole_moments(found, grown) == {f"step:{name}": torch.tensor(9.0)}


def test_moments_of_what_was_frozen_are_those_of_new_entries():
    grown, name = grow(fresh(), head_size=7), "blocks.0.time_mix.key.weight"
    part = grown_regions(grown)[name]
    ((axis, region),) = part.new.items()
    learned = torch.rand_like(region.of(grown.get_parameter(name).detach()))
    found = {f"{kind}:{name}[{axis}]": learned for kind in ("exp_avg", "exp_avg_sq")}
    whole = whole_moments(found, grown)
    for kind, start in (("exp_avg", 0.0), ("exp_avg_sq", float(learned.mean()))):
        assert torch.equal(region.of(whole[f"{kind}:{name}"]), learned)
        old = part.old.of(whole[f"{kind}:{name}"])
        assert torch.equal(old, torch.full_like(old, start))


def test_what_was_grown_twice_without_training_is_all_new(config, tmp_path):
    model, _ = grown_checkpoint(config, tmp_path, **ALL)
    twice = grow(grow(model, head_size=6), num_heads=3)
    once = grow(model, head_size=6, num_heads=3)
    between = grow(model, head_size=6)
    with torch.no_grad():
        between.ln_out.bias += 1  # as another training loop, which counts no steps here
    counts = []
    for grown in (twice, once, grow(between, num_heads=3)):
        optimizer = make_optimizer(grown, config(), old_lr_scale=0.0)
        counts.append(sum(p.numel() for g in optimizer.param_groups for p in g["params"]))
    assert counts[0] == counts[1] > counts[2]
    assert model.step == twice.step == 10


def test_a_run_and_its_last_checkpoint_are_the_same_start(config, tmp_path):
    train(config("first"))
    settings = {"model": {}, "steps": 2}
    for name in ("first", "first/last"):
        train(config(f"from-{len(name)}", from_checkpoint=str(tmp_path / name), **settings))
    a, b = (metastate.load(tmp_path / f"from-{n}") for n in (5, 10))
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in a.named_parameters())
    assert a.step == 12
    found = read_tensors(tmp_path / "from-5" / "last" / "optimizer.safetensors")
    assert found["step:embedding.weight"] == 12


THAWING = (SCHEDULE[0], replace(SCHEDULE[1], old_lr_scale=0.0), GrowthStep(8, num_heads=4))


def test_what_one_growth_froze_learns_after_the_next(config):
    def made(out, growths, steps):
        growth = {"growth": THAWING[:growths], "steps": steps, "schedule": "constant"}
        return metastate.load(train(config(out, **growth), grow=grow_in_training).out)

    before, frozen, whole = made("a", 1, 6), made("b", 2, 8), made("c", 3, 10)
    for name in ("embedding.weight", "head.weight", "ln_out.weight"):
        old, still, now = (m.get_parameter(name) for m in (before, frozen, whole))
        assert torch.equal(old, still) and not torch.equal(still, now), name


@pytest.mark.parametrize(
    ("schedule", "stop"), [*((SCHEDULE, n) for n in (2, 3, 5, 6, 8)), (THAWING, 7), (THAWING, 9)]
)
@pytest.mark.parametrize("carry", [False, True])
def test_resume_around_growth_is_exact(config, schedule, stop, carry):
    settings = {"growth": schedule, "carry_state": carry, "checkpoint_every": 1}
    whole = train(config("whole", **settings), evaluate=evaluate, grow=grow_in_training)
    part = config("part", **settings)

    def interrupt(step, *_, **__):
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    first = train(part, evaluate=evaluate, grow=grow_in_training, progress=interrupt)
    assert (first.step, first.interrupted) == (stop, signal.SIGINT)
    again = train(part, evaluate=evaluate, grow=grow_in_training, resume=True)
    assert read_log(whole.out) == read_log(again.out)
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (read_tensors(r.out / "last" / name) for r in (whole, again))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


def test_what_a_caller_froze_stays_so_when_a_run_resumes_behind_growth(config):
    """The model that is given has the shape of before; what it asks gradients of counts."""

    def frozen():
        model = fresh()
        model.head.weight.requires_grad_(False)
        return model

    settings = config(growth=SCHEDULE[:1], checkpoint_every=1)

    def interrupt(step, *_, **__):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    model = frozen()
    before = model.head.weight.clone()
    train(settings, model=model, grow=grow_in_training, progress=interrupt)
    train(settings, model=frozen(), grow=grow_in_training, resume=True)
    assert torch.equal(metastate.load(settings.out).head.weight, before)


def test_the_rate_rises_again_after_growth():
    config = TrainConfig(
        lr=1.0, warmup=0, schedule="constant", growth=(GrowthStep(4, head_size=6, warmup=4),)
    )
    rates = [learning_rate(step, config) for step in range(3, 10)]
    assert rates == [1.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_growth_settings_are_checked(config):
    with pytest.raises(ConfigError, match="after the one before"):
        config(growth=(GrowthStep(5, head_size=6), GrowthStep(5, head_size=7)))
    with pytest.raises(ConfigError, match="frozen"):
        GrowthStep(5, head_size=6, old_lr_scale=2.0)
    with pytest.raises(ConfigError, match="no size"):
        GrowthStep(5)
    with pytest.raises(ConfigError, match="after the run's end"):
        config(growth=(GrowthStep(10, head_size=6),))
    with pytest.raises(ConfigError, match="has no 'step'"):
        from_dict(GrowthStep, {"head_size": 6})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(config(from_checkpoint="metastate-tiny"))
    with pytest.raises(ConfigError, match="grow_in_training"):
        train(config(growth=SCHEDULE))
