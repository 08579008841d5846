"""A tiny model behind a real server: uvicorn in a thread, on a port of its own."""

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import torch

from metastate.data.tokenizer import ByteTokenizer
from metastate.infer.engine import Engine
from metastate.infer.gate import ServerConfig
from metastate.infer.generate import Draft
from metastate.infer.server import create_app, make_server
from metastate.infer.store import StateStore
from tiny_models import tiny

TOKENIZER = ByteTokenizer()
KEYS = ("first-key-0123456789", "second-key-0123456789")
SECOND = {"authorization": f"Bearer {KEYS[1]}"}
LONG = {"prompt": "ab", "max_tokens": 2000, "temperature": 0}


def paced(monkeypatch, s):
    """Let a token take `.s` seconds of what is returned."""
    write, pace = Draft.write, SimpleNamespace(s=s)

    def slow(self, logits):
        time.sleep(pace.s)
        return write(self, logits)

    monkeypatch.setattr(Draft, "write", slow)
    return pace


def make(architecture="metastate", seed=0):
    """A model of bytes that never ends a document, however it is drawn, far from uniform."""
    model = tiny(seed, architecture=architecture).eval()
    with torch.no_grad():
        model.head.weight[128:] = 0  # ASCII mostly: a logit of 0 is seldom the largest
        model.ln_out.weight[0], model.ln_out.bias[0] = 0, 1  # a bias for the head
        model.head.weight[:, 0] = 0
        model.head.weight[0, 0] = -1e4
    return model


@contextlib.contextmanager
def served(
    folder,
    model=None,
    *,
    tokenizer=TOKENIZER,
    template=None,
    engine=None,
    store=None,
    **config,
):
    """Yield a server's parts, its url, and `client`: httpx with the first key, where there are."""
    model = model or make()
    parts = SimpleNamespace(model=model, config=ServerConfig("tiny", **config))
    parts.engine = Engine(model, tokenizer, **(engine or {}))
    parts.store = StateStore(folder, model, **(store or {}))
    app = create_app(parts.engine, parts.store, parts.config, template)
    server = parts.server = make_server(app, parts.engine, parts.config)
    listener = socket.create_server(("127.0.0.1", 0))
    parts.port = listener.getsockname()[1]
    parts.url = f"http://127.0.0.1:{parts.port}"
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        wait(lambda: server.started)
        headers = {"authorization": f"Bearer {KEYS[0]}"} if parts.config.keys else {}
        with httpx.Client(base_url=parts.url, headers=headers, timeout=120) as client:
            parts.client = client
            yield parts
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


def posting(server, body):
    """Ask for a completion in a thread; return the future of its answer."""
    return ThreadPoolExecutor(1).submit(server.client.post, "/v1/completions", json=body)


def wait(condition, timeout_s=120):
    """Wait until `condition()` holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def error_of(answer, status):
    """Return the error of an answer that must have OpenAI's shape."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error
