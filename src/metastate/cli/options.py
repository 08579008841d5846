"""Options shared by the commands: flags made from TrainConfig, config files and overrides.

A flag means the same in every command that has it, because its name, type and help come from one
table; a setting is the configuration's default, then the file's, then the flag's, then `--set`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from metastate.config import TrainConfig
from metastate.errors import ConfigError
from metastate.mapping import merge

HELP = {
    "preset": "model to train: ARCHITECTURE-SIZE, as in metastate-tiny, rwkv7-mini",
    "data": "folder made by `metastate prepare`",
    "from_checkpoint": "start from these weights (and moments, if there are any), not a preset",
    "out": "folder for checkpoints, log and curve",
    "model": "",
    "steps": "optimizer steps",
    "batch_size": "sequences a step (times --accumulate)",
    "context": "tokens a sequence",
    "accumulate": "batches whose gradients are summed before a step",
    "lr": "peak learning rate",
    "min_lr": "learning rate at the end of the schedule",
    "schedule": "course of the learning rate after warm-up: cosine, wsd or constant",
    "warmup": "steps over which the learning rate rises from zero",
    "decay_fraction": "last part of the run in which wsd decays, 0 to 1",
    "weight_decay": "decay of the large matrices (nothing else is decayed)",
    "beta1": "AdamW: memory of the gradient's mean",
    "beta2": "AdamW: memory of the gradient's square",
    "eps": "AdamW: added to the denominator",
    "clip": "largest norm of the whole gradient",
    "z_loss": "weight of the penalty that keeps the logits' scale near zero",
    "old_lr_scale": "after growth: factor of the learning rate of what was there before; 0 freezes",
    "growth": "YAML file whose list `growth` says at which steps the model grows, and to what",
    "seed": "initial weights, order of the data, sampling",
    "parallel": "what torchrun's processes do: none, ddp (a copy of the model each), fsdp (a part "
    "each), hsdp (parts within a machine, copies between)",
    "shard_size": "hsdp: processes that share one copy; 0 means those of a machine",
    "context_parallel": "processes that share the tokens of each sequence",
    "device": "where to compute: cpu, cuda, cuda:1",
    "dtype": "arithmetic of the matrix products: float32, bfloat16 (mixed) or float64",
    "backend": "kernels of the recurrence: auto, cpu, triton, chunked, reference, fla",
    "compile": "fuse elementwise work with torch.compile; slow to start",
    "activation_checkpointing": "recompute layers in the backward pass: less memory, more time",
    "document_reset": "start every document from an empty state, also inside a sequence",
    "carry_state": "sequences of a long document follow each other and hand on their state",
    "log_every": "steps between lines of the log",
    "valid_every": "steps between validations",
    "valid_tokens": "tokens of a validation",
    "checkpoint_every": "steps between checkpoints",
    "async_checkpoint": "write checkpoints beside the training, from a copy in memory",
    "tensorboard": "also write TensorBoard events (needs the package tensorboard)",
}


# Arguments that are paths: a ~ is a home in them also where the shell leaves it, as in --out=~/x.
PATHS = (
    *("checkpoint", "model", "source", "suite", "config", "growth_file", "data", "out"),
    *("state", "state_in", "state_out", "state_dir", "include_path", "api_key_file"),
)


def flag_of(name: str) -> str:
    """Return the command-line flag of a TrainConfig field."""
    return "--from" if name == "from_checkpoint" else "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are ConfigErrors, so that they look like all others."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage: the message is what helps."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def check_unknown(self, unknown: list[str]) -> None:
        """Refuse arguments that nothing took; name the flag nearest to the first of them."""
        if not unknown:
            return
        given = unknown[0].split("=")[0]
        kind = "option" if given.startswith("-") else "argument"
        near = self._nearest(given) if kind == "option" else None
        meant = TrainConfig.MEANT.get(given.lstrip("-").replace("-", "_"), "")
        if not near and meant.startswith("model.") and "--set" in self._option_string_actions:
            near = f"--set {meant}=..."
        hint = f"; did you mean {near}? See" if near else "; see"
        raise ConfigError(f"unknown {kind} {given!r}{hint} `{self.prog} --help`")

    def _nearest(self, given: str) -> str | None:
        """Return the flag that `given` was meant to be; None where that would be a far guess."""
        flags = {flag.lstrip("-"): flag for flag in self._option_string_actions if flag != "-h"}
        meant = {k.replace("_", "-"): flag_of(v) for k, v in TrainConfig.MEANT.items()}
        names = flags | {k: v for k, v in meant.items() if v in flags.values()}
        name = given.lstrip("-")
        # Dashes count for nothing: with them any two short flags are alike.
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if not near:
            pairs = [(*sorted((name, other), key=len), other) for other in flags]
            near = [other for short, long, other in pairs if short[2:] and long.startswith(short)]
        return names[near[0]] if len(near) == 1 else None


def add_flags(
    parser: argparse.ArgumentParser, *names: str, layered: bool = False, **defaults: Any
) -> None:
    """Add a flag for each TrainConfig field of `names`, its default TrainConfig's or `defaults`'.

    With `layered` a flag that is not given leaves no trace, so that a config file can set it.
    """
    hints = get_type_hints(TrainConfig)
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name in names:
        shown = defaults.get(name, fields[name].default)
        suffix = f" (default: {shown})" if shown not in ("", None) else ""
        settings: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS if layered else shown,
            "help": (HELP[name] + suffix).replace("%", "%%"),
        }
        if hints[name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = hints[name] if hints[name] in (int, float) else str
            settings["metavar"] = {int: "N", float: "X"}.get(hints[name], name.upper())
            settings["choices"] = get_args(hints[name]) or None
        parser.add_argument(flag_of(name), **settings)


def add_number(
    parser: argparse.ArgumentParser, flag: str, default: float | None, what: str, kind: type = int
) -> None:
    """Add a flag that takes a number of its default's type, or of `kind` where it has none."""
    if default is not None:
        kind, what = type(default), f"{what} (default: {default:g})"
    metavar = "X" if kind is float else "N"
    parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=what)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and `--set`."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the settings below; flags override it"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting by its dotted name, as in model.meta_state.read=value; repeatable",
    )


