"""Stored states: exact, forked, uploaded, limited, private, and there again after a restart."""

import json
import os
import struct

import httpx
import pytest
import safetensors
import safetensors.torch
import torch
from served import KEYS, TOKENIZER, error_of, make, served

from metastate.errors import BusyError
from metastate.infer.generate import Continuation, generate
from metastate.infer.sampling import SamplingConfig
from metastate.infer.store import StateStore
from state_files import signed

GREEDY = {"temperature": 0}
SECOND = {"authorization": f"Bearer {KEYS[1]}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("states"), keys=KEYS) as server:
        yield server


def complete(server, prompt, max_tokens, **fields):
    """The only choice of a greedy completion that stores its state."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "store_state": True} | GREEDY | fields
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def alone(server, prompt, max_tokens, **kw):
    sampling = kw.pop("sampling", SamplingConfig(temperature=0))
    run = generate(server.model, TOKENIZER, prompt, max_tokens=max_tokens, sampling=sampling, **kw)
    return "".join(run)


def test_going_on_from_a_state_is_one_run(server):
    first = complete(server, "ab", 9)
    second = complete(server, "", 11, state=first["state"])
    assert first["text"] + second["text"] == alone(server, "ab", 20)


def test_a_drawn_text_goes_on_with_its_generator(server):
    sampling = {"temperature": 1.2, "seed": 5, "top_k": 50}
    first = complete(server, "ab", 9, **sampling)
    second = complete(server, "", 11, state=first["state"], **sampling)
    assert first["text"] + second["text"] == alone(
        server, "ab", 20, sampling=SamplingConfig(**sampling)
    )


def test_a_state_made_of_a_prompt(server):
    answer = server.client.post("/v1/states", json={"prompt": "abcd"})
    assert answer.status_code == 201
    state = answer.json()
    assert state["object"] == "state" and state["bytes"] > 0 and state["tokens_seen"] == 4
    assert complete(server, "ef", 9, state=state["id"])["text"] == alone(server, "abcdef", 9)
    more = server.client.post("/v1/states", json={"prompt": [101, 102], "state": state["id"]})
    assert complete(server, "", 9, state=more.json()["id"])["text"] == alone(server, "abcdef", 9)


def test_a_stored_state_has_read_what_was_returned_and_nothing_else(server):
    text = alone(server, "ab", 30)
    cut = complete(server, "ab", 30, stop=text[10:13])
    shown = text[: text.index(text[10:13])]
    assert cut["text"] == shown and cut["finish_reason"] == "stop"
    after = complete(server, "cd", 9, state=cut["state"])
    assert after["text"] == alone(server, "ab" + shown + "cd", 9)


def test_the_end_of_a_document_is_not_in_the_stored_state(tmp_path):
    model = make()
    run = generate(model, TOKENIZER, "ab", max_tokens=9, sampling=SamplingConfig(temperature=0))
    last = run.drain().tokens[-1]
    with torch.no_grad():  # greedy, the end of document takes that token's place
        model.head.weight[0], model.head.weight[last] = model.head.weight[last].clone(), 0
    with served(tmp_path, model) as server:
        got = complete(server, "ab", 40)
        assert got["finish_reason"] == "stop" and len(got["text"]) < 9
        read = server.client.post("/v1/states", json={"prompt": "ab" + got["text"]}).json()["id"]
        texts = [complete(server, "x", 9, state=s)["text"] for s in (got["state"], read)]
        assert texts[0] == texts[1]


def test_a_chat_carried_by_its_state_is_the_whole_chat(server):
    def chat(messages, **fields):
        body = {"messages": messages, "max_tokens": 12, "store_state": True} | GREEDY | fields
        return server.client.post("/v1/chat/completions", json=body).json()["choices"][0]

    first = chat([{"role": "user", "content": "a"}])
    second = chat([{"role": "user", "content": "b"}], state=first["state"])
    prompt = "User: a\n\nAssistant:"
    prompt += alone(server, prompt, 12) + "\n\nUser: b\n\nAssistant:"
    assert second["message"]["content"] == alone(server, prompt, 12).lstrip()


def test_streams_give_the_state_of_every_choice(server):
    body = {"prompt": "ab", "max_tokens": 5, "n": 2, "seed": 1, "stream": True, "store_state": True}
    lines = server.client.post("/v1/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in lines[:-2]]
    ends = [c for c in chunks if c["finish_reason"]]
    assert len({c["state"] for c in ends}) == 2 and {c["index"] for c in ends} == {0, 1}


def test_fork_download_upload_delete(server):
    client = server.client
    id = complete(server, "ab", 4)["state"]
    fork = client.post(f"/v1/states/{id}/fork")
    assert fork.status_code == 201 and fork.json()["id"] != id
    file = client.get(f"/v1/states/{id}/file")
    assert file.headers["content-disposition"] == f'attachment; filename="{id}.safetensors"'
    assert client.delete(f"/v1/states/{id}").json() == {
        "id": id,
        "object": "state",
        "deleted": True,
    }
    for call in (client.get, client.delete):
        assert error_of(call(f"/v1/states/{id}"), 404)["code"] == "state_not_found"
    uploaded = client.post("/v1/states/upload", content=file.content)
    assert uploaded.status_code == 201
    rest = alone(server, "ab", 12)[4:]
    for state in (fork.json()["id"], uploaded.json()["id"]):
        assert complete(server, "", 8, state=state)["text"] == rest
        listed = client.get("/v1/states").json()["data"]
        assert state in [s["id"] for s in listed]
        assert client.get(f"/v1/states/{state}").json() in listed


def test_the_command_line_reads_a_downloaded_state(server, tmp_path):
    id = complete(server, "ab", 4)["state"]
    (tmp_path / "s").write_bytes(server.client.get(f"/v1/states/{id}/file").content)
    state = Continuation.load(tmp_path / "s", server.model)
    assert alone(server, "", 8, state=state) == alone(server, "ab", 12)[4:]


def test_inspector_routes(server, tmp_path):
    id = complete(server, "ab", 4)["state"]
    told = server.client.get(f"/v1/states/{id}/inspect").json()
    assert told["tokens_seen"] == 6 and len(told["layers"]) == 2
    told = server.client.post("/v1/inspect", json={"prompt": "xyz", "state": id}).json()
    assert [t["text"] for t in told["tokens"]][1:] == ["x", "y", "z"]  # behind the pending token
    # A start that has read nothing is read from as it is written from: behind an end of document.
    server.model.init_state(1).save(tmp_path / "start", server.model)
    content = (tmp_path / "start").read_bytes()
    start = server.client.post("/v1/states/upload", content=content).json()["id"]
    behind = server.client.post("/v1/inspect", json={"prompt": "xyz", "state": start}).json()
    own = server.client.post("/v1/inspect", json={"prompt": "xyz"}).json()
    assert behind["tokens"] == own["tokens"]
    error_of(server.client.post("/v1/inspect", json={"prompt": ""}), 400)
    error_of(server.client.post("/v1/inspect", json={"prompt": "x" * 600}), 400)
    error_of(server.client.get("/v1/states/state-0/inspect"), 404)


def test_no_key_sees_anothers_states(server):
    id = complete(server, "ab", 4)["state"]
    with httpx.Client(base_url=server.url, headers=SECOND, timeout=120) as other:
        assert id not in other.get("/v1/states").text
        refused = [
            other.get(f"/v1/states/{id}"),
            other.get(f"/v1/states/{id}/file"),
            other.get(f"/v1/states/{id}/inspect"),
            other.post(f"/v1/states/{id}/fork"),
            other.delete(f"/v1/states/{id}"),
            other.post("/v1/states", json={"prompt": "a", "state": id}),
            other.post("/v1/inspect", json={"prompt": "a", "state": id}),
            other.post("/v1/completions", json={"prompt": "a", "state": id}),
            other.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "a"}], "state": id},
            ),
        ]
        unknown = other.get("/v1/states/" + "state-" + "0" * 24)
    for answer in refused:
        said = error_of(answer, 404)["message"]
        assert said.replace(id, "") == unknown.json()["error"]["message"].replace(
            "state-" + "0" * 24, ""
        )
    assert server.client.get(f"/v1/states/{id}").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong-key-0123456789"},
        {"authorization": f"Bearer {KEYS[0]}x"},
        {"authorization": f"Bearer {KEYS[0][:-1]}"},
        {"authorization": f"Basic {KEYS[0]}"},
        {"authorization": KEYS[0]},
        {"x-api-key": KEYS[0]},
        {"authorization": b"Bearer \xff\xfe"},
    ],
    ids=str,
)
def test_without_a_key_nothing_is_said(server, headers):
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        for path in ("/v1/models", "/v1/states", "/v1/none", "/metrics"):
            assert error_of(client.get(path), 401)["code"] == "invalid_api_key"
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert error_of(answer, 401)["type"] == "authentication_error"
        for path in ("/healthz", "/"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("id", ["..", "%2e%2e%2fsecret", "a/b", "state-" + "f" * 24, "%00", "é"])
def test_ids_are_no_paths(server, id):
    assert server.client.get(f"/v1/states/{id}/file").status_code == 404
    body = {"prompt": "a", "state": id}
    assert error_of(server.client.post("/v1/completions", json=body), 404)["param"] == "state"


def packed(header, data=b""):
    """A safetensors file of any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture(scope="module")
def good(server):
    """A state's file, its header and its tensors."""
    id = complete(server, "ab", 4)["state"]
    content = server.client.get(f"/v1/states/{id}/file").content
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])["__metadata__"]
    return content, header, safetensors.torch.load(content)


