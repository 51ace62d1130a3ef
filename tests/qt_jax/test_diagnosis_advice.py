"""Check findings, remedies, sensitivities, budgets and cut graphs on networks whose answer is known."""

import dataclasses
import itertools

import numpy as np
import onnx
import onnx.parser
import pytest

import qt_jax as qt
from qt_jax.backends.judging import Criterion
from qt_jax.diagnosis import deployed, figures, mixed_precision, snippets, toolchains
from qt_jax.diagnosis.advice import kernel_bytes, sensitivities
from qt_jax.diagnosis.diagnosis import calibrated, diagnose
from qt_jax.diagnosis.layers import activations, kernels, layers_of
from qt_jax.diagnosis.meter import Measurement, Meter, is_significant_gain
from qt_jax.diagnosis.remedies import (
    ClipKernel,
    Deployment,
    RemoveChannels,
    SetRange,
    Use,
    findings,
    replaced,
)
from qt_jax.diagnosis.running import logits_of
from qt_jax.diagnosis.simulation import FLOAT, Precision, everywhere
from qt_jax.export import graph


def two_layers(seed=0):
    """Make features = Relu(input a + b), logits = features c, of 8, 16 and 4 values."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 17]>
        g (float[n, 8] input) => (float[n, 4] logits) {
            hidden = Gemm(input, a, b)
            features = Relu(hidden)
            logits = MatMul(features, c)
        }""")
    random = np.random.default_rng(seed)
    shapes = {"a": (8, 16), "b": (16,), "c": (16, 4)}
    for name, shape in shapes.items():
        value = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for node, name in zip(model.graph.node, ("body/dense", "relu", "head"), strict=True):
        node.name = name
    return model


def images(n=256):
    return np.random.default_rng(1).normal(size=(n, 8)).astype(np.float32)


def deployment(model, precision=None):
    precisions = everywhere(layers_of(model), precision or Precision(8, 8))
    return Deployment(model, precisions, calibrated(model, images()))


TOP1 = Criterion("classes", "top1", ("logits",))


def meter(model, path):
    reference = logits_of(model, images())
    labels = np.argmax(reference, axis=1)
    return Meter(images(), {"logits": reference}, path / "measurements.jsonl", TOP1, labels)


def noise_meter(model, path):
    reference = {"logits": logits_of(model, images())}
    return Meter(images(), reference, path / "measurements.jsonl", Criterion(None, None, ("logits",)))


def with_constant(model, name, change):
    value = graph.constants(model)[name].copy()
    change(value)
    return replaced(model, {name: value})


def found_in(model, bounds=None):
    bounds = calibrated(model, images()) if bounds is None else bounds
    return findings(kernels(model), activations(model, images(), bounds), bounds)


def test_a_sound_network_gives_no_finding():
    assert found_in(two_layers()) == []


def test_an_outlier_weight_is_found_and_clipped_to_the_tail():
    model = with_constant(two_layers(), "c", lambda kernel: kernel.__setitem__((3, 2), 90.0))
    [finding] = found_in(model)
    assert (finding.kind, finding.layer) == ("outlier weight", "head")
    mended = finding.remedy.apply(deployment(model))
    kernel = graph.constants(mended.model)["c"]
    assert kernel[3, 2] == np.float32(finding.remedy.threshold) < 5.0
    assert np.array_equal(np.delete(kernel, 14), np.delete(graph.constants(model)["c"], 14))


def test_a_dead_channel_is_removed_and_no_logit_changes():
    model = with_constant(two_layers(), "b", lambda bias: bias.__setitem__(5, -1e4))
    model = with_constant(model, "a", lambda kernel: kernel.__setitem__((slice(None), 5), 60.0))
    [finding] = found_in(model)
    assert (finding.kind, finding.layer, finding.remedy.channels) == ("dead channel", "body/dense", (5,))
    mended = finding.remedy.apply(deployment(model))
    assert not np.any(graph.constants(mended.model)["a"][:, 5])
    np.testing.assert_array_equal(logits_of(mended.model, images()), logits_of(model, images()))


