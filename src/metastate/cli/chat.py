"""`metastate chat`: talk to a model in the terminal, on memory of constant size."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from metastate.cli.models import load_model, sampling_of
from metastate.cli.progress import log
from metastate.data.files import expanded
from metastate.data.tokenizer import Tokenizer
from metastate.errors import ConfigError, MetaStateError
from metastate.infer.generate import Continuation, generate
from metastate.infer.sampling import SamplingConfig
from metastate.model.io import tokenizer_of
from metastate.model.lm import LanguageModel, arithmetic

MESSAGE = "{message}"
TURN = "\n\n"  # between a reply and the next message
UNDO = 32  # places that a conversation keeps for /undo, each of the size of a state
TAIL = "chat_tail"  # note in a saved state

COMMANDS = ("fork", "switch", "undo", "reset", "save", "load", "set", "help")
HELP = """\
/fork NAME         copy this conversation as NAME and go on in the copy
/switch NAME       go on in another one; /switch alone lists them
/undo              take the last message (or /reset, /load) back
/reset             start this conversation again
/save FILE         keep what the model remembers; /load FILE goes on from it
/set NAME VALUE    temperature, top_k, top_p, repetition_penalty, seed, max_tokens
/help, /exit       //text sends a message that begins with a slash"""


@dataclass(frozen=True)
class Place:
    """A point of a conversation between a reply and the next message.

    Attributes:
        at: what the model remembers; None before anything was read.
        tail: text that the model wrote and nobody saw: a stop string, or its beginning, with which
            the next message begins.
    """

    at: Continuation | None = None
    tail: str = ""


@dataclass(frozen=True)
class Template:
    """How messages become text.

    Attributes:
        text: holds {message}; "{message}" alone is plain continuation.
        stop: strings that end a reply.
    """

    text: str
    stop: Sequence[str]

    @property
    def is_plain(self) -> bool:
        """Whether the model goes on from the message itself."""
        return self.text == MESSAGE

    def prompt(self, message: str, place: Place) -> str:
        """Return what the model reads next, less what it wrote of it already."""
        text = self.text.replace(MESSAGE, message)
        if not self.is_plain and place.at is not None and place.at.state.tokens_seen:
            text = TURN + text
        return text.removeprefix(place.tail)

    def begins_with(self, tail: str) -> bool:
        """Whether every next message begins with `tail`, text that the model wrote already."""
        turn = "" if self.is_plain else TURN
        return (turn + self.text.partition(MESSAGE)[0]).startswith(tail)


