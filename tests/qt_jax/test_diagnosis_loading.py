"""Check that graphs of other origins compute the same once prepared, or are refused with a reason."""

import numpy as np
import onnx
import onnx.parser
import pytest

import qt_jax as qt
from qt_jax.diagnosis import deployed
from qt_jax.diagnosis.advice import Meter
from qt_jax.diagnosis.diagnosis import calibrated, diagnose
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.loading import prepared
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import Precision, everywhere, logits_of

RANDOM = np.random.default_rng(3)


def weights(model, **shapes):
    for name, shape in shapes.items():
        value = RANDOM.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def parsed(body, opset=17, inputs="float[n, 6] input", extra=""):
    return onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : {opset}{extra}]>
        g ({inputs}) => (float[n, 4] logits) {{ {body} }}""")


def unnamed():
    return weights(
        parsed("a = MatMul(input, v) b = Relu(a) logits = Gemm(b, w, c)"), v=(6, 6), w=(6, 4), c=(4,)
    )


def old_opset():
    return weights(
        parsed("a = Gemm(input, v, c) b = Relu(a) logits = MatMul(b, w)", 9), v=(6, 6), c=(1, 6), w=(6, 4)
    )


def constants_elsewhere():
    body = """v = Identity(u) a = MatMul(input, v) b = Relu(a) d = Identity(c) logits = Gemm(b, w, d)"""
    return weights(parsed(body), u=(6, 6), w=(6, 4), c=(4,))


def weights_as_inputs():
    inputs = "float[n, 6] input, float[6, 6] v, float[6, 4] w"
    return weights(
        parsed("a = MatMul(input, v) b = Relu(a) logits = MatMul(b, w)", 17, inputs), v=(6, 6), w=(6, 4)
    )


def shared_kernel():
    body = "a = MatMul(input, v) b = Relu(a) d = MatMul(b, v) e = Relu(d) logits = MatMul(e, w)"
    return weights(parsed(body), v=(6, 6), w=(6, 4))


def other_domain_imported():
    model = parsed("a = MatMul(input, v) b = Relu(a) logits = MatMul(b, w)", extra=', "ai.onnx.ml" : 3')
    return weights(model, v=(6, 6), w=(6, 4))


def two_outputs():
    model = weights(parsed("a = MatMul(input, v) b = Relu(a) logits = MatMul(b, w)"), v=(6, 6), w=(6, 4))
    model.graph.output.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["n", 6]))
    return model


def fixed_batch():
    model = weights(
        parsed("a = MatMul(input, v) b = Relu(a) logits = MatMul(b, w)", inputs="float[24, 6] input"),
        v=(6, 6),
        w=(6, 4),
    )
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 24
    return model


@pytest.mark.parametrize(
    "make",
    [
        unnamed,
        old_opset,
        constants_elsewhere,
        weights_as_inputs,
        shared_kernel,
        other_domain_imported,
        two_outputs,
        fixed_batch,
    ],
)
def test_a_foreign_graph_is_diagnosed_and_exported(make, tmp_path):
    written = make()
    images = RANDOM.normal(size=(64, 6)).astype(np.float32)
    model = prepared(written)
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names)
    logits = logits_of(model, images)
    if make is not weights_as_inputs:  # whose inputs `logits_of` would ask for
        np.testing.assert_allclose(logits, logits_of(written, images), atol=1e-5)
    layers = layers_of(model)
    kernels = [layer.kernel for layer in layers.values()]
    assert len(kernels) >= 2 and len(set(kernels)) == len(kernels)
    whole = Deployment(model, everywhere(layers, Precision(8, 8)), calibrated(model, images))
    meter = Meter(images, np.argmax(logits, axis=1), logits, tmp_path / "measurements.jsonl")
    found = diagnose(whole, meter, lambda _: None)
    assert list(found.sensitivities) == list(layers)
    exported = logits_of(deployed.qdq_graph(found.after), images)
    assert np.mean(np.argmax(exported, axis=1) == meter.labels) > 0.9


def test_what_cannot_be_taken_is_said():
    model = unnamed()
    model.graph.node[1].domain = "com.microsoft"
    with pytest.raises(qt.InvalidInput, match=r"com.microsoft.Relu, which is not one of ONNX's own"):
        prepared(model)
    model = unnamed()
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("body", onnx.GraphProto(name="g")))
    with pytest.raises(qt.InvalidInput, match="holds a graph of its own"):
        prepared(model)
    two = weights(parsed("logits = Add(input, other)", inputs="float[n, 4] input, float[n, 4] other"))
    with pytest.raises(qt.InvalidInput, match="input, other: the diagnosis takes one"):
        prepared(two)