def test_saturation_is_found_and_the_range_widened():
    model = two_layers()
    bounds = {**calibrated(model, images()), "head": (0.0, 0.5)}
    [finding] = found_in(model, bounds)
    assert (finding.kind, finding.layer) == ("saturating activation", "head")
    before = Deployment(model, everywhere(layers_of(model), Precision(8, 8)), bounds)
    low, high = finding.remedy.apply(before).bounds["head"]
    assert low == 0.0 and high == pytest.approx(calibrated(model, images())["head"][1])


def test_a_gain_is_more_than_chance():
    def of(correct):
        return Measurement(float(np.mean(correct)), None, 1.0, np.asarray(correct, bool))

    base = np.zeros(100)
    few, many = base.copy(), base.copy()
    few[:4], many[:5] = 1, 1
    assert not is_significant_gain(of(base), of(few)) and is_significant_gain(of(base), of(many))
    assert not is_significant_gain(of(many), of(base))


@pytest.mark.parametrize(
    "precision", [Precision(8, 8), Precision(8, 8, True), Precision(4, 8), Precision(8, 16, True), FLOAT]
)
def test_the_qdq_graph_computes_what_the_simulation_does(precision):
    model = two_layers()
    whole = deployment(model)
    whole = dataclasses.replace(whole, precisions={**whole.precisions, "head": precision})
    exported = deployed.qdq_graph(whole)
    onnx.checker.check_model(exported, full_check=True)
    expected = logits_of(whole.simulated(), images())
    error = np.abs(logits_of(exported, images()) - expected)
    step = 12.0 / 255 * np.abs(graph.constants(model)["c"]).max()  # a tie of the features that tips
    assert np.mean(error < 1e-2) > 0.9 and error.max() < 2 * step
    kept = deployed.at_required_opset(whole).model
    assert [node.name for node in kept.graph.node] == [node.name for node in model.graph.node]


def test_all_but_one_of_two_layers_is_the_other_alone(tmp_path):
    whole = deployment(two_layers(), Precision(4, 8))
    judge = meter(whole.model, tmp_path)
    found = sensitivities(whole, judge, lambda _: None)
    assert list(found) == ["body/dense", "head"]
    for one, other in (("body/dense", "head"), ("head", "body/dense")):
        assert found[one].all_but.sqnr_db == found[other].alone.sqnr_db
        assert found[one].all_but.value == found[other].alone.value
        np.testing.assert_array_equal(found[one].all_but.by_image, found[other].alone.by_image)
    both = judge.measure(whole.simulated(), "all")
    assert both.sqnr_db < min(item.alone.sqnr_db for item in found.values())
    none = judge.measure(dataclasses.replace(whole, precisions={}).simulated(), "float")
    assert none.sqnr_db is None


def test_without_labels_advice_goes_by_noise(tmp_path):
    """Expect the layer with one large weight to get more bits, until the noise is a hundredth."""
    model = with_constant(two_layers(), "c", lambda kernel: kernel.__setitem__((3, 2), 40.0))
    whole = deployment(model, Precision(4, 8))
    judge = noise_meter(model, tmp_path)
    found = diagnose(whole, judge, lambda _: None)
    assert not found.floating.counts and found.floating.value is None
    ratios = {name: item.alone.sqnr_db for name, item in found.sensitivities.items()}
    logits = logits_of(model, images()).astype(np.float64)
    only = dataclasses.replace(whole, precisions={"head": Precision(4, 8)}).simulated()
    error = logits_of(only, images()) - logits
    assert ratios["head"] == pytest.approx(10 * np.log10((logits**2).sum() / (error**2).sum()), abs=1e-4)
    assert found.advised and found.mended.sqnr_db > found.all_rounded.sqnr_db + 1
    gains = [found.all_rounded.score, *(trial.result.score for trial in found.advised)]
    assert all(after - before >= 1 for before, after in itertools.pairwise(gains))
    eight = diagnose(deployment(two_layers(), Precision(8, 16, True)), judge, lambda _: None)
    assert eight.all_rounded.is_enough == (eight.all_rounded.sqnr_db >= 40)


