"""The server as OpenAI's own client sees it: completions, chats, streams, refusals."""

import json

import openai
import pytest
import torch
from served import TOKENIZER, error_of, make, served

from metastate.data.tokenizer import JsonTokenizer
from metastate.errors import ConfigError
from metastate.infer.generate import generate
from metastate.infer.openai_requests import ChatTemplate
from metastate.infer.sampling import SamplingConfig


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("states")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(model, prompt, max_tokens, sampling=None, **kw):
    """What `generate` writes: the text and its run."""
    sampling = sampling or SamplingConfig(temperature=0)
    run = generate(model, TOKENIZER, prompt, sampling=sampling, max_tokens=max_tokens, **kw)
    return "".join(run), run


def test_a_completion_is_what_generate_writes(server, client):
    text, run = alone(server.model, "ab", 12)
    got = client.completions.create(model="tiny", prompt="ab", max_tokens=12, temperature=0)
    assert got.choices[0].text == text and got.choices[0].finish_reason == "length"
    assert got.object == "text_completion" and got.model == "tiny" and len(got.choices) == 1
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (2, len(run.tokens))


def test_a_stream_is_the_same_text(server, client):
    text, _ = alone(server.model, "ab", 12)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="ab",
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 14
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_a_raw_stream_ends_with_done(server):
    body = {"prompt": "ab", "max_tokens": 3, "stream": True}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: "))["choices"] for e in events[:-2])


def test_seed_temperature_top_p_top_k_and_penalty_are_generates(server, client):
    sampling = SamplingConfig(temperature=1.3, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=7)
    text, _ = alone(server.model, "ab", 20, sampling)
    got = client.completions.create(
        model="tiny",
        prompt="ab",
        max_tokens=20,
        temperature=1.3,
        top_p=0.9,
        seed=7,
        extra_body={"top_k": 40, "repetition_penalty": 1.2},
    )
    assert got.choices[0].text == text


def test_every_prompt_gets_n_texts_each_with_its_own_seed(server, client):
    got = client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=2, max_tokens=9, seed=3, temperature=1.0
    )
    texts = [
        alone(server.model, prompt, 9, SamplingConfig(seed=3 + index))[0]
        for index, prompt in enumerate(("ab", "ab", "cd", "cd"))
    ]
    assert [c.text for c in got.choices] == texts and [c.index for c in got.choices] == [0, 1, 2, 3]
    stream = client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=2, max_tokens=9, seed=3, temperature=1.0, stream=True
    )
    pieces = [""] * 4
    for chunk in stream:
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == texts


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]]])
def test_prompts_may_be_tokens(server, client, prompt):
    got = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
    assert got.choices[0].text == alone(server.model, "ab", 8)[0]


def test_stop_strings_end_a_text_and_are_not_shown(server, client):
    text, _ = alone(server.model, "ab", 30)
    for stop in (text[10:13], [text[10:13], "never there"]):
        got = client.completions.create(
            model="tiny", prompt="ab", max_tokens=30, temperature=0, stop=stop
        )
        assert got.choices[0].text == text[: text.index(text[10:13])]
        assert got.choices[0].finish_reason == "stop"


def test_logprobs_are_the_models(server, client):
    _, run = alone(server.model, "ab", 5)
    tokens = [0, *b"ab", *run.tokens]
    with torch.no_grad():
        expected = server.model(torch.tensor([tokens[:-1]]))[0][0, 2:].log_softmax(-1)
    own = [float(row[t]) for row, t in zip(expected, run.tokens, strict=True)]
    got = client.completions.create(
        model="tiny", prompt="ab", max_tokens=5, temperature=0, logprobs=2
    ).choices[0]
    assert got.logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    assert "".join(got.logprobs.tokens) == got.text
    parts = zip(got.logprobs.tokens, got.logprobs.text_offset, strict=True)
    assert all(got.text[offset:].startswith(part) for part, offset in parts)
    assert all(len(best) == 2 for best in got.logprobs.top_logprobs)
    messages = [{"role": "user", "content": "ab"}]
    common = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=3)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 5 and all(len(e.top_logprobs) == 3 for e in entries)
    assert bytes(b for e in entries for b in e.bytes).decode().lstrip() == (
        whole.choices[0].message.content
    )
    stream = client.chat.completions.create(**common, logprobs=True, stream=True)
    streamed = [
        e.logprob for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content
    ]
    assert streamed == [e.logprob for e in entries]


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_an_echo_tells_the_prompt_and_what_the_model_thought_of_it(server, client, num_tokens):
    prompts = [list(b"abc"), list("h\u00e9llo".encode()), [195], []]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=num_tokens, temperature=0, logprobs=1, echo=True
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        text = bytes(prompt).decode(errors="replace")
        told, (own, run) = choice.logprobs, alone(server.model, text, num_tokens)
        if prompt != [195]:
            assert choice.text == text + own
        tokens = [*prompt, *(run.tokens if prompt != [195] else choice.text[1:].encode())]
        with torch.no_grad():
            logits, _ = server.model(torch.tensor([[0, *tokens]]))
        expected = logits[0, :-1].log_softmax(-1)
        assert told.token_logprobs == pytest.approx(
            [float(row[t]) for row, t in zip(expected, tokens, strict=True)], abs=1e-4
        )
        best = [max(row.values()) for row in told.top_logprobs]
        assert best == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
        assert len(told.tokens) == len(told.text_offset) == len(tokens)
        for name, offset in zip(told.tokens, told.text_offset, strict=True):
            assert name.startswith("bytes:") or choice.text[offset:].startswith(name)


