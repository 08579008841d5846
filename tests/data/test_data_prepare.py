import contextlib
import errno
import hashlib
import json
import lzma
import math
import random
import sys
import types

import numpy as np
import pytest

from metastate.data import prepare as module
from metastate.data.files import alone_in
from metastate.data.loader import PreparedData
from metastate.data.prepare import prepare
from metastate.data.tokenizer import ByteTokenizer, JsonTokenizer
from metastate.errors import BusyError, ConfigError, DataError
from tokenizer_files import unigram


def write_lines(path, documents, domain="a"):
    lines = [json.dumps({"text": d, "meta": {"set": domain}}) for d in documents]
    with open(path, "a") as file:
        file.write("".join(line + "\n" for line in lines))


def random_documents(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abc é\n", k=rng.randint(1, 80))) for _ in range(count)]


def run(inputs, out, **options):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return prepare(inputs, options.pop("tokenizer", "bytes"), out, **options)


def texts(data, name):
    if not data.record["splits"][name]["tokens"]:
        return []
    found = []
    for document in data.split(name).documents():
        assert document.tokens[-1] == 0 and 0 not in document.tokens[:-1]
        found.append(bytes(document.tokens[:-1].tolist()).decode())
        assert document.text_bytes == len(document.tokens) - 1
    return found


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_documents_are_kept_apart_and_drawn_by_their_hash(tmp_path):
    documents = random_documents(2000)
    write_lines(tmp_path / "a.jsonl", documents)
    data = run(tmp_path / "a.jsonl", tmp_path / "out", fractions=(0.8, 0.1, 0.1))
    found = {name: texts(data, name) for name in ("train", "valid", "test")}
    assert sorted(sum(found.values(), [])) == sorted(documents)
    assert not set(found["train"]) & set(found["valid"] + found["test"])
    assert 120 < len(found["valid"]) < 280 and 120 < len(found["test"]) < 280
    order = {text: i for i, text in reversed(list(enumerate(documents)))}
    assert [order[t] for t in found["valid"]] == sorted(order[t] for t in found["valid"])
    # another order, another neighbour: the same documents are held out
    write_lines(tmp_path / "b.jsonl", [*documents[::-1], "one more"])
    again = run(tmp_path / "b.jsonl", tmp_path / "again", fractions=(0.8, 0.1, 0.1))
    assert set(found["valid"]) <= set(texts(again, "valid")) <= {*found["valid"], "one more"}


def test_the_record_counts_documents_tokens_and_bytes_by_domain(tmp_path):
    write_lines(tmp_path / "train.jsonl", ["ab", "é"], "law")
    write_lines(tmp_path / "train.jsonl", ["cde"], "code")
    write_lines(tmp_path / "valid.jsonl", ["xy"], "code")
    data = run([tmp_path / "train.jsonl", tmp_path / "valid.jsonl"], tmp_path / "out")
    assert data.record["domains"] == ["code", "law"]
    train = data.record["splits"]["train"]
    assert (train["documents"], train["tokens"], train["text_bytes"]) == (3, 10, 7)
    assert train["domains"]["law"] == {"documents": 2, "tokens": 6, "text_bytes": 4}
    binary = (tmp_path / "out" / "train.bin").read_bytes()
    assert train["sha256"] == hashlib.sha256(binary).hexdigest()
    assert data.record["tokenizer"] == ByteTokenizer().info()
    assert data.split("train").dataset.domains.tolist() == [1, 1, 0]
    assert data.split("valid").documents().__next__().domain == "code"


def test_names_and_arguments_give_the_splits(tmp_path):
    for name in ("train", "valid", "test"):
        write_lines(tmp_path / f"{name}.jsonl", random_documents(30, seed=len(name)))
    data = run(tmp_path, tmp_path / "a")
    sizes = {name: split["documents"] for name, split in data.record["splits"].items()}
    assert sizes == {"train": 30, "valid": 30, "test": 30}
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    data = run(train, tmp_path / "b", valid=[valid])
    sizes = [split["documents"] for split in data.record["splits"].values()]
    assert sizes == [30, 30, 0]
    data = run([train, tmp_path / "test.jsonl"], tmp_path / "c")
    sizes = [split["documents"] for split in data.record["splits"].values()]
    assert sum(sizes) == 60 and sizes[1] >= 1 and sizes[2] == 30  # valid is drawn from train
    data = run(train, tmp_path / "d")  # the name alone says nothing
    assert all(split["documents"] for split in data.record["splits"].values())


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_few_documents_still_give_a_valid_split(tmp_path, count):
    for seed in range(6):
        path = tmp_path / f"{seed}.jsonl"
        write_lines(path, random_documents(count, seed), "a")
        data = run(path, tmp_path / f"out{seed}", fractions=(0.5, 0.25, 0.25))
        sizes = [split["documents"] for split in data.record["splits"].values()]
        assert sizes[0] and sizes[1] and sum(sizes) == count
        assert sizes[2] or count == 2


def test_equal_documents_stay_on_one_side(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["same"] * 25 + ["one", "two"])
    data = run(tmp_path / "a.jsonl", tmp_path / "out")
    sides = [name for name in ("train", "valid", "test") if "same" in texts(data, name)]
    assert len(sides) == 1
    assert all(split["documents"] for split in data.record["splits"].values())


def drawn(hashes, **columns):
    """Return the table of documents of one domain and one length that their hashes assign."""
    same = np.zeros(len(hashes), np.int64)
    table = {"splits": same + module.BY_HASH, "domains": same, "text_bytes": same + 1}
    return table | {"hashes": hashes} | columns


def test_a_split_of_no_part_gets_nothing():
    largest = np.array([0, 2**63, 2**64 - 1], np.uint64)  # as a part of 2^64 it rounds to 1
    assert module._assign(drawn(largest), (0.5, 0.5, 0.0)).tolist() == [0, 1, 1]


def test_a_book_beside_a_note_is_not_held_out(tmp_path):
    for seed in range(8):
        folder = tmp_path / str(seed)
        folder.mkdir()
        book, note = random_documents(2, seed)
        (folder / "book.txt").write_text(book * 100)
        (folder / "note.txt").write_text(note)
        splits = run(folder, folder / "out").record["splits"]
        assert splits["train"]["text_bytes"] == 100 * len(book.encode())
        assert splits["valid"]["text_bytes"] == len(note.encode())


@pytest.mark.parametrize("shares", [(0.5, 0.1), (0.985, 0.5), (0.995, 0.5), (0.985, 0.995)])
def test_of_few_texts_the_longest_is_trained_on(shares):
    hashes = np.array([int(share * 2**64) for share in shares], np.uint64)
    for lengths in ([9, 1], [1, 9]):
        table = drawn(hashes, text_bytes=np.array(lengths))
        splits = module._assign(table, (0.98, 0.01, 0.01))
        assert splits.tolist() == [int(n == 1) for n in lengths]


def test_equal_documents_of_several_domains_stay_on_one_side():
    hashes = np.array([*range(20), *range(1, 20)], np.uint64)  # all train, were it for the hash
    domains = np.array([0] * 20 + [1] * 19)  # the second is too small to get its own
    splits = module._assign(drawn(hashes, domains=domains), (0.98, 0.01, 0.01))
    assert set(splits[:20]) == {0, 1, 2}
    assert splits[20:].tolist() == splits[1:20].tolist()


def test_domains_keep_their_documents_over_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 1)  # a block a document
    for name in ("train", "valid"):
        write_lines(tmp_path / f"{name}.jsonl", ["ab", "c"], "law")
        write_lines(tmp_path / f"{name}.jsonl", ["d"], "code")
    split = run(tmp_path, tmp_path / "out").split("train")
    assert [split.domain_names[i] for i in split.dataset.domains] == ["law", "law", "code"]


