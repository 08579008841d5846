"""What the commands that use a model take: help texts and options; nothing here needs torch."""

from __future__ import annotations

from metastate.cli.arguments import add_model, add_new_seed, add_other_weights, add_sampling
from metastate.cli.options import Parser, add_flags, add_json, add_number


def add_upgrade(parser: Parser) -> None:
    """Put Meta-State layers into a trained RWKV-7, beside its feed-forward layers.

    The new layers write nothing at first, so the model computes exactly what it did; that is
    measured on real text, and a model that moved is not written. Then train what is new, with what
    was there frozen (0) or slowed: `metastate train --from OUT --old-lr-scale 0 ...`. With
    --replace the feed-forward layers of these blocks go, and the report says what that costs.
    """
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
    add_new_seed(parser)
    add_json(parser)


def add_convert(parser: Parser) -> None:
    """Turn checkpoints of other programs into ours, and back.

    SRC.pth, an RWKV-7 as its authors publish it, or a Hugging Face folder (ours, or an RWKV-7 of
    flash-linear-attention's layout) becomes a folder that every command takes. Of our own
    checkpoints --to hf makes a Hugging Face folder, --to rwkv and --to fla such a file and folder
    again (rwkv7 only), and --to metastate a copy, with another --dtype or --tokenizer. Weights stay
    bit for bit as they are unless --dtype asks for others.
    """
    parser.add_argument("source", metavar="SRC", help="a .pth file or a folder, see above")
    parser.add_argument("--out", metavar="DST", help="what to write: a folder, or a .pth file")
    parser.add_argument(
        "--to",
        choices=("metastate", "hf", "rwkv", "fla"),
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
        help="record it in the folder, so that the model can read and write text: world, bytes, or "
        "the path of a tokenizer.json",
    )
    parser.add_argument(
        "--allow-nan", action="store_true", help="take weights that are NaN or infinite"
    )
    add_json(parser)


def add_tune_state(parser: Parser) -> None:
    """Train the state that documents start from; the weights stay as they are.

    tokens: P pairs of key and value a layer and head, S_0 = V^T K, a file of a few kilobytes.
    state: the whole first state of every layer.

    Load it with `generate --state-in FILE`, `chat --state-in FILE` or `eval --state FILE`. FILE
    holds the state of the best validation; FILE.tuning, what --resume goes on from until the end.
    """
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
    rate = "peak learning rate (default: 0.3 for tokens, 1 for state)"
    add_number(parser, "--lr", None, rate, float)
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
    """Chat with a model in the terminal; what it remembers stays of constant size.

    /help lists what can be typed besides messages. Ctrl-C stops a reply, Ctrl-D leaves. The model
    was trained on text, not on dialogue, unless you did so: --template says how a message becomes
    text.
    """
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
    add_sampling(parser, max_tokens=512, temperature=0.8, top_p=0.95)
    add_flags(parser, "device", "dtype")


def add_serve(parser: Parser) -> None:
    """Serve a model over HTTP: OpenAI's completions and chats, and stored states.

    /v1/completions, /v1/chat/completions and /v1/models are OpenAI's; /v1/states keeps, forks,
    gives and takes states, and the field `state` of a request goes on from one. / is a page to try
    all that. Without --api-key-file everybody who reaches the port may use it, so it listens on
    this machine only unless told otherwise. Ctrl-C or SIGTERM lets running requests finish for
    --grace seconds.
    """
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    add_number(parser, "--port", 8000, "0 takes a free one")
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
        ("--max-waiting", 64, "texts that wait for a slot; further ones get 429"),
        ("--max-concurrent", 32, "requests, and texts that they write, at once with one key"),
        ("--max-prompt-tokens", 32_768, "tokens of a prompt"),
        ("--max-tokens", 4096, "tokens that a request may ask for"),
        ("--max-states", 256, "states stored with one key"),
        ("--max-state-mib", 1024, "size of all states stored with one key"),
        ("--timeout", 300.0, "seconds that a request may take"),
        ("--grace", 10.0, "seconds that running requests get when the server stops"),
    ):
        add_number(parser, flag, number, what)
    add_flags(parser, "device", "dtype")


def add_doctor(parser: Parser) -> None:
    """Compare every backend that can run here with the float64 reference.

    Outputs and all gradients, through every entry point. The last line says it all; put it into a
    bug report. Exit code 1 means that what the program would use by itself is wrong.
    """
    parser.add_argument("--device", help="check this device only: cpu, cuda, cuda:1 (default: all)")
    add_json(parser)
