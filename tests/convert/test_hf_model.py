"""Our models as transformers' models: logits, cache, padding, generation, loss."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from hf_models import CONFIGS, RECURRENT, SIZES, language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, TextIteratorStreamer

from metastate.config import MetaStateConfig as LayerOptions
from metastate.config import ModelConfig
from metastate.convert.hf import MetaStateCache, MetaStateConfig, MetaStateForCausalLM
from metastate.errors import ConfigError, ShapeError, StateError
from metastate.layers.common import RecurrentState
from metastate.model.loss import lm_loss
from tolerance import TOLERANCE, relative_error

ALL = pytest.mark.parametrize("name", CONFIGS)


def assert_same(x, expected):
    assert x.shape == expected.shape
    assert relative_error(x, expected) <= TOLERANCE[expected.dtype]


def wrapped(name="metastate"):
    return MetaStateForCausalLM.wrap(language_model(name))


def tokens(batch=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (batch, length), generator=generator)


def padded(rows, side):
    """Return rows of unequal length as one batch and its mask; padding has an impossible id."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), -1)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@ALL
def test_logits_and_state_are_the_language_models_own(name):
    model = wrapped(name)
    out = model(tokens())
    expected, state = model.model(tokens())
    assert torch.equal(out.logits, expected)
    for key, x in out.past_key_values.state.tensors().items():
        assert torch.equal(x, state.tensors()[key])
    assert model.config.model_config == model.model.config


@ALL
def test_a_cache_goes_on_where_it_stopped(name):
    model, ids = wrapped(name), tokens()
    whole = model(ids).logits
    first = model(ids[:, :7])
    cache = first.past_key_values
    assert cache.get_seq_length() == 7 and cache.batch_size == 2 and len(cache) == 2
    fork = copy.copy(cache)
    rest = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(7, 12)]
    assert_same(torch.cat([first.logits, *rest], 1), whole)
    assert cache.get_seq_length() == 12 and fork.get_seq_length() == 7
    again = model(ids[:, 7:], past_key_values=fork).logits
    assert_same(again, whole[:, 7:])


def test_use_cache_says_whether_there_is_one():
    model, ids = wrapped(), tokens()
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 12
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None
    cache = MetaStateCache()
    model(ids, past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1


def test_cache_rows_are_chosen_repeated_and_forgotten():
    model, ids = wrapped(), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    S = cache.state.layers[0].S
    chosen = copy.copy(cache)
    chosen.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(chosen.state.layers[0].S, S[[2, 0, 0]])
    assert chosen.mask.all()
    chosen = copy.copy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    assert chosen.batch_size == 1 and chosen.mask.sum() == 8
    chosen = copy.copy(cache)
    chosen.batch_repeat_interleave(2)
    assert torch.equal(chosen.state.layers[0].S, S[[0, 0, 1, 1, 2, 2]])
    chosen.reset()
    assert chosen.state is None and chosen.get_seq_length() == 0
    assert torch.equal(cache.state.layers[0].S, S)
    with pytest.raises(StateError, match="cannot take 2 tokens back"):
        cache.crop(-2)
    cache.crop(0)
    with pytest.raises(StateError, match="holds no keys and values"):
        cache.update(S, S, 0)


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(name, side):
    model = wrapped(name)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    for i, row in enumerate(rows):
        alone = model(row[None], output_hidden_states=True)
        own = mask[i].bool()
        assert_same(out.logits[i, own], alone.logits[0])
        for x, y in zip(out.hidden_states, alone.hidden_states, strict=True):
            assert_same(x[i, own], y[0])
        # Both caches, the padded one and the row's own, are the state after the last token.
        one = copy.copy(out.past_key_values)
        one.batch_select_indices(torch.tensor([i]))
        following = [
            model(row[:1, None], past_key_values=c).logits for c in (one, alone.past_key_values)
        ]
        assert_same(*following)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=3)
)
def test_padding_may_stand_anywhere(columns):
    model, mask = wrapped("with-M"), torch.tensor(columns)
    ids = tokens(len(columns), 6)
    out = model(ids, attention_mask=mask)
    for i, own in enumerate(mask):
        alone = model(ids[i, own][None])
        assert_same(out.logits[i, own], alone.logits[0])
        assert_same(
            out.past_key_values.state[i].layers[1].M, alone.past_key_values.state.layers[1].M
        )


