import bz2
import errno
import gzip
import json
import lzma
import os
import sys
import types

import pytest

from metastate.data import reading
from metastate.data.sources import find_sources, told
from metastate.errors import ConfigError, DataError


def read(*inputs, **options):
    return [d for source in find_sources(inputs, **options) for d in source.read()]


def zst(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffLine é\r\n\r\nend".encode())
    (document,) = read(path)
    assert document.text == "Line é\r\n\r\nend"  # the byte order mark goes, line ends stay
    assert document.position == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_and_lines(tmp_path, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](b"plain"))
    lines = b'{"text": "one", "meta": {"set": "law"}}\n\n{"text": "two"}'
    (tmp_path / f"b.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines))
    found = read(tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}")
    assert [(d.text, d.domain) for d in found] == [
        ("plain", "text"),
        ("one", "law"),
        ("two", "text"),
    ]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_truncated_archive_is_an_error_not_a_short_text(tmp_path, suffix, name):
    import random

    noise = "".join(random.Random(0).choices("abcdefgh", k=5000))
    line = json.dumps({"text": noise}) + "\n" if name == "a.jsonl" else noise
    path = tmp_path / (name + suffix)
    content = COMPRESS[suffix](line.encode() * 3)
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=f"{name}{suffix} cannot be read, it is damaged"):
        read(path)
    path.write_bytes(b"this was never compressed")
    with pytest.raises(DataError, match="damaged or truncated"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", ""])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    """An empty name: the whole folder, in which every file is looked into first."""
    (tmp_path / (name or "b.txt")).write_text("text")

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(reading, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(DataError, match=f"{name or 'b.txt'} cannot be read: Permission denied"):
        read(tmp_path / name)


def test_a_folder_below_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    for name in ("open", "closed", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    known = os.scandir

    def scan(path):
        if os.fspath(path).endswith(("closed", ".hidden")):  # root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return known(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        read(tmp_path)
    monkeypatch.setattr(os, "scandir", known)
    assert len(read(tmp_path)) == 2


def test_zst_of_several_frames(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zst(b"one ") + zst(b"two ") + zst(b"three"))
    assert read(tmp_path / "a.txt.zst")[0].text == "one two three"


def test_domains_of_pile_records(tmp_path):
    records = [
        {"text": "a", "meta": {"pile_set_name": "ArXiv"}},
        {"text": "b", "meta": {"set": "law", "src": "x"}},
        {"text": "c", "meta": "none"},
        {"text": "half \ud83e character", "meta": {"set": "half \ud800"}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read(tmp_path / "a.jsonl")
    assert [d.domain for d in found] == ["ArXiv", "law", "text", "half \ufffd"]
    assert found[3].text == "half \ufffd character"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\0binary", "is not text: a NUL byte at byte 4"),
        (b"caf\xe9 latin", "is not text: invalid UTF-8 at byte 3"),
        (b"\xef\xbb\xbfab\xff", "is not text: invalid UTF-8 at byte 5"),
        ("utf-16".encode("utf-16-le"), "is not text: a NUL byte at byte 1"),
    ],
)
def test_what_is_not_text_is_named_with_its_offset(tmp_path, content, message):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} {message}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"a\.jsonl:2 is not JSON"),
        ('{"body": "b", "id": 1}', r"a\.jsonl:2: .* field 'text'.* found: body, id"),
        ('{"text": null}', r"a\.jsonl:2: .* found: text with null$"),
        ("[1]", r"a\.jsonl:2: .*found: list"),
        ('{"text": ' + "[" * 200_000, r"a\.jsonl:2 is not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl is not text: invalid UTF-8 at byte 24"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\n{"text": "\0"}'.encode())
    with pytest.raises(DataError, match=r"a\.jsonl is not text: a NUL byte at byte 25"):
        read(tmp_path / "a.jsonl")


def test_a_folder_is_read_in_order_without_what_is_no_text(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("z/b.txt", "a.md", "z/a.py", ".git/config", "out/data.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"\0"))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"d.txt.gz"))
    found = read(tmp_path, exclude=tmp_path / "out")
    assert [d.text for d in found] == ["a.md", "d.txt.gz", "z/a.py", "z/b.txt"]


def test_what_a_folder_holds_and_is_not_read_is_said(tmp_path):
    (tmp_path / "cut.txt").write_text("x" * 8191 + "é")  # the head ends within a character
    (tmp_path / "own.txt").write_text("a replacement character: \ufffd")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("a.parquet", "b.PARQUET", "c.tar.gz"):
        (tmp_path / name).write_bytes(b"PAR1\0")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "settings.json").write_text('{"indent": 4}')
    notes = {}
    found = read(tmp_path, notes=notes)
    assert [d.text[:9] for d in found] == ["x" * 9, "a replace", '{"indent"']
    assert told(notes) == (
        "left out, no UTF-8 text: 2 .parquet, 1 .tar.gz, 2 .txt; "
        "read as plain text, no records with a field 'text': 1 .json"
    )
    for name in ("cut.txt", "own.txt", "settings.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"holds no text files \(left out.* 2 \.parquet, 1"):
        read(tmp_path, notes={})


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("far")
    (tmp_path / "in" / "own").mkdir(parents=True)
    (tmp_path / "in" / "own" / "b.txt").write_text("own")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "link again").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "circle").symlink_to(tmp_path / "in")
    assert [d.text for d in read(tmp_path / "in")] == ["far", "own"]
    assert sorted(d.text for d in read(tmp_path)) == ["far", "own"]


RECORDS = '{"text": "one"}\n{"text": "two"}'


# no time of day in it: the content names the test, and workers must find the same names
PACKED = gzip.compress(RECORDS.encode(), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("c4-train.00000-of-01024.json.gz", PACKED, ["one", "two"]),
        ("c4.json", "\ufeff" + RECORDS, ["one", "two"]),
        ("UP.JSONL", RECORDS, ["one", "two"]),
        ("UP.JSON.GZ", PACKED, ["one", "two"]),
        ("single.json", '{"text": "one"}', ["one"]),
        ("array.json", '[\n {"text": "one"},\n "two"]', ["one", "two"]),
        ("array.json.xz", lzma.compress(b'["one", {"text": "\\ud800"}]'), ["one", "\ufffd"]),
        ("package.json", '{"name": "x"}', ['{"name": "x"}']),
        ("pretty.json", '{\n "text": "one"\n}', ['{\n "text": "one"\n}']),
        ("table.json", '[{"name": "x"}]', ['[{"name": "x"}]']),
        ("numbers.json", "[1, 2]", ["[1, 2]"]),
        ("empty.json", "[]", ["[]"]),
        ("comment.json", '[ // not JSON\n"one"]', ['[ // not JSON\n"one"]']),
    ],
)
def test_json_is_read_by_what_it_holds(tmp_path, name, content, texts):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    for given in (tmp_path / name, tmp_path):
        assert [d.text for d in read(given)] == texts


def test_json_without_texts_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"content": "one"}\n{"content": "two"}')
    with pytest.raises(DataError, match=r"a\.json:1: .* 'text' .*--text-field .* content"):
        read(tmp_path)
    assert [d.text for d in read(tmp_path, text_field="content")] == ["one", "two"]
    (tmp_path / "a.json").write_text('["one", {"body": 1}]')
    with pytest.raises(DataError, match=r"a\.json, value 2 of the array: .* found: body"):
        read(tmp_path)


def test_shards_say_the_split(tmp_path):
    given = {
        "train-00000-of-00002.jsonl": "train",
        "Train-clean.jsonl.gz": "train",
        "validation-00000-of-00001.json": "valid",
        "dev_0.txt": "valid",
        "test_matched.ndjson": "test",
        "test": "test",
    }
    others = ("train_model.py", "testing.jsonl", "validated-1.txt", "README.md")
    for name in (*given, *others):
        content = RECORDS.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    notes = {}
    found = {s.identity[0]: s.split for s in find_sources([tmp_path], notes=notes)}
    assert found == given
    assert told(notes) == (
        "left out, not named for a split as train.* is: 1 .jsonl, 1 .md, 1 .py, 1 .txt"
    )


def test_names_say_the_split(tmp_path):
    for name in ("train.txt", "validation.jsonl", "test.txt", "SOURCE.txt"):
        (tmp_path / name).write_text('{"text": "x"}')
    splits = {s.identity[0]: s.split for s in find_sources([tmp_path])}
    assert splits == {"train.txt": "train", "validation.jsonl": "valid", "test.txt": "test"}
    (tmp_path / "train.txt").unlink()
    assert len(find_sources([tmp_path])) == 3  # no train file: an ordinary folder
    assert find_sources([tmp_path / "SOURCE.txt"])[0].split is None
    assert find_sources([tmp_path / "SOURCE.txt"], split="valid")[0].split == "valid"


def test_mistaken_inputs(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such file or folder: .*none\.txt"):
        find_sources([tmp_path / "none.txt"])
    with pytest.raises(DataError, match="holds no text files"):
        find_sources([tmp_path])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"no file or folder 'wiki'.*metastate\[hub\]"):
        find_sources(["wiki"])
    (tmp_path / "a.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"zstandard: pip install 'metastate\[cli\]'"):
        read(tmp_path / "a.zst")


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, configuration, streaming):
        asked.append((path, configuration, streaming))
        if path == "none":
            raise ConnectionError("offline")
        broken = ({"text": "e"} if i < 2 else 1 / 0 for i in range(3))
        train, valid = [{"text": "a"}, {"text": "bc"}], [{"texts": "d"}]
        return {"train": train, "validation": valid, "test": broken}

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    train, valid, test = find_sources(["some/set:small"])
    assert asked == [("some/set", "small", True)]
    assert [(d.text, d.position) for d in train.read()] == [("a", 1), ("bc", 3)]
    assert (train.split, valid.split, train.num_bytes) == ("train", "valid", None)
    with pytest.raises(DataError, match="some/set:small/validation:1: .*field 'text'"):
        list(valid.read())
    with pytest.raises(DataError, match="some/set:small/test stopped before record 3 .*again"):
        list(test.read())
    with pytest.raises(DataError, match="hub cannot give a dataset of that name: offline"):
        find_sources(["none"])


def test_a_file_that_goes_away_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (source,) = find_sources([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt"):
        list(source.read())


def test_stdlib_is_the_running_python():
    (source,) = find_sources(["stdlib"])
    found = list(source.read())
    assert found == list(source.read())
    size = {}
    for document in found:
        size[document.domain] = size.get(document.domain, 0) + len(document.text)
    assert {"docstrings", "source"} <= set(size)
    assert 1_000_000 < sum(size.values()) <= 12_000_000
    assert found[-1].position <= source.num_bytes
    assert not any("\0" in d.text for d in found)


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(ConfigError, match="no file '~nosuchuser/texts'"):
        find_sources(["~nosuchuser/texts"])
