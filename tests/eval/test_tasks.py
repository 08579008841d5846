"""Word problems and recall: are the labels right, and can something be learned from them?"""

import itertools

import numpy as np
import pytest
import torch

from metastate.config import TrainConfig
from metastate.errors import ConfigError
from metastate.eval import plots
from metastate.eval.tasks import (
    ANSWERS,
    GROUPS,
    LEVELS,
    PROBE,
    Recall,
    WordProblem,
    group_table,
    task_model,
    train_and_score,
)
from metastate.model.lm import LanguageModel
from metastate.model.loss import IGNORE
from metastate.model.presets import ARCHITECTURES, preset

ORDERS = {"S5": 120, "A5": 60, "A4xZ5": 60, "Z60": 60, "S3": 6, "Z2xZ2": 4, "A3xS3xZ2": 36}


@pytest.mark.parametrize("name", ORDERS)
def test_a_table_is_a_group(name):
    table, n = group_table(name), ORDERS[name]
    assert table.shape == (n, n) and set(np.unique(table)) == set(range(n))  # closed
    elements = np.arange(n)
    assert (table[0] == elements).all() and (table[:, 0] == elements).all()
    assert (table[table] == table[:, table]).all()  # (a b) c = a (b c)
    assert ((table == 0).sum(0) == 1).all() and ((table == 0).sum(1) == 1).all()  # inverses


def orders_of_elements(name):
    table = group_table(name)
    out = []
    for g in range(len(table)):
        power, order = g, 1
        while power:
            power, order = table[power, g], order + 1
        out.append(order)
    return sorted(out)


def test_the_groups_are_the_ones_they_are_named_after():
    """By their numbers of elements of each order, which differ between all of them."""
    assert np.bincount(orders_of_elements("S5")).tolist() == [0, 1, 25, 20, 30, 24, 20]
    assert np.bincount(orders_of_elements("A5")).tolist() == [0, 1, 15, 20, 0, 24]
    a4xz5 = {1: 1, 2: 3, 3: 8, 5: 4, 10: 12, 15: 32}
    found = np.bincount(orders_of_elements("A4xZ5"))
    assert {i: int(n) for i, n in enumerate(found) if n} == a4xz5
    assert orders_of_elements("Z60").count(60) == 16
    for name in GROUPS:
        table = group_table(name)
        assert (table == table.T).all() == (name == "Z60")


def test_composition_applies_the_right_factor_first():
    perms = list(itertools.permutations(range(4)))
    table = group_table("S4")
    for i, j in [(1, 6), (9, 14), (23, 2)]:
        p, q = perms[i], perms[j]
        assert perms[table[i, j]] == tuple(p[q[x]] for x in range(4))


@pytest.mark.parametrize(
    ("name", "word"),
    [("Q8", "S5"), ("", "S5"), ("S5x", "S5"), ("S7", "1000"), ("Z1", "2 to"), ("Z40xZ40", "1000")],
)
def test_groups_that_are_none(name, word):
    with pytest.raises(ConfigError, match=word):
        group_table(name)


def test_labels_are_the_products_so_far():
    perms = list(itertools.permutations(range(5)))
    tokens, labels = WordProblem("S5", 12).batch(8, 3)
    assert tokens.shape == labels.shape == (8, 12) and tokens.dtype == labels.dtype == torch.int64
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        product = tuple(range(5))
        for g, label in zip(row, answer, strict=True):
            product = tuple(product[x] for x in perms[g])
            assert perms[label] == product


def test_training_batches_reach_so_far_and_have_about_as_many_tokens():
    problem = WordProblem("Z3", 6)
    shapes = [problem.training_batch(8, [0, i], 5)[0].shape for i in range(60)]
    assert {T for _, T in shapes} == {2, 3, 4, 5}
    assert sum(T == 5 for _, T in shapes) > 30
    assert all(48 - T < B * T <= 48 for B, T in shapes)
    assert WordProblem("Z3", 1).training_batch(8, 0, 1)[0].shape == (8, 1)


