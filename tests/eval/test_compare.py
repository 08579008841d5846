"""A whole comparison on a few words: planning, fitting, sweeping, resuming, collecting."""

import dataclasses
import json
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from metastate.config import TrainConfig
from metastate.data.files import alone_in
from metastate.data.loader import PreparedData
from metastate.errors import BusyError, ConfigError, DataError, DivergedError
from metastate.eval import compare as harness
from metastate.eval.compare import chosen_rate, collect, compare, curve, estimate
from metastate.eval.suite import RateSweep, Suite, SuiteModel, count, fit_parameters, plan, uneven
from metastate.mapping import from_dict
from metastate.model.io import load
from metastate.model.loss import lm_loss
from metastate.model.presets import preset
from metastate.train.trainer import train

SUITES = ["compare.yaml", "depth.yaml", "eight-million.yaml", "gain.yaml", "tokens.yaml"]
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


@pytest.mark.parametrize("name", ["metastate", "rwkv7", "transformer", "tokenformer"])
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_a_preset_fitted_to_its_size_s_count_keeps_its_shape(name, size):
    own = preset(f"{name}-{size}", vocab_size=256)
    target = count(preset(f"metastate-{size}", vocab_size=256))
    fitted = fit_parameters(own, target)
    assert abs(count(fitted) - target) <= 0.01 * target
    assert (fitted.hidden_size, fitted.num_layers) == (own.hidden_size, own.num_layers)
    assert fitted.ffn_size == pytest.approx(own.ffn_size, rel=0.03)


def test_of_the_depths_that_fit_the_nearest_to_the_own_ratio_is_taken():
    own = preset("rwkv7-tiny", vocab_size=256)
    wide = own.replace(hidden_size=192, num_heads=3, head_size=64)
    shapes = [
        (f.num_layers, f.ffn_size) for r in (4.0, 1.8) for f in [fit_parameters(wide, 2_000_000, r)]
    ]
    assert shapes[0][0] == 4 and shapes[1][0] == 6  # of depths 1 to 7
    assert (
        fit_parameters(wide, 2_000_000).num_layers
        == fit_parameters(wide, 2_000_000, 232 / 192).num_layers
    )


def test_the_plan_fits_by_the_preset_s_ratio_unless_the_suite_gives_a_width(few_words, tmp_path):
    wide = {"hidden_size": 192, "num_heads": 3}
    both = {"a": {"preset": "rwkv7"}, "b": {"preset": "rwkv7", "model": {"ffn_size": 768}}}
    sizes = {"2m": {"preset": "tiny", "parameters": 2_000_000, "model": wide}}
    a, b = plan(suite_of(few_words, models=both, sizes=sizes), tmp_path, match_params=True)
    assert a.config.num_layers == 6 and a.config.ffn_size / 192 == pytest.approx(232 / 128, rel=0.1)
    assert b.config.num_layers == 4 and b.config.ffn_size == pytest.approx(768, rel=0.03)


def recipe(name, data):
    text = (Path(__file__).parents[2] / "recipes" / name).read_text()
    return from_dict(Suite, yaml.safe_load(text) | {"data": str(data)})


@pytest.mark.parametrize("name", SUITES)
def test_the_recipes_shapes_are_equal(name, few_words, tmp_path):
    suite = recipe(name, few_words)
    for c in plan(suite, tmp_path):
        target = suite.sizes[c.size].parameters
        assert abs(c.parameters - target) <= 0.01 * target, c.title


@pytest.mark.parametrize("name", SUITES)
def test_a_run_trains_the_model_that_was_planned(name, few_words, tmp_path):
    for c in plan(recipe(name, few_words), tmp_path):
        assert preset(c.train.preset, **c.train.model) == c.config, c.title


def test_a_suite_takes_from_a_preset_what_the_preset_adds(few_words, tmp_path):
    without = {"model": TINY | {"memory_heads": None, "ffn_order": "beside"}}
    suite = suite_of(few_words, models={"a": without, "b": {"model": TINY}}, sizes={"tiny": {}})
    results = compare(suite, tmp_path)
    a, b = (load(cell.folder).config for cell in plan(suite, tmp_path))
    assert (a.memory_heads, a.ffn_order) == (None, None)  # "beside" is what none says
    assert (b.memory_heads, b.ffn_order) == (1, "after")
    small, large = (row["state_bytes"] for row in results["rows"])
    assert small < large


