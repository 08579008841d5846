"""OpenAI's completions and chat completions over the engine: requests, answers, streams."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from metastate.data.tokenizer import Tokenizer
from metastate.errors import MetaStateError
from metastate.infer.engine import Engine, Job
from metastate.infer.gate import (
    ApiError,
    ClientGoneError,
    ServerConfig,
    as_api_error,
    while_connected,
)
from metastate.infer.generate import Continuation
from metastate.infer.openai_requests import (
    ChatRequest,
    ChatTemplate,
    CommonFields,
    CompletionRequest,
    StreamOptions,
)
from metastate.infer.store import StateStore

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


class Feed:
    """The texts of a task as they come, carried from the engine's thread to this event loop.

    Pieces that came while the loop was busy are handed on as one. A reader who is more than
    `max_behind` pieces behind loses the jobs: nobody holds a slot by reading slowly.
    """

    def __init__(self, engine: Engine, task: Task, config: ServerConfig) -> None:
        """Submit the jobs, all of them or none; errors as `Engine.submit`."""
        self.task, self.jobs = task, list[Job]()
        self.slow = False
        self._loop, self._limit = asyncio.get_running_loop(), config.max_behind
        self._events: deque[tuple[int, str | None, int]] = deque()
        self._ready = asyncio.Event()
        try:
            for prompt in task.prompts:
                for _ in range(task.request.n or 1):
                    index = len(self.jobs)
                    job = engine.submit(
                        prompt,
                        state=task.before,
                        sampling=task.request.sampling(index),
                        max_tokens=task.max_tokens,
                        stop=task.stop,
                        timeout_s=config.timeout_s,
                        want_logprobs=task.num_logprobs is not None,
                    )
                    self.jobs.append(job)
                    job.on_event(partial(self._put, index, job))
        except Exception:
            self.cancel()
            raise

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

    def cancel(self) -> None:
        """End what has not ended."""
        for job in self.jobs:
            if job.finish_reason is None:
                job.cancel()

    def _check(self, job: Job) -> None:
        if job.finish_reason in FINISH:
            return
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
        super().__init__(media_type="text/event-stream")
        self.lines, self.feed = lines, feed
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""

        async def write() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for line in self.lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await while_connected(receive, write())
        except ClientGoneError:
            pass
        finally:
            self.feed.cancel()


class OpenAI:
    """Completions and chat completions of one model."""

    def __init__(
        self, engine: Engine, store: StateStore, config: ServerConfig, template: ChatTemplate
    ) -> None:
        self.engine, self.store, self.config, self.template = engine, store, config, template
        self.tokenizer: Tokenizer = engine.tokenizer

    async def complete(
        self, request: CompletionRequest | ChatRequest, owner: str, receive: Receive
    ) -> Response | dict[str, Any]:
        """Return the answer: an object, or a stream of events."""
        task = await asyncio.to_thread(self._task, request, owner)
        feed = Feed(self.engine, task, self.config)
        if request.stream:
            return EventStream(self._events(feed, owner), feed)
        try:
            return await while_connected(receive, self._whole(feed, owner))
        except ClientGoneError:
            return Response(status_code=499)
        finally:
            feed.cancel()

    def check_model(self, name: str) -> None:
        """Raise ApiError unless `name` is the served model's."""
        if name != self.config.model_name:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r}; this server has {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def before(self, owner: str, state: str | None) -> Continuation | None:
        """Return the owner's stored state, None where none is asked for; errors as the store's."""
        return None if state is None else self.store.get(owner, state)

    def encode(self, prompt: str | Sequence[int], before: Continuation | None = None) -> list[int]:
        """Return a prompt's tokens; ApiError if there are too many, or ids that mean nothing."""
        try:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        except UnicodeEncodeError as cause:
            raise ApiError(400, f"the prompt is no Unicode text: {cause}", param="prompt") from None
        size = self.tokenizer.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise ApiError(
                    400,
                    f"the prompt holds token {token}; ids run from 0 to {size - 1}",
                    param="prompt",
                )
        length = len(ids) + (len(before.pending) if before else 0)
        if length > self.config.max_prompt_tokens:
            raise ApiError(
                413,
                f"the prompt has {length:,} tokens; at most {self.config.max_prompt_tokens:,} are "
                "read at once: split it, and carry the state",
                param="prompt",
                code="prompt_too_long",
            )
        return ids

    async def read(self, ids: list[int], before: Continuation | None) -> Continuation:
        """Return what the model remembers after reading `ids`.

        Raises:
            ApiError: it could not be read. Others as `Engine.submit`.
        """
        task = Task([ids], CommonFields(), (), 0, before, None, False)
        feed = Feed(self.engine, task, self.config)
        try:
            async for _ in feed:
                pass
        finally:
            feed.cancel()
        continuation = feed.jobs[0].continuation
        assert continuation is not None
        return continuation

    def _task(self, request: CompletionRequest | ChatRequest, owner: str) -> Task:
        """Return what to do for a request; ApiError or ConfigError if it cannot be done."""
        config, stop = self.config, request.stops
        if request.model is not None:
            self.check_model(request.model)
        before = self.before(owner, request.state)
        if isinstance(request, ChatRequest):
            messages = [{"role": m.role, "content": m.text} for m in request.messages]
            text, ends = self.template.render(messages, continued=before is not None)
            prompts: list[Any] = [text]
            stop, default, num_logprobs = (*ends, *stop), 256, request.top_logprobs
            num_logprobs = (num_logprobs or 0) if request.logprobs else None
            limit = request.max_completion_tokens
        else:
            prompts, default, num_logprobs, limit = request.prompts, 16, request.logprobs, None
        if len(prompts) * (request.n or 1) > config.max_choices:
            raise ApiError(
                400,
                f"that many texts at once are not allowed; at most {config.max_choices}",
                param="n",
            )
        if any(len(s) > 256 for s in stop):
            raise ApiError(400, "a stop string has at most 256 characters", param="stop")
        limit = request.max_tokens if limit is None else limit
        limit = min(default, config.max_tokens) if limit is None else limit
        if limit > config.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {limit}; at most {config.max_tokens} are allowed",
                param="max_tokens",
            )
        ids = [self.encode(prompt, before) for prompt in prompts]
        return Task(
            ids, request, stop, limit, before, num_logprobs, isinstance(request, ChatRequest)
        )

    async def _whole(self, feed: Feed, owner: str) -> dict[str, Any]:
        task, choices = feed.task, []
        async for _ in feed:
            pass
        for index, job in enumerate(feed.jobs):
            text = job.result()
            logprobs = self._logprobs(task, job, 0, len(job.tokens))
            choice: dict[str, Any] = {"index": index, "logprobs": logprobs}
            if task.chat:
                choice["message"] = {"role": "assistant", "content": text.lstrip(), "refusal": None}
            else:
                choice["text"] = text
            choice["finish_reason"] = FINISH[job.finish_reason or ""]
            choices.append(choice | await self._stored(feed, index, text, owner))
        return self._head(task) | {"choices": choices, "usage": self._usage(feed)}

    async def _events(self, feed: Feed, owner: str) -> AsyncIterator[str]:
        """Yield the lines of a stream, an error as the last of them."""
        task, texts, shown = feed.task, [""] * len(feed.jobs), [0] * len(feed.jobs)
        options = task.request.stream_options or StreamOptions()
        head = self._head(task, chunk=True) | ({"usage": None} if options.include_usage else {})

        def line(value: dict[str, Any]) -> str:
            return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

        def chunk(index: int, text: str | None, reason: str | None, **more: Any) -> str:
            choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
            if task.chat:
                choice["delta"] = {} if text is None else {"content": text}
            else:
                choice["text"] = text or ""
            return line(head | {"choices": [choice | more]})

        try:
            if task.chat:
                for index in range(len(feed.jobs)):
                    yield chunk(index, None, None, delta={"role": "assistant", "content": ""})
            async for index, piece, num_tokens in feed:
                job = feed.jobs[index]
                logprobs = {"logprobs": self._logprobs(task, job, shown[index], num_tokens)}
                shown[index] = max(shown[index], num_tokens)
                if piece is not None:
                    fresh = task.chat and not texts[index].strip()
                    texts[index] += piece
                    yield chunk(index, piece.lstrip() if fresh else piece, None, **logprobs)
                else:
                    stored = await self._stored(feed, index, texts[index], owner)
                    yield chunk(index, None, FINISH[job.finish_reason or ""], **logprobs, **stored)
            if options.include_usage:
                yield line(head | {"choices": [], "usage": self._usage(feed)})
        except (ApiError, MetaStateError) as error:
            yield line(as_api_error(error).body())
        yield "data: [DONE]\n\n"

    def _head(self, task: Task, *, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * chunk) if task.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if task.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.config.model_name,
        }

    def _usage(self, feed: Feed) -> dict[str, int]:
        read = sum(len(prompt) for prompt in feed.task.prompts)
        written = sum(len(job.tokens) for job in feed.jobs)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    async def _stored(self, feed: Feed, index: int, text: str, owner: str) -> dict[str, str]:
        """Store the state behind a text if that was asked for; return its id as a field.

        It has read what was returned and nothing else. So where a stop string or an end of
        document ended the text, which the model has read in part, prompt and text are read again.
        """
        task, job = feed.task, feed.jobs[index]
        if not task.request.store_state:
            return {}
        continuation = job.continuation
        if job.finish_reason != "length":
            prompt = task.prompts[index // (task.request.n or 1)]
            continuation = await self.read([*prompt, *self.tokenizer.encode(text)], task.before)
        assert continuation is not None
        return {"state": (await asyncio.to_thread(self.store.add, owner, continuation)).id}

    def _logprobs(self, task: Task, job: Job, first: int, end: int) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens `first` to `end - 1` in OpenAI's form."""
        if task.num_logprobs is None or job.logprobs is None:
            return None
        ids, found = job.tokens[first:end], job.logprobs[first:end]
        best = [pairs[: task.num_logprobs] for _, pairs in found]

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, raw = self._name(token)
            return {"token": text, "logprob": logprob, "bytes": raw}

        if task.chat:
            content = [
                entry(token, own) | {"top_logprobs": [entry(*pair) for pair in pairs]}
                for token, (own, _), pairs in zip(ids, found, best, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(token)[0] for token in ids],
            "token_logprobs": [own for own, _ in found],
            "top_logprobs": [{self._name(t)[0]: p for t, p in pairs} for pairs in best],
            "text_offset": job.offsets[first:end],
        }

    def _name(self, token: int) -> tuple[str, list[int] | None]:
        """Return a token as text, and its bytes where they are known; half a character is bytes."""
        decode_bytes = getattr(self.tokenizer, "decode_bytes", None)
        if decode_bytes is None:
            text = self.tokenizer.decode([token])
            return text, None if "\ufffd" in text else list(text.encode())
        raw = decode_bytes([token])
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), list(raw)