class Chat:
    """Conversations by name, and what is typed between their messages.

    Attributes:
        drawing: seed and generator behind the last reply. The next one goes on drawing there,
            whatever place it goes on from: after /undo, /switch or /reset the same message gets
            another reply, and a seed still gives the same session.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: Template,
        sampling: SamplingConfig,
        max_tokens: int,
        *,
        allow_other_weights: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling, self.max_tokens = sampling, max_tokens
        self.allow_other_weights = allow_other_weights
        self.drawing: dict[str, Any] = {}
        self.first = Place()
        self.name = "main"
        self.conversations: dict[str, list[Place]] = {self.name: [self.first]}

    def start_from(self, path: str) -> None:
        """Let the conversation begin with a state file, and /reset lead back to it."""
        self.load(path)
        del self.conversations[self.name][0]
        self.first = self.place

    @property
    def place(self) -> Place:
        """Where the present conversation stands."""
        return self.conversations[self.name][-1]

    def go_to(self, place: Place) -> None:
        """Let the present conversation stand at `place`; /undo leads back."""
        places = self.conversations[self.name]
        places.append(place)
        del places[:-UNDO]

    def handle(self, line: str) -> bool:
        """Do what a line says; return whether to go on.

        Raises:
            MetaStateError: it cannot be done; the conversation is as it was.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name == "exit":
                return False
            self.command(name, rest.strip())
        elif line.strip() or self.template.is_plain:
            self.reply(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def reply(self, message: str) -> None:
        """Print the reply to `message` as it is written; Ctrl-C ends it there."""
        before = self.place.at
        if self.drawing:
            # As None is, a fresh state is the start of a document.
            before = replace(before or Continuation(self.model.init_state(1)), **self.drawing)
        prompt = self.template.prompt(message, self.place)
        settings: dict[str, Any] = {"state": before, "sampling": self.sampling}
        settings |= {"max_tokens": self.max_tokens, "stop": self.template.stop}
        run = generate(self.model, self.tokenizer, prompt, **settings)
        # A continuation is never changed, so the last one is whole wherever Ctrl-C strikes.
        at, tail, shown = None, "", ""
        try:
            for piece in run:
                blank = not shown.strip()
                at, tail, shown = run.continuation, run.unseen, shown + piece
                print(piece.lstrip(" ") if blank else piece, end="", flush=True)
            at, tail = run.continuation, run.unseen
        except KeyboardInterrupt:
            if at is None:
                log("\nstopped before the reply began; the message is forgotten")
                return
        print(flush=True)
        self.drawing = {"seed": at.seed, "generator": at.generator}
        if not self.template.begins_with(tail):  # so it is read again, without what nobody saw
            settings["max_tokens"], tail = 0, ""
            run = generate(self.model, self.tokenizer, prompt + shown, **settings).drain()
            at = replace(run.continuation, **self.drawing)
        if at.pending == (self.tokenizer.eod_id,) and not self.template.is_plain:
            at = replace(at, pending=())  # the conversation goes on all the same
        self.go_to(Place(at, tail))

    def command(self, name: str, rest: str) -> None:
        """Run `/name rest`: the method of that name."""
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, [*COMMANDS, "exit"], n=1, cutoff=0.5)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise ConfigError(f"unknown command /{name}; {hint}")
        getattr(self, name)(rest)

    def help(self, _: str) -> None:
        """List the commands."""
        log(HELP)

    def fork(self, name: str) -> None:
        """Copy the present conversation and go on in the copy."""
        if not name or name in self.conversations:
            raise ConfigError(f"/fork {name}: a new name is needed; there are {self.names()}")
        self.conversations[name] = list(self.conversations[self.name])
        self.name = name
        log(f"in {name}")

    def switch(self, name: str) -> None:
        """Go on in another conversation."""
        if name and name not in self.conversations:
            raise ConfigError(f"no conversation {name!r}; there are {self.names()}")
        self.name = name or self.name
        log(f"in {self.name}; there are {self.names()}")

    def names(self) -> str:
        """Return the names of all conversations as text."""
        return ", ".join(self.conversations)

    def undo(self, _: str) -> None:
        """Go one place back."""
        places = self.conversations[self.name]
        if len(places) == 1:
            raise ConfigError("nothing to undo")
        places.pop()

    def reset(self, _: str) -> None:
        """Go to where every conversation begins."""
        self.go_to(self.first)

    def save(self, path: str) -> None:
        """Write the present place as a state file."""
        at = self.place.at
        if not path or at is None:
            raise ConfigError("nothing was said, so there is no state" if path else "/save FILE")
        state = replace(at.state, extra=at.state.extra | {TAIL: self.place.tail})
        replace(at, state=state).save(expanded(path), self.model)
        log(f"saved to {path}: {at.state.num_bytes:,} bytes of state")

    def load(self, path: str) -> None:
        """Go on from a state file."""
        if not path:
            raise ConfigError("/load FILE")
        at = Continuation.load(
            expanded(path), self.model, allow_other_weights=self.allow_other_weights
        )
        at.state.check_single(path)
        self.go_to(Place(at, at.state.extra.get(TAIL, "")))

    def set(self, rest: str) -> None:
        """Change how tokens are drawn, or show it."""
        values: dict[str, Any] = vars(self.sampling) | {"max_tokens": self.max_tokens}
        name, _, text = rest.partition(" ")
        if not rest:
            log(", ".join(f"{key} {value}" for key, value in values.items()))
            return
        if name not in values:
            raise ConfigError(f"unknown setting {name!r}; there are {', '.join(values)}")
        number = float if name in ("temperature", "top_p", "repetition_penalty") else int
        try:
            value = number(text)
        except ValueError:
            raise ConfigError(f"/set {name} {text!r}: a number is needed") from None
        if name == "max_tokens":
            self.max_tokens = check_max_tokens(int(value))
        else:
            self.sampling = replace(self.sampling, **{name: value})  # type: ignore[arg-type]


def check_max_tokens(value: int) -> int:
    """Return `value`; ConfigError where no reply would have room in it."""
    if value < 1:
        raise ConfigError(f"max_tokens is {value}; it must be 1 or more")
    return value


def template_of(args: argparse.Namespace) -> Template:
    """Return the template that the options ask for."""
    text = MESSAGE if args.plain else args.template.replace("\\n", "\n")
    if MESSAGE not in text:
        raise ConfigError(f"--template {args.template!r} lacks {MESSAGE}, the place of a message")
    label = text.partition(MESSAGE)[0].rstrip(" ")
    stop = [TURN + label] if label else []
    return Template(text, stop if args.stop is None else args.stop)


def run_chat(args: argparse.Namespace) -> None:
    """Read lines until the end of input or /exit; a mistake is a line, and the chat goes on."""
    template = template_of(args)
    sampling = sampling_of(args)
    limit = check_max_tokens(args.max_tokens)
    model = load_model(args.checkpoint, args)
    tokenizer = tokenizer_of(model, args.checkpoint)
    leave = args.allow_other_weights
    chat = Chat(model, tokenizer, template, sampling, limit, allow_other_weights=leave)
    if args.state_in:
        chat.start_from(args.state_in)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (with it input() edits lines and recalls them)
        log("/help lists what can be typed besides messages; Ctrl-D leaves")
    going = True
    while going:
        try:
            line = input(f"{chat.name}> " if interactive else "")
            with arithmetic(args.device, args.dtype):
                going = answer(chat, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            log("")  # as in a shell, the line is dropped
        except UnicodeError as error:
            log(f"error: what was typed is no text ({error})")
        except BrokenPipeError:
            raise  # whoever read the replies went away
        except OSError as cause:
            raise MetaStateError(f"the chat can be read or written no more: {cause}") from cause


def answer(chat: Chat, line: str) -> bool:
    """Do what a line says; return whether to go on. A mistake is said, and the chat goes on.

    Raises:
        UnicodeError: the line is no text. OSError: the terminal fails (files raise our errors).
    """
    try:
        return chat.handle(line)
    except (UnicodeError, OSError):
        raise
    except MetaStateError as error:
        log(f"error: {error}")
    except Exception as error:  # whatever it is, the conversation outlives it
        log(f"error: {error!r}; the conversation is as it was")
    return True