def test_an_echo_behind_a_state_and_without_log_probabilities(server, client):
    post = server.client.post
    whole = client.completions.create(
        model="tiny", prompt="hello", max_tokens=0, logprobs=0, echo=True
    ).choices[0]
    first = post("/v1/states", json={"prompt": "hel"}).json()["id"]
    body = {"prompt": "lo", "state": first, "max_tokens": 0, "echo": True}
    plain = post("/v1/completions", json=body).json()["choices"][0]
    assert plain["text"] == "lo" and plain["logprobs"] is None
    behind = post("/v1/completions", json=body | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert behind["token_logprobs"] == pytest.approx(whole.logprobs.token_logprobs[3:], abs=1e-4)


def test_an_echo_of_too_many_log_probabilities_is_refused(server, client, monkeypatch):
    monkeypatch.setattr("metastate.infer.openai_api.MAX_ECHOED", 24)
    common = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 2}
    client.completions.create(prompt=["abcd", "efgh"], **common)
    client.completions.create(prompt="abcd" * 9, **common | {"logprobs": None})
    for prompt, n in ((["abcd", "efghi"], 1), ("abc", 3)):
        with pytest.raises(openai.APIStatusError, match="too many for one answer") as refused:
            client.completions.create(prompt=prompt, n=n, **common)
        assert refused.value.status_code == 413


def test_logprobs_name_tokens_by_what_they_are_inside_a_text(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<|endoftext|>", "\u2581the", "the", "\u2581cat", "[UNK]", "<0xE2>"]
    json_tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    json_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    json_tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = JsonTokenizer(json_tokenizer.to_str().encode(), "words")
    model = make()
    with torch.no_grad():
        model.head.weight[len(words) :] = 0
    with served(tmp_path, model, tokenizer=tokenizer) as server:
        body = {"prompt": "the cat", "max_tokens": 12, "seed": 1, "logprobs": 20, "n": 8}
        answer = server.client.post("/v1/completions", json=body | {"temperature": 9}).json()
    names, seen = [word.replace("\u2581", " ") for word in words], set()
    for told in (choice["logprobs"] for choice in answer["choices"]):
        seen |= set(told["tokens"])
        for best, own, name in zip(
            told["top_logprobs"], told["token_logprobs"], told["tokens"], strict=True
        ):
            assert set(best) <= {*names, ""}  # padding has no name
            assert list(best.values()) == sorted(best.values(), reverse=True)
            assert name not in best or best[name] == pytest.approx(own)
    assert {" the", "the"} <= seen <= set(names)


def test_streams_hold_no_line_ends_but_their_own(server):
    body = {"prompt": "ab", "stream": True, "max_tokens": 60, "temperature": 3, "seed": 1}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.content.isascii() and not answer.text.isspace()
    lines = [line for line in answer.text.splitlines() if line]
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
    assert not text.isascii()


def test_a_chat_is_the_template_and_a_completion(server, client):
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": " c ", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "d"},
    ]
    prompt = "System: be brief\n\nUser: a b\n\nAssistant: c\n\nUser: d\n\nAssistant:"
    text, _ = alone(server.model, prompt, 15, stop=["\n\nUser:"])
    common = {"model": "tiny", "messages": messages, "max_completion_tokens": 15, "temperature": 0}
    got = client.chat.completions.create(**common)
    assert got.choices[0].message.content == text.lstrip()
    assert got.choices[0].message.role == "assistant" and got.object == "chat.completion"
    assert got.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(**common, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text.lstrip()
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_template_of_its_own_with_stop_strings(tmp_path):
    source = (
        "{% set stop = ['Z'] %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(source)
    assert template.render([{"role": "user", "content": "x"}], continued=False) == (
        "<user>x",
        ("Z",),
    )
    with served(tmp_path, template=template) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "temperature": 0}
        got = server.client.post("/v1/chat/completions", json=body).json()
        text = alone(server.model, "<user>x", 5, stop=["Z"])[0]
        assert got["choices"][0]["message"]["content"] == text.lstrip()


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_bad_templates_are_refused_at_the_start(source):
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate(source)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="gpt-5", prompt="a")


def test_what_changes_nothing_is_accepted(client):
    client.completions.create(
        model="tiny",
        prompt="a",
        max_tokens=1,
        user="me",
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        best_of=1,
        echo=False,
        suffix=None,
    )
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a", "name": "b"}],
        max_tokens=1,
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        response_format={"type": "text"},
        parallel_tool_calls=False,
        safety_identifier="x",
        reasoning_effort=None,
    )


MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
REFUSED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"echo": 1}, "echo"),
    ({"echo": True, "stream": True}, "echo"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "z"}, "suffix"),
    ({"bla": 1}, "bla"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 33}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"repetition_penalty": 0.5}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "a"}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"prompt": [256]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": ["a"] * 33}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"x": 1}}, "stream_options"),
    ({"state": 5}, "state"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda x: str(x)[:40])
def test_refusals_name_the_field(server, fields, param):
    answer = server.client.post("/v1/completions", json={"prompt": "a"} | fields)
    assert error_of(answer, 400)["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
        {"messages": ["a"]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"prompt": "a"},
        {"top_logprobs": 99},
        {"top_logprobs": 3},
        {"logprobs": False, "top_logprobs": 0},
        {"reasoning_effort": "high"},
    ],
    ids=str,
)
def test_refusals_of_chats(server, fields):
    error_of(server.client.post("/v1/chat/completions", json=MESSAGES | fields), 400)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"a"',
        b"null",
        b'{"prompt": NaN}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"top_p": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"max_tokens": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"stop": 1, "\\udfff": 1}',
        b'{"model": "\\ud800"}',
        b'{"prompt": "\xff\xfe"}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": [' + b"[]," * 1000 + b"1]}",
        b'{"prompt": [' + b'"x",1,' * 1000 + b"1]}",
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_bodies_that_are_no_request(server, raw):
    json_type = {"content-type": "application/json"}
    answer = server.client.post("/v1/completions", content=raw, headers=json_type)
    assert answer.status_code in (400, 404)
    error_of(answer, answer.status_code)
    assert server.client.get("/healthz").status_code == 200


def test_no_probability_at_all_leaves_the_likeliest_token(server):
    body = {"prompt": "ab", "max_tokens": 8}
    likeliest, other = (
        server.client.post("/v1/completions", json=body | fields).json()["choices"][0]["text"]
        for fields in ({"temperature": 0}, {"top_p": 0, "seed": 3})
    )
    assert likeliest == other


def test_lone_surrogates_in_chats(server):
    raw = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    json_type = {"content-type": "application/json"}
    error_of(server.client.post("/v1/chat/completions", content=raw, headers=json_type), 400)


def test_lone_surrogates_with_a_tokenizer_that_takes_them_for_no_text(server, monkeypatch):
    """That of a tokenizer.json raises TypeError."""

    def encode(self, text):
        raise TypeError("TextEncodeInput must be Union[TextInputSequence, ...]")

    monkeypatch.setattr(type(TOKENIZER), "encode", encode)
    json_type = {"content-type": "application/json"}
    raw = b'{"prompt": "\\ud800"}'
    answer = server.client.post("/v1/completions", content=raw, headers=json_type)
    assert "no Unicode text" in error_of(answer, 400)["message"]


def test_wrong_types_paths_and_methods(server):
    client = server.client
    untyped = error_of(client.post("/v1/completions", content='{"prompt": "a"}'), 400)
    assert "Content-Type: application/json" in untyped["message"]
    typed = error_of(client.post("/v1/completions", json=["a"]), 400)
    assert "Content-Type" not in typed["message"]
    error_of(client.get("/v1/completions"), 405)
    assert error_of(client.get("/v1/nothing"), 404)["message"].endswith("route GET /v1/nothing")
    error_of(client.get("/page/../server.py"), 404)
    error_of(client.get("/page/%2e%2e/server.py"), 404)


def test_a_tiny_temperature_is_greedy(server):
    body = {"prompt": "ab", "max_tokens": 8, "temperature": 5e-324}
    got = server.client.post("/v1/completions", json=body).json()
    assert got["choices"][0]["text"] == alone(server.model, "ab", 8)[0]


def test_nothing_to_write_and_nothing_to_read(server):
    for fields in ({"max_tokens": 0}, {"prompt": "", "max_tokens": 1}, {"prompt": None}):
        answer = server.client.post("/v1/completions", json={"prompt": "a"} | fields)
        assert answer.status_code == 200, answer.text


def test_health_metrics_and_page(server):
    client = server.client
    assert client.get("/healthz").json() == {"status": "ok", "model": "tiny"}
    client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2})
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['metastate_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(values['metastate_tokens_total{kind="generated"}']) >= 2
    assert values["metastate_running"] == "0" and values["metastate_slots"] == "16"
    page = client.get("/")
    assert page.status_code == 200 and "metastate" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/app.js").headers["content-type"].startswith("text/javascript")


def test_a_transformer_is_served_too(tmp_path):
    with served(tmp_path, make("transformer")) as server:
        body = {"prompt": "ab", "max_tokens": 8, "temperature": 0, "store_state": True}
        got = server.client.post("/v1/completions", json=body).json()["choices"][0]
        assert got["text"] == alone(server.model, "ab", 8)[0]
        file = server.client.get(f"/v1/states/{got['state']}/file").content
        again = server.client.post("/v1/states/upload", content=file)
        assert again.status_code == 201
        error_of(server.client.post("/v1/inspect", json={"prompt": "ab"}), 400)
