"""The texts of a request: drawn apart, counted, never lost to their state or to each other."""

import asyncio
import contextlib
import json
import os
import time
import types

import httpx
import pytest
import torch
from served import KEYS, LONG, SECOND, TOKENIZER, error_of, make, paced, posting, served, wait

from metastate.cli.serving import warm_up
from metastate.errors import EngineError, StateError
from metastate.infer import openai_feed
from metastate.infer.engine import Engine
from metastate.infer.generate import Continuation, Draft, generate
from metastate.infer.openai_api import OpenAI
from metastate.infer.sampling import SamplingConfig
from metastate.infer.store import StateStore


@pytest.fixture
def pace(monkeypatch):
    return paced(monkeypatch, 0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("states")) as server:
        yield server


def post(server, path="/v1/completions", **body):
    answer = server.client.post(path, json=body)
    assert answer.is_success, answer.text
    return answer.json()


def choices_of(answer):
    """The choices of an answer, whole or streamed: text, finish reason and what came with it."""
    if "text/event-stream" not in answer.headers["content-type"]:
        return answer.json()["choices"]
    events = [json.loads(e[6:]) for e in answer.text.split("\n\n")[:-2]]
    found = {}
    for event in events:
        assert "error" not in event, event
        for choice in event["choices"]:
            own = found.setdefault(choice["index"], {"text": ""})
            found[choice["index"]] = choice | {"text": own["text"] + choice["text"]}
    return [found[i] for i in sorted(found)]


def stop_within(server, **body):
    """A stop string that ends the greedy text of `body` some way in, and what is then shown."""
    text = post(server, **body)["choices"][0]["text"]
    stop = text[40:44]
    return stop, text[: text.index(stop)]


# How texts are drawn.


def test_texts_from_one_state_without_a_seed_all_differ(server):
    id = post(server, "/v1/states", prompt="hello")["id"]
    first = post(server, prompt="x", max_tokens=20, store_state=True)["choices"][0]["state"]
    for state in (id, first):
        fork = post(server, f"/v1/states/{state}/fork")["id"]
        for path, prompt in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            body = prompt | {"max_tokens": 20, "n": 3}
            answers = [post(server, path, state=s, **body) for s in (state, state, fork)]
            texts = [str(c.get("text", c.get("message"))) for a in answers for c in a["choices"]]
            assert len(set(texts)) == 9


@pytest.mark.parametrize("prompt", ["", "yz"])
def test_the_seed_of_a_state_goes_on_exactly_also_behind_a_read_prompt(server, prompt):
    drawn = {"seed": 5, "temperature": 1.1}
    first = post(server, prompt="ab", max_tokens=9, store_state=True, **drawn)["choices"][0]
    straight = post(server, prompt=prompt + "w", max_tokens=9, state=first["state"], **drawn)
    between = post(server, "/v1/states", prompt=prompt, state=first["state"])["id"]
    parted = post(server, prompt="w", max_tokens=9, state=between, **drawn)
    assert straight["choices"][0]["text"] == parted["choices"][0]["text"]


def test_behind_a_stop_string_drawing_goes_on(server):
    body = {"seed": 7, "repetition_penalty": 1.3, "max_tokens": 60}
    text = post(server, prompt="ab", **body)["choices"][0]["text"]
    stop = text[20:23]
    got = post(server, prompt="ab", stop=stop, store_state=True, **body)["choices"][0]
    assert got["finish_reason"] == "stop"
    sampling = SamplingConfig(seed=7, repetition_penalty=1.3)
    run = generate(server.model, TOKENIZER, "ab", sampling=sampling, max_tokens=60, stop=[stop])
    expected = run.drain().continuation
    found = server.store.get("open", got["state"])
    assert found.seed == 7 and found.generator.equal(expected.generator)
    assert bytes(found.recent).decode() == "ab" + got["text"]  # and not the stop string