def test_a_budget_of_noise(tmp_path):
    model = two_layers()
    whole, judge = deployment(model), noise_meter(model, tmp_path)
    ranked = mixed_precision.order(whole, judge, lambda _: None)
    all_low, none_low = (
        judge.measure(mixed_precision.lowered(whole, names).simulated(), "").sqnr_db for names in (ranked, [])
    )
    one = judge.measure(mixed_precision.lowered(whole, ranked[:1]).simulated(), "").sqnr_db
    chosen = mixed_precision.within_noise(whole, ranked, judge, one - 0.01, lambda _: None)
    assert [name for name, it in chosen.precisions.items() if it.weights == 4] == ranked[:1]
    loose = mixed_precision.within_noise(whole, ranked, judge, all_low - 1, lambda _: None)
    assert {it.weights for it in loose.precisions.values()} == {4}
    with pytest.raises(qt.InvalidInput, match="below the budget of 200"):
        mixed_precision.within_noise(whole, ranked, judge, 200.0, lambda _: None)
    with pytest.raises(qt.InvalidInput, match="--min-sqnr"):
        mixed_precision.within_drop(whole, ranked, judge, 1.0, 0.5, lambda _: None)
    assert none_low > one > all_low


def test_the_diagnosis_of_a_network_resumes(tmp_path, monkeypatch):
    model = two_layers()
    told = []
    first = diagnose(deployment(model, Precision(4, 8)), meter(model, tmp_path), told.append)
    assert list(first.sensitivities) == ["body/dense", "head"] and "body/dense" in told
    assert first.floating.value == 1.0 and first.floating.sqnr_db is None
    assert first.mended.value >= first.all_rounded.value
    monkeypatch.setattr("qt_jax.diagnosis.meter.Meter._measured", None)
    again = diagnose(deployment(model, Precision(4, 8)), meter(model, tmp_path), told.append)
    assert again.mended.value == first.mended.value
    assert [trial.advised for trial in again.trials] == [trial.advised for trial in first.trials]


