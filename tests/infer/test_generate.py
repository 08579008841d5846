"""Generation: streamed text, stop strings, and runs that go on exactly where another stopped."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metastate.data.tokenizer import ByteTokenizer, JsonTokenizer, WorldTokenizer
from metastate.errors import ConfigError, StateError
from metastate.infer.generate import Continuation, generate, num_real_tokens
from metastate.infer.sampling import Sampler, SamplingConfig
from metastate.infer.stops import StopMatcher
from metastate.model.state import ModelState
from tiny_models import tiny

TOKENIZER = ByteTokenizer()
TEXT = "größer → 日本語 🙂 end."  # characters of 1, 2, 3 and 4 bytes


@pytest.fixture(params=["metastate", "transformer"])
def model(request):
    return tiny(architecture=request.param)


@pytest.fixture
def script(monkeypatch):
    """Let the sampler write a given text, byte by byte, whatever the model says."""

    def set_text(text, end=()):
        ids = iter([*text.encode(), *end])
        monkeypatch.setattr(Sampler, "sample", lambda self, logits: next(ids))

    return set_text


def greedy(model, prompt="ab", **kw):
    return generate(model, TOKENIZER, prompt, sampling=SamplingConfig(temperature=0), **kw)


def oracle(model, prompt, n):
    """Greedy tokens by running the whole sequence again for each."""
    tokens = [0, *TOKENIZER.encode(prompt)]
    for _ in range(n):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[-n:]


def test_greedy_equals_running_the_whole_text_again(model):
    run = greedy(model, max_tokens=12)
    text = "".join(run)
    assert run.tokens == oracle(model, "ab", len(run.tokens))
    assert TOKENIZER.decode(run.tokens).startswith(text.rstrip("\ufffd"))
    assert run.statistics.prefill_tokens == 2  # eod and "a"; the last token starts the decoding
    assert run.statistics.decode_tokens == len(run.tokens)


def test_prefill_in_chunks_changes_nothing(model):
    prompt = "a longer prompt that is cut into chunks"
    runs = [greedy(model, prompt, max_tokens=5, prefill_chunk=n) for n in (1, 7, 512)]
    for run in runs:
        list(run)
    assert runs[0].tokens == runs[1].tokens == runs[2].tokens


def test_memory_of_prefill_is_bounded(model, monkeypatch):
    lengths, features = [], model.features

    def counted(tokens, state=None, **kw):
        lengths.append(tokens.shape[1])
        return features(tokens, state, **kw)

    monkeypatch.setattr(model, "features", counted)
    list(greedy(model, "x" * 100, max_tokens=2, prefill_chunk=16))
    assert max(lengths) == 16 and sum(lengths) == 102


@pytest.mark.parametrize("max_tokens", [len(TEXT.encode()) + 1, 99])
def test_pieces_are_whole_characters(model, script, max_tokens):
    script(TEXT, end=[0])
    run = greedy(model, max_tokens=max_tokens)
    assert list(run) == list(TEXT)
    assert run.finish_reason == "eod"


def test_a_character_that_a_document_ends_within_is_told_once(model, script):
    begun, rest = "ß".encode()
    script("a", end=[begun, 0, rest, 0])
    first = greedy(model, max_tokens=9)
    assert "".join(first) == "a\ufffd" and first.finish_reason == "eod"
    second = greedy(model, "", state=first.continuation, max_tokens=9)
    assert "".join(second) == "\ufffd"  # of the byte in the next document


@pytest.mark.parametrize("cut", range(len(TEXT.encode()) + 1))
def test_a_character_cut_by_max_tokens_comes_whole_later(model, script, cut):
    script(TEXT, end=[0])
    first = greedy(model, max_tokens=cut)
    pieces = list(first)
    assert first.finish_reason == "length" and "\ufffd" not in "".join(pieces)
    pieces += greedy(model, "", state=first.continuation, max_tokens=99)
    assert "".join(pieces) == TEXT


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["→"], "größer "),
        (["本語"], "größer → 日"),
        (["語 🙂 e", "zzz"], "größer → 日本"),
        (["xx", "end!"], TEXT),  # begins like a stop string and is none
        (["end", " end"], "größer → 日本語 🙂"),
        (["", TEXT[0]], ""),
    ],
)
def test_stop_strings_are_never_shown(model, script, stops, shown):
    script(TEXT, end=[0])
    run = greedy(model, max_tokens=99, stop=stops)
    seen = ""
    for piece in run:
        seen += piece
        assert shown.startswith(seen)
    assert seen == shown
    assert run.finish_reason == ("eod" if shown == TEXT else "stop")


def test_a_stop_string_begun_in_the_first_run_stops_the_second(model, script):
    script(TEXT, end=[0])
    cut = len("größer → 日本".encode())
    first = greedy(model, max_tokens=cut, stop=["日本語"])
    assert "".join(first) == "größer → 日本"  # shown at the end: it might be all there ever is
    second = greedy(model, "", state=first.continuation, max_tokens=99, stop=["日本語"])
    assert "".join(second) == "" and second.finish_reason == "stop"


def test_a_prompt_between_two_runs_ends_what_may_become_a_stop_string(model, script):
    script("abcd")
    first = greedy(model, max_tokens=2, stop=["abc"]).drain()
    second = greedy(model, "x", state=first.continuation, max_tokens=2, stop=["abc"])
    assert "".join(second) == "cd" and second.finish_reason == "length"


@pytest.mark.parametrize("pieces", [["abcab", "cabd", "x"], list("abcabcabdx"), ["abcabcabdx"]])
def test_stop_matcher_finds_a_match_behind_a_false_start(pieces):
    matcher, out, stopped = StopMatcher(["abcabd"]), "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            break
    assert out == "abc" and stopped


def push_by_definition(matcher, text):
    """What StopMatcher.push means, whatever it costs."""
    matcher.text += text
    starts = [matcher.text.find(s, max(0, matcher.num_shown - len(s) + 1)) for s in matcher.stops]
    found = [i for i in starts if i >= 0]
    if found:
        return matcher._show(min(found)), True
    held = [
        n
        for stop in matcher.stops
        for n in range(1, min(len(stop), len(matcher.text) + 1))
        if matcher.text.endswith(stop[:n])
    ]
    return matcher._show(len(matcher.text) - max(held, default=0)), False


few = st.text("ab", max_size=6)


@given(stops=st.lists(few, max_size=3), shown=few, pieces=st.lists(few, max_size=8))
@settings(max_examples=300)
def test_stop_matcher_equals_its_definition(stops, shown, pieces):
    ours, theirs = StopMatcher(stops, shown), StopMatcher(stops, shown)
    for piece in pieces:
        found = ours.push(piece)
        assert found == push_by_definition(theirs, piece)
        if found[1]:
            break
    assert ours.finish() == theirs.finish()


def test_a_stop_string_that_was_shown_before_it_was_one_is_text(model, script):
    script("abcdefgh")
    first = greedy(model, max_tokens=4, stop=["x" * 9])
    assert "".join(first) == "abcd"
    second = greedy(model, "", state=first.continuation, max_tokens=4, stop=["bc", "x" * 9, "g"])
    assert "".join(second) == "ef" and second.finish_reason == "stop"


@pytest.fixture
def words():
    """Words that hold the space before them, which a text does not show of its first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {"</s>": 0, "<unk>": 1, "▁Hello": 2, "▁world": 3, "▁again": 4, "!": 5}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return JsonTokenizer(tokenizer.to_str().encode(), "words")


