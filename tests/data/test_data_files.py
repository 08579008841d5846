import errno
import os
import threading

import pytest
import safetensors.torch
import torch

from metastate.data.files import (
    LOCK,
    alone_in,
    atomic_write,
    in_turn,
    replacing,
    whole_folder,
    write_json,
    write_tensors,
)
from metastate.errors import BusyError, DataError, TrainingError


def test_writes_bytes_and_callables_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.bin"
    atomic_write(path, b"first")
    assert path.read_bytes() == b"first"
    atomic_write(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["b.bin"]


def test_a_full_disk_keeps_the_previous_file(tmp_path):
    path = tmp_path / "model"
    atomic_write(path, b"old")

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"disk full while writing .*model; free room"):
        atomic_write(path, full)
    with pytest.raises(DataError, match="disk full .*; the previous file is untouched"):
        atomic_write(path, full, error=DataError)
    assert path.read_bytes() == b"old"
    with pytest.raises(DataError, match="free room and run again$"):  # there is no previous one
        atomic_write(tmp_path / "other", full, error=DataError)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_kernel_s_own_full_disk(tmp_path):
    (tmp_path / ".model.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="disk full"):
        atomic_write(tmp_path / "model", b"x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "model"
    atomic_write(path, b"old")

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupted)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot open a folder")
def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, disk_order
):
    atomic_write(tmp_path / "model", b"new")
    file, folder = (path.stat().st_ino for path in (tmp_path / "model", tmp_path))
    assert disk_order == [file, "model", folder]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot open a folder")
def test_renamed_folders_and_files_are_on_the_disk_before_the_return(tmp_path, monkeypatch):
    order, fsync = [], os.fsync

    def synced(descriptor):
        order.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    with whole_folder(tmp_path / "new") as folder:
        folder.mkdir()
    assert order == [tmp_path.stat().st_ino] and (tmp_path / "new").is_dir()
    with replacing(tmp_path / "new", "b") as folder:
        (folder / "a").touch()
        (folder / "b").touch()
    assert order[1:] == [(tmp_path / "new").stat().st_ino]
    assert sorted(os.listdir(tmp_path / "new")) == ["a", "b"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".model.tmp").write_bytes(b"half of an older write")
    atomic_write(tmp_path / "model", b"new")
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model").read_bytes() == b"new"


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(TrainingError, match="cannot write .*runs"):
        write_json(tmp_path / "runs" / "a.json", {})


def test_json_is_utf8_and_readable(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    with alone_in(tmp_path / "a" / "b"):
        with pytest.raises(BusyError, match="another process works in"), alone_in(tmp_path / "a/b"):
            pass
        (tmp_path / "a" / "b" / "work").touch()
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [LOCK, "work"]
    with alone_in(tmp_path / "a" / "b"):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="file is a file, where a folder is needed"),
        alone_in(tmp_path / "file", error=DataError),
    ):
        pass


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    with pytest.raises(ValueError), alone_in(tmp_path / "new"):
        raise ValueError
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with alone_in(tmp_path / "old"):
        pass
    assert os.listdir(tmp_path / "old") == [LOCK]

    flock = fcntl.flock  # the holder removes the folder just before the next one gets the lock

    def late(file, how):
        (tmp_path / "new" / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BusyError), alone_in(tmp_path / "new"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    told = pytest.warns(RuntimeWarning, match="no locks .* nothing keeps a second process")
    with told, alone_in(tmp_path / "run"):
        (tmp_path / "run" / "work").touch()
    assert (tmp_path / "run" / "work").exists()


def test_who_waits_his_turn_gets_it_when_the_other_is_done(tmp_path):
    order = []

    def second():
        with in_turn(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with in_turn(tmp_path):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_tensors_are_written_as_the_library_would(tmp_path):
    """Strided, shared and empty ones too, which the library refuses or copies."""
    x = torch.arange(12.0).view(3, 4)
    tensors = {
        "b": x.T,
        "a": x,
        "half": x.bfloat16(),
        "number": torch.tensor(7),
        "none": x[:0],
        "is": x > 3,
    }
    write_tensors(tmp_path / "t", tensors, {"format": "é"})
    dense = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    assert (tmp_path / "t").read_bytes() == safetensors.torch.save(dense, {"format": "é"})
    found = safetensors.torch.load_file(tmp_path / "t")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert os.listdir(tmp_path) == ["t"]
