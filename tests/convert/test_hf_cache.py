"""One text that was read once, gone on with in several rows."""

import copy

import pytest
import torch
from hf_models import CONFIGS, RECURRENT, language_model

from metastate.convert.hf import MetaStateCache, MetaStateForCausalLM
from metastate.errors import StateError
from tolerance import TOLERANCE, relative_error


def tokens(batch, length, seed=0):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS)
def model(request):
    model = MetaStateForCausalLM.wrap(language_model(request.param))
    model.generation_config.eos_token_id = None
    return model


def same(x, expected):
    return relative_error(x, expected) <= TOLERANCE[expected.dtype]


def test_each_row_is_its_own_run(model):
    prefix, new = tokens(1, 7), tokens(3, 5, seed=1)
    read = model(prefix).past_key_values
    cache = copy.copy(read)
    out = model(new, past_key_values=cache)
    assert cache.batch_size == 3 and cache.get_seq_length() == 12 and read.batch_size == 1
    again = model(new[:, :1], past_key_values=cache)
    for i in range(3):
        alone = model(torch.cat([prefix[0], new[i], new[i, :1]])[None]).logits[0]
        assert same(out.logits[i], alone[7:12]) and same(again.logits[i, 0], alone[12])
    forgotten = copy.copy(read)
    model(new, past_key_values=forgotten, use_cache=False)
    assert forgotten.batch_size == 1


@torch.no_grad()
def test_a_row_alone_goes_on_in_the_cache_s_own_memory():
    """One that is copied whole for every token would cost more the longer it is."""
    model = MetaStateForCausalLM.wrap(language_model("transformer"))
    cache = model(tokens(1, 7)).past_key_values
    model(tokens(1, 1), past_key_values=cache)  # which makes room
    places = set()
    for _ in range(2):
        model(tokens(1, 1), past_key_values=cache)
        places.add(cache.state.layers[0].keys.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("name", RECURRENT)
def test_padding_of_the_one_row_and_of_the_new_ones_is_skipped(name):
    model = MetaStateForCausalLM.wrap(language_model(name))
    prefix, new = tokens(1, 7), tokens(2, 5, seed=1)
    mask, behind = torch.ones(1, 7), torch.ones(2, 5)
    mask[:, :2], behind[0, 1] = 0, 0
    cache = model(prefix, attention_mask=mask).past_key_values
    whole = torch.cat([mask.expand(2, -1), behind], 1)
    out = model(new, past_key_values=cache, attention_mask=whole)
    assert torch.equal(cache.mask, whole.bool())
    for i in range(2):
        row = torch.cat([prefix[0, 2:], new[i][behind[i].bool()]])
        assert same(out.logits[i, -1], model(row[None]).logits[0, -1])


@pytest.mark.parametrize("more", [{}, {"num_return_sequences": 3}], ids=["one", "all"])
def test_beams_from_a_state(model, more):
    ids, settings = tokens(1, 11), {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    whole = model.generate(ids, **settings, **more)
    _, state = model.model(ids[:, :8])
    out = model.generate(ids[:, 8:], past_key_values=MetaStateCache(state), **settings, **more)
    assert torch.equal(out[:, 3:], whole[:, 11:])


def test_sampling_several_texts_from_a_state(model):
    ids, settings = tokens(1, 11), {"num_return_sequences": 3, "max_new_tokens": 6}
    found = []
    for past, text in ((None, ids), (ids[:, :8], ids[:, 8:])):
        cache = None if past is None else MetaStateCache(model.model(past)[1])
        torch.manual_seed(2)
        out = model.generate(
            text, past_key_values=cache, do_sample=True, top_k=20, temperature=9.0, **settings
        )
        found.append(out[:, text.shape[1] :])
    assert torch.equal(*found) and not torch.equal(found[0][0], found[0][1])


def test_other_numbers_of_rows_are_still_refused(model):
    cache = model(tokens(2, 4)).past_key_values
    with pytest.raises(StateError, match="2 rows"):
        model(tokens(3, 2), past_key_values=cache)
