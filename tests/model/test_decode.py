"""Decoding natively: the forward pass's logits and states, and a row's bits in any batch."""

import contextlib
import copy

import pytest
import torch
from small_models import build, label, randomise
from torch._subclasses.fake_tensor import FakeTensorMode

from metastate.config import MetaStateConfig, ModelConfig
from metastate.errors import StateError
from metastate.infer.generate import inference
from metastate.model.decode import (
    BatchDecoder,
    Decoder,
    NativeDecoder,
    make_decoder,
    store_bfloat16,
)
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState
from tolerance import TOLERANCE, relative_error

KINDS = {
    "rwkv7": {"architecture": "rwkv7"},
    "default": {},
    "beside": {"ffn_size": 20},
    "after": {"ffn_size": 20, "ffn_order": "after"},
    "both": {"meta_state": MetaStateConfig(readout="both"), "ffn_size": 37, "ffn_order": "after"},
    "meta": {"meta_state": MetaStateConfig(readout="meta", encoder_query="input")},
    "tokens": {"parameter_tokens": 3},
    "mixed blocks": {"ffn_size": 20, "meta_layers": (0, 2), "ffn_layers": (1, 2)},
    "mixed, after": {
        **{"ffn_size": 20, "ffn_order": "after"},
        **{"meta_layers": (0, 2), "ffn_layers": (1, 2)},
    },
    "memory": {"ffn_size": 20, "ffn_order": "after", "memory_heads": 2},
    "rwkv7, memory": {"architecture": "rwkv7", "memory_heads": 1},
    "memory before a block": {
        **{"ffn_size": 20, "ffn_order": "after", "memory_heads": 2, "memory_layer": 2}
    },
    "rwkv7, memory before the first": {
        **{"architecture": "rwkv7", "memory_heads": 1, "memory_layer": 0}
    },
}


def make(hidden_size=48, **fields):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=77, hidden_size=hidden_size, num_layers=3, num_heads=3, **fields
    )
    model = LanguageModel(config).eval()
    randomise(model)
    return model


def decode(decoder, tokens):
    with inference(decoder.model):
        steps = [decoder.step(tokens[:, t].tolist()).clone() for t in range(tokens.shape[1])]
    return torch.stack(steps, 1)


@pytest.mark.parametrize("hidden_size", [48, 60])  # heads of 16 and 20: whole vectors, and a rest
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_forward_pass(kind, hidden_size):
    model = make(hidden_size, **KINDS[kind])
    tokens = torch.randint(77, (5, 10))
    with torch.no_grad():
        double = LanguageModel(model.config).double().eval()
        double.load_state_dict(model.state_dict())
        logits, state = double(tokens)
    decoder = make_decoder(model, 5)
    assert isinstance(decoder, NativeDecoder)
    assert relative_error(decode(decoder, tokens), logits) < TOLERANCE[torch.float32]
    for row in range(5):
        ours, theirs = decoder.get(row), state[row]
        ours.check(model)
        assert ours.tokens_seen == 10
        for name, x in theirs.tensors().items():
            assert relative_error(ours.tensors()[name], x) < TOLERANCE[torch.float32], name


def test_what_is_read_with_zeros_is_written_as_zeros():
    """Natively too: a vector of length 0 has no direction, and is no division by 0."""
    model, tokens = make(**KINDS["both"]), torch.randint(77, (2, 4))
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.receptance.weight.zero_()
        logits, _ = copy.deepcopy(model).double()(tokens)
    decoder = make_decoder(model, 2)
    assert isinstance(decoder, NativeDecoder)
    assert relative_error(decode(decoder, tokens), logits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "transformer", "tokenformer", "shifted"])
def test_reading_leaves_the_state_of_a_forward(kind, half):
    others = {
        "shifted": {"meta_state": MetaStateConfig(token_shift=True), "ffn_size": 20},
        **{name: {"architecture": name} for name in ("transformer", "tokenformer")},
    }
    model, tokens = make(**(KINDS | others)[kind]), torch.randint(77, (2, 12))
    if half:
        store_bfloat16(model)
    expected, read = None, None
    with inference(model):
        for part in tokens.split([5, 1, 6], 1):
            _, expected = model(part, expected)
            read = model.read(part, read)
    assert read.tokens_seen == expected.tokens_seen == 12
    found = read.tensors()
    assert found.keys() == expected.tensors().keys()
    for name, x in expected.tensors().items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["rwkv7", "both", "memory"])