@pytest.mark.parametrize("name", RECURRENT)
def test_padding_behind_a_cache_is_skipped_row_by_row(name):
    model = wrapped(name)
    ids, mask = tokens(3, 10), torch.ones(3, 10, dtype=torch.int64)
    mask[0, :2] = 0  # in the first call
    mask[1, 7:] = 0  # in the second
    mask[2, 5:] = 0  # nothing in the second
    first = model(ids[:, :5], attention_mask=mask[:, :5])
    cache = first.past_key_values
    out = model(ids[:, 5:], attention_mask=mask, past_key_values=cache, output_hidden_states=True)
    assert cache.get_seq_length() == 10 and torch.equal(cache.mask, mask.bool())
    assert len(out.hidden_states) == 3
    for i in range(3):
        own = mask[i].bool()
        alone = model(ids[i, own][None])
        logits = torch.cat([first.logits, out.logits], 1)[i, own]
        assert_same(logits, alone.logits[0])
        for x, y in zip(cache.state[i].layers, alone.past_key_values.state.layers, strict=True):
            assert isinstance(x, RecurrentState)
            assert_same(x.S, y.S)
    # The cache remembers which columns were padding, so another mask is not silently ignored.
    following = torch.ones(3, 1, dtype=torch.int64)
    model(ids[:, :1], attention_mask=torch.cat([mask, following], 1), past_key_values=cache)
    with pytest.raises(StateError, match="hides other columns"):
        model(ids[:, :1], attention_mask=torch.ones(3, 12), past_key_values=cache)


def test_a_mask_that_cannot_be_kept_is_refused():
    model, ids = wrapped(), tokens()
    with pytest.raises(ShapeError, match=r"attention_mask must be \[2, 12\]"):
        model(ids, attention_mask=torch.ones(2, 1, 12, 12))
    nothing = torch.ones_like(ids)
    nothing[1] = 0
    with pytest.raises(ShapeError, match="row 1 of attention_mask is padding alone"):
        model(ids, attention_mask=nothing)
    attention = wrapped("transformer")
    cache = attention(ids).past_key_values
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with pytest.raises(ConfigError, match="cannot skip padding behind a cache"):
        attention(ids, attention_mask=mask, past_key_values=cache)


@ALL
def test_packed_documents_do_not_see_each_other(name):
    model, ids = wrapped(name), tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    out = model(ids, position_ids=positions).logits
    parts = [model(ids[:, a:b]).logits for a, b in ((0, 5), (5, 8), (8, 12))]
    assert_same(out, torch.cat(parts, 1))
    with pytest.raises(ConfigError, match="count up by 1"):
        model(ids, position_ids=positions * 2)
    with pytest.raises(ShapeError, match="position_ids must be"):
        model(ids, position_ids=positions[:, :3])


@ALL
def test_hidden_states_are_what_enters_each_block(name):
    model, ids = wrapped(name), tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    x = model.model.embedding(ids)
    expected = model.model.ln0(x) if name in RECURRENT else x
    torch.testing.assert_close(out.hidden_states[0], expected)
    torch.testing.assert_close(model.model.head(out.hidden_states[-1]), out.logits)
    assert not model.model.blocks[0]._forward_pre_hooks
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)


def test_logits_to_keep():
    model, ids = wrapped(), tokens()
    every = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:])
    at = torch.tensor([0, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=at).logits, every[:, at])


