"""Held-out loss against a plain loop over documents."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_files import write_dataset
from metastate.data.indexed import IndexedDataset
from metastate.data.loader import Split, permute
from metastate.errors import ConfigError, DataError
from metastate.eval import loss
from metastate.eval.loss import evaluate
from ranks import run_ranks
from tiny_models import tiny

LENGTHS = [1, 7, 40, 3, 25, 40, 12]
DOMAINS = [0, 1, 1, 0, 2, 2, 0]


@pytest.fixture
def split(tmp_path):
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(1, 50, n - 1), 0) for n in LENGTHS]
    write_dataset(tmp_path / "valid", documents, 50)
    return split_in(tmp_path)


def split_in(folder):
    dataset = IndexedDataset(folder / "valid", np.array(DOMAINS))
    text_bytes = np.array(LENGTHS) * 3
    return Split("valid", dataset, ["code", "prose", "web", "unused"], text_bytes, 0, 50)


@pytest.fixture(params=["metastate", "transformer"])
def model(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)  # so that the state is carried and rows leave
    monkeypatch.setattr(loss, "LOGITS", 50 * 5)
    return model_of(request.param)


def model_of(architecture):
    return tiny(std=0.3, architecture=architecture, vocab_size=50)


def token_losses(model, split, context=None):
    """Losses of every document's tokens, one document at a time."""
    out = []
    for document in split.documents():
        text = [0, *document.tokens.tolist()]
        nll, window = [], context or len(text)
        for i in range(0, len(text) - 1, window):
            part = torch.tensor([text[i : i + window + 1]])
            with torch.no_grad():
                logits, _ = model(part[:, :-1])
            nll.append(F.cross_entropy(logits[0], part[0, 1:], reduction="none"))
        out.append(torch.cat(nll).double().numpy())
    return out


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("context", [None, 5])
def test_equals_a_loop_over_documents(model, split, context, batch_size):
    expected = token_losses(model, split, context)
    result = evaluate(
        model,
        split,
        context=context,
        mode="windowed" if context else "stateful",
        by_domain=True,
        by_position=True,
        batch_size=batch_size,
    )
    total = sum(map(np.sum, expected))
    assert result.total.tokens == sum(LENGTHS) and result.total.documents == 7
    assert result.nats_per_token == pytest.approx(total / sum(LENGTHS), rel=1e-5)
    out = result.to_json()
    assert out["bits_per_byte"] == pytest.approx(total / math.log(2) / (3 * sum(LENGTHS)), rel=1e-5)
    assert out["perplexity"] == pytest.approx(math.exp(out["nats_per_token"]))
    assert list(out["domains"]) == ["code", "prose", "web"]
    for i, name in enumerate(out["domains"]):
        mine = np.concatenate([e for e, d in zip(expected, DOMAINS, strict=True) if d == i])
        assert out["domains"][name]["tokens"] == len(mine)
        assert out["domains"][name]["nats_per_token"] == pytest.approx(mine.mean(), rel=1e-5)
    seen = [np.arange(len(e)) % (context or 99) for e in expected]
    seen, flat = np.concatenate(seen), np.concatenate(expected)
    assert sum(p["tokens"] for p in out["positions"]) == sum(LENGTHS)
    for p in out["positions"]:
        inside = (seen >= p["first"]) & (seen <= p["last"])
        assert p["tokens"] == inside.sum()
        assert p["nats_per_token"] == pytest.approx(flat[inside].mean(), rel=1e-5)


def test_context_matters(model, split):
    stateful = evaluate(model, split).nats_per_token
    windowed = evaluate(model, split, context=2, mode="windowed").nats_per_token
    assert abs(stateful - windowed) > 1e-4


@pytest.mark.parametrize("limit", [1, 30, 60, 10_000])
def test_limit(model, split, limit):
    result = evaluate(model, split, limit_tokens=limit)
    assert result.total.tokens == min(limit, sum(LENGTHS))
    assert result.total.bytes == 3 * result.total.tokens


def scored_by_domain(lengths, domains, limit):
    scored, _ = loss._pieces(np.array(lengths), np.array(domains), limit, None)
    assert (scored <= lengths).all()
    return np.bincount(domains, scored).tolist()


def test_a_limit_is_shared_by_the_domains_in_proportion_to_their_tokens():
    """Few long books, many short questions, one line of a third: each gets its share."""
    lengths = [5000] * 3 + [10] * 500 + [40]
    domains = [0] * 3 + [1] * 500 + [2]
    # 1000 x (15000, 5000, 40) / 20040 = 748.50, 249.50, 1.996; the 0.996 and the first half
    assert scored_by_domain(lengths, domains, 1000) == [749, 249, 2]
    assert scored_by_domain(lengths, domains, 10) == [6, 3, 1]  # 7.49, 2.50, 0.02, and one for it
    assert scored_by_domain(lengths, domains, 2) == [1, 1, 0]
    assert scored_by_domain(lengths, domains, 20039) == [14999, 5000, 40]
    assert scored_by_domain([9, 9], [0, 2], 4) == [2, 0, 2]  # a domain without text


