"""What the commands take: help texts and options; nothing here needs torch."""

from __future__ import annotations

from dataclasses import fields

from metastate.cli.options import (
    HELP,
    Parser,
    add_config,
    add_flags,
    add_json,
    add_model,
    add_number,
    add_other_weights,
    add_sampling,
    add_switch,
    add_text,
)
from metastate.config import TrainConfig


def add_demo(parser: Parser) -> None:
    """Train, evaluate and sample a small model in a few minutes."""
    add_number(parser, "--minutes", 5.0, "time to train")
    add_flags(parser, "out", out="runs/demo")
    add_json(parser)


def add_prepare(parser: Parser) -> None:
    """Turn text into the memory-mapped token files that train and eval read.

    INPUT is any of: a text file, JSON records with a `text` field (.jsonl, .json, also .gz .xz
    .zst .bz2), a folder of such files, `stdlib` (the documentation and sources of the Python that
    runs this; nothing to download), or the name of a data set on the Hugging Face hub. Inputs named
    train.*, valid.* and test.* (or train-00000-of-00002.*) are those splits; otherwise each
    document goes to one by the hash of its text, so preparing again gives the same split. What of a
    folder is left out is said. Interrupted, the same command goes on where it was.
    """
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="see above")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, world (RWKV World), the path of a tokenizer.json, or a name on the Hugging "
        "Face hub (default: bytes)",
    )
    add_text(parser, "--out", "DIR", "folder for the prepared data")
    for name in ("valid", "test"):
        parser.add_argument(
            f"--{name}", nargs="+", default=[], metavar="INPUT", help=f"inputs of the {name} split"
        )
    for name in ("valid", "test"):
        add_number(parser, f"--{name}-fraction", 0.01, f"part of the documents that goes to {name}")
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of a JSON record that holds its text (default: text)",
    )
    add_switch(parser, "--overwrite", "replace data made with other settings")
    add_json(parser)


def add_train(parser: Parser) -> None:
    """Train a model on prepared data.

    Settings come from their defaults, then --config, then flags, then --set. Ctrl-C finishes the
    step, writes a checkpoint and stops; --resume goes on exactly where that was, and needs only
    --out.

    With many GPUs: torchrun --nproc-per-node 8 -m metastate train --parallel fsdp ...;
    docs/scaling.md
    """
    add_config(parser)
    add_switch(parser, "--resume", "go on from the last checkpoint in --out")
    parser.add_argument("--growth", dest="growth_file", metavar="FILE", help=HELP["growth"])
    add_json(parser)
    names = (f.name for f in fields(TrainConfig) if f.name not in ("model", "growth"))
    add_flags(parser, *names, layered=True)


def add_eval(parser: Parser) -> None:
    """Measure the loss on held-out documents: nats per token, perplexity and bits per byte.

    stateful: each document is read once, the state carried from its first token to its last.
    windowed: each document is cut into windows of --context tokens that start from an empty state.
    """
    add_model(parser)
    add_flags(parser, "data", "device", "dtype")
    add_number(parser, "--context", 512, "tokens of a window")
    add_number(parser, "--batch-size", 16, "documents, or windows, at once")
    parser.add_argument("--split", default="valid", help="train, valid or test (default: valid)")
    add_switch(parser, "--by-domain", "also the loss of each domain")
    add_switch(parser, "--by-position", "also the loss by tokens seen before")
    limit = "score so many tokens, of each domain its share (default: all)"
    add_number(parser, "--limit-tokens", None, limit)
    add_text(parser, "--state", "FILE", "let every document start from this state (tune-state)")
    add_other_weights(parser)
    add_json(parser)


def add_eval_tasks(parser: Parser) -> None:
    """Score zero-shot tasks from local files: accuracies, and LAMBADA's perplexity.

    DIR holds lambada/lambada_test.jsonl, hellaswag/hellaswag_val_full.txt.bz2, blimp/BLiMP.zip, and
    in mc_eval/ piqa, arc_easy, arc_challenge, winogrande, openbook_qa, copa and boolq (.jsonl);
    only the files of the chosen tasks are needed. Prompts and metrics are lm-evaluation-harness's.
    Beside each figure: its standard error, and what guessing would give.
    """
    add_model(parser)
    add_text(
        parser,
        "--tasks",
        "A,B",
        "lambada, hellaswag, piqa, arc_easy, arc_challenge, winogrande, openbookqa, copa, "
        "boolq, blimp (default: all)",
    )
    add_text(parser, "--data", "DIR", "folder with the files named above")
    add_scoring(parser, "score N items of each task (of BLiMP's paradigms), drawn at random once")