def test_a_row_has_the_same_bits_in_any_batch(kind, half):
    model = make(60, **KINDS[kind])
    if half:
        store_bfloat16(model)
    tokens = torch.randint(77, (11, 6))
    alone = torch.cat([decode(make_decoder(model, 1), tokens[i : i + 1]) for i in range(11)])
    for rows in (2, 4, 5, 11):
        assert torch.equal(decode(make_decoder(model, 11), tokens[:rows]), alone[:rows])


@pytest.mark.parametrize("kind", ["both", "memory"])
def test_any_number_of_threads_gives_the_same_bits(kind, monkeypatch):
    monkeypatch.setattr("metastate.model.decode.GRAIN", 1)
    model, tokens = make(**KINDS[kind]), torch.randint(77, (3, 5))
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(decode(make_decoder(model, 3), tokens))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_thread_that_never_comes_is_not_waited_for(monkeypatch):
    """The team may be smaller than asked for: who is there does all the work."""
    model, tokens = make(), torch.randint(77, (2, 4))
    expected = decode(make_decoder(model, 2), tokens)
    monkeypatch.setattr(
        "metastate.model.decode.run_pieces", lambda kernel, calls, n: kernel(*calls[0])
    )
    assert torch.equal(decode(make_decoder(model, 2), tokens), expected)


def test_rows_are_replaced_and_read_without_touching_others():
    model, tokens = make(**KINDS["both"]), torch.randint(77, (3, 8))
    decoder = make_decoder(model, 3)
    decode(decoder, tokens[:, :4])
    kept = decoder.get(1)
    before = kept.clone().tensors()
    decoder.put(0, kept)
    out = decode(decoder, tokens[[1, 1, 2], 4:])
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert all(torch.equal(x, before[name]) for name, x in kept.tensors().items())
    decoder.put(0, model.init_state(1))
    assert [decoder.get(row).tokens_seen for row in range(3)] == [0, 8, 8]


def test_a_row_that_is_not_finite_stays_alone():
    model, tokens = make(**KINDS["both"]), torch.randint(77, (3, 4))
    decoder = make_decoder(model, 3)
    expected = decode(decoder, tokens)
    decoder = make_decoder(model, 3)
    decoder.put(1, model.init_state(1).map(lambda x: x + float("nan")))
    out = decode(decoder, tokens)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_bfloat16_matrices_round_the_weights_and_nothing_else():
    model = make(**KINDS["beside"])
    tokens = torch.randint(77, (2, 8))
    exact = decode(make_decoder(model, 2), tokens)
    store_bfloat16(model)
    assert relative_error(decode(make_decoder(model, 2), tokens), exact) < TOLERANCE[torch.bfloat16]
    stored = {name: p.dtype for name, p in model.named_parameters()}
    assert stored["head.weight"] == stored["blocks.0.time_mix.key.weight"] == torch.bfloat16
    assert stored["embedding.weight"] == stored["blocks.0.time_mix.mu"] == torch.float32
    assert not model.head.weight.requires_grad and model.embedding.weight.requires_grad
    assert make_decoder(model, 1).get(0).layers[0].S.dtype == torch.float32


