"""`metastate serve` as a process: keys, states across a restart, and how it stops."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

import metastate
from metastate.cli import main
from metastate.cli import serving as serving_command
from metastate.cli.serving import default_name, read_keys
from metastate.errors import ConfigError

KEY = "a-key-of-enough-characters"


@contextlib.contextmanager
def serving(*argv):
    """Start `metastate serve ... --port 0`; yield its process and url once it listens."""
    command = [sys.executable, "-m", "metastate", "serve", *map(str, argv), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        process.said = said
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def stop(process, number):
    """Send a signal; return the exit code and what was said since the start."""
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.dist
def test_sigterm_ends_streams_and_loses_no_state(checkpoint, tmp_path):
    model = metastate.load(checkpoint)
    with torch.no_grad():  # a logit of 0 is never the largest: no document ends
        model.head.weight[0] = 0
    checkpoint = tmp_path / "model"
    metastate.save(model, checkpoint)
    keys = tmp_path / "keys"
    keys.write_text(f"# mine\n\n{KEY}\n")
    argv = (checkpoint, "--api-key-file", keys, "--state-dir", tmp_path / "s", "--grace", "0.5")
    headers = {"authorization": f"Bearer {KEY}"}
    with serving(*argv) as (process, url):
        assert "serving model at" in process.said and KEY not in process.said
        assert httpx.get(f"{url}/v1/states", timeout=60).status_code == 401
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            ids = {client.post("/v1/states", json={"prompt": "a"}).json()["id"] for _ in range(3)}
            body = {"prompt": "b", "max_tokens": 4000, "stream": True, "n": 16, "temperature": 0}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        code, said = stop(process, signal.SIGTERM)
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "stopping"
    assert (code, said) == (0, "stopped\n")
    with serving(*argv) as (process, url):
        listed = httpx.get(f"{url}/v1/states", headers=headers, timeout=60).json()["data"]
        assert {state["id"] for state in listed} == ids
        assert stop(process, signal.SIGINT) == (0, "stopped\n")


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_right_after_the_address_is_said_is_not_lost(checkpoint, number):
    with serving(checkpoint) as (process, _):
        assert stop(process, number) == (0, "stopped\n")


def test_mistakes_are_said(checkpoint, tmp_path, capsys):
    def refused(*argv):
        assert main(["serve", str(checkpoint), *map(str, argv)]) == 2
        return capsys.readouterr().err

    keys, template = tmp_path / "keys", tmp_path / "t"
    assert "cannot read the keys" in refused("--api-key-file", keys)
    keys.write_text("short\n")
    assert "16 ASCII characters" in refused("--api-key-file", keys)
    keys.write_text("# nothing\n")
    assert "holds no key" in refused("--api-key-file", keys)
    template.write_text("{% if %}")
    assert "chat template" in refused("--template", template)
    assert "cannot read the chat template" in refused("--template", tmp_path / "none")
    assert "--max-tokens is 0" in refused("--max-tokens", "0")
    assert "--timeout is nan" in refused("--timeout", "nan")
    assert "--grace is inf" in refused("--grace", "inf")
    assert "max_slots is 0" in refused("--max-slots", "0")
    assert "cannot listen" in refused("--port", "99999")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused("--port", taken.getsockname()[1])
    assert main(["serve", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::1"])
def test_an_open_port_is_warned_of(checkpoint, monkeypatch, capsys, host):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(serving_command, "warm_up", lambda engine: None)
    monkeypatch.setattr(serving_command, "_on_signals", lambda handler: None)
    server = type("Server", (), {"run": lambda self, sockets: None})
    monkeypatch.setattr("metastate.infer.server.make_server", lambda *_: server())
    assert main(["serve", str(checkpoint), "--host", host, "--port", "0"]) == 0
    said = capsys.readouterr().err
    assert ("everybody who reaches 0.0.0.0" in said) == (host == "0.0.0.0")
    assert f"http://{'[::1]' if host == '::1' else host}:" in said


def test_a_template_in_the_checkpoints_folder_is_used(checkpoint, capsys):
    path = checkpoint / "chat_template.jinja"
    path.write_text("{% if %}")
    try:
        assert main(["serve", str(checkpoint)]) == 2
    finally:
        path.unlink()
    assert "chat template" in capsys.readouterr().err


def test_keys_and_names(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n  {KEY}2  \n#{KEY}3\n")
    assert read_keys(tmp_path / "keys") == (KEY, f"{KEY}2")
    (tmp_path / "keys").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("with space in it 0123456789\n")
    with pytest.raises(ConfigError, match="key 1"):
        read_keys(tmp_path / "keys")
    assert default_name("runs/mine/best") == default_name("runs/mine") == "mine"


def test_without_the_extra_it_says_what_to_install(checkpoint):
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        f"from metastate.cli import main; sys.exit(main(['serve', {str(checkpoint)!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "metastate[serve]" in done.stderr and "Traceback" not in done.stderr
