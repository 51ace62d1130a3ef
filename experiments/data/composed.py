"""Compose a segmentation set: garments of Fashion-MNIST on photographs of CIFAR-10, placed by a seed.

It is not a natural set, so it is called "composed" wherever its numbers are shown. It serves where the
archive of a natural set cannot be reached.
"""

from pathlib import Path

import numpy as np

from experiments.data.cifar import load_cifar10
from experiments.data.dataset import PublishedSet
from experiments.data.fashion_mnist import CLASS_NAMES as GARMENTS
from experiments.data.fashion_mnist import load_fashion_mnist
from experiments.data.store import Arrays, as_arrays, cached, check_digest
from qt_jax.errors import InvalidInput

TRAIN_SIZE, TEST_SIZE = 9000, 2000
TRAIN_SEED, TEST_SEED = 0, 1
SIDE = 64
MOST_GARMENTS = 3
SMALLEST, LARGEST = 24, 44
"""Sides in pixels to which a garment of 28 is scaled."""
DARKEST = 64
"""Lowest level, of 255, to which a tint takes a white pixel."""
CHUNK = 1000
"""Images that are composed at a time."""
SHA256 = "9cdf0a822ea5ce605a0b53f580a921dc48f0b8c08f0f0f55b2d94e04f4916c6f"
"""Digest of the arrays (`store.digest`). They follow from the two sources, which are pinned too."""


def load_composed(data_dir: Path | None = None) -> PublishedSet:
    """Load 9,000 + 2,000 images (64, 64, 3) with a class per pixel: 0 for background, then ten garments.

    Training images are made of the training images of both sources, test images of their test images.
    Within each split no photograph and no garment is used twice, so a validation split shares none with the
    rest. Labels are uint8 (n, 64, 64).

    Args:
        data_dir: Folder with Fashion-MNIST and CIFAR-10, as their own loaders take it. By default both come
            from where their loaders find them, and the composed arrays are kept in the cache.

    Raises:
        InvalidInput: One of the sources is missing or damaged.
    """
    if data_dir is None:
        arrays = cached("composed", SHA256, lambda scratch: _from_sources(None))
    else:
        arrays = check_digest(_from_sources(data_dir), SHA256, f"the set composed from {data_dir}")
    return PublishedSet(
        **arrays,
        mean=(0.4601, 0.4553, 0.4281),
        std=(0.2520, 0.2488, 0.2600),
        class_names=("background", *GARMENTS),
    )


def _from_sources(data_dir: Path | None) -> Arrays:
    garments, photographs = load_fashion_mnist(data_dir), load_cifar10(data_dir)
    train = compose(
        garments.train_images, garments.train_labels, photographs.train_images, TRAIN_SIZE, TRAIN_SEED
    )
    test = compose(garments.test_images, garments.test_labels, photographs.test_images, TEST_SIZE, TEST_SEED)
    return as_arrays(*train, *test)


def compose(
    garments: np.ndarray, kinds: np.ndarray, photographs: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Enlarge `size` photographs to 64 x 64 and put one to three garments on each.

    A garment is scaled (nearest pixel) to a side from `SMALLEST` to `LARGEST` and tinted. It covers the
    pixels that are not black in it, hides the garments placed before, and lies wholly inside the image. All
    of this is integer arithmetic on the raw stream of PCG64, which numpy promises never to change, so the
    result is the same everywhere.

    Args:
        garments: uint8 (g, 28, 28, 1), at least three for each image.
        kinds: Integer class of each garment, (g,), which becomes label 1 + kind.
        photographs: uint8 (p, 32, 32, 3), at least one for each image.
        size: Number of images.
        seed: Seed of the draws. The result depends only on the arguments.

    Returns:
        Images uint8 (size, 64, 64, 3) and labels uint8 (size, 64, 64).

    Raises:
        InvalidInput: There are too few garments or photographs.

    >>> white, black = np.full((3, 28, 28, 1), 255, np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    >>> images, labels = compose(white, np.zeros(3, int), black, size=1, seed=0)
    >>> images.shape, np.unique(labels).tolist()
    ((1, 64, 64, 3), [0, 1])
    """
    if len(garments) < MOST_GARMENTS * size or len(photographs) < size:
        raise InvalidInput(
            f"{size} composed images need {size} photographs and {MOST_GARMENTS * size} garments, got "
            f"{len(photographs)} and {len(garments)}"
        )
    draw = _Draw(seed)
    chosen = draw.sample(len(photographs), size)
    counts = draw.integers(1, MOST_GARMENTS, (size,))
    layers = draw.sample(len(garments), MOST_GARMENTS * size).reshape(size, MOST_GARMENTS)
    sides = draw.integers(SMALLEST, LARGEST, layers.shape)
    corners = draw.integers(0, SIDE - sides[..., None], (*layers.shape, 2))
    tints = draw.integers(DARKEST, 255, (*layers.shape, 3))
    images = np.empty((size, SIDE, SIDE, 3), np.uint8)
    labels = np.zeros((size, SIDE, SIDE), np.uint8)
    for start in range(0, size, CHUNK):
        part = slice(start, start + CHUNK)
        grid = _nearest(np.arange(SIDE), SIDE, photographs.shape[1])
        images[part] = photographs[chosen[part]][:, grid][:, :, grid]
        for layer in range(MOST_GARMENTS):
            mine = (place[part, layer] for place in (layers, sides, corners, tints))
            _paste(images[part], labels[part], garments, kinds, counts[part] > layer, *mine)
    return images, labels


def _paste(images, labels, garments, kinds, present, chosen, sides, corners, tints) -> None:
    """Place one garment on each image that has `present` set, in place."""
    offsets = np.arange(SIDE) - corners[..., None]  # (n, 2, SIDE): rows and columns from the garment's corner
    inside = (offsets >= 0) & (offsets < sides[:, None, None])
    source = np.where(inside, _nearest(offsets, sides[:, None, None], garments.shape[1]), 0)
    grey = garments[chosen[:, None, None], source[:, 0, :, None], source[:, 1, None, :], 0]
    mask = (grey > 0) & inside[:, 0, :, None] & inside[:, 1, None, :] & present[:, None, None]
    image, row, column = np.nonzero(mask)
    shade = grey[mask].astype(np.uint32)[:, None]
    images[image, row, column] = shade * tints[image].astype(np.uint32) // 255
    labels[image, row, column] = 1 + kinds[chosen[image]]


def _nearest(index: np.ndarray, side: np.ndarray | int, source: int) -> np.ndarray:
    """Return the source pixel whose area holds the centre of pixel `index` of an image scaled to `side`."""
    return (2 * index + 1) * source // (2 * side)


class _Draw:
    """Draw integers from PCG64's raw stream. The bias of the remainder is below 1e-14 for these ranges."""

    def __init__(self, seed: int):
        self.raw = np.random.PCG64(seed).random_raw

    def integers(self, low: int, high: np.ndarray | int, shape: tuple[int, ...]) -> np.ndarray:
        """Draw int64 integers in [low, high], both included."""
        span = np.asarray(high - low + 1, np.uint64)
        return low + (self.raw(shape) % span).astype(np.int64)

    def sample(self, population: int, size: int) -> np.ndarray:
        """Draw `size` different indices below `population`."""
        return np.argsort(self.raw(population), kind="stable")[:size]
