"""The training loss: cross-entropy of the next token, computed without holding all the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from metastate.errors import ShapeError, TrainingError
from metastate.layers.common import is_plain
from metastate.ops.links import differentiable_once

if TYPE_CHECKING:
    from metastate.model.lm import LanguageModel
    from metastate.model.state import ModelState

IGNORE = -100  # target of a token that is not scored
LOGITS = 2**25  # logits of one chunk: 128 MiB in float32
FLOAT16_ROWS = 512  # of a chunk in float16, which holds their sum where features are below 128


@dataclass(frozen=True)
class LossOutput:
    """What `lm_loss` returns.

    Attributes:
        loss: scalar to minimise, with its gradient.
        nll: mean of -log p(target) over the scored tokens, nats a token, detached.
        num_tokens: number of scored tokens.
        state: the model's state after the last token; not detached.
    """

    loss: Tensor
    nll: Tensor
    num_tokens: int
    state: ModelState


def lm_loss(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    state: ModelState | None = None,
    *,
    resets: Tensor | None = None,
    start: ModelState | None = None,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """Run the model and score the next tokens.

    loss = mean_t [ lse_t - logit_t[target_t] + z_loss lse_t^2 ] + kl,   lse_t = logsumexp(logits_t)

    The mean runs over the targets that are not -100; kl is the model's own term, where it has one.

    Args:
        model: a language model; autocast, where active, applies to the head as to all else.
        tokens: [B, T] int64.
        targets: [B, T] int64, below the vocabulary size, or -100 where nothing is to be learned.
        state: the state before the first token, None for the start.
        resets: [B, T] bool, True where a document starts.
        start: one row that documents start from in place of the model's own state.
        z_loss: weight of lse^2, which keeps the logits' scale near zero.
        group: the ranks that share the rows, as in `LanguageModel.features`; the mean is over this
            rank's tokens.

    Raises:
        ShapeError: targets have another shape than tokens, or lie outside the vocabulary.
    """
    size = model.config.vocab_size
    if targets.shape != tokens.shape or targets.dtype != torch.int64:
        raise ShapeError(
            f"targets must be int64 {list(tokens.shape)}, as the tokens are; got {targets.dtype} "
            f"{list(targets.shape)}"
        )
    scored = targets != IGNORE
    if not bool(((targets >= 0) & (targets < size))[scored].all()):
        raise ShapeError(f"targets must be {IGNORE} or in 0..{size - 1}, the model's vocabulary")
    x, state, kl = model.features(tokens, state, resets=resets, start=start, group=group)
    num_tokens = int(scored.sum())
    # Selecting all rows would copy them, so do that only where some are ignored.
    everything = num_tokens == targets.numel()
    x = x.flatten(0, 1) if everything else x[scored]
    targets = targets.flatten() if everything else targets[scored]
    loss, nll = head_loss(model.head, x, targets, z_loss)
    return LossOutput(loss if kl is None else loss + kl, nll, num_tokens, state)


def head_loss(
    head: nn.Module, x: Tensor, targets: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return what `linear_cross_entropy` does of the logits that `head` gives for x [n, D].

    Of an adapter, a quantised head, one with a bias or a hook only its own forward is right, which
    holds all the logits.
    """
    if type(head) is nn.Linear and is_plain(head):
        return linear_cross_entropy(x, head.weight, targets, z_loss)
    logits = head(x)
    logits, n = logits.to(torch.promote_types(logits.dtype, torch.float32)), max(1, len(targets))
    nll = F.cross_entropy(logits, targets, reduction="sum") / n
    return nll + z_loss * logits.logsumexp(-1).square().sum() / n, nll.detach()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of logits x W^T, with and without the z-loss.

    The gradient with respect to x and W is made in the forward pass, a chunk of rows at a time
    through one buffer: g = softmax (1 + 2 z lse) - onehot, dx = g W / n, dW = g^T x / n, divided in
    the backward pass, where a scale of the loss keeps float16 from losing it. Logits are computed
    once and never stored; the gradients are good for one backward pass.

    At V = 50,304, D = 384 on a CPU this took 0.4 (float32) and 0.5 (bfloat16) of the time of
    F.cross_entropy over all logits, whose chunks recomputed in the backward pass took 0.8 and 1.2;
    torch's F.linear_cross_entropy took 1.0 and 1.9 times our time, knows no z-loss and returns a
    bfloat16 loss.

    Args:
        x: [n, D] features, any float dtype.
        weight: [V, D].
        targets: [n] int64 in 0..V-1.
        z_loss: weight of logsumexp^2.

    Returns:
        The scalar loss with gradient, and the scalar mean of -log p(target) without: float32, or
        float64 for float64 inputs. Both are 0 where n is 0. A second backward pass through the
        loss raises TrainingError, a second derivative RuntimeError.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, z_loss, torch.is_grad_enabled())


