"""What a model computes whatever surrounds it: PyTorch's defaults, modes, other heads and norms."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from small_models import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import ConfigError, ShapeError, StateError
from metastate.model.decode import BatchDecoder, Decoder, NativeDecoder, make_decoder
from metastate.model.io import load
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from tolerance import TOLERANCE, relative_error

TOKENS = torch.arange(2, 18).reshape(2, 8) % 11
SIZES = {"vocab_size": 11, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def made(**fields):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SIZES | {"ffn_size": 20, "ffn_order": "after"} | fields))
    randomise(model)
    return model


def results(model):
    """Logits, loss, gradients and a decoded step."""
    model.zero_grad()
    out = lm_loss(model, TOKENS, TOKENS.roll(-1, 1))
    out.loss.backward()
    found = [model(TOKENS)[0].detach(), out.loss.detach()]
    found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*found, make_decoder(model, 2).step([5, 6]).clone()]


@pytest.mark.parametrize("fields", [{"memory_heads": 1}, {"architecture": "rwkv7"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(fields, dtype):
    fields = fields if "memory_heads" in fields else fields | {"ffn_order": None}
    model = made(**fields)
    expected = results(model)
    torch.set_default_dtype(dtype)
    try:
        found = results(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_default_device_changes_nothing():
    model = made()
    expected = make_decoder(model, 2).step([5, 6]).clone()
    with torch.device("meta"):
        assert torch.equal(make_decoder(model, 2).step([5, 6]), expected)
        logits = model(TOKENS)[0]
    assert torch.equal(logits, model(TOKENS)[0])


def test_a_model_can_be_made_in_half_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LanguageModel(ModelConfig(**SIZES))
    finally:
        torch.set_default_dtype(torch.float32)
    weight = model.blocks[0].time_mix.receptance.weight
    assert weight.dtype == torch.bfloat16
    assert (weight.float() @ weight.float().T - torch.eye(16)).abs().max() < 0.05


def test_export_leaves_nothing_behind():
    """A table without values, kept from it, would make the next pass of this length one of them."""
    model = made(architecture="transformer", ffn_order=None)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens)[0]

    expected = model(TOKENS[:, :7])[0]
    torch.export.export(Logits(), (TOKENS[:, :6],), strict=False)
    assert type(model(TOKENS[:, :6])[0]) is torch.Tensor
    assert torch.equal(model(TOKENS[:, :7])[0], expected)


class Doubled(nn.Linear):
    """What an adapter is: a head of another class."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_head(kind):
    model = made()
    weight = model.head.weight
    if kind == "hook":
        model.head.register_forward_hook(lambda module, args, y: y + torch.arange(11.0))
    else:
        head = Doubled(16, 11, bias=False) if kind == "adapter" else nn.Linear(16, 11)
        head.weight = weight
        model.head = head
    return model


