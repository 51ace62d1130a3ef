"""Whether a data set is what training takes it for; said before an hour has gone into it."""

import numpy as np

from experiments.data.dataset import Dataset
from qt_jax.errors import InvalidInput

SPLITS = ("train", "validation", "test")


def checked(data: Dataset, may_be_empty: tuple[str, ...] = ("validation",)) -> Dataset:
    """The same set, if nothing is wrong with it.

    Raises:
        InvalidInput: images that are not uint8 or not (n, height, width, channels), or of another shape in
            another split; labels of another number or type, or out of range, with the first place; a split
            without images; a mean or deviation that is not usable.

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
            f"{where}: labels must be whole numbers, one an image {images.shape[:1]} or one a pixel "
            f"{images.shape[:3]}, got {labels.dtype}{list(labels.shape)}"
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        place = tuple(int(i) for i in np.unravel_index(np.argmax(wrong), wrong.shape))
        raise InvalidInput(
            f"{where}: label {labels[place]} at {list(place)} is not one of the {classes} classes "
            f"({int(wrong.sum())} labels are out of range); check which label belongs to which class"
        )