def test_the_reach_grows_to_the_first_length_that_is_not_mastered():
    problem = WordProblem("Z3", 6)
    assert problem.first_reach == 3 and WordProblem("Z3", 2).first_reach == 2
    assert problem.next_reach(3, [1, 1, 0.95, 0.92, 0.5, 0.99]) == 5
    assert problem.next_reach(3, [1, 1, 0.9, 1, 1, 1]) == 3
    assert problem.next_reach(3, [1.0] * 6) == problem.next_reach(6, [0.0] * 6) == 6


@pytest.mark.parametrize("filler", ["random", "zero"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_query_can_be_answered(level, filler):
    problem = Recall.parse(level, filler=filler)
    tokens, labels = problem.batch(2, 7)
    assert problem.name == level + {"zero": "", "random": " random"}[filler]
    assert tokens.shape == labels.shape == (2, problem.length)
    half, P = problem.vocab_size // 2, problem.pairs
    for row, answer in zip(tokens.numpy(), labels.numpy(), strict=True):
        keys, values = row[0 : 2 * P : 2], row[1 : 2 * P : 2]
        assert len(set(keys)) == len(set(values)) == P
        assert keys.min() >= 1 and keys.max() < half <= values.min()
        assert values.max() < problem.vocab_size
        shown = dict(zip(keys, values, strict=True))
        asked = np.flatnonzero(answer != IGNORE)
        assert len(asked) == P and asked.min() >= 2 * P
        assert set(row[asked]) == set(keys)  # each key once more
        assert [shown[key] for key in row[asked]] == answer[asked].tolist()
        rest = np.delete(row[2 * P :], asked - 2 * P)
        assert (rest == 0).all() == (filler == "zero")


def test_the_filler_is_any_token_and_changes_nothing_else():
    """As Zoology's `random_non_queries` has it."""
    (tokens, labels), (bare, same) = (
        Recall(64, 4, 32, filler).batch(400, 0) for filler in ("random", "zero")
    )
    rest = labels == IGNORE
    rest[:, :8] = False
    assert torch.equal(labels, same) and torch.equal(tokens[~rest], bare[~rest])
    assert (bare[rest] == 0).all()
    count = torch.bincount(tokens[rest], minlength=32)
    assert count.sum() == 400 * 52 and count.min() > 0.8 * 400 * 52 / 32


def test_queries_come_anywhere_but_sooner_rather_than_later():
    _, labels = Recall(64, 4, 32).batch(4000, 0)
    count = (labels != IGNORE).sum(0).numpy()
    places = count[8::2]
    assert count.sum() == 16000 and places.sum() == 16000  # every second place
    assert (places > 0).all() and places[0] > 2 * places[5] > 2 * places[-1]
    # Which key is asked for first has nothing to do with its place among the pairs.
    tokens, labels = Recall(64, 4, 32).batch(4000, 1)
    first = (labels != IGNORE).int().argmax(1)
    asked = tokens[torch.arange(4000), first]
    place = (tokens[:, 0:8:2] == asked[:, None]).int().argmax(1)
    assert torch.bincount(place).min() > 900


@pytest.mark.parametrize("problem", [WordProblem("A4", 9), Recall(40, 5, 100)])
def test_a_seed_makes_the_same_sequences(problem):
    a, b, c = (problem.batch(4, seed) for seed in ([1, 2], [1, 2], [1, 3]))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    longer, _ = problem.batch(4, 0, 50)
    assert longer.shape == (4, 50) and longer.max() < problem.vocab_size


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Recall(15, 4), "4 tokens a pair"),
        (lambda: Recall(64, 0), "at least 1"),
        (lambda: Recall(64, 16, 32), "34 or more"),
        (lambda: Recall.parse("64"), "LENGTHxPAIRS"),
        (lambda: Recall(64, 4, filler="noise"), "allowed: zero, random"),
        (lambda: WordProblem("S5", 0), "length"),
        (lambda: task_model("mamba", 1, 16, 1, 8), "tokenformer"),
        (lambda: task_model("mamba+memory", 1, 16, 1, 8), "tokenformer"),
        (lambda: task_model("metastate-memory+memory", 1, 16, 1, 8), "unknown architecture"),
        (lambda: task_model("rwkv7-memory", 1, 16, 1, 8), "no surprise memory as it is"),
        (lambda: task_model("metastate+memory", 1, 16, 1, 8), "a surprise memory as it is"),
        (lambda: task_model("rwkv7", 1, 16, 3, 8), "multiple"),
    ],
)
def test_impossible_sizes(make, word):
    with pytest.raises(ConfigError, match=word):
        make()