def hostile(good):
    content, header, tensors = good
    save = signed

    def notes(**change):
        extra = json.loads(header["extra"])
        generation = json.loads(extra["generation"]) | change
        extra = extra | {"generation": json.dumps(generation)}
        return save(tensors, header | {"extra": json.dumps(extra)})

    def changed(name, fn):
        return save(tensors | {name: fn(tensors[name]).clone()}, header)

    S = "layers.0.S"
    yield b""
    yield b"x" * 100
    yield content[:-1]
    yield content[:50]
    yield content + b"\0"
    yield struct.pack("<Q", 2**63) + b"{}"
    yield struct.pack("<Q", 90_000_000) + b"{}"
    yield packed(b"{")
    yield packed(b"[" * 100_000)
    yield packed({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000")
    yield packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000")
    yield packed({"__metadata__": header})
    yield save(tensors, header | {"config": "0" * 64})
    yield save(tensors, header | {"tokens_seen": "-3"})
    yield save(tensors, header | {"tokens_seen": "9" * 6000})
    yield save(tensors, header | {"extra": "[" * 100_000})
    yield save(tensors, header | {"extra": "null"})
    yield save(tensors)
    yield changed(S, lambda x: x * torch.nan)
    yield changed(S, lambda x: x / 0)
    yield changed(S, lambda x: x.to(torch.float8_e4m3fn))
    yield changed(S, lambda x: x.long())
    yield changed(S, lambda x: x.to(torch.complex64))
    yield changed(S, lambda x: x[:, :1])
    yield changed(S, lambda x: x[:0])
    yield changed(S, lambda x: x[0, 0, 0, 0])
    yield save({k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in tensors.items()}, header)
    yield save({k: v for k, v in tensors.items() if k != S}, header)
    yield notes(pending=[256])
    yield notes(pending=[-1])
    yield notes(pending=[0.5])
    yield notes(pending="abc")
    yield notes(recent=[[1]])
    yield notes(history=[10**400])
    yield notes(seed=2**64)
    yield notes(seed=[])
    yield notes(generator="!!!")
    yield notes(generator="AAAA" * 4213)
    yield notes(shown=[1])
    yield notes(other=1)


def test_hostile_uploads_are_refused_and_leave_nothing(server, good):
    before = server.client.get("/v1/states").json()
    for content in hostile(good):
        answer = server.client.post("/v1/states/upload", content=content)
        message = error_of(answer, 400)["message"]
        assert str(server.store.folder) not in message and ".upload" not in message
    assert server.client.get("/v1/states").json() == before
    assert not [p for p in server.store.folder.iterdir() if p.name.startswith(".upload")]
    assert complete(server, "ab", 4)["text"] == alone(server, "ab", 4)


def test_a_state_that_overflows_fails_alone(server, good):
    _, header, tensors = good
    huge = {k: torch.full_like(v, 3e38) for k, v in tensors.items()}
    answer = server.client.post("/v1/states/upload", content=signed(huge, header))
    assert answer.status_code == 201
    body = {"prompt": "ab", "max_tokens": 4, "state": answer.json()["id"]}
    error_of(server.client.post("/v1/completions", json=body), 400)
    assert complete(server, "ab", 4)["text"] == alone(server, "ab", 4)


def test_pending_tokens_of_an_upload_count_as_prompt(tmp_path, good):
    content, header, tensors = good
    extra = json.loads(header["extra"])
    generation = json.loads(extra["generation"]) | {"pending": [97] * 60}
    header = header | {"extra": json.dumps({"generation": json.dumps(generation)})}
    with served(tmp_path, max_prompt_tokens=50) as small:
        content = signed(tensors, header)
        id = small.client.post("/v1/states/upload", content=content).json()["id"]
        error_of(small.client.post("/v1/completions", json={"prompt": "", "state": id}), 413)


def test_limits_of_number_and_bytes(tmp_path):
    with served(tmp_path, keys=KEYS, store={"max_states": 2, "max_bytes": 25_000}) as server:
        first = complete(server, "ab", 1)["state"]
        size = server.client.get(f"/v1/states/{first}").json()["bytes"]
        assert 2 * size < 25_000 < 3 * size + 10_000
        assert server.client.post(f"/v1/states/{first}/fork").status_code == 201
        full = server.client.post(f"/v1/states/{first}/fork")
        assert error_of(full, 429)["code"] == "state_limit"
        full = server.client.post("/v1/states", json={"prompt": "a"})
        assert error_of(full, 429)["code"] == "state_limit"
        # the other key has its own limits
        assert server.client.post("/v1/states", json={"prompt": "a"}, headers=SECOND).is_success
        server.client.delete(f"/v1/states/{first}")
        assert server.client.post("/v1/states", json={"prompt": "a"}).is_success
    with served(tmp_path / "b", store={"max_bytes": size + size // 2}) as server:
        first = complete(server, "ab", 1)["state"]
        full = server.client.post(f"/v1/states/{first}/fork")
        assert "bytes" in error_of(full, 429)["message"]


def test_states_come_back_after_a_restart(tmp_path):
    with served(tmp_path, keys=KEYS) as server:
        ids = [complete(server, "ab", 4)["state"] for _ in range(3)]
        server.client.delete(f"/v1/states/{ids[1]}")
        before = server.client.get("/v1/states").json()
        with pytest.raises(BusyError):
            StateStore(tmp_path, server.model)
    folder = next(p for p in tmp_path.iterdir() if p.is_dir())
    assert folder.stat().st_mode & 0o077 == 0
    assert all(key not in path.name for key in KEYS for path in tmp_path.rglob("*"))
    (tmp_path / f".upload-{'0' * 24}").write_bytes(b"half")
    (folder / f".state-{'0' * 24}.safetensors.tmp").write_bytes(b"half")
    (folder / f"state-{'0' * 24}.safetensors").write_bytes(b"rubbish")
    (folder / "notes.txt").write_text("mine")
    with served(tmp_path, keys=KEYS[::-1]) as server:  # a key is known by itself, not its line
        after = server.client.get("/v1/states").json()
        assert {s["id"] for s in after["data"]} == {ids[0], ids[2]}
        assert sorted(s["bytes"] for s in after["data"]) == sorted(
            s["bytes"] for s in before["data"]
        )
        body = {"prompt": "", "state": ids[2], "max_tokens": 8} | GREEDY
        got = server.client.post("/v1/completions", json=body).json()
        assert got["choices"][0]["text"] == alone(server, "ab", 12)[4:]
        assert server.client.get("/v1/states", headers=SECOND).json()["data"] == []
    left = {p.name for p in folder.iterdir()}
    assert "notes.txt" in left and not any(name.startswith(".") for name in left)
    assert not any(p.name.startswith(".upload") for p in tmp_path.iterdir())
    with served(tmp_path, make("rwkv7"), keys=KEYS) as server:  # another model's are left alone
        assert server.client.get("/v1/states").json()["data"] == []
    assert {p.name for p in folder.iterdir()} == left


def test_a_file_damaged_on_disk_is_a_clear_answer(server):
    id = complete(server, "ab", 4)["state"]
    (path,) = server.store.folder.rglob(f"{id}.safetensors")
    os.truncate(path, 100)
    body = {"prompt": "a", "state": id}
    said = error_of(server.client.post("/v1/completions", json=body), 507)["message"]
    assert id in said and str(server.store.folder) not in said
    path.unlink()
    error_of(server.client.post("/v1/completions", json=body), 507)
    assert server.client.delete(f"/v1/states/{id}").status_code == 200


def test_a_full_disk_is_an_answer_and_nothing_is_half_stored(server, monkeypatch):
    before = server.client.get("/v1/states").json()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    answer = server.client.post("/v1/states", json={"prompt": "a"})
    assert error_of(answer, 507)["type"] == "server_error"
    monkeypatch.undo()
    assert server.client.get("/v1/states").json() == before
