"""`metastate serve`: a model behind HTTP until it is told to stop."""

from __future__ import annotations

import argparse
import math
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from metastate.cli.models import load_model
from metastate.cli.progress import log
from metastate.data.files import expanded
from metastate.errors import ConfigError
from metastate.infer.engine import Engine
from metastate.infer.store import StateStore
from metastate.model.io import checkpoint_folder, tokenizer_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TEMPLATE = "chat_template.jinja"
MIN_KEY = 16  # characters; a shorter key could be guessed


def run_serve(args: argparse.Namespace) -> None:
    """`metastate serve`: listen, serve, and leave with everything stored."""
    from metastate.infer.server import ChatTemplate, ServerConfig, create_app, make_server

    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    local = args.host in LOOPBACK
    config = ServerConfig(
        model_name=args.model_name or default_name(args.checkpoint),
        keys=keys,
        hosts=LOOPBACK if local and not keys else (),
        max_prompt_tokens=_positive(args, "max_prompt_tokens"),
        max_tokens=_positive(args, "max_tokens"),
        max_concurrent=_positive(args, "max_concurrent"),
        timeout_s=_positive(args, "timeout"),
        grace_s=_positive(args, "grace"),
    )
    max_states = _positive(args, "max_states")
    max_bytes = _positive(args, "max_state_mib") * 2**20
    template = ChatTemplate(*_template(args))
    model = load_model(args.checkpoint, args, decoding=True)
    engine = Engine(
        model,
        tokenizer_of(model, args.checkpoint),
        max_slots=args.max_slots,
        max_waiting=args.max_waiting,
    )
    warm_up(engine)
    with tempfile.TemporaryDirectory(prefix="metastate-") as own, listen(args) as listener:
        folder = args.state_dir or own
        store = StateStore(folder, model, max_states=max_states, max_bytes=max_bytes)
        server = make_server(create_app(engine, store, config, template), engine, config)

        def leave(*_: object) -> None:
            server.should_exit = True

        # Uvicorn takes them over once it runs. What comes before that is not lost, and what it
        # raises again once it has stopped, or a second one that comes then, is no failure.
        _on_signals(leave)
        if not keys and not local:
            log(f"warning: everybody who reaches {args.host} may use this: see --api-key-file")
        host = f"[{args.host}]" if ":" in args.host else args.host
        log(f"serving {config.model_name} at http://{host}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
        _on_signals(signal.SIG_IGN)
    log("stopped")


def _on_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def warm_up(engine: Engine) -> None:
    """Let kernels compile now, not while the first client waits.

    Raises:
        StateError: the model's logits are not finite. Exception: whatever else the model raises.
    """
    job = engine.submit([engine.tokenizer.eod_id] * 64, max_tokens=2)
    while job.finish_reason is None:
        engine.step()
    job.result()
    engine.totals.clear()


def read_keys(path: str) -> tuple[str, ...]:
    """Return the keys of a file, one a line; empty lines and lines that begin with # are none.

    Raises:
        ConfigError: it cannot be read, holds no key, or one that is short or not plain ASCII.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read the keys in {path}: {cause}") from cause
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"key {number} of {path} must be at least {MIN_KEY} ASCII characters without "
                "spaces; `python -c 'import secrets; print(secrets.token_urlsafe())'` makes one"
            )
    if not keys:
        raise ConfigError(f"{path} holds no key; without --api-key-file none is asked for")
    return tuple(keys)


def default_name(checkpoint: str) -> str:
    """Return the name of the run that a checkpoint is of."""
    path = Path(checkpoint).absolute()
    return path.parent.name if path.name in ("best", "last") else path.name


def listen(args: argparse.Namespace) -> socket.socket:
    """Return a socket that listens on --host and --port; ConfigError if that is impossible."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        return socket.create_server((args.host, args.port), family=family, backlog=1024)
    except (OSError, OverflowError) as cause:
        raise ConfigError(
            f"cannot listen on {args.host}, port {args.port}: {cause}; choose another --port"
        ) from cause


def _template(args: argparse.Namespace) -> list[str]:
    """Return the text of --template, or of the checkpoint's own, in a list; else none."""
    path = expanded(args.template or checkpoint_folder(args.checkpoint) / TEMPLATE)
    if args.template is None and not path.is_file():
        return []
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read the chat template {path}: {cause}") from cause


def _positive(args: argparse.Namespace, name: str) -> int:
    value = getattr(args, name)
    if not 0 < value < math.inf:
        raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0 and finite")
    return value
