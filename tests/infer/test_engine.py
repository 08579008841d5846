"""The engine: whatever joins, leaves, fails or is late, every request gets its own text."""

import functools
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metastate.config import MetaStateConfig
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import BusyError, ConfigError, EngineError, ShapeError, StateError
from metastate.infer.engine import Engine
from metastate.infer.generate import generate
from metastate.infer.sampling import SamplingConfig
from metastate.model.decode import NativeDecoder
from tiny_models import tiny

TOKENIZER = ByteTokenizer()
GREEDY = SamplingConfig(temperature=0)
CHUNK = 4


@functools.cache
def make(architecture):
    fields = {} if architecture == "transformer" else {"ffn_size": 24}
    if architecture == "both":
        architecture, fields["meta_state"] = "metastate", MetaStateConfig(readout="both")
    if architecture == "metastate":
        fields["ffn_order"] = "after"
    model = tiny(architecture=architecture, hidden_size=32, **fields).eval()
    model.backend = "auto"
    return model


@pytest.fixture
def model():
    return make("metastate")


@pytest.fixture
def engine(model):
    return Engine(model, TOKENIZER, max_slots=3, prefill_chunk=CHUNK)


def alone(model, prompt, **kw):
    return generate(model, TOKENIZER, prompt, prefill_chunk=CHUNK, **kw)


def run(engine, limit=10_000):
    while engine.step():
        limit -= 1
        assert limit, "the engine does not come to an end"


def same_state(ours, theirs):
    ours, theirs = ours.state.tensors(), theirs.state.tensors()
    return all(torch.equal(ours[name], x) for name, x in theirs.items())