def add_lm_eval(parser: Parser) -> None:
    """Score tasks of lm-evaluation-harness, which fetches their data.

    pip install 'metastate[lm-eval]' brings it. --tasks takes its tasks, tags and groups;
    --include-path adds a folder of your own in its YAML.
    """
    add_model(parser)
    add_text(parser, "--tasks", "A,B", "names of lm-evaluation-harness")
    add_text(parser, "--include-path", "DIR", "folder with further tasks in YAML")
    solved = "solved items in front of each (default: what a task says, else 0)"
    add_number(parser, "--num-fewshot", None, solved)
    settings = "settings of tasks that generate text, as in temperature=0.7,max_gen_toks=64"
    add_text(parser, "--gen-kwargs", "KEY=VALUE,...", settings)
    add_switch(
        parser, "--confirm-run-unsafe-code", "allow tasks that run the code which the model writes"
    )
    add_scoring(parser, "score the first N items of each task")


def add_scoring(parser: Parser, limit: str) -> None:
    """Add the options of what scores a model on tasks."""
    add_number(parser, "--limit", None, f"{limit} (default: all)")
    add_number(parser, "--batch-size", 16, "texts at once")
    add_text(parser, "--out", "FILE", "also write the results there, as JSON")
    add_flags(parser, "device", "dtype")
    add_json(parser)


def add_generate(parser: Parser) -> None:
    """Continue a text, token by token as it is written.

    The prompt is --prompt, or else what comes on standard input. --state-out keeps everything that
    the model remembers, in a file of constant size; --state-in goes on from there later.
    """
    add_model(parser)
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    add_sampling(parser, max_tokens=256, temperature=1.0, top_p=1.0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    add_text(parser, "--state-in", "FILE", "go on from a state of --state-out or tune-state")
    add_text(parser, "--state-out", "FILE", "keep the state for later")
    add_other_weights(parser)
    add_flags(parser, "device", "dtype")
    add_json(parser)


def add_grow(parser: Parser) -> None:
    """Make a checkpoint larger without changing what it computes.

    Give the new size of any axes. The report shows parameters, state bytes, FLOPs, and how far the
    logits moved on real text. The optimizer's moments in RUN/last grow too, and so does a carried
    state (OUT/state.safetensors). Then train what is new, with what the model had before slowed or,
    at 0, frozen: `metastate train --from OUT --old-lr-scale 0.1 ...`
    """
    add_model(parser)
    for flag, what in (
        ("--head-size", "channels N of a head and its states"),
        ("--heads", "heads H"),
        ("--layers", "blocks L"),
        ("--parameter-tokens", "pairs P that make up the first state"),
        ("--ffn-size", "hidden channels F of a feed-forward layer"),
        ("--attention-slots", "slots A of a TokenFormer's projections"),
        ("--memory-heads", "heads of a surprise memory, for a model without one"),
    ):
        name = {"--heads": "num_heads", "--layers": "num_layers"}.get(flag)
        parser.add_argument(flag, dest=name, type=int, metavar="N", help=f"{what}, after growth")
    parser.add_argument(
        "--init",
        choices=("zero", "random", "released"),
        default="zero",
        help="zero keeps the function exactly; random, the paper's other choice, and released, "
        "what TokenFormer's code does, do not (default: zero)",
    )
    add_text(parser, "--out", "DIR", "folder for the grown checkpoint")
    add_text(
        parser, "--data", "DIR", "prepared data whose held-out text the logits are compared on"
    )
    add_number(parser, "--seed", 0, "draws the new entries")
    add_json(parser)


def add_compare(parser: Parser) -> None:
    """Compare models of equal size, trained on the same text in the same order.

    SUITE.yaml names models (a preset's architecture, and changes to it), sizes and seeds; recipes/
    has some. Every cell is a training run in OUT, so Ctrl-C loses nothing: the same command goes
    on, and a second process with the same --out takes cells that are free. OUT gets results.json,
    table.md, figures and report.html, one page that needs nothing else.
    """
    parser.add_argument("suite", metavar="SUITE.yaml", help="what to compare")
    add_text(parser, "--out", "DIR", "folder for runs, tables, figures and page")
    add_text(parser, "--data", "DIR", "prepared data (default: the suite's own)")
    add_switch(
        parser,
        "--match-params",
        "fit depth and hidden width of every model to the size's parameters within 1%%",
    )
    add_switch(parser, "--dry-run", "say what would be run, and for how long")
    add_switch(parser, "--report-only", "report on the cells that are finished")
    add_json(parser)


def add_tasks(parser: Parser) -> None:
    """Train and score small models on made-up tasks: what can a state compute, what can it hold?

    state-tracking: read elements of a finite group, say their product so far after each; the score
    is the fewest layers with more than 90 % accuracy at the longest length learned. recall: read
    pairs of key and value, say the value when the key comes again; passed above 99 %. The default
    steps take minutes and show how far S3 is learned; to solve it, and S5, A5, A4xZ5 and Z60 all
    the more, raise --steps. A model that stays at one right answer in PAIRS names some value of the
    sequence, a stage before recall: that says how it was trained (--steps, --batch-size, --lr, the
    vocabulary), not what its architecture can do. Meta-State has its surprise memory,
    metastate-memory is without it; rwkv7+memory and so on are the others with it.

    Each cell (problem, architecture, depth, learning rate) is written to OUT/results.json when it
    is finished, so Ctrl-C loses one cell at most and the same command goes on. More layers, and
    further learning rates, are left out where fewer passed already.
    """
    parser.add_argument("task", choices=("state-tracking", "recall"), help="see above")
    for flag, name, of_what, default in (
        ("--group", "groups", "S5, A5, A4xZ5, Z60 or smaller ones (S3, Z2xZ2)", "S3"),
        ("--level", "levels", "recall: TOKENSxPAIRS, 64x4 128x8 ... 2048x256", "64x4"),
        ("--architectures", "architectures", "metastate, metastate-memory, rwkv7 ...", "all five"),
    ):
        help = f"{of_what} (default: {default})"
        parser.add_argument(flag, dest=name, nargs="+", metavar="NAME", help=help)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="depths (default: 1 2 for state tracking, 2 for recall)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[3e-3],
        metavar="X",
        help="peak learning rates, the best one counts (default: 0.003)",
    )
    for flag, number, what in (
        ("--width", 64, "channels D"),
        ("--heads", 1, "heads H"),
        ("--length", None, "state tracking: elements of the longest sequence (default: 20)"),
        ("--vocab-size", None, "recall: half of it keys, half values (default: 8192)"),
        ("--steps", 2000, "optimizer steps of a cell at most"),
        ("--batch-size", None, "longest sequences a step (default: 64; recall: 32)"),
        ("--warmup", None, "steps over which the rate rises (default: a tenth, 100 at most)"),
    ):
        add_number(parser, flag, number, what)
    parser.add_argument(
        "--filler",
        choices=("zero", "random"),
        help="recall: what stands between pairs and queries, always 0, or any tokens of the "
        "vocabulary, which is harder (default: zero)",
    )
    add_switch(
        parser,
        "--match-params",
        "fit the hidden widths to the first architecture's parameters within 1%% (default: "
        "each has its usual width; the paper's layer has none)",
    )
    add_flags(parser, "weight_decay", "seed", "device")
    add_text(parser, "--out", "DIR", "folder for results, table and figure (default: runs/TASK)")
    add_json(parser)


