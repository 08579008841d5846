"""Zero-shot scores against plain softmaxes and figures worked out by hand."""

import bz2
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import zero_shot_files as files
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import CheckpointError, ConfigError, DataError
from metastate.eval import loss, zero_shot
from metastate.eval.zero_shot import evaluate_items, loglikelihoods, score_tokens, stderr
from metastate.eval.zero_shot_data import TASKS, Item, load_items
from tiny_models import tiny

BYTES = ByteTokenizer()
PAIRS = [
    ("The state", " reads."),
    ("", " It starts here."),
    ("A context that is a good deal longer than what follows it", " x"),
    ("é", " Ünïcödé"),
    ("Short", " and then a continuation that is longer than its context by far"),
    ("The state", " writes."),
]


@pytest.fixture
def data(tmp_path):
    return files.write(tmp_path / "data")


@pytest.fixture(params=["metastate", "rwkv7", "transformer"])
def model(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)  # so that the state is carried and rows leave
    monkeypatch.setattr(zero_shot, "LOGITS", 256 * 5)
    return tiny(std=0.3, architecture=request.param)


def log_softmax_of(model, ids):
    """Return log p of each token after the first of one sequence, and of the likeliest."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    return log_p[range(len(ids) - 1), ids[1:]], log_p.max(-1).values


def test_loglikelihoods_are_sums_of_log_softmax(model):
    found = loglikelihoods(model, BYTES, PAIRS, batch_size=2)
    for (context, continuation), (log_p, _) in zip(PAIRS, found, strict=True):
        ids = [0, *(context + continuation).encode()]
        each, _ = log_softmax_of(model, ids)
        expected = each[len(context.encode()) :].sum().item()
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert len(each) - len(context.encode()) == len(continuation.encode())


def test_a_text_begins_behind_the_end_of_document_whatever_its_id(model):
    each, _ = log_softmax_of(model, [5, 7, 8])
    assert score_tokens(model, [([7], [8])], 5)[0][0] == pytest.approx(float(each[1]), abs=1e-5)


def test_greedy_means_every_token_is_the_likeliest(model):
    ids = [0, 7]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    right, last_wrong, first_wrong = ids[2:], ids[2:], ids[2:]
    last_wrong = [*right[:-1], (right[-1] + 1) % 256]
    first_wrong = [(right[0] + 1) % 256, *right[1:]]
    pairs = [([7], right), ([7], last_wrong), ([7], first_wrong), ([7, right[0]], right[1:])]
    found = score_tokens(model, pairs, 0)
    assert [greedy for _, greedy in found] == [True, False, False, True]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("chunk", [3, 512])
def test_neither_batch_nor_chunk_nor_order_matters(model, monkeypatch, batch_size, chunk):
    alone = [loglikelihoods(model, BYTES, [pair])[0] for pair in PAIRS]
    monkeypatch.setattr(loss, "CHUNK", chunk)
    for order in (range(len(PAIRS)), reversed(range(len(PAIRS)))):
        order = list(order)
        found = loglikelihoods(model, BYTES, [PAIRS[i] for i in order], batch_size=batch_size)
        for i, (log_p, greedy) in zip(order, found, strict=True):
            assert log_p == pytest.approx(alone[i][0], abs=1e-4)
            assert greedy == alone[i][1]


def test_space_at_the_end_of_a_context_belongs_to_the_continuation(model):
    a, b, c = loglikelihoods(
        model, BYTES, [("The state ", "reads"), ("The state", " reads"), (" ", "x")]
    )
    assert a[0] == pytest.approx(b[0], abs=1e-4)
    assert c[0] == pytest.approx(loglikelihoods(model, BYTES, [("", " x")])[0][0], abs=1e-4)


def test_a_text_without_tokens_is_certain(model):
    """So rolling over an empty text gives 0."""
    assert score_tokens(model, [([5], []), ([], [])], 0) == [(0.0, True), (0.0, True)]


class Joining(ByteTokenizer):
    """Makes one token of a y and the exclamation mark behind it."""

    def encode_batch(self, texts):
        return super().encode_batch([text.replace("y!", "\x01") for text in texts])


@pytest.mark.parametrize("pair", [("They say", "!"), ("They", ""), ("", "")])
def test_a_continuation_without_a_token_of_its_own_is_named(model, pair):
    pairs = [("They say", " no"), pair]
    with pytest.raises(DataError, match=f"{pair[1]!r} of {pair[0]!r} has no token of its own"):
        loglikelihoods(model, Joining(), pairs)
    item = Item((("They say", " no"), pair), 0)
    with pytest.raises(DataError, match="no token"):
        evaluate_items(model, Joining(), "piqa", [item])


def test_progress_counts_every_token_and_the_mode_stays(model):
    model.train()
    seen = []
    loglikelihoods(model, BYTES, PAIRS, batch_size=2, progress=lambda *now: seen.append(now))
    total = sum(len((a + b).encode()) for a, b in PAIRS)
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) > 3
    assert model.training


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(ConfigError, match="batch_size is 0"):
        loglikelihoods(model, BYTES, PAIRS, batch_size=0)
    large = SimpleNamespace(num_ids=300, name="large")
    with pytest.raises(ConfigError, match="300 ids"):
        loglikelihoods(model, large, PAIRS)
    with torch.no_grad():
        model.head.weight[3] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        loglikelihoods(model, BYTES, PAIRS)


def test_every_task_is_read_as_it_should(data):
    """Contexts, continuations and right answers, spelled out."""
    lambada = load_items("lambada", data)
    assert [item.pairs[0] for item in lambada] == [
        (files.LAMBADA[0][:-4], " cat"),
        (files.LAMBADA[1][:-7], " “word”"),
        (files.LAMBADA[2][:-5], " häve"),
    ]
    for item, (_, label, _), (context, ends) in zip(
        load_items("hellaswag", data), files.HELLASWAG, files.HELLASWAG_ASKED, strict=True
    ):
        assert item == Item(tuple((context, " " + end) for end in ends), label)
    for name, (rows, contexts) in files.CHOICES.items():
        items = load_items({"openbook_qa": "openbookqa"}.get(name, name), data)
        for item, (_, choices, gold), context in zip(items, rows, contexts, strict=True):
            assert item == Item(tuple((context, " " + c) for c in choices), gold)
    for item, (options, end, gold) in zip(
        load_items("winogrande", data), files.WINOGRANDE, strict=True
    ):
        assert item == Item(tuple((option, " " + end) for option in options), gold)
    pairs = [(name, pair) for name, own in files.BLIMP.items() for pair in own]
    for item, (name, (good, bad)) in zip(load_items("blimp", data), pairs, strict=True):
        assert item == Item((("", " " + good), ("", " " + bad)), 0, name)


@pytest.mark.parametrize(
    ("ctx_a", "ctx_b"),
    [
        ("A man sits. He stands up.", "the man"),
        ("A woman shouts!", "a dog in a 4 x 4, then she"),
        ("A logo appears.", '" knife sharpening'),
        ("1 a guy plays. 2 a guy talks.", "3 the guy"),
        (".", "an intro"),
        ("Choose soft pencils. They last longer.", ""),
        ("A single sentence without an end", ""),
    ],
)
def test_hellaswag_s_sentence_begins_as_in_lm_eval(ctx_a, ctx_b, data):
    """The file holds ctx, which is `f"{ctx_a} {ctx_b}"`; lm-eval capitalises ctx_b."""
    lines = [f"Activity: {ctx_a} {ctx_b}".rstrip(), "0", "a", "b", "c", "d"]
    (data / TASKS["hellaswag"].file).write_bytes(bz2.compress("\n".join(lines).encode()))
    (item,) = load_items("hellaswag", data)
    assert item.pairs[0][0] == ("Activity: " + ctx_a + " " + ctx_b.capitalize()).strip()


class Oracle(nn.Module):
    """Knows some texts: behind a prefix of one, its next token is nearly certain."""

    def __init__(self, texts):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=256)
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.next = {}
        for text in texts:
            ids = [0, *text.encode()]
            self.next |= {tuple(ids[:i]): ids[i] for i in range(1, len(ids))}
        self.head = nn.Identity()

    def features(self, tokens, state):
        rows = state.rows if state else [()] * len(tokens)
        logits, seen = torch.zeros(*tokens.shape, 256), []
        for b, row in enumerate(rows):
            for t, token in enumerate(tokens[b].tolist()):
                row = (*row, token)
                if row in self.next:
                    logits[b, t, self.next[row]] = self.scale
            seen.append(row)
        return logits, Rows(seen), None


class Rows:
    """The state of an Oracle: what each row has read."""

    def __init__(self, rows):
        self.rows, self.batch_size = rows, len(rows)

    def __getitem__(self, part):
        return Rows(self.rows[part])


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_the_answers_gets_all_of_them(task, data):
    items = load_items(task, data)
    oracle = Oracle([c + k for item in items for c, k in [item.pairs[item.gold]]])
    result = evaluate_items(oracle, BYTES, task, items)
    assert result.num_items == len(items)
    assert tuple(result.metrics) == TASKS[task].metrics
    for name, metric in result.metrics.items():
        assert metric.value == (pytest.approx(1, abs=1e-4) if name == "perplexity" else 1.0)
    # One that knows a wrong answer instead gets none; guessing is between the two.
    wrong = [c + k for item in items for c, k in [item.pairs[item.gold - 1]]]
    if task == "lambada":
        wrong = [text + "?" for text, _ in (item.pairs[0] for item in items)]
    for name, metric in evaluate_items(Oracle(wrong), BYTES, task, items).metrics.items():
        if name == "perplexity":
            assert metric.value > 1e5
        else:
            assert metric.value == 0.0 < metric.chance < 1.0


def given(monkeypatch, scores):
    """Let these be the scores, whatever the model."""
    monkeypatch.setattr(zero_shot, "score_tokens", lambda *_, **__: scores)
    return SimpleNamespace(config=SimpleNamespace(vocab_size=256))


def test_accuracy_and_its_length_normalised_kind(monkeypatch):
    choices = ((" ab", " abcd"), (" abcdef", " ab", " a"), (" a", " b"))
    items = [
        Item(tuple(("c", k) for k in own), gold)
        for own, gold in zip(choices, (1, 0, 0), strict=True)
    ]
    # An item a row: its log p, then log p a character (the space does not count).
    #   -3 -4      | -1.5 -1.0           acc takes the first (wrong), acc_norm the second (right)
    #   -6 -3 -2   | -1 -1.5 -2          acc takes the third (wrong), acc_norm the first (right)
    #   -1 -1      | -1 -1               both alternatives alike: half a point
    scores = [(p, False) for p in (-3.0, -4.0, -6.0, -3.0, -2.0, -1.0, -1.0)]
    result = evaluate_items(given(monkeypatch, scores), BYTES, "piqa", items)
    acc, norm = result.metrics["acc"], result.metrics["acc_norm"]
    assert acc.value == pytest.approx(1 / 6)
    assert norm.value == pytest.approx(2.5 / 3)
    # deviations (-1/6, -1/6, 1/3): squares 1/36 + 1/36 + 4/36, over 2, over 3, rooted
    assert [acc.stderr, norm.stderr] == pytest.approx([math.sqrt(6 / 36 / 2 / 3)] * 2)
    assert acc.chance == norm.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_the_space_before_a_choice_is_no_character_of_it(monkeypatch):
    items = [Item((("c", " a"), ("c", " bb")), 1)]
    # -1 and -0.95 a character; with the space it would be -0.5 and -0.63
    found = evaluate_items(given(monkeypatch, [(-1.0, False), (-1.9, False)]), BYTES, "piqa", items)
    assert found.metrics["acc_norm"].value == 1.0


def test_lambada_by_hand(monkeypatch):
    items = [Item((("a b", " c"),)), Item((("a b", " cde"),))]
    scores = [(-1.0, True), (-3.0, False)]
    result = evaluate_items(given(monkeypatch, scores), BYTES, "lambada", items)
    acc, perplexity = result.metrics["acc"], result.metrics["perplexity"]
    assert (acc.value, acc.stderr) == (0.5, pytest.approx(0.5))
    assert perplexity.value == pytest.approx(math.exp(2))
    assert perplexity.stderr == pytest.approx(math.exp(2) * 1.0)
    # words of two and four bytes, each byte one of 256
    assert acc.chance == pytest.approx((256**-2 + 256**-4) / 2)
    assert perplexity.chance == pytest.approx(256**3)


def test_paradigms_count_alike(monkeypatch):
    pair = (("", " good"), ("", " bad"))
    items = [Item(pair, 0, "a")] * 2 + [Item(pair, 0, "b")] * 4
    won, lost = [(-1.0, False), (-2.0, False)], [(-2.0, False), (-1.0, False)]
    scores = won + lost + won + won + won + lost
    result = evaluate_items(given(monkeypatch, scores), BYTES, "blimp", items)
    assert result.groups == {"a": 0.5, "b": 0.75}
    assert result.metrics["acc"].value == pytest.approx(4 / 6)
    mean = result.metrics["acc_paradigms"]
    assert mean.value == pytest.approx(0.625)
    # standard errors 1/2 of a, 1/4 of b
    assert mean.stderr == pytest.approx(math.sqrt(1 / 4 + 1 / 16) / 2)
    assert mean.chance == result.metrics["acc"].chance == 0.5
    assert result.to_json()["paradigms"] == {"a": 0.5, "b": 0.75}


def test_the_standard_error_is_the_spread_of_means():
    values = (np.random.default_rng(0).random(400) < 0.3).astype(float)
    assert stderr(values) == pytest.approx(math.sqrt(values.var() / 399))
    assert stderr([0.5]) is None
    alone = evaluate_items(Oracle(["a b"]), BYTES, "lambada", [Item((("a", " b"),))])
    assert alone.to_json()["metrics"]["acc"]["stderr"] is None


def test_guessing_is_what_a_model_without_knowledge_reaches(data):
    """Every token equally likely: exactly the perplexity that counts as chance, ties elsewhere."""
    oracle = Oracle([])
    perplexity = evaluate_items(oracle, BYTES, "lambada", load_items("lambada", data)).metrics[
        "perplexity"
    ]
    assert perplexity.value == pytest.approx(perplexity.chance, rel=1e-4)
    acc = evaluate_items(oracle, BYTES, "winogrande", load_items("winogrande", data)).metrics["acc"]
    assert acc.value == acc.chance == 0.5


def test_a_limit_takes_the_same_items_every_time(data):
    rows = [{"text": f"this is the number {i}"} for i in range(50)]
    files.write_lines(data / "lambada" / "lambada_test.jsonl", rows)
    ten, twenty = (load_items("lambada", data, n) for n in (10, 20))
    assert ten == load_items("lambada", data, 10) and twenty[:10] == ten
    assert len({item.pairs for item in twenty}) == 20
    every = load_items("lambada", data)
    assert ten != every[:10] and set(ten) < set(every)
    assert len(load_items("lambada", data, 99)) == 50
    assert [item.group for item in load_items("blimp", data, 1)] == ["agreement", "binding_1"]
    with pytest.raises(ConfigError, match="limit is 0"):
        load_items("lambada", data, 0)


def test_unknown_tasks_get_the_nearest_name(data):
    with pytest.raises(ConfigError, match="'helaswag'; did you mean 'hellaswag'"):
        load_items("helaswag", data)


@pytest.mark.parametrize("task", TASKS)
def test_missing_and_empty_files_are_named(task, data):
    path = data / TASKS[task].file
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        load_items(task, data)
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_items(task, data)
    path.rmdir()
    path.write_bytes(b"")
    with pytest.raises(DataError, match=path.name):
        load_items(task, data)


@pytest.mark.parametrize("task", TASKS)
def test_files_that_were_cut_off_are_refused(task, data):
    path = data / TASKS[task].file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=path.name):
        load_items(task, data)


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("lambada", '{"txt": "a b"}', "line 2: `text` must be text"),
        ("lambada", '{"text": "alone"}', "a last one after a space"),
        ("lambada", '{"text": "  word"}', "needs words, and a last one"),
        ("lambada", "[1]", "line 2 is no JSON object"),
        ("piqa", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "`gold` must be 0 to 1"),
        ("piqa", '{"query": "q", "choices": ["a", "b"], "gold": true}', "`gold` must be 0 to 1"),
        ("piqa", '{"query": "q", "choices": ["a", " "], "gold": 0}', "two or more texts"),
        ("piqa", '{"query": "q", "choices": ["a"], "gold": 0}', "two or more texts"),
        ("piqa", '{"query": 5, "choices": ["a", "b"], "gold": 0}', "`query` must be text"),
        ("winogrande", '{"context_options": ["a", "b"], "gold": 0}', "`continuation` must be"),
        ("winogrande", '{"continuation": "a", "gold": 0}', "two or more texts"),
        ("copa", "\udcff", "not UTF-8"),
    ],
)
def test_damaged_lines_are_pointed_at(task, line, words, data):
    path = data / TASKS[task].file
    first = path.read_bytes().split(b"\n")[0]
    path.write_bytes(first + b"\n" + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=words) as error:
        load_items(task, data)
    assert str(path) in str(error.value)


def test_damaged_hellaswag(data):
    path = data / TASKS["hellaswag"].file
    path.write_bytes(bz2.compress(b"context\n7\na\nb\nc\nd\n"))
    with pytest.raises(DataError, match="item 0: the label is '7'"):
        load_items("hellaswag", data)
    path.write_bytes(bz2.compress(b"context\n1\na\nb\nc\n"))
    with pytest.raises(DataError, match="5 lines"):
        load_items("hellaswag", data)
    item = "context\n1\na\nb\nc\nd\n"  # a whole one before one of three endings
    path.write_bytes(bz2.compress((item + item.removesuffix("d\n")).encode()))
    with pytest.raises(DataError, match="11 lines"):
        load_items("hellaswag", data)