def test_every_larger_domain_is_held_out(tmp_path):
    for i in range(4):
        write_lines(tmp_path / "a.jsonl", random_documents(25, seed=i), f"domain {i}")
    splits = run(tmp_path / "a.jsonl", tmp_path / "out").record["splits"]
    for name in ("train", "valid", "test"):
        assert all(domain["documents"] for domain in splits[name]["domains"].values())


@pytest.mark.parametrize(("count", "splits"), [(19, {0}), (20, {0, 1, 2})])
def test_a_domain_is_large_from_twenty_documents_on(count, splits):
    drawn_out = [int(share * 2**64) for share in (0.985, 0.995)]  # another domain has all it needs
    hashes = np.array([*range(count), *drawn_out], np.uint64)
    table = drawn(hashes, domains=np.array([0] * count + [1] * 2))
    assert set(module._assign(table, (0.98, 0.01, 0.01))[:count]) == splits


def test_one_document_is_cut_by_position(tmp_path):
    text = "".join(random_documents(50))
    (tmp_path / "a.txt").write_text(text)
    data = run(tmp_path / "a.txt", tmp_path / "out")
    pieces = [texts(data, name) for name in ("train", "valid", "test")]
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    assert "".join(sum(pieces, [])) == text
    assert 0.97 < len(pieces[0][0]) / len(text) < 0.985


