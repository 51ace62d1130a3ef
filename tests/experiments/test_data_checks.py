"""Data that training would choke on, or worse would not, is refused by name and place."""

import dataclasses

import numpy as np
import pytest

from experiments.data import load
from experiments.data.dataset import checked
from qt_jax.errors import InvalidInput

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
