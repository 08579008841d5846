"""What the commands that use a model take: help texts and options; nothing here needs torch."""

from __future__ import annotations

from metastate.cli.options import Parser, add_json

DOCTOR = """\
Compare every backend that can run here with the float64 reference: outputs and all gradients, \
through every entry point. The last line says it all; put it into a bug report. Exit code 1 means \
that what the program would use by itself is wrong."""


def add_doctor(parser: Parser) -> None:
    """Add the options of `metastate doctor`."""
    parser.add_argument("--device", help="check this device only: cpu, cuda, cuda:1 (default: all)")
    add_json(parser)