def test_a_document_of_three_characters_still_gives_every_split(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    data = run(tmp_path / "a.txt", tmp_path / "out")
    assert [texts(data, name) for name in ("train", "valid", "test")] == [["a"], ["b"], ["c"]]


def test_long_documents_are_tokenised_in_pieces(tmp_path, monkeypatch):
    documents = ["x" * 25, "ab\ncd\nef\ngh\nij\nkl", "é" * 11, "\n" * 21]
    write_lines(tmp_path / "train.jsonl", documents)
    write_lines(tmp_path / "valid.jsonl", ["v"])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 10)
    assert list(module._pieces(documents[1])) == ["ab\ncd\nef\n", "gh\nij\nkl"]
    assert texts(run(tmp_path, tmp_path / "out"), "train") == documents


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_of_a_tokenizer_that_prefixes_a_space_are_the_whole(tmp_path, monkeypatch, prefix):
    tokenizer = JsonTokenizer(unigram(prefix=prefix), "x")
    rng = random.Random(0)
    text = "".join(rng.choices("ab \n", k=400)) + "b" * 50
    write_lines(tmp_path / "train.jsonl", [text])
    write_lines(tmp_path / "valid.jsonl", ["a"])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 100)
    pieces = list(module._pieces(text, at_spaces=True))
    assert len(pieces) > 10 and " ".join(pieces) == text
    data = run(tmp_path, tmp_path / "out", tokenizer=tokenizer)
    tokens = data.split("train").dataset[0].tolist()
    assert tokens == [*tokenizer.encode(text), tokenizer.eod_id]


class Interrupted(ByteTokenizer):
    """Stops after some blocks, as Ctrl-C would."""

    def __init__(self, blocks):
        self.blocks = blocks

    def encode_batch(self, batch):
        if not self.blocks:
            raise KeyboardInterrupt
        self.blocks -= 1
        return super().encode_batch(batch)


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 200)
    write_lines(tmp_path / "a.jsonl", random_documents(40), "a")
    write_lines(tmp_path / "b.jsonl", random_documents(30, 1), "b")
    inputs = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    run(inputs, tmp_path / "straight")
    out = tmp_path / "out"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(inputs, out, tokenizer=Interrupted(2))
    with pytest.raises(DataError, match="interrupted: run the same"):
        PreparedData.open(out)
    done = len(list((out / "parts").glob("*.npz")))
    assert done == 6
    with pytest.raises(DataError, match=r"other settings \(inputs differ\)"):
        run(inputs[:1], out)
    last = Interrupted(1000)
    run(inputs, out, tokenizer=last)
    assert 1000 - last.blocks > 3
    assert files(out) == files(tmp_path / "straight")