requests = st.fixed_dictionaries(
    {
        "prompt": st.text("abc é\n", max_size=14),
        "max_tokens": st.integers(0, 12),
        "stop": st.lists(st.text("abe ", min_size=1, max_size=2), max_size=2),
        "sampling": st.builds(
            SamplingConfig,
            temperature=st.sampled_from([0.0, 0.7, 1.5]),
            top_k=st.sampled_from([0, 20]),
            top_p=st.sampled_from([0.9, 1.0]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            seed=st.integers(0, 5),
        ),
        "continued": st.booleans(),  # go on from the state of a run before
        "wait": st.integers(0, 4),  # steps before it is submitted
        "end": st.sampled_from([None, None, None, "cancelled", "deadline"]),
        "after": st.integers(0, 12),  # steps until that end
    }
)


@pytest.mark.parametrize("architecture", ["metastate", "both", "rwkv7", "transformer"])
@given(plan=st.lists(requests, min_size=1, max_size=8), slots=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_every_request_equals_its_run_alone(architecture, plan, slots):
    model = make(architecture)
    engine = Engine(model, TOKENIZER, max_slots=slots, prefill_chunk=CHUNK)
    assert isinstance(engine._decoder, NativeDecoder) == (architecture != "transformer")
    before = alone(model, "before", sampling=GREEDY, max_tokens=3).drain().continuation
    jobs, todo, steps = [], list(plan), 0
    while todo or any(job.finish_reason is None for _, job, _ in jobs):
        while todo and todo[0]["wait"] <= 0:
            request = todo.pop(0)
            names = ("prompt", "max_tokens", "stop", "sampling")
            arguments = {name: request[name] for name in names}
            arguments["state"] = before if request["continued"] else None
            job = engine.submit(**arguments, timeout_s=1e6)
            jobs.append(({"arguments": arguments, **request}, job, steps))
        if todo:
            todo[0]["wait"] -= 1
        for request, job, since in jobs:
            if request["end"] and steps - since >= request["after"]:
                if request["end"] == "cancelled":
                    job.cancel()
                else:
                    job._deadline = 0.0
        engine.step()
        steps += 1
        reading = any(not r["max_tokens"] and not job.finish_reason for r, job, _ in jobs)
        assert steps < 1000 and engine.num_running <= slots + reading
    for request, job, _ in jobs:
        whole = alone(model, **request["arguments"])
        text = "".join(whole)
        if job.finish_reason in ("cancelled", "deadline"):
            assert job.finish_reason == request["end"]
            # What it wrote before its end, and a later run writes the rest.
            assert whole.tokens[: len(job.tokens)] == job.tokens
            left = request["max_tokens"] - len(job.tokens)
            arguments = request["arguments"] | {"prompt": "", "state": job.continuation}
            rest = alone(model, **arguments | {"max_tokens": left}).drain()
            assert job.tokens + rest.tokens == whole.tokens
        else:
            assert job.finish_reason == whole.finish_reason
            assert job.tokens == whole.tokens and job.result() == text
            assert same_state(job.continuation, whole.continuation)
            assert job.continuation.pending == whole.continuation.pending
    counts = engine.totals
    assert sum(counts[job.finish_reason] > 0 for _, job, _ in jobs) == len(jobs)
    assert counts["generated_tokens"] == sum(len(job.tokens) for _, job, _ in jobs)


def test_a_request_that_writes_nothing_needs_no_slot(model):
    engine = Engine(model, TOKENIZER, max_slots=1, prefill_chunk=CHUNK)
    writes = engine.submit("a", sampling=GREEDY, max_tokens=9)
    while not writes.tokens:
        engine.step()
    reads = engine.submit("b" * 3 * CHUNK, max_tokens=0)
    engine.step()
    assert engine.num_running == 2 and reads.statistics.prefill_tokens > 0
    run(engine)
    assert writes.finish_reason and same_state(
        reads.continuation, alone(model, "b" * 3 * CHUNK, max_tokens=0).drain().continuation
    )


def test_a_broken_request_ends_alone(model, engine):
    broken = model.init_state(1).map(lambda x: x + float("nan"))
    good = [engine.submit(text, sampling=GREEDY, max_tokens=9) for text in ("ab", "cd")]
    bad = engine.submit("xyz", state=broken, sampling=GREEDY)
    run(engine)
    assert bad.finish_reason == "error" and isinstance(bad.error, StateError)
    assert bad.continuation is None and bad.tokens == []
    with pytest.raises(StateError, match="not finite"):
        bad.result()
    with pytest.raises(StateError):
        list(bad)
    for job, text in zip(good, ("ab", "cd"), strict=True):
        assert job.tokens == alone(model, text, sampling=GREEDY, max_tokens=9).drain().tokens
    assert engine.totals["error"] == 1 and engine.num_running == 0


def test_an_error_of_the_model_ends_what_ran_and_not_the_engine(model, engine, monkeypatch, caplog):
    jobs = [engine.submit(text, sampling=GREEDY) for text in ("ab", "cd")]
    while engine.num_running < 2:
        engine.step()

    def fail(tokens):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "step", fail)
        engine.step()
    assert [job.finish_reason for job in jobs] == ["error", "error"]
    assert [str(record.exc_info[1]) for record in caplog.records] == ["no memory"] * 2
    later = engine.submit("ab", sampling=GREEDY, max_tokens=4)
    run(engine)
    assert later.tokens == alone(model, "ab", sampling=GREEDY, max_tokens=4).drain().tokens


def test_refusals_come_at_once(model, engine):
    with pytest.raises(ConfigError, match="max_tokens"):
        engine.submit("a", max_tokens=-1)
    with pytest.raises(ConfigError, match="timeout_s"):
        engine.submit("a", timeout_s=0)
    with pytest.raises(ShapeError, match="256"):
        engine.submit([3, 256])
    with pytest.raises(ConfigError, match="prompt"):
        engine.submit("", state=replace(model.init_state(1), tokens_seen=1))
    with pytest.raises(StateError):
        engine.submit("a", state=make("transformer").init_state(1))
    with pytest.raises(StateError, match="2 rows"):
        engine.submit("a", state=model.init_state(2))
    with pytest.raises(ConfigError, match="max_slots"):
        Engine(model, TOKENIZER, max_slots=0)
    assert engine.num_waiting == 0


def test_too_many_waiting_are_refused(model):
    engine = Engine(model, TOKENIZER, max_slots=1, max_waiting=2)
    for _ in range(2):
        engine.submit("a", max_tokens=1)
    with pytest.raises(BusyError, match="2 requests"):
        engine.submit("a")
    engine.step()
    engine.submit("a", max_tokens=1)
    run(engine)
    assert sum(engine.totals[reason] for reason in ("length", "eod")) == 3


def test_what_goes_ahead_is_never_refused_and_reading_needs_no_slot(model):
    engine = Engine(model, TOKENIZER, max_slots=1, max_waiting=1)
    running = engine.submit("a", max_tokens=50, sampling=GREEDY)
    engine.step()
    waiting = engine.submit("b", max_tokens=1)
    reading = engine.submit("c" * 20, max_tokens=0, ahead=True)
    engine.step()
    assert reading.finish_reason == "length" and reading.continuation.state.tokens_seen == 20
    assert running.finish_reason is None and waiting.finish_reason is None
    run(engine)
    assert waiting.finish_reason is not None


def test_what_waits_can_be_cancelled_and_be_late(model):
    engine = Engine(model, TOKENIZER, max_slots=1)
    first = engine.submit("a", sampling=GREEDY, max_tokens=50)
    waits, late = engine.submit("b"), engine.submit("c", timeout_s=1e-9)
    engine.step()
    waits.cancel()
    engine.step()
    assert (waits.finish_reason, late.finish_reason) == ("cancelled", "deadline")
    assert first.finish_reason is None
    going_on = alone(model, "", state=waits.continuation, sampling=GREEDY, max_tokens=5).drain()
    assert going_on.tokens == alone(model, "b", sampling=GREEDY, max_tokens=5).drain().tokens


def test_events_come_in_order_and_late_listeners_get_all(model, engine):
    job, events = engine.submit("ab", sampling=GREEDY, max_tokens=9), []
    job.on_event(events.append)
    run(engine)
    assert events[-1] is None and "".join(events[:-1]) == job.result() == "".join(job)
    late = []
    job.on_event(late.append)
    assert late == events


def test_logprobs_are_the_models_own(model, engine):
    job = engine.submit("ab", sampling=SamplingConfig(seed=1), max_tokens=4, want_logprobs=True)
    run(engine)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[0, *b"ab", *job.tokens]]))
    expected = logits[0, 2:-1].log_softmax(-1)
    for i, (token, (own, best)) in enumerate(zip(job.tokens, job.logprobs, strict=True)):
        assert own == pytest.approx(float(expected[i, token]), abs=1e-4)
        assert best[0][0] == int(expected[i].argmax())
    assert engine.submit("a").logprobs is None


