"""What commands take, help texts and options, with arguments_use.py; nothing here needs torch."""

from __future__ import annotations

from dataclasses import fields

from metastate.cli.options import HELP, Parser, add_config, add_flags, add_json, add_number
from metastate.config import TrainConfig


def add_model(parser: Parser) -> None:
    """Add the checkpoint that a command acts on."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint: RUN/best, RUN/last or RUN"
    )


def add_new_seed(parser: Parser) -> None:
    """Add `--seed` of a command that gives a model new parameters."""
    add_number(parser, "--seed", 0, "draws the new entries")


def add_other_weights(parser: Parser) -> None:
    """Add `--allow-other-weights`."""
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="take a state that other weights of the same configuration made",
    )


def add_sampling(parser: Parser, *, max_tokens: int, temperature: float, top_p: float) -> None:
    """Add how many tokens are drawn, and how, with these defaults."""
    for flag, default, what in (
        ("--max-tokens", max_tokens, "tokens to write at most"),
        ("--temperature", temperature, "1 draws as learned, 0 always takes the most likely"),
        ("--top-k", 0, "draw from the N most likely; 0 is all"),
        ("--top-p", top_p, "draw from the most likely that together reach this probability"),
        ("--repetition-penalty", 1.0, "above 1 makes recent tokens less likely"),
        ("--seed", None, "draw the same text again"),
    ):
        add_number(parser, flag, default, what)


def add_demo(parser: Parser) -> None:
    """Train, evaluate and sample a small model in a few minutes."""
    add_number(parser, "--minutes", 5.0, "time to train")
    add_flags(parser, "out", out="runs/demo")
    add_json(parser)


def add_prepare(parser: Parser) -> None:
    """Turn text into the memory-mapped token files that train and eval read.

    INPUT is any of: a text file, JSON records with a `text` field (.jsonl, .json, also .gz .xz
    .zst), a folder of such files, `stdlib` (the documentation and sources of the Python that runs
    this; nothing to download), or the name of a data set on the Hugging Face hub. Inputs named
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
    parser.add_argument("--out", metavar="DIR", help="folder for the prepared data")
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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace data made with other settings"
    )
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
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out"
    )
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
    parser.add_argument("--by-domain", action="store_true", help="also the loss of each domain")
    parser.add_argument(
        "--by-position", action="store_true", help="also the loss by tokens seen before"
    )
    limit = "score so many tokens, of each domain its share (default: all)"
    add_number(parser, "--limit-tokens", None, limit)
    parser.add_argument(
        "--state", metavar="FILE", help="let every document start from this state (tune-state)"
    )
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
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="lambada, hellaswag, piqa, arc_easy, arc_challenge, winogrande, openbookqa, copa, "
        "boolq, blimp (default: all)",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the files named above")
    add_scoring(parser, "score N items of each task (of BLiMP's paradigms), drawn at random once")


def add_lm_eval(parser: Parser) -> None:
    """Score tasks of lm-evaluation-harness, which fetches their data.

    pip install 'metastate[lm-eval]' brings it. --tasks takes its tasks, tags and groups;
    --include-path adds a folder of your own in its YAML.
    """
    add_model(parser)
    parser.add_argument("--tasks", metavar="A,B", help="names of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="DIR", help="folder with further tasks in YAML")
    solved = "solved items in front of each (default: what a task says, else 0)"
    add_number(parser, "--num-fewshot", None, solved)
    parser.add_argument(
        "--gen-kwargs",
        metavar="KEY=VALUE,...",
        help="settings of tasks that generate text, as in temperature=0.7,max_gen_toks=64",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="allow tasks that run the code which the model writes",
    )
    add_scoring(parser, "score the first N items of each task")


def add_scoring(parser: Parser, limit: str) -> None:
    """Add the options of what scores a model on tasks."""
    add_number(parser, "--limit", None, f"{limit} (default: all)")
    add_number(parser, "--batch-size", 16, "texts at once")
    parser.add_argument("--out", metavar="FILE", help="also write the results there, as JSON")
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
    parser.add_argument(
        "--state-in", metavar="FILE", help="go on from a state of --state-out or tune-state"
    )
    parser.add_argument("--state-out", metavar="FILE", help="keep the state for later")
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
    parser.add_argument("--out", metavar="DIR", help="folder for the grown checkpoint")
    parser.add_argument(
        "--data", metavar="DIR", help="prepared data whose held-out text the logits are compared on"
    )
    add_new_seed(parser)
    add_json(parser)


def add_compare(parser: Parser) -> None:
    """Compare models of equal size, trained on the same text in the same order.

    SUITE.yaml names models (a preset's architecture, and changes to it), sizes and seeds; recipes/
    has some. Every cell is a training run in OUT, so Ctrl-C loses nothing: the same command goes
    on, and a second process with the same --out takes cells that are free. OUT gets results.json,
    table.md, figures and report.html, one page that needs nothing else.
    """
    parser.add_argument("suite", metavar="SUITE.yaml", help="what to compare")
    parser.add_argument("--out", metavar="DIR", help="folder for runs, tables, figures and page")
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: the suite's own)")
    parser.add_argument(
        "--match-params",
        action="store_true",
        help="fit depth and hidden width of every model to the size's parameters within 1%%",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run, and for how long"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="report on the cells that are finished"
    )
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
    parser.add_argument(
        "--match-params",
        action="store_true",
        help="fit the hidden widths to the first architecture's parameters within 1%% (default: "
        "each has its usual width; the paper's layer has none)",
    )
    add_flags(parser, "weight_decay", "seed", "device")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for results, table and figure (default: runs/TASK)"
    )
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
