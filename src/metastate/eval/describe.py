"""What a model is, in figures: parameters, FLOPs, state, lineage."""

from __future__ import annotations

from typing import Any

from metastate.config import ModelConfig
from metastate.mapping import to_dict
from metastate.model.io import not_finite
from metastate.model.lm import LanguageModel, sketch

CONTEXTS = (1024, 8192, 65536)


def describe(model: LanguageModel | ModelConfig, context: int = 1024) -> dict[str, Any]:
    """Return what `metastate info` shows, as plain JSON values.

    A config alone is enough: its model is laid out on the meta device, which takes no memory.

    Args:
        model: a model, or its configuration.
        context: training length in tokens that the FLOPs of attention are counted for.

    Returns:
        architecture, parameters {part: count}, flops_per_token {context, forward, backward},
        state_bytes {tokens: bytes} of this model, transformer_cache_bytes {tokens: bytes} of a
        Transformer of the same width, depth and dtype, not_finite {tensor: number of values that
        are NaN or infinite}, config, lineage, tokenizer.
    """
    model = sketch(model) if isinstance(model, ModelConfig) else model
    config = model.config
    forward, backward = model.flops_per_token(context)
    element = model.embedding.weight.element_size()
    cache = 2 * config.num_layers * config.hidden_size * element
    return {
        "architecture": config.architecture,
        "parameters": model.count_parameters(),
        "flops_per_token": {"context": context, "forward": forward, "backward": backward},
        "state_bytes": {n: model.state_bytes(1, n) for n in CONTEXTS},
        "transformer_cache_bytes": {n: cache * n for n in CONTEXTS},
        "not_finite": not_finite(model.state_dict()),
        "config": to_dict(config),
        "lineage": model.lineage,
        "tokenizer": model.tokenizer_info,
    }


def describe_table(model: LanguageModel | ModelConfig, context: int = 1024) -> str:
    """Return `describe` as text for people."""
    facts = describe(model, context)
    config, counts = facts["config"], dict(facts["parameters"])
    sums = {name: counts.pop(name) for name in ("non_embedding", "total")}
    head = (
        f"{facts['architecture']}: {config['num_layers']} layers, width {config['hidden_size']}, "
        f"{config['num_heads']} heads of {config['head_size']}, vocabulary {config['vocab_size']:,}"
    )
    lines = [head, *not_finite_lines(facts["not_finite"]), "", "parameters"]
    lines += [
        f"  {name.replace('_', ' '):<16}{count:>16,}  {count / sums['total']:>6.1%}"
        for name, count in [*counts.items(), *sums.items()]
    ]
    flops = facts["flops_per_token"]
    lines += ["", f"FLOPs a token, training at {flops['context']:,} tokens"]
    lines += [
        f"  {name:<16}{amount:>16,}"
        for name, amount in [
            ("forward", flops["forward"]),
            ("backward", flops["backward"]),
            ("together", flops["forward"] + flops["backward"]),
        ]
    ]
    lines += ["", f"  {'bytes after':<14}{'this state':>18}{'Transformer cache*':>22}"]
    lines += [
        f"  {f'{n:,} tokens':<14}{facts['state_bytes'][n]:>18,}"
        f"{facts['transformer_cache_bytes'][n]:>22,}"
        for n in CONTEXTS
    ]
    lines.append("  * keys and values of a Transformer of the same width, depth and number format")
    lines += ["", "config"]
    for name, value in config.items():
        if isinstance(value, dict):
            lines.append(f"  {name}")
            lines += [f"    {key:<18}{_text(item)}" for key, item in value.items()]
        else:
            lines.append(f"  {name:<20}{_text(value)}")
    lines += ["", "lineage" if facts["lineage"] else "lineage: trained from scratch, never grown"]
    for step in facts["lineage"]:
        shown = {k: v for k, v in step.items() if k != "before"}
        lines.append("  " + ", ".join(f"{key} {_text(value)}" for key, value in shown.items()))
    if facts["tokenizer"]:
        lines += ["", f"tokenizer: {facts['tokenizer'].get('name')}"]
    return "\n".join(lines)


def not_finite_lines(counts: dict[str, int]) -> list[str]:
    """Return one line that warns of `not_finite` tensors, none where all are finite."""
    if not counts:
        return []
    name, more = next(iter(counts)), len(counts) - 1
    others = f" and in {more:,} other tensors" if more else ""
    return [f"warning: {counts[name]:,} values NaN or infinite in {name}{others}"]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)
