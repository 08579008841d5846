"""Tables, fits and the page, against figures worked out by hand."""

import math
import random
import re

import pytest

from metastate.errors import DataError
from metastate.eval import plots
from metastate.eval.plots import comparison_figure, lead_figure
from metastate.eval.report import (
    FIGURES,
    failures,
    fits,
    gains,
    leads,
    main_table,
    markdown,
    power_law,
    remarks,
    seed_table,
    sweep_table,
    text_error,
    write_report,
)


def row(model, size, seed, loss, parameters=1000, failed=None):
    curve = [
        {"tokens": 500, "flops": 5e8, "seconds": 1.0, "loss": loss and loss + 1},
        {"tokens": 1000, "flops": 1e9, "seconds": 2.0, "loss": loss},
    ]
    return {
        "model": model, "size": size, "seed": seed, "lr": 1e-3, "parameters": parameters,
        "tokens": parameters, "flops": 1e6 * parameters, "loss": loss, "failed": failed,
        "bits_per_byte": loss and loss / math.log(2), "domains": {"law": loss, "web": loss},
        "state_bytes": 64, "tokens_per_s": 500.0, "config": {"hidden_size": 8},
        "curve": [] if failed else curve,
    }  # fmt: skip


@pytest.fixture
def results():
    rows = [row("new <1>", "small", s, x) for s, x in ((0, 1.8), (1, 2.0))]
    rows += [row("old", "small", s, x) for s, x in ((0, 2.0), (1, 2.5))]
    rows += [row("new <1>", "large", 0, 1.5, 4000), row("old", "large", 0, None, 4000, "step 7")]
    rows += [row("new <1>", "huge", 0, 1.2, 16000)]
    return {
        "suite": {
            "models": {"new <1>": {}, "old": {}},
            "sizes": {"small": {}, "large": {}, "huge": {}},
            "baseline": "old",
            "lr": {"values": [0.001, 0.01]},
        },
        "environment": {"torch": "x"},
        "split": "test",
        "cells": 8,
        "sweep": [
            {"model": "old", "lr": 0.001, "loss": 2.25},
            {"model": "old", "lr": 0.01, "loss": None},
        ],
        "rows": rows,
    }


def test_gains_are_paired_by_seed(results):
    absolute, relative = gains(results, "small", "new <1>")
    assert absolute == pytest.approx([0.2, 0.5]) and relative == pytest.approx([10.0, 20.0])
    table = main_table(results)
    assert table[1][:2] == ["small", "new <1>"] and table[1][9:] == ["1e+09", "2"]
    assert table[1][2] == "1.9000 ± 0.1414" and table[1][3] == "0.3500 ± 0.2121"
    assert table[1][4] == "15.00 ± 7.07 %"
    assert table[2][3:6] == ["", "", ""]  # the baseline has no gain over itself
    # Where the baseline diverged there is nothing to gain over.
    assert table[3][:2] == ["large", "new <1>"] and table[3][3:5] == ["-", "-"]
    assert markdown(table).splitlines()[1] == "|" + "---|" * 11


def test_the_error_of_a_gain_over_documents_is_the_jackknife_s(results):
    """It leaves out a document at a time, and says nothing of how the formula comes about."""
    draw, n = random.Random(0), 40
    tokens = [draw.randint(20, 60) for _ in range(n)]
    nats = {
        (model, seed): [draw.uniform(rate, rate + 0.5) * t for t in tokens]
        for model, rate in (("new <1>", 1.5), ("old", 1.7))
        for seed in (0, 1)
    }
    for r in results["rows"]:
        if r["size"] == "small":
            own = nats[r["model"], r["seed"]]
            r["documents"] = [[i, own[i], tokens[i]] for i in range(n)]

    def gain(left_out):
        sums = {key: sum(x for i, x in enumerate(v) if i != left_out) for key, v in nats.items()}
        own, base = (sums[model, 0] + sums[model, 1] for model in ("new <1>", "old"))
        return 100 * (1 - own / base)

    gone = [gain(i) for i in range(n)]
    jackknife = math.sqrt((n - 1) / n * sum((g - sum(gone) / n) ** 2 for g in gone))
    found = text_error(results, "small", "new <1>")
    assert found == pytest.approx(jackknife, rel=0.03) and 0.3 < found < 3
    assert main_table(results)[1][5] == f"± {found:.2f} %"
    assert text_error(results, "large", "new <1>") is None  # nothing to be paired with
    results["rows"][0]["documents"] = results["rows"][0]["documents"][:3]
    assert text_error(results, "small", "new <1>") is None  # not the same text


