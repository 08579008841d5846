"""The surprise memory: what it writes, and what that is good for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from metastate.config import ModelConfig, fewest_memory_heads
from metastate.convert import blinkdl, fla, states
from metastate.errors import ConfigError, StateError
from metastate.growth import grow
from metastate.layers.surprise_memory import SurpriseMemory
from metastate.mapping import to_dict
from metastate.model.lm import LanguageModel
from metastate.model.loss import lm_loss
from tolerance import TOLERANCE, relative_error


def model_of(heads=2, **fields):
    torch.manual_seed(3)
    fields |= {"vocab_size": 17, "hidden_size": 12, "num_layers": 1, "num_heads": 2}
    return LanguageModel(ModelConfig(memory_heads=heads, **fields)).double().eval()


def test_one_write_is_what_came_under_the_key_of_its_place():
    model = model_of(1)
    memory, h = model.surprise_memory, torch.randn(1, 3, 12, dtype=torch.float64)
    tokens, weight = torch.tensor([[4, 9, 2]]), model.head.weight.detach()
    key = F.normalize((h[0] + memory.center) * memory.scale, dim=-1)
    found, state = memory(h[:, :2], tokens[:, :2], weight, None)
    s = memory.surprise(h[0, :2], weight[tokens[0, 1:]])
    assert (s > 0).all() and (s < 2).all() and abs(s[0] - s[1]) > 1e-3
    M = s[0] * torch.outer(weight[9], key[0])
    assert relative_error(state.M[0, 0], M) < 1e-12
    assert relative_error(found[0, 1], h[0, 1] + key[1] @ M.T * memory.gain) < 1e-12
    w, a = memory.log_w().exp(), torch.sigmoid(memory.rate)
    M = M * w - torch.outer(M @ key[1], a * key[1]) + s[1] * torch.outer(weight[2], key[1])
    assert relative_error(memory(h, tokens, weight, None)[1].M[0, 0], M) < 1e-12


def test_what_was_likely_surprises_less():
    model = model_of(2)
    h, weight = torch.randn(12, dtype=torch.float64), model.head.weight.detach()
    s = model.surprise_memory.surprise(h.expand(17, 12), weight)
    assert torch.equal((weight @ h).argsort(), s[:, 0].argsort(descending=True))


def test_tokens_are_written_without_reading_the_head():
    """No logits but the one product that every model makes."""
    model = model_of(2)
    h = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = model.head.weight.detach().requires_grad_()
    model.surprise_memory(h, torch.tensor([[3, 1, 4, 1, 5]]), weight, None)[0].sum().backward()
    assert {i for i in range(17) if weight.grad[i].any()} == {1, 4, 5}  # 3 came after nothing


def test_a_repeated_text_gets_likelier():
    """Untrained, and with its weights as they are made, a model finds a repeated text likelier."""
    model = model_of(1)
    text = torch.randint(17, (1, 12)).repeat(1, 9)
    with torch.no_grad():
        logits = model(text)[0][0, :-1]
        nll = F.cross_entropy(logits, text[0, 1:], reduction="none")
        model.surprise_memory.gain.zero_()
        without = F.cross_entropy(model(text)[0][0, :-1], text[0, 1:], reduction="none")
    assert nll[-12:].mean() < nll[:12].mean() - 0.1
    assert abs(without[-12:].mean() - without[:12].mean()) < 0.1


def test_its_state_is_as_large_as_config_says():
    for heads in (1, 2, 3):
        config = ModelConfig(hidden_size=12, memory_heads=heads)
        state = SurpriseMemory(config).init_state(5)
        assert state.M.shape == (5, heads, 12 // heads, 12 // heads)
        assert state.num_bytes == 4 * 5 * (12 * 12 // heads + 2 * 12)


def test_flops_and_state_bytes_count_it():
    with_it, without = model_of(2), model_of(None)
    D, N = 12, 6
    forward, backward = (
        a - b for a, b in zip(with_it.flops_per_token(9), without.flops_per_token(9), strict=True)
    )
    asked = 2 * 2 * D  # place and token
    assert forward == 10 * 2 * N * N + 2 * asked
    assert backward == 26 * 2 * N * N + 4 * asked
    for kind in ("metastate", "transformer"):  # what grows with the tokens, and what does not
        sizes = [model_of(n, architecture=kind).state_bytes(3, 5) for n in (2, None)]
        assert sizes[0] - sizes[1] == 8 * 3 * (2 * N * N + 2 * D)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="12 is not a multiple of memory_heads 5"):
        ModelConfig(hidden_size=12, memory_heads=5)


def test_a_config_without_it_is_written_as_before():
    assert "memory_heads" not in to_dict(ModelConfig())
    assert to_dict(ModelConfig(memory_heads=2))["memory_heads"] == 2


def test_a_config_takes_it_and_gives_it_up():
    none = ModelConfig()
    for layer in (None, 2):
        given = none.replace(memory_heads=2, memory_layer=layer)
        assert given.memory_layer == layer and given.replace(memory_heads=None) == none
    deeper = none.replace(memory_heads=2, memory_layer=-1).replace(memory_heads=None, num_layers=9)
    assert deeper == none.replace(num_layers=9)


def test_before_which_block_it_stands():
    inside = ModelConfig(num_layers=3, memory_heads=1, memory_layer=2)
    assert inside.replace(num_layers=5).memory_layer == 4  # the top one is the top one
    assert inside.replace(num_layers=5, memory_layer=2).memory_layer == 2
    assert inside.replace(memory_layer=0).replace(num_layers=5).memory_layer == 0
    assert grow(model_of(memory_layer=0), num_layers=3).config.memory_layer == 0
    assert inside.replace(memory_layer=-1) == inside
    for layer in (-2, 3):
        with pytest.raises(
            ConfigError, match="from 0 to 2, -1 for the top one, or null for before"
        ):
            inside.replace(memory_layer=layer)
    with pytest.raises(ConfigError, match=r"memory_layer needs model\.memory_heads"):
        ModelConfig(memory_layer=0)


def test_it_reads_a_norm_of_what_enters_its_block():
    model, tokens = model_of(2, memory_layer=0), torch.randint(17, (1, 6))
    memory, u = model.surprise_memory, torch.randn(1, 6, 12, dtype=torch.float64)
    for p in memory.norm.parameters():
        torch.nn.init.normal_(p)
    found, state = memory(u, tokens, model.head.weight, None)
    h, memory.norm = memory.norm(u), None
    corrected, other = memory(h, tokens, model.head.weight, None)
    assert relative_error(found - u, corrected - h) < 1e-12
    assert torch.equal(state.features, h[:, -1]) and torch.equal(state.M, other.M)


def test_where_it_stands_inside_reading_leaves_out_what_no_state_needs():
    model, tokens = model_of(2, memory_layer=0, ffn_size=8), torch.randint(17, (1, 6))
    called = []
    model.blocks[0].channel_mix.register_forward_hook(lambda *_: called.append(1))
    read, whole = model.read(tokens), model(tokens)[1]
    assert len(called) == 1
    assert all(torch.equal(x, whole.tensors()[name]) for name, x in read.tensors().items())


def test_states_of_other_models_are_refused():
    with_it, without = model_of(2), model_of(None)
    tokens = torch.tensor([[1, 2]])
    own, other = with_it(tokens)[1], without(tokens)[1]
    with pytest.raises(StateError, match="no surprise memory, the model has one"):
        with_it(tokens, other)
    with pytest.raises(StateError, match="a surprise memory, the model none"):
        without(tokens, own)
    with pytest.raises(StateError, match=r"memory\.M is \[1, 3, 4, 4\]"):
        with_it(tokens, model_of(3)(tokens)[1])
    with pytest.raises(StateError, match="different"):
        own.stack([own, other])


def test_other_layouts_have_no_place_for_it():
    model = model_of(2, architecture="rwkv7", ffn_size=20)
    state = model(torch.tensor([[1, 2]]))[1]
    for convert in (states.to_rwkv, states.to_fla):
        with pytest.raises(StateError, match="no place"):
            convert(state)
    with pytest.raises(StateError, match="no place"):
        states.from_rwkv([], model.config)


def test_no_layout_of_rwkv7_can_hold_it():
    model = model_of(2, architecture="rwkv7", ffn_size=20).float()
    with pytest.raises(ConfigError, match="surprise memory, for which RWKV-7 has no keys"):
        blinkdl.to_rwkv(model)
    with pytest.raises(ConfigError, match="surprise memory, for which that layout has no keys"):
        fla.to_fla(model)


def test_a_grown_memory_learns():
    """Its gain is zero at first, moves in the first step, and then all else of it does."""
    model = grow(model_of(None).float().train(), memory_heads=3)
    tokens = torch.randint(17, (2, 20))
    optimizer = torch.optim.SGD(model.surprise_memory.parameters(), lr=1.0)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        lm_loss(model, tokens[:, :-1], tokens[:, 1:]).loss.backward()
        moved.append({n for n, p in model.surprise_memory.named_parameters() if p.grad.any()})
        optimizer.step()
    assert moved == [{"gain"}, dict(model.surprise_memory.named_parameters()).keys()]


def test_it_is_added_once():
    with pytest.raises(ConfigError, match="has a surprise memory already"):
        grow(model_of(2), memory_heads=4)
    with pytest.raises(ConfigError, match="not a multiple of memory_heads"):
        grow(model_of(None), memory_heads=5)
    assert grow(model_of(2), num_layers=2).config.memory_heads == 2


def test_a_head_that_is_no_plain_one_is_refused():
    """Its weights alone would not be what the logits come from."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = model_of(2)
    head = Doubled(12, 17, bias=False).double()
    head.weight = model.head.weight
    model.head = head
    with pytest.raises(ConfigError, match="reads the weights of the head"):
        model(torch.tensor([[1, 2]]))


