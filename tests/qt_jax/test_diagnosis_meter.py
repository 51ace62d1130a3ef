"""Check noise, gains and batches of the diagnosis against numpy in float64."""

import numpy as np
import onnx.parser
import pytest

import qt_jax as qt
from qt_jax.backends.judging import Criterion
from qt_jax.diagnosis.meter import (
    ENOUGH_DB,
    LEAST_DB,
    Measurement,
    Meter,
    collected,
    is_significant_gain,
    power_sums,
)
from qt_jax.diagnosis.running import BATCH_BYTES, batch_size, outputs_of, tensors

SCALES = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4] x) => (float[n, 4] y, float[n, 2, 2] z) {
        two = Constant<value = float {2.0}>() s = Constant<value = int64[3] {-1, 2, 2}>()
        y = Mul(x, two) z = Reshape(x, s)
    }""")
SAMPLES = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)


def noisy(added):
    """Return the graph with something added to its first output."""
    model = onnx.ModelProto()
    model.CopyFrom(SCALES)
    model.graph.node[2].output[0] = "product"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(added), "noise"))
    model.graph.node.append(onnx.helper.make_node("Add", ["product", "noise"], ["y"]))
    return model


def meter(path, names=("y", "z"), **settings):
    reference = {"y": 2 * SAMPLES, "z": SAMPLES.reshape(-1, 2, 2)}
    wanted = {name: reference[name] for name in names}
    return Meter(SAMPLES, wanted, path / "kept.jsonl", Criterion(None, None, tuple(names)), **settings)


def test_noise_is_that_of_numpy(tmp_path):
    added = np.array([[0.1, 0.0, -0.2, 0.3]])
    found = meter(tmp_path).measure(noisy(added), "noisy")
    clean = 2.0 * SAMPLES.astype(np.float64)
    ratio = 10 * np.log10((clean**2).sum() / (100 * (added**2).sum()))
    by_image = 10 * np.log10((clean**2).sum(axis=1) / (added**2).sum())
    other = clean + added
    cosine = (clean * other).sum() / np.sqrt((clean**2).sum() * (other**2).sum())
    assert found.value is None and not found.counts
    assert found.sqnr_db == pytest.approx(ratio, abs=1e-4) == pytest.approx(found.score, abs=1e-4)
    np.testing.assert_allclose(found.by_image, by_image, atol=1e-3)
    assert found.cosine == pytest.approx(cosine, abs=1e-7)
    assert found.worst_db == pytest.approx(by_image.min(), abs=1e-3)
    kept = meter(tmp_path)  # reads what the first has kept
    again = kept.measure(noisy(added), "noisy")
    np.testing.assert_array_equal(again.by_image, found.by_image)
    assert (again.sqnr_db, again.cosine) == (found.sqnr_db, found.cosine)


def test_equal_outputs_have_no_noise_and_broken_ones_the_least(tmp_path):
    same = meter(tmp_path).measure(SCALES, "float")
    assert same.sqnr_db is None and same.score == np.inf and same.worst_db is None and same.cosine == 1.0
    broken = meter(tmp_path).measure(noisy([[np.nan, 0, 0, 0]]), "broken")
    assert broken.sqnr_db == LEAST_DB and broken.cosine == 0.0


def test_an_output_of_another_size_is_refused():
    with pytest.raises(qt.InvalidInput, match="its size depends on the numbers"):
        power_sums(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), "boxes")


def of(ratios, total):
    return Measurement(None, total, 1.0, np.asarray(ratios, np.float32))


def test_decibels_are_gained_on_the_whole_set_and_on_most_images():
    before = of(np.full(100, 20.0), 20.0)
    assert is_significant_gain(before, of(np.full(100, 21.5), 21.5))
    assert not is_significant_gain(before, of(np.full(100, 20.9), 20.9))  # less than 1 dB
    half = np.where(np.arange(100) < 58, 23.0, 19.0)  # 58 - 42 = 16 < 2 sqrt(100)
    assert not is_significant_gain(before, of(half, 22.0))
    most = np.where(np.arange(100) < 62, 23.0, 19.0)  # 62 - 38 = 24
    assert is_significant_gain(before, of(most, 22.0))
    few = of(np.full(4, 20.0), 20.0), of(np.full(4, 30.0), 30.0)
    assert not is_significant_gain(*few)  # 4 of 4 images are 2 standard deviations, not more
    high = of(np.full(100, ENOUGH_DB), ENOUGH_DB)
    assert high.is_enough and not is_significant_gain(high, of(np.full(100, 90.0), 90.0))
    assert is_significant_gain(before, of(np.full(100, np.inf), None))


def test_a_binary_head_counts_right_images(tmp_path):
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 1] x) => (float[n, 1] y) { y = Sigmoid(x) }""")
    x = np.float32([[-1.0], [2.0], [3.0], [-4.0]])
    task = Criterion("binary", "accuracy", ("y",), threshold=0.5)
    y = 1 / (1 + np.exp(-x))
    judge = Meter(x, {"y": y}, tmp_path / "kept.jsonl", task, np.array([0, 1, 0, 0]))
    found = judge.measure(model, "float")
    assert found.counts and found.by_image.tolist() == [True, True, False, True] and found.value == 0.75


def test_outputs_without_a_batch_axis_are_stacked():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4] x) => (float[4] y) { s = Constant<value = int64[1] {-1}>() y = Reshape(x, s) }""")
    found = collected(model, SAMPLES, ["y"], {"y"})
    np.testing.assert_array_equal(found["y"], SAMPLES)


def test_a_batch_is_as_large_as_memory_allows(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 3, 1024, 1024]) for name in "xy")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    )
    assert batch_size(model, ["y"]) == BATCH_BYTES // (8 * 4 * 3 * 1024**2) == 2
    assert batch_size(SCALES, ["y"]) == 64


def test_tensors_are_the_same_in_memory_and_on_disk(tmp_path):
    np.save(tmp_path / "x.npy", SAMPLES)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for name, found in outputs_of(SCALES, mapped).items():
        np.testing.assert_array_equal(found, outputs_of(SCALES, {"x": SAMPLES})[name])
    parts = [batch["x"] for batch in tensors(SCALES, ["x", "y"], mapped)]
    assert [len(part) for part in parts] == [64, 36]
    np.testing.assert_array_equal(np.concatenate(parts), SAMPLES)


def test_small_parts_are_judged_by_themselves(tmp_path):
    """Add noise of one size to boxes and to the scores beside them."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 3, 5] x) => (float[n, 3, 5] y) <float noise = {0.01}> { y = Add(x, noise) }""")
    x = np.random.default_rng(0).uniform(0.5, 1, (9, 3, 5)).astype(np.float32)
    x[:, :2] *= 300
    judge = Meter(x, {"y": x}, tmp_path / "kept.jsonl", Criterion(None, None, ("y",)))
    found = judge.measure(model, "noisy")
    scores = x[:, 2].astype(np.float64)
    assert found.sqnr_db == pytest.approx(10 * np.log10((scores**2).sum() / (scores.size * 1e-4)), abs=0.1)
    assert found.sqnr_db < 40 < 80 < 10 * np.log10((x.astype(np.float64) ** 2).sum() / (x.size * 1e-4))


def test_what_was_changed_in_memory_alone_survives_a_run(tmp_path):
    """Pages of files that were read are given back, but not those of a copy-on-write map."""
    np.save(tmp_path / "x.npy", SAMPLES)
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed[:] *= 3
    np.testing.assert_allclose(outputs_of(SCALES, changed)["y"], 6 * SAMPLES, rtol=1e-6)
    np.testing.assert_array_equal(changed, 3 * SAMPLES)