def test_what_the_model_cannot_do_is_refused():
    model, ids = wrapped(), tokens()
    for arguments, message in [
        ({"inputs_embeds": torch.zeros(2, 12, 16)}, "inputs_embeds are not supported"),
        ({"output_attentions": True}, "no attention weights"),
        ({"token_type_ids": ids}, "'token_type_ids' is no input"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model(ids, **arguments)
    with pytest.raises(ConfigError, match="takes input_ids"):
        model()
    with pytest.raises(StateError, match="a MetaStateCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(StateError, match="the state holds 2 rows"):
        model(ids[:1], past_key_values=model(ids).past_key_values)
    with pytest.raises(ShapeError, match="token ids run from"):
        model(ids + 256)
    with pytest.raises(ShapeError, match="input_ids must be"):
        model(ids[0])
    with pytest.raises(ConfigError, match="never tied"):
        MetaStateConfig(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="hidden_size belongs inside `model`"):
        MetaStateConfig(hidden_size=32)


# Generation


def alone(model, row, **settings):
    return model.generate(row[None], max_new_tokens=8, do_sample=False, **settings)[0, len(row) :]


@ALL
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_left_padded_batches_generate_what_single_rows_do(name, settings):
    model = wrapped(name)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    ids, mask = padded(rows, "left")
    out = model.generate(
        ids.clamp_min(0), attention_mask=mask, max_new_tokens=8, do_sample=False, **settings
    )
    for i, row in enumerate(rows):
        expected = alone(model, row, **settings)
        assert torch.equal(out[i, ids.shape[1] :][: len(expected)], expected)


@pytest.mark.parametrize("name", RECURRENT)
def test_right_padded_batches_generate_what_single_rows_do(name):
    """The first new token needs the logits of each row's last token, all others only the state."""
    model = wrapped(name)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    ids, mask = padded(rows, "right")
    out = model(ids, attention_mask=mask)
    cache, last = out.past_key_values, mask.sum(1) - 1
    found = [out.logits[torch.arange(3), last].argmax(-1)]
    for _ in range(7):
        logits = model(found[-1][:, None], past_key_values=cache).logits
        found.append(logits[:, -1].argmax(-1))
    model.generation_config.eos_token_id = None
    for i, row in enumerate(rows):
        assert torch.equal(torch.stack(found, 1)[i], alone(model, row))


@ALL
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate_refuses_padding_on_the_right(name, settings):
    model, rows = wrapped(name), [tokens(1, n, seed=n)[0] for n in (9, 4)]
    ids, mask = padded(rows, "right")
    with pytest.raises(ConfigError, match="a row .* ends with padding.*pad on the left"):
        model.generate(ids.clamp_min(0), attention_mask=mask, max_new_tokens=2, **settings)
    with pytest.raises(ConfigError, match="pad on the left"):  # here transformers makes the mask
        model.generate(ids.clamp_min(0), max_new_tokens=2, pad_token_id=0, eos_token_id=1)


@ALL
def test_sampling_is_reproducible_and_streams(name):
    model, ids = wrapped(name), tokens(1)
    settings = {"max_new_tokens": 6, "do_sample": True, "top_k": 20, "temperature": 0.7}
    torch.manual_seed(3)
    out = model.generate(ids, num_return_sequences=2, **settings)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, num_return_sequences=2, **settings), out)

    class Collector:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer = Collector()
    out = model.generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.seen == [*out[0].tolist(), "end"]
    assert TextIteratorStreamer  # the same protocol


def test_generate_reads_each_token_once_and_goes_on_from_a_cache(monkeypatch):
    model, ids = wrapped(), tokens(1)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    lengths, features = [], model.model.features

    def counted(tokens, state=None, **kw):
        lengths.append(tokens.shape[1])
        return features(tokens, state, **kw)

    monkeypatch.setattr(model.model, "features", counted)
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert lengths == [12, 1, 1]
    cache = out.past_key_values
    assert isinstance(cache, MetaStateCache) and cache.get_seq_length() == 14
    more = model.generate(out.sequences, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert lengths == [12, 1, 1, 1, 1, 1, 1, 1] and torch.equal(more, whole)
    # A bare state reads only what is new.
    _, state = model.model(ids[:, :8])
    out = model.generate(
        ids[:, 8:], past_key_values=MetaStateCache(state), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(out[:, 4:], whole[:, 12:])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_prefill_in_chunks():
    model, ids = wrapped(), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=MetaStateCache(),
        prefill_chunk_size=4,
        max_new_tokens=6,
        do_sample=False,
    )
    assert torch.equal(out, whole)


# Learning


@ALL
def test_loss_is_lm_loss_of_the_shifted_labels(name):
    model, ids = wrapped(name), tokens()
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels=labels)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = lm_loss(model.model, ids, targets)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    )
    assert out.logits.shape == (2, 12, 256)
    n = expected.num_tokens
    for divisor in (5, torch.tensor(5)):
        total = model(ids, labels=labels, num_items_in_batch=divisor).loss
        torch.testing.assert_close(total, out.loss * n / 5)
    for wrong in (labels[:, :3], labels.float(), labels + 1000):
        with pytest.raises(ShapeError, match="labels must be"):
            model(ids, labels=wrong)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_kl_term_of_a_variational_encoder_does_not_see_padding(side, monkeypatch):
    options = LayerOptions(encoder="cross", variational=True, kl_weight=1.0)
    fields = SIZES | {"parameter_tokens": 2, "meta_state": options}
    monkeypatch.setitem(CONFIGS, "variational", ModelConfig(**fields))
    model, rows = wrapped("variational"), [tokens(1, n, seed=n)[0] for n in (9, 4)]
    losses = [model(row[None], labels=row[None]).loss for row in rows]
    terms = [model.model.features(row[None])[2] for row in rows]
    ids, mask = padded(rows, side)
    for i in (0, 1):
        one = {"attention_mask": mask[i : i + 1], "labels": ids[i : i + 1].clamp_min(0)}
        assert_same(model(ids[i : i + 1], **one).loss, losses[i])
    out = model(ids, attention_mask=mask, labels=ids.clamp_min(0))
    scored = (8 * (losses[0] - terms[0]) + 3 * (losses[1] - terms[1])) / 11
    assert_same(out.loss, scored + (9 * terms[0] + 4 * terms[1]) / 13)
    out.loss.backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "token_" in n)
    step = model(tokens(2, 1), past_key_values=out.past_key_values)
    assert step.past_key_values.get_seq_length() == 10


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_do_not_depend_on_padding(side):
    model = wrapped("with-M")
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4)]
    ids, mask = padded(rows, side)
    model(ids, attention_mask=mask, labels=ids.clamp_min(0)).loss.backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    (sum(losses) / 11).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(found[key], p.grad, rtol=1e-3, atol=1e-6)


