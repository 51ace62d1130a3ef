"""Check how samples are read from files and folders, looked through once, and kept."""

import hashlib

import numpy as np
import pytest

from qt_jax.backends import arrays
from qt_jax.backends.arrays import read_arrays, scan, stored, total_digest
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(7, 3, 4)).astype(np.float32)
LABELS = np.arange(7)


def test_an_npy_file_is_mapped_and_read_in_place(tmp_path):
    np.save(tmp_path / "c.npy", IMAGES)
    found = read_arrays(tmp_path / "c.npy")["images"]
    assert isinstance(found, np.memmap)
    for part in (found, found[:4]):
        assert stored(part, tmp_path / "copy.npy") == tmp_path / "c.npy"
    assert not (tmp_path / "copy.npy").exists()


@pytest.mark.parametrize("part", [np.s_[2:], np.s_[:, :2], np.s_[::2], np.s_[::-1]])
def test_other_rows_of_a_mapped_file_are_copied(part, tmp_path):
    np.save(tmp_path / "c.npy", IMAGES)
    path = stored(read_arrays(tmp_path / "c.npy")["images"][part], tmp_path / "copy.npy")
    np.testing.assert_array_equal(np.load(path), IMAGES[part])


def test_an_npz_file(tmp_path):
    np.savez(tmp_path / "t.npz", images=IMAGES, labels=LABELS)
    found = read_arrays(tmp_path / "t.npz")
    assert sorted(found) == ["images", "labels"]
    np.testing.assert_array_equal(np.load(stored(found["images"], tmp_path / "i.npy")), IMAGES)


@pytest.mark.parametrize("in_memory", [2**30, 0])
def test_a_folder_of_parts(in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "IN_MEMORY", in_memory)
    parts, joined = tmp_path / "t" / "images", tmp_path / "joined"
    parts.mkdir(parents=True)
    for place, rows in enumerate((IMAGES[:3], IMAGES[3:4], IMAGES[4:])):
        np.save(parts / f"{place}.npy", rows)
    np.save(tmp_path / "t" / "labels.npy", LABELS)
    for folder, names in ((tmp_path / "t", {"images", "labels"}), (parts, {"images"})):
        found = read_arrays(folder, joined)
        assert found.keys() == names
        np.testing.assert_array_equal(found["images"], IMAGES)
    assert joined.exists() == (in_memory == 0)


def test_a_folder_of_named_arrays(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "rate.npy", LABELS)
    assert read_arrays(tmp_path).keys() == {"images", "rate"}


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "c.npz").write_bytes(b"nothing")
    (tmp_path / "c.npy").write_bytes(b"nothing")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    for name in ("c.npz", "c.npy", "o.npy", "absent.npz"):
        with pytest.raises(InvalidInput, match=f"{name} cannot be read"):
            read_arrays(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no \.npy files"):
        read_arrays(tmp_path / "empty")
    (tmp_path / "odd").mkdir()
    np.save(tmp_path / "odd" / "0.npy", IMAGES)
    np.save(tmp_path / "odd" / "1.npy", IMAGES[:, :2])
    with pytest.raises(InvalidInput, match="one dtype, and one shape"):
        read_arrays(tmp_path / "odd")


@pytest.mark.parametrize("chunk", [2**26, 100])
def test_one_pass_finds_digest_range_and_what_is_not_finite(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    np.save(tmp_path / "c.npy", IMAGES)
    content = f"{IMAGES.dtype} {IMAGES.shape} ".encode() + IMAGES.tobytes()
    for array in (IMAGES, read_arrays(tmp_path / "c.npy")["images"], np.asfortranarray(IMAGES)):
        found = scan(array)
        assert found.digest == hashlib.sha256(content).hexdigest()
        assert (found.finite, found.low, found.high) == (True, IMAGES.min(), IMAGES.max())
    broken = IMAGES.copy()
    broken[3, 1, 2] = np.nan
    assert not scan(broken).finite and scan(broken).high == np.nanmax(broken)
    assert scan(np.zeros((0, 3))).finite and scan(LABELS).high == 6


def test_several_arrays_have_one_digest():
    assert total_digest({"x": "a"}) == "a"
    assert total_digest({"x": "a", "y": "b"}) == total_digest({"y": "b", "x": "a"}) != "a"


def test_parts_are_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "IN_MEMORY", 0)
    for place in range(7):
        np.save(tmp_path / f"{place + 5}.npy", IMAGES[place : place + 1])
    for _ in range(2):  # the joined file of the first time is no part
        np.testing.assert_array_equal(read_arrays(tmp_path)["images"], IMAGES)


def test_what_was_changed_in_memory_alone_is_kept(tmp_path):
    np.save(tmp_path / "c.npy", IMAGES)
    changed = np.load(tmp_path / "c.npy", mmap_mode="c")
    changed[:] *= 2
    assert scan(changed).high == 2 * IMAGES.max()
    np.testing.assert_array_equal(np.load(stored(changed, tmp_path / "copy.npy")), 2 * IMAGES)
    np.testing.assert_array_equal(changed, 2 * IMAGES)
