"""A whole comparison on a few words: planning, fitting, sweeping, resuming, collecting."""

import dataclasses
import json
import shutil

import pytest

from metastate.config import from_dict
from metastate.data.files import alone_in
from metastate.errors import BusyError, ConfigError
from metastate.eval import compare as harness
from metastate.eval.compare import chosen_rate, collect, compare, estimate
from metastate.eval.suite import Suite, count, fit_parameters, plan, uneven
from metastate.model.presets import preset
from metastate.train.trainer import train

TINY = {"hidden_size": 16, "num_heads": 2, "num_layers": 2}


def suite_of(data, **changes):
    return from_dict(
        Suite,
        {
            "data": str(data),
            "models": {
                "Meta-State": {},
                "RWKV-7": {"preset": "rwkv7", "model": {"ffn_size": 32}},
            },
            "sizes": {
                "tiny": {"model": TINY},
                "wide": {"preset": "tiny", "model": TINY | {"hidden_size": 32}},
            },
            "seeds": [3],
            "tokens_per_parameter": 0.03,
            "points": 2,
            "test_tokens": 512,
            "train": {
                "batch_size": 2, "context": 32, "warmup": 1, "valid_tokens": 256, "log_every": 1
            },
        }
        | changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(few_words, tmp_path_factory):
    """A comparison with a sweep, run to its end; its suite, folder and results."""
    out = tmp_path_factory.mktemp("compare")
    suite = suite_of(few_words, lr={"values": [1e-3, 1e-2], "share": 0.5})
    return suite, out, compare(suite, out)


@pytest.mark.parametrize("name", ["rwkv7", "transformer", "tokenformer"])
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_fitted_counts_are_equal_within_one_percent(name, size):
    target = count(preset(f"metastate-{size}", vocab_size=256))
    fitted = fit_parameters(preset(f"{name}-{size}", vocab_size=256), target)
    assert abs(count(fitted) - target) <= 0.01 * target
    assert fitted.hidden_size == preset(f"{name}-{size}").hidden_size
    # No other depth that fits is nearer to the usual shape.
    usual = 3 if name == "tokenformer" else 4
    assert usual / 2.5 < fitted.ffn_size / fitted.hidden_size < usual * 2.5


def test_a_model_without_a_hidden_part_is_fitted_by_depth_or_refused():
    one, two = (count(preset("paper-tiny", num_layers=n)) for n in (4, 8))
    assert fit_parameters(preset("paper-tiny"), two).num_layers == 8
    with pytest.raises(ConfigError, match="each further one"):
        fit_parameters(preset("paper-tiny"), (one + two) // 2 + (two - one) // 8)


def test_the_plan_gives_every_model_the_same_tokens_and_schedule(few_words, tmp_path):
    suite = suite_of(few_words, lr={"values": [1e-3, 1e-2], "share": 0.5})
    cells = plan(suite, tmp_path, match_params=True)
    assert [c.rate for c in cells[:4]] == [1e-3, 1e-2, 1e-3, 1e-2]
    assert all(c.rate is None for c in cells[4:]) and len(cells) == 8
    for size in suite.sizes:
        own = [c for c in cells if c.size == size and c.rate is None]
        assert len({(c.train.steps, c.train.seed, c.train.batch_size) for c in own}) == 1
        assert abs(own[0].parameters - own[1].parameters) <= 0.01 * own[0].parameters
        assert own[0].tokens == pytest.approx(0.03 * own[0].parameters, abs=64)
    assert not uneven(cells)
    assert "not equal" in uneven(plan(suite, tmp_path))[0]


def test_a_sweep_s_seed_need_not_be_a_seed_of_its_size(few_words, tmp_path):
    sizes = {"tiny": {"model": TINY, "seeds": [8, 9]}}
    cells = plan(suite_of(few_words, sizes=sizes, lr={"values": [1e-3]}), tmp_path)
    assert [c.seed for c in cells] == [3, 3, 8, 8, 9, 9]


def test_a_size_can_say_the_shape_of_one_model(few_words, tmp_path):
    sizes = {"tiny": {"model": TINY, "shapes": {"RWKV-7": {"num_layers": 4, "ffn_size": 20}}}}
    first, second = plan(suite_of(few_words, sizes=sizes), tmp_path)
    assert (second.config.num_layers, second.config.ffn_size) == (4, 20)
    assert first.config.num_layers != 4 and first.config.ffn_size != 20


def test_results_hold_every_cell_with_its_curve_and_costs(finished):
    suite, out, results = finished
    assert [(r["model"], r["size"]) for r in results["rows"]] == [
        (model, size) for size in suite.sizes for model in suite.models
    ]
    assert json.loads((out / "results.json").read_text()) == results
    for row in results["rows"]:
        assert row["curve"][-1]["tokens"] == row["tokens"]
        assert row["curve"][-1]["flops"] == pytest.approx(row["flops"])
        seconds = [p["seconds"] for p in row["curve"]]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert 1 < row["loss"] < 6 and row["bits_per_byte"] > 1
    assert len(results["sweep"]) == 4


def test_the_best_rate_of_the_sweep_is_carried_by_the_stated_rule(finished):
    suite, out, results = finished
    cells = plan(suite, out)
    for model in suite.models:
        tried = {s["lr"]: s["loss"] for s in results["sweep"] if s["model"] == model}
        best = min(tried, key=tried.get)
        small, wide = (c for c in cells if c.model == model and c.rate is None)
        assert chosen_rate(suite, cells, small) == best
        assert chosen_rate(suite, cells, wide) == pytest.approx(best * (16 / 32) ** 0.5)
        used = [r["lr"] for r in results["rows"] if r["model"] == model]
        assert used == pytest.approx([best, best * 0.5**0.5])


def test_a_finished_cell_is_not_run_again_and_a_larger_suite_keeps_it(finished, monkeypatch):
    suite, out, results = finished
    ran = []

    def counted(config, **kwargs):
        ran.append(config)
        return train(config, **kwargs)

    monkeypatch.setattr(harness, "train", counted)
    assert compare(suite, out)["rows"] == results["rows"] and not ran
    more = dataclasses.replace(
        suite, models=suite.models | {"again": suite.models["Meta-State"]}, baseline="RWKV-7"
    )
    assert len(compare(more, out)["rows"]) == 6
    assert {c.out.split("/")[-1].split("-")[0] for c in ran} == {"again"}
    for folder in (*out.glob("cells/again*"), *out.glob("sweep/again*")):
        shutil.rmtree(folder)


def test_other_settings_are_refused(finished):
    suite, out, _ = finished
    longer = dataclasses.replace(suite, tokens_per_parameter=0.06)
    with pytest.raises(ConfigError, match="other settings .*steps"):
        compare(longer, out)


def test_an_interrupted_cell_goes_on_where_it_was(few_words, tmp_path, monkeypatch):
    suite = suite_of(few_words)
    whole = compare(suite, tmp_path / "whole")
    calls = []

    def stopped(config, **kwargs):
        result = train(config, **kwargs)
        calls.append(config)
        return dataclasses.replace(result, interrupted=2) if len(calls) == 2 else result

    monkeypatch.setattr(harness, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(suite, tmp_path / "cut")
    assert len(collect(suite, plan(suite, tmp_path / "cut"), tmp_path / "cut")["rows"]) == 1
    monkeypatch.undo()
    resumed = compare(suite, tmp_path / "cut")
    assert [r["loss"] for r in resumed["rows"]] == [r["loss"] for r in whole["rows"]]


def test_a_cell_that_another_process_runs_is_left_to_it(few_words, tmp_path, monkeypatch):
    suite = suite_of(few_words)
    first = plan(suite, tmp_path)[0]
    said, order = [], []
    holder = alone_in(first.folder)
    holder.__enter__()
    with pytest.raises(BusyError, match="another process"):
        train(first.train)

    def told(text):
        said.append(text)
        order.append(text.split(":")[0])
        if "other processes" in text:
            holder.__exit__(None, None, None)

    monkeypatch.setattr(harness, "WAIT_S", 0.0)
    results = compare(suite, tmp_path, say=told)
    assert len(results["rows"]) == 4
    assert order[-1] == first.title and "waiting" in " ".join(said)


def test_a_run_that_diverges_is_a_result_and_stops_nothing(few_words, tmp_path):
    suite = suite_of(few_words)
    mad = dataclasses.replace(
        suite,
        models=suite.models
        | {"mad": dataclasses.replace(suite.models["Meta-State"], train={"lr": 1e30, "warmup": 0})},
    )
    results = compare(mad, tmp_path)
    failed = [r for r in results["rows"] if r["failed"]]
    assert [r["model"] for r in failed] == ["mad", "mad"] and len(results["rows"]) == 6
    assert failed[0]["loss"] is None and "step" in failed[0]["failed"]


def test_the_estimate_covers_what_is_left(finished, few_words, tmp_path):
    suite, out, _ = finished
    assert estimate(plan(suite, out)) == {}
    seconds = estimate(plan(suite_of(few_words), tmp_path))
    assert len(seconds) == 4 and min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models is empty"),
        ({"baseline": "GPT"}, "baseline is 'GPT'; the models are Meta-State, RWKV-7"),
        ({"models": {"A b": {}, "a-b": {}}}, "share one folder"),
        ({"models": {"a": {"presett": "rwkv7"}}}, "did you mean 'preset'"),
        ({"models": {"a": {"preset": "rwvk7"}}}, "did you mean 'rwkv7-tiny'"),
        ({"train": {"out": "x"}}, "train.out"),
        ({"sizes": {"tiny": {"shapes": {"RWKV7": {}}}}}, "did you mean 'RWKV-7'"),
        ({"sizes": {"tiny": {"shapes": {"RWKV-7": {"depth": 2}}}}}, "unknown key 'depth'"),
        ({"seeds": []}, "seeds"),
        ({"tokens_per_parameter": 0.0}, "tokens_per_parameter"),
    ],
)
def test_impossible_suites_are_refused(few_words, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(suite_of(few_words, **changes), tmp_path)
