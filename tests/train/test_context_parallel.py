"""Sequences split over processes give one process's outputs and gradients."""

import pytest
import torch
import torch.distributed as dist

from metastate import ops
from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ConfigError
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.ops.context import of_last, wkv7_context_parallel
from ranks import run_ranks
from tolerance import TOLERANCE, relative_error

NAMES = ("r", "log_w", "k", "v", "kappa", "a")
WITH_M = MetaStateConfig(readout="both", encoder_query="input")


def inputs(length, dtype):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (2, length, 2, 8)
    out = {name: draw(*shape) for name in NAMES}
    out["log_w"] = -0.6 * torch.sigmoid(out["log_w"])
    out["kappa"] = torch.nn.functional.normalize(out["kappa"], dim=-1)
    out["a"] = torch.sigmoid(out["a"])
    return out, draw(2, 2, 8, 8), draw(*shape), draw(2, 2, 8, 8)


def weighted(y, final, dy, dS):
    return (y * dy).sum() + (0 if final is None else (final * dS).sum())


def check_op(rank, cuts, dtype, backend):
    """Return relative errors of outputs and gradients; the ranks' stretches differ in length."""
    group, world = dist.group.WORLD, dist.get_world_size()
    given, state, dy, dS = inputs(cuts[-1], dtype)
    whole = {k: x.clone().requires_grad_() for k, x in given.items()}
    start = state.clone().requires_grad_()
    y, final = ops.wkv7(*whole.values(), start, backend=backend)
    weighted(y, final, dy, dS).backward()

    mine = slice(cuts[rank], cuts[rank + 1])
    own = {k: x[:, mine].clone().requires_grad_() for k, x in given.items()}
    own_start = state.clone().requires_grad_()
    own_y, own_final = wkv7_context_parallel(*own.values(), own_start, group=group, backend=backend)
    last = own_final if rank == world - 1 else None
    weighted(own_y, last, dy[:, mine], dS).backward()
    dist.all_reduce(own_start.grad)
    errors = {"y": relative_error(own_y, y[:, mine])}
    errors["state"] = relative_error(of_last(own_final, group), final)
    errors["d state"] = relative_error(own_start.grad, start.grad)
    for name, x in own.items():
        errors[f"d {name}"] = relative_error(x.grad, whole[name].grad[:, mine])
    return errors


def model_of(options, dtype, architecture="metastate", **fields):
    torch.manual_seed(5)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=13,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        decay_rank=2,
        icl_rate_rank=2,
        value_rank=2,
        gate_rank=2,
        meta_state=options,
        **fields,
    )
    model = LanguageModel(config).to(dtype)
    model.backend = "chunked"
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def check_model(rank, options, dtype, fields):
    """Return relative errors of loss, state and every weight's gradient."""
    world, group = dist.get_world_size(), dist.group.WORLD
    model = model_of(options, dtype, **{k: v for k, v in fields.items() if k != "with_state"})
    model.activation_checkpointing = fields.get("parameter_tokens", 0) > 0
    length = 8 * world
    tokens = torch.randint(0, 13, (3, length + 1))
    resets = torch.rand(3, length) < 0.1
    resets[0] = False  # a row that is one document over all ranks
    resets[1, 8] = True  # a document starts with a rank's first token
    state = None
    if fields.get("with_state"):
        with torch.no_grad():
            state = model(torch.randint(0, 13, (3, 5)))[1]
    given = tokens[:, :-1], tokens[:, 1:]
    packed = resets if fields.get("with_state") else None
    whole = lm_loss(model, *given, state, resets=packed, z_loss=0.1)
    whole.loss.backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    mine = slice(rank * 8, rank * 8 + 8)
    parts = [x[:, mine].contiguous() for x in given]
    out = lm_loss(
        model,
        *parts,
        state,
        resets=None if packed is None else packed[:, mine].contiguous(),
        z_loss=0.1,
        group=group,
    )
    (out.loss / world).backward()
    errors = {}
    for name, p in model.named_parameters():
        dist.all_reduce(p.grad)
        scale = expected[name].abs().max()
        # What is zero but for rounding is measured against the largest gradient of all.
        scale = max(float(scale), 1e-6 * max(float(x.abs().max()) for x in expected.values()))
        errors[f"d {name}"] = float((p.grad - expected[name]).abs().max()) / scale
    loss = out.nll.clone()
    dist.all_reduce(loss)
    errors["loss"] = relative_error(loss / world, whole.nll)
    for name, x in out.state.tensors().items():
        errors[name] = relative_error(of_last(x, group), whole.state.tensors()[name])
    return errors