def test_its_gradients_are_the_same_whichever_thread_comes_first():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        h, tokens = torch.randn(8, 512, 64), torch.randint(64, (8, 512))
        weight = torch.randn(64, 64, requires_grad=True)
        memory = SurpriseMemory(ModelConfig(hidden_size=64, num_heads=1, memory_heads=1))
        seen = set()
        for _ in range(20):
            loss = memory(h, tokens, weight, None)[0].square().sum()
            seen.add(torch.autograd.grad(loss, weight)[0].numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_autocast_rounds_nothing_in_it(backend):
    model, tokens = model_of(2).float(), torch.randint(17, (2, 9))
    for p in (model.surprise_memory.place, model.surprise_memory.token):
        torch.nn.init.normal_(p)
    h, weight = torch.randn(2, 9, 12), model.head.weight
    args = (h, tokens, weight, None)
    expected, state = model.surprise_memory(*args, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found, other = model.surprise_memory(*args, backend=backend)
    assert torch.equal(found, expected)
    for name, x in vars(state).items():
        assert torch.equal(getattr(other, name), x), name


def test_a_document_takes_m_of_its_start_and_no_last_token():
    model, tokens = model_of(2), torch.randint(17, (1, 9))
    start = model(torch.randint(17, (1, 5)))[1]
    resets = torch.zeros(1, 9, dtype=torch.bool)
    resets[0, 4] = True
    packed, _, _ = model.features(tokens, model.init_state(1), resets=resets, start=start)
    fresh = model.init_state(1)
    memory = replace(fresh.memory, M=start.memory.M)
    layers = [replace(a, S=b.S) for a, b in zip(fresh.layers, start.layers, strict=True)]
    alone, _, _ = model.features(tokens[:, 4:], fresh.with_parts([*layers, memory]))
    assert relative_error(packed[:, 4:], alone) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("width", "heads"),
    [(1, 1), (88, 1), (256, 1), (288, 2), (768, 3), (3072, 12), (514, 1), (10**12, 10**12 // 256)],
)
def test_as_few_heads_as_the_kernels_allow(width, heads):
    assert fewest_memory_heads(width) == heads


def test_a_new_width_has_new_heads():
    config = ModelConfig(hidden_size=768, num_heads=12, memory_heads=3)
    assert config.replace(hidden_size=1536).memory_heads == 6
    assert config.replace(hidden_size=1536, memory_heads=12).memory_heads == 12
    with pytest.raises(ConfigError, match="2147483647 at most"):
        config.replace(hidden_size=12 * 10**12)


def test_the_gpu_kernels_are_told_of_wide_heads():
    memory = SurpriseMemory(ModelConfig(hidden_size=288, num_heads=4, memory_heads=1))
    h, tokens = torch.zeros(1, 1, 288), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="288 channels are too wide for backend 'triton'"):
        memory(h, tokens, torch.zeros(5, 288), None, backend="triton")