def _chunk_of(x: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype, int]:
    """Return in which dtypes to multiply features [n, D] by a head [V, D] and to sum, and rows.

    Products are in autocast's dtype where that is on, sums in float32 or float64; so many rows'
    logits are held at once.
    """
    kind = x.device.type
    product = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind) and product != torch.float64:
        product = torch.get_autocast_dtype(kind)
    rows = max(1, min(len(x), LOGITS // len(weight)))
    if product == torch.float16:
        rows = min(rows, FLOAT16_ROWS)
    return product, torch.promote_types(product, torch.float32), rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, learn: bool
    ) -> tuple[Tensor, Tensor]:
        (n, _), (size, _) = x.shape, weight.shape
        product, exact, rows = _chunk_of(x, weight)
        need_x, need_weight = (learn and need for need in ctx.needs_input_grad[:2])
        with torch.autocast(x.device.type, enabled=False):
            W = weight.detach().to(product)
            # One buffer for every chunk: fresh memory costs more time than the arithmetic.
            buffer = x.new_empty(rows, size, dtype=exact)
            narrow = buffer if product == exact else x.new_empty(rows, size, dtype=product)
            dx = torch.empty_like(x) if need_x else None
            dW = torch.zeros_like(weight, dtype=exact) if need_weight else None
            nll = x.new_zeros((), dtype=torch.float64)
            squares = nll.clone()
            for i in range(0, n, rows):
                part, target = x[i : i + rows].detach().to(product), targets[i : i + rows, None]
                p, g = buffer[: len(part)], narrow[: len(part)]
                torch.mm(part, W.T, out=g)
                if g is not p:
                    p.copy_(g)
                chosen = p.gather(1, target)
                largest = p.amax(1, keepdim=True)
                total = p.sub_(largest).exp_().sum(1, keepdim=True)
                lse = total.log() + largest
                nll += (lse - chosen).sum(dtype=torch.float64)
                squares += lse.square().sum(dtype=torch.float64)
                if dx is None and dW is None:
                    continue
                p.mul_((1 + 2 * z_loss * lse) / total)
                p.scatter_add_(1, target, torch.full_like(lse, -1))
                if g is not p:
                    g.copy_(p)
                if dx is not None:
                    dx[i : i + rows] = g @ W
                if dW is not None and product == exact:
                    dW.addmm_(g.T, part)
                elif dW is not None:
                    dW += g.T @ part
        ctx.gradients, ctx.n = (dx, dW), max(n, 1)
        ctx.exact, ctx.dtypes = exact, (x.dtype, weight.dtype)
        mean = (nll / max(n, 1)).to(exact)
        ctx.mark_non_differentiable(mean)
        return ((nll + z_loss * squares) / max(n, 1)).to(exact), mean

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise TrainingError(
                "this loss has been differentiated already, and its gradients, made with it, are "
                "gone; compute it again, or sum all that needs them before one backward()"
            )
        found, ctx.gradients = ctx.gradients, None  # scaled in place, so good for one use
        dx, dW = (
            None if x is None else x.to(ctx.exact).mul_(grad / ctx.n).to(dtype)
            for x, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return dx, dW, None, None, None
