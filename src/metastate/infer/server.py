"""The server: OpenAI's routes, stored states, the inspector and the page, over one engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from metastate.errors import ConfigError, MetaStateError

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from metastate.infer.gate import (
        ApiError,
        ClientGoneError,
        Gate,
        ServerConfig,
        Traffic,
        as_api_error,
        while_connected,
    )
    from metastate.infer.openai_api import OpenAI
    from metastate.infer.openai_requests import (
        Body,
        ChatRequest,
        ChatTemplate,
        CompletionRequest,
        Prompt,
    )
except ImportError as cause:
    raise ConfigError("serving needs FastAPI: pip install 'metastate[serve]'") from cause

from metastate.infer.engine import Engine
from metastate.infer.inspect import inspect_prompt, inspect_state
from metastate.infer.store import StateStore, StoredState

PAGE = Path(__file__).parent / "page"
NOTES_BYTES = 2**20  # of an uploaded state, beside its tensors


class StateRequest(Body):
    """The body of POST /v1/states and of POST /v1/inspect."""

    prompt: Prompt = ""
    state: str | None = None


def create_app(
    engine: Engine, store: StateStore, config: ServerConfig, template: ChatTemplate | None = None
) -> FastAPI:
    """Return the ASGI application; it starts `engine` and, when it ends, stops it and the store."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)
            store.close()

    app = FastAPI(title="metastate", lifespan=lifespan, docs_url=None, redoc_url=None)
    traffic = Traffic()
    most = config.max_prompt_tokens + config.max_tokens
    upload = engine.model.state_bytes(1, most) + NOTES_BYTES
    limits = {"/v1/states/upload": min(upload, store.max_bytes)}
    app.add_middleware(Gate, config=config, limits=limits, traffic=traffic)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    for kind in (HTTPException, MetaStateError, Exception):
        app.add_exception_handler(kind, _answer_error)
    for gone in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(gone, _answer_nobody)
    openai = OpenAI(engine, store, config, template or ChatTemplate())
    add_openai_routes(app, openai)
    add_state_routes(app, openai)
    add_inspector_routes(app, openai)
    add_plain_routes(app, openai, traffic)
    return app


def add_openai_routes(app: FastAPI, openai: OpenAI) -> None:
    """Add the routes that OpenAI's clients call."""
    model = {
        "id": openai.config.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "metastate",
    }

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await openai.complete(body, request.state.owner, request.receive)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await openai.complete(body, request.state.owner, request.receive)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        openai.check_model(name)
        return model


def add_state_routes(app: FastAPI, openai: OpenAI) -> None:
    """Add the routes of stored states; each owner sees only their own."""
    store = openai.store

    @app.get("/v1/states")
    def list_states(request: Request) -> dict[str, Any]:
        data = [state.to_json() for state in store.list(request.state.owner)]
        return {"object": "list", "data": data}

    @app.post("/v1/states", status_code=201)
    async def create(body: StateRequest, request: Request) -> dict[str, Any]:
        owner = request.state.owner
        before = await asyncio.to_thread(openai.before, owner, body.state)
        ids = await asyncio.to_thread(openai.encode, body.prompt, before)
        await asyncio.to_thread(openai.check_room, owner, [ids])

        async def read() -> StoredState:
            return await openai.keep(owner, await openai.read(ids, before, before))

        return (await while_connected(request.receive, read())).to_json()

    @app.post("/v1/states/upload", status_code=201)
    async def upload(request: Request) -> dict[str, Any]:
        content = await request.body()
        return (await asyncio.to_thread(store.add_file, request.state.owner, content)).to_json()

    @app.get("/v1/states/{id}")
    def info(id: str, request: Request) -> dict[str, Any]:
        return store.info(request.state.owner, id).to_json()

    @app.get("/v1/states/{id}/file")
    def download(id: str, request: Request) -> Response:
        content = store.content(request.state.owner, id)
        headers = {"content-disposition": f'attachment; filename="{id}.safetensors"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @app.post("/v1/states/{id}/fork", status_code=201)
    def fork(id: str, request: Request) -> dict[str, Any]:
        return store.fork(request.state.owner, id).to_json()

    @app.delete("/v1/states/{id}")
    def delete(id: str, request: Request) -> dict[str, Any]:
        store.delete(request.state.owner, id)
        return {"id": id, "object": "state", "deleted": True}


def add_inspector_routes(app: FastAPI, openai: OpenAI) -> None:
    """Add the routes that say what a state holds and which tokens wrote it."""
    model, tokenizer = openai.engine.model, openai.tokenizer
    one_at_a_time = asyncio.Lock()  # it computes beside the engine

    @app.get("/v1/states/{id}/inspect")
    async def look(id: str, request: Request) -> Response:
        state = (await asyncio.to_thread(openai.store.get, request.state.owner, id)).state
        async with one_at_a_time:
            told = await asyncio.to_thread(inspect_state, state, model.config)
        return await asyncio.to_thread(JSONResponse, told)  # long: not in the loop

    @app.post("/v1/inspect")
    async def read(body: StateRequest, request: Request) -> Response:
        before = await asyncio.to_thread(openai.before, request.state.owner, body.state)
        ids = await asyncio.to_thread(openai.encode, body.prompt, before)
        state = None if before is None else before.state
        ids = ids if before is None else [*before.begun(tokenizer.eod_id).pending, *ids]
        gone = threading.Event()
        async with one_at_a_time:
            work = asyncio.to_thread(inspect_prompt, model, tokenizer, ids, state, stop=gone)
            try:
                told = await while_connected(request.receive, work)
            finally:
                gone.set()
        return await asyncio.to_thread(JSONResponse, told)


def add_plain_routes(app: FastAPI, openai: OpenAI, traffic: Traffic) -> None:
    """Add the page, and what machines ask: is it well, what did it do."""

    @app.get("/healthz")
    async def healthz(response: Response) -> dict[str, str]:
        said = {"status": "ok", "model": openai.config.model_name}
        if (fault := openai.engine.fault) is not None:
            response.status_code = 503
            said |= {"status": "failed", "reason": f"the engine failed: {fault!r}; restart it"}
        return said

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return PlainTextResponse(metrics_text(openai, traffic), media_type=kind)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))


