import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import write_dataset
from metastate.data.indexed import IndexedDataset
from metastate.data.loader import BatchSource, PreparedData, Split, permute
from metastate.errors import ConfigError, DataError


def make_split(tmp_path, lengths, domains=None):
    """Documents of distinct tokens 1, 2, 3, ... that each end with 0."""
    values = iter(range(1, 10_000))
    documents = [np.array([next(values) for _ in range(n - 1)] + [0]) for n in lengths]
    write_dataset(tmp_path / "train", documents, 65_536)
    domains = np.zeros(len(lengths), np.int64) if domains is None else np.array(domains)
    text_bytes = np.array(lengths) * 4
    dataset = IndexedDataset(tmp_path / "train", domains)
    return Split("train", dataset, ["a", "b"], text_bytes, 0, 65_536), documents


def write_folder(tmp_path, lengths=(9, 5, 7)):
    split, documents = make_split(tmp_path, lengths)
    table = np.stack([np.zeros(len(lengths), np.int64), split.text_bytes], 1)
    np.save(tmp_path / "train.docs.npy", table)
    record = {
        "format": 1,
        "tokenizer": {"kind": "bytes", "name": "x", "vocab_size": 65_536, "eod_id": 0},
        "domains": ["a"],
        "splits": {"train": {"tokens": int(sum(lengths))}, "valid": {"tokens": 0}},
    }
    (tmp_path / "data.json").write_text(json.dumps(record))
    return documents


def test_the_fingerprint_is_of_tokenizer_and_contents_not_of_names_and_places(tmp_path):
    write_folder(tmp_path)
    first = PreparedData.open(tmp_path)
    record = json.loads((tmp_path / "data.json").read_text())

    def changed(**tokenizer):
        new = record | {"tokenizer": record["tokenizer"] | tokenizer}
        (tmp_path / "data.json").write_text(json.dumps(new))
        return PreparedData.open(tmp_path)

    assert changed(name="y", path="/elsewhere/y.json").fingerprint == first.fingerprint
    for other in ({"sha256": "abc"}, {"eod_id": 1}, {"kind": "world"}):
        assert changed(**other).fingerprint != first.fingerprint
    record["splits"]["train"]["sha256"] = "abc"
    assert changed().fingerprint != first.fingerprint


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permutations_differ_by_key_and_are_no_shift():
    first, second = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15
    assert np.unique(np.diff(first)).size > 500


def test_an_epoch_reads_every_window_once(tmp_path):
    split, documents = make_split(tmp_path, [30, 41, 11, 19])
    source = BatchSource(split, 3, 4, seed=5)
    assert source.num_windows == 25
    seen = [source.batch(s) for s in range(25)]  # 75 rows: three epochs
    first_tokens = torch.cat([b.tokens[:, 0] for b in seen]).reshape(3, 25)
    flat = np.concatenate(documents)
    for epoch in first_tokens:
        assert np.isin(epoch.numpy(), flat).all()
        assert len(set(epoch[epoch > 0].tolist())) == (epoch > 0).sum()
    assert first_tokens[0].tolist() != first_tokens[1].tolist()


def test_what_no_whole_window_holds_is_read_in_other_epochs(tmp_path):
    split, documents = make_split(tmp_path, [30, 41, 11, 22])
    source = BatchSource(split, 25, 4, seed=5)  # an epoch a step
    assert source.num_windows * 4 < split.num_tokens - 1
    targets = [source.batch(s).targets for s in range(16)]
    flat = np.concatenate(documents).tolist()
    assert set(torch.cat(targets).flatten().tolist()) == set(flat[1:])
    assert max(int((t == 0).sum()) for t in targets) == 4  # the very last token is an end, too


def test_targets_are_the_next_tokens_and_resets_the_document_starts(tmp_path):
    split, documents = make_split(tmp_path, [3, 5, 2, 6, 1, 4])
    flat = np.concatenate(documents).tolist()
    source = BatchSource(split, 2, 5)
    for step in range(6):
        batch = source.batch(step)
        assert batch.carry is None
        assert (batch.tokens.dtype, batch.resets.dtype) == (torch.int64, torch.bool)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.resets[:, 0].all()
        assert torch.equal(batch.resets[:, 1:], batch.tokens[:, 1:] == 0)
        for row, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            window = [*row, target[-1]]
            assert any(flat[i : i + 6] == window for i in range(len(flat) - 5))


