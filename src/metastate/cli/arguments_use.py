"""What the commands that use a model take: help texts and options; nothing here needs torch."""

from __future__ import annotations

from metastate.cli.arguments import add_model
from metastate.cli.options import Parser, add_flags

SERVE = """\
Serve a model over HTTP: completions and chats as OpenAI's clients call them, and stored states.

/v1/completions, /v1/chat/completions and /v1/models are OpenAI's; /v1/states keeps, forks, gives
and takes states, and the field `state` of a request goes on from one. / is a page to try all that.
Without --api-key-file everybody who reaches the port may use it, so it listens on this machine only
unless told otherwise. Ctrl-C or SIGTERM lets running requests finish for --grace seconds.
"""


def add_serve(parser: Parser) -> None:
    """Add the options of `metastate serve`."""
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="who holds one of its keys, one a line, may use /v1"
    )
    parser.add_argument(
        "--model-name", metavar="NAME", help="what clients call it (default: the run's folder)"
    )
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="Jinja2 template of chats (default: CKPT/chat_template.jinja, or else User: and "
        "Assistant:)",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="keep stored states there, also after a restart (default: as long as it runs)",
    )
    for flag, number, what in (
        ("--max-slots", 16, "requests that are decoded together"),
        ("--max-waiting", 64, "requests that wait for a slot; further ones get 429"),
        ("--max-concurrent", 32, "requests at once with one key"),
        ("--max-prompt-tokens", 32_768, "tokens of a prompt"),
        ("--max-tokens", 4096, "tokens that a request may ask for"),
        ("--max-states", 256, "states stored with one key"),
        ("--max-state-mib", 1024, "size of all states stored with one key"),
    ):
        parser.add_argument(
            flag, type=int, default=number, metavar="N", help=f"{what} (default: {number})"
        )
    for flag, seconds, what in (
        ("--timeout", 300.0, "seconds that a request may take"),
        ("--grace", 10.0, "seconds that running requests get when the server stops"),
    ):
        parser.add_argument(
            flag, type=float, default=seconds, metavar="X", help=f"{what} (default: {seconds:g})"
        )
    add_flags(parser, "device", "dtype")
