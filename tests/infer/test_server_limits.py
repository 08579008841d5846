"""What the server does not let through: too much, too often, too slow; and who goes away."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import KEYS, LONG, SECOND, error_of, paced, posting, served, wait

from metastate.infer.store import StateStore
from metastate.model.lm import LanguageModel


@pytest.fixture(autouse=True)
def pace(monkeypatch):
    return paced(monkeypatch, 0.0)


@contextlib.contextmanager
def raw(server, text=b""):
    """A bare connection that has sent `text`."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(text)
        yield connection


def request(body, *, length=None, path="/v1/completions"):
    """An HTTP request as bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def read_all(connection):
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65536):
            found += block
    return found


def idle(server):
    return server.engine.num_running == server.engine.num_waiting == 0


def test_bodies_are_limited_with_and_without_a_length(tmp_path):
    with served(tmp_path, max_body_bytes=1000) as server:
        fine = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(1000)
        headers = {"content-type": "application/json"}
        post = server.client.post
        assert post("/v1/completions", content=fine, headers=headers).status_code == 200
        answer = post("/v1/completions", content=fine + b" ", headers=headers)
        assert error_of(answer, 413)["code"] == "body_too_long"
        pieces = iter([fine, b" "])  # chunked, without Content-Length
        answer = post("/v1/completions", content=pieces, headers=headers)
        assert error_of(answer, 413)["code"] == "body_too_long"
        assert post("/v1/completions", content=iter([fine]), headers=headers).status_code == 200
        with raw(server, request(b"", length=10**15)) as connection:
            assert b" 413 " in connection.recv(100)
        with raw(server, request(b"", length=-1)) as connection:
            assert b" 400 " in connection.recv(100)


def test_uploads_have_a_limit_of_their_own(tmp_path):
    with served(tmp_path, max_body_bytes=1000, max_prompt_tokens=10, max_tokens=10) as server:
        limit = server.model.state_bytes(1, 20) + 2**20
        answer = server.client.post("/v1/states/upload", content=bytes(limit))
        error_of(answer, 400)
        answer = server.client.post("/v1/states/upload", content=bytes(limit + 1))
        error_of(answer, 413)
        error_of(server.client.post("/v1/states", content=bytes(1001)), 413)


def test_prompts_are_limited(tmp_path):
    with served(tmp_path, max_prompt_tokens=50) as server:
        for path in ("/v1/completions", "/v1/states", "/v1/inspect"):
            assert server.client.post(path, json={"prompt": "x" * 50}).is_success
            answer = server.client.post(path, json={"prompt": "x" * 51})
            assert error_of(answer, 413)["code"] == "prompt_too_long"
        body = {"messages": [{"role": "user", "content": "x" * 50}]}
        error_of(server.client.post("/v1/chat/completions", json=body), 413)


def test_a_body_must_arrive_in_time(tmp_path):
    half = b'{"prompt"'
    with served(tmp_path, body_timeout_s=2) as server:
        with raw(server, request(half, length=100)) as connection:
            assert b" 408 " in connection.recv(100)
        error_of(server.client.post("/v1/completions", content=half), 400)


def test_a_generation_must_end_in_time(tmp_path, pace):
    pace.s = 0.02
    with served(tmp_path, timeout_s=2) as server:
        assert error_of(server.client.post("/v1/completions", json=LONG), 408)["code"] == "timeout"
        text = server.client.post("/v1/completions", json=LONG | {"stream": True}).text
        events = text.split("\n\n")
        assert json.loads(events[-3][6:])["error"]["code"] == "timeout"
        assert events[-2] == "data: [DONE]" and len(events) > 3
        wait(lambda: idle(server))


def test_the_whole_request_must_end_in_time(tmp_path, pace):
    pace.s = 0.02
    limits = {"timeout_s": 1, "body_timeout_s": 0.5, "send_timeout_s": 0.5}
    with served(tmp_path, **limits) as server:
        server.engine.make = lambda *a, make=server.engine.make, timeout_s, **kw: make(
            *a, **kw
        )  # the engine's own limit does not hold
        error_of(server.client.post("/v1/completions", json=LONG), 408)
        with pytest.raises(httpx.RemoteProtocolError):
            server.client.post("/v1/completions", json=LONG | {"stream": True})
        wait(lambda: idle(server))


def test_one_key_cannot_take_everything(tmp_path, pace):
    pace.s = 0.02
    with served(tmp_path, keys=KEYS, max_concurrent=2) as server, contextlib.ExitStack() as open:
        lines = []
        for _ in range(2):
            body = LONG | {"stream": True}
            stream = server.client.stream("POST", "/v1/completions", json=body)
            lines.append(open.enter_context(stream).iter_lines())
            assert next(lines[-1])
        answer = server.client.post("/v1/completions", json=LONG)
        assert error_of(answer, 429)["code"] == "too_many_requests"
        assert answer.headers["retry-after"] == "1"
        body = {"prompt": "a", "max_tokens": 1}
        assert server.client.post("/v1/completions", json=body, headers=SECOND).is_success


def test_a_full_queue_is_429_and_takes_no_part_of_a_request(tmp_path, pace):
    pace.s = 0.01
    with served(tmp_path, engine={"max_slots": 1, "max_waiting": 2}) as server:
        answer = server.client.post("/v1/completions", json=LONG | {"n": 9, "max_tokens": 50})
        assert error_of(answer, 429)["code"] == "busy"
        wait(lambda: idle(server))
        assert server.client.post("/v1/completions", json=LONG | {"max_tokens": 2}).is_success


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(tmp_path, pace, stream):
    pace.s = 0.02
    with served(tmp_path, engine={"max_slots": 1}) as server:
        with raw(server, request(LONG | {"stream": stream})) as connection:
            if stream:
                connection.recv(100)
            wait(lambda: server.engine.num_running == 1)
            with raw(server, request(LONG | {"stream": stream})):  # this one waits in the queue
                wait(lambda: server.engine.num_waiting == 1)
            wait(lambda: server.engine.num_waiting == 0)
            assert server.engine.num_running == 1
        wait(lambda: idle(server))
        assert server.engine.totals["cancelled"] == 2
        body = {"prompt": "a", "max_tokens": 1}
        assert server.client.post("/v1/completions", json=body).is_success


def test_a_client_that_goes_away_while_its_state_is_made(tmp_path, pace):
    with served(tmp_path, engine={"prefill_chunk": 1}) as server:
        body = request({"prompt": "x" * 30_000}, path="/v1/states")
        with raw(server, body):
            wait(lambda: server.engine.num_running == 1)
        wait(lambda: idle(server))
        assert server.client.get("/v1/states").json()["data"] == []
        wait(lambda: counted(server, "/v1/states") == {"200", "499"})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/states", {"prompt": "ab"}),
        ("/v1/completions", {"prompt": "ab", "max_tokens": 2, "store_state": True}),
    ],
)
def test_a_state_whose_id_nobody_was_told_is_not_kept(tmp_path, monkeypatch, path, body):
    began, left, added = threading.Event(), threading.Event(), threading.Event()
    add = StateStore.add

    def slow(self, *args):
        began.set()
        assert left.wait(60)
        state = add(self, *args)
        added.set()
        return state

    monkeypatch.setattr(StateStore, "add", slow)
    with served(tmp_path) as server:
        with raw(server, request(body, path=path)):
            wait(began.is_set)
        wait(lambda: counted(server, path) == {"499"})
        left.set()
        wait(lambda: added.is_set() and server.store.totals() == (0, 0))
    assert not list(tmp_path.rglob("state-*"))


def counted(server, route):
    """The statuses that /metrics tells of a route."""
    told = server.client.get("/metrics").text
    return set(re.findall(rf'requests_total{{route="{route}",status="(\d+)"', told))


def test_a_client_that_goes_away_while_its_prompt_is_inspected(tmp_path, monkeypatch):
    read = []
    features = LanguageModel.features

    def slow(self, *args):
        read.append(1)
        time.sleep(0.05)
        return features(self, *args)

    with served(tmp_path) as server:
        monkeypatch.setattr(LanguageModel, "features", slow)
        with raw(server, request({"prompt": "x" * 400}, path="/v1/inspect")):
            wait(lambda: len(read) > 2)
        # The next inspection has its turn at once; the first would have taken 20 s.
        assert server.client.post("/v1/inspect", json={"prompt": "ab"}).is_success
        assert len(read) < 200
        wait(lambda: counted(server, "/v1/inspect") == {"200", "499"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_says_that_the_engine_failed(tmp_path, monkeypatch):
    with served(tmp_path) as server:
        monkeypatch.setattr(server.engine, "_decode", lambda: 1 / 0)
        error_of(server.client.post("/v1/completions", json=LONG), 503)
        wait(lambda: server.engine.fault is not None)
        told = server.client.get("/healthz")
        assert told.status_code == 503 and "division" in told.json()["reason"]
        error_of(server.client.post("/v1/completions", json=LONG), 503)


def test_a_slow_reader_loses_its_slot(tmp_path, monkeypatch):
    with served(tmp_path, max_behind=20, send_timeout_s=2) as server:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(120)
            connection.connect(("127.0.0.1", server.port))
            shrink(server)
            body = LONG | {"n": 8, "max_tokens": 4000, "stream": True, "logprobs": 20}
            connection.sendall(request(body))
            wait(lambda: server.engine.totals["cancelled"] == 8)
            assert server.engine.totals["length"] == 0
            text = read_all(connection).decode()
        assert '"code": "slow_reader"' in text


def shrink(server):
    """Give the server's side of every connection a small buffer, so that a reader can be slow."""
    wait(lambda: server.server.server_state.connections)
    for protocol in list(server.server.server_state.connections):
        other = protocol.transport.get_extra_info("socket")
        other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)