# What becomes of a text whose state cannot be stored.


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_does_not_take_a_text_that_was_written(tmp_path, pace, stream):
    pace.s = 0
    with served(tmp_path) as server:
        stop, shown = stop_within(server, **LONG | {"max_tokens": 60})
        pace.s = 0.05
        body = LONG | {"stop": stop, "stream": stream, "store_state": True}
        answer = posting(server, body)
        wait(lambda: server.engine.num_running == 1)
        server.engine.max_waiting = 0  # as if as many waited by now
        (choice,) = choices_of(answer.result(120))
        assert (choice["text"], choice["finish_reason"]) == (shown, "stop")
        assert server.store.info("open", choice["state"]).tokens_seen == len("ab" + shown)


@pytest.mark.parametrize("stream", [False, True])
def test_a_store_that_fills_meanwhile_does_not_take_the_text(tmp_path, pace, stream):
    pace.s = 0.05
    with served(tmp_path, store={"max_states": 2}) as server:
        body = LONG | {"max_tokens": 40, "n": 2, "stream": stream, "store_state": True}
        answer = posting(server, body)
        wait(lambda: server.engine.num_running == 2)
        httpx.post(f"{server.url}/v1/states", json={"prompt": "a"}, timeout=120)
        pace.s = 0
        found = choices_of(answer.result(120))
        assert [len(c["text"]) > 9 for c in found] == [True, True]
        assert [c["finish_reason"] for c in found] == ["length", "length"]
        (refused,) = [c for c in found if c["state"] is None]
        assert refused["state_error"]["code"] == "state_limit"
        assert "delete some" in refused["state_error"]["message"]


