import gzip
import struct

import numpy as np
import pytest

from experiments.data import fashion_mnist, load, store
from experiments.data.store import Unavailable
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 2
TEST = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8), np.arange(4, dtype=np.uint8) % 2


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)  # names of tests must not hold the time


def write_set(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(fashion_mnist.FILES, (*TRAIN, *TEST), strict=True):
        (folder / name).write_bytes(idx(array))
    return folder


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Pin the checksum of a toy set, without Debian's package and without a network."""
    arrays = store.as_arrays(TRAIN[0][..., None], TRAIN[1], TEST[0][..., None], TEST[1])
    monkeypatch.setattr(fashion_mnist, "SHA256", store.digest(arrays))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))

    def refuse(url, md5, path):
        raise Unavailable("no route to host")

    monkeypatch.setattr(fashion_mnist, "from_url", refuse)
    return tmp_path


def assert_is_toy(published):
    np.testing.assert_array_equal(published.train_images, TRAIN[0][..., None])
    np.testing.assert_array_equal(published.test_labels, TEST[1])
    assert published.train_images.dtype == np.uint8 and published.test_labels.dtype == np.int32


def test_local_folder_wins(toy):
    write_set(toy / "mine")
    (toy / "debian").mkdir()
    assert_is_toy(fashion_mnist.load_fashion_mnist(toy / "mine"))
    data = load("fashion-mnist", toy / "mine", validation_size=4)
    assert data.train_images.shape == (16, 28, 28, 1) and data.num_classes == 10


def test_debian_package_needs_neither_cache_nor_network(toy):
    write_set(toy / "debian")
    assert_is_toy(fashion_mnist.load_fashion_mnist())
    assert not (toy / "cache").exists()


def test_damaged_debian_package_is_passed_over(toy, monkeypatch, capsys):
    write_set(toy / "debian")
    (toy / "debian" / "t10k-labels-idx1-ubyte.gz").unlink()
    write_set(toy / "mirror")

    def serve(url, md5, path):
        assert url.startswith("http") and url.endswith(path.name) and md5 == fashion_mnist.FILES[path.name]
        path.write_bytes((toy / "mirror" / path.name).read_bytes())

    monkeypatch.setattr(fashion_mnist, "from_url", serve)
    for _ in range(2):
        assert_is_toy(fashion_mnist.load_fashion_mnist())
        assert "Passing over Debian's dataset-fashion-mnist" in capsys.readouterr().err
    assert [path.name for path in (toy / "cache").iterdir()] == ["fashion-mnist.npz"]


def test_when_every_way_fails_the_error_names_every_way(toy):
    with pytest.raises(InvalidInput) as caught:
        load("fashion-mnist")
    for words in ("no route to host", fashion_mnist.MIRROR, "dataset-fashion-mnist", "--data-dir"):
        assert words in str(caught.value)


def test_missing_local_files_are_named(toy):
    write_set(toy / "mine")
    (toy / "mine" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InvalidInput, match=r"missing train-images-idx3-ubyte.gz;"):
        load("fashion-mnist", toy / "mine")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        idx(TEST[1])[:-9],
        gzip.compress(b"", mtime=0),
        gzip.compress(b"\0\0\x08\x03\0\0", mtime=0),
        gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\0", mtime=0),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x05\1\2\3", mtime=0),
    ],
)
def test_damaged_idx(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(store.CorruptData, match=r"x.gz"):
        fashion_mnist.read_idx(tmp_path / "x.gz")


def test_altered_local_file(toy):
    write_set(toy / "mine")
    (toy / "mine" / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(1 - TEST[1]))
    with pytest.raises(store.CorruptData, match="other data than published"):
        load("fashion-mnist", toy / "mine")
