"""`metastate chat`: what is typed, what comes back, and that the model has read exactly that."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch

import metastate
from metastate.cli import chat as chat_module
from metastate.cli import main
from metastate.cli.chat import Chat, Template
from metastate.data.tokenizer import ByteTokenizer
from metastate.errors import ConfigError
from metastate.infer.generate import Continuation
from metastate.infer.sampling import Sampler, SamplingConfig

DIALOGUE = Template("User: {message}\n\nAssistant:", ("\n\nUser:",))


@pytest.fixture
def model(checkpoint):
    return metastate.load(checkpoint).eval()


@pytest.fixture
def chat(model):
    return Chat(model, ByteTokenizer(), DIALOGUE, SamplingConfig(seed=0), 40)


@pytest.fixture
def script(monkeypatch):
    """Let the model write the given texts, byte by byte; a number is a token, ... is Ctrl-C."""

    def set_text(*parts):
        ids = [t for p in parts for t in (p.encode() if isinstance(p, str) else [p])]
        left = iter(ids)

        def sample(self, logits):
            token = next(left)
            if token is ...:
                raise KeyboardInterrupt
            return token

        monkeypatch.setattr(Sampler, "sample", sample)

    return set_text


def read(chat):
    """All that the model has read in this conversation, the next token with it, as a state."""
    at = chat.place.at
    with torch.no_grad():
        state = at.state
        if at.pending:
            _, state, _ = chat.model.features(torch.tensor([at.pending]), state)
    return state


def assert_has_read(chat, text):
    tokens = torch.tensor([[0, *text.encode()]])
    with torch.no_grad():
        _, expected, _ = chat.model.features(tokens)
    state = read(chat)
    assert state.tokens_seen == tokens.shape[1]
    for name, x in expected.tensors().items():
        torch.testing.assert_close(state.tensors()[name], x, rtol=1e-3, atol=1e-5)


# What the model reads.


def test_turns_follow_each_other_as_one_text(chat, script, capsys):
    script(" Hello.\n\nUser:", " Fine\n\nUser:")
    chat.handle("hi")
    chat.handle("how?")
    assert capsys.readouterr().out == "Hello.\nFine\n"
    assert_has_read(
        chat,
        "User: hi\n\nAssistant: Hello.\n\nUser: how?\n\nAssistant: Fine\n\nUser:",
    )


def test_a_reply_cut_off_by_its_length(chat, script, capsys):
    chat.max_tokens = 5
    script(" Hell", " ok\n\nUser:")
    chat.handle("hi")
    chat.max_tokens = 40
    chat.handle("go")
    assert capsys.readouterr().out == "Hell\nok\n"
    assert_has_read(chat, "User: hi\n\nAssistant: Hell\n\nUser: go\n\nAssistant: ok\n\nUser:")


def test_an_end_of_document_does_not_end_the_conversation(chat, script):
    script(" Bye", 0, " yes\n\nUser:")
    chat.handle("hi")
    chat.handle("still there?")
    assert_has_read(
        chat,
        "User: hi\n\nAssistant: Bye\n\nUser: still there?\n\nAssistant: yes\n\nUser:",
    )


def test_an_empty_reply(chat, script, capsys):
    script("\n\nUser:", " yes\n\nUser:")
    chat.handle("hi")
    chat.handle("and?")
    assert capsys.readouterr().out == "\nyes\n"
    assert_has_read(chat, "User: hi\n\nAssistant:\n\nUser: and?\n\nAssistant: yes\n\nUser:")


def test_ctrl_c_stops_the_reply_only(chat, script, capsys):
    script(" Hel", ..., " more\n\nUser:")
    assert chat.handle("hi")
    assert_has_read(chat, "User: hi\n\nAssistant: Hel")
    chat.handle("go on")
    assert capsys.readouterr().out == "Hel\nmore\n"
    assert_has_read(chat, "User: hi\n\nAssistant: Hel\n\nUser: go on\n\nAssistant: more\n\nUser:")


def test_ctrl_c_inside_a_half_seen_stop_string(chat, script, capsys):
    script(" Hel\n\nUs", ..., " more\n\nUser:")
    chat.handle("hi")
    assert_has_read(chat, "User: hi\n\nAssistant: Hel")
    assert chat.place.tail == ""


def test_a_length_limit_inside_a_stop_string(chat, script, capsys):
    chat.max_tokens = 8
    chat.template = Template(DIALOGUE.text, ("\n\nUser:", "\n\n##"))
    script(" Hel\n\nUs", " more!!!")
    chat.handle("hi")
    chat.handle("go")
    assert capsys.readouterr().out == "Hel\n\nUs\nmore!!!\n"
    text = "User: hi\n\nAssistant: Hel\n\nUs\n\nUser: go\n\nAssistant: more!!!"
    assert_has_read(chat, text)


@pytest.mark.parametrize(
    ("text", "stop", "written", "shown", "tail"),
    [
        (DIALOGUE.text, ("##", "\n"), " Hel##", " Hel", ""),
        (DIALOGUE.text, ("\n",), " Hel\n", " Hel", "\n"),  # the next message begins with it
        (DIALOGUE.text, (), " Hello \u20ac", " Hello ", ""),  # cut inside a character
        ("{message}", ("##",), " Hel##", " Hel", ""),
    ],
)
def test_what_nobody_saw_is_not_remembered(model, script, text, stop, written, shown, tail):
    chat = Chat(model, ByteTokenizer(), Template(text, stop), SamplingConfig(seed=0), 8)
    script(written)
    chat.handle("hi")
    said = text.format(message="hi")
    assert chat.place.tail == tail
    assert_has_read(chat, said + shown + tail)
    script("ok" + "#" * 9)
    chat.handle("so")
    said += shown + ("" if chat.template.is_plain else "\n\n") + text.format(message="so")
    assert_has_read(chat, said + ("ok" if "##" in stop else "ok######"))


def test_ctrl_c_before_the_reply_takes_the_message_back(chat, script, capsys):
    script(...)
    chat.handle("hi")
    assert chat.place.at is None
    assert "message is forgotten" in capsys.readouterr().err


def test_plain_goes_on_from_what_is_typed(model, script, capsys):
    chat = Chat(model, ByteTokenizer(), Template("{message}", ()), SamplingConfig(), 3)
    script("abc", "def", "ghi")
    chat.handle("once ")
    chat.handle("")
    chat.handle(" upon")
    assert_has_read(chat, "once abcdef uponghi")
    assert capsys.readouterr().out == "abc\ndef\nghi\n"


def test_two_slashes_send_a_message_that_begins_with_one(chat, script):
    script(" Hello.\n\nUser:")
    chat.handle("//exit")
    assert_has_read(chat, "User: /exit\n\nAssistant: Hello.\n\nUser:")


# Commands.


def test_fork_switch_and_undo(chat, script):
    script(*[f" {c}\n\nUser:" for c in "abcd"])
    chat.handle("one")
    chat.handle("/fork other")
    chat.handle("two")
    there = chat.place
    chat.handle("/switch main")
    assert_has_read(chat, "User: one\n\nAssistant: a\n\nUser:")
    chat.handle("three")
    chat.handle("/switch other")
    assert chat.place is there
    chat.handle("/undo")
    assert_has_read(chat, "User: one\n\nAssistant: a\n\nUser:")
    chat.handle("/undo")
    assert chat.place.at is None
    with pytest.raises(ConfigError, match="nothing to undo"):
        chat.handle("/undo")
    chat.handle("/switch main")
    chat.handle("/reset")
    assert chat.place.at is None
    chat.handle("/undo")
    assert_has_read(
        chat,
        "User: one\n\nAssistant: a\n\nUser: three\n\nAssistant: c\n\nUser:",
    )


def test_saved_and_loaded_it_goes_on_in_the_same_place(chat, model, script, tmp_path, capsys):
    script(" a\n\nUser:", " b\n\nUser:", " b\n\nUser:")
    chat.handle("one")
    chat.handle(f"/save {tmp_path / 'my chat'}")
    chat.handle("two")
    other = Chat(model, ByteTokenizer(), DIALOGUE, SamplingConfig(seed=0), 40)
    other.handle(f"/load {tmp_path / 'my chat'}")
    other.handle("two")
    for name, x in read(chat).tensors().items():
        assert torch.equal(read(other).tensors()[name], x), name
    other.handle("/undo")
    other.handle("/undo")
    assert other.place.at is None


@pytest.mark.parametrize("seed", [None, 3])
def test_undo_switch_and_reset_lead_to_another_reply(model, capsys, seed):
    with torch.no_grad():  # no document ends: two replies of no token would be the same
        model.ln_out.bias.fill_(1)
        model.head.weight[0] = -100

    def session():
        settings = SamplingConfig(seed=seed)
        chat = Chat(model, ByteTokenizer(), Template("{message}", ()), settings, 20)
        replies = []
        for command in ("", "/undo", "/reset", "/fork other", "/switch main"):
            if command:
                chat.handle(command)
            chat.handle("the same")
            replies.append(capsys.readouterr().out)
        return replies

    replies = session()
    assert len(set(replies)) == len(replies)
    assert (session() == replies) == (seed is not None)


def test_undo_is_bounded(chat, script, monkeypatch):
    monkeypatch.setattr(chat_module, "UNDO", 3)
    script(*[" a\n\nUser:"] * 6)
    for _ in range(6):
        chat.handle("x")
    assert len(chat.conversations["main"]) == 3


def test_set(chat, capsys):
    chat.handle("/set temperature 0.5")
    chat.handle("/set top_k 3")
    chat.handle("/set max_tokens 7")
    assert (chat.sampling.temperature, chat.sampling.top_k, chat.max_tokens) == (0.5, 3, 7)
    chat.handle("/set")
    assert "temperature 0.5, top_k 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature -1", "temperature is -1.0; it must be 0"),
        ("/set temperature nan", "temperature is nan"),
        ("/set temperature", "'': a number is needed"),
        ("/set top_k 1.5", "'1.5': a number is needed"),
        ("/set max_tokens 0", "max_tokens is 0"),
        ("/set heat 1", "unknown setting 'heat'"),
        ("/sav x", "unknown command /sav; did you mean /save"),
        ("/", "unknown command /; /help lists them"),
        ("/save", "/save FILE"),
        ("/save x", "nothing was said"),
        ("/load", "/load FILE"),
        ("/load none", "no state file at none"),
        ("/load ~nosuchuser/x", "no file '~nosuchuser/x'"),
        ("/set seed 18446744073709551616", "seed is 18446744073709551616; it must be -2"),
        ("/set temperature inf", "temperature is inf; it must be 0"),
        ("/set repetition_window 9223372036854775808", "repetition_window is 9223"),
        ("/load .", r"\. is a folder; name a state file"),
        ("/fork", "a new name is needed"),
        ("/fork main", "a new name is needed; there are main"),
        ("/switch x", "no conversation 'x'; there are main"),
        ("/undo", "nothing to undo"),
    ],
)
def test_mistakes_leave_everything_as_it_was(chat, line, message):
    with pytest.raises(Exception, match=message) as caught:
        chat.handle(line)
    assert "\n" not in str(caught.value)
    assert (chat.max_tokens, chat.sampling) == (40, SamplingConfig(seed=0))
    assert chat.conversations == {"main": [chat.first]}


# The command.


def typed(monkeypatch, text, encoding="utf-8"):
    raw = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(raw, encoding=encoding))


def test_a_scripted_chat_ends_with_its_input(checkpoint, monkeypatch, capsys, tmp_path):
    typed(monkeypatch, f"hello\n/nothing\n\n/set temperature 0\n/save {tmp_path / 's'}\nmore\n")
    assert main(["chat", str(checkpoint), "--max-tokens", "4", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("error: unknown command /nothing") and err.count("error") == 1
    model = metastate.load(checkpoint)
    saved = Continuation.load(tmp_path / "s", model)
    assert saved.state.tokens_seen >= len("User: hello\n\nAssistant:")
    typed(monkeypatch, "/exit\nnever\n")
    assert main(["chat", str(checkpoint), "--state-in", str(tmp_path / "s")]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_same_seed_says_the_same(checkpoint, monkeypatch, capsys):
    said = []
    for seed in ("1", "1", "2"):
        typed(monkeypatch, "hello\nagain\n")
        argv = ["chat", str(checkpoint), "--plain", "--max-tokens", "20", "--seed", seed]
        assert main(argv) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_reset_leads_back_to_the_given_state(checkpoint, monkeypatch, capsys, script, tmp_path):
    model = metastate.load(checkpoint)
    with torch.no_grad():
        _, state = model(torch.tensor([[0, *b"A story."]]))
    state.save(tmp_path / "s", model)
    script(" a\n\nUser:", " b\n\nUser:", " b\n\nUser:")
    typed(monkeypatch, f"x\n/reset\n/undo\n/reset\ny\n/save {tmp_path / 't'}\n")
    assert main(["chat", str(checkpoint), "--state-in", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out == "a\nb\n"
    end = Continuation.load(tmp_path / "t", model)
    text = "A story.\n\nUser: y\n\nAssistant: b\n\nUser:"
    assert end.state.tokens_seen + len(end.pending) == len(text) + 1


def test_no_mistake_loses_the_conversation(checkpoint, monkeypatch, capsys, tmp_path):
    save = Continuation.save

    def broken(self, path, model):
        if "boom" in str(path):
            raise RuntimeError("boom")
        save(self, path, model)

    monkeypatch.setattr(Continuation, "save", broken)
    bad = ["/save ~nosuchuser/x", "/save a\0b", "/load a\0b", "/save boom", "/save " + "x" * 5000]
    typed(monkeypatch, "\n".join(["hello", *bad, f"/save {tmp_path / 's'}", ""]))
    assert main(["chat", str(checkpoint), "--max-tokens", "4", "--seed", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in lines] == ["error:"] * len(bad) + ["saved "]
    assert "RuntimeError('boom')" in lines[3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_chat(checkpoint, tmp_path):
    argv = [sys.executable, "-m", "metastate", "chat", str(checkpoint), "--max-tokens", "4"]
    with open("/dev/full", "w") as full, open(tmp_path / "err", "w") as err:
        done = subprocess.run(argv, input="a\n" * 3, text=True, stdout=full, stderr=err, timeout=99)
    said = (tmp_path / "err").read_text()
    assert done.returncode and "can be read or written no more: [Errno 28]" in said
    assert len(said) < 1000 and "Traceback" not in said


def test_what_is_no_text_is_one_line(checkpoint, monkeypatch, capsys):
    typed(monkeypatch, b"\xff\xfe\n")
    assert main(["chat", str(checkpoint), "--max-tokens", "2"]) == 0
    assert capsys.readouterr().err.startswith("error: what was typed is no text")


def test_bad_options_and_states(checkpoint, refused, tmp_path, monkeypatch):
    typed(monkeypatch, "")
    assert "lacks {message}" in refused("chat", checkpoint, "--template", "User:")
    assert "max_tokens is 0" in refused("chat", checkpoint, "--max-tokens", "0")
    assert "temperature is -1" in refused("chat", checkpoint, "--temperature", "-1")
    assert "no state file" in refused("chat", checkpoint, "--state-in", tmp_path / "none")
    model = metastate.load(checkpoint)
    model.init_state(2).save(tmp_path / "two", model)
    assert "holds 2 rows" in refused("chat", checkpoint, "--state-in", tmp_path / "two")


def test_other_weights_need_leave(checkpoint, refused, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint, tmp_path / "m")
    model = metastate.load(checkpoint)
    with torch.no_grad():
        model.head.weight += 0.1
        _, state = model(torch.tensor([[0, 5]]))
    state.save(tmp_path / "s", model)
    typed(monkeypatch, "")
    argv = ["chat", str(checkpoint), "--state-in", str(tmp_path / "s")]
    assert "--allow-other-weights" in refused(*argv)
    assert main([*argv, "--allow-other-weights"]) == 0