@pytest.mark.parametrize("length", [0, 1, 2, 3 * CHUNK + 1])
def test_log_probabilities_of_a_prompt_however_it_is_read(model, engine, length):
    prompt = [(7 * i) % 120 + 1 for i in range(length)]
    jobs = [engine.submit(prompt, max_tokens=2, num_prompt_logprobs=n) for n in (3, 3, None, 0)]
    run(engine)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[0, *prompt]]))
    expected = logits[0, :-1].log_softmax(-1)
    for job, num_best in zip(jobs, (3, 3, None, 0), strict=True):
        found = job.prompt_logprobs
        if num_best is None:
            assert found is None
            continue
        assert len(found) == length
        for row, token, (own, best) in zip(expected, prompt, found, strict=True):
            assert own == pytest.approx(float(row[token]), abs=1e-4)
            assert [token for token, _ in best] == row.topk(num_best).indices.tolist()


def test_the_first_token_behind_a_state_without_a_pending_one_has_no_log_probability(model, engine):
    with torch.no_grad():
        logits, state = model(torch.tensor([[0, 5]]))
    job = engine.submit([7, 9], state=state, max_tokens=0, num_prompt_logprobs=0)
    run(engine)
    first, second = job.prompt_logprobs
    with torch.no_grad():
        expected = model(torch.tensor([[7]]), state)[0][0, 0].log_softmax(-1)
    assert first is None and second[0] == pytest.approx(float(expected[9]), abs=1e-4)


def test_in_a_thread_of_its_own(model):
    engine = Engine(model, TOKENIZER, max_slots=4, prefill_chunk=CHUNK)
    engine.start()
    results = {}

    def ask(i):
        config = SamplingConfig(temperature=1.0, seed=i)
        results[i] = engine.submit(f"request {i}", sampling=config, max_tokens=10).result(60)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.stop()
    for i in range(12):
        config = SamplingConfig(temperature=1.0, seed=i)
        assert results[i] == "".join(alone(model, f"request {i}", sampling=config, max_tokens=10))
    with pytest.raises(BusyError, match="stopped"):
        engine.submit("a")


