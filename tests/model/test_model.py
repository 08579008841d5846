"""What holds for every model: cuts, documents, rows, gradients, precision, first values, errors."""

import math

import pytest
import torch
from small_models import GROWN, SIZES, WITH_M, build, randomise

from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ShapeError, StateError
from metastate.layers.common import DECAY_BASE, MATRIX, VECTOR
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from metastate.model.state import ModelState
from tolerance import TOLERANCE, relative_error, slopes

T = 12
EXACT = TOLERANCE[torch.float64]
MODELS = {
    "metastate": {},
    "grown": GROWN | {"meta_state": MetaStateConfig(**WITH_M)},
    # At the default's gain this draw of weights is ill-conditioned: in float32 the reference
    # itself is as far from float64 as every backend, 2e-4.
    "asked": GROWN
    | {"meta_state": MetaStateConfig(readout="both", query="receptance", readout_gain=2.0)},
    "paper": {"meta_state": MetaStateConfig.paper()},
    "input": {
        "meta_state": MetaStateConfig(**WITH_M, update="input", query="encoding", read="value")
    },
    "encoding": {"meta_state": MetaStateConfig(readout="encoding", gate=True, token_shift=True)},
    "cross": {
        "meta_state": MetaStateConfig(**WITH_M, encoder="cross", latent_size=2, token_shift=True)
    },
    "rwkv7": {"architecture": "rwkv7"},
    "rwkv7-grown": {"architecture": "rwkv7"} | GROWN,
    "transformer": {"architecture": "transformer"},
    "tokenformer": {"architecture": "tokenformer"},
    "memory": {"memory_heads": 3},
    "memory-inside": {"memory_heads": 3, "memory_layer": 1, "ffn_order": "after"},
    "rwkv7-memory": {"architecture": "rwkv7", "memory_heads": 1},
    "transformer-memory": {"architecture": "transformer", "memory_heads": 2},
    "transformer-memory-inside": {
        **{"architecture": "transformer", "memory_heads": 2, "memory_layer": 1}
    },
}
RECURRENT = [name for name in MODELS if "former" not in name]


NATIVE = [*("metastate", "grown", "asked", "input", "encoding", "rwkv7", "memory", "memory-inside")]


@pytest.fixture(
    params=[(name, "chunked") for name in MODELS] + [(n, "cpu") for n in NATIVE], ids="-".join
)
def model(request):
    name, backend = request.param
    return made(name, backend)


def made(name, backend="chunked", **fields):
    model = build(**(MODELS[name] | fields))
    model.backend = backend
    return model


def some_tokens(batch=2, length=T, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=generator)


def in_pieces(model, tokens, sizes, state=None, resets=None):
    parts = []
    pieces = [None] * len(sizes) if resets is None else resets.split(sizes, 1)
    for piece, starts in zip(tokens.split(sizes, 1), pieces, strict=True):
        logits, state = model(piece, state, resets=starts)
        parts.append(logits)
    return torch.cat(parts, 1), state


def assert_same_state(state, expected):
    mine, theirs = state.tensors(), expected.tensors()
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        assert relative_error(x, theirs[name]) < EXACT, name


@pytest.mark.parametrize("sizes", [[1] * T, [5, 1, 6], [11, 1]], ids=str)
def test_whole_split_stepwise(model, sizes):
    tokens = some_tokens()
    with torch.no_grad():
        _, before = model(some_tokens(seed=4))  # carried in
        for state in (None, model.init_state(2), before):
            whole, end = model(tokens, state)
            pieces, same_end = in_pieces(model, tokens, sizes, state)
            assert relative_error(pieces, whole) < EXACT
            assert_same_state(same_end, end)
            assert same_end.tokens_seen == end.tokens_seen == (T if state is not before else 2 * T)


def test_resets_are_separate_documents(model):
    tokens, resets = some_tokens(), torch.zeros(2, T, dtype=torch.bool)
    starts = [[0, 1, 7], [4, T - 1]]  # row 1 begins inside a document
    for row, positions in enumerate(starts):
        resets[row, positions] = True
    with torch.no_grad():
        _, before = model(some_tokens(seed=4))
        for carried in (None, before):
            logits, end = model(tokens, carried, resets=resets)
            stepwise, _ = in_pieces(model, tokens, [1] * T, carried, resets)
            assert relative_error(stepwise, logits) < EXACT
            for row, positions in enumerate(starts):
                edges = sorted({0, *positions, T})
                for first, last in zip(edges, edges[1:], strict=False):
                    old = None if first in positions or carried is None else carried[row]
                    alone, alone_end = model(tokens[row : row + 1, first:last], old)
                    assert relative_error(logits[row : row + 1, first:last], alone) < EXACT
                if model.recurrent:
                    assert_same_state(end[row], alone_end)
            following = some_tokens(seed=5)[:1]
            mine, theirs = model(following, end[1])[0], model(following, alone_end)[0]
            assert relative_error(mine, theirs) < EXACT


