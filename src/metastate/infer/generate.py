"""Stream text from a model, and stop at any token so that going on later is exact."""

from __future__ import annotations

import base64
import json
import operator
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metastate.config import ModelConfig
from metastate.data.tokenizer import StreamDecoder, Tokenizer
from metastate.errors import ConfigError, StateError
from metastate.infer.sampling import Sampler, SamplingConfig
from metastate.model.lm import LanguageModel
from metastate.model.state import ModelState

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Continuation:
    """Where a generation stood: what it takes to go on exactly as if it had never stopped.

    Attributes:
        state: after every consumed token.
        pending: tokens given or sampled that the model has not consumed; at most one after a run.
        history: the last generated tokens; they put the text decoder inside a character.
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
                torch.Generator().set_state(fields["generator"])  # refuses what is none
            for name in ("pending", "history", "recent"):
                fields[name] = tuple(operator.index(token) for token in fields.get(name, ()))
                if any(not 0 <= token < model.config.vocab_size for token in fields[name]):
                    raise ValueError(f"{name} holds what is no token of the model")
            if not isinstance(fields.get("shown", ""), str):
                raise ValueError("shown is no text")
            if fields.get("seed") is not None:
                operator.index(fields["seed"])
            return cls(state, **fields)
        except (AttributeError, TypeError, ValueError, RuntimeError) as cause:
            raise StateError(f"{path}: the generation's notes are broken ({cause})") from cause


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


class StopMatcher:
    """Lets text through except stop strings, also when they straddle pieces."""

    def __init__(self, stops: Sequence[str], shown: str = "") -> None:
        """Start after the text `shown`: a stop string that began there still stops."""
        self.stops = [s for s in stops if s]
        self.context = max(map(len, self.stops), default=1) - 1
        self.text = shown[len(shown) - min(len(shown), self.context) :]
        self.num_shown = len(self.text)

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return what can be shown and whether a stop string was completed."""
        self.text += text
        found = [i for i in map(self.text.find, self.stops) if i >= 0]
        if found:
            return self._show(min(found)), True
        held = max(
            (
                n
                for stop in self.stops
                for n in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:n])
            ),
            default=0,
        )
        return self._show(len(self.text) - held), False

    def finish(self) -> str:
        """Return the text held back because it might have become a stop string."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        out = self.text[self.num_shown : end]
        end = max(end, self.num_shown)
        drop = max(0, end - self.context)
        self.text, self.num_shown = self.text[drop:], end - drop
        return out


class Generation(Iterator[str]):
    """The pieces of text as they come; everything else about the run is an attribute.

    Attributes:
        tokens: sampled so far.
        finish_reason: "length", "eod" or "stop"; None while it runs.
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
        prefill_chunk: int,
    ) -> None:
        if max_tokens < 0 or prefill_chunk < 1:
            raise ConfigError(
                f"max_tokens is {max_tokens}, prefill_chunk {prefill_chunk}; at least 0 and 1"
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only "
                f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.prefill_chunk = max_tokens, prefill_chunk
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.statistics = Statistics()
        before = Continuation(state) if isinstance(state, ModelState) else state
        if before is not None and not before.state.tokens_seen and not before.pending:
            before = replace(before, pending=(tokenizer.eod_id,))  # as every document begins
        encoded = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._sampler = Sampler(sampling, min(num_real_tokens(tokenizer), model.config.vocab_size))
        self._decoder = StreamDecoder(tokenizer)
        self._state: ModelState | None = None
        if before is None:
            # In training every document begins behind an end of document.
            self._pending = [tokenizer.eod_id, *encoded]
            self._history: tuple[int, ...] = ()
            self._matcher = StopMatcher(stop)
        else:
            before.state.check(model)
            self._state = before.state
            self._pending = [*before.pending, *encoded]
            if not self._pending:
                raise ConfigError(
                    "nothing to go on from: a bare state holds no next token; give a prompt, or a "
                    "state that `generate` saved"
                )
            # A prompt between the two runs ends the unfinished character and the text.
            self._history = before.history if not encoded else ()
            for token in self._history:
                self._decoder.push(token)
            self._matcher = StopMatcher(stop, before.shown if not encoded else "")
            self._sampler.observe(before.recent)
            if before.generator is not None and sampling.seed in (None, before.seed):
                self._sampler.seed = before.seed or 0
                self._sampler.generator.set_state(before.generator)
        self._sampler.observe(encoded)
        self.seed = self._sampler.seed
        self._shown = self._matcher.text[: self._matcher.num_shown]
        self._pieces = self._run()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def drain(self) -> Generation:
        """Run to the end, text unheard, and return self."""
        for _ in self:
            pass
        return self

    @property
    def state(self) -> ModelState | None:
        """The state after all consumed tokens; None before the first."""
        return self._state

    @property
    def continuation(self) -> Continuation:
        """What to save so that a later run goes on exactly; valid after every piece."""
        return Continuation(
            self._state or self.model.init_state(1),
            tuple(self._pending),
            self._history,
            self._shown,
            tuple(self._sampler.recent),
            self._sampler.seed,
            self._sampler.generator.get_state(),
        )

    def _run(self) -> Iterator[str]:
        started = time.perf_counter()
        # The last token stays pending, so that a run of no tokens can be continued as well.
        while len(self._pending) > 1:
            chunk = self._pending[: min(self.prefill_chunk, len(self._pending) - 1)]
            self._consume(chunk)
            self.statistics.prefill_tokens += len(chunk)
        self.statistics.prefill_s = time.perf_counter() - started
        while self.finish_reason is None:
            if len(self.tokens) == self.max_tokens:
                self.finish_reason = "length"
                break
            started = time.perf_counter()
            logits = self._consume(self._pending)
            token = self._sampler.sample(logits)
            self._pending = [token]
            self.tokens.append(token)
            self.statistics.decode_tokens += 1
            self.statistics.decode_s += time.perf_counter() - started
            self._history = (*self._history, token)[-StreamDecoder.LIMIT :]
            if token == self.tokenizer.eod_id:
                text, self.finish_reason = self._decoder.finish(), "eod"
            else:
                text = self._decoder.push(token)
            piece, stopped = self._matcher.push(text)
            if stopped:
                self.finish_reason = "stop"
            if piece:
                yield self._show(piece)
        if self.finish_reason != "stop":
            rest = self._matcher.finish()
            if rest:
                yield self._show(rest)

    def _show(self, piece: str) -> str:
        text = self._shown + piece
        self._shown = text[len(text) - min(len(text), self._matcher.context) :]
        return piece

    @torch.no_grad()
    def _consume(self, tokens: list[int]) -> Tensor:
        """Run the model over `tokens`, keep the state, return the logits [V] of the last one."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            device = next(self.model.parameters()).device
            x, self._state, _ = self.model.features(
                torch.tensor([tokens], device=device), self._state
            )
            self._pending = self._pending[len(tokens) :]
            return self.model.head(x[:, -1:])[0, 0]
        finally:
            if was_training:
                self.model.train()


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
        is nothing to go on from. StateError: the state is another model's.
    """
    return Generation(
        model,
        tokenizer,
        prompt,
        state,
        sampling or SamplingConfig(),
        max_tokens,
        stop,
        prefill_chunk,
    )


def num_real_tokens(tokenizer: Tokenizer) -> int:
    """Return 1 + the largest id that means something: padding ids above it decode to nothing."""
    last = tokenizer.vocab_size - 1
    while last > tokenizer.eod_id and not tokenizer.decode([last]):
        last -= 1
    return last + 1