def metrics_text(openai: OpenAI, traffic: Traffic) -> str:
    """Return the counts in Prometheus' text format."""
    engine, totals = openai.engine, dict(openai.engine.totals)
    num_states, state_bytes = openai.store.totals()
    tokens = {
        f'{{kind="{kind}"}}': totals.pop(f"{kind}_tokens", 0) for kind in ("prompt", "generated")
    }
    requests = {
        f'{{route="{route}",status="{status}"}}': n
        for (route, status), n in sorted(traffic.requests.items())
    }
    seconds = {f'{{route="{route}"}}': s for route, s in sorted(traffic.seconds.items())}
    finished = {f'{{reason="{reason}"}}': n for reason, n in sorted(totals.items())}
    lines = []
    for name, kind, values in (
        ("requests_total", "counter", requests),
        ("request_seconds_total", "counter", seconds),
        ("tokens_total", "counter", tokens),
        ("finished_total", "counter", finished),
        ("running", "gauge", {"": engine.num_running}),
        ("waiting", "gauge", {"": engine.num_waiting}),
        ("slots", "gauge", {"": engine.max_slots}),
        ("states", "gauge", {"": num_states}),
        ("state_bytes", "gauge", {"": state_bytes}),
    ):
        lines.append(f"# TYPE metastate_{name} {kind}")
        lines += [f"metastate_{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"


async def _answer_error(request: Request, error: Exception) -> Response:
    if type(error) is HTTPException and error.status_code in (404, 405):  # the router's
        what = f"there is no route {request.method} {request.url.path[:200]}"
        return ApiError(error.status_code, what).response()
    return as_api_error(error).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which is counted, and read by nobody


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Answer a body of the wrong form in OpenAI's shape, naming the field."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[:4]
    place = [str(part)[:80] for part in found[0]["loc"][1:]]
    param = place[0] if place and not place[0].isdigit() else None
    if found[0]["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON object").response()
    if not found[0]["loc"][1:] and "json" not in request.headers.get("content-type", "").lower():
        return ApiError(400, "the body needs the header Content-Type: application/json").response()
    if found[0]["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {'.'.join(place)!r}", param=param).response()
    said = "; or ".join(dict.fromkeys(str(e["msg"])[:200] for e in found))
    return ApiError(400, f"{param or 'the body'}: {said}", param=param).response()


class _Server(uvicorn.Server):
    """Uvicorn that, when it is told to stop, gives running requests a time and then ends them."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float) -> None:
        super().__init__(config)
        self.engine, self.grace_s = engine, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop taking requests; after the grace time end the engine's, so that each is answered."""

        async def end() -> None:
            await asyncio.sleep(self.grace_s)
            await asyncio.to_thread(self.engine.stop)

        ending = asyncio.create_task(end())
        await super().shutdown(sockets)
        ending.cancel()


def make_server(app: FastAPI, engine: Engine, config: ServerConfig) -> uvicorn.Server:
    """Return a server for `app`; `run(sockets=[...])` blocks until a signal, `should_exit` ends it.

    The connections of clients that do not take their answers are cut 5 s after `grace_s`.
    """
    settings = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=1024,
        timeout_graceful_shutdown=int(config.grace_s) + 5,
    )
    return _Server(settings, engine, config.grace_s)
