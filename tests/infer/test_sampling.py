import pytest
import torch

from metastate.errors import ConfigError
from metastate.infer.sampling import Sampler, SamplingConfig

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.0, 9.0])  # id 5 is padding in most tests


def draw(n=400, num_tokens=5, logits=LOGITS, **settings):
    sampler = Sampler(SamplingConfig(**{"seed": 0} | settings), num_tokens)
    return [sampler.sample(logits) for _ in range(n)]


def test_greedy_and_tiny_temperature_take_the_best_real_token():
    assert set(draw(temperature=0)) == {1}
    assert set(draw(temperature=1e-30)) == {1}


def test_padding_ids_are_never_drawn():
    assert set(draw(2000, temperature=100.0)) == {0, 1, 2, 3, 4}
    assert 5 in draw(num_tokens=6)


def test_frequencies_follow_the_softmax():
    counts = torch.bincount(torch.tensor(draw(4000, temperature=2.0)), minlength=5) / 4000
    torch.testing.assert_close(counts, (LOGITS[:5] / 2).softmax(0), rtol=0, atol=0.03)


def test_top_k():
    assert set(draw(temperature=10.0, top_k=2)) == {1, 3}
    assert set(draw(temperature=10.0, top_k=50)) == {0, 1, 2, 3, 4}
    assert len(set(draw(top_k=3, logits=torch.zeros(6)))) == 3
    for k in range(1, 6):
        probabilities = Sampler(SamplingConfig(top_k=k), 5).probabilities(LOGITS)
        assert probabilities.count_nonzero() == k


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    p = LOGITS[:5].softmax(0)
    both = float(p[1] + p[3])
    assert set(draw(top_p=float(p[1]) - 0.01)) == {1}
    assert set(draw(1000, top_p=float(p[1]) + 0.01)) == {1, 3}
    assert set(draw(4000, top_p=both + 0.01)) == {1, 3, 4}
    for p, kept in ((0.25, 1), (0.5, 2), (0.75, 3)):  # exactly reached, it is enough
        even = Sampler(SamplingConfig(top_p=p), 4).probabilities(torch.zeros(4))
        assert even.count_nonzero() == kept
    sampler = Sampler(SamplingConfig(top_p=0.5), 5)
    assert float(sampler.probabilities(LOGITS).sum()) == pytest.approx(1)


def test_repetition_penalty_pushes_both_signs_down():
    sampler = Sampler(SamplingConfig(repetition_penalty=4.0, repetition_window=2), 5)
    sampler.observe([4, 1, 2])  # 4 has left the window of two
    logits = LOGITS[:5].clone()
    logits[1] /= 4
    logits[2] *= 4
    torch.testing.assert_close(sampler.probabilities(LOGITS), logits.softmax(0))
    assert draw(3, temperature=0, repetition_penalty=4.0) == [1, 3, 4]
    assert LOGITS[1] == 3.0  # the caller's tensor is untouched
    sampler.observe([5, 2])  # padding, which a prompt given as ids may hold
    logits[1] *= 4
    torch.testing.assert_close(sampler.probabilities(LOGITS), logits.softmax(0))


def test_window_zero_means_every_token():
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0, repetition_window=0), 5)
    sampler.observe(range(1000))
    assert len(sampler.recent) == 1000


def test_seed():
    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    assert draw(seed=0) == draw(seed=0)
    free = Sampler(SamplingConfig(), 5)
    again = Sampler(SamplingConfig(seed=free.seed), 5)
    assert [free.sample(LOGITS) for _ in range(50)] == [again.sample(LOGITS) for _ in range(50)]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-30, 1.0, 1e6])
@pytest.mark.parametrize("penalty", [1.0, 1e6])
@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_ends_of_the_ranges_can_be_drawn_with(temperature, penalty, seed):
    settings = {"temperature": temperature, "repetition_penalty": penalty, "seed": seed}
    logits = torch.tensor([0.0, -1e30, 1e30, -3.0, 3.0])
    for window in (0, 2**31 - 1):
        found = draw(20, logits=logits, repetition_window=window, top_k=2**70, **settings)
        assert set(found) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 10**400},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.5},
        {"repetition_penalty": float("inf")},
        {"repetition_window": -1},
        {"repetition_window": 2**63},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingConfig(**bad)
