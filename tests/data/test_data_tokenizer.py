import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metastate.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    StreamDecoder,
    WorldTokenizer,
    is_vocabulary,
    load_tokenizer,
)
from metastate.errors import ConfigError, DataError
from tokenizer_files import tiny_json, unigram

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer("world")


@pytest.fixture(scope="module")
def json_tokenizer():
    return JsonTokenizer(tiny_json(), "tiny")


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(i) for i in ids] + [decoder.finish()]


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_every_text_comes_back(world, json_tokenizer, text):
    for tokenizer in (ByteTokenizer(), world, json_tokenizer):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert "".join(stream(tokenizer, ids)) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40))
def test_any_ids_decode_and_stream_alike(world, json_tokenizer, ids):
    for tokenizer in (ByteTokenizer(), world, json_tokenizer):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_stream_gives_whole_characters_only(world, json_tokenizer):
    for tokenizer in (ByteTokenizer(), world, json_tokenizer):
        pieces = stream(tokenizer, tokenizer.encode("naïve 🦜 状態 end"))
        assert "".join(pieces) == "naïve 🦜 状態 end"
        assert not any("\ufffd" in piece for piece in pieces)
    decoder = StreamDecoder(ByteTokenizer())
    assert (decoder.push(0xC3), decoder.finish()) == ("", "\ufffd")
    assert (decoder.push(97), decoder.finish()) == ("a", "")  # it began anew


def test_text_cannot_fake_the_end_of_a_document(world, json_tokenizer):
    assert json_tokenizer.eod_id not in json_tokenizer.encode("a<|endoftext|>b")
    for tokenizer in (ByteTokenizer(), world):
        assert tokenizer.eod_id not in tokenizer.encode("a\0b")
    assert json_tokenizer.decode([json_tokenizer.eod_id]) == ""


