import os
import stat

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.data import store
from qt_jax.errors import InvalidInput


def toy_arrays():
    rng = np.random.default_rng(0)
    return store.as_arrays(
        rng.integers(0, 256, (6, 4, 4, 3)), rng.integers(0, 3, 6), rng.integers(0, 256, (2, 4, 4, 3)), [1, 2]
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_as_arrays_fixes_dtypes():
    arrays = toy_arrays()
    assert [array.dtype for array in arrays.values()] == [np.uint8, np.int32, np.uint8, np.int32]
    assert tuple(arrays) == store.NAMES


def test_digest_sees_name_dtype_shape_and_every_value():
    base = {"x": np.arange(6, dtype=np.int32)}
    others = [
        {"y": base["x"]},
        {"x": base["x"].astype(np.int64)},
        {"x": base["x"].reshape(2, 3)},
        {"x": base["x"][::-1]},
    ]
    assert len({store.digest(arrays) for arrays in [base, *others]}) == 5
    assert store.digest({"x": np.arange(12, dtype=np.int32)[:6].copy()}) == store.digest(base)


def test_npz_round_trip_leaves_one_file(tmp_path):
    arrays = toy_arrays()
    store.write_npz(tmp_path / "toy.npz", arrays)
    back = store.read_npz(tmp_path / "toy.npz", store.digest(arrays))
    for name in store.NAMES:
        np.testing.assert_array_equal(back[name], arrays[name])
    assert [path.name for path in tmp_path.iterdir()] == ["toy.npz"]


def test_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "toy.npz"
    path.write_bytes(b"old")

    def full_disk(stream, **arrays):
        stream.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(store.np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.write_npz(path, toy_arrays())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.npz"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), truncate=st.booleans())
def test_damaged_npz_never_passes_as_other_data(tmp_path, position, truncate):
    arrays = toy_arrays()
    path = tmp_path / "toy.npz"
    store.write_npz(path, arrays)
    data = bytearray(path.read_bytes())
    place = int(position * len(data))
    if truncate:
        del data[place:]
    else:
        data[place] ^= 0xFF
    path.write_bytes(data)
    try:
        back = store.read_npz(path, store.digest(arrays))
    except store.CorruptData as error:
        assert str(path) in str(error) and "delete it" in str(error)
    else:
        assert store.digest(back) == store.digest(arrays)


def test_npz_of_other_data_is_refused(tmp_path):
    arrays = toy_arrays()
    store.write_npz(tmp_path / "toy.npz", {**arrays, "test_labels": arrays["test_labels"] + np.int32(1)})
    with pytest.raises(store.CorruptData, match="other data than published"):
        store.read_npz(tmp_path / "toy.npz", store.digest(arrays))


def test_check_file(tmp_path):
    path = tmp_path / "abc"
    with pytest.raises(InvalidInput, match="is missing"):
        store.check_file(path, "md5", "0")
    path.write_bytes(b"abc")
    store.check_file(path, "md5", "900150983cd24fb0d6963f7d28e17f72")  # RFC 1321, A.5
    with pytest.raises(InvalidInput, match=r"has SHA256 ba7816bf.*expected 00"):
        store.check_file(path, "sha256", "00")


def test_cache_dir_follows_the_variable_else_the_platform(tmp_path, monkeypatch):
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "a" / "b"))
    assert store.cache_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    monkeypatch.delenv("QT_JAX_DATA")
    monkeypatch.setattr(store.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert store.cache_dir() == tmp_path / "qt_jax"


def test_cache_dir_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(InvalidInput, match="set QT_JAX_DATA"):
        store.cache_dir()


def test_cached_fetches_once_and_leaves_no_scratch(cache):
    arrays, calls = toy_arrays(), []

    def fetch(scratch):
        (scratch / "download").write_text("large")
        calls.append(scratch)
        return arrays

    for _ in range(2):
        back = store.cached("toy", store.digest(arrays), fetch)
        np.testing.assert_array_equal(back["train_images"], arrays["train_images"])
    assert len(calls) == 1 and calls[0].parent == cache
    assert [path.name for path in cache.iterdir()] == ["toy.npz"]


def test_cached_file_is_readable_by_whom_the_umask_allows(cache):
    arrays = toy_arrays()
    store.cached("toy", store.digest(arrays), lambda scratch: arrays)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((cache / "toy.npz").stat().st_mode) == 0o666 & ~umask


def test_cached_reports_a_damaged_file_in_one_line_and_mends_it(cache, capsys):
    arrays = toy_arrays()
    cache.mkdir()
    (cache / "toy.npz").write_bytes(b"PK damaged")
    store.cached("toy", store.digest(arrays), lambda scratch: arrays)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(cache / "toy.npz") in said and "Fetching it again" in said
    assert store.read_npz(cache / "toy.npz", store.digest(arrays))


def test_cached_keeps_nothing_that_fails_its_digest(cache):
    with pytest.raises(InvalidInput, match="fetched copy of toy"):
        store.cached("toy", "0" * 64, lambda scratch: toy_arrays())
    assert list(cache.iterdir()) == []


def test_cached_in_a_read_only_folder(cache, monkeypatch):
    monkeypatch.setattr(store.os, "access", lambda path, mode: False)
    with pytest.raises(InvalidInput, match="read-only; set QT_JAX_DATA"):
        store.cached("toy", "0", lambda scratch: pytest.fail("must not fetch"))


def test_find_local(tmp_path):
    names = ("set.npz", "set.tar.gz")
    with pytest.raises(
        InvalidInput, match=r"no Toys in data_dir .*absent \(which does not exist\).*set.tar.gz"
    ):
        store.find_local(tmp_path / "absent", names, "Toys")
    with pytest.raises(InvalidInput, match=r"looked for set.npz, set.tar.gz"):
        store.find_local(tmp_path, names, "Toys")
    (tmp_path / "set.tar.gz").write_text("")
    assert store.find_local(tmp_path, names, "Toys") == tmp_path / "set.tar.gz"
    assert store.find_local(tmp_path / "set.tar.gz", names, "Toys") == tmp_path / "set.tar.gz"
    (tmp_path / "set.npz").write_text("")
    assert store.find_local(str(tmp_path), names, "Toys") == tmp_path / "set.npz"