def test_the_recipe_s_shapes_are_those_that_its_own_fit_would_choose(few_words, tmp_path):
    cells = [c for c in plan(recipe("compare.yaml", few_words), tmp_path) if c.rate is None]
    own = {c.model: c.config for c in cells if c.size == "tiny"}
    for c in cells:
        if c.size == "2m" and c.config.ffn_size:
            ratio = own[c.model].ffn_size / own[c.model].hidden_size
            chosen = fit_parameters(c.config, c.parameters, ratio)
            assert chosen == c.config, c.title


def test_a_model_without_a_hidden_part_is_fitted_by_depth_or_refused():
    one, two = (count(preset("paper-tiny", num_layers=n)) for n in (4, 8))
    assert fit_parameters(preset("paper-tiny"), two).num_layers == 8
    with pytest.raises(ConfigError, match="each further one"):
        fit_parameters(preset("paper-tiny"), (one + two) // 2 + (two - one) // 8)


def test_the_plan_gives_every_model_the_same_tokens_and_schedule(few_words, tmp_path):
    suite = suite_of(few_words, lr={"values": [1e-3, 1e-2], "share": 0.5})
    suite = dataclasses.replace(suite, train=suite.train | {"warmup": 4})
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
    # A shorter run's rate rises as soon, for its length.
    assert all(c.train.warmup == (4 if c.rate is None else 2) for c in cells)


def test_models_that_do_not_see_the_same_text_are_named(few_words, tmp_path):
    models = {"a": {"train": {"context": 16, "lr": 1e-3}}, "b": {"train": {"weight_decay": 0.0}}}
    suite = suite_of(few_words, models=models, sizes={"tiny": {"model": TINY}})
    (said,) = uneven(plan(suite, tmp_path))
    assert "size tiny: train.context differs (a 16, b 32)" in said


def test_a_rate_of_one_s_own_beside_a_sweep_is_refused(few_words, tmp_path):
    sweep = {"values": [1e-3, 1e-2]}
    for changes in (
        {"models": {"a": {"train": {"lr": 1e-3}}}},
        {"sizes": {"tiny": {"model": TINY, "train": {"lr": 1e-3}}}},
    ):
        with pytest.raises(ConfigError, match=r"train\.lr of its own beside suite\.lr\.values"):
            plan(suite_of(few_words, lr=sweep, **changes), tmp_path)
        plan(suite_of(few_words, **changes), tmp_path)


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
    default = TrainConfig()
    for cell in cells:  # the end of the schedule goes with its start
        run = json.loads((cell.folder / "run.json").read_text())["train"]
        assert run["min_lr"] / run["lr"] == pytest.approx(default.min_lr / default.lr)


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


@pytest.fixture
def copied(finished, tmp_path):
    """The same suite and results, in a folder that may be changed."""
    suite, out, _ = finished
    return suite, shutil.copytree(out, tmp_path / "out", symlinks=True)


def test_results_name_the_data_and_the_sources(finished):
    suite, out, results = finished
    data = PreparedData.open(suite.data).fingerprint
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert results["data"] == data and commit in (results["environment"]["commit"] or "")
    for row in results["rows"]:
        assert row["data"] == data and row["test_tokens"] == 512
        assert row["source"] == [{k: results["environment"][k] for k in ("metastate", "commit")}]
        assert sum(nats for _, nats, _ in row["documents"]) / 512 == pytest.approx(row["loss"])
        assert sum(tokens for _, _, tokens in row["documents"]) == 512


def test_results_of_other_data_are_refused(copied, tmp_path):
    suite, out = copied
    other = shutil.copytree(suite.data, tmp_path / "data")
    record = json.loads((other / "data.json").read_text())
    record["splits"]["valid"]["text_bytes"] += 1
    (other / "data.json").write_text(json.dumps(record))
    changed = dataclasses.replace(suite, data=str(other))
    for call in (compare, lambda suite, out: collect(suite, plan(suite, out), out)):
        with pytest.raises(ConfigError, match="other data than .* holds now"):
            call(changed, out)
    # The same data in another place is the same data.
    moved = shutil.copytree(suite.data, tmp_path / "moved")
    assert len(compare(dataclasses.replace(suite, data=str(moved)), out)["rows"]) == 4


def test_results_on_another_piece_of_the_test_text_are_refused_until_scored_again(copied):
    suite, out = copied
    shorter = dataclasses.replace(suite, test_tokens=64)
    with pytest.raises(ConfigError, match=r"512 tokens .* 64; remove its score.json"):
        compare(shorter, out)
    before = compare(suite, out)["rows"]
    for file in out.glob("cells/*/score.json"):
        file.unlink()
    after = compare(shorter, out)["rows"]
    for old, new in zip(before, after, strict=True):
        assert new["test_tokens"] == 64 and new["loss"] != old["loss"]
        assert new["curve"] == old["curve"]  # nothing was trained again


def test_the_sources_of_all_who_worked_on_a_cell_are_kept(copied, monkeypatch):
    suite, out = copied
    first = json.loads(next(out.glob("cells/*/sources.json")).read_text())
    for file in out.glob("cells/*/score.json"):
        file.unlink()
    next(out.glob("cells/*/sources.json")).unlink()  # one from before they were noted
    monkeypatch.setattr(harness, "source", lambda: {"metastate": "9", "commit": None})
    made = [row["source"] for row in compare(suite, out)["rows"]]
    later = {"metastate": "9", "commit": None}
    assert sorted(map(str, made)) == sorted(map(str, [*[[*first, later]] * 3, [None, later]]))
    damaged = next(out.glob("cells/*/sources.json"))
    damaged.write_text("[")
    (damaged.parent / "score.json").unlink()
    with pytest.raises(DataError, match="sources.json is damaged"):
        compare(suite, out)


def test_cells_of_before_data_and_sources_were_noted_still_count(copied):
    suite, out = copied
    for file in out.glob("*/*/score.json"):
        score = json.loads(file.read_text())
        old = {k: v for k, v in score.items() if k not in ("data", "test_tokens", "source")}
        assert len(old) < len(score)
        del old["run"]["growth"]  # a setting that came later had its default
        del old["run"]["model"]["meta_layers"]  # and one of the model was None
        file.write_text(json.dumps(old))
    rows = compare(dataclasses.replace(suite, test_tokens=64), out)["rows"]
    assert len(rows) == 4 and all(r["data"] is r["source"] is None for r in rows)


def test_a_cell_that_was_begun_with_another_model_does_not_go_on(copied):
    """As when a preset has got another default since."""
    suite, out = copied
    cell = next(c for c in plan(suite, out) if c.rate is None and c.config.memory_heads)
    (cell.folder / "score.json").unlink()
    record = json.loads((cell.folder / "run.json").read_text())
    del record["train"]["model"]["memory_heads"]
    (cell.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"model\.memory_heads None, now 1.*remove that"):
        compare(suite, out)


@pytest.mark.parametrize("change", [{"points": 3}, {"tokens_per_parameter": 0.06}])
def test_a_cell_that_was_begun_under_other_settings_does_not_go_on(copied, change):
    """Half of one schedule and half of another would be a run that nobody asked for."""
    suite, out = copied
    for file in out.glob("*/*/score.json"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"other settings \((steps|valid_every).*remove that"):
        compare(dataclasses.replace(suite, **change), out)


def test_a_cell_of_another_rate_than_the_sweep_s_choice_is_refused(copied):
    """A rate is added to the sweep and wins: what was run with the old choice is not its result."""
    suite, out = copied
    wider = dataclasses.replace(
        suite, lr=dataclasses.replace(suite.lr, values=(*suite.lr.values, 3e-2))
    )
    cells = plan(wider, out)
    for cell in cells:
        if cell.rate == 3e-2:  # another rate's run, with a last held-out loss that no other has
            old = next(c for c in cells if c.model == cell.model and c.rate)
            shutil.copytree(old.folder, cell.folder, symlinks=True)
            score = json.loads((cell.folder / "score.json").read_text())
            score["run"] |= {"lr": 3e-2, "min_lr": cell.train.min_lr}
            (cell.folder / "score.json").write_text(json.dumps(score | {"lr": 3e-2}))
            log = (cell.folder / "log.jsonl").read_text().splitlines()
            last = max(i for i, line in enumerate(log) if '"valid"' in line)
            log[last] = json.dumps(json.loads(log[last]) | {"nats_per_token": 0.5})
            (cell.folder / "log.jsonl").write_text("\n".join(log) + "\n")
    for call in (compare, lambda suite, out: collect(suite, plan(suite, out), out)):
        with pytest.raises(ConfigError, match=r"lr .*, the sweep chose 0.03; remove that folder"):
            call(wider, out)
    for folder in out.glob("cells/*"):
        shutil.rmtree(folder)
    rows = compare(wider, out)["rows"]
    assert [r["lr"] for r in rows] == pytest.approx([3e-2, 3e-2, 3e-2 * 0.5**0.5, 3e-2 * 0.5**0.5])


@pytest.mark.parametrize("left", [1, 0])  # a signal in the last step ends the suite too
def test_an_interrupted_cell_goes_on_where_it_was(few_words, tmp_path, monkeypatch, left):
    suite, cut = suite_of(few_words), tmp_path / "cut"
    whole = compare(suite, tmp_path / "whole")
    calls = []

    def stopped(config, **kwargs):
        calls.append(config)

        def interrupt(step, steps, **figures):
            if len(calls) == 2 and step == steps - left:
                signal.raise_signal(signal.SIGINT)

        return train(config, **kwargs | {"progress": interrupt})

    monkeypatch.setattr(harness, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(suite, cut)
    assert len(calls) == 2 and len(collect(suite, plan(suite, cut), cut)["rows"]) == 1
    monkeypatch.undo()
    resumed = compare(suite, cut)
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


def test_a_cell_that_another_process_finishes_between_look_and_lock_is_not_run_again(
    few_words, tmp_path, monkeypatch
):
    suite, ran, check = suite_of(few_words), [], harness._check_rates

    def counted(config, **kwargs):
        ran.append(config.out)
        return train(config, **kwargs)

    def look(*args):  # the last thing before a cell is run
        monkeypatch.setattr(harness, "_check_rates", check)
        compare(suite, tmp_path)
        check(*args)

    monkeypatch.setattr(harness, "train", counted)
    monkeypatch.setattr(harness, "_check_rates", look)
    monkeypatch.setattr(harness, "WAIT_S", 0.0)
    assert len(compare(suite, tmp_path)["rows"]) == 4
    assert len(ran) == len(set(ran)) == 4
    assert not list(tmp_path.rglob("claim"))


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


def test_a_run_whose_last_step_breaks_the_weights_is_never_the_best(few_words, tmp_path):
    # Its one step has a finite loss; it is the held-out text after it that tells.
    suite = suite_of(
        few_words,
        models={"Meta-State": {}, "mad": {"train": {"warmup": 0}}},
        sizes={"tiny": {"model": TINY, "tokens_per_parameter": 1e-9}},
        train={"batch_size": 2, "context": 32, "warmup": 0, "valid_tokens": 256},
        lr={"values": [1e30, 1e-3], "share": 1.0},
    )
    results = compare(suite, tmp_path / "sweep")
    told = [(s["lr"], s["loss"] is None) for s in results["sweep"]]
    assert told == [(1e30, True), (1e-3, False)] * 2
    assert [r["lr"] for r in results["rows"]] == [1e-3] * 2
    alone = dataclasses.replace(
        suite,
        lr=RateSweep(),
        models=suite.models | {"mad": SuiteModel(train={"lr": 1e30})},
    )
    first, mad = compare(alone, tmp_path / "alone")["rows"]
    assert first["failed"] is None and first["loss"] < 6
    assert "held-out" in mad["failed"] and mad["loss"] is None


def test_a_model_whose_every_rate_diverges_stops_no_other(few_words, tmp_path):
    sweep = {"values": [1e-3, 1e-2], "share": 0.5}
    mad = {"preset": "rwkv7"}
    suite = suite_of(
        few_words,
        models={"mad": mad, "Meta-State": {}},
        sizes={"tiny": {"model": TINY}},
        lr=sweep,
    )

    def diverging(config, **kwargs):
        if "mad" in config.out:
            raise DivergedError("step 1")
        return train(config, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "train", diverging)
        rows = compare(suite, tmp_path)["rows"]
    assert [r["model"] for r in rows] == ["mad", "Meta-State"]
    assert "every learning rate of the sweep diverged (0.001, 0.01)" in rows[0]["failed"]
    assert rows[0]["lr"] is None and rows[0]["curve"] == [] and rows[1]["loss"] < 6
    cells = plan(suite, tmp_path)
    assert estimate(cells) == {} and collect(suite, cells, tmp_path)["rows"] == rows
    # A rate that does not diverge, given later, is run and carried.
    more = dataclasses.replace(suite.lr, values=(1e-3, 1e-2, 2e-3))
    rows = compare(dataclasses.replace(suite, lr=more), tmp_path)["rows"]
    assert (rows[0]["lr"], rows[0]["failed"]) == (2e-3, None)


@pytest.mark.parametrize("text", ['{"run": ', "[]", '{"run": {}}', '{"lr": 1, "run": 5}', "\xff"])
def test_a_damaged_score_is_named_and_can_be_made_again(copied, text):
    suite, out = copied
    cells = plan(suite, out)
    rows = collect(suite, cells, out)["rows"]
    file = cells[-1].folder / "score.json"
    file.write_bytes(text.encode("latin-1"))
    for call in (compare, lambda suite, out: collect(suite, cells, out)):
        with pytest.raises(DataError, match=f"{file} is damaged; delete it"):
            call(suite, out)
    file.unlink()
    assert compare(suite, out)["rows"] == rows


def test_points_between_lines_of_the_log_have_their_own_seconds(copied):
    suite, out = copied
    cell = plan(suite, out)[-1]
    lines = [
        {"kind": "valid", "tokens": 25, "nats_per_token": 3.0},
        {"kind": "train", "tokens": 100, "tokens_per_s": 50.0},
        {"kind": "valid", "tokens": 100, "nats_per_token": 2.0},
        {"kind": "valid", "tokens": 150, "nats_per_token": 1.5},
        {"kind": "train", "tokens": 200, "tokens_per_s": 25.0},
        {"kind": "valid", "tokens": 200, "nats_per_token": 1.0},
    ]
    (cell.folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert [p["seconds"] for p in curve(cell)] == [0.5, 2.0, 4.0, 6.0]


def test_the_estimate_covers_what_is_left(finished, few_words, tmp_path):
    suite, out, _ = finished
    assert estimate(plan(suite, out)) == {}
    found = estimate(plan(suite_of(few_words), tmp_path))
    assert len(found) == 4 and all(0 < own <= seconds * 1.01 for seconds, own in found.values())


def fake_clock(now):
    return SimpleNamespace(**{name: lambda name=name: now[name] for name in now})


def test_the_estimate_is_of_the_fastest_batch_and_knows_what_others_took(
    few_words, tmp_path, monkeypatch
):
    laps = iter([(9.0, 9.0), (1.0, 0.9), (0.2, 0.1), (1.0, 0.9)])  # the first one compiles
    now = {"monotonic": 0.0, "thread_time": 0.0}

    def slow(*args, **settings):
        lap = next(laps)
        now["monotonic"] += lap[0]
        now["thread_time"] += lap[1]
        return lm_loss(*args, **settings)

    monkeypatch.setattr("metastate.eval.compare.lm_loss", slow)
    monkeypatch.setattr("metastate.eval.compare.time", fake_clock(now))
    monkeypatch.setattr("metastate.eval.compare._scored", lambda cell, done: 0)
    cells = [c for c in plan(suite_of(few_words), tmp_path) if c.rate is None][:1]
    ((seconds, own),) = estimate(cells).values()
    steps = cells[0].train.steps
    assert (seconds, own) == (pytest.approx(0.2 * steps), pytest.approx(0.1 * steps))
    assert next(laps, None) is None


@pytest.mark.parametrize(
    ("dtype", "weights", "mixed"),
    [
        ("float32", torch.float32, False),
        ("bfloat16", torch.float32, True),
        ("float64", torch.float64, False),
    ],
)
def test_the_estimate_times_the_arithmetic_of_the_run(
    few_words, tmp_path, monkeypatch, dtype, weights, mixed
):
    seen = set()

    def look(model, *args, **settings):
        seen.add((model.embedding.weight.dtype, torch.is_autocast_enabled("cpu")))
        return lm_loss(model, *args, **settings)

    monkeypatch.setattr("metastate.eval.compare.lm_loss", look)
    train = {"batch_size": 2, "context": 32, "warmup": 1, "dtype": dtype}
    estimate(plan(suite_of(few_words, train=train), tmp_path))
    assert seen == {(weights, mixed)}


def test_the_estimate_counts_what_is_scored(finished, few_words, tmp_path, monkeypatch):
    suite, out, _ = finished
    monkeypatch.setattr("metastate.eval.compare._time_batch", lambda cell: (3.0, 1.5))
    held = PreparedData.open(suite.data).split("valid").num_tokens
    found = estimate(plan(suite, tmp_path))
    for cell in plan(suite, out):  # the same cells, finished
        log = (cell.folder / "log.jsonl").read_text()
        scored = log.count('"kind": "valid"') * min(held, cell.train.valid_tokens)
        scored += json.loads((cell.folder / "score.json").read_text()).get("tokens", 0)
        a_batch = cell.train.batch_size * cell.train.context
        seconds, own = found[cell.title]
        assert seconds == pytest.approx(3.0 * cell.train.steps + scored / a_batch)
        assert own == pytest.approx(seconds / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models is empty"),
        ({"baseline": "GPT"}, "baseline is 'GPT'; the models are Meta-State, RWKV-7"),
        ({"models": {"A b": {}, "a-b": {}}}, "share one folder"),
        ({"models": {"a": {"presett": "rwkv7"}}}, "did you mean 'preset'"),
        ({"models": {"a": {"preset": "rwvk7"}}}, "did you mean 'rwkv7-tiny'"),
        (
            {"models": {"A": {}, "A b": {}}, "sizes": {"tiny": {}, "b tiny": {}}},
            "'A, b tiny' and 'A b, tiny' would share one folder, a-b-tiny",
        ),
        ({"train": {"out": "x"}}, "train.out"),
        ({"train": {"from_checkpoint": "x"}}, "train.from_checkpoint .* fresh weights"),
        ({"train": {"valid_every": 7}}, "train.valid_every .* suite.points decides it"),
        ({"sizes": {"tiny": {"train": {"checkpoint_every": 7}}}}, "train.checkpoint_every"),
        ({"sizes": {"tiny": {"shapes": {"RWKV7": {}}}}}, "did you mean 'RWKV-7'"),
        ({"sizes": {"tiny": {"shapes": {"RWKV-7": {"depth": 2}}}}}, "unknown key 'depth'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 1, 0]}, "suite.seeds holds 0; different"),
        ({"seeds": [-1]}, "suite.seeds holds -1"),
        ({"sizes": {"tiny": {"seeds": [4, 4]}}}, "suite.sizes.tiny.seeds holds 4"),
        ({"tokens_per_parameter": 0.0}, "suite.tokens_per_parameter is 0.0; it must be above 0"),
        ({"points": 0}, "suite.points is 0"),
        ({"test_tokens": 0}, "suite.test_tokens is 0"),
        ({"sizes": {"tiny": {"parameters": -5}}}, "suite.sizes.tiny.parameters is -5"),
        ({"sizes": {"tiny": {"tokens_per_parameter": 0}}}, "tiny.tokens_per_parameter is 0"),
        ({"lr": {"values": [1e-3], "share": -1}}, "suite.lr.share is -1; above 0, at most 1"),
        ({"lr": {"values": [1e-3, 0.0]}}, "suite.lr.values holds 0; different rates above 0"),
        ({"lr": {"values": [1e-3, 1e-3]}}, "suite.lr.values holds 0.001"),
        ({"lr": {"exponent": -0.5}}, "suite.lr.exponent is -0.5; 0 or more"),
    ],
)
def test_impossible_suites_are_refused(few_words, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(suite_of(few_words, **changes), tmp_path)
