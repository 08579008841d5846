"""The texts of one request on their way from the engine's thread to a client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from metastate.errors import StateError
from metastate.infer.engine import Engine
from metastate.infer.gate import (
    ApiError,
    ClientGoneError,
    Result,
    ServerConfig,
    as_api_error,
    while_connected,
)
from metastate.infer.generate import Continuation
from metastate.infer.job import Job
from metastate.infer.openai_requests import CommonFields

logger = logging.getLogger(__name__)
SILENCE_S = 15.0  # after which a comment goes out, lest a proxy take the stream for dead

FINISH = {"eod": "stop", "stop": "stop", "length": "length"}


@dataclass
class Task:
    """What to generate: one text for each prompt and each of n."""

    prompts: list[list[int]]
    request: CommonFields
    stop: tuple[str, ...]
    max_tokens: int
    before: Continuation | None
    num_logprobs: int | None
    chat: bool
    echo: bool = False

    @property
    def num_texts(self) -> int:
        """How many texts that are."""
        return len(self.prompts) * (self.request.n or 1)


class Feed:
    """The texts of a task as they come, carried from the engine's thread to this event loop.

    Pieces that came while the loop was busy are handed on as one. A reader who is more than
    `max_behind` pieces behind loses the jobs: nobody holds a slot by reading slowly.
    """

    def __init__(
        self, engine: Engine, task: Task, config: ServerConfig, *, timeout_s: float | None = None
    ) -> None:
        """Make the jobs, which takes its time where prompts are long: in a thread; see `start`."""
        self.engine, self.task = engine, task
        self.slow, self.started = False, time.monotonic()
        self._beside: list[asyncio.Task[Any]] = []
        self._limit = config.max_behind
        self._events: deque[tuple[int, str | None, int]] = deque()
        self._ready = asyncio.Event()
        prompts = [prompt for prompt in task.prompts for _ in range(task.request.n or 1)]
        self.jobs: list[Job] = [
            engine.make(
                prompt,
                state=task.before,
                sampling=task.request.sampling(index),
                max_tokens=task.max_tokens,
                stop=task.stop,
                timeout_s=timeout_s or config.timeout_s,
                want_logprobs=task.num_logprobs is not None,
                num_prompt_logprobs=task.num_logprobs if task.echo else None,
            )
            for index, prompt in enumerate(prompts)
        ]

    def prompt(self, index: int) -> list[int]:
        """Return the prompt's tokens of the text `index`."""
        return self.task.prompts[index // (self.task.request.n or 1)]

    def start(self, *, ahead: bool = False) -> Feed:
        """Queue the jobs, all of them or none, and return self; arguments as `Engine.queue`."""
        self._loop = asyncio.get_running_loop()
        try:
            for index, job in enumerate(self.jobs):
                self.engine.queue(job, ahead=ahead)
                job.on_event(partial(self._put, index, job))
        except Exception:
            self.cancel()
            raise
        return self

    def _put(self, index: int, job: Job, piece: str | None) -> None:
        """Take an event, in the engine's thread."""
        if piece is not None and not self.task.request.stream:
            return  # the whole text is taken at its end
        self._events.append((index, piece, len(job.tokens)))
        if len(self._events) > self._limit * len(self.jobs):
            self.slow = True
            job.cancel()
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop was closed: nobody listens any more
            job.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | None, int]]:
        """Yield the text's index, a piece of it or None at its end, and its tokens so far.

        Where no stream was asked for there is only the end.

        Raises:
            ApiError: a text ended for another reason than its own end.
        """
        left = len(self.jobs)
        while left:
            await self._ready.wait()
            self._ready.clear()
            texts: dict[int, tuple[str, int]] = {}
            while self._events:
                index, piece, num_tokens = self._events.popleft()
                if piece is not None:
                    texts[index] = (texts.get(index, ("", 0))[0] + piece, num_tokens)
                    continue
                if index in texts:
                    yield index, *texts.pop(index)
                left -= 1
                self._check(self.jobs[index])
                yield index, None, num_tokens
            for index, (text, num_tokens) in texts.items():
                yield index, text, num_tokens

    def beside(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Run `work` while the other texts come; `cancel` ends it too."""
        task = asyncio.ensure_future(work)
        self._beside.append(task)
        return task

    def cancel(self) -> None:
        """End what has not ended."""
        for job in self.jobs:
            if job.finish_reason is None:
                job.cancel()
        for task in self._beside:
            task.cancel()

    def _check(self, job: Job) -> None:
        if job.finish_reason in FINISH:
            return
        if isinstance(job.error, StateError) and self.task.before is None:
            logger.error("%s", job.error)  # and no client gave a state that could be the cause
            raise ApiError(500, str(job.error), code="broken_model")
        if job.error is not None:
            raise as_api_error(job.error)
        if job.finish_reason == "deadline":
            raise ApiError(408, "the time limit of a request was reached", code="timeout")
        if self.slow:
            raise ApiError(408, "the stream was read too slowly", code="slow_reader")
        raise ApiError(503, "the server is stopping", code="stopping")


class EventStream(Response):
    """Server-sent events while the client is there; the feed's jobs end with the stream."""

    def __init__(self, lines: AsyncIterator[str], feed: Feed) -> None:
        headers = {"x-accel-buffering": "no"}  # a proxy in between is to pass every piece on
        super().__init__(headers=headers, media_type="text/event-stream")
        self.lines, self.feed = lines, feed
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""

        async def write() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            coming = asyncio.ensure_future(anext(self.lines, None))
            try:
                while True:
                    await asyncio.wait([coming], timeout=SILENCE_S)
                    line = coming.result() if coming.done() else ": waiting\n\n"
                    if line is None:
                        break
                    if coming.done():
                        coming = asyncio.ensure_future(anext(self.lines, None))
                    part = {"type": "http.response.body", "body": line.encode(), "more_body": True}
                    await send(part)
            finally:
                coming.cancel()
            await send({"type": "http.response.body", "body": b""})

        try:
            await while_connected(receive, write())
        except ClientGoneError:
            pass
        finally:
            self.feed.cancel()
