"""What a run was made of, and whether a finished one is the run that is asked for now."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

from metastate import __version__
from metastate.config import TrainConfig
from metastate.data.loader import PreparedData
from metastate.errors import ConfigError
from metastate.mapping import to_dict
from metastate.train.checkpoint import FREE, find_checkpoint, has_run, read_trainer, saved_config


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes or says, as JSON has them."""
    return {k: v for k, v in to_dict(config).items() if k not in FREE}


def check_settings(old: dict[str, Any], config: TrainConfig, todo: str) -> None:
    """Check that `old`, the settings of the run in `config.out`, are those of `config`.

    Raises:
        ConfigError: one differs; the message names it and ends with `todo`.
    """
    old, new = to_dict(TrainConfig()) | old, settings(config)  # what came later had its default
    old, new = _flat(old), _flat(new)
    for key in [*new, *(k for k in old if k.startswith("model."))]:
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{config.out} was run with other settings ({key} {old.get(key)!r}, now "
                f"{new.get(key)!r}); {todo}"
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the fields of their model by name, where None says no more than none."""
    model = {f"model.{k}": v for k, v in settings["model"].items() if v is not None}
    return {k: v for k, v in settings.items() if k not in (*FREE, "model")} | model


def is_finished(config: TrainConfig) -> bool:
    """Say whether the run in `config.out` has come to its end.

    Raises:
        ConfigError: it is a run of other settings or other data. DataError: no such data.
    """
    if not has_run(config.out):
        return False
    todo = "choose another --out"
    check_settings(to_dict(saved_config(config.out)), config, todo)
    found = find_checkpoint(config.out)
    if found is None:
        return False
    at = read_trainer(found)
    if at.data != PreparedData.open(config.data).fingerprint:
        raise ConfigError(f"{config.out} was run on other data than {config.data} holds; {todo}")
    return at.step == config.steps


@functools.cache
def source() -> dict[str, str | None]:
    """Return the package's version, and the commit where it runs from a git checkout.

    The commit ends in "-dirty" where a tracked file differs from it. It is that of the first call:
    the files may change while a process goes on with what it has read.
    """
    return {"metastate": __version__, "commit": _commit(Path(__file__))}


def _commit(file: Path) -> str | None:
    """Return the commit of the checkout that has `file` among its own; None without one."""
    git = ["git", "-C", str(file.parent)]
    own = ["ls-files", "--error-unmatch", file.name]  # not a checkout around an installed package
    name = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run([*git, *own], capture_output=True, check=True)
        found = subprocess.run([*git, *name], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
