"""Test models from other exporters, prepared for toolchains: open sizes, old opsets, listed weights."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qt_jax.backends import evaluate
from qt_jax.backends.inputs import fixed_batch, load, prepare, single_input
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 3, 8, 8)).astype(np.float32)
LABELS = np.arange(6) % 3


def network(shape="b, 3, h, w", opset=17, ir=8):
    return onnx.parser.parse_model(f"""<ir_version: {ir}, opset_import: ["" : {opset}]>
    net (float[{shape}] input) => (float[b, c] logits) {{
        mean = GlobalAveragePool(input)
        logits = Flatten(mean)
    }}""")


def fit(model, calibration=IMAGES[:2], images=IMAGES, labels=LABELS):
    return prepare(model, calibration, images, labels)


def outputs(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": IMAGES})[0]


def dims(model):
    return [dim.dim_value or dim.dim_param for dim in single_input(model).type.tensor_type.shape.dim]


def test_a_graph_that_needs_nothing_stays_as_it_is():
    model = network("b, 3, 8, 8")
    assert fit(model) is model


def test_open_sizes_are_those_of_the_images_and_the_batch_stays_open():
    model = network()
    prepared = fit(model)
    assert dims(prepared) == ["b", 3, 8, 8] and dims(model) == ["b", 3, "h", "w"]
    np.testing.assert_array_equal(outputs(prepared), outputs(model))


def test_a_negative_batch_is_an_open_one():
    """Write the open batch as PaddlePaddle does."""
    model = network()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert dims(fit(model)) == ["batch", 3, 8, 8] and fixed_batch(fit(model)) is None


def test_an_old_opset_is_raised_and_computes_the_same():
    model = network(opset=11, ir=6)
    prepared = fit(model)
    assert prepared.opset_import[0].version == 13 and model.opset_import[0].version == 11
    np.testing.assert_array_equal(outputs(prepared), outputs(model))


def test_weights_listed_among_the_inputs_do_not_count():
    model = onnx.parser.parse_model("""<ir_version: 3, opset_import: ["" : 13]>
    net (float[b, 3, 8, 8] input, float[3] shift) => (float[b, 3] logits) <float[3] shift = {1, 2, 3}> {
        mean = GlobalAveragePool(input)
        flat = Flatten(mean)
        logits = Add(flat, shift)
    }""")
    assert [value.name for value in fit(model).graph.input] == ["input"]


def test_of_several_outputs_the_first_is_kept():
    model = network("b, 3, 8, 8")
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["b", 3, 1, 1]))
    assert [value.name for value in fit(model).graph.output] == ["logits"] and len(model.graph.output) == 2


def test_a_batch_of_one_is_kept_and_every_image_still_runs(tmp_path):
    model = network("1, 3, 8, 8")
    assert fixed_batch(fit(model)) == 1
    rows = evaluate(
        model,
        IMAGES[:4],
        (IMAGES, LABELS),
        backends="onnxruntime",
        schemes=["int8-pc-minmax"],
        runtimes=["reference"],
        folder=tmp_path,
    )
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[0]["n"] == 6
    expected = IMAGES.mean(axis=(2, 3)).argmax(axis=1)
    assert rows[0]["top1"] == np.mean(expected == LABELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": network("4, 3, 8, 8")}, "batches of exactly 4"),
        ({"model": network(), "images": IMAGES[:, :2]}, "takes float32"),
        ({"model": network(), "calibration": IMAGES[:2, :, :4]}, "give images of one shape"),
        ({"model": network(), "labels": LABELS[:2]}, "one integer per image"),
    ],
)
def test_data_that_do_not_fit(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        fit(**arguments)


def test_what_cannot_be_read_or_has_several_inputs(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(tmp_path / "absent.onnx")
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    with pytest.raises(InvalidInput, match="exactly one input, found \\['input', 'mask'\\]"):
        fit(model)