@pytest.mark.parametrize("cut", range(4))
def test_prompt_and_text_are_what_one_text_would_be(words, monkeypatch, cut):
    model, ids = tiny(architecture="metastate", vocab_size=words.vocab_size), iter([3, 5, 4] * 2)
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: next(ids))
    assert "".join(generate(model, words, "Hello", max_tokens=3)) == " world! again"
    first = generate(model, words, "Hello", max_tokens=cut)
    pieces = [*first, *generate(model, words, state=first.continuation, max_tokens=3 - cut)]
    assert "".join(pieces) == " world! again"
    ids = iter([3])
    assert "".join(generate(model, words, max_tokens=1)) == "world"  # it begins the text
    assert num_real_tokens(words) == 6  # and 122 of padding


def test_a_prompt_that_ends_inside_a_character_is_not_completed(model, script):
    script("\u20ac")
    assert "".join(generate(model, TOKENIZER, [0xE2], max_tokens=3)) == "€"
    script("b")
    assert "".join(generate(model, TOKENIZER, "a" * 70 + "\ufffd", max_tokens=1)) == "b"


def test_a_penalty_counts_what_was_read_before_it_was_asked_for(model):
    penalty = SamplingConfig(temperature=0, repetition_penalty=2.0)
    whole = generate(model, TOKENIZER, "aabb", sampling=penalty, max_tokens=9).drain()
    before = greedy(model, "aabb", max_tokens=0).drain().continuation
    rest = generate(model, TOKENIZER, state=before, sampling=penalty, max_tokens=9).drain()
    assert rest.tokens == whole.tokens
    assert before.recent == tuple(b"aabb")
    for run in (whole, rest):
        assert run.continuation.recent == (*b"aabb", *run.tokens)