def test_the_smallest_vocabulary_is_enough():
    tokens, _ = Recall(16, 4, 10).batch(3, 0)
    assert set(tokens[0, 0:8:2].tolist()) == {1, 2, 3, 4}


def test_the_surprise_memory_is_that_of_the_presets_or_what_the_name_says():
    def memory(name, width=16):
        return task_model(name, 1, width, 1, 8).memory_heads

    for name in ARCHITECTURES:
        assert memory(name) == preset(f"{name}-tiny").memory_heads
    assert memory("metastate-memory") is None
    assert memory("rwkv7+memory") == memory("paper+memory") == 1
    assert memory("rwkv7+memory", 320) == 2  # a head is no wider than kernels take
    bare, whole = (task_model(name, 2, 16, 1, 8) for name in ("metastate-memory", "metastate"))
    assert bare.replace(memory_heads=1, memory_layer=-1) == whole


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "metastate-memory", "transformer+memory"])
def test_every_architecture_is_trained_and_scored(architecture):
    problem = WordProblem("Z2", 3)
    config = task_model(architecture, 1, 8, 1, problem.vocab_size)
    train = TrainConfig(steps=2, batch_size=4, warmup=0)
    calls = []
    found = train_and_score(problem, config, train, lambda *a, **k: calls.append(a))
    assert calls == [(1, 2), (2, 2)] and found["steps"] == 2
    assert len(found["by_length"]) == 12 and found["accuracy"] == found["by_length"][2]
    assert found["parameters"] == LanguageModel(config).count_parameters()["total"]
    assert not found["diverged"]


class Known(torch.nn.Module):
    """A model that answers as `answer(tokens)` says."""

    def __init__(self, size, answer):
        super().__init__()
        self.size, self.answer, self.dummy = size, answer, torch.nn.Parameter(torch.zeros(1))

    def features(self, tokens):
        one_hot = torch.nn.functional.one_hot(self.answer(tokens), self.size).float()
        return one_hot, None, None

    def head(self, x):
        return x


def test_scores_of_models_whose_answers_are_known():
    problem = WordProblem("Z5", 4)
    total = Known(5, lambda tokens: tokens.cumsum(1) % 5)
    assert problem.score(total, 50, (0,), far=True) == (1.0, [1.0] * 16)
    last = Known(5, lambda tokens: (tokens + tokens.roll(1, 1)) % 5)  # right for two elements only
    accuracy, by_length = problem.score(last, 2000, (0,), far=False)
    assert by_length[1] == 1.0 and accuracy == by_length[3] == pytest.approx(0.2, abs=0.04)

    def recall(tokens):
        out = torch.zeros_like(tokens)
        for row, line in zip(out, tokens.tolist(), strict=True):
            shown = dict(zip(line[0:8:2], line[1:8:2], strict=True))
            row[8:] = torch.tensor([shown.get(t, 0) for t in line[8:]])
            row[8:][row[8:] == shown[line[0]]] = 0  # forgets the first pair
        return out

    assert Recall(32, 4, 60).score(Known(60, recall), 400, (0,), far=True) == (0.75, None)


