import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments.data import store
from qt_jax.errors import InvalidInput

CONTENT = b"pixels" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server on this machine that offers `set.bin`, and a way to shut it."""
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
    """Installs a shell script as the only npm on the PATH; its fifth argument is the destination."""

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