@pytest.mark.parametrize("kind", ["rwkv7", "both", "tokens", "memory"])
def test_a_model_stored_in_bfloat16_decodes_in_float32(kind):
    model = make(**KINDS[kind]).bfloat16()
    tokens = torch.randint(77, (2, 8))
    decoder = make_decoder(model, 2)
    assert isinstance(decoder, NativeDecoder)
    logits = decode(decoder, tokens)
    exact = decode(make_decoder(copy.deepcopy(model).float(), 2), tokens)
    assert relative_error(logits, exact) < TOLERANCE[torch.float32]
    with inference(model):  # and the forward pass goes on from a row
        again = model(tokens[:, :1], ModelState.stack([decoder.get(0), decoder.get(1)]))[0]
    step = decoder.step(tokens[:, 0].tolist())
    assert relative_error(step, again[:, 0]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "transformer"},
        {"meta_state": MetaStateConfig.paper()},
        {"head_size": 24},
        {"head_size": 24, "head_segments": (16, 8)},
        {"architecture": "rwkv7", "head_size": 24, "head_segments": (16, 8)},
        *(
            {"meta_state": MetaStateConfig(**options)}
            for options in (
                *({"gate": True}, {"token_shift": True}, {"modulation": "none"}),
                *({"readout": "both", "update": "input"}, {"readout": "both", "query": "encoding"}),
                *({"readout": "both", "encoding_norm": "rms"}, {"output_norm": "none"}),
                *({"read": "value"}, {"encoder_size": 5}, {"encoder": "cross"}),
                {"activation": "silu"},
            )
        ),
    ],
    ids=lambda fields: label(fields["meta_state"]) if "meta_state" in fields else str(fields),
)
def test_what_the_kernel_does_not_know_runs_the_forward_pass(fields):
    model = make(**fields)
    decoder, tokens = make_decoder(model, 2), torch.randint(77, (2, 5))
    assert type(decoder) is Decoder
    with torch.no_grad():
        logits, _ = model(tokens)
    assert relative_error(decode(decoder, tokens), logits) < TOLERANCE[torch.float32]


def test_other_dtypes_and_backends_run_the_forward_pass():
    assert type(make_decoder(build(), 1)) is Decoder  # float64
    model = make()
    model.backend = "chunked"
    assert type(make_decoder(model, 1)) is Decoder