def test_streams_of_many_clients_are_never_mixed(tmp_path):
    with served(tmp_path, max_concurrent=64, engine={"max_slots": 5}) as server:
        prompts = [f"{i:02d} and so on" for i in range(12)]
        body = {"max_tokens": 24, "temperature": 0}
        expected = [
            server.client.post("/v1/completions", json=body | {"prompt": p}).json() for p in prompts
        ]

        async def stream(client, prompt):
            found = ""
            fields = body | {"prompt": prompt, "stream": True}
            async with client.stream("POST", "/v1/completions", json=fields) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        found += json.loads(line[6:])["choices"][0]["text"]
            return found

        async def all_at_once():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await asyncio.gather(*(stream(client, p) for p in prompts))

        assert asyncio.run(all_at_once()) == [e["choices"][0]["text"] for e in expected]


def test_other_sites_and_names_are_refused_without_keys(tmp_path):
    with served(tmp_path, hosts=("127.0.0.1", "localhost", "::1")) as server:
        get = server.client.get
        port = server.port
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", f"LOCALHOST:{port}"):
            assert get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", ""):
            answer = get("/v1/models", headers={"host": host})
            assert answer.status_code in (400, 403)
        assert get("/v1/models", headers={"origin": server.url}).status_code == 200
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
            answer = get("/v1/models", headers={"origin": origin})
            assert error_of(answer, 403)["code"] == "wrong_origin"
        preflight = server.client.options(
            "/v1/models",
            headers={"origin": server.url, "access-control-request-method": "POST"},
        )
        assert "access-control-allow-origin" not in preflight.headers