def test_documents_that_agree_leave_no_doubt_of_a_gain(results):
    for r in results["rows"]:
        share = 0.9 if r["model"] != "old" else 1.0
        r["documents"] = [[i, share * x, 4] for i, x in enumerate((3.0, 7.0, 5.0))]
    assert text_error(results, "small", "new <1>") == pytest.approx(0, abs=1e-9)


def test_seeds_that_have_no_partner_are_said(results):
    results["rows"] = [r for r in results["rows"] if (r["model"], r["seed"]) != ("old", 1)]
    assert main_table(results)[1][10] == "2 (1 paired)"
    assert main_table(results)[2][10] == "1"


def test_every_run_is_shown_with_its_gain_over_the_same_seed(results):
    assert seed_table(results) == [
        ["size", "model", "seed 0", "seed 1"],
        ["small", "new <1>", "1.8000 (+0.2000)", "2.0000 (+0.5000)"],
        ["small", "old", "2.0000", "2.5000"],
        ["large", "new <1>", "1.5000", ""],  # the baseline diverged, and there is one seed
        ["huge", "new <1>", "1.2000", ""],
    ]


def test_the_table_s_file_says_flops_seeds_and_how_gains_are_paired(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| training FLOPs |" in text.splitlines()[0] and "gains are paired by seed" in text
    assert "### Seed by seed (gain over old)" in text and "(+0.5000)" in text


def test_what_diverged_or_is_missing_is_said(results):
    said = failures(results)
    assert "old, large, seed 0: step 7" in said[0] and "1 of 8 cells" in said[1]
    assert sweep_table(results) == [["model", "lr 0.001", "lr 0.01"], ["old", "2.2500", "diverged"]]


def test_cells_of_several_sources_or_texts_are_said(results, tmp_path):
    for r in results["rows"]:
        r["source"] = {"metastate": "0.1.0", "commit": "0123456789abcdef-dirty"}
        r["domain_tokens"] = {"law": 5, "web": 7}
    assert remarks(results) == failures(results)
    results["rows"][0]["source"] = None
    older = {"metastate": "0.0.9", "commit": None}
    results["rows"][1]["source"] = [None, older]
    results["rows"][2]["source"] = [results["rows"][2]["source"]]
    said = (
        "different sources: unknown (1 cells), unknown, then 0.0.9 (1 cells), "
        "0.1.0 0123456789ab-dirty (4 cells)"
    )
    assert said in remarks(results)[-1]
    results["rows"][5]["domain_tokens"] = {"law": 12}  # of the cell that diverged: nothing scored
    assert said in remarks(results)[-1]
    results["rows"][0]["domain_tokens"] = {"law": 12}
    assert "different pieces of the test text" in remarks(results)[-1]
    write_report(results, tmp_path)
    for name in ("table.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert said in text and "different pieces of the test text" in text


@pytest.mark.parametrize(
    ("losses", "side"),
    [
        ([1.0, 2.0, 3.0], "0.001, is the smallest"),
        ([3.0, 2.0, 1.0], "0.004, is the largest"),
        ([2.0, 1.0, 3.0], None),
        ([2.0, 1.0, None], None),  # beyond it the run diverged
        ([1.0, 2.0], None),  # of two the best is always the last
    ],
)
def test_a_sweep_that_ends_where_it_does_best_is_named(results, losses, side):
    model, *_ = results["suite"]["models"]
    rates = [1e-3, 2e-3, 4e-3][: len(losses)]
    results["suite"]["lr"]["values"] = rates
    results["sweep"] = [
        {"model": model, "lr": lr, "loss": loss} for lr, loss in zip(rates, losses, strict=True)
    ]
    said = [text for text in remarks(results) if "of the sweep" in text]
    assert len(said) == (side is not None)
    assert side is None or f"{model}: the best learning rate, {side} of the sweep" in said[0]
    results["sweep"].pop(0)  # not finished yet
    assert not any("of the sweep" in text for text in remarks(results))


def test_a_name_with_a_bar_stays_in_its_column():
    line = markdown([["size", "model"], ["small", "a|b"]]).splitlines()[2]
    assert line == r"| small | a\|b |"


def test_points_are_means_with_the_spread_of_a_sample(results, drawn):
    comparison_figure(results, "parameters", {}, "a title")
    bars = {b.get_label(): b.lines[2][0].get_segments() for b in drawn[0].axes[0].containers}
    (x, low), (_, high) = bars["new <1>"][0]  # of 1.8 and 2.0
    assert x == 1000 and (low, high) == pytest.approx((1.9 - 0.02**0.5, 1.9 + 0.02**0.5))
    (_, low), (_, high) = bars["new <1>"][1]  # one seed
    assert low == high == 1.5
    (_, low), (_, high) = bars["old"][0]  # of 2.0 and 2.5
    assert (low, high) == pytest.approx((2.25 - 0.125**0.5, 2.25 + 0.125**0.5))


@pytest.mark.parametrize("key", FIGURES)
@pytest.mark.parametrize("name", ["$a_{b$", "_hidden"])
def test_a_model_of_any_name_is_drawn_and_in_the_legend(results, key, name, drawn):
    results["suite"] |= {"models": {name: {}, "old": {}}, "sizes": {"small": {}, name: {}}}
    for r in results["rows"]:
        r["model"] = name if r["model"].startswith("new") else r["model"]
        r["size"] = name if r["size"] == "large" else r["size"]
    assert comparison_figure(results, key, {}, name)
    shown = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert shown.count(plots._as_text(name)) == (1 if key == "parameters" else 2)


def test_a_power_law_is_found_again_and_its_band_covers_it():
    x = [1e5, 4e5, 1e6, 8e6]
    law = power_law(x, [3.0 * v**-0.08 for v in x])
    assert law.exponent == pytest.approx(0.08) and law.scale == pytest.approx(3.0)
    assert law.fitted == 8e6 and law.x[-1] == pytest.approx(8e7)
    assert law.high[-1] - law.low[-1] < 1e-6
    noisy = power_law(
        x, [3.0 * v**-0.08 * f for v, f in zip(x, (1.01, 0.99, 1.0, 1.01), strict=True)]
    )
    widths = [h - low for h, low in zip(noisy.high, noisy.low, strict=True)]
    assert all(lo < m < h for lo, m, h in zip(noisy.low, noisy.loss, noisy.high, strict=True))
    assert widths[-1] > 2 * min(widths)  # doubt grows where nothing was measured
    assert power_law([1e5, 4e5], [2.0, 1.9]) is None
    assert power_law([288_240, 288_768, 289_088], [1.6, 1.7, 1.8]) is None  # a noise's slope
    assert power_law([1e5, 1.2e5, 1.4e5, 2e5], [2.0, 1.9, 1.9, 1.8]) is None


def test_the_band_is_the_textbook_one():
    """Against the closed form, t * s * sqrt(1 / n + (log x - mean)^2 / sum (log x_i - mean)^2)."""
    x, losses = [1.0, math.e, math.e**2], [math.e**0.1, 1.0, math.e**-0.05]
    law = power_law(x, losses)
    # Residuals of (0.1, 0, -0.05) from their line: 0.0083, -0.0167, 0.0083; one degree of freedom.
    s, t = math.sqrt(0.1**2 / 6 * 0.25), 12.7062
    at = [math.log(v) for v in law.x]
    half = [math.log(h / low) / 2 for h, low in zip(law.high, law.low, strict=True)]
    expected = [t * s * math.sqrt(1 / 3 + (v - 1) ** 2 / 2) for v in at]
    assert half == pytest.approx(expected, rel=1e-3)


def test_fits_need_three_sizes_and_take_their_means(results):
    assert set(fits(results, "parameters")) == {"new <1>"}
    law = power_law([1000, 4000, 16000], [1.9, 1.5, 1.2])
    assert fits(results, "parameters")["new <1>"] == law
    for r in results["rows"]:
        if r["size"] == "huge":
            r["tokens"] *= 2
    assert not fits(results, "parameters")  # of unlike numbers of tokens a parameter


@pytest.mark.parametrize("key", FIGURES)
def test_every_figure_is_drawn(results, key, drawn):
    laws = fits(results, key)
    png, svg = comparison_figure(results, key, laws, "a title")
    (axes,) = drawn[0].axes
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert (
        ("law, beyond what was measured" in said) == bool(laws) == (key in ("parameters", "flops"))
    )
    assert f"loss of the {'test' if key == 'parameters' else 'valid'} text" in axes.get_ylabel()
    assert png.startswith(b"\x89PNG") and svg.startswith("<svg")


def test_the_page_stands_alone_and_is_escaped(results, tmp_path):
    paths = write_report(results, tmp_path)
    assert all(p.stat().st_size for p in paths) and len(paths) == 7
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("<svg") == 5
        and "Lead over old" in page
        and "new &lt;1&gt;" in page
        and "new <1>" not in page
    )
    assert 'name="viewport"' in page and "overflow-wrap: anywhere" in page  # fits a phone
    # Nothing is loaded from elsewhere.
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'xlink:href="#', "", page))
    assert "extrapolation, not measured" in page and "1 of 8 cells" in page
    assert "10.00" not in page and "15.00\u00a0±\u00a07.07\u00a0%" in page  # on one line


