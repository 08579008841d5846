"""The folder of stored states: what in it is the store's own, and what it never touches."""

import contextlib
import os
import shutil

import pytest
import torch
from served import make

from metastate.data.tokenizer import StreamDecoder
from metastate.infer.generate import Continuation
from metastate.infer.store import LOOKS_BACK, StateStore, StoreFullError
from metastate.model.decode import store_bfloat16


def store_one(folder, model, owner="open"):
    store = StateStore(folder, model)
    state = store.add(owner, Continuation(model.init_state(1)))
    store.close()
    return state


def test_files_and_folders_of_others_are_never_touched(tmp_path):
    names = [
        ".env",
        "project/.env",
        "project/.git/config",
        f"project/.state-{'0' * 24}.safetensors.tmp",
        ".upload-mine",
        "open/.env",
        "open/.state-mine.tmp",
        "open/.git/config",
        f"open/.state-{'0' * 24}.safetensors.tmp/inside",
        "0123456789abcdef/.env",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    link = tmp_path / "open" / f".state-{'1' * 24}.safetensors.tmp"
    link.symlink_to(tmp_path / ".env")
    StateStore(tmp_path, make()).close()
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert link.is_symlink()


@pytest.mark.parametrize("owner", ["open", "0123456789abcdef" * 2])
def test_a_killed_process_half_files_are_removed(tmp_path, owner):
    model = make()
    state = store_one(tmp_path, model, owner)
    (tmp_path / owner / f".state-{'0' * 24}.safetensors.tmp").write_bytes(b"half")
    (tmp_path / f".upload-{'0' * 24}").write_bytes(b"half")
    store = StateStore(tmp_path, model)
    assert [s.id for s in store.list(owner)] == [state.id]
    store.close()
    assert {p.name for p in tmp_path.rglob("*")} == {owner, ".lock", f"{state.id}.safetensors"}


@pytest.mark.parametrize("other", ["weights", "number format"])
def test_states_of_other_weights_are_left_out_and_take_no_room(tmp_path, caplog, other):
    model = make()
    old = store_one(tmp_path, model)
    changed = make(seed=5 if other == "weights" else 0)
    if other != "weights":
        store_bfloat16(changed)
    store = StateStore(tmp_path, changed, max_states=1)
    assert store.list("open") == [] and store.totals() == (0, 0)
    assert ": 1 states" in caplog.text and "other weights" in caplog.text
    store.add("open", Continuation(changed.init_state(1)))
    store.close()
    store = StateStore(tmp_path, model)
    assert [s.id for s in store.list("open")] == [old.id]
    assert torch.equal(store.get("open", old.id).state.layers[0].S, model.init_state(1).layers[0].S)
    store.close()


def test_limits_may_be_reached_and_what_would_pass_them_leaves_no_file(tmp_path):
    model = make()
    start = Continuation(model.init_state(1))
    size = store_one(tmp_path / "a", model).num_bytes
    assert start.state.num_bytes < size  # the file is longer, which shows when it is written
    with contextlib.closing(StateStore(tmp_path / "b", model, max_bytes=2 * size)) as store:
        kept = [store.add("open", start) for _ in range(2)]
        with pytest.raises(StoreFullError, match="bytes"):
            store.add("open", start)
        store.delete("open", kept[0].id)
        store.check_room("open", 1, size)
        with pytest.raises(StoreFullError, match="bytes"):
            store.check_room("open", 2, size)
    room = size + start.state.num_bytes
    with contextlib.closing(StateStore(tmp_path / "c", model, max_bytes=room)) as store:
        kept = [store.add("open", start)]
        with pytest.raises(StoreFullError, match="bytes"):
            store.add("open", start)
    assert [p.stem for p in (tmp_path / "c" / "open").iterdir()] == [s.id for s in kept]


def test_a_full_store_writes_nothing(tmp_path, monkeypatch):
    with contextlib.closing(StateStore(tmp_path, make(), max_states=1)) as store:
        start = Continuation(store.model.init_state(1))
        store.add("open", start)
        monkeypatch.setattr(Continuation, "save", None)
        with pytest.raises(StoreFullError, match="the limit of 1"):
            store.add("open", start)


def test_states_come_back_oldest_first_and_no_others_with_them(tmp_path):
    model = make()
    ids = [store_one(tmp_path, model).id for _ in range(4)]
    for age, id in enumerate(sorted(ids)):
        os.utime(tmp_path / "open" / f"{id}.safetensors", (1e9 - age, 1e9 - age))
    shutil.copy(tmp_path / "open" / f"{ids[0]}.safetensors", tmp_path / "open/mine.safetensors")
    with contextlib.closing(StateStore(tmp_path, model)) as store:
        assert [s.id for s in store.list("open")] == sorted(ids, reverse=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights and opens no folder")
def test_the_folder_is_its_user_s_and_a_deleted_state_is_gone_for_good(tmp_path, monkeypatch):
    with contextlib.closing(StateStore(tmp_path / "states", make())) as store:
        state = store.add("open", Continuation(store.model.init_state(1)))
        order, fsync = [], os.fsync

        def synced(descriptor):
            order.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", synced)
        store.delete("open", state.id)
        assert order == [(tmp_path / "states" / "open").stat().st_ino]
    for folder in (tmp_path / "states", tmp_path / "states" / "open"):
        assert folder.stat().st_mode & 0o077 == 0


def test_a_model_in_16_bits_takes_its_own_states_back(tmp_path):
    model = make().bfloat16()
    store = StateStore(tmp_path, model)
    kept = store.add("open", Continuation(model.init_state(1)))
    again = store.add_file("open", store.content("open", kept.id))
    store.close()
    assert again.tokens_seen == 0 and again.id != kept.id


def test_long_notes_of_an_upload_are_cut(tmp_path):
    model = make()
    many = {"history": (1,) * 9000, "recent": (2,) * 9000, "shown": "x" * 9000}
    Continuation(model.init_state(1), (65,), **many).save(tmp_path / "s", model)
    store = StateStore(tmp_path / "states", model)
    found = store.get("open", store.add_file("open", (tmp_path / "s").read_bytes()).id)
    store.close()
    assert len(found.history) == StreamDecoder.LIMIT
    assert len(found.recent) == len(found.shown) == LOOKS_BACK
