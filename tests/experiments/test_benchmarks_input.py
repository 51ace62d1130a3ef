"""Check the benchmark of the input pipeline: what both inputs compute, and what is recorded."""

import numpy as np
import pytest

from experiments import models
from experiments.benchmarks import input as input_benchmark
from experiments.benchmarks.input import DEVICE, HOST, RANDOM
from experiments.configs.training import Config
from experiments.training.step import Split
from qt_jax import records

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
LABELS = np.arange(8, dtype=np.int32)


@pytest.mark.parametrize("make", [input_benchmark.on_device, input_benchmark.on_host])
def test_an_epoch_of_batches_holds_every_image_once(make):
    config = Config(dataset="digits", batch_size=4)
    given = (IMAGES, LABELS) if make is input_benchmark.on_host else (Split(IMAGES, LABELS),)
    variant = make(config, *given)
    state, seen = variant.state, []
    for _ in range(2):
        state = variant.advance(state)
        _, images, labels = state
        assert images.shape == (4, 8, 8, 1) and images.dtype == np.float32
        assert np.max(np.abs(images)) == pytest.approx(2, abs=0.1)
        seen += labels.tolist()
    assert sorted(seen) == list(range(8)) and int(state[0]) == 2


@pytest.mark.parametrize("flip", [False, True])
def test_numpy_crops_and_mirrors(flip):
    """Check that every image is a window of itself padded by reflection, mirrored only on request."""
    random = np.random.default_rng(1)
    found = input_benchmark.crop_flip(random, IMAGES, flip=flip)
    mirrored = 0
    for image, crop in zip(IMAGES, found, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        windows = [padded[i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
        straight = any(np.array_equal(crop, window) for window in windows)
        assert straight or any(np.array_equal(crop[:, ::-1], window) for window in windows)
        mirrored += not straight
    assert (mirrored > 0) == flip


def test_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("QT_JAX_DATA", str(tmp_path))
    assert input_benchmark.available() == ("digits", RANDOM)
    images, labels = input_benchmark.load(RANDOM)
    assert images.shape == (50_000, 32, 32, 3) and labels.shape == (50_000,)
    (tmp_path / "cifar10.npz").touch()
    assert input_benchmark.available() == ("digits", "cifar10")


def test_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(input_benchmark, "available", lambda: ("digits",))
    monkeypatch.setattr(input_benchmark, "NETWORKS", ("tiny",))
    assert input_benchmark.main(["--batch-size", "8", "--repeats", "2", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "records.jsonl")
    assert [row["variant"] for row in rows] == [DEVICE, HOST, "tiny"]
    for row in rows:
        assert (row["benchmark"], row["dataset"], row["n"], row["image_shape"]) == (
            "input",
            "digits",
            1437,
            [8, 8, 1],
        )
        assert row["load_s"] > 0 and row["place_s"] > 0 and row["placed_bytes"] == 1437 * (64 + 4)
        assert row["throughput_ips"] == pytest.approx(8e3 / row["step_ms_p50"])
    step = rows[-1]
    for place, row in zip(("device", "host"), rows[:2], strict=True):
        assert step[f"share_of_{place}"] == pytest.approx(row["step_ms_p50"] / step["step_ms_p50"])
        assert row[f"share_of_{place}"] is None
    assert "1,437 images" in capsys.readouterr().out
    assert (tmp_path / "input.png").stat().st_size > 5_000


def test_wrong_input_is_told(capsys):
    assert input_benchmark.main(["--repeats", "0"]) == 2
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err
    assert input_benchmark.main(["--batch-size", "0"]) == 2
    assert "--batch-size must be at least 1" in " ".join(capsys.readouterr().err.split())


def test_the_networks_are_models():
    assert set(input_benchmark.NETWORKS) <= set(models.MODELS)
