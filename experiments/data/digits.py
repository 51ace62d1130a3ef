"""Load the 8x8 digits that ship with scikit-learn (UCI, Optical Recognition of Handwritten Digits)."""

from pathlib import Path

import numpy as np
from sklearn import datasets

from experiments.data.dataset import PublishedSet, stratified_split
from experiments.data.store import as_arrays
from qt_jax.errors import InvalidInput

TEST_SIZE = 360
TEST_SEED = 0


def load_digits(data_dir: Path | None = None) -> PublishedSet:
    """Load 1437 + 360 grey images (8, 8, 1) of the digits 0 to 9, their 17 levels scaled to 0..255.

    scikit-learn does not publish a test split, so a fixed, stratified fifth is held out.

    Raises:
        InvalidInput: A `data_dir` is given, although this set reads no file.
    """
    if data_dir is not None:
        raise InvalidInput(
            "digits ships inside scikit-learn and reads no file: leave data_dir (--data-dir) out"
        )
    bundle = datasets.load_digits()
    images = np.rint(bundle.images * (255 / 16))[..., None]
    train, test = stratified_split(bundle.target, TEST_SIZE, TEST_SEED)
    arrays = as_arrays(images[train], bundle.target[train], images[test], bundle.target[test])
    return PublishedSet(
        **arrays, mean=(0.3054,), std=(0.3760,), class_names=tuple(str(digit) for digit in range(10))
    )