class _Adapted(torch.nn.Linear):
    """A linear layer that does more, as adapters do."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x


def _adapt(model):
    layer = model.blocks[1].time_mix.value
    model.blocks[1].time_mix.value = _Adapted(layer.in_features, layer.out_features, bias=False)


def _own_forward(model):
    layer = model.blocks[1].time_mix.key
    layer.forward = lambda x: 0.5 * torch.nn.Linear.forward(layer, x)


def _parametrize(model):
    register = torch.nn.utils.parametrize.register_parametrization
    register(model.blocks[1].time_mix.key, "weight", torch.nn.Softplus())


CHANGES = {
    "another class": _adapt,
    "its own forward": _own_forward,
    "a parametrization": _parametrize,
    "a hook": lambda m: m.blocks[0].ln2.register_forward_hook(lambda _, x, y: 2 * y),
    "a hook before": lambda m: m.blocks[0].ln2.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_not_left_out(change):
    model = make()
    CHANGES[change](model)
    tokens = torch.randint(77, (2, 5))
    decoder = make_decoder(model, 2)
    assert type(decoder) is Decoder
    with torch.no_grad():
        logits, _ = model(tokens)
    assert relative_error(decode(decoder, tokens), logits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", [NativeDecoder, BatchDecoder, Decoder])
def test_no_graph_grows_and_no_other_state_is_taken(kind):
    model = make()
    model.backend = "auto" if kind is NativeDecoder else "chunked"
    decoder = kind(model, 2)
    decoder.put(0, model.init_state(1).map(lambda x: x.requires_grad_()))
    assert not decoder.step([1, 2]).requires_grad
    assert not any(x.requires_grad for x in decoder.get(1).tensors().values())
    with pytest.raises(StateError, match=r"holds 2 rows; one is needed, as state\[0\]"):
        decoder.put(0, model.init_state(2))
    before = decoder.get(0).clone()
    with pytest.raises(StateError, match="3 layers, the model 4|4 layers, the model 3"):
        decoder.put(0, LanguageModel(model.config.replace(num_layers=4)).init_state(1))
    for name, x in decoder.get(0).tensors().items():
        assert torch.equal(x, before.tensors()[name])
    assert decoder.get(0).tokens_seen == before.tokens_seen


BATCHED = KINDS | {
    "paper": {"meta_state": MetaStateConfig.paper()},
    "grown": {"head_size": 24, "head_segments": (16, 8), "parameter_tokens": 2},
}


def batch_decoder(model, rows):
    """What decodes on a GPU, but for the capture."""
    model.backend = "auto" if model.embedding.weight.device.type == "cuda" else "chunked"
    return BatchDecoder(model, rows)


def check_batch_decoder(model, device):
    """Rows join and leave; each must become what it is alone."""
    torch.manual_seed(1)
    tokens = torch.randint(77, (5, 11), device=device)
    with torch.no_grad():
        expected = [model(tokens[i : i + 1])[0][0] for i in range(5)]
        decoder, at = batch_decoder(model, 5), [0] * 5
        for rows, steps in ((1, 2), (5, 2), (3, 3), (4, 1), (2, 1), (5, 2)):
            for _ in range(steps):
                given = [int(tokens[i, at[i]]) for i in range(rows)]
                logits = decoder.step(given)
                assert logits.shape == (rows, 77)
                for i in range(rows):
                    error = relative_error(logits[i], expected[i][at[i]])
                    assert error < TOLERANCE[torch.float32], (i, at)
                    at[i] += 1
        for i in range(5):
            ours, theirs = decoder.get(i), model(tokens[i : i + 1, : at[i]])[1]
            ours.check(model)
            assert ours.tokens_seen == at[i]
            for name, x in theirs.tensors().items():
                assert relative_error(ours.tensors()[name], x) < TOLERANCE[torch.float32], name
        kept, before = decoder.get(0), decoder.get(0).clone().tensors()
        decoder.put(3, kept)
        out = decoder.step([5, 6, 7, 5])
        assert relative_error(out[3], out[0]) < TOLERANCE[torch.float32]
        assert all(torch.equal(x, before[name]) for name, x in kept.tensors().items())


@pytest.mark.parametrize("kind", BATCHED)
def test_a_batch_in_place_is_every_row_alone(kind):
    check_batch_decoder(make(**BATCHED[kind]), "cpu")


@pytest.mark.parametrize("kind", BATCHED)
def test_a_pass_asks_for_no_value(kind, monkeypatch):
    """So that it can be captured: tensors that hold nothing would refuse."""
    monkeypatch.setattr(LanguageModel, "_check_tokens", lambda *_: None)  # looks on a CPU alone
    with FakeTensorMode(), torch.no_grad():
        assert batch_decoder(make(**BATCHED[kind]), 3)._pass().shape == (3, 77)


def test_what_other_rows_hold_leaves_a_rows_bits_alone():
    model = make(**KINDS["both"])
    tokens = torch.randint(77, (4, 6))
    logits = decode(batch_decoder(model, 4), tokens)
    decoder, other = batch_decoder(model, 4), tokens.clone()
    decoder.put(3, model.init_state(1).map(lambda x: x + float("nan")))
    other[1] = 0
    found = decode(decoder, other)
    assert found[3].isnan().all()
    assert torch.equal(found[[0, 2]], logits[[0, 2]])


def test_shifts_in_float32_are_not_rounded_to_a_model_s_dtype():
    model = make(**KINDS["both"])
    state = model(torch.randint(77, (1, 5)))[1].detach()
    decoder = batch_decoder(model.bfloat16(), 2)
    decoder.put(1, state)
    for name, x in decoder.get(1).tensors().items():
        assert torch.equal(x, state.tensors()[name]), name


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    decoder = batch_decoder(make(), 2)
    for name in ("device", "stream", "current_stream", "Stream", "CUDAGraph"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.graph", refuse)
    with pytest.warns(UserWarning, match="no CUDA graph"), torch.no_grad():
        assert decoder._captured() == decoder._pass


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", BATCHED)
def test_a_captured_graph_is_every_row_alone(kind, half):
    model = make(**BATCHED[kind]).cuda()
    if not half:
        check_batch_decoder(model, "cuda")
        return
    store_bfloat16(model)
    tokens, plain, captured = (
        torch.randint(77, (3, 8)),
        make_decoder(model, 3),
        make_decoder(model, 3),
    )
    plain._captured = lambda: plain._pass
    assert torch.equal(decode(captured, tokens), decode(plain, tokens))
    assert captured._run_pass not in (captured._pass, plain._pass)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_graph_on_another_gpu_than_the_current_one():
    check_batch_decoder(make(**KINDS["both"]).to("cuda:1"), "cuda:1")