def with_plain_end() -> bytes:
    """The tiny BPE whose <|endoftext|> is an added token, but no special one."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(tiny_json().decode())
    record = json.loads(tokenizer.to_str())
    (added,) = record["added_tokens"]
    record["added_tokens"] = [added | {"special": False, "lstrip": True}]
    return json.dumps(record).encode()


def test_a_file_that_cuts_or_fills_texts_does_neither_here(json_tokenizer):
    library = pytest.importorskip("tokenizers").Tokenizer.from_buffer(tiny_json())
    library.enable_truncation(3)
    library.enable_padding(length=5)
    tokenizer = JsonTokenizer(library.to_str().encode(), "x")
    for text in ("a", "the state is read, the matrix is read"):
        assert tokenizer.encode(text) == json_tokenizer.encode(text)


@pytest.mark.parametrize(("largest", "vocab_size"), [(126, 128), (127, 128), (128, 256)])
def test_every_id_is_below_the_padded_vocabulary(largest, vocab_size):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "a": largest}, unk_token="<unk>")
    content = tokenizers.Tokenizer(model).to_str().encode()
    assert JsonTokenizer(content, "x").vocab_size == vocab_size


def test_no_text_spells_the_end_even_where_it_is_an_ordinary_token():
    for content, text in ((with_plain_end(), "a <|endoftext|>b"), (unigram(), "a </s>b</s>")):
        library = pytest.importorskip("tokenizers").Tokenizer.from_buffer(content)
        tokenizer = JsonTokenizer(content, "x")
        assert tokenizer.eod_id in library.encode(text).ids  # what is mended here
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids and tokenizer.decode(ids) == text
    with pytest.raises(DataError, match="gives its end-of-document token '</s>' for characters"):
        JsonTokenizer(unigram(unknown="</s>"), "x")


def test_a_tokenizer_without_a_token_for_the_unknown_opens():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="none")
    tokenizer = JsonTokenizer(tokenizers.Tokenizer(words).to_str().encode(), "x")
    assert (tokenizer.encode("a"), tokenizer.encode("</s>")) == ([1], [])


def test_joins_at_spaces_is_what_it_says(world, json_tokenizer):
    for tokenizer in (ByteTokenizer(), world, json_tokenizer):
        assert not tokenizer.joins_at_spaces
        assert tokenizer.encode("a b") != tokenizer.encode("a") + tokenizer.encode("b")
    for prefix in (True, False):
        assert JsonTokenizer(unigram(prefix=prefix), "x").joins_at_spaces


def test_vocabulary_sizes(world, json_tokenizer):
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eod_id) == (256, 0)
    assert (world.vocab_size, world.eod_id) == (65_536, 0)
    assert (json_tokenizer.num_ids, json_tokenizer.vocab_size) == (282, 384)


@pytest.mark.parametrize(
    ("num_ids", "fits", "does_not"),
    [
        (256, [256, 258], [255, 300, 384]),
        (300, [300, 303, 384], [299, 385]),
        (50_257, [50_257, 50_304], [50_256, 65_536]),
        (65_536, [65_536], [65_529, 50_304, 131_072]),
        (151_665, [151_936, 152_064], [151_643, 200_064]),
    ],
)
def test_how_far_a_model_may_pad(num_ids, fits, does_not):
    assert all(is_vocabulary(V, num_ids) for V in fits)
    assert not any(is_vocabulary(V, num_ids) for V in does_not)


def test_batches_equal_single_texts(world, json_tokenizer):
    texts = ["", "one", "the state is read"]
    for tokenizer in (ByteTokenizer(), world, json_tokenizer):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
            tokenizer.encode(text) for text in texts
        ]


def test_info_rebuilds_the_tokenizer_from_a_moved_folder(tmp_path, world, json_tokenizer):
    for tokenizer in (ByteTokenizer(), world, json_tokenizer):
        folder = tmp_path / tokenizer.kind
        folder.mkdir()
        tokenizer.save(folder)
        info = tokenizer.info() | {"path": None}
        again = load_tokenizer(info, [tmp_path / "elsewhere", folder])
        assert again.info() | {"path": None} == info
        assert again.encode("state é") == tokenizer.encode("state é")


def test_a_swapped_vocabulary_is_refused(tmp_path, json_tokenizer):
    (tmp_path / "tokenizer.json").write_bytes(tiny_json().replace(b"the", b"eht"))
    with pytest.raises(DataError, match=r"sha256 .* is not in .*tokenizer\.json"):
        load_tokenizer(json_tokenizer.info(), [tmp_path])
    with pytest.raises(DataError, match="kind 'sentencepiece'; known: bytes, world, json"):
        load_tokenizer({"kind": "sentencepiece"})


def test_a_world_vocabulary_in_a_folder_that_utf8_cannot_name(tmp_path, world):
    folder = tmp_path / "\udcffd"
    try:
        world.save(folder)
    except DataError:
        pytest.skip("this file system has no such names")
    assert load_tokenizer(folder).encode("state é") == world.encode("state é")


def test_a_folder_and_a_file_name_the_same_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tiny_json())
    assert load_tokenizer(tmp_path).info() == load_tokenizer(tmp_path / "tokenizer.json").info()
    assert load_tokenizer(tmp_path).name == tmp_path.name


def test_mistakes_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'bytes'"):
        load_tokenizer("byte")
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*no\.json"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("1 'a' 1\n2 'bc' 3\n")
    with pytest.raises(DataError, match="not an RWKV World vocabulary after 1 tokens"):
        load_tokenizer(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("1 __import__('os') 1\n")
    with pytest.raises(DataError, match="not an RWKV World vocabulary"):
        load_tokenizer(tmp_path / "b.txt")
    tokenizers = pytest.importorskip("tokenizers")

    def offline(name):
        raise Exception("no network")

    monkeypatch.setattr(tokenizers, "Tokenizer", type("T", (), {"from_pretrained": offline}))
    with pytest.raises(ConfigError, match="some/name.*a name on the Hugging Face hub.*no network"):
        load_tokenizer("some/name")


def test_a_tokenizer_without_end_of_document_is_refused():
    with pytest.raises(DataError, match="no end-of-document token"):
        JsonTokenizer(tiny_json().replace(b"<|endoftext|>", b"<|other|>"), "tiny")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'metastate\[cli\]'"):
        JsonTokenizer(b"{}", "tiny")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {os.path.normpath(SHARED)}")
def test_world_package_and_own_matching_agree_on_real_text(world):
    text = (SHARED / "tinyshakespeare" / "input.txt").read_text()[:50_000]
    text += (SHARED / "ntrex" / "newstest2019-ref.deu.txt").read_text()[:20_000] + "状態 🦜"
    own = WorldTokenizer(SHARED / "tokenizers" / "rwkv_vocab_v20230424.txt", fast=False)
    ids = own.encode(text)
    assert ids == world.encode(text)
    assert own.decode(np.array(ids)) == text
    assert own.info()["sha256"] == world.info()["sha256"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {os.path.normpath(SHARED)}")
def test_neox_is_padded_to_50304():
    pytest.importorskip("tokenizers")
    neox = load_tokenizer(SHARED / "tokenizers" / "20B_tokenizer.json")
    assert (neox.vocab_size, neox.eod_id) == (50_304, 0)
    assert neox.decode(neox.encode("  Meta-State\n\n\treads")) == "  Meta-State\n\n\treads"
    assert neox.decode([50_300, 66]) == "a"


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(ConfigError, match="no file '~nosuchuser/tokenizer.json'"):
        load_tokenizer("~nosuchuser/tokenizer.json")
