"""Check the SQNR by layer: its closed form on a graph made by hand, and every variant of a run."""

import json

import jax
import numpy as np
import onnx
import onnx.parser
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

import qt_jax as qt
from experiments import layer_sqnr
from experiments.data import load
from experiments.models.resnet import FastResNet
from qt_jax import records
from qt_jax.diagnosis import toolchains
from qt_jax.diagnosis.layers import layer_outputs
from qt_jax.diagnosis.simulation import compare
from qt_jax.export.network import Description, Samples, write_description, write_samples

VARIANTS = ["plain", "batch norm", "clips", "clips + batch norm"]


def graph(hidden):
    """Build two matmuls with a Relu between. `hidden` lists what follows `first` up to the second matmul."""
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 2] input) => (float[batch, 2] logits)
        <float[2, 2] eye = {{1.0, 0.0, 0.0, 1.0}}, float[1] noise = {{0.5}}> {{
            first = MatMul(input, eye)
            {hidden}
        }}""")
    for number, node in enumerate(model.graph.node):
        node.name = node.output[0] if node.op_type == "MatMul" else f"other{number}"
    return model


def test_layers_are_compared_behind_their_activation_and_as_they_are_read():
    plain = graph("kept = Relu(first) logits = MatMul(kept, eye)")
    deployed = graph("""kept = Relu(first) kept_DequantizeLinear_Output = Add(kept, noise)
        logits = MatMul(kept_DequantizeLinear_Output, eye)""")
    assert layer_outputs(plain) == {"first": "kept", "logits": "logits"}
    images = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    reference, logits, ratios = compare(plain, {"noisy": deployed, "same": plain}, images)
    signal = np.maximum(images.astype(np.float64), 0.0)
    expected = pytest.approx(10 * np.log10(np.sum(signal**2) / (200 * 0.25)), abs=1e-4)
    nothing = {"first": None, "logits": None}
    assert ratios == {"noisy": {"first": expected, "logits": expected}, "same": nothing}
    np.testing.assert_allclose(reference, signal, rtol=1e-6)
    np.testing.assert_allclose(logits["noisy"], signal + 0.5, rtol=1e-6)


@pytest.fixture
def run(tmp_path):
    """Write a finished run: a network of a few weights on the digits."""
    model, images = FastResNet(width=2), load("digits").train_images[:64].astype(np.float32) / 16 - 0.5
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: random.uniform(-0.5, 1.0, leaf.shape).astype(np.float32), shapes)
    variables = jax.tree.map(np.array, qt.attach_statistics(model, variables, qt.QuantConfig(), images))
    for path, leaf in flatten_dict(variables["batch_stats"]).items():
        leaf[...] = {"low": -2.0, "mean": 0.1}.get(path[-1], 2.0)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
    write_samples(Samples(images, images), tmp_path / "samples.npz")
    description = Description(
        model="experiments.models.resnet:FastResNet",
        arguments={"width": 2},
        call={"train": False},
        input_shape=images.shape[1:],
        checkpoint="checkpoint",
        quantization=qt.QuantConfig(),
        samples="samples.npz",
    )
    write_description(description, tmp_path / "model.json")
    config = {"dataset": "digits", "model": "fast", "seed": 3, "calibration_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_command_measures_every_variant_on_the_validation_split(run, capsys, monkeypatch):
    one = {"int4w-pt-minmax": toolchains.LAYER_SCHEMES["int4w-pt-minmax"]}
    monkeypatch.setattr(layer_sqnr, "LAYER_SCHEMES", one)
    assert layer_sqnr.main([str(run), "--images", "200"]) == 0
    rows = records.read(run / "layer_sqnr.jsonl")
    schemes = ["fp32", "int4w-pt-minmax"]
    assert [(row["variant"], row["scheme"]) for row in rows] == [(v, s) for v in VARIANTS for s in schemes]
    assert {(row["split"], row["n"], row["reestimation_images"]) for row in rows} == {
        ("validation", 144, 200)
    }
    for row in rows:
        assert (row["sqnr_db"] is None) == (row["scheme"] == "fp32")
        if row["scheme"] != "fp32":
            layers = row["layers_sqnr_db"]
            assert len(layers) == 9 and layers["head"] == pytest.approx(row["sqnr_db"], abs=1.0)
    page = (run / "layer_sqnr-quant-trim.md").read_text()
    assert page == layer_sqnr.to_markdown(rows) and page in capsys.readouterr().out + "\n"


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert layer_sqnr.main([str(tmp_path)]) == 2
    assert "experiments.cifar" in " ".join(capsys.readouterr().err.split())