def test_leads_are_paired_by_seed_and_read_off_between_points(results):
    expected = [(500, 100 * (0.2 / 3.0 + 0.5 / 3.5) / 2), (1000, 15)]
    assert leads(results, "small", "new <1>") == [pytest.approx(point) for point in expected]
    assert leads(results, "large", "new <1>") == leads(results, "huge", "new <1>") == []
    early = {"tokens": 200, "flops": 2e8, "seconds": 0.5, "loss": 9.0}
    for r in results["rows"]:
        if r["size"] == "small":
            r["curve"] = [early, *r["curve"]] if r["model"] != "old" else [early, r["curve"][1]]
    found = leads(results, "small", "new <1>")
    at_500 = [100 * (1 - own / (9 - (9 - end) * 3 / 8)) for own, end in ((2.8, 2.0), (3.0, 2.5))]
    assert found[0] == (200, 0) and found[2] == (1000, pytest.approx(15))
    assert found[1] == (500, pytest.approx(sum(at_500) / 2))
    for r in results["rows"]:  # a baseline that was stopped says nothing of what came later
        if (r["size"], r["model"]) == ("small", "old"):
            r["curve"] = r["curve"][:1]
    assert leads(results, "small", "new <1>") == [(200, 0)]


def test_a_lead_is_drawn_above_the_line_and_its_loss_below(drawn):
    lead_figure({("a", "s"): [(1, 2), (10, -1)], ("b", "s"): [(1, 3)]}, "a title")
    (axes,) = drawn[0].axes
    zero, first, second = axes.lines
    assert list(zero.get_ydata()) == [0, 0] and list(first.get_ydata()) == [2, -1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a, s", "b, s"]
    assert first.get_color() != second.get_color()


def test_without_a_baseline_s_run_there_is_no_lead_to_draw(results, tmp_path):
    results["rows"] = [r for r in results["rows"] if r["model"] != "old"]
    assert "lead-by-tokens.png" not in [p.name for p in write_report(results, tmp_path)]


def test_without_a_finished_cell_there_is_no_report(results, tmp_path):
    with pytest.raises(DataError, match="no cell is finished"):
        write_report(results | {"rows": []}, tmp_path)
