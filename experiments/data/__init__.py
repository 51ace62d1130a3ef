"""Image sets by name: `load("cifar10")` returns a `Dataset` with training, validation and test splits."""

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
"""Sets with a class for every pixel."""


def load(
    name: str, data_dir: Path | None = None, *, validation_size: int | None = None, seed: int = 0
) -> Dataset:
    """The set called `name`, from `data_dir` if given, else from the cache, else fetched.

    The cache is $QT_JAX_DATA, else the user's cache directory. Every source is checked against pinned
    checksums. The validation split is carved from the training images, stratified by class where an
    image has one; it depends on its size and `seed` alone. The test split never changes.

    Args:
        name: one of `SETS`.
        data_dir: a local copy, which wins over any download; what it may hold is said at the set's function.
        validation_size: number of validation images, 0 for none; by default a tenth of the training images.
        seed: of the validation split.

    Raises:
        InvalidInput: unknown name, missing or damaged files, no way to fetch the set, a validation size
            that leaves a split without an example for each class, or data that `checked` refuses.

    >>> data = load("digits")
    >>> data.train_images.shape, data.validation_images.shape, data.test_images.shape
    ((1293, 8, 8, 1), (144, 8, 8, 1), (360, 8, 8, 1))
    """
    if name not in SETS:
        raise InvalidInput(f"unknown data set {name!r}; choose one of {', '.join(SETS)}")
    published = SETS[name](data_dir)
    size = round(len(published.train_labels) / 10) if validation_size is None else validation_size
    return checked(carve_validation(published, name, size, seed))
