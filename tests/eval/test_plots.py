import builtins
import json

import pytest

from metastate.errors import ConfigError, DataError
from metastate.eval.plots import loss_curve, read_log, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def write_log(path, rows, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return path


def train(step, loss):
    return {"kind": "train", "step": step, "tokens": 64 * step, "loss": loss}


def rows(n):
    out = [train(s, 5 / s) for s in range(1, n + 1)]
    return [*out, {"kind": "valid", "step": n, "tokens": 64 * n, "nats_per_token": 0.5}]


@pytest.mark.parametrize("n", [1, 5, 100])
def test_loss_curve_holds_every_point(tmp_path, drawn, n):
    log = write_log(tmp_path / "log.jsonl", rows(n))
    loss_curve(log, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    axes = drawn[0].axes[0]
    assert axes.get_title() == "a run" and axes.get_xlabel() == "tokens"
    assert list(axes.lines[0].get_xdata()) == [64 * s for s in range(1, n + 1)]
    assert list(axes.lines[-1].get_ydata()) == [0.5]
    steps = axes.child_axes[0]
    assert steps.get_xlabel() == "steps"
    steps.figure.canvas.draw()
    assert steps.get_xlim()[1] == pytest.approx(axes.get_xlim()[1] / 64)
    assert all(tick == int(tick) for tick in steps.get_xticks())


def test_a_resumed_run_draws_each_step_once(tmp_path, drawn):
    log = write_log(
        tmp_path / "log.jsonl",
        [
            train(1, 3.0),
            train(2, 9.0),
            {"kind": "resume", "step": 1},
            train(2, 2.0),
            train(3, None),
            train(4, float("nan")),
        ],
    )
    loss_curve(log, tmp_path / "loss.png")
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == [3.0, 2.0]


def test_log_cut_off_while_writing(tmp_path):
    log = write_log(tmp_path / "log.jsonl", rows(3), '{"step": 4, "lo')
    assert len(read_log(log)) == 4


@pytest.mark.parametrize("text", ["", '{"step": 1}\n', "5\n{}\n", "\0\n{}\n"])
def test_unusable_logs_are_clear_errors(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match="log"):
        loss_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    with pytest.raises(DataError, match="training log"):
        read_log(tmp_path / "missing.jsonl")


def test_smooth_keeps_a_line_and_does_not_end_in_one_value_s_noise():
    line = [2.0 * i for i in range(401)]
    assert smooth(line) == (pytest.approx(line[10:-10]), 10)
    noisy = [(-1.0) ** i for i in range(401)]
    assert max(map(abs, smooth(noisy)[0])) < 0.1


def test_a_huge_loss_is_forgotten_where_the_window_has_left_it():
    values = [2.0] * 10 + [1e30] + [2.0] * 200
    means, half = smooth(values)
    assert means[30 - half :] == pytest.approx([2.0] * (181 - half))


@pytest.mark.parametrize("name", ["$a_{b$", "R$_2$ and x", r"\$5 or $6_{x", "_hidden", "a|b"])
def test_any_name_is_shown_as_it_is(name, tmp_path, drawn):
    log = write_log(tmp_path / "log.jsonl", rows(3))
    loss_curve(log, tmp_path / "loss.png", name)
    title = drawn[0].axes[0].title
    drawable, formula = title._preprocess_math(title.get_text())
    assert (drawable.strip(), formula) == (name, False)


@pytest.mark.parametrize("name", ["/home/someone/runs/" + 9 * "a-long-name/", 20 * "many words "])
def test_a_long_name_is_not_cut_off(name, tmp_path, drawn):
    loss_curve(write_log(tmp_path / "log.jsonl", rows(3)), tmp_path / "loss.png", name)
    axes = drawn[0].axes[0]
    box, most = axes.title.get_window_extent(), drawn[0].bbox
    assert box.x0 >= 0 and box.x1 <= most.x1 and box.y1 <= most.y1
    shown = axes.get_title()
    assert shown.replace("\n", "").replace(" ", "") == name.replace(" ", "")


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kw):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    log = write_log(tmp_path / "log.jsonl", rows(3))
    with pytest.raises(ConfigError, match=r"metastate\[cli\]"):
        loss_curve(log, tmp_path / "loss.png")