SAMPLED = SamplingConfig(
    temperature=1.3, top_k=40, top_p=0.95, repetition_penalty=1.2, repetition_window=8, seed=5
)


@pytest.mark.parametrize("cut", [0, 1, 9, 20])
def test_saved_and_continued_is_exactly_one_run(model, tmp_path, cut):
    with torch.no_grad():  # a logit of 0 is never among the 40 best: no document ends early
        model.head.weight[0] = 0
    whole = generate(model, TOKENIZER, "ab", sampling=SAMPLED, max_tokens=20)
    text = "".join(whole)
    first = generate(model, TOKENIZER, "ab", sampling=SAMPLED, max_tokens=cut)
    pieces = list(first)
    first.continuation.save(tmp_path / "state", model.config)
    loaded = Continuation.load(tmp_path / "state", model)
    second = generate(
        model, TOKENIZER, "", state=loaded, sampling=SAMPLED, max_tokens=20 - len(first.tokens)
    )
    pieces += second
    assert len(whole.tokens) == 20
    assert first.tokens + second.tokens == whole.tokens
    assert "".join(pieces) == text
    ours, theirs = second.state.tensors(), whole.state.tensors()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_an_interrupted_draw_leaves_no_token_to_be_read_twice(model, monkeypatch):
    run, sample = greedy(model, max_tokens=9), Sampler.sample

    def interrupted(self, logits):
        if run.tokens:
            raise KeyboardInterrupt
        return sample(self, logits)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.drain()
    at = run.continuation
    assert at.state.tokens_seen == 4 and at.pending == ()  # eod, a, b and what was drawn


def test_a_new_seed_draws_anew(model):
    first = generate(model, TOKENIZER, "ab", sampling=SAMPLED, max_tokens=3)
    list(first)

    def tokens(seed):
        config = SamplingConfig(temperature=2.0, seed=seed)
        run = generate(
            model, TOKENIZER, "", state=first.continuation, sampling=config, max_tokens=30
        )
        list(run)
        return run.tokens

    assert tokens(None) == tokens(5) != tokens(6)


def test_continuing_with_a_prompt_reads_the_pending_token_first(model):
    first = greedy(model, max_tokens=4)
    list(first)
    second = greedy(model, "cd", state=first.continuation, max_tokens=6)
    list(second)
    prompt = TOKENIZER.encode("ab") + first.tokens + TOKENIZER.encode("cd")
    one = greedy(model, prompt, max_tokens=6)
    list(one)
    assert second.tokens == one.tokens


