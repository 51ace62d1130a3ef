"""Run segmentation from end to end on a toy set and a very small U-Net, and move masks with their images."""

from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from experiments import data, masks, models, pipeline, runs, segmentation
from experiments.configs.training import SEGMENTATION_PRESETS, Config, lambda_schedule, parse
from experiments.data import SEGMENTATION, load
from experiments.data.dataset import PublishedSet
from experiments.models.segmenters import UNet
from experiments.training.state import create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_predict, make_train_step
from qt_jax import metrics, records
from qt_jax.errors import InvalidInput

SCHEMES = ("fp32", "int4w-pt-minmax")
FLAGS = (
    *("--preset", "smoke", "--model", "tiny", "--batch-size", "16", "--reverse-pruning-every", "2"),
    *("--train-limit", "48", "--calibration-size", "8", "--test-limit", "12"),
)
METHODS = (runs.QUANT_TRIM, runs.FLOAT)
LEVELS = 3


def toy_set(data_dir: Path | None) -> PublishedSet:
    """Return noise in three levels of brightness, which are the classes."""
    labels = np.random.default_rng(0).integers(0, LEVELS, (100, 16, 16), dtype=np.uint8)
    images = np.repeat(100 * labels[..., None], 3, axis=-1)
    return PublishedSet(
        images[:80], labels[:80], images[80:], labels[80:], (0.4,) * 3, (0.3,) * 3, ("a", "b", "c")
    )


@pytest.fixture(scope="module", autouse=True)
def toys():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SETS, "composed", toy_set)
        patch.setitem(models.SEGMENTERS, "tiny", partial(UNet, width=4, depth=1))
        patch.setattr(pipeline, "RUN_SCHEMES", SCHEMES)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toys) -> Path:
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    assert segmentation.main([*FLAGS, "--out", str(folder)]) == 0
    return folder


def test_products(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"model.onnx", "twin.onnx", "model.ranges.json", "summary.md", "summary.png", "masks.png"} < names
    assert not [name for name in names if name.startswith(".") or "partial" in name]
    [output] = onnx.load(finished / "model.onnx").graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] == [LEVELS, 16, 16]


def test_records_hold_miou_and_pixel_accuracy(finished):
    rows = records.read(finished / "records.jsonl")
    assert [(row["method"], row["scheme"]) for row in rows] == [(m, s) for m in METHODS for s in SCHEMES]
    for row in rows:
        assert (row["status"], row["n"], row["task"], row["model"]) == ("ok", 12, "composed", "tiny")
        assert 0.0 < row["miou"] <= row["top1"] <= 1.0
        assert "predictions" not in row


def test_validation_is_logged_in_both_ways(finished):
    rows = records.read(finished / "metrics.jsonl")
    assert [row["compilations"] for row in rows] == [1] * 4
    for row in rows:
        for name in ("fp32", "fake_quant") if row["method"] == runs.QUANT_TRIM else ("fp32",):
            assert 0.0 < row[f"validation_miou_{name}"] <= row[f"validation_{name}"] <= 1.0
        assert 0.0 < row["accuracy"] <= 1.0
    assert rows[1]["accuracy"] > 0.4  # the classes are levels of brightness: two epochs suffice to begin


def test_summary_has_both_tables(finished):
    text = (finished / "summary.md").read_text()
    assert text.startswith("# composed, tiny, --sched quartic, seed 0")
    first, second = text.split("## Pixel accuracy")
    assert "Quant-Trim mIoU" in first and "Quant-Trim pixel accuracy" in second
    assert "validation mIoU FP32" in second


def test_masks_are_those_of_the_records(finished):
    with np.load(finished / "masks.npz") as file:
        decided = dict(file)
    assert len(str(decided.pop("networks"))) == 64
    assert list(decided) == [f"{method}/{scheme}" for method in METHODS for scheme in SCHEMES]
    assert all(masks.shape == (6, 16, 16) and masks.dtype == np.uint8 for masks in decided.values())
    dataset, config = load("composed"), parse([*FLAGS, "--out", str(finished)], SEGMENTATION_PRESETS)
    model = models.create("tiny", LEVELS)
    predict = make_predict(config, model, dataset.mean, dataset.std, quantized=False)
    network = pipeline.load_network(finished / "twin.json")
    expected = predict(network.variables, dataset.test_images[:6]).argmax(-1)
    assert metrics.pixel_accuracy(decided["float/fp32"], expected) > 0.999