MODELS = {
    "default": (MetaStateConfig(), {}),
    "with M": (WITH_M, {"with_state": True, "ffn_size": 12}),
    "paper": (MetaStateConfig.paper(), {"with_state": True}),
    "input": (
        MetaStateConfig(readout="both", update="input", token_shift=True),
        {"parameter_tokens": 3, "with_state": True},
    ),
    "rwkv7": (MetaStateConfig(), {"architecture": "rwkv7", "parameter_tokens": 2}),
    "memory": (MetaStateConfig(), {"memory_heads": 2, "with_state": True}),
    "memory, from nothing": (MetaStateConfig(), {"memory_heads": 1}),
    "memory inside": (MetaStateConfig(), {"memory_heads": 1, "memory_layer": 1}),
}


def everything(rank, backends, models):
    out = {}
    cuts = [0, 7, 16, 19, 28][: dist.get_world_size() + 1]
    for backend in backends:
        for dtype in (torch.float64, torch.float32):
            out[backend, dtype] = check_op(rank, cuts, dtype, backend)
    for name in models:
        options, fields = MODELS[name]
        out[name, torch.float64] = check_model(rank, options, torch.float64, fields)
        out[name, torch.float32] = check_model(rank, options, torch.float32, fields)
    return out


def worst(found):
    return {
        (case, dtype, rank, what): error
        for rank, own in enumerate(found)
        for (case, dtype), errors in own.items()
        for what, error in errors.items()
        # float32: five recurrences deep and summed over ranks, so ten times the table's row
        if not error < {torch.float64: 1e-10, torch.float32: 10 * TOLERANCE[torch.float32]}[dtype]
    }


@pytest.mark.dist
def test_two_processes_equal_one():
    found = run_ranks(everything, 2, ["reference", "chunked", "cpu"], list(MODELS))
    assert len(found[0]) == 6 + 2 * len(MODELS)
    assert not worst(found)


@pytest.mark.dist
def test_four_processes_equal_one():
    assert not worst(run_ranks(everything, 4, ["chunked"], ["with M", "memory"]))


def sent(rank):
    """Return the bytes that an exchange gathers at two lengths, counted where they are sent."""
    counts = []
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def counted(call):
        def wrapper(output, x, *args, **kwargs):
            counts.append((x if call is gather else output).nbytes)
            return call(output, x, *args, **kwargs)

        return wrapper

    dist.all_gather = counted(gather)
    dist.reduce_scatter = counted(scatter)
    totals = []
    for length in (8, 32):
        given, state, *_ = inputs(length, torch.float32)
        own = [x.requires_grad_() for x in given.values()]
        counts.clear()
        y, _ = wkv7_context_parallel(*own, state, group=dist.group.WORLD, backend="chunked")
        y.sum().backward()
        totals.append(list(counts))
    return totals


@pytest.mark.dist
def test_what_is_sent_does_not_grow_with_the_tokens():
    maps = 2 * (2 * 2 * 8 * 8) * 4  # A and B of 2 rows and 2 heads of 8 x 8 float32
    assert run_ranks(sent, 2) == [[[maps, maps], [maps, maps]]] * 2


def test_a_transformer_is_refused():
    model = model_of(MetaStateConfig(), torch.float32, "transformer")
    with pytest.raises(ConfigError, match="recurrent"):
        model(torch.zeros(1, 3, dtype=torch.int64), group=object())
