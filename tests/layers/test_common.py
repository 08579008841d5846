"""Packing of documents, and the small tools that all layers share."""

import pytest
import torch

from metastate.layers.common import (
    GroupNorm,
    LowRank,
    Packing,
    last_of_rows,
    linear,
    low_rank_size,
    segment_norm,
    token_shift,
)
from tolerance import relative_error


def packing():
    resets = torch.zeros(3, 4, dtype=torch.bool)
    resets[0, 0] = resets[0, 2] = resets[2, 3] = True
    return Packing.from_resets(resets)


def test_offsets_of_documents():
    p = packing()  # rows: two documents; one carried on; one carried on and a new one
    assert p.cu_seqlens.tolist() == [0, 2, 4, 8, 11, 12]
    assert p.first.tolist() == [0, 2, 3]
    assert p.last.tolist() == [1, 2, 4]


def test_a_row_keeps_its_state_until_a_document_starts():
    state, fresh = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([7.0])
    assert packing().initial(state, fresh).flatten().tolist() == [7, 7, 2, 3, 7]
    assert last_of_rows(torch.arange(5), packing()).tolist() == [1, 2, 4]


def test_gradients_reach_the_carried_and_the_fresh_state():
    state = torch.ones(3, 1, requires_grad=True)
    fresh = torch.ones(1, requires_grad=True)
    packing().initial(state, fresh).sum().backward()
    assert state.grad.flatten().tolist() == [0, 1, 1]  # row 0 starts a document
    assert fresh.grad.item() == 3


def test_token_shift_mixes_with_the_token_before():
    x = torch.tensor([[1.0, 2, 4, 8]] * 3).unsqueeze(-1)
    last, mu = torch.tensor([[16.0]] * 3), torch.tensor([[1.0], [0.5], [0.0]])
    before, half, own = token_shift(x, last, mu, packing(), "chunked")
    assert before.squeeze(-1).tolist() == [[0, 1, 0, 4], [16, 1, 2, 4], [16, 1, 2, 0]]
    assert torch.equal(own, x)
    assert torch.equal(half, (x + before) / 2)


@pytest.mark.parametrize("segments", [(6,), (4, 2), (3, 2, 1)])
def test_norms_act_on_each_segment_alone(segments):
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64)
    for kind, scale in (("l2", lambda n: 1.0), ("rms", lambda n: n**0.5)):
        y = segment_norm(x, kind, segments)
        for part, size in zip(y.split(segments, -1), segments, strict=True):
            torch.testing.assert_close(
                part.norm(dim=-1), torch.full((2, 3, 2), scale(size)).double()
            )
        torch.testing.assert_close(segment_norm(1e-9 * x, kind, segments), y)
    assert segment_norm(x, "none", segments) is x
    norm = GroupNorm(2, segments).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    y = (norm(x) - norm.bias) / norm.weight
    for old, new in zip(x.split(segments, -1), y.view_as(x).split(segments, -1), strict=True):
        centred = old - old.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 64e-5).sqrt()
        assert (new - expected).abs().max() < 1e-12
    changed = x.clone()
    changed[..., segments[0] :] += 1
    kept = norm(changed).view_as(x)[..., : segments[0]]
    assert relative_error(kept, norm(x).view_as(x)[..., : segments[0]]) < 1e-12


def test_norms_of_zeros_are_zero():
    zeros = torch.zeros(1, 1, 1, 4, requires_grad=True)
    y = segment_norm(zeros, "l2", (4,))
    y.sum().backward()
    assert not y.any()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize(
    ("given", "factor", "size", "head_size", "rank"),
    [
        (None, 2.5, 768, 64, 64),  # 69.3
        (None, 1.7, 768, 64, 32),  # 47.1
        (None, 5.0, 768, 64, 128),  # 138.6
        (None, 2.5, 768, 128, 128),  # 138.6
        (None, 1.7, 16, 8, 32),  # at least 32
        (7, 2.5, 768, 64, 7),
    ],
)
def test_ranks(given, factor, size, head_size, rank):
    assert low_rank_size(given, factor, size, head_size) == rank


def test_initial_maps():
    assert not linear(4, 6, 0.0).weight.any()
    weight = linear(4, 6, 0.5).weight
    torch.testing.assert_close(weight.T @ weight, 0.25 * torch.eye(4))
    assert linear(4, 6, 1.0).bias is None
    low_rank = LowRank(4, 2, 6)
    assert not low_rank(torch.randn(3, 4)).any()
    with torch.device("meta"):
        assert linear(4, 6, 1.0).weight.is_meta