def test_a_finished_folder_is_taken_as_it_is(tmp_path):
    write_lines(tmp_path / "a.jsonl", random_documents(9))
    out = tmp_path / "out"
    run(tmp_path / "a.jsonl", out)
    before = files(out)
    run(tmp_path / "a.jsonl", out, tokenizer=Interrupted(0))  # nothing is tokenised again
    assert files(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other settings \(fractions differ\).*--overwrite"):
        run(tmp_path / "a.jsonl", out, fractions=(0.5, 0.5, 0.0))
    with pytest.raises(DataError, match=r"other settings \(tokenizer differ\)"):
        run(tmp_path / "a.jsonl", out, tokenizer=JsonTokenizer(unigram(), "x"))
    write_lines(tmp_path / "a.jsonl", ["more"])
    with pytest.raises(DataError, match="inputs differ"):
        run(tmp_path / "a.jsonl", out)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.jsonl", out, overwrite=True, tokenizer=Interrupted(0))
    with pytest.raises(DataError, match="interrupted: run the same"):  # and not what was there
        PreparedData.open(out)
    data = run(tmp_path / "a.jsonl", out, overwrite=True)
    assert sum(split["documents"] for split in data.record["splits"].values()) == 10
    assert (out / "notes.txt").read_text() == "mine"


def test_one_process_at_a_time_prepares_into_a_folder(tmp_path):
    """Else a second one with --overwrite mixes its blocks with those of the first."""
    pytest.importorskip("fcntl")
    write_lines(tmp_path / "a.jsonl", random_documents(9))
    out, refused = tmp_path / "out", []

    class Beside(ByteTokenizer):
        def encode_batch(self, batch):
            for overwrite in (False, True):
                with pytest.raises(BusyError, match="another process works in"):
                    run(tmp_path / "a.jsonl", out, overwrite=overwrite)
                refused.append(overwrite)
            return super().encode_batch(batch)

    run(tmp_path / "a.jsonl", out, tokenizer=Beside())
    assert refused == [False, True]
    with alone_in(out):  # what is finished can be taken at any time
        run(tmp_path / "a.jsonl", out)


def test_what_another_process_has_just_finished_is_not_overwritten(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", random_documents(9))
    out = tmp_path / "out"

    @contextlib.contextmanager
    def late(folder, **kw):
        monkeypatch.setattr(module, "alone_in", alone_in)
        run(tmp_path / "a.jsonl", out)  # between the look and the lock
        with alone_in(folder, **kw):
            yield

    monkeypatch.setattr(module, "alone_in", late)
    with pytest.raises(DataError, match=r"other settings \(fractions differ\)"):
        run(tmp_path / "a.jsonl", out, fractions=(0.5, 0.5, 0.0))


def test_the_record_is_the_last_to_be_written(tmp_path, monkeypatch):
    class Unsaved(ByteTokenizer):
        def save(self, folder):
            raise KeyboardInterrupt

    write_lines(tmp_path / "a.jsonl", random_documents(9))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=Unsaved())
    with pytest.raises(DataError, match="interrupted: run the same"):
        PreparedData.open(tmp_path / "out")


def test_empty_and_missing_inputs(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    write_lines(tmp_path / "a.jsonl", ["", "\0"])
    with pytest.raises(DataError, match="the inputs hold no text: every file or record is empty"):
        run([tmp_path / "empty.txt", tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(DataError, match="no input was given"):
        run([], tmp_path / "out")
    wrong = ((0.5, 0.6, 0.0), (0.0, 0.5, 0.5), (math.nan, math.nan, 0.01), (0.9, 0.1))
    for fractions in (*wrong, (0.5, 0.1, 0.1), (0.8, 0.1, 0.0)):
        with pytest.raises(ConfigError, match="fractions are"):
            run(tmp_path / "a.jsonl", tmp_path / "out", fractions=fractions)


def test_a_split_that_was_given_no_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    said = []
    inputs = {"valid": [tmp_path / "empty.txt"], "say": said.append}
    run(tmp_path / "a.txt", tmp_path / "out", **inputs)
    assert said == ["the inputs given for valid hold no text: that split is empty"]


def test_a_split_that_is_far_too_small_is_said(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "book.txt").write_text("word " * 10_000)
    (tmp_path / "in" / "SOURCE.txt").write_text("where it is from")
    said = []
    run(tmp_path / "in", tmp_path / "out", fractions=(0.9, 0.1, 0.0), say=said.append)
    assert len(said) == 1 and "valid holds 17 of 50,018 tokens, where 0.1 of all" in said[0]
    run(tmp_path / "in" / "book.txt", tmp_path / "one", fractions=(0.9, 0.1, 0.0), say=said.append)
    assert len(said) == 1  # one document is cut


def test_a_preparation_that_kept_nothing_is_not_in_the_way(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(DataError, match="a record needs a field 'body'"):
        run(tmp_path / "a.jsonl", tmp_path / "out", text_field="body")
    assert run(tmp_path / "a.jsonl", tmp_path / "out").record["splits"]["train"]["documents"]


def test_an_interrupted_preparation_with_other_settings_is_kept(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one", "two"])
    parts = tmp_path / "out" / "parts"
    parts.mkdir(parents=True)
    (parts / "000000.npz").write_bytes(b"hours of work")
    with pytest.raises(DataError, match="holds an interrupted preparation with other settings"):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert files(parts) == {"000000.npz": b"hours of work"}


def test_a_data_set_of_unknown_size_tells_its_progress_without_a_total(tmp_path, monkeypatch):
    splits = {"train": [{"text": "a"}, {"text": "bc"}], "validation": [{"text": "d"}]}
    hub = types.SimpleNamespace(load_dataset=lambda *name, streaming: splits)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    seen = []
    data = run("some/set", tmp_path / "out", progress=lambda *numbers: seen.append(numbers))
    assert texts(data, "train") == ["a", "bc"] and texts(data, "valid") == ["d"]
    assert seen and {total for _, total in seen} == {None}


def test_the_output_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for out in (tmp_path, tmp_path.parent):
        with pytest.raises(DataError, match="no text but that in .*; choose another --out"):
            run(tmp_path, out)
    assert files(tmp_path) == {"a.txt": b"text"}


def test_another_field_holds_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one", "text": "x"}\n' * 2)
    data = run(tmp_path / "a.jsonl", tmp_path / "out", text_field="content")
    assert data.record["splits"]["train"]["text_bytes"] == 6
    with pytest.raises(DataError, match=r"other settings \(text_field differ\)"):
        run(tmp_path / "a.jsonl", tmp_path / "out")


def test_what_is_left_out_is_said_and_kept(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text")
    (tmp_path / "in" / "a.parquet").write_bytes(b"\0")
    said = []
    data = run(tmp_path / "in", tmp_path / "out", say=said.append)
    assert said == ["left out, no UTF-8 text: 1 .parquet"]
    assert data.record["notes"] == {"left out, no UTF-8 text": {".parquet": 1}}
    with pytest.warns(UserWarning, match=r"left out, no UTF-8 text: 1 \.parquet"):
        run(tmp_path / "in", tmp_path / "out")


def test_nul_characters_do_not_end_a_document(tmp_path):
    write_lines(tmp_path / "train.jsonl", ["a\0b"])
    write_lines(tmp_path / "valid.jsonl", ["c"])
    data = run(tmp_path, tmp_path / "out")
    assert data.split("train").dataset[0].tolist() == [97, 98, 0]
    assert data.split("train").text_bytes.tolist() == [2]


def test_names_that_utf8_cannot_say(tmp_path):
    folder = tmp_path / "\udcffd"  # the byte 255 before the d
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    for name in ("M\udcfcller", "b"):
        (folder / f"{name}.txt").write_text(name[:1])
    data = run(folder, folder / "out")
    assert PreparedData.open(folder / "out").record == data.record
    run(folder, folder / "out", tokenizer=Interrupted(0))  # the same inputs, so nothing is to do
    write_lines(tmp_path / "a.jsonl", ["one", "two"], "\ud800")
    assert run(tmp_path / "a.jsonl", tmp_path / "out").domain_names == ["\ufffd"]


def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", random_documents(9))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.np, "savez", full)
        with pytest.raises(DataError, match=r"disk full while writing .*000000\.npz; free room"):
            run(tmp_path / "a.jsonl", tmp_path / "out")
    assert len(texts(run(tmp_path / "a.jsonl", tmp_path / "out"), "valid")) >= 1


def test_a_damaged_part_is_named(tmp_path):
    write_lines(tmp_path / "a.jsonl", random_documents(9))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.jsonl", out, tokenizer=Interrupted(0))
    part = out / "parts" / "000000.npz"
    np.savez(part, names=np.zeros(999, np.uint8))
    flipped = bytearray(part.read_bytes())
    flipped[len(flipped) // 2] ^= 1  # the archive's own table stays whole
    for content in (b"PK\3\4 no archive", bytes(flipped)):
        part.write_bytes(content)
        with pytest.raises(DataError, match=r"000000\.npz is broken .*; remove it"):
            run(tmp_path / "a.jsonl", out)


def test_progress_reaches_the_size_of_the_inputs(tmp_path):
    file, seen = tmp_path / "a.jsonl", []
    write_lines(file, random_documents(50))
    run(file, tmp_path / "out", progress=lambda *numbers: seen.append(numbers))
    size = file.stat().st_size
    assert seen == sorted(seen) and len(seen) >= 50
    assert seen[-1] == (size, size) and {total for _, total in seen} == {size}


def test_progress_of_a_packed_file_says_its_end_once(tmp_path):
    file, seen = tmp_path / "a.jsonl.xz", []
    with lzma.open(file, "wt") as packed:
        packed.writelines(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50))
    run(file, tmp_path / "out", progress=lambda *numbers: seen.append(numbers))
    assert seen == [(file.stat().st_size, file.stat().st_size)]


def test_a_vocabulary_beyond_u16_is_stored_wider(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_016

        def encode_batch(self, batch):
            return [np.array([70_000] * len(text)) for text in batch]

    write_lines(tmp_path / "train.jsonl", ["ab"])
    write_lines(tmp_path / "valid.jsonl", ["c"])
    data = run(tmp_path, tmp_path / "out", tokenizer=Wide())
    assert data.record["dtype"] == "int32"
    assert data.split("train").dataset[0].tolist() == [70_000, 70_000, 0]
