import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import write_dataset
from metastate.data.indexed import IndexedDataset, write_index
from metastate.errors import DataError


@pytest.fixture
def prefix(tmp_path):
    write_dataset(tmp_path / "a", [np.array([5, 6, 0]), np.array([7, 0])], 256)
    return tmp_path / "a"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 69_999), max_size=9), max_size=9), st.booleans())
def test_documents_come_back(tmp_path_factory, documents, large):
    vocab_size = 70_000 if large else 65_536
    documents = [[t % vocab_size for t in document] for document in documents]
    prefix = tmp_path_factory.mktemp("d") / "x"
    write_dataset(prefix, [np.array(d, dtype=np.int64) for d in documents], vocab_size)
    found = IndexedDataset(prefix)
    assert [found[i].tolist() for i in range(len(found))] == documents
    assert found.tokens.dtype == (np.int32 if large else np.uint16)
    assert found.num_tokens == sum(map(len, documents))
    assert found.lengths.tolist() == [len(d) for d in documents]


def test_the_largest_token_of_two_bytes_and_the_first_of_four(tmp_path):
    for vocab_size in (65_536, 65_537):
        write_dataset(tmp_path / "a", [np.array([vocab_size - 1])], vocab_size)
        assert IndexedDataset(tmp_path / "a")[0].tolist() == [vocab_size - 1]


def test_the_bytes_are_megatron_s(prefix):
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert prefix.with_suffix(".idx").read_bytes() == expected
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<5H", 5, 6, 0, 7, 0)


def test_a_document_of_several_sequences(tmp_path):
    (tmp_path / "a.bin").write_bytes(struct.pack("<5q", 1, 2, 3, 4, 5))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 5, 3, 3)
    body = struct.pack("<3i", 2, 1, 2) + struct.pack("<3q", 0, 16, 24) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "a.idx").write_bytes(header + body)
    data = IndexedDataset(tmp_path / "a.idx")
    assert [data[i].tolist() for i in range(len(data))] == [[1, 2, 3], [4, 5]]
    assert data[-1].tolist() == [4, 5]
    with pytest.raises(IndexError):
        data[2]


def patch(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"x", "is not a .idx file"),
        (9, b"\2", "has version 2; this program reads version 1"),
        (17, b"\7", "has dtype code 7; known: 1, 2, 3, 4, 5, 8"),
        (18, b"\3", r"is truncated: 3 sequences and 3 document entries need 94 bytes, found 82"),
        (34, b"\xff\xff\xff\xff", "negative size"),
        (34, b"\2", "pointers that do not follow"),
        (42, b"\2", "pointers that do not follow"),
        (50, b"\7", "pointers that do not follow"),
        (66, b"\3", "document boundaries"),
        (74, b"\1", "document boundaries"),
    ],
)
def test_a_broken_index_says_what_is_wrong(prefix, offset, value, message):
    patch(prefix.with_suffix(".idx"), offset, value)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_every_truncation_of_the_index_is_noticed(prefix):
    path = prefix.with_suffix(".idx")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="truncated|is not a .idx file"):
            IndexedDataset(prefix)


def test_an_index_that_is_too_long_is_noticed(prefix):
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="is too long: .* need 82 bytes, found 83"):
        IndexedDataset(prefix)


def test_a_truncated_bin_names_both_sizes(prefix):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.bin is truncated: expected 10 bytes, found 9"):
        IndexedDataset(prefix)
    path.write_bytes(bytes(12))
    with pytest.raises(DataError, match="longer than its index"):
        IndexedDataset(prefix)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.bin is missing"):
        IndexedDataset(prefix)


def test_domains_must_fit(prefix):
    assert IndexedDataset(prefix, np.array([1, 0])).domains.tolist() == [1, 0]
    with pytest.raises(DataError, match="2 documents, but 1 domains"):
        IndexedDataset(prefix, np.array([1]))


def test_a_document_beyond_the_format_is_refused(tmp_path):
    with pytest.raises(DataError, match="document 1 has 2,147,483,648 tokens"):
        write_index(tmp_path / "a", [1, 2**31], np.dtype("<u2"))
