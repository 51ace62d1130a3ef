"""Load Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747): grey images of ten kinds of garment."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from experiments.data.dataset import PublishedSet
from experiments.data.store import (
    Arrays,
    CorruptData,
    as_arrays,
    cached,
    check_digest,
    first_available,
    from_url,
    notice,
)
from qt_jax.errors import InvalidInput

MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""File -> MD5, in the order of `store.NAMES`."""
SHA256 = "8e43a200d23e644035e524b0bd6ad65e3771f57eab82760740d68bd43da5e737"
"""Digest of the arrays (`store.digest`). Debian strips gzip headers: its files have other MD5s."""
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_fashion_mnist(data_dir: Path | None = None) -> PublishedSet:
    """Load Fashion-MNIST: 60,000 + 10,000 images (28, 28, 1), 6000 + 1000 per class.

    Without `data_dir` the sources are the files of Debian's package dataset-fashion-mnist where it is
    installed, then the cache, then the usual mirror. The arrays of every source are checked against one
    SHA-256.

    Args:
        data_dir: Folder with the four gzipped IDX files.

    Raises:
        InvalidInput: Files in `data_dir` are missing or damaged, or the set cannot be fetched.
    """
    return PublishedSet(**_arrays(data_dir), mean=(0.2860,), std=(0.3530,), class_names=CLASS_NAMES)


def _arrays(data_dir: Path | None) -> Arrays:
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise InvalidInput(
                f"no Fashion-MNIST in data_dir {folder}: looked for {', '.join(FILES)}; missing "
                f"{', '.join(missing)}; put them there or point data_dir (--data-dir) elsewhere"
            )
        return _read(folder)
    if DEBIAN_FOLDER.is_dir():
        try:
            return _read(DEBIAN_FOLDER)
        except CorruptData as error:
            notice(f"{error}. Passing over Debian's {DEBIAN_PACKAGE}.")
    return cached("fashion-mnist", SHA256, _fetch)


def _fetch(scratch: Path) -> Arrays:
    def mirror() -> Arrays:
        for name, md5 in FILES.items():
            from_url(MIRROR + name, md5, scratch / name)
        return _read(scratch)

    advice = (
        f"Or install Debian's package {DEBIAN_PACKAGE}, or point data_dir (--data-dir) at a folder that "
        f"holds {', '.join(FILES)}."
    )
    return first_available("Fashion-MNIST", {f"mirror {MIRROR}": mirror}, advice)


def _read(folder: Path) -> Arrays:
    train_images, train_labels, test_images, test_labels = (read_idx(folder / name) for name in FILES)
    arrays = as_arrays(train_images[..., None], train_labels, test_images[..., None], test_labels)
    return check_digest(arrays, SHA256, folder)


def read_idx(path: Path) -> np.ndarray:
    """Read the uint8 array of a gzipped IDX file: magic 00 00 08 rank, big-endian uint32 sizes, then bytes.

    Raises:
        CorruptData: The file is missing, is not gzipped IDX of bytes, or its length and header disagree.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptData(f"{path} cannot be read ({error}); replace it by a fresh copy") from error
    rank = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = np.frombuffer(data[4 : 4 + 4 * rank], ">u4").tolist() if len(data) >= 4 + 4 * rank else []
    if not shape or len(data) - 4 - 4 * rank != math.prod(shape):
        raise CorruptData(f"{path} is not a complete IDX file of bytes; replace it by a fresh copy")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