@pytest.mark.parametrize("started", [False, True])
def test_stop_cancels_what_there_is(model, started):
    engine = Engine(model, TOKENIZER)
    config = SamplingConfig(temperature=0.1, seed=0)
    jobs = [engine.submit([97] * 3, sampling=config, max_tokens=400) for _ in range(3)]
    if started:
        engine.start()
    engine.stop()
    assert {job.finish_reason for job in jobs} <= {"cancelled", "eod"} and engine.num_running == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_leaves_nobody_waiting(model, monkeypatch):
    engine = Engine(model, TOKENIZER, max_slots=1, prefill_chunk=CHUNK)
    jobs = [engine.submit("ab", max_tokens=500) for _ in range(3)]

    def broken():
        raise MemoryError("planted")

    monkeypatch.setattr(engine, "_decode", broken)
    engine.start()
    for job in jobs:
        with pytest.raises(EngineError, match="planted"):
            job.result(20)
        assert job.finish_reason == "error"
    assert isinstance(engine.fault, MemoryError) and engine.num_running == 0
    with pytest.raises(EngineError, match="start it anew"):
        engine.submit("a")
    engine.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("name", "healthy_calls"), [("put", 0), ("put", 2), ("get", 0)])
def test_a_row_that_cannot_be_moved_leaves_nobody_waiting(model, monkeypatch, name, healthy_calls):
    engine = Engine(model, TOKENIZER, max_slots=2, prefill_chunk=CHUNK)
    whole, left = getattr(engine._decoder, name), iter(range(healthy_calls))

    def broken(*args):
        if next(left, None) is None:
            raise MemoryError("planted")
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, name, broken)
        jobs = [engine.submit("ab", max_tokens=n, sampling=GREEDY) for n in (3, 500, 3)]
        engine.start()
        for job in jobs:
            with pytest.raises(EngineError, match="planted"):
                job.result(60)
        engine.stop()
    engine.start()  # anew, as the error says
    assert engine.fault is None
    expected = alone(model, "ab", sampling=GREEDY, max_tokens=3).drain().tokens
    job = engine.submit("ab", sampling=GREEDY, max_tokens=3)
    job.result(60)
    engine.stop()
    assert job.tokens == expected


@pytest.mark.parametrize("architecture", ["metastate", "transformer"])
@pytest.mark.parametrize("continued", [False, True])
def test_one_prompt_of_many_texts_is_read_once(architecture, continued):
    model, prompt = make(architecture), "a prompt of many texts"
    before = alone(model, "before", sampling=GREEDY, max_tokens=3).drain().continuation
    settings = [{"sampling": SamplingConfig(seed=i), "max_tokens": i % 3 * 4} for i in range(6)] + [
        {"sampling": GREEDY, "max_tokens": 2}
    ]
    engine = Engine(model, TOKENIZER, max_slots=2, prefill_chunk=CHUNK)
    jobs = [engine.submit(prompt, state=before if continued else None, **s) for s in settings]
    other = engine.submit(prompt, state=None if continued else before, max_tokens=0)
    run(engine)
    for job, s in zip(jobs, settings, strict=True):
        single = alone(model, prompt, state=before if continued else None, **s).drain()
        assert job.tokens == single.tokens and same_state(job.continuation, single.continuation)
    assert other.statistics.prefill_tokens and jobs[0].statistics.prefill_tokens
    assert engine.totals["prompt_tokens"] == 2 * len(prompt)
    assert not any(job.statistics.prefill_tokens for job in jobs[1:])


def test_one_prompt_behind_two_states_is_read_behind_each(model):
    states = [alone(model, text, max_tokens=0).drain().continuation for text in ("ab", "cb")]
    assert states[0].pending == states[1].pending == (98,)
    engine = Engine(model, TOKENIZER, max_slots=1, prefill_chunk=CHUNK)
    settings = {"sampling": GREEDY, "max_tokens": 2}
    jobs = [engine.submit("a prompt", state=state, **settings) for state in states]
    run(engine)
    for job, state in zip(jobs, states, strict=True):
        single = alone(model, "a prompt", state=state, **settings).drain()
        assert job.tokens == single.tokens and same_state(job.continuation, single.continuation)


def test_result_gives_up_and_the_request_goes_on(model, engine):
    job = engine.submit("ab", sampling=GREEDY, max_tokens=3)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        job.result(0.05)
    assert time.monotonic() - started < 5
    run(engine)
    assert len(job.result(1)) >= 0 and job.finish_reason is not None


def test_an_idle_engine_sleeps_and_wakes(model, engine):
    assert not engine.step()
    engine.start()
    with pytest.raises(ConfigError, match="already"):
        engine.start()
    time.sleep(0.05)
    job = engine.submit("ab", sampling=GREEDY, max_tokens=3)
    assert job.result(30) is not None
    engine.stop()
