"""Split, load and check data sets: data that training would choke on is refused by name and place."""

import dataclasses
import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import datasets

from experiments.data import load
from experiments.data.dataset import checked, stratified_split
from qt_jax.errors import InvalidInput

MODULES = (
    "",
    ".augment",
    ".cifar",
    ".dataset",
    ".digits",
    ".fashion_mnist",
    ".store",
)


@given(data=st.data())
def test_split_is_disjoint_complete_and_stratified(data):
    labels = np.repeat(np.arange(3), data.draw(st.lists(st.integers(4, 40), min_size=3, max_size=3)))
    size = data.draw(st.integers(3, len(labels) - 3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    kept, held_out = stratified_split(labels, size, seed)
    assert len(held_out) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))
    assert np.all(np.diff(kept) > 0) and np.all(np.diff(held_out) > 0)
    exact = np.bincount(labels) * size / len(labels)
    assert np.all(np.abs(np.bincount(labels[held_out], minlength=3) - exact) <= 1)
    np.testing.assert_array_equal(stratified_split(labels, size, seed)[1], held_out)


def test_split_is_exact_where_it_can_be_and_moves_with_the_seed():
    labels = np.tile(np.arange(10), 100)
    _, held_out = stratified_split(labels, 100, 0)
    np.testing.assert_array_equal(np.bincount(labels[held_out]), np.full(10, 10))
    assert not np.array_equal(stratified_split(labels, 100, 1)[1], held_out)


def test_split_of_nothing():
    kept, held_out = stratified_split(np.array([0, 1]), 0, 0)
    assert kept.tolist() == [0, 1] and held_out.tolist() == []


@pytest.mark.parametrize("size", [-1, 1, 9, 100])
def test_split_that_starves_a_class(size):
    with pytest.raises(
        InvalidInput, match=f"cannot hold out {size} of 10 examples of 2 classes.* from 2 to 8"
    ):
        stratified_split(np.tile([0, 1], 5), size, 0)


def test_digits_are_all_there_once():
    data = load("digits")
    images = np.concatenate([data.train_images, data.validation_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.validation_labels, data.test_labels])
    published = datasets.load_digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and labels.dtype == np.int32

    def lines(pixels, classes):
        return sorted((*image, label) for image, label in zip(pixels.tolist(), classes.tolist(), strict=True))

    levels = np.rint(images.reshape(-1, 64) / 255 * 16).astype(int)
    assert lines(levels, labels) == lines(published.data.astype(int), published.target)
    assert images.max() == 255 and data.num_classes == 10
    assert np.ptp(np.bincount(data.test_labels)) <= 2


def test_mean_and_std_of_digits_are_those_of_the_training_images():
    data = load("digits", validation_size=0)
    assert data.validation_images.shape == (0, 8, 8, 1)
    scaled = data.train_images.astype(np.float64) / 255
    np.testing.assert_allclose((scaled.mean(), scaled.std()), (*data.mean, *data.std), atol=5e-5)


def test_the_test_split_stays_and_validation_moves_with_the_seed():
    first, second, again = load("digits"), load("digits", validation_size=100, seed=1), load("digits")
    np.testing.assert_array_equal(first.test_images, second.test_images)
    np.testing.assert_array_equal(first.validation_images, again.validation_images)
    assert len(second.validation_images) == 100
    assert not np.array_equal(first.validation_images[:100], second.validation_images)


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(InvalidInput, match="ships inside scikit-learn"):
        load("digits", tmp_path)


def test_unknown_name():
    with pytest.raises(
        InvalidInput, match="unknown data set 'mnist'; choose one of cifar10, cifar100, digits"
    ):
        load("mnist")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"experiments.data{name}")).failed == 0


DIGITS = load("digits")


def with_label(split: str, index: int, value: int) -> dict[str, np.ndarray]:
    labels = getattr(DIGITS, f"{split}_labels").copy()
    labels[index] = value
    return {f"{split}_labels": labels}


MASKS = np.zeros(DIGITS.test_images.shape[:3], np.uint8)
MASKS[3, 2, 1] = 255

WRONG = {
    "float images": ({"train_images": DIGITS.train_images / 255.0}, r"train split: images .*got float64\["),
    "flat images": ({"test_images": DIGITS.test_images.reshape(-1, 64)}, r"test split: .*\[360, 64\]"),
    "other size": ({"test_images": DIGITS.test_images[:, :4]}, r"test split: images are \(4, 8, 1\)"),
    "no images": (
        {"train_images": DIGITS.train_images[:0], "train_labels": DIGITS.train_labels[:0]},
        r"train split: it holds no image",
    ),
    "fewer labels": ({"test_labels": DIGITS.test_labels[:-1]}, r"test split: labels .*got int32\[359\]"),
    "float labels": ({"train_labels": DIGITS.train_labels / 2}, r"train split: labels .*got float64\["),
    "one-hot labels": (
        {"test_labels": np.eye(10, dtype=np.int32)[DIGITS.test_labels]},
        r"got int32\[360, 10\]",
    ),
    "label too large": (with_label("train", 17, 10), r"train split: label 10 at \[17\] is not one of the 10"),
    "label below zero": (
        with_label("validation", 5, -1),
        r"validation split: label -1 at \[5\] .*\(1 labels",
    ),
    "mask out of range": ({"test_labels": MASKS}, r"test split: label 255 at \[3, 2, 1\]"),
    "std of zero": ({"std": (0.0,)}, r"std above zero"),
    "mean that is no number": ({"mean": (float("nan"),)}, r"must be finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_data_is_refused_by_name_and_place(what):
    change, message = WRONG[what]
    with pytest.raises(InvalidInput, match=message):
        checked(dataclasses.replace(DIGITS, **change))


def test_what_is_right_comes_back_and_validation_may_be_empty():
    assert checked(DIGITS) is DIGITS
    none = load("digits", validation_size=0)
    assert len(none.validation_images) == 0


def test_every_set_that_loads_has_been_checked(monkeypatch):
    from experiments import data

    published = data.SETS["digits"](None)
    broken = dataclasses.replace(published, test_labels=published.test_labels + 1)
    monkeypatch.setitem(data.SETS, "digits", lambda _: broken)
    with pytest.raises(InvalidInput, match=r"digits, test split: label 10 at"):
        load("digits")
