"""Test models from other exporters, prepared for toolchains: inputs, outputs, open sizes, old opsets."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static

from qt_jax.backends import evaluate
from qt_jax.backends.inputs import LARGEST_BATCH, load, name_nodes, prepare, real_inputs
from qt_jax.backends.samples import range_warnings
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


def fit(model, calibration=IMAGES[:2], images=IMAGES, **choice):
    return prepare(model, calibration, images, **choice)


def outputs(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": IMAGES})[0]


def dims(model):
    [entry] = real_inputs(model)
    return [dim.dim_value or dim.dim_param for dim in entry.type.tensor_type.shape.dim]


def named(model):
    """Name the nodes, as our exports do."""
    name_nodes(model.graph)
    return model


def test_a_graph_that_needs_nothing_stays_as_it_is():
    model = named(network("b, 3, 8, 8"))
    assert fit(model).model is model


def test_open_sizes_are_those_of_the_images_and_the_batch_stays_open():
    model = network()
    prepared = fit(model)
    assert dims(prepared.model) == ["b", 3, 8, 8] and dims(model) == ["b", 3, "h", "w"]
    assert prepared.batch == LARGEST_BATCH and prepared.outputs == {"logits": True}
    np.testing.assert_array_equal(outputs(prepared.model), outputs(model))


@pytest.mark.parametrize("size", [-1, 0])
def test_a_batch_of_no_size_is_an_open_one(size):
    """Write the open batch as PaddlePaddle does, or as a 0."""
    model = network()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = size
    prepared = fit(model)
    assert dims(prepared.model) == ["batch", 3, 8, 8] and prepared.batch == LARGEST_BATCH


@pytest.mark.parametrize(("opset", "ir"), [(11, 6), (9, 3), (7, 3)])
def test_an_old_opset_is_raised_and_computes_the_same(opset, ir):
    model = network(opset=opset, ir=ir)
    prepared = fit(model).model
    assert prepared.opset_import[0].version == 13 and model.opset_import[0].version == opset
    assert prepared.ir_version >= 8
    np.testing.assert_array_equal(outputs(prepared), outputs(model))


@pytest.mark.parametrize("opset", [13, 9])
def test_weights_listed_among_the_inputs_do_not_count(opset):
    """Before version 4 of the format, weights had to be listed."""
    model = onnx.parser.parse_model(f"""<ir_version: 3, opset_import: ["" : {opset}]>
    net (float[b, 3, 8, 8] input, float[3] shift) => (float[b, 3] logits) <float[3] shift = {{1, 2, 3}}> {{
        mean = GlobalAveragePool(input)
        flat = Flatten(mean)
        logits = Add(flat, shift)
    }}""")
    prepared = fit(model).model
    assert [value.name for value in prepared.graph.input] == ["input"] and prepared.ir_version == 8
    np.testing.assert_allclose(
        outputs(prepared), IMAGES.mean(axis=(2, 3)) + np.array([1, 2, 3]), rtol=1e-5, atol=1e-6
    )


def test_all_outputs_are_kept_or_those_that_are_chosen():
    model = network("b, 3, 8, 8")
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["b", 3, 1, 1]))
    both, one = fit(model), fit(model, outputs=["mean"])
    assert list(both.outputs) == ["logits", "mean"] and both.left_out == ()
    assert list(one.outputs) == ["mean"] and one.left_out == ("logits",)
    assert [node.op_type for node in one.model.graph.node] == ["GlobalAveragePool"]
    assert len(model.graph.output) == 2
    with pytest.raises(InvalidInput, match="no output 'boxes': choose among logits, mean"):
        fit(model, outputs=["boxes"])


def test_outputs_that_are_no_numbers_are_left_out():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 3, 8, 8] input) => (float[b, 3] logits, string[b, 3] text) {
        mean = GlobalAveragePool(input)
        logits = Flatten(mean)
        text = Cast<to = 8>(logits)
    }""")
    assert fit(model).left_out == ("text",)
    with pytest.raises(InvalidInput, match="None of the model's outputs text is a tensor of numbers"):
        fit(model, outputs=["text"])


def test_a_batch_of_one_is_kept_and_every_image_still_runs(tmp_path):
    model = network("1, 3, 8, 8")
    assert fit(model).batch == 1
    rows = evaluate(
        model,
        IMAGES[:4],
        (IMAGES, LABELS),
        backends="onnxruntime",
        schemes=["int8-pc-minmax"],
        runtimes=["reference"],
        folder=tmp_path,
    )
    assert rows[0]["status"] == "ok" and rows[0]["n"] == 6
    expected = IMAGES.mean(axis=(2, 3)).argmax(axis=1)
    assert rows[0]["top1"] == np.mean(expected == LABELS)


