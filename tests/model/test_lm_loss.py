"""The chunked loss against plain F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from metastate.config import ModelConfig
from metastate.errors import ShapeError, TrainingError
from metastate.model import loss as loss_module
from metastate.model.lm import LanguageModel
from metastate.model.loss import linear_cross_entropy, lm_loss
from tolerance import TOLERANCE, relative_error


def plain(x, weight, targets, z_loss):
    logits = x @ weight.T
    z = z_loss * torch.logsumexp(logits, -1).square().mean()
    nll = F.cross_entropy(logits, targets)
    return nll + z, nll


@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_equals_plain_cross_entropy_with_gradients(monkeypatch, n, z_loss, rows):
    monkeypatch.setattr(loss_module, "LOGITS", rows * 37)
    x = (3 * torch.randn(n, 11, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(37, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 37, (n,))
    expected, expected_nll = plain(x, weight, targets, z_loss)
    grads = torch.autograd.grad(3 * expected, (x, weight))
    loss, nll = linear_cross_entropy(x, weight, targets, z_loss)
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(nll, expected_nll) < 1e-12
    assert not nll.requires_grad
    for mine, theirs in zip(torch.autograd.grad(3 * loss, (x, weight)), grads, strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_only_the_gradients_that_are_needed():
    x, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 0])
    loss, _ = linear_cross_entropy(x, weight, targets)
    loss.backward()
    (expected,) = torch.autograd.grad(plain(x, weight, targets, 0.0)[0], weight)
    assert relative_error(weight.grad, expected) < 1e-5
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets)[0].requires_grad


def test_large_logits_do_not_overflow():
    x, weight = torch.full((2, 1), 300.0, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss, _ = linear_cross_entropy(x, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 300.0
    assert torch.isfinite(x.grad).all()


def test_autocast_keeps_the_loss_in_float32():
    x = torch.randn(64, 32, requires_grad=True)
    weight = (0.1 * torch.randn(500, 32)).requires_grad_()
    targets = torch.randint(0, 500, (64,))
    expected, _ = plain(x, weight, targets, 1e-2)
    grads = torch.autograd.grad(expected, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll = linear_cross_entropy(x, weight, targets, 1e-2)
    loss.backward()
    assert loss.dtype == nll.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 1e-3 * expected.item()  # bf16 alone: 4e-3
    assert relative_error(x.grad, grads[0]) < 2e-2
    assert relative_error(weight.grad, grads[1]) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_rest(monkeypatch, dtype):
    """Weights and features stored so, without autocast, in chunks that do not divide the rows."""
    monkeypatch.setattr(loss_module, "LOGITS", 90 * 256)
    x, weight = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (600, 90))
    targets = torch.randint(0, 90, (600,))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected, expected_nll = plain(*exact, targets, 1e-2)
    expected.backward()
    loss, nll = linear_cross_entropy(x, weight, targets, 1e-2)
    (2.0**10 * loss).backward()
    assert loss.dtype == nll.dtype == torch.float32
    assert relative_error(loss, expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(nll, expected_nll) < TOLERANCE[torch.bfloat16]
    for mine, theirs in zip((x, weight), exact, strict=True):
        assert relative_error(mine.grad.double() / 2**10, theirs.grad) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_float16_gradients_are_those_of_float32(dtype):
    """Also where a word is no target: softmax / n alone is far below what float16 holds."""
    n, size = 2048, 20_000
    x = (0.05 * torch.randn(n, 8)).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(size, 8)).to(dtype).requires_grad_()
    targets = torch.randint(0, 100, (n,))
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_cross_entropy(x, weight, targets)
    (2.0**14 * loss).backward()
    exact = [t.detach().float().requires_grad_() for t in (x, weight)]
    linear_cross_entropy(*exact, targets)[0].backward()
    found, expected = weight.grad.float() / 2**14, exact[1].grad
    assert relative_error(x.grad.float() / 2**14, exact[0].grad) < 1e-2
    assert relative_error(found[:100], expected[:100]) < 1e-2
    assert relative_error(found[100:], expected[100:]) < 2e-2


def test_float16_does_not_overflow_where_one_target_fills_the_batch():
    x = torch.full((4096, 2), 30.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64))[0].backward()
    expected = torch.tensor([-20.0, 10.0, 10.0])[:, None].expand(3, 2)
    assert relative_error(weight.grad.float(), expected) < 2e-3


def test_what_cannot_be_differentiated_again_says_so():
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    loss, _ = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 3, 0]))
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError, match="differentiated already.*compute it again"):
        loss.backward()
    loss, _ = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 3, 0]))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def tiny(**changes):
    config = ModelConfig(vocab_size=19, hidden_size=8, num_layers=2, num_heads=2, **changes)
    model = LanguageModel(config).double()
    model.backend = "reference"
    return model


def test_ignored_targets_do_not_count():
    model = tiny()
    tokens = torch.randint(0, 19, (2, 6))
    targets = torch.randint(0, 19, (2, 6))
    targets[0, :3] = targets[1, 5] = -100
    logits, _ = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    out = lm_loss(model, tokens, targets)
    assert out.num_tokens == 8
    assert relative_error(out.nll, expected) < 1e-12
    assert relative_error(out.loss, expected) < 1e-12
    gradient = torch.autograd.grad(expected, model.parameters(), allow_unused=True)
    out.loss.backward()
    for (name, p), g in zip(model.named_parameters(), gradient, strict=True):
        if g is not None and g.abs().max() > 1e-8:
            assert relative_error(p.grad, g) < 1e-9, name


def test_nothing_to_score_is_zero_with_zero_gradients():
    model = tiny()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    out = lm_loss(model, tokens, torch.full_like(tokens, -100))
    out.loss.backward()
    assert out.num_tokens == 0
    assert out.loss.item() == out.nll.item() == 0
    assert not model.head.weight.grad.any()


def test_the_state_continues_the_sequence():
    model = tiny()
    tokens, targets = torch.randint(0, 19, (2, 2, 9))
    whole = lm_loss(model, tokens, targets)
    first = lm_loss(model, tokens[:, :3], targets[:, :3])
    rest = lm_loss(model, tokens[:, 3:], targets[:, 3:], first.state)
    assert relative_error((first.nll * 3 + rest.nll * 6) / 9, whole.nll) < 1e-12


def test_the_models_own_term_is_added():
    from metastate.config import MetaStateConfig

    model = tiny(meta_state=MetaStateConfig(encoder="cross", latent_size=2, variational=True))
    tokens = torch.randint(0, 19, (1, 5))
    torch.manual_seed(1)
    out = lm_loss(model, tokens, tokens)
    torch.manual_seed(1)
    _, _, kl = model.features(tokens)
    assert relative_error(out.loss - out.nll, kl) < 1e-9


@pytest.mark.parametrize("bad", [19, -1, -99])
def test_targets_outside_the_vocabulary_are_refused(bad):
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="0..18"):
        lm_loss(tiny(), tokens, torch.full_like(tokens, bad))
    with pytest.raises(ShapeError, match="targets must be int64"):
        lm_loss(tiny(), tokens, tokens[:, :2])
