"""The command line: parsers, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metastate import __version__
from metastate.cli import arguments
from metastate.cli.options import PATHS, Parser
from metastate.cli.progress import hear_kernels
from metastate.errors import ConfigError, MetaStateError

SPINS = "10000"  # rounds; OpenMP's own 300,000 trains up to 26 times slower on a busy machine
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of what could not be written
QUICK_START = """\
quick start:
  metastate demo                                          five minutes, nothing to download
  metastate prepare my_texts/ --out data/mine             text to tokens
  metastate train --preset metastate-tiny --data data/mine --out runs/mine
  metastate eval runs/mine/best --data data/mine          held-out loss
  metastate generate runs/mine/best --prompt "Once upon"  continue a text
  metastate grow runs/mine/best --head-size 128 --out big a larger model, the same function

`metastate COMMAND --help` explains a command.
"""


@dataclass(frozen=True)
class Command:
    """One command of the program; `arguments.add_NAME` gives its parser description and options.

    Attributes:
        name: as it is typed.
        help: one line for the list of commands.
        module: of metastate.cli, whose `run_NAME` runs it; imported then: torch comes with it.
        needs: options without which it cannot run.
    """

    name: str
    help: str
    module: str
    needs: tuple[str, ...] = ()


COMMANDS = (
    Command("demo", "train, evaluate and sample a small model in a few minutes", "demo"),
    Command("prepare", "turn text into token files", "commands", ("out",)),
    Command("train", "train a model", "training"),
    Command("eval", "measure the held-out loss of a model", "commands", ("data",)),
    Command("eval-tasks", "zero-shot tasks from local files", "zero_shot", ("data",)),
    Command("lm-eval", "zero-shot tasks of lm-evaluation-harness", "zero_shot", ("tasks",)),
    Command("generate", "continue a text", "commands"),
    Command("chat", "chat in the terminal", "chat"),
    Command("tune-state", "train the state that documents start from", "training", ("data", "out")),
    Command("serve", "serve a model over HTTP, as OpenAI's clients call it", "serving"),
    Command("grow", "make a model larger, its function unchanged", "growing", ("out",)),
    Command(
        "upgrade",
        "put Meta-State layers into an RWKV-7, its function unchanged",
        "growing",
        ("out",),
    ),
    Command("convert", "checkpoints of other programs to ours and back", "converting", ("out",)),
    Command(
        "compare",
        "train a matrix of models, sizes and seeds; table and report",
        "comparing",
        ("out",),
    ),
    Command("tasks", "train and score small models on state tracking or recall", "tasks"),
    Command(
        "info",
        "parameters, FLOPs and state bytes of a model; what a state file or prepared data hold",
        "commands",
    ),
    Command("doctor", "check every backend of this machine against the reference", "commands"),
)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser and the parsers of its commands by name."""
    parser = Parser(
        prog="metastate",
        description="Train, evaluate and run Meta-State language models.",
        epilog=QUICK_START,
    )
    parser.add_argument("--version", action="version", version=f"metastate {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}
    for command in COMMANDS:
        add = getattr(arguments, "add_" + command.name.replace("-", "_"))
        own = added.add_parser(command.name, help=command.help, description=inspect.getdoc(add))
        add(own)
        parsers[command.name] = own
    return parser, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own).

    Returns:
        The exit code: 0, 2 for a user's mistake (said on stderr), 130 after Ctrl-C, 141 where
        whoever read standard output went away.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as standard error does: a file name may hold what no encoding can say
        sys.stdout.reconfigure(errors="backslashreplace")
    return exit_code(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def exit_code(program: Callable[[], int | None]) -> int:
    """Run a program, this one or the `main` of a recipe; a mistake becomes a line on stderr.

    Returns:
        What `program` returned (None is 0), or the exit code of `main` for what went wrong.
    """
    try:
        code = program() or 0
        sys.stdout.flush()
        return code
    except MetaStateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _leave_stdout()
        return 141
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        print(f"error: standard output could not be written: {error.strerror}", file=sys.stderr)
        _leave_stdout()
        return 2


def _let_threads_sleep() -> None:
    """Have torch's threads sleep where they have waited for each other for SPINS rounds.

    Where another program keeps a core busy, a thread that never sleeps holds up the one that it
    waits for. OpenMP reads this as torch is loaded; what the user set counts.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _leave_stdout() -> None:
    """Let Python flush standard output into nothing at its end, or it would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    parser, commands = build_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(commands)}"
        raise ConfigError(f"unknown command {argv[0]!r}; {hint}")
    args, unknown = parser.parse_known_args(argv)
    commands.get(args.command, parser).check_unknown(unknown)
    command = next(c for c in COMMANDS if c.name == args.command)
    for name in PATHS:
        if value := getattr(args, name, None):
            setattr(args, name, os.path.expanduser(value))
    for name in command.needs:  # after unknown flags: those are the likelier mistake
        if not getattr(args, name, None):
            raise ConfigError(f"--{name} is missing; see `metastate {command.name} --help`")
    hear_kernels()
    _let_threads_sleep()
    module = importlib.import_module(f"metastate.cli.{command.module}")
    return getattr(module, "run_" + command.name.replace("-", "_"))(args) or 0