def test_a_graph_that_holds_a_batch_of_one_is_given_one_at_a_time():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 3, 8, 8] input) => (float[b, 3] logits) <int64[2] shape = {1, 3}> {
        mean = GlobalAveragePool(input)
        logits = Reshape(mean, shape)
    }""")
    prepared = fit(model)
    assert (
        prepared.batch == 1 and dims(prepared.model) == [1, 3, 8, 8] and prepared.outputs == {"logits": True}
    )


def test_a_graph_that_mixes_its_samples_is_given_one_at_a_time():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 3, 8, 8] input) => (float[b, 3, 8, 8] out) <int64[1] axes = {0}> {
        mean = ReduceMean<axes = [0], keepdims = 1>(input)
        out = Sub(input, mean)
    }""")
    del model.graph.initializer[:]
    assert fit(model).batch == 1


STATEFUL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 3] x, float[2, b, 3] state, int64 rate, int32[b, 4] ids)
        => (float[b, 3] y, float[2, b, 3] next, int32[b, 4] same) {
        next = Add(state, x)
        y = ReduceSum(next, axes)
        same = Identity(ids)
    }""")
STATEFUL.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axes"))
STATEFUL.graph.node[1].attribute.append(helper.make_attribute("keepdims", 0))
SAMPLES = {
    "x": RNG.normal(size=(5, 3)).astype(np.float32),
    "state": RNG.normal(size=(5, 2, 1, 3)).astype(np.float32),
    "rate": np.full(5, 16000),
    "ids": np.arange(20, dtype=np.int32).reshape(5, 4),
}


def test_inputs_without_a_batch_in_front_get_one():
    prepared = fit(STATEFUL, SAMPLES, SAMPLES)
    assert list(prepared.samples) == ["x", "state/sample", "rate/sample", "ids"]
    assert prepared.batch == 1 and prepared.outputs == {"y": True, "next": False, "same": True}
    session = onnxruntime.InferenceSession(prepared.model.SerializeToString())
    found = session.run(None, {name: array[2:3] for name, array in prepared.samples.items()})
    np.testing.assert_allclose(found[1], SAMPLES["state"][2] + SAMPLES["x"][2:3], rtol=1e-6)


def test_all_inputs_and_outputs_are_judged(tmp_path):
    rows = evaluate(
        STATEFUL,
        SAMPLES,
        SAMPLES,
        backends="onnxruntime",
        schemes=["fp32"],
        runtimes=["optimized"],
        folder=tmp_path,
    )
    assert [row["judged"] for row in rows] == [["y", "next", "same"]] * 2
    assert [it["shape"] for it in rows[1]["fidelity"]] == [[3], [2, 1, 3], [4]]
    assert rows[1]["fidelity"][2]["equal"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": network("4, 3, 8, 8")}, "batches of exactly 4"),
        ({"model": network(), "images": IMAGES[:, :2]}, r"takes float32 \(n, 3, \*, \*\)"),
        ({"model": network(), "images": IMAGES.astype(np.float64)}, "float64 .* takes float32"),
        ({"model": network(), "calibration": IMAGES[:2, :, :4]}, "give images of one shape"),
        ({"model": network(), "images": IMAGES * np.inf}, "the test set has values that are not finite"),
        ({"model": network(), "images": IMAGES[:0]}, "at least one sample"),
        (
            {"model": network(), "images": {"a": IMAGES, "b": IMAGES}},
            r"\['input'\] \(or \"images\"\), it holds",
        ),
        ({"model": STATEFUL}, "calibration lacks the arrays"),
        (
            {"model": STATEFUL, "calibration": SAMPLES, "images": SAMPLES | {"rate": np.full(4, 1)}},
            "different numbers of samples",
        ),
        (
            {
                "model": STATEFUL,
                "calibration": SAMPLES,
                "images": SAMPLES | {"ids": SAMPLES["ids"].astype(int)},
            },
            r"input 'ids' takes int32 \(n, 4\)",
        ),
    ],
)
def test_data_that_do_not_fit(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        fit(**arguments)


def quantized(form):
    reader = type("Reader", (), {"get_next": lambda self: self.pending.pop() if self.pending else None})()
    reader.pending = [{"input": IMAGES}]
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 3, 8, 8] input) => (float[b, 2, 8, 8] out) <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}> {
        out = Conv(input, w)
    }""")
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        onnx.save(model, before)
        if form == "dynamic":
            quantize_dynamic(before, after)
        else:
            quantize_static(before, after, reader, quant_format=QuantFormat[form])
        return onnx.load(after)


