import hashlib
import os
import stat
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

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


CONTENT = b"pixels" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Start a server on this machine that offers `set.bin`, yield its address, and stop it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "set.bin").write_bytes(CONTENT)
    handler = partial(QuietHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_from_url_downloads_with_a_progress_bar(server, tmp_path, capfd):
    path = store.from_url(f"{server}/set.bin", MD5, tmp_path / "in" / "kept.bin")
    assert path.read_bytes() == CONTENT
    assert "100%" in capfd.readouterr().err


def test_from_url_leaves_a_good_file_alone(tmp_path):
    (tmp_path / "set.bin").write_bytes(CONTENT)
    assert store.from_url("http://127.0.0.1:1/set.bin", MD5, tmp_path / "set.bin").read_bytes() == CONTENT


def test_from_url_refuses_other_content(server, tmp_path):
    with pytest.raises(store.Unavailable, match="does not match"):
        store.from_url(f"{server}/set.bin", "0" * 32, tmp_path / "in" / "set.bin")
    assert list((tmp_path / "in").iterdir()) == []


def test_from_url_without_the_file_or_the_host(server, tmp_path):
    with pytest.raises(store.Unavailable, match="404"):
        store.from_url(f"{server}/absent", MD5, tmp_path / "set.bin")
    with pytest.raises(store.Unavailable, match="ConnectionError"):
        store.from_url("http://127.0.0.1:1/set.bin", MD5, tmp_path / "set.bin")


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Install a shell script as the only npm on the PATH. Its fifth argument is the destination."""

    def install(script):
        (tmp_path / "bin").mkdir()
        npm = tmp_path / "bin" / "npm"
        npm.write_text(f"#!/bin/sh\n{script}\n")
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    (tmp_path / "original").write_bytes(CONTENT)
    return install


def from_npm(tmp_path, sha256=SHA256):
    (tmp_path / "out").mkdir()
    return store.from_npm("toys@1.0", "toys-1.0.tgz", sha256, 7, tmp_path / "out")


def test_from_npm_packs_into_the_folder(fake_npm, tmp_path, capsys):
    fake_npm(f'echo "$1 $2 $3 $4" >{tmp_path}/called; cp {tmp_path}/original "$5/toys-1.0.tgz"')
    assert from_npm(tmp_path).read_bytes() == CONTENT
    assert (tmp_path / "called").read_text() == "pack toys@1.0 --ignore-scripts --pack-destination\n"
    assert "Downloading toys@1.0 (7 MB)" in capsys.readouterr().err


def test_from_npm_refuses_other_content(fake_npm, tmp_path):
    fake_npm(f'cp {tmp_path}/original "$5/toys-1.0.tgz"')
    with pytest.raises(store.Unavailable, match="SHA256"):
        from_npm(tmp_path, "0" * 64)


def test_from_npm_that_fails_says_why(fake_npm, tmp_path):
    fake_npm("echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(store.Unavailable, match="npm pack failed: npm error code E404"):
        from_npm(tmp_path)


def test_from_npm_that_brings_nothing(fake_npm, tmp_path):
    fake_npm("exit 0")
    with pytest.raises(store.Unavailable, match=r"toys-1.0.tgz is missing"):
        from_npm(tmp_path)


def test_from_npm_that_hangs(fake_npm, tmp_path, monkeypatch):
    fake_npm("exec sleep 30")
    monkeypatch.setattr(store, "NPM_SECONDS", 0.1)
    with pytest.raises(store.Unavailable, match="timed out"):
        from_npm(tmp_path)


def test_from_npm_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(store.Unavailable, match="not on the PATH"):
        from_npm(tmp_path)


def test_first_available_stops_at_the_first_that_works():
    def fails():
        raise store.Unavailable("down")

    ways = {"a": fails, "b": lambda: "data", "c": lambda: pytest.fail("must not be tried")}
    assert store.first_available("toys", ways, "advice") == "data"
    with pytest.raises(InvalidInput) as caught:
        store.first_available("toys", {"a": fails, "z": fails}, "Buy them.")
    assert str(caught.value) == "toys could not be fetched. Tried:\n  - a: down\n  - z: down\nBuy them."
