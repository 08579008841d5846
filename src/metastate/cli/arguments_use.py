"""What the commands that use a model take: help texts and options; nothing here needs torch."""

from __future__ import annotations

from metastate.cli.arguments import add_model, add_other_weights
from metastate.cli.options import Parser, add_flags, add_json

TUNE_STATE = """\
Train the state that documents start from; the weights stay as they are.

tokens: P pairs of key and value a layer and head, S_0 = V^T K, a file of a few kilobytes.
state: the whole first state of every layer.

Load it with `generate --state-in FILE`, `chat --state-in FILE` or `eval --state FILE`. FILE holds
the state of the best validation; FILE.tuning, what --resume goes on from until the end.
"""

CHAT = """\
Chat with a model in the terminal; what it remembers stays of constant size, however long you talk.

/help lists what can be typed besides messages. Ctrl-C stops a reply, Ctrl-D leaves. The model was
trained on text, not on dialogue, unless you did so: --template says how a message becomes text.
"""


def add_tune_state(parser: Parser) -> None:
    """Add the options of `metastate tune-state`."""
    add_model(parser)
    parser.add_argument("--out", metavar="FILE", help="file for the state")
    parser.add_argument(
        "--what", choices=("tokens", "state"), default="tokens", help="see above (default: tokens)"
    )
    parser.add_argument(
        "--parameter-tokens",
        type=int,
        default=4,
        metavar="P",
        help="pairs of key and value a layer and head (default: 4)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="peak learning rate (default: 0.3 for tokens, 1 for state)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the same command was interrupted"
    )
    add_flags(
        parser,
        *("data", "steps", "batch_size", "context", "accumulate", "schedule", "warmup"),
        *("clip", "seed", "device", "dtype", "valid_every", "valid_tokens", "checkpoint_every"),
        steps=200,
        batch_size=8,
        context=256,
        warmup=10,
        valid_every=50,
        valid_tokens=16384,
        checkpoint_every=50,
    )
    add_json(parser)


def add_chat(parser: Parser) -> None:
    """Add the options of `metastate chat`."""
    add_model(parser)
    parser.add_argument(
        "--template",
        default="User: {message}\\n\\nAssistant:",
        metavar="TEXT",
        help="how a message is put to the model; \\n is a new line (default: %(default)s)",
    )
    parser.add_argument(
        "--plain", action="store_true", help="no template: the model goes on from what you type"
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a reply ends before TEXT; repeatable (default: where the template's next message "
        "would begin)",
    )
    parser.add_argument("--state-in", metavar="FILE", help="go on from a state file")
    add_other_weights(parser)
    for flag, kind, default, what in (
        ("--max-tokens", int, 512, "tokens of a reply at most"),
        ("--temperature", float, 0.8, "1 draws as learned, 0 always takes the most likely"),
        ("--top-k", int, 0, "draw from the N most likely; 0 is all"),
        ("--top-p", float, 0.95, "draw from the most likely that reach this probability"),
        ("--repetition-penalty", float, 1.0, "above 1 makes recent tokens less likely"),
    ):
        metavar = "N" if kind is int else "X"
        help = f"{what} (default: {default})"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=help)
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same replies again")
    add_flags(parser, "device", "dtype")