def test_no_resets_is_no_packing(model):
    tokens = some_tokens()
    logits, _ = model(tokens)
    packed, _ = model(tokens, resets=torch.zeros(2, T, dtype=torch.bool))
    assert relative_error(packed, logits) < EXACT


def test_rows_are_independent(model):
    tokens = some_tokens(3)
    with torch.no_grad():
        _, state = model(some_tokens(3, seed=4))
        logits, end = model(tokens, state)
        for row in range(3):
            alone, alone_end = model(tokens[row : row + 1], state[row])
            assert relative_error(logits[row : row + 1], alone) < EXACT
            assert_same_state(end[row], alone_end)
        back = torch.tensor([2, 0])
        assert relative_error(model(tokens[back], state[back])[0], logits[back]) < EXACT


def test_the_future_is_not_seen(model):
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % SIZES["vocab_size"]
    logits, others = model(tokens)[0], model(changed)[0]
    assert relative_error(others[:, :8], logits[:, :8]) < EXACT
    assert (others[:, 8:] - logits[:, 8:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_never_changes_its_state(model, grad):
    with torch.set_grad_enabled(grad):
        _, state = model(some_tokens(seed=4))
        for given in (state, model.init_state(2)):
            before = given.clone()
            resets = torch.zeros(2, T, dtype=torch.bool)
            resets[0, 3] = True
            for n in (1, T):
                one, _ = model(some_tokens()[:, :n], given)
                model(some_tokens(seed=6)[:, :n], given, resets=resets[:, :n])
                again, _ = model(some_tokens()[:, :n], given)
                assert torch.equal(one, again)
            for name, x in given.tensors().items():
                assert torch.equal(x, before.tensors()[name]), name


def test_a_state_holds_no_more_than_it_says(model):
    """A shift that is a view would keep a whole prefill's activations alive."""
    with torch.no_grad():
        _, state = model(some_tokens(2, 64))
    held = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in state.tensors().values()}
    assert sum(storage.nbytes() for storage in held.values()) <= state.num_bytes


def test_nor_does_that_of_a_meta_state_layer_alone():
    with torch.no_grad():
        _, state = made("encoding", ffn_size=None)(some_tokens(2, 64))
    shift = state.layers[0].channel_shift
    assert shift.untyped_storage().nbytes() == shift.nbytes


def test_every_parameter_gets_a_gradient(model):
    model.train()
    lm_loss(model, some_tokens(), some_tokens(seed=5), z_loss=1e-3).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["metastate", "rwkv7", "paper", "transformer"])
def test_first_step_from_the_start_moves_the_outputs(name):
    """Zero outputs keep the rest still in the first step, but they move themselves."""
    model = LanguageModel(ModelConfig(**(SIZES | MODELS[name])))
    model.backend = "chunked"
    lm_loss(model, some_tokens(), some_tokens(seed=5)).loss.backward()
    for i, block in enumerate(model.blocks):
        for part in ("time_mix", "meta_state", "attention"):
            if getattr(block, part, None) is not None:
                grad = getattr(block, part).output.weight.grad
                assert grad.isfinite().all() and grad.any(), (i, part)


def test_gradients_flow_through_a_carried_state(model):
    tokens, targets = some_tokens(), some_tokens(seed=5)

    def gradients(sizes):
        state, loss = None, 0.0
        for x, y in zip(tokens.split(sizes, 1), targets.split(sizes, 1), strict=True):
            out = lm_loss(model, x, y, state)
            state, loss = out.state, loss + out.loss * x.shape[1]
        return torch.autograd.grad(loss / T, list(model.parameters()))

    names = [name for name, _ in model.named_parameters()]
    for name, whole, split in zip(names, gradients([T]), gradients([5, 1, 6]), strict=True):
        assert relative_error(split, whole) < 1e-9, name


def test_a_detached_state_cuts_the_graph(model):
    _, state = model(some_tokens())
    assert all(x.requires_grad for x in state.tensors().values() if x.is_floating_point())
    assert not any(x.requires_grad for x in state.detach().tensors().values())
    assert not any(x.requires_grad for x in model.init_state(2).tensors().values())


