"""Check that graphs of other origins compute the same once prepared, or are refused with a reason."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import qt_jax as qt
from qt_jax.backends.inputs import prepare
from qt_jax.backends.judging import Criterion
from qt_jax.diagnosis import deployed
from qt_jax.diagnosis.diagnosis import calibrated, diagnose
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.loading import with_own_kernels
from qt_jax.diagnosis.meter import Meter
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.running import logits_of
from qt_jax.diagnosis.simulation import Precision, everywhere

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


def computed_kernel():
    """Compute the first kernel from constants, one of them a ConstantOfShape."""
    body = """k = ConstantOfShape<value = float[1] {0.25}>(s) v = Add(k, u) a = MatMul(input, v) b = Relu(a)
        logits = MatMul(b, w)"""
    model = weights(parsed(body), u=(6, 6), w=(6, 4))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([6, 6]), "s"))
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
        computed_kernel,
    ],
)
def test_a_foreign_graph_is_diagnosed_and_exported(make, tmp_path):
    written = make()
    images = RANDOM.normal(size=(64, 6)).astype(np.float32)
    model = with_own_kernels(prepare(written, images, images, outputs=["logits"]).model)
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names)
    logits = logits_of(model, images)
    session = onnxruntime.InferenceSession(written.SerializeToString())
    np.testing.assert_allclose(logits, session.run(["logits"], {"input": images})[0], atol=1e-5)
    layers = layers_of(model)
    kernels = [layer.kernel for layer in layers.values()]
    assert len(kernels) >= 2 and len(set(kernels)) == len(kernels)
    whole = Deployment(model, everywhere(layers, Precision(8, 8)), calibrated(model, images))
    labels = np.argmax(logits, axis=1)
    task = Criterion("classes", "top1", ("logits",))
    meter = Meter(images, {"logits": logits}, tmp_path / "measurements.jsonl", task, labels)
    found = diagnose(whole, meter, lambda _: None)
    assert list(found.sensitivities) == list(layers)
    exported = logits_of(deployed.qdq_graph(found.after), images)
    assert np.mean(np.argmax(exported, axis=1) == labels) > 0.9


def test_what_cannot_be_taken_is_said():
    model = unnamed()
    model.graph.node[1].domain = "com.microsoft"
    with pytest.raises(qt.InvalidInput, match=r"com.microsoft.Relu, which is not one of ONNX's own"):
        with_own_kernels(model)
    model = unnamed()
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("body", onnx.GraphProto(name="g")))
    with pytest.raises(qt.InvalidInput, match="holds a graph of its own"):
        with_own_kernels(model)
    model = weights(parsed("logits = MatMul(input, w)", inputs="double[n, 6] input"))
    kernel = onnx.numpy_helper.from_array(np.ones((6, 4)), "w")
    model.graph.initializer.append(kernel)
    model.graph.node[0].name = "head"
    with pytest.raises(qt.InvalidInput, match="kernel of 'head' is float64: the diagnosis rounds float32"):
        with_own_kernels(model)
