import errno
import hashlib
import os

import pytest

from metastate.data.files import atomic_write, sha256_file, write_json
from metastate.errors import DataError, TrainingError


def test_writes_bytes_and_callables_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.bin"
    atomic_write(path, b"first")
    assert path.read_bytes() == b"first"
    atomic_write(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["b.bin"]
    assert sha256_file(path) == hashlib.sha256(b"second").hexdigest()


def test_a_full_disk_keeps_the_previous_file(tmp_path):
    path = tmp_path / "model"
    atomic_write(path, b"old")

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"disk full while writing .*model; free room"):
        atomic_write(path, full)
    with pytest.raises(DataError, match="disk full"):
        atomic_write(path, full, error=DataError)
    assert path.read_bytes() == b"old"
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
