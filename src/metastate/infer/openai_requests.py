"""The bodies of OpenAI's requests, field by field, and the template that makes chats into text."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from metastate.errors import ConfigError
from metastate.infer.gate import ApiError
from metastate.infer.job import TOP_LOGPROBS
from metastate.infer.sampling import SamplingConfig

DEFAULT_TEMPLATE = """\
{% set stop = ["\\n\\nUser:"] %}
{% set names = {"user": "User", "assistant": "Assistant"} %}
{% for message in messages %}
{{ "\\n\\n" if continued or not loop.first }}
{{- names.get(message.role, "System") }}: {{ message.content | trim }}
{%- endfor %}
{{- "\\n\\nAssistant:" }}
"""
GREEDY = 1e-5  # below it a temperature would divide the logits by almost nothing
# What official clients may send and what changes no token, and what may be sent as a default only.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}

TokenIds = Annotated[list[int], Field(fail_fast=True)]
Prompt = str | TokenIds


class Body(BaseModel):
    """A JSON object of known fields, each of its own type and no other."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonFields(Body):
    """What both kinds of completion take."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    state: str | None = None
    store_state: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in DEFAULTS and name not in cls.model_fields:
                if value is not None and value not in DEFAULTS[name]:
                    raise ApiError(
                        400,
                        f"{name} is not supported; leave it out (allowed: {DEFAULTS[name][0]!r})",
                        param=name,
                        code="unsupported",
                    )
            elif name not in HARMLESS:
                kept[name] = value
        return kept

    def sampling(self, index: int) -> SamplingConfig:
        """Return how to choose the tokens of the text `index`; each has a seed of its own.

        Without a seed each draws one, so that no two texts are the same draw, also where both go
        on from one state; under the seed that a state was drawn with, drawing goes on exactly.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = secrets.randbits(63) if self.seed is None else (self.seed + index) % 2**63
        return SamplingConfig(
            temperature=0.0 if temperature < GREEDY else temperature,
            top_k=self.top_k or 0,
            # 0 leaves the likeliest token, as with OpenAI.
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-9),
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=seed,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(CommonFields):
    """The body of /v1/completions."""

    prompt: (
        Prompt
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | None
    ) = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.stream:
            raise ApiError(400, "echo comes with the whole text; leave stream out", param="echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts; one without tokens where none is given."""
        prompt: Any = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        return prompt if prompt and not isinstance(prompt[0], int) else [prompt]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; fields that a client copies from an answer may be there if they are empty."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_extra(self) -> ChatMessage:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ApiError(
                    400,
                    f"messages with {name[:80]!r} are not supported; leave it out",
                    param="messages",
                    code="unsupported",
                )
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class ChatRequest(CommonFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true beside it", param="top_logprobs")
        return self


class ChatTemplate:
    """A Jinja2 template that makes one text of messages, run in a sandbox.

    It sees `messages` (each a role and a content), `continued` (whether a stored state came before)
    and `add_generation_prompt` (true). It may `set stop`, a list of texts that end an answer.
    """

    def __init__(self, source: str = DEFAULT_TEMPLATE) -> None:
        """Compile `source` and try it; ConfigError says what is wrong with it."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            self._template = environment.from_string(source)
        except TemplateError as cause:
            raise ConfigError(f"the chat template is no Jinja2: {cause}") from cause
        self.render([{"role": "user", "content": "Hello"}], continued=False)

    def render(
        self, messages: list[dict[str, str]], *, continued: bool
    ) -> tuple[str, tuple[str, ...]]:
        """Return the prompt and the stop strings; ConfigError if the template refuses."""
        try:
            module: Any = self._template.make_module(
                {
                    "messages": messages,
                    "continued": continued,
                    "add_generation_prompt": True,
                    "bos_token": "",
                    "eos_token": "",
                }
            )
        except Exception as cause:  # whatever the template's own code raises
            raise ConfigError(f"the chat template refuses these messages: {cause}") from cause
        return str(module), tuple(str(s) for s in getattr(module, "stop", ()) or ())
