"""A request of the engine: its text as it comes, read by another thread than writes it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metastate.infer.generate import Continuation, Draft, Statistics

TOP_LOGPROBS = 20
LogProb = tuple[float, list[tuple[int, float]]]


class Job:
    """One request: its text as it comes, and all about it.

    Attributes:
        id: unique in this process.
        error: why the request failed, or None.
        logprobs: with `want_logprobs`, a (log-probability, best) pair a token, before temperature
            and penalties; best holds the (token, log-probability) pairs of the likeliest tokens.
        draft: the text in the making; for the engine's thread, as what follows.
        num_best: so many of the likeliest tokens beside each of `prompt_logprobs`; None for none.
        read_logprobs: of the tokens read so far, behind the first of them.
        cancelled: it ends at the next step.
        wake: called when that is asked for.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        draft: Draft,
        deadline: float | None,
        want_logprobs: bool,
        num_prompt_logprobs: int | None,
    ) -> None:
        self.id = f"job-{next(self._numbers)}"
        self.error: Exception | None = None
        self.logprobs: list[LogProb] | None = [] if want_logprobs else None
        self.num_best = num_prompt_logprobs
        self.read_logprobs: list[LogProb] = []
        self.draft, self._deadline = draft, deadline
        self.cancelled = False
        self._pieces: list[str] = []
        self._done = False
        self._callbacks: list[Callable[[str | None], None]] = []
        self._changed = threading.Condition()
        self.wake: Callable[[], None] = lambda: None

    @property
    def finish_reason(self) -> str | None:
        """None until it is finished, then one of these.

        "length", "eod", "stop", "cancelled", "deadline", "error".
        """
        return self.draft.finish_reason if self._done else None

    @property
    def tokens(self) -> list[int]:
        """Sampled so far."""
        return self.draft.tokens

    @property
    def offsets(self) -> list[int]:
        """Of each token in the text that they make, in characters."""
        return self.draft.offsets

    @property
    def prompt_logprobs(self) -> list[LogProb | None] | None:
        """As `logprobs`, of the prompt's tokens, with `num_prompt_logprobs`; whole at the end.

        In it None stands for the first token where there was nothing before it.
        """
        if self.num_best is None:
            return None
        return [*[None] * self.draft.num_prompt, *self.read_logprobs][len(self.read_logprobs) :]

    @property
    def statistics(self) -> Statistics:
        """Tokens and seconds; those of decoding are shared with the rest of the batch."""
        return self.draft.statistics

    @property
    def seed(self) -> int:
        """Seed of the generator, also when it was drawn."""
        return self.draft.seed

    @property
    def continuation(self) -> Continuation | None:
        """What to save so that a later run goes on exactly; None before the end or an error."""
        return self.draft.continuation if self._done and self.error is None else None

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of text from the first on, waiting for those to come.

        Raises:
            Exception: `error`, at the end of a request that failed.
        """
        for i in itertools.count():
            with self._changed:
                self._changed.wait_for(lambda i=i: self._done or len(self._pieces) > i)  # type: ignore[misc]
                if i == len(self._pieces):
                    break
                piece = self._pieces[i]
            yield piece
        if self.error is not None:
            raise self.error

    def result(self, timeout_s: float | None = None) -> str:
        """Wait for the end and return the whole text.

        Raises:
            TimeoutError: it did not end in time; it goes on. Exception: `error`, if it failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_s):
                raise TimeoutError(f"{self.id} was not finished after {timeout_s} s")
        if self.error is not None:
            raise self.error
        return "".join(self._pieces)

    def on_event(self, callback: Callable[[str | None], None]) -> None:
        """Call `callback(piece)` with every piece of text, and `callback(None)` at the end.

        Pieces that came before are handed over at once, here; later ones in the engine's thread,
        which waits for the callback.
        """
        with self._changed:
            for piece in self._pieces:
                callback(piece)
            if self._done:
                callback(None)
            else:
                self._callbacks.append(callback)

    def cancel(self) -> None:
        """End the request at the next step; its continuation stands behind what was written."""
        self.cancelled = True
        self.wake()

    def add(self, piece: str) -> None:
        """Let listeners know of a piece of text, and of the end where there is a finish reason."""
        with self._changed:
            if piece:
                self._pieces.append(piece)
            self._done = self.draft.finish_reason is not None
            for callback in self._callbacks:
                if piece:
                    callback(piece)
                if self._done:
                    callback(None)
            self._changed.notify_all()

    def score(self, logits: Tensor, tokens: list[int]) -> None:
        """Note what the logits [n, V] of tokens read say of the n tokens that follow them."""
        assert self.num_best is not None
        self.read_logprobs += log_probabilities(logits, tokens, self.num_best)

    def overdue(self) -> str | None:
        """Return "cancelled" or "deadline" where one of them ends the request, else None."""
        if self.cancelled:
            return "cancelled"
        late = self._deadline is not None and time.monotonic() > self._deadline
        return "deadline" if late else None


def log_probabilities(logits: Tensor, tokens: list[int], num_best: int) -> list[LogProb]:
    """Return what logits [n, V] say of the n tokens that came next, and of the likeliest.

    For each, in nats: its log-probability, and the (token, log-probability) of the `num_best`.
    """
    scores = logits.float().log_softmax(-1)
    own = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0]
    best = scores.topk(min(num_best, scores.shape[-1]))
    rows = zip(own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [(p, list(zip(ids, values, strict=True))) for p, ids, values in rows]