@pytest.mark.parametrize("kind", ["adapter", "bias", "hook"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_loss_is_of_the_head_s_own_logits(kind, z_loss):
    model, targets = with_head(kind), TOKENS.roll(-1, 1).clone()
    targets[0, 3] = -100
    out = lm_loss(model, TOKENS, targets, z_loss=z_loss)
    logits = model(TOKENS)[0]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    square = logits.logsumexp(-1).square()[targets != -100].mean()
    torch.testing.assert_close(out.nll, nll.detach())
    torch.testing.assert_close(out.loss, nll + z_loss * square)
    out.loss.backward()
    assert model.head.weight.grad.abs().max() > 0
    assert not isinstance(make_decoder(model, 1), NativeDecoder)
    state = model.init_state(1)
    step = make_decoder(model, 1).step([3])
    torch.testing.assert_close(step[0], model(torch.tensor([[3]]), state)[0][0, 0].detach())


def test_a_memory_refuses_a_head_with_a_bias():
    model = made(memory_heads=1)
    model.head = nn.Linear(16, 11)
    with pytest.raises(ConfigError, match="reads the weights of the head"):
        model(TOKENS)


def other_bias(model):
    model.blocks[0].time_mix.key.bias = nn.Parameter(torch.ones(16))


def other_eps(model):
    model.blocks[1].ln1.eps = 0.1


def other_group_eps(model):
    model.blocks[1].time_mix.norm.eps = 0.1


def other_norm(model):
    model.blocks[1].ln2 = nn.LayerNorm(16, bias=False)


@pytest.mark.parametrize("change", [other_bias, other_eps, other_group_eps, other_norm])
def test_what_the_native_decoder_does_not_compute_goes_forward(change):
    model = made()
    assert isinstance(make_decoder(model, 1), NativeDecoder)
    change(model)
    assert not isinstance(make_decoder(model, 1), NativeDecoder)


@pytest.mark.parametrize("kind", [Decoder, BatchDecoder, NativeDecoder])
@pytest.mark.parametrize("tokens", [[], [1, 2, 3], [11], [-1]])
def test_a_step_of_other_tokens_is_refused(kind, tokens):
    with pytest.raises(ShapeError, match="1 to 2 tokens, ids from 0 to 10"):
        kind(made(), 2).step(tokens)


def test_a_decoder_made_in_inference_mode_is_used_outside():
    with torch.inference_mode():
        decoder = make_decoder(made(architecture="transformer", ffn_order=None), 1)
        native = make_decoder(made(), 1)
    for one in (decoder, native):
        assert one.step([3]).shape == (1, 11)


def test_rows_and_fields_of_the_first_state_are_their_own():
    state = made().init_state(3)
    layer = state.layers[0]
    layer.S[0].detach().fill_(3)
    layer.time_shift.fill_(5)
    assert layer.S[1].abs().max() == 0 and layer.channel_shift.abs().max() == 0


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_a_memory_computes_in_the_model_s_dtype(stored):
    model = made(memory_heads=1)
    state = model.init_state(2)
    cast = state.map(lambda x: x.to(stored))
    (a, after), (b, other) = model(TOKENS, state), model(TOKENS, cast)
    assert relative_error(b, a) < TOLERANCE[torch.float32]
    kinds = [x.dtype for x in (*vars(after.memory).values(), *vars(other.memory).values())]
    assert kinds == [torch.float32] * 6
    half = model.bfloat16()
    logits, after = half(TOKENS)
    assert logits.dtype == torch.bfloat16 and after.memory.M.dtype == torch.float32


@pytest.mark.parametrize("encoder", ["self_state", "cross"])
def test_one_head_of_one_channel_and_one_token(encoder):
    meta, sizes = MetaStateConfig(encoder=encoder), {"vocab_size": 5, "hidden_size": 1}
    model = LanguageModel(ModelConfig(**sizes, num_layers=1, num_heads=1, meta_state=meta))
    model.backend = "chunked"
    assert model(torch.tensor([[3]]))[0].isfinite().all()


def test_a_state_that_could_not_be_read_is_not_written(tmp_path):
    model, other = made(), made(num_heads=1)
    file, state = tmp_path / "s.state", made().init_state(1)
    noted = dataclasses.replace(state, extra={"position": 7})
    lost = state.map(lambda x: x + torch.nan)
    for bad, owner, message in (
        (noted, model, "notes of a state are texts"),
        (state, other, "state"),
        (lost, model, "not finite"),
    ):
        with pytest.raises(StateError, match=message):
            bad.save(file, owner)
        assert not file.exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"dtype": torch.int32}, "dtype is torch.int32; allowed"), ({"dtype": "float32"}, "dtype is")],
)
def test_load_says_which_dtypes_there_are(asked, message):
    with pytest.raises(ConfigError, match=message):
        load("metastate-tiny", **asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_load_says_that_there_is_no_gpu():
    with pytest.raises(ConfigError, match="no GPU"):
        load("metastate-tiny", device="cuda")


class HostReads(TorchDispatchMode):
    """Count what a GPU must finish its work for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [{"memory_heads": 1}, {"architecture": "rwkv7"}, {"architecture": "transformer"}],
    ids=str,
)
def test_packed_documents_are_looked_at_once_not_in_every_layer(fields):
    fields = fields if "memory_heads" in fields else fields | {"ffn_order": None}
    resets = torch.zeros(2, 8, dtype=torch.bool)
    resets[0, 4] = resets[1, 0] = True
    counts = []
    for num_layers in (1, 3):
        model = made(num_layers=num_layers, **fields)
        with HostReads() as reads:
            model(TOKENS, resets=resets)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 3  # two for the ids, on a CPU, and where documents start