def test_stopping_ends_streams_with_a_reason(tmp_path, pace):
    pace.s = 0.02
    with served(tmp_path, grace_s=0.5) as server:
        lines = []

        def read():
            body = LONG | {"stream": True}
            with server.client.stream("POST", "/v1/completions", json=body) as answer:
                lines.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        wait(lambda: lines)
        server.server.should_exit = True
        reader.join(120)
    assert server.engine.totals["generated_tokens"] < LONG["max_tokens"]
    assert json.loads(lines[-2][6:])["error"]["code"] == "stopping" and lines[-1] == "data: [DONE]"


def test_stopping_lets_what_is_nearly_done_finish(tmp_path, pace):
    pace.s = 0.05
    with served(tmp_path, grace_s=120) as server:
        body = {"prompt": "a", "max_tokens": 40, "store_state": True}
        answer = posting(server, body)
        wait(lambda: server.engine.num_running == 1)
        server.server.should_exit = True
        answer = answer.result(120)
    assert answer.status_code == 200
    (stored,) = tmp_path.rglob("*.safetensors")
    assert stored.stem == answer.json()["choices"][0]["state"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**63), 10**40, "\ud800", "", "\x00", "tiny", "state-" + "0" * 24]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "n",
    "stop",
    "stream",
    "stream_options",
    "state",
    "store_state",
    "logprobs",
    "top_logprobs",
    "repetition_penalty",
    "tools",
    "user",
]
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "tool"]) | JSON, "content": JSON, "name": JSON}
)
BODIES = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from([0, 1, 3, -1, None, 1e300])},
    optional={name: JSON for name in FIELDS if name != "max_tokens"}
    | {"messages": st.lists(MESSAGE, max_size=3), "prompt": JSON | st.text(max_size=50)},
)
ROUTES = st.sampled_from(
    ["/v1/completions", "/v1/chat/completions", "/v1/states", "/v1/states/upload", "/v1/inspect"]
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    with served(tmp_path_factory.mktemp("states"), store={"max_states": 20}) as server:
        yield server


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(path=ROUTES, body=BODIES.map(json.dumps) | JSON.map(json.dumps) | st.binary(max_size=200))
def test_no_body_is_a_mistake_of_ours(fuzzed, path, body):
    headers = {"content-type": "application/json"}
    answer = fuzzed.client.post(path, content=body, headers=headers)
    assert answer.status_code in (200, 201, 400, 404, 413, 429), answer.text
    if answer.status_code >= 400:
        error_of(answer, answer.status_code)
    if "text/event-stream" in answer.headers["content-type"]:
        assert answer.text.endswith("data: [DONE]\n\n")
    assert idle(fuzzed) or wait(lambda: idle(fuzzed)) is None
