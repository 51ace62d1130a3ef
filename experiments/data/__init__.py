"""Load image sets by name: `load("cifar10")` returns a `Dataset` with its three splits."""

from functools import partial
from pathlib import Path

from experiments.data.cifar import load_cifar10, load_cifar100
from experiments.data.composed import load_composed
from experiments.data.dataset import Dataset, carve_validation, checked
from experiments.data.digits import load_digits
from experiments.data.fashion_mnist import load_fashion_mnist
from experiments.data.oxford_pet import load_oxford_pet
from qt_jax.errors import InvalidInput

__all__ = ["SEGMENTATION", "SETS", "Dataset", "load"]

SETS = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": load_digits,
    "fashion-mnist": load_fashion_mnist,
    "composed": load_composed,
    "oxford-pet": load_oxford_pet,
    "oxford-pet-128": partial(load_oxford_pet, side=128),
}
SEGMENTATION = {"composed", "oxford-pet", "oxford-pet-128"}
"""Sets that have a class for every pixel."""


def load(
    name: str, data_dir: Path | None = None, *, validation_size: int | None = None, seed: int = 0
) -> Dataset:
    """Load the set called `name`, from `data_dir` if given, else from the cache, else from its publisher.

    The cache is $QT_JAX_DATA, else the user's cache directory. Every source is checked against pinned
    checksums. The validation split is carved from the training images, stratified by class where an
    image has one class. It depends only on its size and `seed`. The test split never changes.

    Args:
        name: One of `SETS`.
        data_dir: Local copy, which is preferred to any download. The function of each set documents what it
            may hold.
        validation_size: Number of validation images, 0 for none. By default a tenth of the training images.
        seed: Seed of the validation split.

    Raises:
        InvalidInput: The name is unknown, files are missing or damaged, the set cannot be fetched, the
            validation size leaves a split without an example for each class, or `checked` refuses the data.

    >>> data = load("digits")
    >>> data.train_images.shape, data.validation_images.shape, data.test_images.shape
    ((1293, 8, 8, 1), (144, 8, 8, 1), (360, 8, 8, 1))
    """
    if name not in SETS:
        raise InvalidInput(f"unknown data set {name!r}; choose one of {', '.join(SETS)}")
    published = SETS[name](data_dir)
    size = round(len(published.train_labels) / 10) if validation_size is None else validation_size
    return checked(carve_validation(published, name, size, seed))
