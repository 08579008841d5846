"""Stream text from a model, and stop at any token so that going on later is exact."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metastate.config import ModelConfig
from metastate.data.tokenizer import StreamDecoder, Tokenizer
from metastate.errors import ConfigError, ShapeError, StateError
from metastate.infer.sampling import Sampler, SamplingConfig
from metastate.infer.stops import StopMatcher
from metastate.model.decode import Decoder, make_decoder
from metastate.model.io import check_tokenizer
from metastate.model.lm import LanguageModel, evaluating
from metastate.model.state import ModelState

PREFILL_CHUNK = 256


@dataclass(frozen=True)
class Continuation:
    """Where a generation stood: what it takes to go on exactly as if it had never stopped.

    Attributes:
        state: after every consumed token.
        pending: tokens given or sampled that the model has not consumed; at most one after a run.
        history: the last tokens of the text, prompt included, at most StreamDecoder.LIMIT; they put
            the text decoder inside a character, or behind a word.
        shown: the last characters shown; a stop string may begin in them.
        recent: the window of the repetition penalty.
        seed: of the generator. generator: its state, or None for a fresh one.
    """

    state: ModelState
    pending: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    shown: str = ""
    recent: tuple[int, ...] = ()
    seed: int | None = None
    generator: Tensor | None = None

    def begun(self, eod_id: int) -> Continuation:
        """Return it as a text begins: a state that has read nothing reads an end of document."""
        is_start = not self.state.tokens_seen and not self.pending
        return replace(self, pending=(eod_id,)) if is_start else self

    def save(self, path: str | os.PathLike[str], model: LanguageModel | ModelConfig) -> None:
        """Write the state of `model` and, in the same file, the rest.

        Raises:
            StateError: the file cannot be written.
        """
        fields: dict[str, Any] = {
            "pending": self.pending,
            "history": self.history,
            "shown": self.shown,
            "recent": self.recent,
            "seed": self.seed,
        }
        if self.generator is not None:
            raw = self.generator.numpy().tobytes()
            fields["generator"] = base64.b64encode(raw).decode("ascii")
        extra = self.state.extra | {"generation": json.dumps(fields)}
        replace(self.state, extra=extra).save(path, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: LanguageModel,
        *,
        allow_other_weights: bool = False,
    ) -> Continuation:
        """Read what `save` wrote; a bare state file is a continuation with nothing pending.

        Raises:
            StateError: the file is no state of `model`, or its notes are broken.
        """
        state = ModelState.load(path, model, allow_other_weights=allow_other_weights)
        try:
            fields = json.loads(state.extra.get("generation", "{}"))
            raw = fields.pop("generator", None)
            if raw is not None:
                fields["generator"] = torch.tensor(list(base64.b64decode(raw)), dtype=torch.uint8)
            for name in ("pending", "history", "recent"):
                fields[name] = tuple(fields.get(name, ()))
            fields["history"] = fields["history"][-StreamDecoder.LIMIT :]
            found = cls(state, **fields)
            found._check_notes(model.config.vocab_size)
            return found
        except (AttributeError, RecursionError, RuntimeError, TypeError, ValueError) as cause:
            raise StateError(f"{path}: the generation's notes are broken ({cause})") from cause

    def _check_notes(self, vocab_size: int) -> None:
        """Raise ValueError or RuntimeError if a file says what no generation can have left."""
        for token in (*self.pending, *self.history, *self.recent):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(f"token {token!r}; ids run from 0 to {vocab_size - 1}")
        if not isinstance(self.shown, str):
            raise ValueError(f"the text shown is {self.shown!r}")
        seed = 0 if self.seed is None else self.seed
        if type(seed) is not int or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed {seed!r}")
        if self.generator is not None:
            torch.Generator().set_state(self.generator)  # which bounds each field for itself
            # Of a block of 624 numbers: those left and one, and the place of the next. Torch would
            # read on behind the block.
            left, _, place, _ = self.generator[8:24].view(torch.int32).tolist()
            if left + place > 625:
                raise ValueError(f"a generator at number {place} of a block with {left - 1} left")


@dataclass
class Statistics:
    """Tokens and seconds of a generation, reading the prompt and writing apart."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a rate is None where nothing was done."""

        def rate(tokens: int, seconds: float) -> float | None:
            return tokens / seconds if seconds > 0 else None

        return {
            **vars(self),
            "prefill_tokens_per_s": rate(self.prefill_tokens, self.prefill_s),
            "decode_tokens_per_s": rate(self.decode_tokens, self.decode_s),
        }


