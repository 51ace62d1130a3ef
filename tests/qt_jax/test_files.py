"""Check that files appear whole or not at all, whoever else writes them and whatever fails."""

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from qt_jax.files import ABANDONED, staged, write_whole

SIZE, ROUNDS = 2**16, 20


def write_often(path: str, letter: str) -> None:
    """Write the file with one letter over and over, and read what stands there after each time."""
    for _ in range(ROUNDS):
        write_whole(Path(path), letter * SIZE)
        text = Path(path).read_text(encoding="utf-8")
        assert len(text) == SIZE and len(set(text)) == 1, (letter, len(text), set(text))


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_several_writers_of_one_path_do_not_mix(tmp_path, pool):
    path = tmp_path / "note.txt"
    if pool == "threads":
        workers = ThreadPoolExecutor(4)
    else:
        workers = ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn"))
    with workers:
        list(workers.map(write_often, [str(path)] * 4, "abcd"))
    assert set(path.read_text()) < set("abcd") and len(path.read_text()) == SIZE
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


def test_blocks_that_are_open_at_once_have_a_scratch_file_each(tmp_path):
    path = tmp_path / "note.txt"
    with staged(path) as first:
        first.write_text("first")
        with staged(path) as second:
            assert second != first and second.parent == first.parent == tmp_path
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    write_whole(path, "old")
    with pytest.raises(RuntimeError, match="disk"), staged(path) as scratch:
        scratch.write_text("half of the n")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_encoded_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_rename_leaves_nothing(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_whole(tmp_path / "note.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "note.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_scratch_files_that_a_kill_left_go_after_an_hour(tmp_path):
    path = tmp_path / "note[1].txt"
    old = tmp_path / "note[1].txt.0123456789ab.partial"
    kept = [
        tmp_path / name
        for name in (
            "note[1].txt.ba9876543210.partial",  # perhaps of a writer that lives
            "note1.txt.0123456789ab.partial",
            "other.txt.0123456789ab.partial",
            "note[1].txt.mine.partial",
        )
    ]
    for scratch in (old, *kept):
        scratch.write_text("half")
    for scratch in (old, *kept[1:]):
        then = time.time() - ABANDONED - 60
        os.utime(scratch, (then, then))
    with pytest.raises(RuntimeError), staged(path):
        raise RuntimeError
    assert old.exists()
    write_whole(path, "whole")
    assert path.read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


def test_folders_are_made_and_text_is_utf8_in_every_locale(tmp_path):
    path = tmp_path / "new" / "folder" / "note.txt"
    program = f"import qt_jax.files as f; f.write_whole({str(path)!r}, 'Gr\\xf6\\xdfe')"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | plain, check=True)
    assert path.read_bytes() == "Größe".encode()