def test_gradients_in_eval_mode_and_through_a_cache():
    model, ids = wrapped(), tokens()
    assert not model.training
    out = model(ids[:, :6], use_cache=True)
    model(ids[:, 6:], labels=ids[:, 6:], past_key_values=out.past_key_values).loss.backward()
    truncated = model.model.embedding.weight.grad.clone()
    assert truncated[ids[0, 0]].abs().sum() > 0  # through the state, to the first token
    assert all(p.grad is not None for p in model.parameters())


@ALL
def test_gradient_checkpointing_changes_memory_not_gradients(name):
    model, ids = wrapped(name).train(), tokens()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing and model.model.activation_checkpointing
    model(ids, labels=ids).loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing and not model.model.activation_checkpointing


@ALL
def test_bfloat16_weights(name):
    """Rounded weights compute, learn and generate; float32 with the same weights is near."""
    rounded = wrapped(name).bfloat16()
    exact = copy.deepcopy(rounded).float()
    ids = tokens()
    out = rounded(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert relative_error(out.logits, exact(ids).logits) < 5 * TOLERANCE[torch.bfloat16]
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in rounded.parameters())
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert rounded.generate(ids, attention_mask=mask, max_new_tokens=3).shape == (2, 15)
    with torch.autocast("cpu", torch.bfloat16):
        loss = exact(ids, labels=ids).loss
    assert relative_error(loss, out.loss) < 5 * TOLERANCE[torch.bfloat16]


def test_a_wrapped_head_is_called_not_read():
    """An adapter on the head must reach the loss, which otherwise takes the weight itself."""
    model, ids = wrapped(), tokens()

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Doubled(16, 256, bias=False)
    head.weight = model.model.head.weight
    model.set_output_embeddings(head)
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("name", ["metastate", "memory"])
def test_the_vocabulary_can_be_resized(name, tmp_path):
    model, ids = wrapped(name), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(260)
    assert model.config.vocab_size == model.model.config.vocab_size == 260
    after = model(torch.cat([ids, torch.full((2, 1), 259)], 1)).logits
    torch.testing.assert_close(after[:, :12, :256], before)
    model.save_pretrained(tmp_path)
    again = MetaStateForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert again.model.head.weight.shape == (260, 16)


def test_without_transformers_the_extra_is_named(monkeypatch):
    for module in ("hf", "hf_types"):
        monkeypatch.delitem(sys.modules, f"metastate.convert.{module}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'metastate\[hf\]'"):
        __import__("metastate.convert.hf")