def positive(text: str) -> int:
    """Return the count that an argument gives, a whole number from 1; the `type` of one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def add_text(parser: argparse.ArgumentParser, flag: str, metavar: str, what: str) -> None:
    """Add a flag that takes a text, None where it is not given."""
    parser.add_argument(flag, metavar=metavar, help=what)


def add_switch(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    """Add a flag that is given or not."""
    parser.add_argument(flag, action="store_true", help=what)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    add_switch(parser, "--json", "print one JSON object, and nothing else, on stdout")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint that a command acts on."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint: RUN/best, RUN/last or RUN"
    )


def add_other_weights(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-other-weights`."""
    what = "take a state that other weights of the same configuration made"
    add_switch(parser, "--allow-other-weights", what)


def add_sampling(
    parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_p: float
) -> None:
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


def check_file(flag: str, path: str) -> None:
    """Raise ConfigError where `path`, to be written at the end of long work, cannot be."""
    if Path(path).is_dir():
        raise ConfigError(f"{flag} {path} is a folder; give the name of a file")
    near = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        why = "may not be written to" if near.is_dir() else "is no folder"
        raise ConfigError(f"{flag} {path}: {near} {why}; give a file that can be written")


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; ConfigError says what is wrong with it."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "reading a YAML config needs PyYAML: pip install 'metastate[cli]'"
        ) from error
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_loader(yaml, path))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold `key: value` lines; it holds a {type(data).__name__}")
    return data


def _loader(yaml: Any, path: str) -> type:
    """Return a safe loader that refuses a key that a mapping has twice: the last would win."""

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node, seen = super().compose_mapping_node(anchor), set()
            for key in (key for key, _ in node.value if isinstance(key.value, str)):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{path}, line {line}: {key.value!r} is there already")
                seen.add(key.value)
            return node

    return Loader


def parse_override(text: str) -> dict[str, Any]:
    """Turn `a.b=value` into {"a": {"b": value}}; the value is JSON, or else the text itself."""
    key, equals, raw = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text!r} is not KEY=VALUE, as in model.num_layers=6")
    try:
        value: Any = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the TrainConfig settings among the options of a command."""
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in fields}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the TrainConfig settings of the file, the flags and `--set`, laid over each other."""
    settings = merge(read_yaml(args.config) if args.config else {}, flags_of(args))
    if args.growth_file:
        schedule = read_yaml(args.growth_file)
        if schedule.keys() != {"growth"}:
            raise ConfigError(f"{args.growth_file} must hold one list, named `growth`")
        settings = merge(settings, schedule)
    for text in args.set:
        settings = merge(settings, parse_override(text))
    return settings
