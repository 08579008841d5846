"""State tuning: gradients of the start, nothing of the model changes, and exact resume."""

import math
import signal
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from metastate.config import GrowthStep, MetaStateConfig, ModelConfig, TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    StateError,
    TrainingError,
)
from metastate.eval.loss import evaluate, held_out
from metastate.growth import grow
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.state import ModelState
from metastate.model.weights import weights_hash
from metastate.train import tune as tune_module
from metastate.train.tune import Start, tune
from tolerance import TOLERANCE, relative_error, slopes

SIZES = {"vocab_size": 256, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
BOTH = MetaStateConfig(readout="both")


def made(dtype=torch.float32, **fields):
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(**(SIZES | fields))).to(dtype).eval()
    model.backend = "chunked"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def config(few_words, tmp_path):
    return TrainConfig(
        data=str(few_words),
        out=str(tmp_path / "s.state"),
        steps=6,
        batch_size=4,
        context=24,
        lr=0.3,
        min_lr=0.03,
        warmup=1,
        valid_every=3,
        valid_tokens=400,
        checkpoint_every=2,
        z_loss=0.0,
    )


def scorer(config):
    return held_out(PreparedData.open(config.data), config)


def settings(config, **changes):
    return TrainConfig(**(vars(config) | changes))


def random_start(model, what="state", seed=5):
    start = Start(model, what, 3, 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in start.parameters():
            p.add_(torch.randn_like(p))
    return start


# The start.


@pytest.mark.parametrize("fields", [{"parameter_tokens": 2}, {"meta_state": BOTH}, {}])
def test_tuning_begins_with_what_the_model_does(fields):
    model = made(**fields)
    for what in ("tokens", "state"):
        state = Start(model, what, 3, 0)()
        for name, x in model.init_state(1).tensors().items():
            assert torch.equal(state.tensors()[name], x), name


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("what", ["tokens", "state"])
def test_gradient_by_finite_differences(backend, what):
    """Through rows whose documents start in the middle too."""
    if backend == "cpu":
        pytest.importorskip("numba")
    model = made(torch.float64, meta_state=BOTH).requires_grad_(False)
    model.backend = backend
    start = random_start(model, what)
    tokens = torch.randint(256, (2, 14), generator=torch.Generator().manual_seed(2))
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[0, [0, 5]] = resets[1, 9] = True

    def loss():
        out = lm_loss(model, tokens[:, :-1], tokens[:, 1:], resets=resets[:, :-1], start=start())
        return out.loss

    loss().backward()
    names = [name for name, p in start.named_parameters() if p.grad.abs().max() > 1e-9]
    assert len(names) == 4
    for name, p in start.named_parameters():
        expected, slope = slopes(loss, p)
        assert slope == pytest.approx(expected, rel=1e-5), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fields", [{"meta_state": BOTH}, {"architecture": "rwkv7"}])
def test_packed_documents_start_from_it(fields):
    model = made(torch.float64, **fields)
    with torch.no_grad():
        start = random_start(model)()
        tokens = torch.randint(256, (2, 12))
        resets = torch.zeros(2, 12, dtype=torch.bool)
        resets[0, [0, 7]] = resets[1, 0] = True
        x, end, _ = model.features(tokens, resets=resets, start=start)
        second, second_end, _ = model.features(tokens[:1, 7:], start=start)
        assert relative_error(x[:1, 7:], second) < TOLERANCE[torch.float64]
        assert relative_error(end[0].layers[1].S, second_end.layers[1].S) < 1e-11
        first, _, _ = model.features(tokens[:1, :7], start)
        assert relative_error(x[:1, :7], first) < TOLERANCE[torch.float64]
        plain, _, _ = model.features(tokens, resets=resets)
        assert relative_error(plain, x) > 1e-3


def test_a_carried_state_goes_on_where_nothing_resets():
    model = made(torch.float64)
    with torch.no_grad():
        start, tokens = random_start(model)(), torch.randint(256, (1, 10))
        _, state, _ = model.features(tokens)
        none = torch.zeros(1, 10, dtype=torch.bool)
        carried, _, _ = model.features(tokens, state, resets=none, start=start)
        assert relative_error(carried, model.features(tokens, state)[0]) < 1e-11


def test_what_has_no_state_is_refused(config):
    with pytest.raises(ConfigError, match="a transformer has no state to tune"):
        tune(made(architecture="transformer"), config)
    model = made(architecture="transformer")
    with pytest.raises(StateError, match="only a recurrent model can start from"):
        model.features(torch.zeros(1, 3, dtype=torch.int64), start=model.init_state(1))


# Tuning.


def test_the_weight_of_z_loss_is_the_setting_s(config, monkeypatch):
    weights, plain = [], lm_loss
    monkeypatch.setattr(
        tune_module,
        "lm_loss",
        lambda *args, **kwargs: weights.append(kwargs["z_loss"]) or plain(*args, **kwargs),
    )
    tune(made(), settings(config, steps=2, z_loss=0.25))
    assert set(weights) == {0.25}


@pytest.mark.parametrize("what", ["tokens", "state"])
def test_it_helps_and_leaves_the_model_as_it_was(config, what, tmp_path):
    model = made()
    before, asked = weights_hash(model), [p.requires_grad for p in model.parameters()]
    seen = []
    result = tune(
        model,
        settings(config, steps=30, valid_every=10),
        what=what,
        parameter_tokens=2,
        evaluate=scorer(config),
        progress=lambda *a, **k: seen.append((a, k)),
    )
    assert result.step == 30 and result.tokens == 30 * 4 * 24 and result.interrupted is None
    assert result.best_loss < result.before - 0.01
    assert result.file_bytes == (tmp_path / "s.state").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["s.state"]
    assert seen[-1][0] == (30, 30) and set(seen[-1][1]) == {"loss", "held_out"}
    assert weights_hash(model) == before and not model.training
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    state = ModelState.load(config.out, model)
    assert state.tokens_seen == 0 and state.batch_size == 1
    score = scorer(config)(model, state)["nats_per_token"]
    assert score == pytest.approx(result.best_loss, abs=1e-6)


def test_a_models_own_parameter_tokens_stay(config):
    model = made(parameter_tokens=2)
    tune(model, config, parameter_tokens=1)
    state, own = ModelState.load(config.out, model), model.init_state(1)
    extra = state.layers[0].S - own.layers[0].S
    assert torch.linalg.matrix_rank(extra[0, 0]) == 1


def test_a_factor_file_is_small_and_means_what_was_trained(config):
    model = made(hidden_size=64)
    result = tune(model, config, parameter_tokens=2)
    with safetensors.safe_open(config.out, "pt") as file:
        names = list(file.keys())
    assert sorted(names)[:2] == ["layers.0.token_keys", "layers.0.token_values"]
    whole = model.init_state(1).num_bytes
    assert result.file_bytes < whole


def test_a_tuned_start_for_evaluation(config, few_words):
    model = made()
    split = PreparedData.open(few_words).split("valid")
    plain = evaluate(model, split).nats_per_token
    same = evaluate(model, split, start=model.init_state(1)).nats_per_token
    other = evaluate(model, split, start=random_start(model)()).nats_per_token
    assert same == pytest.approx(plain, rel=1e-6)
    assert abs(other - plain) > 1e-3


# Interrupted.


def contents(path):
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("what", ["tokens", "state"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_going_on_is_exact(config, what, at, tmp_path):
    """Killed after a signal at any step, the same command ends with the same bits."""
    model, score = made(), scorer(config)
    whole = tune(model, config, what=what, evaluate=score)
    expected = contents(config.out)
    again = settings(config, out=str(tmp_path / "b.state"))

    def stop(step, steps, **figures):
        if step == at:
            signal.raise_signal(signal.SIGINT)

    part = tune(model, again, what=what, evaluate=score, progress=stop)
    assert part.interrupted == signal.SIGINT and part.step == at
    assert (tmp_path / "b.state").exists() and (tmp_path / "b.state.tuning").exists()
    with pytest.raises(ConfigError, match="exists: go on with --resume"):
        tune(model, again, what=what)
    rest = tune(model, again, what=what, evaluate=score, resume=True)
    assert rest.step == 6 and not (tmp_path / "b.state.tuning").exists()
    assert (rest.best_loss, rest.best_step) == (whole.best_loss, whole.best_step)
    assert rest.before == whole.before
    for name, x in contents(again.out).items():
        assert torch.equal(x, expected[name]), name


def test_a_kill_before_the_first_checkpoint_leaves_what_goes_on(config, monkeypatch):
    """A state without what goes on beside it is one that came to its end."""
    often, score = settings(config, valid_every=1, checkpoint_every=6), scorer(config)
    whole = tune(made(), settings(often, out=config.out + ".whole"), evaluate=score)

    def killed(step, *args, **figures):
        if step == 2:
            raise MemoryError  # whatever ends it without another line

    with pytest.raises(MemoryError):
        tune(made(), often, evaluate=score, progress=killed)
    assert Path(config.out).exists()
    again = tune(made(), often, evaluate=score, resume=True)
    assert (again.step, again.best_loss) == (whole.step, whole.best_loss)


def test_a_start_is_not_rounded_by_autocast():
    start = random_start(made().float(), "tokens")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = start()
    assert all(torch.equal(a.S, b.S) for a, b in zip(rounded.layers, start().layers, strict=True))


def stopped(model, config, **options):
    def stop(step, steps, **figures):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    tune(model, config, progress=stop, **options)


def test_going_on_needs_the_same_run(config):
    model = made()
    with pytest.raises(ConfigError, match="nothing to go on from"):
        tune(model, config, resume=True)
    stopped(model, config)
    with pytest.raises(ConfigError, match="lr 0.3, this command asks for 0.2"):
        tune(model, settings(config, lr=0.2), resume=True)
    with pytest.raises(ConfigError, match="what 'tokens', this command asks for 'state'"):
        tune(model, config, what="state", resume=True)
    with pytest.raises(ConfigError, match="parameter_tokens 4, this command asks for 5"):
        tune(model, config, parameter_tokens=5, resume=True)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="other weights"):
        tune(model, config, resume=True)


def test_going_on_needs_the_best_state_so_far(config, tmp_path):
    """It is in the state file alone; nothing of what is left may be lost over it."""
    model, config = made(), settings(config, valid_every=1)
    losses = iter([5.0, 4.0, 4.5, 4.5, 4.5, 4.5, 4.5])

    def score(model, start):
        return {"nats_per_token": next(losses)}

    stopped(model, config, evaluate=score)
    best = (tmp_path / "s.state").read_bytes()
    (tmp_path / "s.state").unlink()
    with pytest.raises(ConfigError, match=r"s.state is gone.*step 1\).*put it back"):
        tune(model, config, evaluate=score, resume=True)
    (tmp_path / "s.state").write_bytes(best)
    seen = []

    def lose(step, steps, **figures):
        seen.append(step)
        if step == steps:
            (tmp_path / "s.state").unlink()

    with pytest.raises(TrainingError, match="s.state is gone, deleted while this ran"):
        tune(model, config, evaluate=score, progress=lose, resume=True)
    assert seen == [3, 4, 5, 6] and (tmp_path / "s.state.tuning").exists()


def test_another_process_may_tune_other_files_only(config, tmp_path):
    model = made()

    def progress(step, steps, **figures):
        if step == 2:
            with pytest.raises(BusyError, match="another process"):
                tune(model, config)
            assert tune(model, settings(config, out=str(tmp_path / "b.state"))).step == 6

    assert tune(model, config, progress=progress).step == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.state", "s.state"]


def test_the_best_of_other_held_out_tokens_is_forgotten(config):
    model = made()
    stopped(model, settings(config, valid_every=1), evaluate=lambda *_: {"nats_per_token": 1.0})
    more = settings(config, valid_every=1, valid_tokens=500)
    result = tune(model, more, evaluate=lambda *_: {"nats_per_token": 2.0}, resume=True)
    assert (result.before, result.best_loss, result.best_step) == (2.0, 2.0, 3)


def test_damaged_files_are_refused(config, tmp_path):
    model, kept = made(), tmp_path / "s.state.tuning"
    stopped(model, config)
    good = kept.read_bytes()
    with safetensors.safe_open(kept, "pt") as file:
        header = file.metadata()
    tensors = contents(kept)
    name = "layers:0:token_keys"
    for keep in (0, 7, 300, len(good) // 2, len(good) - 1):
        kept.write_bytes(good[:keep])
        with pytest.raises(CheckpointError, match="cut off or corrupt"):
            tune(model, config, resume=True)
    for change, more, message in [
        ({"format": "x"}, {}, "no tuning of this version"),
        ({"version": "2"}, {}, "no tuning of this version"),
        ({"trainer": "{"}, {}, "is broken"),
        ({"trainer": "[]"}, {}, "is broken"),
        ({"number": "many"}, {}, "is broken"),
        ({"before": "[" * 99_999}, {}, "is broken"),
        ({}, {f"parameter:{name}": torch.ones(2)}, "lacks layers:0:token_keys"),
        ({}, {f"exp_avg:{name}": torch.ones(2)}, "moments of another shape"),
    ]:
        safetensors.torch.save_file(tensors | more, kept, header | change)
        with pytest.raises(CheckpointError, match=message):
            tune(model, config, resume=True)


def test_a_loss_that_is_not_finite_stops_before_anything_is_written(config, monkeypatch):
    model, real = made(), tune_module.lm_loss
    calls = []

    def poisoned(*args, **options):
        out = real(*args, **options)
        calls.append(0)
        if len(calls) == 4:
            return type(out)(out.loss * math.nan, out.nll * math.nan, out.num_tokens, out.state)
        return out

    monkeypatch.setattr(tune_module, "lm_loss", poisoned)
    with pytest.raises(DivergedError, match="step 4: the loss is nan.*lower --lr"):
        tune(model, config)
    assert all(p.requires_grad for p in model.parameters())
    monkeypatch.setattr(tune_module, "lm_loss", real)
    assert tune(model, config, resume=True).step == 6  # from step 2


def test_settings_are_checked(config, tmp_path):
    model = made()
    for change, options, message in [
        ({}, {"what": "shift"}, "what is 'shift'; allowed: tokens, state"),
        ({}, {"parameter_tokens": 0}, "parameter_tokens is 0"),
        ({"carry_state": True}, {}, "carry_state have no meaning"),
        ({"growth": (GrowthStep(step=2, head_size=16),)}, {}, "growth and carry_state"),
        ({"out": ""}, {}, "out is missing"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tune(model, settings(config, **change), **options)
    with pytest.raises(DataError, match="vocabulary"):
        tune(made(vocab_size=300), config)
    (tmp_path / "s.state").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already; choose another --out"):
        tune(model, config)
    assert (tmp_path / "s.state").read_bytes() == b"mine"


def test_a_full_disk_is_said(config, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match="disk full"):
        tune(made(), config)


def test_a_tuned_start_is_of_one_model_only(config):
    model = made()
    tune(model, config)
    grown = grow(model, num_layers=3)
    with pytest.raises(StateError, match="another configuration"):
        ModelState.load(config.out, grown)