def test_masks_of_other_networks_are_made_anew(finished, tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(masks.qt, "evaluate", lambda network, *_, **__: evaluated.append(network) or [])
    path, networks = tmp_path / "masks.npz", {"float": finished / "twin.onnx"}
    for now in (networks, networks, {"quant-trim": finished / "model.onnx", **networks}):
        masks.decided_masks(now, None, (None, None), path)
    assert [network.name for network in evaluated] == ["twin.onnx", "model.onnx", "twin.onnx"]


def test_relaunch_does_nothing_again(finished, monkeypatch):
    monkeypatch.setattr(pipeline, "deploy", None)
    monkeypatch.setattr(pipeline.qt, "evaluate", None)
    before = (finished / "masks.png").read_bytes()
    (finished / "masks.png").unlink()
    assert segmentation.main([*FLAGS, "--out", str(finished)]) == 0
    assert (finished / "masks.png").read_bytes() == before


class Reader(nn.Module):
    """Give logits that are right wherever the image still agrees with its mask."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, ())
        level = jnp.round(x[..., 0] * 255 / 100).astype(jnp.int32)
        return scale * jax.nn.one_hot(level, LEVELS)


def one_step(labels):
    config = Config(dataset="composed", model="unet", sched="none", reverse_pruning=None, batch_size=16)
    images = toy_set(None).train_images
    tx = optimizer(config, 3)
    state = create_state(config, Reader(), tx, (16, 16, 3))
    step = make_train_step(config, Reader(), tx, lambda_schedule(config, 3), (0.0,) * 3, (1.0,) * 3, LEVELS)
    split = Split(jnp.asarray(images), jnp.asarray(labels))
    return step(state, Totals.zero(), split, epoch_order(config, len(images), 0), jnp.int32(1))[1]


def test_mask_moves_with_its_image_and_totals_count_images():
    totals = one_step(toy_set(None).train_labels)
    assert (float(totals.correct), float(totals.images)) == (16.0, 16.0)
    smoothed = np.full(LEVELS, 0.1 / LEVELS) + 0.9 * np.eye(LEVELS)[0]
    cross_entropy = -smoothed @ (np.eye(LEVELS)[0] - np.log(np.exp(np.eye(LEVELS)[0]).sum()))
    assert float(totals.loss) == pytest.approx(16 * cross_entropy, rel=1e-5)


def test_wrong_pixels_count_by_their_share():
    labels = toy_set(None).train_labels
    assert float(one_step((labels + 1) % LEVELS).correct) == 0.0
    share = float(one_step(0 * labels).correct) / 16
    assert share == pytest.approx(1 / LEVELS, abs=0.05)


@pytest.mark.parametrize("shape", [(3, 16, 16, 3), (2, 96, 64, 3)])
def test_prediction_of_large_images_is_padded_and_cut(shape):
    images = np.random.default_rng(0).integers(0, 3, shape, dtype=np.uint8) * 100
    predict = make_predict(Config(sched="none"), Reader(), (0.0,) * 3, (1.0,) * 3, quantized=False)
    variables = {"params": {"scale": jnp.float32(1)}}
    np.testing.assert_array_equal(predict(variables, images).argmax(-1), images[..., 0] // 100)


@pytest.mark.parametrize("preset", SEGMENTATION_PRESETS)
def test_presets_are_of_segmentation(preset):
    config = parse(["--preset", preset], SEGMENTATION_PRESETS)
    assert config == SEGMENTATION_PRESETS[preset] and config.preset == preset
    assert config.dataset in SEGMENTATION and config.model in models.SEGMENTERS
    assert config.directory.name.startswith("composed-unet")


@pytest.mark.parametrize(("dataset", "model"), [("composed", "fast"), ("cifar10", "unet")])
def test_network_must_suit_the_data_set(dataset, model):
    with pytest.raises(InvalidInput, match=f"--model '{model}' does not suit --dataset {dataset}; choose"):
        Config(dataset=dataset, model=model)
