"""Check how outputs are judged: the metric that labels allow, and its value by numpy and scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics

from qt_jax.backends.fidelity import count_broken, fidelity, small_part
from qt_jax.backends.judging import (
    choose,
    constant_outputs,
    load_metric,
    metric_key,
    metric_name,
    plain_labels,
    score,
)
from qt_jax.backends.measurement import measure
from qt_jax.errors import InvalidInput
from qt_jax.reporting.pivot import is_exact

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 5)).astype(np.float32)
CLASSES = np.where(RNG.random(40) < 0.8, LOGITS.argmax(1), 0)
SCORES = RNG.random((40, 1)).astype(np.float32)
BITS = (SCORES[:, 0] + RNG.normal(0, 0.2, 40) > 0.5).astype(int)
MASKS = RNG.normal(size=(6, 3, 4, 5)).astype(np.float32)
PIXELS = MASKS.argmax(1)
WAVE = RNG.normal(size=(8, 16)).astype(np.float32)


def small_error(outputs, labels):
    return -float(np.abs(outputs["y"] - labels).mean())


def worst(outputs, labels):
    return float(np.abs(outputs["y"]).max())


worst.larger_is_better = False


@pytest.mark.parametrize(
    ("outputs", "labels", "kind", "metric"),
    [
        ({"y": LOGITS}, None, None, None),
        ({"y": LOGITS}, CLASSES, "classes", "top1"),
        ({"y": LOGITS[..., None, None]}, CLASSES, "classes", "top1"),
        ({"y": MASKS}, PIXELS, "classes", "top1"),
        ({"y": MASKS[:, :, 0]}, PIXELS[:, 0], "classes", "top1"),
        ({"y": SCORES}, BITS, "binary", "accuracy"),
        ({"y": SCORES[:, 0]}, BITS, "binary", "accuracy"),
        ({"y": SCORES}, BITS[:, None].astype(bool), "binary", "accuracy"),
        ({"y": MASKS[:, :1]}, (PIXELS > 0).astype(np.uint8), "binary", "accuracy"),
        ({"y": LOGITS.argmax(1)}, CLASSES, "equal", "accuracy"),
        ({"y": WAVE}, WAVE + 1, "error", "mean_error"),
        ({"y": WAVE[:, :1]}, WAVE[:, 0], "error", "mean_error"),
    ],
)
def test_labels_decide_the_metric(outputs, labels, kind, metric):
    task, _, _ = choose(outputs, labels)
    assert (task.kind, task.metric, task.judged) == (kind, metric, ("y",))
    found = measure(task, outputs, outputs, labels)
    assert found["status"] == "ok" and found["n"] == len(outputs["y"])
    assert found.get("value") == found.get("reference_value")
    if metric is not None:
        assert found["value"] == score(task, outputs, labels)["value"]


@pytest.mark.parametrize("labels", [CLASSES + 0.5, CLASSES[:, None] * np.ones(3, int), BITS + 1, CLASSES - 1])
def test_labels_that_fit_nothing(labels):
    output = SCORES if labels.min() > 0 and labels.max() < 3 else LOGITS
    with pytest.raises(InvalidInput, match=r"fit none of the float model's outputs|out of range"):
        choose({"y": output}, labels)


def test_of_several_outputs_the_one_that_fits_is_judged_and_the_others_are_named():
    task, warnings, notes = choose(
        {"boxes": RNG.normal(size=(40, 7, 4)), "y": LOGITS}, CLASSES, left_out=("text",)
    )
    assert task.judged == ("y",) and task.not_judged == ("boxes", "text") and warnings == notes == []


def test_labels_that_fit_several_outputs_judge_none_of_them():
    outputs = {"boxes": LOGITS[:, :2].copy(), "scores": LOGITS[:, 3:].copy()}
    task, _, [warning] = choose(outputs, BITS)
    assert task.metric is None and task.judged == ("boxes", "scores")
    assert "boxes and scores" in warning and "--output" in warning


def test_of_outputs_that_fit_the_one_with_as_many_classes_as_the_labels_is_judged():
    outputs = {"boxes": LOGITS[:, :4].copy(), "scores": np.hstack([1 - SCORES, SCORES])}
    task, _, [note] = choose(outputs, BITS)
    assert task.judged == ("scores",) and task.not_judged == ("boxes",)
    assert "scores is judged by them" in note and "--output" in note


def test_outputs_that_never_change_are_told():
    [warning] = constant_outputs({"y": np.ones((4, 2)), "z": LOGITS, "one": np.ones((1, 2))})
    assert "the same y for all 4" in warning


def test_an_output_with_too_few_classes_is_not_meant():
    task, _, _ = choose({"two": LOGITS[:, :2], "five": LOGITS}, CLASSES)
    assert task.judged == ("five",)


def test_binary_metrics_are_those_of_scikit_learn():
    for scores, threshold in ((SCORES, 0.5), (8 * SCORES - 4, 0.0)):
        task, _, _ = choose({"y": scores}, BITS)
        found = measure(task, {"y": scores}, None, BITS)
        assert found["threshold"] == threshold
        assert found["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(BITS, scores[:, 0]), abs=1e-12)
        expected = sklearn.metrics.accuracy_score(BITS, scores[:, 0] > threshold)
        assert found["value"] == found["accuracy"] == pytest.approx(expected)


def test_labels_of_one_class_are_told():
    task, [warning], _ = choose({"y": SCORES}, np.zeros(40, int))
    assert "All test labels are 0" in warning
    assert measure(task, {"y": SCORES}, None, np.zeros(40, int))["auc"] is None


def test_a_network_at_chance_is_told():
    _, [warning], _ = choose({"y": LOGITS}, RNG.integers(0, 5, 40))
    assert "cannot be told from chance (20.0 %)" in warning
    _, [warning], _ = choose({"y": SCORES}, RNG.permutation(BITS))
    assert "area under the ROC curve" in warning
    assert choose({"y": LOGITS}, CLASSES).warnings == []


def test_void_pixels_count_in_nothing_that_is_compared_with_labels():
    void = PIXELS.copy()
    void[:, 0] = 255
    with pytest.raises(InvalidInput, match="--void-label 255"):
        choose({"y": MASKS}, void)
    noisy = MASKS + RNG.normal(0, 0.5, MASKS.shape)
    task, _, _ = choose({"y": MASKS}, void, void_label=255)
    found = measure(task, {"y": noisy}, {"y": MASKS}, void)
    kept, _, _ = choose({"y": MASKS[:, :, 1:]}, PIXELS[:, 1:])
    alone = measure(kept, {"y": noisy[:, :, 1:]}, {"y": MASKS[:, :, 1:]}, PIXELS[:, 1:])
    for key in ("top1", "miou", "nll", "brier", "ece", "reference_top1"):
        assert found[key] == pytest.approx(alone[key]), key
    assert found["sqnr_db"] != pytest.approx(alone["sqnr_db"])
    with pytest.raises(InvalidInput, match="void label"):
        choose({"y": MASKS}, np.full_like(PIXELS, 255), void_label=255)


def test_mean_error_is_in_the_labels_own_unit():
    task, _, _ = choose({"y": WAVE}, WAVE)
    assert not task.larger_is_better
    assert measure(task, {"y": WAVE + 0.5}, {"y": WAVE}, WAVE)["value"] == pytest.approx(0.5)


def test_a_metric_of_ones_own():
    task, _, _ = choose({"y": WAVE}, WAVE, metric=small_error)
    found = measure(task, {"y": WAVE + 1}, {"y": WAVE}, WAVE)
    assert found["metric"].endswith(":small_error") and found["value"] == pytest.approx(-1)
    assert found["reference_value"] == 0 and found["larger_is_better"]
    assert not choose({"y": WAVE}, None, metric=worst).criterion.larger_is_better
    assert metric_name("math:hypot") == metric_name(math.hypot)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("no_module_of_this_name:f", "cannot be loaded"),
        ("math:no_function", "cannot be loaded"),
        ("math", "cannot be loaded"),
        ("math:pi", "is not a function"),
        (3, "is not callable"),
    ],
)
def test_a_metric_that_is_none(metric, message):
    with pytest.raises(InvalidInput, match=message):
        load_metric(metric)


@pytest.mark.parametrize(
    ("metric", "message"), [(lambda o, y: 1 / 0, "ZeroDivisionError"), (lambda o, y: math.nan, "nan")]
)
def test_a_metric_that_fails(metric, message):
    task, _, _ = choose({"y": WAVE}, None, metric=metric)
    with pytest.raises(InvalidInput, match=message):
        measure(task, {"y": WAVE}, None, None)


def test_fidelity_is_that_of_numpy_in_float64():
    noisy = WAVE + RNG.normal(0, 0.1, WAVE.shape).astype(np.float32)
    [found] = fidelity({"y": WAVE}, {"y": noisy})
    r, x = WAVE.astype(np.float64), noisy.astype(np.float64)

    def ratio(r, x):
        return 10 * np.log10((r**2).sum() / ((r - x) ** 2).sum())

    assert found["sqnr_db"] == pytest.approx(ratio(r, x), rel=1e-12)
    cosine = (r * x).sum() / np.linalg.norm(r) / np.linalg.norm(x)
    assert found["cosine"] == pytest.approx(cosine, rel=1e-12)
    assert found["largest_error"] == np.abs(r - x).max() and found["largest_value"] == np.abs(r).max()
    ratios = [ratio(*pair) for pair in zip(r, x, strict=True)]
    assert found["worst_image"]["index"] == np.argmin(ratios)
    assert found["worst_image"]["sqnr_db"] == pytest.approx(min(ratios), rel=1e-12)
    assert found["shape"] == [16] and found["equal"] is None


def test_fidelity_of_integers_is_the_share_of_equal_elements():
    other = LOGITS.argmax(1)
    other[:10] += 1
    [found] = fidelity({"y": LOGITS.argmax(1)}, {"y": other})
    assert found["equal"] == 0.75 and found["sqnr_db"] is None and found["largest_error"] == 1
    assert found["worst_image"] == found["worst_image"] | {"index": 0, "equal": 0.0}


def test_fidelity_where_shapes_vary():
    boxes = [np.ones((n, 4), np.float32) for n in (1, 3, 2)]
    other = [boxes[0] + 0.1, boxes[1][:2], boxes[2]]
    [found] = fidelity({"y": boxes}, {"y": other})
    assert found["other_shape"] == 1 and found["shape"] is None
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(12 / 0.04), rel=1e-5)
    assert found["worst_image"]["index"] == 0
    task, _, _ = choose({"y": boxes}, None)
    assert measure(task, {"y": other}, {"y": boxes}, None)["status"] == "ok"


def test_equal_and_empty_outputs_have_no_ratio():
    [same] = fidelity({"y": WAVE}, {"y": WAVE})
    assert (same["sqnr_db"], same["cosine"], same["largest_error"]) == (None, pytest.approx(1.0), 0.0)
    [zero] = fidelity({"y": 0 * WAVE}, {"y": WAVE})
    assert zero["sqnr_db"] == -300 and zero["cosine"] is None
    [empty] = fidelity({"y": np.zeros((3, 0), np.float32)}, {"y": np.zeros((3, 0), np.float32)})
    assert empty["largest_error"] == 0


def test_broken_outputs_are_invalid():
    broken = WAVE.copy()
    broken[2, 3] = np.inf
    task, _, _ = choose({"y": WAVE}, None)
    assert count_broken(broken) == 1 and count_broken([WAVE[0], broken[2]]) == 1
    found = measure(task, {"y": broken}, {"y": WAVE}, None)
    assert (found["status"], found["reason"]) == ("invalid", "y of 1 of 8 images are not finite")
    found = measure(task, {"y": WAVE[:, :3]}, {"y": WAVE}, None)
    assert found["reason"] == "y have shape (8, 3), expected (8, 16)"


def test_large_outputs_are_judged_in_parts(monkeypatch):
    task, _, _ = choose({"y": LOGITS}, CLASSES)
    noisy = LOGITS + RNG.normal(0, 0.1, LOGITS.shape).astype(np.float32)
    whole = measure(task, {"y": noisy}, {"y": LOGITS}, CLASSES)
    for name in ("qt_jax.backends.fidelity.CHUNK_ELEMENTS", "qt_jax.metrics.CHUNK_LOGITS"):
        monkeypatch.setattr(name, 33)
    parts = measure(task, {"y": noisy}, {"y": LOGITS}, CLASSES)
    assert parts["predictions"] == whole["predictions"] and parts["top1"] == whole["top1"]
    for key in ("nll", "brier", "ece", "sqnr_db", "logit_mse", "agreement", "cosine", "worst_sqnr_db"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-12), key
    assert [b[0] for b in parts["reliability"]] == [b[0] for b in whole["reliability"]]


def test_small_parts_of_an_output_are_compared_by_themselves():
    """Scores beside boxes in one output, as YOLO has them: one grid for both leaves the scores nothing."""
    output = np.concatenate([RNG.uniform(0, 300, (5, 4, 50)), RNG.uniform(0, 1, (5, 6, 50))], axis=1)
    output = output.astype(np.float32)
    rounded = np.round(output / 1.2) * np.float32(1.2)
    task, _, [note] = choose({"y": output}, None)
    assert "6 of 10 slices along axis 1 (4-9)" in note
    found = measure(task, {"y": rounded}, {"y": output}, None)
    part = found["fidelity"][0]["small_part"]
    r, x = (array[:, 4:].astype(np.float64) for array in (output, rounded))
    expected = 10 * np.log10((r**2).sum() / ((r - x) ** 2).sum())
    assert part["axis"] == 1 and part["slices"] == [4, 5, 6, 7, 8, 9]
    assert part["sqnr_db"] == pytest.approx(expected)
    assert part["worst_image"]["sqnr_db"] == found["worst_sqnr_db"] <= part["sqnr_db"]
    assert found["sqnr_db"] == part["sqnr_db"] < 10 < 40 < found["fidelity"][0]["sqnr_db"]
    assert small_part(np.swapaxes(output, 1, 2)) == (2, [4, 5, 6, 7, 8, 9])
    assert small_part(output[:, :4]) is small_part(LOGITS) is None


def test_probabilities_need_no_softmax():
    weights = np.exp(LOGITS.astype(np.float64))
    probabilities = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    task, _, _ = choose({"y": probabilities}, CLASSES)
    found = measure(task, {"y": probabilities}, None, CLASSES)
    expected = sklearn.metrics.log_loss(CLASSES, probabilities, labels=range(5))
    assert found["nll"] == pytest.approx(expected, rel=1e-5)
    plain = measure(choose({"y": LOGITS}, CLASSES).criterion, {"y": LOGITS}, None, CLASSES)
    for key in ("nll", "brier", "ece", "top1"):
        assert found[key] == pytest.approx(plain[key], rel=1e-4), key


def test_outputs_of_which_no_shape_agrees_are_no_result():
    boxes = [np.ones((n, 4), np.float32) for n in (1, 3)]
    task, _, _ = choose({"y": boxes}, None)
    found = measure(task, {"y": [box[:0] for box in boxes]}, {"y": boxes}, None)
    assert found["status"] == "invalid" and "another shape for 2 of 2 samples" in found["reason"]
    some = measure(task, {"y": [boxes[0], boxes[1][:2]]}, {"y": boxes}, None)
    assert some["status"] == "ok" and "1 of 2 samples" in some["reason"]
    assert not is_exact(found) and not is_exact(some)
    assert is_exact(measure(task, {"y": boxes}, {"y": boxes}, None))


@pytest.mark.parametrize("labels", [np.eye(5, dtype=int)[CLASSES], np.eye(5)[CLASSES]])
def test_one_hot_labels_are_refused(labels):
    with pytest.raises(InvalidInput, match=r"labels\.argmax\(axis=1\)"):
        choose({"y": LOGITS}, labels)


def test_labels_without_needless_axes():
    assert plain_labels(BITS[:, None].astype(bool)).tolist() == BITS.tolist()
    np.testing.assert_array_equal(plain_labels(PIXELS), PIXELS)
    with pytest.raises(InvalidInput, match="void-label is for labels of pixels"):
        choose({"y": LOGITS}, CLASSES, void_label=255)


def test_a_metric_cannot_change_what_others_are_given():
    def careless(outputs, labels):
        outputs["y"] *= 0
        labels += 1
        return 0.0

    output, labels = WAVE.copy(), WAVE.copy()
    task, _, _ = choose({"y": output}, labels, metric=careless)
    measure(task, {"y": output}, {"y": output}, labels)
    np.testing.assert_array_equal(output, WAVE)
    np.testing.assert_array_equal(labels, WAVE)


def test_a_metric_that_fails_on_one_row_makes_that_row_invalid():
    def only_float(outputs, labels):
        return 1.0 if outputs["y"].sum() == WAVE.sum() else math.nan

    task, _, _ = choose({"y": WAVE}, None, metric=only_float)
    assert measure(task, {"y": WAVE}, None, None)["value"] == 1.0
    found = measure(task, {"y": WAVE + 1}, {"y": WAVE}, None)
    assert found["status"] == "invalid" and "nan" in found["reason"]


def test_a_metric_is_known_by_what_it_does():
    def scaled(factor):
        return lambda outputs, labels: factor

    keys = {
        metric_key(it)
        for it in (small_error, worst, scaled(1), scaled(2), lambda o, y: 1.0, lambda o, y: 2.0)
    }
    assert len(keys) == 6 and metric_key(scaled(1)) == metric_key(scaled(1))
