"""Define a data set, carve its validation split from the training images, and check it before training."""

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split

from qt_jax.errors import InvalidInput

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class PublishedSet:
    """Hold a set as its authors published it: training and test images, without a validation split.

    Images are uint8 (n, height, width, channels). Labels are int32 (n,), or for segmentation one class per
    pixel, uint8 (n, height, width). `mean` and `std` have one number per channel, for pixels scaled to
    [0, 1], over the published training images.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold the training, validation and test images of one set in host memory.

    Images are uint8 (n, height, width, channels). Labels are int32 (n,), or for segmentation one class per
    pixel, uint8 (n, height, width). `mean` and `std` have one number per channel, for pixels scaled to
    [0, 1], as `augment.normalize` takes them. They come from the published training images, so they do not
    depend on the validation split.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def stratified_split(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (kept, held_out) of a random split that keeps the share of every class.

    Args:
        labels: Integer class of each example, (n,).
        size: Number of examples to hold out. Either 0, or at least one per class with at least one per class
            left.
        seed: Seed of the split, which depends only on `labels`, `size` and `seed`.

    Returns:
        Two ascending, disjoint int64 index arrays of lengths n - size and size that together cover 0..n-1.
        Where the share of a class is not a whole number, it is rounded up or down.

    Raises:
        InvalidInput: `size` leaves one side without an example for each class.

    >>> kept, held_out = stratified_split(np.array([0, 1, 0, 1, 0, 1]), size=2, seed=0)
    >>> len(kept), len(held_out)
    (4, 2)
    """
    indices = np.arange(len(labels))
    if size == 0:
        return indices, indices[:0]
    classes = len(np.unique(labels))
    if not classes <= size <= len(labels) - classes:
        raise InvalidInput(
            f"cannot hold out {size} of {len(labels)} examples of {classes} classes: "
            f"choose 0, or a size from {classes} to {len(labels) - classes}"
        )
    kept, held_out = train_test_split(indices, test_size=size, stratify=labels, random_state=seed)
    return np.sort(kept), np.sort(held_out)


def random_split(examples: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (kept, held_out) of a random split, as `stratified_split` does.

    Raises:
        InvalidInput: `size` leaves nothing to keep.

    >>> kept, held_out = random_split(6, size=2, seed=0)
    >>> len(kept), len(held_out)
    (4, 2)
    """
    if not 0 <= size < examples:
        raise InvalidInput(f"cannot hold out {size} of {examples} examples: choose 0 to {examples - 1}")
    order = np.random.default_rng(seed).permutation(examples)
    return np.sort(order[size:]), np.sort(order[:size])


def carve_validation(published: PublishedSet, name: str, size: int, seed: int) -> Dataset:
    """Move `size` training examples into a validation split. The test split stays as it is.

    The examples are stratified by class. Where every pixel has a class, they are drawn at random.

    Raises:
        InvalidInput: `size` is not possible; see `stratified_split`.

    >>> images, labels = np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1, 0, 1], np.int32)
    >>> toy = PublishedSet(images, labels, images, labels, (0.5,), (0.5,), ("cat", "dog"))
    >>> carve_validation(toy, "toy", size=2, seed=0).validation_images.shape
    (2, 2, 2, 1)
    """
    labels = published.train_labels
    per_image = labels.ndim == 1
    kept, held_out = (
        stratified_split(labels, size, seed) if per_image else random_split(len(labels), size, seed)
    )
    return Dataset(
        name=name,
        train_images=published.train_images[kept],
        train_labels=published.train_labels[kept],
        validation_images=published.train_images[held_out],
        validation_labels=published.train_labels[held_out],
        test_images=published.test_images,
        test_labels=published.test_labels,
        mean=published.mean,
        std=published.std,
        class_names=published.class_names,
    )


def checked(data: Dataset, may_be_empty: tuple[str, ...] = ("validation",)) -> Dataset:
    """Return the same set if nothing is wrong with it, so that a mistake shows before an hour of training.

    Args:
        data: The set.
        may_be_empty: Splits that may hold no image.

    Raises:
        InvalidInput: Images are not uint8, not (n, height, width, channels), or have another shape in another
            split. Labels have another number or type, or are out of range; the message names the first
            place. A split has no images. A mean or a deviation is not usable.

    >>> from experiments.data import load
    >>> checked(load("digits")).num_classes
    10
    """
    shape = data.train_images.shape[1:]
    for split in SPLITS:
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        where = f"{data.name}, {split} split"
        if images.dtype != np.uint8 or images.ndim != 4:
            raise InvalidInput(
                f"{where}: images must be uint8 (n, height, width, channels), got "
                f"{images.dtype}{list(images.shape)}; convert them, pixels from 0 to 255"
            )
        if images.shape[1:] != shape:
            raise InvalidInput(
                f"{where}: images are {images.shape[1:]}, those of training {shape}; bring them to one size"
            )
        if len(images) == 0 and split not in may_be_empty:
            raise InvalidInput(f"{where}: it holds no image; check the files that it was read from")
        _check_labels(where, images, labels, data.num_classes)
    if not (np.isfinite([*data.mean, *data.std]).all() and min(data.std) > 0):
        raise InvalidInput(f"{data.name}: mean {data.mean} and std {data.std} must be finite, std above zero")
    return data


def _check_labels(where: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in (
        images.shape[:1],
        images.shape[:3],
    ):
        raise InvalidInput(
            f"{where}: labels must be whole numbers, one per image {images.shape[:1]} or one per pixel "
            f"{images.shape[:3]}, got {labels.dtype}{list(labels.shape)}"
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        place = tuple(int(i) for i in np.unravel_index(np.argmax(wrong), wrong.shape))
        raise InvalidInput(
            f"{where}: label {labels[place]} at {list(place)} is not one of the {classes} classes "
            f"({int(wrong.sum())} labels are out of range); check which label belongs to which class"
        )
