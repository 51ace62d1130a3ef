"""Check the composed set from toy sources against a slow composition pixel by pixel."""

import numpy as np
import pytest

from experiments.data import composed, load, store
from experiments.data.dataset import PublishedSet
from qt_jax.errors import InvalidInput

LEVELS = np.arange(60 * 28 * 28) * 7919 % 509
GARMENTS = np.where(LEVELS < 256, LEVELS, 0).astype(np.uint8).reshape(60, 28, 28, 1)
KINDS = np.arange(60) % 10
PHOTOGRAPHS = (np.arange(20 * 32 * 32 * 3) * 104729 % 251).astype(np.uint8).reshape(20, 32, 32, 3)


def by_pixel(size, seed):
    """Compose in plain loops: the same draws, then one pixel at a time in exact fractions."""
    draw = composed._Draw(seed)
    chosen = draw.sample(20, size)
    counts = draw.integers(1, 3, (size,))
    layers = draw.sample(60, 3 * size).reshape(size, 3)
    sides = draw.integers(24, 44, (size, 3))
    corners = draw.integers(0, 64 - sides[..., None], (size, 3, 2))
    tints = draw.integers(64, 255, (size, 3, 3))
    images, labels = np.zeros((size, 64, 64, 3), np.uint8), np.zeros((size, 64, 64), np.uint8)
    for i, y, x in np.ndindex(size, 64, 64):
        images[i, y, x] = PHOTOGRAPHS[chosen[i], y // 2, x // 2]
        for layer in range(counts[i]):
            side, (top, left) = sides[i, layer], corners[i, layer]
            if top <= y < top + side and left <= x < left + side:
                row, column = (int((place + 0.5) * 28 / side) for place in (y - top, x - left))
                level = int(GARMENTS[layers[i, layer], row, column, 0])
                if level > 0:
                    images[i, y, x] = [level * int(tint) // 255 for tint in tints[i, layer]]
                    labels[i, y, x] = 1 + KINDS[layers[i, layer]]
    return images, labels


def test_vectorised_equals_pixel_by_pixel(monkeypatch):
    monkeypatch.setattr(composed, "CHUNK", 3)
    images, labels = composed.compose(GARMENTS, KINDS, PHOTOGRAPHS, 8, 5)
    expected_images, expected_labels = by_pixel(8, 5)
    np.testing.assert_array_equal(images, expected_images)
    np.testing.assert_array_equal(labels, expected_labels)
    assert images.dtype == labels.dtype == np.uint8
    kinds = [len(set(np.unique(label)) - {0}) for label in labels]
    assert min(kinds) >= 1 and max(kinds) == 3


def test_it_is_the_same_to_the_byte_and_follows_the_seed():
    """Check that the digest depends on this code and on numpy's promise for PCG64, not on the machine."""
    images, labels = composed.compose(GARMENTS, KINDS, PHOTOGRAPHS, 8, 5)
    assert store.digest({"images": images, "labels": labels}).startswith("6789127589301d77")
    others, _ = composed.compose(GARMENTS, KINDS, PHOTOGRAPHS, 8, 6)
    assert not np.array_equal(images, others)


def test_nothing_is_used_twice():
    """Give every garment and every photograph a different level, and find each in one image at most."""
    garments = np.broadcast_to(np.arange(1, 61, dtype=np.uint8)[:, None, None, None], (60, 28, 28, 1))
    draw = composed._Draw(3)
    assert len(set(draw.sample(20, 20).tolist())) == 20
    flat = np.broadcast_to((200 + np.arange(20, dtype=np.uint8))[:, None, None, None], (20, 32, 32, 3))
    _, labels = composed.compose(garments, np.arange(60), flat, 20, 0)
    found = [set(np.unique(label)) - {0} for label in labels]
    assert sum(map(len, found)) == len(set().union(*found))


def test_draws_are_uniform_and_in_range():
    draws = composed._Draw(0).integers(1, 3, (30000,))
    counts = np.bincount(draws, minlength=4)
    assert counts[0] == 0 and abs(counts[1:] - 10000).max() < 300


def test_too_few_sources():
    with pytest.raises(InvalidInput, match="30 composed images need 30 photographs and 90 garments"):
        composed.compose(GARMENTS, KINDS, PHOTOGRAPHS, 30, 0)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Put toy sources in place of the real ones, and count how often they are read."""
    reads = []

    def source(images):
        def read(data_dir):
            reads.append(data_dir)
            return PublishedSet(images, KINDS[: len(images)], images, KINDS[: len(images)], (), (), ())

        return read

    monkeypatch.setattr(composed, "load_fashion_mnist", source(GARMENTS))
    monkeypatch.setattr(composed, "load_cifar10", source(PHOTOGRAPHS))
    monkeypatch.setattr(composed, "TRAIN_SIZE", 12)
    monkeypatch.setattr(composed, "TEST_SIZE", 6)
    monkeypatch.setattr(composed, "SHA256", store.digest(composed._from_sources(None)))
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path / "cache"))
    reads.clear()
    return reads


def test_it_is_kept_in_the_cache(toy, tmp_path):
    data = load("composed", validation_size=2)
    assert data.train_images.shape == (10, 64, 64, 3) and data.train_labels.shape == (10, 64, 64)
    assert data.validation_labels.shape == (2, 64, 64) and data.test_labels.shape == (6, 64, 64)
    assert data.train_labels.dtype == np.uint8
    assert data.num_classes == 11 and data.class_names[:2] == ("background", "t-shirt/top")
    again = load("composed", validation_size=2)
    np.testing.assert_array_equal(again.train_labels, data.train_labels)
    assert toy == [None, None]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["composed.npz"]


def test_local_sources_win(toy, tmp_path):
    assert load("composed", tmp_path, validation_size=2).test_images.shape == (6, 64, 64, 3)
    assert toy == [tmp_path, tmp_path]
    assert not (tmp_path / "cache").exists()
