"""OpenAI's completions and chat completions over the engine: requests, answers, streams."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any
from weakref import WeakSet

from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from metastate.data.tokenizer import StreamDecoder, Tokenizer
from metastate.errors import MetaStateError
from metastate.infer.engine import Engine
from metastate.infer.gate import ApiError, ServerConfig, as_api_error, while_connected
from metastate.infer.generate import Continuation
from metastate.infer.job import Job, LogProb
from metastate.infer.openai_feed import FINISH, EventStream, Feed, Task
from metastate.infer.openai_requests import (
    ChatRequest,
    ChatTemplate,
    CommonFields,
    CompletionRequest,
    StreamOptions,
)
from metastate.infer.store import StateStore, StoredState

MAX_ECHOED = 2**20  # log-probabilities of prompts in one answer, which is made in memory


class OpenAI:
    """Completions and chat completions of one model."""

    def __init__(
        self, engine: Engine, store: StateStore, config: ServerConfig, template: ChatTemplate
    ) -> None:
        self.engine, self.store, self.config, self.template = engine, store, config, template
        self.tokenizer: Tokenizer = engine.tokenizer
        self._jobs: defaultdict[str, WeakSet[Job]] = defaultdict(WeakSet)  # by owner

    async def complete(
        self, request: CompletionRequest | ChatRequest, owner: str, receive: Receive
    ) -> Response:
        """Return the answer: an object, or a stream of events."""
        task = await asyncio.to_thread(self._task, request, owner)
        feed = await asyncio.to_thread(Feed, self.engine, task, self.config)
        running = sum(job.finish_reason is None for job in self._jobs[owner])
        if running + task.num_texts > self.config.max_concurrent:
            raise ApiError(
                429,
                f"{running} texts with this key are being written; with {task.num_texts} more "
                f"they would be over the limit of {self.config.max_concurrent}; try again later",
                code="too_many_requests",
            )
        feed.start()
        self._jobs[owner].update(feed.jobs)
        if request.stream:
            return EventStream(self._events(feed, owner), feed)
        try:
            value = await while_connected(receive, self._whole(feed, owner))
        finally:
            feed.cancel()
        return await asyncio.to_thread(JSONResponse, value)  # it may be long

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
            if isinstance(prompt, str):
                prompt.encode("utf-8")  # half a character is not every tokenizer's UnicodeError
                ids = self.tokenizer.encode(prompt)
            else:
                ids = list(prompt)
        except UnicodeEncodeError as cause:
            raise ApiError(400, f"the prompt is no Unicode text: {cause}", param="prompt") from None
        size = self.tokenizer.num_ids
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

    def check_room(self, owner: str, prompts: Sequence[list[int]], n: int = 1) -> None:
        """Raise StoreFullError if the states behind `n` texts a prompt would have no room."""
        size = self.engine.model.state_bytes(1, min(map(len, prompts)))
        self.store.check_room(owner, len(prompts) * n, size)

    async def read(
        self,
        ids: list[int],
        before: Continuation | None,
        drawn: Continuation | None,
        *,
        timeout_s: float | None = None,
        ahead: bool = False,
    ) -> Continuation:
        """Return what the model remembers after reading `ids` behind `before`.

        Drawing goes on as behind `drawn`; the rest is as in `Engine.submit`.

        Raises:
            ApiError: it could not be read. Others as `Engine.submit`.
        """
        task = Task([ids], CommonFields(), (), 0, before, None, False)
        feed = await asyncio.to_thread(Feed, self.engine, task, self.config, timeout_s=timeout_s)
        feed.start(ahead=ahead)
        try:
            async for _ in feed:
                pass
        finally:
            feed.cancel()
        continuation = feed.jobs[0].continuation
        assert continuation is not None
        if drawn is None:
            return replace(continuation, seed=None, generator=None)
        return replace(continuation, seed=drawn.seed, generator=drawn.generator)

    async def keep(self, owner: str, continuation: Continuation) -> StoredState:
        """Store a state unless nobody is left to be told its id; errors as `StateStore.add`."""
        adding = asyncio.ensure_future(asyncio.to_thread(self.store.add, owner, continuation))
        try:
            return await asyncio.shield(adding)
        except asyncio.CancelledError:
            adding.add_done_callback(partial(self._forget, owner, attrgetter("id")))
            raise

    def _forget(
        self, owner: str, id_of: Callable[[Any], str | None], storing: asyncio.Future[Any]
    ) -> None:
        """Delete the state that `storing` ended with, if it did."""
        if not storing.cancelled() and storing.exception() is None:
            id = id_of(storing.result())
            if id is not None:
                storing.get_loop().run_in_executor(None, self.store.delete, owner, id)

    def _task(self, request: CompletionRequest | ChatRequest, owner: str) -> Task:
        """Return what to do for a request; ApiError or ConfigError if it cannot be done."""
        config, stop = self.config, request.stops
        if request.model is not None:
            self.check_model(request.model)
        before = self.before(owner, request.state)
        if isinstance(request, ChatRequest):
            messages = [{"role": m.role, "content": m.text} for m in request.messages]
            echo = False
            text, ends = self.template.render(messages, continued=before is not None)
            prompts: list[Any] = [text]
            stop, default, num_logprobs = (*ends, *stop), 256, request.top_logprobs
            num_logprobs = (num_logprobs or 0) if request.logprobs else None
            limit = request.max_completion_tokens
        else:
            prompts, default, num_logprobs, limit = request.prompts, 16, request.logprobs, None
            echo = bool(request.echo)
        most = min(config.max_choices, config.max_concurrent)
        if len(prompts) * (request.n or 1) > most:
            raise ApiError(
                400, f"that many texts at once are not allowed; at most {most}", param="n"
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
        echoed = sum(map(len, ids)) * (request.n or 1) if echo else 0
        if num_logprobs is not None and echoed * (1 + num_logprobs) > MAX_ECHOED:
            raise ApiError(
                413,
                f"log-probabilities of {echoed:,} tokens, {1 + num_logprobs} of each, are too many "
                f"for one answer ({MAX_ECHOED:,}); send fewer or shorter prompts",
                param="echo",
                code="echo_too_long",
            )
        if request.store_state:
            self.check_room(owner, ids, request.n or 1)
        chat = isinstance(request, ChatRequest)
        return Task(ids, request, stop, limit, before, num_logprobs, chat, echo)

    async def _whole(self, feed: Feed, owner: str) -> dict[str, Any]:
        choices, stored = [], {}
        try:
            async for index, _, _ in feed:
                work = self._stored(feed, index, feed.jobs[index].result(), owner)
                stored[index] = feed.beside(work)
            for index in range(len(feed.jobs)):
                choice = await asyncio.to_thread(self._choice, feed, index)  # an echo may be long
                choices.append(choice | await stored[index])
        except BaseException:  # also where the client went: nobody will be told the ids
            for storing in stored.values():
                storing.add_done_callback(
                    partial(self._forget, owner, methodcaller("get", "state"))
                )
            raise
        return self._head(feed.task) | {"choices": choices, "usage": self._usage(feed)}

    def _choice(self, feed: Feed, index: int) -> dict[str, Any]:
        task, job = feed.task, feed.jobs[index]
        text, logprobs = job.result(), self._logprobs(feed, index, 0, len(job.tokens))
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs}
        if task.chat:
            choice["message"] = {"role": "assistant", "content": text.lstrip(), "refusal": None}
        else:
            choice["text"] = (self._echoed(feed, index)[0] if task.echo else "") + text
        return choice | {"finish_reason": FINISH[job.finish_reason or ""]}

    async def _events(self, feed: Feed, owner: str) -> AsyncIterator[str]:
        """Yield the lines of a stream, an error as the last of them."""
        task, texts, shown = feed.task, [""] * len(feed.jobs), [0] * len(feed.jobs)
        options = task.request.stream_options or StreamOptions()
        head = self._head(task, chunk=True) | ({"usage": None} if options.include_usage else {})

        def line(value: dict[str, Any]) -> str:
            # ASCII: some clients split lines also at U+2028 and its like.
            return f"data: {json.dumps(value)}\n\n"

        def chunk(index: int, text: str | None, reason: str | None, **more: Any) -> str:
            choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
            if task.chat:
                choice["delta"] = {} if text is None else {"content": text}
            else:
                choice["text"] = text or ""
            return line(head | {"choices": [choice | more]})

        def last(index: int, stored: dict[str, Any]) -> str:
            job = feed.jobs[index]
            logprobs = self._logprobs(feed, index, shown[index], len(job.tokens))
            reason = FINISH[job.finish_reason or ""]
            return chunk(index, None, reason, logprobs=logprobs, **stored)

        storing: dict[int, asyncio.Task[dict[str, Any]]] = {}
        try:
            if task.chat:
                for index in range(len(feed.jobs)):
                    yield chunk(index, None, None, delta={"role": "assistant", "content": ""})
            async for index, piece, num_tokens in feed:
                if piece is not None:
                    fresh = task.chat and not texts[index].strip()
                    texts[index] += piece
                    logprobs = self._logprobs(feed, index, shown[index], num_tokens)
                    shown[index] = max(shown[index], num_tokens)
                    piece = piece.lstrip() if fresh else piece
                    yield chunk(index, piece, None, logprobs=logprobs)
                elif task.request.store_state:
                    # The other texts go on meanwhile, and their reader is not too slow.
                    storing[index] = feed.beside(self._stored(feed, index, texts[index], owner))
                else:
                    yield last(index, {})
                for index in [i for i, work in storing.items() if work.done()]:
                    yield last(index, storing.pop(index).result())
            for index, work in storing.items():
                yield last(index, await work)
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
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def _stored(self, feed: Feed, index: int, text: str, owner: str) -> dict[str, Any]:
        """Store the state behind a text if that was asked for; return its id as a field.

        It has read what was returned and nothing else. So where a stop string or an end of
        document ended the text, which the model has read in part, prompt and text are read again,
        before all requests that wait, and the end comes before the whole request is late. Where
        that fails the fields say why: the text was written and is returned all the same.
        """
        job, config = feed.jobs[index], self.config
        if not feed.task.request.store_state:
            return {}
        try:
            continuation = job.continuation
            if job.finish_reason != "length":
                ids = feed.prompt(index) + self.tokenizer.encode(text)
                end = feed.started + config.timeout_s + config.send_timeout_s / 2
                continuation = await self.read(
                    ids,
                    feed.task.before,
                    continuation,
                    timeout_s=end - time.monotonic(),
                    ahead=True,
                )
            assert continuation is not None
            return {"state": (await self.keep(owner, continuation)).id}
        except (ApiError, MetaStateError) as error:
            return {"state": None, "state_error": as_api_error(error).body()["error"]}

    def _logprobs(self, feed: Feed, index: int, first: int, end: int) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens `first` to `end - 1` in OpenAI's form."""
        task, job = feed.task, feed.jobs[index]
        if task.num_logprobs is None or job.logprobs is None:
            return None
        ids, offsets = job.tokens[first:end], job.offsets[first:end]
        found = [(own, best[: task.num_logprobs]) for own, best in job.logprobs[first:end]]

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, raw = self._name(token)
            return {"token": text, "logprob": logprob, "bytes": raw}

        def by_name(pairs: list[tuple[int, float]]) -> dict[str, float]:
            named: dict[str, float] = {}
            for token, logprob in pairs:  # of two tokens with one name the likelier is told
                named.setdefault(self._name(token)[0], logprob)
            return named

        if task.chat:
            content = [
                entry(token, own) | {"top_logprobs": [entry(*pair) for pair in best]}
                for token, (own, best) in zip(ids, found, strict=True)
            ]
            return {"content": content, "refusal": None}
        rows: list[LogProb | None] = [*found]
        if task.echo and job.prompt_logprobs is not None:
            text, starts = self._echoed(feed, index)
            ids, rows = [*feed.prompt(index), *ids], [*job.prompt_logprobs, *rows]
            offsets = [*starts, *(len(text) + offset for offset in offsets)]
        return {
            "tokens": [self._name(token)[0] for token in ids],
            "token_logprobs": [None if row is None else row[0] for row in rows],
            "top_logprobs": [None if row is None else by_name(row[1]) for row in rows],
            "text_offset": offsets,
        }

    def _echoed(self, feed: Feed, index: int) -> tuple[str, list[int]]:
        """Return the prompt of a text as text, and where in it each token begins."""
        decoder, text, offsets = StreamDecoder(self.tokenizer), "", []
        for token in feed.prompt(index):
            offsets.append(len(text))
            text += decoder.push(token)
        return text + decoder.finish(), offsets

    def _name(self, token: int) -> tuple[str, list[int] | None]:
        """Return a token as text, and its bytes where they are known; half a character is bytes.

        The text is that inside a text: some tokenizers drop the space of the first word. Else it is
        the spelling of the vocabulary.
        """
        decode_bytes = getattr(self.tokenizer, "decode_bytes", None)
        if decode_bytes is None:
            decode = self.tokenizer.decode
            text = decode([token, token])[len(decode([token])) :]
            if text and "\ufffd" not in text:
                return text, list(text.encode())
            spelled = getattr(self.tokenizer, "id_to_token", lambda _: None)(token)
            return spelled or text, None
        raw = decode_bytes([token])
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), list(raw)