def test_a_full_disk_does_not_take_the_text(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    got = post(server, prompt="ab", max_tokens=5, temperature=0, store_state=True)["choices"][0]
    monkeypatch.undo()
    assert got["state"] is None and got["state_error"]["code"] == "storage"
    assert got["text"] == post(server, **LONG | {"max_tokens": 5})["choices"][0]["text"]


def test_without_room_for_the_states_nothing_is_written(tmp_path):
    with served(tmp_path, store={"max_states": 2}) as server:
        for fields in ({"n": 3}, {"prompt": ["a", "b", "c"]}):
            body = {"prompt": "a", "max_tokens": 3, "store_state": True} | fields
            answer = server.client.post("/v1/completions", json=body)
            assert error_of(answer, 429)["code"] == "state_limit"
        assert server.engine.totals["generated_tokens"] == 0
        assert len(post(server, prompt="a", max_tokens=3, n=2, store_state=True)["choices"]) == 2
        error_of(server.client.post("/v1/states", json={"prompt": "a"}), 429)
        assert server.engine.totals["length"] == 2


def test_a_state_that_nobody_is_told_of_is_deleted(tmp_path, monkeypatch):
    """Both texts are stored when the answer of the second fails."""
    plain = OpenAI._choice

    def fail(self, feed, index):
        if index:
            raise EngineError("no more")
        return plain(self, feed, index)

    monkeypatch.setattr(OpenAI, "_choice", fail)
    with served(tmp_path) as server:
        body = {"prompt": "a", "max_tokens": 3, "n": 2, "store_state": True}
        error_of(server.client.post("/v1/completions", json=body), 503)
        wait(lambda: not server.client.get("/v1/states").json()["data"])
        monkeypatch.undo()
        assert len(post(server, **body)["choices"]) == 2
        assert len(server.client.get("/v1/states").json()["data"]) == 2


def test_a_stream_that_says_nothing_is_not_taken_for_dead(monkeypatch):
    monkeypatch.setattr(openai_feed, "SILENCE_S", 0.02)

    async def lines():
        yield "data: a\n\n"
        await asyncio.sleep(0.15)
        yield "data: b\n\n"

    async def run():
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            await asyncio.Event().wait()

        stream = openai_feed.EventStream(lines(), types.SimpleNamespace(cancel=lambda: None))
        await stream({}, receive, send)
        return sent

    start, *parts = asyncio.run(run())
    assert (b"x-accel-buffering", b"no") in start["headers"]
    bodies = [part["body"] for part in parts]
    assert bodies[0] == b"data: a\n\n" and bodies[-2:] == [b"data: b\n\n", b""]
    assert len(bodies) > 4 and set(bodies[1:-2]) == {b": waiting\n\n"}


def test_storing_one_text_does_not_hold_up_the_others(tmp_path, pace, monkeypatch):
    pace.s = 0
    with served(tmp_path, max_behind=40) as server:
        prompts = ["ab", "cd"]
        texts = [
            c["text"]
            for c in post(server, **LONG | {"prompt": prompts, "max_tokens": 200})["choices"]
        ]
        stop = next(
            texts[0][i : i + 4] for i in range(9, 60) if texts[0][i : i + 4] not in texts[1]
        )
        add, pace.s = server.store.add, 0.01

        def slow(*args):
            time.sleep(2.5)  # in which the other text gets twice that far
            return add(*args)

        monkeypatch.setattr(server.store, "add", slow)
        body = {"prompt": prompts, "max_tokens": 200, "temperature": 0, "stop": stop}
        answer = server.client.post(
            "/v1/completions", json=body | {"stream": True, "store_state": True}
        )
        first, second = choices_of(answer)
        assert first["text"] == texts[0][: texts[0].index(stop)] and second["text"] == texts[1]
        assert [c["finish_reason"] for c in (first, second)] == ["stop", "length"]
        assert {s["id"] for s in stored(server)} == {first["state"], second["state"]}


def stored(server):
    return server.client.get("/v1/states").json()["data"]


# How many texts a key may have at once.


def test_nothing_long_is_done_where_all_requests_are_answered(server, monkeypatch):
    id, called = post(server, "/v1/states", prompt="hello")["id"], []

    def watched(kind, name):
        whole = getattr(kind, name)

        def call(*args, **kw):
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()  # which a thread beside it does not have
                pytest.fail(f"{name} holds up the loop")
            called.append(name)
            return whole(*args, **kw)

        monkeypatch.setattr(kind, name, call)

    watched(Draft, "__init__")
    watched(StateStore, "_check_room")
    watched(Continuation, "save")
    body = {"prompt": "ab", "max_tokens": 60, "temperature": 0}
    stop, _ = stop_within(server, **body)
    post(server, **body, state=id, store_state=True)
    post(server, **body, stop=stop, store_state=True)
    post(server, "/v1/states", prompt="more", state=id)
    assert set(called) == {"__init__", "_check_room", "save"}


def test_the_prompt_of_many_texts_is_read_once(server):
    before = server.engine.totals["prompt_tokens"]
    got = post(server, prompt="x" * 50, n=4, max_tokens=3, temperature=0)
    assert server.engine.totals["prompt_tokens"] == before + 50
    assert len({choice["text"] for choice in got["choices"]}) == 1


def test_a_penalty_counts_what_a_state_has_read(server):
    prompt, penalty = "the state reads itself", {"temperature": 0, "repetition_penalty": 1.8}
    whole = post(server, prompt=prompt, max_tokens=20, **penalty)["choices"][0]["text"]
    id = post(server, "/v1/states", prompt=prompt)["id"]
    got = post(server, prompt="", state=id, max_tokens=20, **penalty)
    assert got["choices"][0]["text"] == whole


def test_broken_weights_are_no_clients_mistake(tmp_path):
    model = make()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(StateError, match="not finite"):
        warm_up(Engine(model, TOKENIZER))
    with served(tmp_path, model) as server:
        answer = server.client.post("/v1/completions", json={"prompt": "ab"})
        assert error_of(answer, 500)["code"] == "broken_model"
        assert answer.headers["x-should-retry"] == "false"  # as OpenAI's clients would


def test_texts_are_counted_not_requests(tmp_path, pace):
    with served(tmp_path, keys=KEYS, max_concurrent=2) as server:
        for fields in ({"n": 3}, {"prompt": ["a"] * 3}):
            answer = server.client.post("/v1/completions", json=LONG | fields)
            assert "at most 2" in error_of(answer, 400)["message"]
        body = LONG | {"stream": True, "n": 2}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # httpx would close the stream with it
            next(lines)
            refused = server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert error_of(refused, 429)["code"] == "too_many_requests"
            body = {"prompt": "a", "max_tokens": 1}
            assert server.client.post("/v1/completions", json=body, headers=SECOND).is_success
        wait(lambda: server.engine.num_running == 0)
        assert server.client.post("/v1/completions", json=body).is_success