@pytest.mark.parametrize("name", ["metastate", "rwkv7", "memory"])
def test_gradient_by_finite_differences(name):
    model = made(name, hidden_size=6, num_heads=2, parameter_tokens=2)
    tokens, targets = some_tokens(1, 5), some_tokens(1, 5, seed=5)
    _, state = model(some_tokens(1, 3, seed=4))
    state = state.detach()
    carried = {"S": state.layers[0].S} | ({} if state.memory is None else vars(state.memory))
    for x in carried.values():
        x.requires_grad_()

    def loss():
        return lm_loss(model, tokens, targets, state).loss

    loss().backward()
    named = ("blocks.1", "head", "surprise_memory")
    checked = carried | {
        n: p for n, p in model.named_parameters() if n.startswith(named) and "token_" not in n
    }
    for key, p in checked.items():
        measured, slope = slopes(loss, p)
        assert measured == pytest.approx(slope, rel=2e-4, abs=1e-8), key


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 1},
        {"num_heads": 1},
        {"num_layers": 1, "num_heads": 1, "hidden_size": 3},
        {"num_heads": 3, "hidden_size": 15},
        {"num_heads": 1, "hidden_size": 63},
        {"num_heads": 12},  # heads of size 1
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["metastate", "paper", "rwkv7"])
def test_odd_sizes(name, fields):
    fresh = LanguageModel(ModelConfig(**(SIZES | MODELS[name] | fields)))
    fresh.backend = "chunked"
    assert all(p.isfinite().all() for p in fresh.parameters())
    assert fresh(some_tokens())[0].isfinite().all()
    model = made(name, **fields)
    with torch.no_grad():
        whole, _ = model(some_tokens())
        assert whole.isfinite().all()
        assert relative_error(in_pieces(model, some_tokens(), [1, 7, 4])[0], whole) < EXACT
        model.backend = "reference"
        assert relative_error(model(some_tokens())[0], whole) < EXACT


def test_one_token(model):
    logits, state = model(some_tokens(2, 1))
    assert logits.shape == (2, 1, SIZES["vocab_size"])
    assert state.tokens_seen == 1


@pytest.mark.parametrize("name", [*MODELS, "variational"])
def test_activation_checkpointing_is_bitwise_the_same(name):
    variational = MetaStateConfig(encoder="cross", latent_size=2, variational=True)
    fields = MODELS.get(name, {"meta_state": variational})
    model = build(**fields).float().train()
    model.backend = "chunked"
    _, carried = model(some_tokens(seed=4))
    carried, results = carried.detach(), []
    resets = torch.zeros(2, T, dtype=torch.bool)
    resets[1, 5] = True
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(5)  # of the variational draw
        model.zero_grad(set_to_none=True)
        out = lm_loss(model, some_tokens(), some_tokens(seed=5), carried, resets=resets)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast(name, backend):
    model = made(name, backend).float()
    expected, _ = model(some_tokens())
    with torch.autocast("cpu", torch.bfloat16):
        first, state = model(some_tokens()[:, :7])
        rest, state = model(some_tokens()[:, 7:], state)
        out = lm_loss(model, some_tokens(), some_tokens(seed=5), state)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    logits = torch.cat([first, rest], 1).float()
    assert ((logits - expected).norm() < 0.1 * expected.norm()).item()
    if model.recurrent:
        for layer in state.layers:
            assert layer.S.dtype == torch.float32
            assert layer.M is None or layer.M.dtype == torch.float32
    if state.memory is not None:
        assert {x.dtype for x in vars(state.memory).values()} == {torch.float32}


def test_autocast_does_not_round_the_first_state():
    model = made("grown").float()
    expected = model.init_state(2).tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.init_state(2).tensors()
    assert found["layers.0.S"].any() and found["layers.0.S"].dtype == torch.float32
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_states_follow_the_models_precision(model):
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        for state in (model.init_state(2), model(some_tokens())[1]):
            assert {x.dtype for x in state.tensors().values() if x.is_floating_point()} == {dtype}


def test_float32_is_near_float64(model):
    """Float32 takes fused kernels on a CPU; their values and gradients are float64's, rounded."""
    resets = torch.zeros(2, T, dtype=torch.bool)
    resets[0, 4] = resets[1, 0] = True
    _, before = model(some_tokens(seed=4))
    results = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype).zero_grad(set_to_none=True)
        given = before.detach().map(lambda x, d=dtype: x.to(d) if x.is_floating_point() else x)
        for layer in given.layers:
            if model.recurrent:
                layer.S.requires_grad_()
                layer.time_shift.requires_grad_()
        out = lm_loss(model, some_tokens(), some_tokens(seed=5), given, resets=resets)
        out.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()} | {"loss": out.loss}
        for i, layer in enumerate(given.layers if model.recurrent else ()):
            found |= {f"{i}.S": layer.S.grad, f"{i}.time_shift": layer.time_shift.grad}
        logits, state = model(some_tokens(), given, resets=resets)
        kept = {k: x for k, x in state.tensors().items() if x.is_floating_point()}
        results.append(found | kept | {"logits": logits})
    for name, exact in results[0].items():
        assert relative_error(results[1][name], exact) < 10 * TOLERANCE[torch.float32], name