def test_a_graph_without_layers_is_refused(tmp_path):
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 17]>
        g (float[n, 8] input) => (float[n, 8] logits) { logits = Relu(input) }""")
    with pytest.raises(qt.InvalidInput, match=r"A layer is a Conv, .*; this one has only Relu"):
        diagnose(Deployment(model, {}, {}), meter(model, tmp_path), print)


def test_budgets(tmp_path):
    model = two_layers()
    whole, judge = deployment(model), meter(model, tmp_path)
    ranked = mixed_precision.order(whole, judge, lambda _: None)
    assert sorted(ranked) == ["body/dense", "head"]
    assert kernel_bytes(whole) == 8 * 16 + 16 * 4
    assert kernel_bytes(mixed_precision.within_bytes(whole, ranked, 192)) == 192
    least = mixed_precision.within_bytes(whole, ranked, 96)
    assert {precision.weights for precision in least.precisions.values()} == {4}
    with pytest.raises(qt.InvalidInput, match="96 bytes"):
        mixed_precision.within_bytes(whole, ranked, 95)
    loose = mixed_precision.within_drop(whole, ranked, judge, 1.0, 1.0, lambda _: None)
    assert kernel_bytes(loose) == 96
    with pytest.raises(qt.InvalidInput, match="allow more"):
        mixed_precision.within_drop(whole, ranked, judge, 2.0, 0.5, lambda _: None)


def test_layers_in_float_keep_it_under_a_budget(tmp_path):
    whole = deployment(two_layers())
    whole = dataclasses.replace(whole, precisions={**whole.precisions, "head": FLOAT})
    assert mixed_precision.lowered(whole, ["head", "body/dense"]).precisions["head"] == FLOAT
    assert kernel_bytes(whole) == 8 * 16 + 4 * 16 * 4


def test_a_graph_is_cut_behind_each_layer():
    model = two_layers()
    cut = toolchains.prefix(model, "features")
    values = logits_of(cut, images())
    constants = graph.constants(model)
    np.testing.assert_allclose(values, np.maximum(images() @ constants["a"] + constants["b"], 0.0), atol=1e-5)
    assert toolchains.producers(model) == {"body/dense": [], "head": ["body/dense"]}
    assert toolchains.costliest(model, {"body/dense": 20.0, "head": 10.0}) == ["head", "body/dense"]
    assert toolchains.costliest(model, {"body/dense": 20.0, "head": None}) == ["body/dense"]


def test_advice_is_pasted_as_source_that_runs():
    before = deployment(two_layers())
    after = before
    for remedy in (
        Use("head", Precision(16, 16, per_channel=True)),
        SetRange("body/dense", -9.0, 9.0),
        ClipKernel("head", 1.0),
        RemoveChannels("body/dense", (5,), (0.0,)),
    ):
        after = remedy.apply(after)
    scope = {"qt": qt}
    exec(snippets.config(before, after), scope)
    assert scope["config"].sites("body/dense").inputs == qt.QuantSpec(8, symmetric=False, quantile=1.0)
    assert scope["config"].sites("head").weights == qt.QuantSpec(16, axis=-1)
    assert scope["config"].sites("head").inputs == qt.QuantSpec(16, symmetric=False)
    assert snippets.flags(before, after) == "--bits 8 --rules head=16"
    assert 'nodes_to_exclude = ["head"]' in snippets.vendors(before, after)
    assert "reverse_pruning" in snippets.training(before, after, [ClipKernel("head", 1.0)])
    spared = Use("head", FLOAT).apply(before)
    assert 'qt.Rule("head", skip=True)' in snippets.config(before, spared)
    assert snippets.vendors(before, before) == snippets.flags(before, before) == ""


def test_the_pasted_config_is_the_whole_deployment():
    """Expect the precision of most layers as default, so that layers without a rule have it too."""
    before = deployment(two_layers(), Precision(4, 8, per_channel=True))
    after = Use("head", Precision(8, 16, per_channel=True)).apply(before)
    scope = {"qt": qt}
    exec(snippets.config(before, after), scope)
    wide = qt.QuantSpec(16, symmetric=False)
    first, head = scope["config"].sites("body/dense"), scope["config"].sites("head")
    assert (first.weights, first.inputs) == (qt.QuantSpec(4, axis=-1), qt.QuantSpec(8, symmetric=False))
    assert (head.weights, head.inputs) == (qt.QuantSpec(8, axis=-1), wide)
    assert snippets.flags(before, after) == "--bits 4 --per-channel --rules head=8"


@pytest.mark.parametrize(
    "name", ["a/b(1)/Conv", "model/conv[0]", "a+b", 'x"y', "back\\slash", "net/$a_{$/fc"]
)
def test_pasted_names_match_themselves(name, tmp_path):
    model = two_layers()
    model.graph.node[2].name = name
    before = deployment(model)
    scope = {"qt": qt}
    exec(snippets.config(before, Use(name, Precision(16, 16)).apply(before)), scope)
    assert scope["config"].sites(name).weights.bits == 16
    exec(snippets.vendors(before, Use(name, FLOAT).apply(before)).splitlines()[0], scope)
    assert scope["nodes_to_exclude"] == [name]
    found = diagnose(before, meter(before.model, tmp_path), lambda _: None)
    figures.draw_sensitivity(found).savefig(tmp_path / "figure.png")