def test_the_state_given_is_not_changed(model):
    first = greedy(model, max_tokens=4)
    list(first)
    before = first.state.clone().tensors()
    list(greedy(model, "cd", state=first.continuation, max_tokens=6))
    assert all(torch.equal(v, before[k]) for k, v in first.state.tensors().items())


def test_bare_state_needs_a_prompt(model):
    with torch.no_grad():
        _, state = model(torch.tensor([[0, 97]]))
    with pytest.raises(ConfigError, match="prompt"):
        greedy(model, "", state=state)
    run = greedy(model, "b", state=state, max_tokens=5).drain()
    assert run.tokens == oracle(model, "ab", len(run.tokens))


def test_empty_prompt_starts_a_document(model):
    run = greedy(model, "", max_tokens=5).drain()
    assert run.tokens == oracle(model, "", len(run.tokens))


def test_padding_of_the_vocabulary_is_never_sampled():
    model = tiny(architecture="transformer", vocab_size=300)
    with torch.no_grad():
        model.head.weight[256:] *= 50
    run = generate(
        model, TOKENIZER, "a", sampling=SamplingConfig(temperature=5.0, seed=0), max_tokens=60
    ).drain()
    assert max(run.tokens) < 256
    assert num_real_tokens(TOKENIZER) == 256


def test_ids_that_a_tokenizer_counts_and_has_no_text_for_are_padding(tmp_path):
    path = tmp_path / WorldTokenizer.file_name
    path.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)))
    world = WorldTokenizer(path, fast=False)
    assert num_real_tokens(world) == 257 < world.num_ids


def test_training_mode_and_gradients_are_left_alone(model):
    model.train()
    run = greedy(model, max_tokens=2).drain()
    assert model.training
    assert not any(t.requires_grad for t in run.state.tensors().values())
    pieces = greedy(model, max_tokens=2)
    next(pieces, None)
    assert torch.is_grad_enabled()


def test_refusals(model):
    with pytest.raises(ConfigError, match="max_tokens"):
        greedy(model, max_tokens=-1)
    small = tiny(architecture="transformer", vocab_size=200)
    with pytest.raises(ConfigError, match="256 ids"):
        greedy(small)
    other = "transformer" if model.config.architecture == "metastate" else "metastate"
    run = greedy(tiny(architecture=other), max_tokens=1).drain()
    with pytest.raises(StateError):
        greedy(model, "", state=run.continuation)


def test_broken_notes_are_a_clear_error(model, tmp_path):
    run = greedy(model, max_tokens=1).drain()
    run.state.extra["generation"] = '{"pendin": 3}'
    run.state.save(tmp_path / "state", model.config)
    with pytest.raises(StateError, match="notes"):
        Continuation.load(tmp_path / "state", model)


@pytest.mark.parametrize(
    "change",
    [
        {"pending": [256]},
        {"pending": [-1]},
        {"pending": [True]},
        {"pending": 3},
        {"history": ["a"]},
        {"recent": [1.5]},
        {"shown": 1},
        {"seed": "1"},
        {"seed": 2**64},
        {"generator": "AAAA"},
        {"generator": 7},
        {"generator": base64.b64encode(bytes(5056)).decode()},
        {"state": 1},
        {"unknown": 1},
    ],
    ids=str,
)
def test_notes_that_no_generation_left_are_refused(tmp_path, change):
    model = tiny(architecture="metastate")
    continuation = greedy(model, max_tokens=2).drain().continuation
    continuation.save(tmp_path / "s", model.config)
    state = ModelState.load(tmp_path / "s", model)
    notes = json.loads(state.extra["generation"]) | change
    replace(state, extra={"generation": json.dumps(notes)}).save(tmp_path / "t", model.config)
    with pytest.raises(StateError, match="notes are broken"):
        Continuation.load(tmp_path / "t", model)