@pytest.mark.parametrize("limit", [1, 700, 40_000])
def test_of_one_domain_documents_come_in_the_fixed_shuffled_order(limit):
    """The order and the cut, written out: what data of one domain was scored on stays the same."""
    lengths = np.random.default_rng(0).integers(1, 4000, 40)
    expected, left = np.zeros_like(lengths), limit
    most = max(1024, limit // 16)
    while np.minimum(lengths, most).sum() < limit:
        most *= 2
    for i in permute(np.arange(40), 40, key=0):
        expected[i] = min(left, lengths[i], most)
        left -= expected[i]
    scored, _ = loss._pieces(lengths, np.zeros(40, np.int64), limit, None)
    assert scored.tolist() == expected.tolist() and scored.sum() == limit


def test_a_long_document_does_not_use_up_the_limit(model, split, monkeypatch):
    monkeypatch.setattr(loss, "CUT", 4)
    split.dataset.domains = np.zeros(7, np.int64)
    result = evaluate(model, split, limit_tokens=24, by_position=True)
    assert result.total.tokens == 24
    assert result.total.documents == 7  # 1 + 3 + 5 x 4
    assert max(p["last"] for p in result.positions) <= 6
    assert evaluate(model, split, limit_tokens=100).total.tokens == 100


def test_progress_and_training_mode(model, split):
    calls = []
    model.train()
    evaluate(model, split, progress=lambda done, total: calls.append((done, total)))
    assert model.training
    assert calls[-1] == (sum(LENGTHS), sum(LENGTHS))
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})


# Settings, and the forwards of up to 8 tokens that one process makes, and each of three.
DIVIDED = [
    ({}, 5, 5),  # the longest text is whole, and its forwards follow each other
    ({"limit_tokens": 2}, 1, 1),  # one process has no text
    ({"mode": "windowed", "context": 5, "batch_size": 3}, 9, 4),
    ({"batch_size": 1, "start": True}, 18, 8),
]


def scores_alone_and_divided(rank, folder, architecture):
    """Return the scores of DIVIDED, by one process and by all, with the forwards they took."""
    torch.set_num_threads(1)
    loss.CHUNK = 8
    model, split, found, forwards = model_of(architecture).double(), split_in(folder), [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    for settings, _, _ in DIVIDED:
        start = None
        if settings.get("start") and model.recurrent:
            start = model.init_state(1).map(lambda x: x + 0.1)
        for group in (None, dist.group.WORLD):
            asked = settings | {"start": start, "group": group}
            result = evaluate(model, split, by_domain=True, by_position=True, **asked)
            found.append((result.to_json(), len(forwards)))
            forwards.clear()
    return found


def flat(tree):
    """Return the numbers and names in nested lists and dicts, in order."""
    if isinstance(tree, dict):
        tree = [x for pair in tree.items() for x in pair]
    return [x for part in tree for x in flat(part)] if isinstance(tree, list) else [tree]


@pytest.mark.dist
@pytest.mark.parametrize("architecture", ["metastate", "transformer"])
def test_processes_divide_the_text_and_all_have_the_whole_result(split, tmp_path, architecture):
    found = run_ranks(scores_alone_and_divided, 3, tmp_path, architecture)
    assert found[0] == found[1] == found[2]  # the very numbers, and as many forwards
    assert [n for _, n in found[0]] == [n for _, *both in DIVIDED for n in both]
    for (alone, _), (divided, _) in zip(found[0][::2], found[0][1::2], strict=True):
        assert flat(divided) == [
            pytest.approx(x, rel=1e-12) if isinstance(x, float) else x for x in flat(alone)
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "windowed"}, "length of its windows"),
        ({"context": 8}, "length of its windows"),
        ({"mode": "windowed", "context": 0}, "context is 0"),
        ({"limit_tokens": 0}, "limit_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_out_of_range(model, split, settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, split, **settings)


def test_losses_of_a_bfloat16_model_are_not_rounded(model):
    model.bfloat16()
    x, targets = torch.randn(7, 16).bfloat16(), torch.arange(7)
    found = loss.token_losses(model, x, targets)
    expected = F.cross_entropy(model.head(x).float(), targets, reduction="none")
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_another_vocabulary_is_refused(model, split):
    split.num_ids = 51
    with pytest.raises(DataError, match="51"):
        evaluate(model, split)