@pytest.mark.parametrize("name", MODELS)
def test_optimizer_groups_cover_exactly_all_parameters(name):
    model = made(name)
    groups, named = model.optimizer_groups(), dict(model.named_parameters())
    assert groups.keys() == named.keys()
    assert set(groups.values()) <= {MATRIX, VECTOR, DECAY_BASE}
    bases = {key for key, group in groups.items() if group == DECAY_BASE}
    assert bases == {key for key in named if key.endswith("time_mix.decay.bias")}
    assert bool(bases) == model.recurrent
    matrices = {"weight", "compress", "expand", "keys", "values"}  # what else has axes: no decay
    for key, p in named.items():
        is_matrix = p.dim() > 1 and key.rpartition(".")[2] in matrices
        assert (groups[key] == MATRIX) == is_matrix, key


def test_every_declared_optimizer_group_names_a_parameter():
    declared, named = set(), set()
    for module in (module for name in MODELS for module in made(name).modules()):
        own = getattr(module, "GROUPS", {})
        declared |= {(type(module), key) for key in own}
        named |= {(type(module), key) for key, _ in module.named_parameters() if key in own}
    assert declared == named


# A user's mistakes.


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64 \[B, T\].*\[3\]"),
        (torch.zeros(1, 3), "torch.float32"),
        (torch.zeros(1, 3, dtype=torch.int32), "torch.int32"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least 1"),
        (torch.tensor([[0, 23]]), "from 0 to 23, the vocabulary from 0 to 22"),
        (torch.tensor([[-1, 3]]), "from -1 to 3"),
    ],
)
def test_wrong_tokens_are_refused(model, tokens, message):
    with pytest.raises(ShapeError, match=message):
        model(tokens)


@pytest.mark.parametrize("resets", [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, T)])
def test_wrong_resets_are_refused(model, resets):
    with pytest.raises(ShapeError, match="resets must be bool"):
        model(some_tokens(), resets=resets)


def test_no_rows_are_refused(model):
    with pytest.raises(ShapeError, match="batch_size is 0"):
        model.init_state(0)


@pytest.mark.parametrize("other", MODELS)
def test_a_state_of_another_model_is_refused(model, other):
    given, own = made(other).init_state(2), model.init_state(2)
    shapes = [
        [{k: v.shape for k, v in vars(layer).items() if torch.is_tensor(v)} for layer in s.parts]
        for s in (given, own)
    ]
    if shapes[0] == shapes[1]:
        model(some_tokens(), given)
        return
    with pytest.raises(StateError):
        model(some_tokens(), given)
    with pytest.raises(StateError):
        given.check(model)


@pytest.mark.parametrize("fields", [{"num_layers": 3}, {"num_heads": 3}, {"hidden_size": 24}])
def test_a_state_of_another_size_is_refused(model, fields):
    config = model.config.replace(**fields, **({"head_size": None}), **{"head_segments": None})
    state = LanguageModel(config).init_state(2)
    with pytest.raises(StateError):
        model(some_tokens(), state)


def test_a_state_of_another_batch_is_refused(model):
    with pytest.raises(StateError, match="3 rows"):
        model(some_tokens(), model.init_state(3))
    with pytest.raises(StateError, match="has 0 layers"):
        model(some_tokens(), ModelState(()))


def test_logits_of_a_uniform_guess():
    """The loss at the start is near ln V: nothing is learned and nothing is broken."""
    for name in MODELS:
        model = LanguageModel(ModelConfig(**(SIZES | MODELS[name])))
        model.backend = "chunked"
        out = lm_loss(model, some_tokens(4, 32), some_tokens(4, 32, seed=5))
        assert abs(out.nll.item() - math.log(SIZES["vocab_size"])) < 0.5, name


def test_randomise_leaves_nothing_at_zero():
    for name in MODELS:
        model = LanguageModel(ModelConfig(**(SIZES | MODELS[name])))
        randomise(model)
        assert all(p.abs().min() > 0 for p in model.parameters())


def test_a_start_is_one_row_also_where_a_state_goes_on():
    model = build()
    tokens, state = torch.zeros(2, 3, dtype=torch.int64), model.init_state(2)
    with pytest.raises(StateError, match="holds 2 rows"):
        model.features(tokens, state, start=state)
    with pytest.raises(StateError, match=r"layers\.0\.S is .1, 3, 4, 4., the model needs"):
        model.features(tokens, state, start=build(num_heads=3).init_state(1))