def add_info(parser: Parser) -> None:
    """Show a model's parameters, FLOPs and state bytes, or what a state or prepared data hold."""
    parser.add_argument(
        "model",
        metavar="CKPT|PRESET|STATE|DATA",
        help="a checkpoint's folder, a preset, or a state file, of which every number is read to "
        "say where any is not finite; or prepared data",
    )
    add_flags(parser, "context", context=1024)
    add_json(parser)


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
    add_switch(parser, "--replace", "take the feed-forward layers of these blocks out")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the new layers, as in meta_state.readout=both; repeatable",
    )
    add_text(parser, "--out", "DIR", "folder for the upgraded checkpoint")
    text = "prepared data whose held-out text logits (and with --replace the loss) are compared on"
    add_text(parser, "--data", "DIR", text)
    add_number(parser, "--seed", 0, "draws the new entries")
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
    add_text(parser, "--out", "DST", "what to write: a folder, or a .pth file")
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
    add_switch(parser, "--allow-nan", "take weights that are NaN or infinite")
    add_json(parser)


def add_tune_state(parser: Parser) -> None:
    """Train the state that documents start from; the weights stay as they are.

    tokens: P pairs of key and value a layer and head, S_0 = V^T K, a file of a few kilobytes.
    state: the whole first state of every layer.

    Load it with `generate --state-in FILE`, `chat --state-in FILE` or `eval --state FILE`. FILE
    holds the state of the best validation; FILE.tuning, what --resume goes on from until the end.
    """
    add_model(parser)
    add_text(parser, "--out", "FILE", "file for the state")
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
    add_switch(parser, "--resume", "go on where the same command was interrupted")
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
    add_switch(parser, "--plain", "no template: the model goes on from what you type")
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a reply ends before TEXT; repeatable (default: where the template's next message "
        "would begin)",
    )
    add_text(parser, "--state-in", "FILE", "go on from a state file")
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
    add_text(parser, "--api-key-file", "FILE", "who holds one of its keys, one a line, may use /v1")
    add_text(parser, "--model-name", "NAME", "what clients call it (default: the run's folder)")
    add_text(
        parser,
        "--template",
        "FILE",
        "Jinja2 template of chats (default: CKPT/chat_template.jinja, or else User: and "
        "Assistant:)",
    )
    kept = "keep stored states there, also after a restart (default: as long as it runs)"
    add_text(parser, "--state-dir", "DIR", kept)
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
