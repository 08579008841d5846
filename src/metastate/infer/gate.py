"""What every request to the server passes: keys, limits of size, number and time, error answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metastate.errors import BusyError, EngineError, MetaStateError
from metastate.infer.store import NoSuchStateError, StoreBrokenError, StoreFullError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

NOBODY = "open"  # owner of all states where there are no keys
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class ServerConfig:
    """What the server allows.

    Attributes:
        model_name: under which clients ask for the model.
        keys: who holds one of them may use /v1; none means that everybody may.
        hosts: names under which a server without keys answers, empty means any. A page elsewhere
            could otherwise reach it through a visitor's browser, under a name of its own.
        max_body_bytes: of a request, but for the upload of a state.
        max_prompt_tokens: of one prompt, what a state has pending included.
        max_tokens: that one request may ask for, for each of its texts.
        max_choices: texts of one request, prompts times n.
        max_concurrent: requests at once with one key, and texts that they write.
        max_behind: pieces of text that a stream's reader may be behind.
        timeout_s: of one generation. body_timeout_s: for a request's body to arrive.
        send_timeout_s: beyond timeout_s, for a slow client to take the rest.
        grace_s: that running requests get when the server stops.
    """

    model_name: str
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_prompt_tokens: int = 32_768
    max_tokens: int = 4096
    max_choices: int = 32
    max_concurrent: int = 32
    max_behind: int = 256
    timeout_s: float = 300.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    grace_s: float = 10.0


class ApiError(HTTPException):
    """An answer other than success, in OpenAI's shape: message, type, param, code."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        # Clients wait that many seconds before they try again; what would end alike they leave.
        headers = {"retry-after": "1"} if status in (429, 503) else {}
        if status == 408 or code in ("state_limit", "broken_model"):
            headers = {"x-should-retry": "false"}
        super().__init__(status, message, headers or None)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status_code, kind)
        message, param = (
            x
            and x.encode("utf-8", "replace").decode()  # what a client gave may be half a character
            for x in (self.detail, self.param)
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of `error`; of our own mistakes only that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, NoSuchStateError):
        return ApiError(404, str(error), param="state", code="state_not_found")
    if isinstance(error, StoreFullError):
        return ApiError(429, str(error), param="state", code="state_limit")
    if isinstance(error, StoreBrokenError):
        logger.error("%s", error, exc_info=error)
        return ApiError(507, str(error), param="state", code="storage")
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="busy")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="failed")
    if isinstance(error, MetaStateError):
        return ApiError(400, str(error))
    return ApiError(500, "the server made a mistake; its log says more")


class ClientGoneError(Exception):
    """The client went away before it was answered."""


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work`, the body being read; cancel it and raise ClientGoneError if the client goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGoneError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Traffic:
    """What passed: requests by route and status, and seconds by route."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class Gate:
    """ASGI middleware: who may pass, with how much, how often and for how long."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, limits: dict[str, int], traffic: Traffic
    ) -> None:
        """Guard `app` and count in `traffic`.

        `limits` are the body bytes of paths that differ from `max_body_bytes`.
        """
        self.app, self.config, self.limits, self.traffic = app, config, limits, traffic
        self._active: Counter[str] = Counter()
        self._owners = {
            hashlib.sha256(key.encode()).digest(): hashlib.sha256(key.encode()).hexdigest()[:32]
            for key in config.keys
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why not."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"]] + [
                    (name.encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.encode() not in given
                ]
            await send(message)

        limit_s = self.config.timeout_s + self.config.body_timeout_s + self.config.send_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._admit(scope, receive, counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except TimeoutError:
            if not status:
                late = ApiError(408, f"the request took longer than {limit_s:g} s", code="timeout")
                await late.response()(scope, receive, counted)
        except Exception:
            status = status or 500  # which is answered further out
            raise
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            self.traffic.requests[route, status or 499] += 1
            self.traffic.seconds[route] += time.perf_counter() - started

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        if not self._owners:
            self._check_origin(headers)
        owner = NOBODY
        if self._owners and (path.startswith("/v1/") or path == "/metrics"):
            owner = self._owner(headers)
        scope.setdefault("state", {})["owner"] = owner
        if not path.startswith("/v1/"):
            return await self.app(scope, self._bounded(receive, headers, path), send)
        if self._active[owner] >= self.config.max_concurrent:
            raise ApiError(
                429,
                f"{self._active[owner]} requests with this key are running, which is the limit; "
                "try again later",
                code="too_many_requests",
            )
        self._active[owner] += 1
        try:
            await self.app(scope, self._bounded(receive, headers, path), send)
        finally:
            self._active[owner] -= 1

    def _owner(self, headers: dict[bytes, bytes]) -> str:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given, found = hashlib.sha256(key.strip()).digest(), ""
        for digest, owner in self._owners.items():  # all of them: the time tells nothing
            if hmac.compare_digest(digest, given):
                found = owner
        if scheme.lower() != b"bearer" or not found:
            raise ApiError(
                401,
                "the key is missing or wrong; send `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        return found

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self.config.hosts and _name(host) not in self.config.hosts:
            raise ApiError(
                403,
                f"a server without keys answers to {', '.join(self.config.hosts)}, not {host!r}",
                code="wrong_host",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise ApiError(
                403, "a server without keys answers no other site's pages", code="wrong_origin"
            )

    def _bounded(self, receive: Receive, headers: dict[bytes, bytes], path: str) -> Receive:
        """Return `receive` that stops a body which is too long or too slow."""
        limit = self.limits.get(path, self.config.max_body_bytes)
        too_long = ApiError(413, f"the body is longer than {limit:,} bytes", code="body_too_long")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_long
        left, reading, deadline = limit, True, 0.0

        async def bounded() -> Message:
            nonlocal left, reading, deadline
            if not reading:
                return await receive()
            now = asyncio.get_running_loop().time()
            deadline = deadline or now + self.config.body_timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self.config.body_timeout_s:g} s",
                    code="timeout",
                ) from None
            left -= len(message.get("body", b""))
            reading = message.get("more_body", False)
            if left < 0:
                raise too_long
            return message

        return bounded


def _name(host: str) -> str:
    """Return the host of a Host header, without its port; "" where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