def test_training_learns_and_stops_early():
    problem = Recall(8, 2, 8)
    train = TrainConfig(
        steps=400, batch_size=64, lr=1e-2, min_lr=1e-3, warmup=20, z_loss=0.0, valid_every=25
    )
    found = train_and_score(problem, task_model("rwkv7", 2, 16, 1, 8), train)
    assert found["passed"] and found["accuracy"] > 0.99 and found["steps"] < 400
    assert found["by_length"] is None


def test_a_lucky_look_does_not_stop_the_training():
    looks = []

    class Lucky(Recall):
        def score(self, model, answers, seed, far):
            looks.append((answers, seed))
            return (1.0 if answers == PROBE else 0.99), None  # better is wanted, and there is time

    train = TrainConfig(steps=4, batch_size=2, warmup=0, valid_every=2)
    found = train_and_score(Lucky(8, 2, 8), task_model("rwkv7", 1, 8, 1, 8), train)
    assert found["steps"] == 4 and [a for a, _ in looks] == [PROBE, ANSWERS] * 2 + [ANSWERS] * 2
    assert len({seed for _, seed in looks}) == 6  # each on sequences of its own


def test_training_that_diverges_is_said_to(monkeypatch):
    from metastate.eval import tasks

    real = tasks.lm_loss

    def broken(*args, **settings):
        out = real(*args, **settings)
        return type(out)(out.loss * float("inf"), out.nll, out.num_tokens, out.state)

    monkeypatch.setattr(tasks, "lm_loss", broken)
    problem = WordProblem("Z2", 3)
    found = train_and_score(problem, task_model("rwkv7", 1, 8, 1, 2), TrainConfig(steps=5))
    assert found["diverged"] and found["steps"] == 0 and found["loss"] is None
    assert not found["passed"]


def cell(problem, architecture, layers, accuracy, by_length):
    model = {"num_layers": layers}
    scores = {"accuracy": accuracy, "by_length": by_length, "threshold": 0.9}
    return {"problem": problem, "length": 2, "architecture": architecture, "model": model} | scores


def test_figure_of_word_problems(tmp_path, drawn):
    cells = [
        cell("S5", "rwkv7", 1, 0.5, [1.0, 0.5, 0.25]),
        cell("S5", "rwkv7", 2, 1.0, [1.0, 1.0, 0.5]),
        cell("Z60", "transformer", 2, 0.1, [1.0, 0.1, 0.0]),
    ]
    plots.task_figure(cells, tmp_path / "a.png")
    left, right = drawn[0].axes
    assert (left.get_title(), right.get_title()) == ("S5", "Z60")
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines["rwkv7, 1 layer"] == [100, 50, 25] and lines["rwkv7, 2 layers"] == [100, 100, 50]
    assert right.lines[0].get_label() == "transformer, 2 layers"
    assert 90 in [line.get_ydata()[0] for line in right.lines[1:]]
    assert left.lines[0].get_linestyle() != left.lines[1].get_linestyle()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_figure_of_recall(tmp_path, drawn):
    cells = [
        cell("64x4", "rwkv7", 2, 1.0, None),
        cell("64x4", "transformer", 2, 0.9, None),
        cell("128x8", "transformer", 2, 0.8, None),
        cell("64x4", "transformer", 1, 1.0, None),
    ]
    plots.task_figure(cells, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["64x4", "128x8"]
    heights = {bars.get_label(): list(bars.datavalues) for bars in axes.containers}
    assert heights == {
        "rwkv7, 2 layers": [100],
        "transformer, 1 layer": [100],
        "transformer, 2 layers": pytest.approx([90, 80]),
    }
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))  # none hides another
    assert [round(x) for x, _ in spans] == [0, 0, 0, 1]
    assert axes.patches[1].get_hatch() != axes.patches[2].get_hatch()
    assert sorted(t.get_text() for t in axes.texts) == ["100.0", "100.0", "80.0", "90.0"]