class Draft:
    """One text in the making: everything about a generation but running the model.

    Whoever runs the model lets `prefill` read all of `pending` but the last token, has the draft
    `enter` a row of a decoder, and hands the logits that its pending token gives to `write`, until
    there is a `finish_reason`.

    Attributes:
        pending: tokens given or sampled that the model has not consumed, at least one.
        tokens: sampled so far.
        offsets: of each of them in the text that they make, in characters.
        num_prompt: tokens of the prompt.
        finish_reason: "length", "eod", "stop", or what `end` was told; None while it runs.
        statistics: tokens and seconds.
        seed: of the generator, also when it was drawn.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        state: ModelState | Continuation | None,
        sampling: SamplingConfig,
        max_tokens: int,
        stop: Sequence[str],
    ) -> None:
        if max_tokens < 0:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be 0 or more")
        check_tokenizer(model, tokenizer)
        size = model.config.vocab_size
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.tokens: list[int] = []
        self.offsets: list[int] = []
        self._num_chars = 0
        self.finish_reason: str | None = None
        self.statistics = Statistics()
        before = Continuation(state) if isinstance(state, ModelState) else state
        before = None if before is None else before.begun(tokenizer.eod_id)
        encoded = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.num_prompt = len(encoded)
        self._sampler = Sampler(sampling, min(num_real_tokens(tokenizer), size))
        self._state: ModelState | None = None
        self._place: tuple[Decoder, int] | None = None
        if before is None:
            # In training every document begins behind an end of document.
            self.pending = [tokenizer.eod_id, *encoded]
            self._matcher = StopMatcher(stop)
        else:
            before.state.check(model)
            before.state.check_single()
            self._state = before.state
            self.pending = [*before.pending, *encoded]
            if not self.pending:
                raise ConfigError(
                    "nothing to go on from: a bare state holds no next token; give a prompt, or a "
                    "state that `generate` saved"
                )
            # A prompt between the two runs ends the unfinished character and the text.
            self._matcher = StopMatcher(stop, before.shown if not encoded else "")
            self._sampler.observe(before.recent)
            if before.generator is not None and sampling.seed in (None, before.seed):
                self._sampler.seed = before.seed or 0
                self._sampler.generator.set_state(before.generator)
        wrong = [t for t in self.pending if not 0 <= t < size]
        if wrong:
            raise ShapeError(f"the prompt holds token {wrong[0]}; ids run from 0 to {size - 1}")
        self._sampler.observe(encoded)
        history = before.history if before and not encoded else text_before(encoded, tokenizer)
        self._history = history[-StreamDecoder.LIMIT :]
        self._decoder = StreamDecoder(tokenizer)
        for token in self._history:
            self._decoder.push(token)
        self.seed = self._sampler.seed
        self._shown = self._matcher.text[: self._matcher.num_shown]

    @property
    def state(self) -> ModelState | None:
        """The state after every consumed token; None before the first."""
        return self._state if self._place is None else self._place[0].get(self._place[1])

    @property
    def unseen(self) -> str:
        """Text that was written and not shown: a stop string or its beginning, half a character."""
        return self._matcher.text[self._matcher.num_shown :] + self._decoder.unfinished

    def stand_beside(self, other: Draft) -> None:
        """Take over what `other`, of the same prompt behind the same state, has read of it."""
        self._state, self.pending = other._state, list(other.pending)

    def enter(self, decoder: Decoder, row: int) -> None:
        """Let the state live in a row of `decoder`, where the tokens are decoded."""
        decoder.put(row, self.state or self.model.init_state(1))
        self._state, self._place = None, (decoder, row)

    def leave(self) -> None:
        """Take the state back."""
        self._state, self._place = self.state, None

    @property
    def continuation(self) -> Continuation:
        """What to save so that a later run goes on exactly."""
        return Continuation(
            self.state or self.model.init_state(1),
            tuple(self.pending),
            self._history,
            self._shown,
            tuple(self._sampler.recent),
            self._sampler.seed,
            self._sampler.generator.get_state(),
        )

    def write(self, logits: Tensor) -> str:
        """Choose the next token by `logits` [V], what `pending` led to; return text to show.

        Raises:
            StateError: the logits are not finite.
        """
        self.pending = []
        token = self._sampler.sample(logits)
        self.pending = [token]
        self.tokens.append(token)
        self.statistics.decode_tokens += 1
        ended = token == self.tokenizer.eod_id
        # Behind an end of document another text begins, which completes no character of this one.
        self._history = () if ended else (*self._history, token)[-StreamDecoder.LIMIT :]
        text = self._decoder.finish() if ended else self._decoder.push(token)
        self.offsets.append(self._num_chars)
        self._num_chars += len(text)
        piece, stopped = self._matcher.push(text)
        piece = self._show(piece)
        if stopped:
            self.finish_reason = "stop"
            return piece
        return piece + (self.end("eod") if ended else self.end_if_full())

    def end_if_full(self) -> str:
        """End with "length" after `max_tokens`; return the rest of the text."""
        return self.end("length") if len(self.tokens) == self.max_tokens else ""

    def end(self, reason: str) -> str:
        """End the text; return what was held back because it might have become a stop string."""
        self.finish_reason = reason
        return self._show(self._matcher.finish())

    def _show(self, piece: str) -> str:
        text = self._shown + piece
        self._shown = text[len(text) - min(len(text), self._matcher.context) :]
        return piece


class Generation(Draft, Iterator[str]):
    """A draft that runs the model itself: the pieces of text as they come."""

    def __init__(self, *args: Any, prefill_chunk: int) -> None:
        if prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk is {prefill_chunk}; it must be at least 1")
        super().__init__(*args)
        self._pieces = self._run(prefill_chunk)

    def __next__(self) -> str:
        return next(self._pieces)

    def drain(self) -> Generation:
        """Run to the end, text unheard, and return self."""
        for _ in self:
            pass
        return self

    def _run(self, prefill_chunk: int) -> Iterator[str]:
        while prefill(self, prefill_chunk):
            pass
        piece = self.end_if_full()
        if self.finish_reason is None:
            decoder = make_decoder(self.model, 1)
            self.enter(decoder, 0)
        while self.finish_reason is None:
            started = time.perf_counter()
            with inference(self.model):
                logits = decoder.step(self.pending)
            piece = self.write(logits[0])
            self.statistics.decode_s += time.perf_counter() - started
            if piece and self.finish_reason is None:
                yield piece
        if piece:
            yield piece


@contextlib.contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """Run the model without gradients and in evaluation mode, which is put back afterwards.

    A model whose matrices are bfloat16 (model.decode.store_bfloat16) multiplies in bfloat16.
    """
    weight, as_it_is = model.head.weight, contextlib.nullcontext()
    half = weight.dtype == torch.bfloat16
    with (
        evaluating(model) if model.training else as_it_is,
        torch.no_grad(),
        torch.autocast(weight.device.type, torch.bfloat16) if half else as_it_is,
    ):
        yield


def prefill(
    draft: Draft, chunk: int, score: Callable[[Tensor, list[int]], None] | None = None
) -> bool:
    """Let the model read up to `chunk` tokens of the prompt; False when one token is left.

    The last token stays pending, so that a run of no tokens can be continued as well. `score` is
    handed the logits [n, V] of the n tokens read, and the n tokens that follow them.
    """
    tokens = draft.pending[: min(chunk, len(draft.pending) - 1)]
    if not tokens:
        return False
    started = time.perf_counter()
    with inference(draft.model):
        x = torch.tensor([tokens], device=draft.model.embedding.weight.device)
        if score is None:
            draft._state = draft.model.read(x, draft.state)
        else:
            logits, draft._state = draft.model(x, draft.state)
            score(logits[0], draft.pending[1 : len(tokens) + 1])
    del draft.pending[: len(tokens)]
    draft.statistics.prefill_tokens += len(tokens)
    draft.statistics.prefill_s += time.perf_counter() - started
    return True


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] = "",
    *,
    state: ModelState | Continuation | None = None,
    sampling: SamplingConfig | None = None,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    prefill_chunk: int = PREFILL_CHUNK,
) -> Generation:
    """Continue `prompt`; iterate over the result for the text, whole characters as they come.

    Reading the prompt takes memory for `prefill_chunk` tokens, however long it is. A fresh state
    reads an end of document first, as every document in training does; an empty prompt then starts
    a new document. Ids that the tokenizer does not know (padding) are never sampled. Generation
    ends after `max_tokens`, at an end of document, or at a stop string, which is never shown.

    Args:
        model: in any mode; sampling needs no gradients and records none.
        tokenizer: the one that the model was trained with.
        prompt: text, or token ids.
        state: to go on from: the `continuation` of another run goes on exactly as one run would
            have (bit by bit on the CPU), a bare ModelState needs a prompt.
        sampling: how to choose tokens; None is `SamplingConfig()`. With a continuation its seed
            must be None or the old one, or the drawing starts anew.
        max_tokens: tokens to sample, 0 or more.
        stop: strings that end the text.
        prefill_chunk: prompt tokens a forward.

    Raises:
        ConfigError: a setting is out of range, the tokenizer has more ids than the model, or there
        is nothing to go on from. ShapeError: a token of the prompt is none of the model's.
        StateError: the state is another model's; or, later, the logits are not finite.
    """
    given = (model, tokenizer, prompt, state, sampling or SamplingConfig(), max_tokens, stop)
    return Generation(*given, prefill_chunk=prefill_chunk)


def text_before(prompt: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end of a prompt, behind which its text goes on: some tokenizers decode by it.

    It is empty where the prompt ends inside a character, which the text does not complete.
    """
    last = tuple(prompt[-StreamDecoder.LIMIT :])
    return () if tokenizer.decode(last).endswith("\ufffd") else last


def num_real_tokens(tokenizer: Tokenizer) -> int:
    """Return 1 + the largest id that means something: padding ids above it decode to nothing."""
    last = tokenizer.num_ids - 1
    while last > tokenizer.eod_id and not tokenizer.decode([last]):
        last -= 1
    return last + 1
