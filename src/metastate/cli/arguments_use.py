"""What the commands that use a model take: help texts and options; nothing here needs torch."""

from __future__ import annotations

from metastate.cli.arguments import add_model
from metastate.cli.options import Parser, add_flags, add_json

UPGRADE = """\
Put Meta-State layers into a trained RWKV-7, beside its feed-forward layers.

The new layers write nothing at first, so the model computes exactly what it did; that is measured
on real text, and a model that moved is not written. Then train what is new, with what was there
frozen (0) or slowed: `metastate train --from OUT --old-lr-scale 0 ...`. With --replace the
feed-forward layers of these blocks go, and the report says what that costs.
"""

CONVERT = """\
Turn checkpoints of other programs into ours, and back.

SRC.pth, an RWKV-7 as its authors publish it, becomes a folder that every command takes. Of our own
checkpoints --to rwkv makes such a file again (rwkv7 only), and --to metastate a copy, with another
--dtype or --tokenizer. Weights stay bit for bit as they are unless --dtype asks for others.
"""


def add_upgrade(parser: Parser) -> None:
    """Add the options of `metastate upgrade`."""
    add_model(parser)
    parser.add_argument(
        "--layers",
        default="all",
        metavar="N,N",
        help="blocks that get the layer, counted from 0, or all (default: all)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="take the feed-forward layers of these blocks out"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the new layers, as in meta_state.readout=both; repeatable",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the upgraded checkpoint")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="prepared data whose held-out text logits (and with --replace the loss) are compared "
        "on",
    )
    add_flags(parser, "seed")
    add_json(parser)


def add_convert(parser: Parser) -> None:
    """Add the options of `metastate convert`."""
    parser.add_argument("source", metavar="SRC", help="an RWKV-7 .pth file, or one of our folders")
    parser.add_argument("--out", metavar="DST", help="what to write: a folder, or a .pth file")
    parser.add_argument(
        "--to",
        choices=("metastate", "rwkv"),
        help="format of DST (default: metastate; one of our folders needs it said)",
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of the weights that are written (default: keep, as they are stored in SRC)",
    )
    parser.add_argument(
        "--tokenizer",
        help="record it in our folder, so that the model can read and write text: world, bytes, or "
        "the path of a tokenizer.json",
    )
    parser.add_argument(
        "--allow-nan", action="store_true", help="take weights that are NaN or infinite"
    )
    add_json(parser)