@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic"])
def test_a_quantized_graph_is_no_float_graph(form):
    with pytest.raises(InvalidInput, match=r"already quantized .* give the float graph"):
        fit(quantized(form))


@pytest.mark.parametrize("inside", ["function", "branch"])
def test_a_quantized_node_is_found_wherever_it_is(inside):
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"])
    model = network("b, 3, 8, 8")
    if inside == "function":
        opset = [helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("own", "f", ["q", "s"], ["y"], [node], opset))
    else:
        graph = helper.make_graph([node], "then", [], [helper.make_tensor_value_info("y", 1, None)])
        model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph))
    with pytest.raises(InvalidInput, match=r"it holds .* DequantizeLinear"):
        fit(model)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(tmp_path / "absent.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(InvalidInput, match=r"empty.onnx holds no ONNX graph"):
        load(tmp_path / "empty.onnx")
    with pytest.raises(InvalidInput, match="The model's bytes cannot be read") as raised:
        load(b"\x08nonsense")
    assert len(str(raised.value)) < 300
    with pytest.raises(InvalidInput, match="int is no model"):
        load(3)
    assert load(network().SerializeToString()) == network()


def test_strings_cannot_be_given():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (string[b] input) => (string[b] out) { out = Identity(input) }""")
    with pytest.raises(InvalidInput, match="'input' takes strings"):
        fit(model, np.array(["a"]), np.array(["a"]))


LABELLED = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[b, 6] input, float[b, 6] labels) => (float[b, 6] error) { error = Sub(input, labels) }""")
ROWS = np.eye(6, dtype=np.float32)


@pytest.mark.parametrize("form", ["file", "arrays", "pair", "labels alone"])
def test_an_input_called_labels_is_refused(form, tmp_path):
    arrays = {"input": ROWS, "labels": ROWS}
    np.savez(tmp_path / "t.npz", **arrays)
    calibration, test_set = {
        "file": (tmp_path / "t.npz", tmp_path / "t.npz"),
        "arrays": (arrays, arrays),
        "pair": (arrays, (arrays, None)),
        "labels alone": ({"labels": ROWS}, {"labels": ROWS}),
    }[form]
    with pytest.raises(InvalidInput, match=r"an input called 'labels', .*: rename this input"):
        evaluate(LABELLED, calibration, test_set, schemes=[])
    with pytest.raises(InvalidInput, match="an input called 'labels'"):
        fit(LABELLED, arrays, arrays)


def test_labels_without_samples_are_told():
    with pytest.raises(InvalidInput, match=r"The test set holds 'labels', .* and no samples"):
        evaluate(network(), IMAGES, {"labels": LABELS}, schemes=[])


def test_a_graph_that_does_not_run():
    model = network("b, 3, 8, 8")
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(
        InvalidInput, match=r"ONNX Runtime cannot run the float model to compare with: .*NoSuchOp"
    ):
        fit(model)


def test_nodes_get_names_of_their_own():
    model = network("b, 3, 8, 8")
    model.graph.node[0].name = model.graph.node[1].name = "same"
    assert [node.name for node in fit(model).model.graph.node] == ["mean", "logits"]


def test_data_scaled_otherwise_than_for_calibration_are_told():
    pixels = np.abs(IMAGES[:3]) / 4
    assert range_warnings(fit(network(), pixels, 255 * pixels).scans)
    assert range_warnings(fit(network(), 255 * pixels, pixels).scans)
    assert range_warnings(fit(network(), IMAGES[:3], IMAGES).scans) == []


def test_integers_and_no_calibration_have_no_range():
    scans = fit(STATEFUL, SAMPLES, SAMPLES | {"rate": np.full(5, 3)}).scans
    assert range_warnings(scans) == []
    assert range_warnings(fit(network(), IMAGES[:0], IMAGES).scans) == []


def test_outputs_of_one_name_are_refused():
    model = network("b, 3, 8, 8")
    model.graph.output.append(model.graph.output[0])
    with pytest.raises(InvalidInput, match="several outputs of one name"):
        fit(model)
