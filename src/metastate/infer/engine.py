"""Serve many requests with one model: they join and leave a running batch at any token.

Every request owns a Draft, as a generation alone does; the engine only runs the model. The states
live in a decoder of `max_slots` rows, made once: a request that joins is copied into the first free
row, and when one leaves the last row takes its place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from metastate.data.tokenizer import Tokenizer
from metastate.errors import BusyError, ConfigError, EngineError, MetaStateError
from metastate.infer.generate import PREFILL_CHUNK, Continuation, Draft, inference, prefill
from metastate.infer.job import TOP_LOGPROBS, Job, log_probabilities
from metastate.infer.sampling import SamplingConfig
from metastate.model.decode import make_decoder
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState

logger = logging.getLogger(__name__)


class Engine:
    """Run many requests at once: `submit` from any thread, `step` (or `start`) in one.

    A request's tokens do not depend on what else runs.

    Attributes:
        totals: counts since the start: "prompt_tokens", "generated_tokens", and the requests that
            ended by their finish reason.
        fault: what ended the thread of `start`, or None; every request it had failed with that.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_slots: int = 16,
        max_waiting: int = 64,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        sizes = {"max_slots": max_slots, "max_waiting": max_waiting, "prefill_chunk": prefill_chunk}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; it must be at least 1")
        self.model, self.tokenizer = model, tokenizer
        self.max_slots, self.max_waiting = max_slots, max_waiting
        self.prefill_chunk = prefill_chunk
        self.totals: Counter[str] = Counter()
        self.fault: BaseException | None = None
        self._unfinished: set[Job] = set()  # wherever a job is, also between two places
        self._waiting: deque[Job] = deque()
        self._joining: Job | None = None
        self._prompt: tuple[ModelState | None, list[int]] = (None, [])  # of the joining one, whole
        self._running: list[Job] = []  # a job's index is its row
        self._decoder = make_decoder(model, max_slots)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def num_running(self) -> int:
        """Requests that hold a slot, and the one whose prompt is being read.

        That is one more than `max_slots` where the prompt is of a request that writes nothing,
        which needs no slot.
        """
        return len(self._running) + (self._joining is not None)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, *args: Any, ahead: bool = False, **settings: Any) -> Job:
        """Queue a request: `make` and `queue`, with the arguments and errors of both."""
        job = self.make(*args, **settings)
        self.queue(job, ahead=ahead)
        return job

    def make(
        self,
        prompt: str | Sequence[int] = "",
        *,
        state: ModelState | Continuation | None = None,
        sampling: SamplingConfig | None = None,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
        want_logprobs: bool = False,
        num_prompt_logprobs: int | None = None,
    ) -> Job:
        """Return a request to `queue`; a long prompt takes its time, so call it in any thread.

        The arguments are those of `generate`, which gives the same tokens, bit by bit on a CPU; a
        GPU may round another batch otherwise. Requests that wait with the same prompt behind the
        same state have it read once.

        Args:
            prompt: text, or token ids.
            state: to go on from.
            sampling: how to choose tokens; None is `SamplingConfig()`.
            max_tokens: tokens to sample, 0 or more.
            stop: strings that end the text.
            timeout_s: seconds from now after which it ends with "deadline"; None means never.
            want_logprobs: fill `Job.logprobs`.
            num_prompt_logprobs: fill `Job.prompt_logprobs`, with so many of the likeliest tokens.

        Raises:
            ConfigError, ShapeError, StateError: as `generate`.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"timeout_s is {timeout_s}; it must be above 0")
        sampling = sampling or SamplingConfig()
        draft = Draft(self.model, self.tokenizer, prompt, state, sampling, max_tokens, stop)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = Job(draft, deadline, want_logprobs, num_prompt_logprobs)
        job.wake = self._notify
        return job

    def queue(self, job: Job, *, ahead: bool = False) -> None:
        """Let a job of `make` wait for its turn; at once, whatever its length.

        With `ahead` it goes before all that wait, as the end of a request that was taken.

        Raises:
            BusyError: `max_waiting` requests wait already, or the engine was stopped.
            EngineError: it failed.
        """
        with self._changed:
            if self.fault is not None:
                raise EngineError(f"the engine failed ({self.fault!r}); start it anew")
            if self._stopping:
                raise BusyError("the engine was stopped; it takes no more requests")
            if len(self._waiting) >= self.max_waiting and not ahead:
                raise BusyError(
                    f"{self.max_waiting} requests wait already; try again later, or give the "
                    "engine a larger max_waiting"
                )
            if ahead:
                self._waiting.appendleft(job)
            else:
                self._waiting.append(job)
            self._unfinished.add(job)
            self._changed.notify_all()

    def step(self) -> bool:
        """Read one chunk of one joining prompt, then decode one token of every running request.

        Returns False when there was nothing to do. Only one thread may call it.
        """
        self._drop_overdue()
        busy = self._read_prompt()
        if self._running:
            self._decode()
            busy = True
        return busy

    def start(self) -> None:
        """Run `step` in a thread of its own until `stop`; after a fault, with new requests."""
        if self._thread is not None:
            raise ConfigError("the engine runs already")
        self._stopping, self.fault = False, None
        self._thread = threading.Thread(target=self._run, name="metastate-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, and cancel those there are."""
        with self._changed:
            self._stopping = True
            for job in self._unfinished:
                job.cancelled = True
            self._changed.notify_all()
        if self._thread is None:
            self._drop_overdue()
        else:
            self._thread.join()
            self._thread = None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self.step() or self._await_work():
                pass
        except BaseException as error:  # of the engine itself: nobody may wait for ever
            with self._changed:
                self.fault = error
                jobs = list(self._unfinished)
                self._waiting.clear()
            self._running, self._joining = [], None
            for job in jobs:
                self._fail(job, EngineError(f"the engine failed: {error!r}"))
            raise

    def _await_work(self) -> bool:
        """Wait until there is something to do; False when the engine is told to stop."""
        with self._changed:
            if not self._waiting and not self._stopping:
                self._changed.wait()
            return bool(self._waiting) or not self._stopping

    def _finish(self, job: Job, piece: str) -> None:
        reason = job.draft.finish_reason
        assert reason is not None
        self.totals[reason] += 1
        with self._changed:
            self._unfinished.discard(job)
        job.add(piece)

    def _drop_overdue(self) -> None:
        """End what was cancelled or is late, whether it waits, joins or runs."""
        with self._changed:
            waiting = [job for job in self._waiting if job.overdue()]
            for job in waiting:
                self._waiting.remove(job)
        if self._joining is not None and self._joining.overdue():
            waiting.append(self._joining)
            self._joining = None
        for job in waiting:
            self._finish(job, job.draft.end(job.overdue() or ""))
        for job in [job for job in self._running if job.overdue()]:
            self._leave(job)
            self._finish(job, job.draft.end(job.overdue() or ""))

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, MetaStateError):
            logger.error("a text could not be written: %s", error, exc_info=error)
        job.error = error
        job.draft.finish_reason = "error"
        self._finish(job, "")

    def _read_prompt(self) -> bool:
        """Read a chunk of the joining prompt, if there is one and a slot for what follows it."""
        if self._joining is None:
            with self._changed:
                if not self._waiting:
                    return False
                writes = self._waiting[0].draft.max_tokens > 0
                if writes and len(self._running) == self.max_slots:
                    return False
                self._joining = self._waiting.popleft()
            draft = self._joining.draft
            self._prompt = (draft.state, list(draft.pending))
        job = self._joining
        draft, before = job.draft, job.statistics.prefill_tokens
        try:
            prefill(draft, self.prefill_chunk, None if job.num_best is None else job.score)
        except Exception as error:  # whatever it is, the other requests go on
            self._joining = None
            self._fail(job, error)
            return True
        self.totals["prompt_tokens"] += job.statistics.prefill_tokens - before
        if len(draft.pending) == 1:
            self._joining = None
            self._share(job)
            piece = draft.end_if_full()
            if draft.finish_reason is None:
                draft.enter(self._decoder, len(self._running))
                self._running.append(job)
            else:
                self._finish(job, piece)
        return True

    def _share(self, job: Job) -> None:
        """Let those that wait with the prompt that `job` has read go on from where it stands."""
        (state, prompt), self._prompt = self._prompt, (None, [])
        with self._changed:
            for other in self._waiting if len(prompt) > 1 else ():
                draft, scored = other.draft, other.num_best in (None, job.num_best)
                if draft.state is state and draft.pending == prompt and scored:
                    draft.stand_beside(job.draft)
                    other.read_logprobs = job.read_logprobs

    def _leave(self, job: Job) -> None:
        """Free the row of `job`; the last row moves there."""
        job.draft.leave()
        row, last = self._running.index(job), self._running.pop()
        if last is not job:
            last.draft.enter(self._decoder, row)
            self._running[row] = last

    def _decode(self) -> None:
        started = time.perf_counter()
        jobs = list(self._running)
        try:
            with inference(self.model):
                logits = self._decoder.step([job.draft.pending[0] for job in jobs])
        except Exception as error:
            for job in jobs:
                self._leave(job)
                self._fail(job, error)
            return
        for job, row in zip(jobs, logits, strict=True):
            draft = job.draft
            try:
                piece = draft.write(row)
                if job.logprobs is not None:
                    job.logprobs += log_probabilities(row[None], draft.tokens[-1:], TOP_LOGPROBS)
            except Exception as error:
                self._leave(job)
                self._fail(job, error)
                continue
            self.totals["generated_tokens"] += 1
            job.statistics.decode_s += time.perf_counter() - started
            if draft.finish_reason is not None:
                self._leave(job)
                self._finish(job, piece)
            elif piece:
                job.add(piece)