@pytest.mark.parametrize("carry_state", [False, True])
def test_a_batch_is_a_pure_function_of_seed_step_and_rank(tmp_path, carry_state):
    split, _ = make_split(tmp_path, [30, 41, 11, 19, 8])
    first = BatchSource(split, 4, 3, seed=1, carry_state=carry_state)
    again = BatchSource(split, 4, 3, seed=1, carry_state=carry_state)
    other = BatchSource(split, 4, 3, seed=2, carry_state=carry_state)
    straight = [first.batch(s) for s in range(20)]
    for step in (19, 3, 7):  # any order, another object: the same rows
        whole = again.batch(step)
        assert torch.equal(whole.tokens, straight[step].tokens)
        assert torch.equal(whole.resets, straight[step].resets)
        ranks = [again.batch(step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat([b.tokens for b in ranks]), whole.tokens)
        assert torch.equal(torch.cat([b.targets for b in ranks]), whole.targets)
    assert any(not torch.equal(other.batch(s).tokens, straight[s].tokens) for s in range(20))


def test_carried_rows_continue_and_cover_whole_documents(tmp_path):
    lengths = [6, 9, 4, 12, 1, 7, 3, 8]
    split, documents = make_split(tmp_path, lengths)
    source = BatchSource(split, 2, 4, seed=3, carry_state=True)
    steps = source.num_windows
    assert steps == (50 - 1) // 8
    for epoch in range(3):
        batches = [source.batch(epoch * steps + s) for s in range(steps)]
        assert [b.carry.tolist() for b in batches] == [[s > 0] * 2 for s in range(steps)]
        for before, after in zip(batches, batches[1:], strict=False):
            assert torch.equal(before.targets[:, -1], after.tokens[:, 0])
        for row in range(2):
            tokens = torch.cat([b.tokens[row] for b in batches])
            resets = torch.cat([b.resets[row] for b in batches])
            assert resets[0]
            assert torch.equal(resets[1:], tokens[1:] == 0)
            # between two ends of documents lies one whole document
            ends = [i + 1 for i, t in enumerate(tokens.tolist()) if t == 0]
            for start, end in zip(ends, ends[1:], strict=False):
                assert tokens[start:end].tolist() in [d.tolist() for d in documents]
    orders = [source.batch(e * steps).tokens.tolist() for e in range(4)]
    assert any(order != orders[0] for order in orders[1:])


def test_carried_rows_without_a_token_to_spare_read_documents_in_other_orders(tmp_path):
    split, _ = make_split(tmp_path, [6, 9, 4, 12, 1, 7, 3, 7])
    source = BatchSource(split, 2, 4, seed=3, carry_state=True)
    assert split.num_tokens - 1 == 2 * 4 * source.num_windows
    firsts = [source.batch(e * source.num_windows).tokens[0].tolist() for e in range(9)]
    assert len({tuple(tokens) for tokens in firsts}) > 3


def test_carried_rows_of_one_document_begin_elsewhere_each_epoch(tmp_path):
    """Else the end of the text, which no stream holds, would never be learned."""
    split, _ = make_split(tmp_path, [63])
    source = BatchSource(split, 4, 8, seed=3, carry_state=True)
    assert source.num_windows == 1
    firsts = {int(source.batch(epoch).tokens[0, 0]) for epoch in range(99)}
    text = split.dataset.tokens.tolist()
    assert firsts <= set(text[: 63 - 4 * 8]) and len(firsts) > 20
    seen = {int(t) for epoch in range(99) for t in source.batch(epoch).targets.flatten()}
    assert seen >= set(text[1:])


def test_documents(tmp_path):
    split, documents = make_split(tmp_path, [5, 3, 6], domains=[0, 1, 0])
    found = list(split.documents())
    assert [d.tokens.tolist() for d in found] == [d.tolist() for d in documents]
    assert [(d.domain, d.text_bytes) for d in found] == [("a", 20), ("b", 12), ("a", 24)]


def test_a_context_longer_than_the_data(tmp_path):
    split, _ = make_split(tmp_path, [5, 4])
    assert BatchSource(split, 2, 8).batch(0).tokens.shape == (2, 8)
    with pytest.raises(DataError, match=r"has 9 tokens, T = 9 needs at least 10; lower --context"):
        BatchSource(split, 2, 9)
    with pytest.raises(DataError, match="2 streams of context 5 needs at least 11"):
        BatchSource(split, 2, 5, carry_state=True)


def test_ranks_must_divide_the_batch(tmp_path):
    split, _ = make_split(tmp_path, [9])
    with pytest.raises(ConfigError, match="batch size 4 must be a multiple of the 3 processes"):
        BatchSource(split, 4, 2).batch(0, 0, 3)


def test_a_folder_opens(tmp_path):
    documents = write_folder(tmp_path)
    data = PreparedData.open(tmp_path)
    split = data.split("train")
    assert split.num_tokens == 21
    assert split.dataset[1].tolist() == documents[1].tolist()
    with pytest.raises(DataError, match="has no 'valid' split; it has train"):
        data.split("valid")
    with pytest.raises(DataError, match="has no 'dev' split"):
        data.split("dev")


def test_a_folder_that_was_not_prepared(tmp_path):
    with pytest.raises(DataError, match="there is no such folder: run `metastate prepare"):
        PreparedData.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"it holds no data\.json"):
        PreparedData.open(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match="interrupted: run the same"):
        PreparedData.open(tmp_path)
    (tmp_path / "data.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="prepared in format 2, this program reads up to 1"):
        PreparedData.open(tmp_path)
    for broken in ("{", "[]", '{"format": 1}'):
        (tmp_path / "data.json").write_text(broken)
        with pytest.raises(DataError, match=r"data\.json is broken"):
            PreparedData.open(tmp_path)


def test_damaged_files_of_a_folder(tmp_path):
    write_folder(tmp_path)
    data = PreparedData.open(tmp_path)
    content = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"truncated: expected 42 bytes, found 38"):
        data.split("train")
    (tmp_path / "train.bin").write_bytes(content)
    for domain in (-1, 1, 7):
        np.save(tmp_path / "train.docs.npy", np.array([[domain, 1]] * 3))
        with pytest.raises(DataError, match=r"names a domain that data\.json lacks"):
            data.split("train")
    np.save(tmp_path / "train.docs.npy", np.array([[0, 1]] * 2))
    with pytest.raises(DataError, match="3 documents, but 2 domains"):
        data.split("train")
    np.save(tmp_path / "train.docs.npy", np.array(["x"], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"train\.docs\.npy is broken"):
        data.split("train")
    np.save(tmp_path / "train.docs.npy", np.array([[0, 1]] * 3))
    data.split("train")
    data.record["splits"]["train"]["tokens"] = 22
    with pytest.raises(DataError, match=r"train\.bin has 21 tokens, data\.json says 22"):
        data.split("train")


def test_a_token_outside_the_vocabulary_is_noticed(tmp_path):
    split, _ = make_split(tmp_path, [9, 9])
    source = BatchSource(split, 4, 4)
    for num_ids in (12, 16):  # the largest token is 16
        split.num_ids = num_ids
        with pytest.raises(DataError, match=f"token outside the vocabulary of {num_ids}"):
            source.batch(0)
    split.num_ids = 17
    source.batch(0)


def test_check_vocab(tmp_path):
    write_folder(tmp_path)
    data = PreparedData.open(tmp_path)
    data.check_vocab(65_536)
    data.check_vocab(65_536, {"kind": "bytes", "name": "y", "sha256": None})
    with pytest.raises(DataError, match=r"vocabulary 65,536\), but the model has .* of 256"):
        data.check_vocab(256)
    for size in (65_536, 50_304):  # whatever the size: a trained model's vocabulary is settled
        with pytest.raises(DataError, match="trained with 'neox'"):
            data.check_vocab(size, {"kind": "json", "name": "neox", "sha256": "1"})
    data.record["tokenizer"] |= {"sha256": "1"}  # of one kind, but with other tokens
    with pytest.raises(DataError, match="trained with 'neox'"):
        data.check_vocab(65_536, {"kind": "bytes", "name": "neox", "sha256": "2"})
