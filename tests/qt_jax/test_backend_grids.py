"""Test the emulated conventions of grids against exact fractions and float64 numpy."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from qt_jax.backends import Refused, worker
from qt_jax.backends.grids import BACKEND, RUNTIME

SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}
RNG = np.random.default_rng(0)
STEPS = {"narrow": Fraction(7), "full": Fraction(15, 2), "wide": Fraction(8)}
"""Steps from zero to the largest weight, where the scale is no power of two."""


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Change to a scratch folder, because compiling leaves files in the working directory."""
    monkeypatch.chdir(tmp_path)


def exact_scale(largest, convention):
    """Return the scale as a fraction, by search for powers of two."""
    if not largest:
        return Fraction(1)
    if convention in STEPS or convention == "int8":
        return largest / STEPS.get(convention, Fraction(127))
    family, direction = convention.split("-")
    wanted = largest / {"int4": 7, "int8": 127}[family]
    power = Fraction(1)
    while power >= wanted:
        power /= 2
    while power < wanted:
        power *= 2
    # power / 2 < wanted <= power: the lower one is nearer in exponent below power / sqrt(2).
    return power / 2 if direction == "near" and 2 * wanted**2 < power**2 else power


def exact_rounding(kernel, labels, convention):
    """Round a kernel in fractions; weights with equal labels share a scale. Python rounds half to even."""
    bottom, top = (-8, 7) if convention in ("full", "wide") or "int4" in convention else (-7, 7)
    if "int8" in convention:
        bottom, top = (-127, 127) if convention == "int8" else (-128, 127)
    labels = np.broadcast_to(labels, kernel.shape)
    rounded = np.empty(kernel.shape)
    for label in np.unique(labels):
        weights = [Fraction(float(weight)) for weight in kernel[labels == label]]
        scale = exact_scale(max(map(abs, weights)), convention)
        rounded[labels == label] = [
            float(min(max(round(weight / scale), bottom), top) * scale) for weight in weights
        ]
    return rounded.astype(np.float32)


def test_the_reference_itself_on_numbers_done_by_hand():
    kernel = np.float32([[-8.0, 8.0, 0.5, 1.5]])
    assert exact_rounding(kernel, 0, "wide").tolist() == [[-8.0, 7.0, 0.0, 2.0]]
    assert exact_scale(Fraction(8), "int4-up") == 2
    assert exact_scale(Fraction(9), "int4-near") == 1
    assert exact_scale(Fraction(10), "int4-near") == 2  # log2(10 / 7) = 0.51
    assert exact_scale(Fraction(7), "int4-up") == 1


def single(operator, shapes, kernel_position, kernel, **attributes):
    """Build a graph of one node: `shapes` of its input and output, and its kernel at a position."""
    inputs = ["x", "kernel"] if kernel_position else ["kernel", "x"]
    node = helper.make_node(operator, inputs, ["y"], name="layer", **attributes)
    x, y = (helper.make_tensor_value_info(n, 1, s) for n, s in zip("xy", shapes, strict=True))
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(kernel, "kernel")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def along(axis, shape):
    """Number the elements of a kernel by their place along an axis."""
    return np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])


TRANSPOSED = 3 * (np.arange(4)[:, None, None, None] // 2) + np.arange(3)[:, None, None]
"""Output channels of a ConvTranspose of two groups, each of two inputs and three outputs."""
LAYERS = {
    "conv": ("Conv", (5, 3, 3, 3), 1, [["n", 3, 8, 8], ["n", 5, 6, 6]], along(0, (5, 3, 3, 3)), {}),
    "conv 1 x 1": ("Conv", (5, 3, 1, 1), 1, [["n", 3, 8, 8], ["n", 5, 8, 8]], along(0, (5, 3, 1, 1)), {}),
    "depthwise": (
        "Conv",
        (4, 1, 3, 3),
        1,
        [["n", 4, 8, 8], ["n", 4, 6, 6]],
        along(0, (4, 1, 3, 3)),
        {"group": 4},
    ),
    "transposed": (
        "ConvTranspose",
        (4, 3, 2, 2),
        1,
        [["n", 4, 5, 5], ["n", 6, 6, 6]],
        TRANSPOSED,
        {"group": 2},
    ),
    "gemm": ("Gemm", (6, 4), 1, [["n", 6], ["n", 4]], along(1, (6, 4)), {}),
    "gemm transB": ("Gemm", (4, 6), 1, [["n", 6], ["n", 4]], along(0, (4, 6)), {"transB": 1}),
    "gemm on the left": ("Gemm", (6, 4), 0, [[6, 3], [4, 3]], along(1, (6, 4)), {"transA": 1}),
    "matmul": ("MatMul", (6, 4), 1, [["n", 2, 6], ["n", 2, 4]], along(1, (6, 4)), {}),
    "matmul on the left": ("MatMul", (4, 6), 0, [["n", 6, 2], ["n", 4, 2]], along(0, (4, 6)), {}),
    "matmul with a vector": ("MatMul", (6,), 1, [["n", 6], ["n"]], 0, {}),
}
CONVENTIONS = {
    "int4w-narrow": "narrow",
    "int4w-full": "full",
    "int4w-wide": "wide",
    "int4w-po2-up": "int4-up",
    "int4w-po2-near": "int4-near",
    "int8": "int8",
    "int8-po2-up": "int8-up",
    "int8-po2-near": "int8-near",
}


def kernel_of(shape):
    """Draw a kernel with a channel of zeros, a tiny one, and weights on both ends and on halves of steps."""
    kernel = RNG.standard_normal(shape) * np.exp2(RNG.integers(-3, 3, shape))
    flat = kernel.reshape(-1)
    flat[:4] = 8, -8, 3.5, -2.5
    rows = kernel if kernel.ndim > 1 else kernel[None]
    if len(rows) > 3:
        rows[-1], rows[-2] = 0, rows[-2] * 1e-30
    return kernel.astype(np.float32)


def compile_in(folder, model, scheme, calibration=(), **options):
    folder.mkdir()
    onnx.save(model, folder / "source.onnx")
    made = BACKEND.compile(folder / "source.onnx", calibration, SCHEMES[scheme], folder, **options)
    return made, onnx.load(folder / "model.onnx")


def run(folder, scheme, batch):
    return BACKEND.load(folder, SCHEMES[scheme], RUNTIME)(batch)


@pytest.mark.parametrize("per_channel", [False, True], ids=["pt", "pc"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_kernels_equal_rounding_in_fractions(convention, layer, per_channel, tmp_path):
    operator, shape, position, shapes, labels, attributes = LAYERS[layer]
    kernel = kernel_of(shape)
    model = single(operator, shapes, position, kernel, **attributes)
    name = f"{convention}-{'pc' if per_channel else 'pt'}"
    calibration = RNG.standard_normal([2 if n == "n" else n for n in shapes[0]]).astype(np.float32)
    if "int4w" in convention:
        name, calibration = f"{name}-weights", np.empty((0,))
    made, compiled = compile_in(tmp_path / "out", model, name, calibration)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in compiled.graph.initializer}
    [node] = [node for node in compiled.graph.node if node.op_type == operator]
    wanted = exact_rounding(kernel, labels if per_channel else 0, CONVENTIONS[convention])
    np.testing.assert_allclose(stored[node.input[position]], wanted, rtol=2e-7, atol=0)
    assert "kernel" not in stored
    assert made.products == (1, 1)
    assert made.operators == {operator: {"integer": 1, "float": 0}}


@pytest.mark.parametrize("per_channel", [False, True], ids=["pt", "pc"])
def test_each_direction_of_a_recurrent_cell_has_grids_of_its_own(per_channel, tmp_path):
    kernels = [kernel_of(shape) for shape in ((2, 6, 3), (2, 6, 2))]
    initializers = [numpy_helper.from_array(k, name) for k, name in zip(kernels, "wr", strict=True)]
    node = helper.make_node("GRU", "xwr", ["", "y"], "gru", hidden_size=2, direction="bidirectional")
    given = helper.make_tensor_value_info("x", 1, [5, "n", 3]), helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph([node], "g", given[:1], given[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    name = f"int4w-wide-{'pc' if per_channel else 'pt'}-weights"
    made, compiled = compile_in(tmp_path / "out", model, name)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in compiled.graph.initializer}
    [found] = compiled.graph.node
    for kernel, read in zip(kernels, found.input[1:], strict=True):
        directions = np.arange(2)[:, None, None]
        labels = directions * 6 + np.arange(6)[:, None] if per_channel else directions
        np.testing.assert_allclose(stored[read], exact_rounding(kernel, labels, "wide"), rtol=2e-7, atol=0)
    assert made.products == (1, 1)


IDENTITY = np.float32([[7, 0], [0, -7]])
"""A kernel that every convention but max/7.5 and max/8 leaves as it is."""


@pytest.mark.parametrize(
    ("scheme", "ends", "given", "wanted"),
    [  # Scale 1, integers from 0: halves go to even, what is beyond the ends to the ends.
        ("int4w-narrow-pt", (0.0, 255.0), [0.5, 1.5, 2.5, -3.0, 300.0], [0, 2, 2, 0, 255]),
        # The range is widened to hold zero.
        ("int4w-narrow-pt", (51.0, 255.0), [0.4, 7.6], [0, 8]),
        # Scale 0.5, zero-point 55.
        ("int4w-narrow-pc", (-27.5, 100.0), [-99.0, -27.3, 0.2, 0.3, 101.0], [-27.5, -27.5, 0, 0.5, 100]),
        # 100 / 127 lies between 1/2 and 1, nearer to 1: log2 is -0.34.
        ("int4w-po2-up-pt", (-100.0, 3.0), [0.5, 1.5, -200.0, 200.0], [0, 2, -128, 127]),
        ("int4w-po2-near-pt", (-100.0, 3.0), [0.5, 1.5, -200.0, 200.0], [0, 2, -128, 127]),
        # 80 / 127: log2 is -0.67, nearer to 1/2. The largest values are then clipped.
        ("int4w-po2-near-pt", (-80.0, 3.0), [0.4, -80.0, 80.0], [0.5, -64, 63.5]),
        ("int4w-po2-up-pt", (-80.0, 3.0), [0.4, -80.0, 80.0], [0, -80, 80]),
        ("int4w-narrow-pt", (0.0, 0.0), [0.0], [0]),
        ("int4w-narrow-pt-weights", (0.0, 0.0), [0.3, 999.0], [0.3, 999.0]),
    ],
)  # fmt: skip
def test_activations_on_grids_done_by_hand(scheme, ends, given, wanted, tmp_path):
    model = single("MatMul", [["n", 2], ["n", 2]], 1, IDENTITY)
    compile_in(tmp_path / "out", model, scheme, np.float32([ends]))
    rows = np.float32(given)[:, None] * np.ones((1, 2), np.float32)
    expected = np.float64(wanted)[:, None] * [7.0, -7.0]
    np.testing.assert_allclose(run(tmp_path / "out", scheme, rows), expected, rtol=1e-6)


NET = """<ir_version: 8, opset_import: ["" : 17]>
net (float[n, 2, 6, 6] x) => (float[n, 3] y) {
    c = Conv<kernel_shape = [3, 3]>(x, k1, b1)
    r = Relu(c)
    m = GlobalAveragePool(r)
    f = Flatten(m)
    y = Gemm<transB = 1>(f, k2, b2)
}"""


def two_layers():
    model = onnx.parser.parse_model(NET)
    tensors = {"k1": (4, 2, 3, 3), "b1": (4,), "k2": (3, 4), "b2": (3,)}
    values = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in values.items())
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{number}"
    return model, values


def convolved(x, kernel, bias):
    """Convolve without padding, in float64."""
    patches = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    return np.einsum("ncyxij,ocij->noyx", patches, kernel) + bias[:, None, None]


def quantized(x, low, high):
    """Round to the asymmetric 8-bit grid of a range, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    return (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point) * scale


@pytest.mark.parametrize("float_layers", [(), ("Conv0",), ("Gemm4",)])
def test_a_network_of_two_layers_equals_float64(float_layers, tmp_path):
    model, values = two_layers()
    calibration, images = (RNG.normal(0.5, 1, (n, 2, 6, 6)).astype(np.float32) for n in (70, 5))
    options = {"float_layers": float_layers} if float_layers else {}
    made, _ = compile_in(tmp_path / "out", model, "int4w-full-pc", calibration, **options)
    found = run(tmp_path / "out", "int4w-full-pc", images)

    k1, k2 = (exact_rounding(values[k], along(0, values[k].shape), "full") for k in ("k1", "k2"))

    def features(x, kernel):
        return np.maximum(convolved(x, kernel, values["b1"]), 0).mean(axis=(2, 3))

    seen = features(calibration, values["k1"])
    if "Conv0" in float_layers:
        hidden = features(images, values["k1"])
    else:
        hidden = features(quantized(images, calibration.min(), calibration.max()), k1)
    if "Gemm4" in float_layers:
        wanted = hidden @ values["k2"].T + values["b2"]
    else:
        wanted = quantized(hidden, seen.min(), seen.max()) @ k2.T + values["b2"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert made.products == (2 - len(float_layers), 2)


def test_a_layer_that_is_not_in_the_graph_is_named(tmp_path):
    model, _ = two_layers()
    with pytest.raises(Refused, match="no node is called head"):
        compile_in(tmp_path / "out", model, "int8-pt", np.zeros((2, 2, 6, 6)), float_layers=["Conv0", "head"])


def test_ranges_need_samples(tmp_path):
    model, _ = two_layers()
    with pytest.raises(Refused, match="calibration samples, and there are none"):
        compile_in(tmp_path / "out", model, "int8-pt", np.zeros((0, 2, 6, 6), np.float32))


def test_a_range_that_is_infinite_is_refused(tmp_path):
    model = single("MatMul", [["n", 2], ["n", 2]], 1, IDENTITY)
    with pytest.raises(Refused, match=r"tensor x goes from -inf to 1\.0"):
        compile_in(tmp_path / "out", model, "int8-pt", np.float32([[-np.inf, 1]]))


SEVERAL = """<ir_version: 8, opset_import: ["" : 17]>
net (int64[n, 3] tokens, float[n, 4] state) => (float[n, 3, 3] scores, float[n, 4] next)
<float[5, 2] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10},
 float[2, 2] k = {7, 1, 2, 7},
 float[2, 2] q = {7, 3, 0, 7},
 float[4, 4] r = {7, 0, 0, 0, 0, 7, 0, 0, 0, 0, 7, 0, 0, 0, 0, 7}> {
    embedded = Gather(table, tokens)
    queries = MatMul(embedded, k)
    keys = MatMul(embedded, q)
    turned = Transpose<perm = [0, 2, 1]>(keys)
    scores = MatMul(queries, turned)
    next = MatMul(state, r)
}"""


@pytest.mark.parametrize(("scheme", "products"), [("int8-pt", (4, 4)), ("int4w-narrow-pt-weights", (3, 3))])
def test_several_inputs_and_outputs_and_products_of_two_activations(scheme, products, tmp_path):
    model = onnx.parser.parse_model(SEVERAL)
    batch = {
        "tokens": np.array([[0, 1, 4], [2, 2, 3]]),
        "state": np.float32([[0, 63.75, 1, 255], [9, 8, 7, 6]]),
    }
    made, compiled = compile_in(tmp_path / "out", model, scheme, batch)
    scores, following = run(tmp_path / "out", scheme, batch)
    table, k, q = np.arange(1, 11.0).reshape(5, 2), np.array([[7, 1], [2, 7]]), np.array([[7, 3], [0, 7]])
    embedded = table[batch["tokens"]]
    wanted = (embedded @ k) @ (embedded @ q).transpose(0, 2, 1)
    np.testing.assert_allclose(scores, wanted, rtol=0 if "weights" in scheme else 0.02, atol=1e-3)
    state = batch["state"] if "weights" in scheme else np.rint(batch["state"])
    np.testing.assert_allclose(following, 7 * state, rtol=1e-6)
    assert made.products == products
    # embedded, queries, turned and state: one grid a tensor, however many read it.
    rounds = sum(node.op_type == "Round" for node in compiled.graph.node)
    assert rounds == (0 if "weights" in scheme else 4)


def test_batch_norms_are_folded_before_kernels_are_rounded(tmp_path):
    kernel = kernel_of((4, 2, 3, 3))
    model = single("Conv", [["n", 2, 6, 6], ["n", 4, 4, 4]], 1, kernel)
    model.graph.node[0].output[0] = "c"
    gain, shift, mean = RNG.uniform(0.5, 2, (3, 4)).astype(np.float32)
    variance = np.float32([0.25, 1, 4, 16])
    for name, value in {"g": gain, "s": shift, "m": mean, "v": variance}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.node.append(helper.make_node("BatchNormalization", list("cgsmv"), ["y"], "bn", epsilon=0.0))
    _, compiled = compile_in(tmp_path / "out", model, "int4w-narrow-pt-weights")
    [node] = compiled.graph.node
    assert (node.op_type, node.name) == ("Conv", "layer")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in compiled.graph.initializer}
    folded = kernel * (gain / np.sqrt(variance)).reshape(-1, 1, 1, 1)
    scale = np.abs(folded).max() / 7
    np.testing.assert_allclose(stored[node.input[1]], np.rint(folded / scale) * scale, atol=1e-5)


BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
net (bool wide, float[n, 2] x) => (float[n, 2] y) <float[2, 2] k = {7, 1, 2, 7}> {
    first = MatMul(x, k)
    y = If(wide) <
        then_branch = a () => (float[n, 2] z) { z = MatMul(first, k) },
        else_branch = b () => (float[n, 2] z) { z = Relu(first) }
    >
}"""


def test_products_in_branches_stay_in_float_and_count_as_such(tmp_path):
    model = onnx.parser.parse_model(BRANCHES)
    inputs = {"wide": np.array(True), "x": np.float32([[1, 2]])}
    made, _ = compile_in(tmp_path / "out", model, "int4w-narrow-pc-weights", {})
    assert made.products == (1, 2)
    assert made.operators["MatMul"] == {"integer": 1, "float": 1}
    k = np.array([[7, 1], [2, 7]])
    np.testing.assert_allclose(run(tmp_path / "out", "int4w-narrow-pc-weights", inputs), [[1, 2]] @ k @ k)


def test_a_graph_without_products_tells_so(tmp_path):
    source = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
    made, _ = compile_in(tmp_path / "out", onnx.parser.parse_model(source), "int4w-wide-pt", np.zeros(0))
    assert made.products == (0, 0)
    assert run(tmp_path / "out", "int4w-wide-pt", np.float32([-1, 2])).tolist() == [0, 2]


def test_products_of_other_types_stay_as_they_are(tmp_path):
    source = """<ir_version: 8, opset_import: ["" : 17]> g (double[n, 2] x) => (double[n, 2] y)
    <double[2, 2] k = {1, 0.3, 0.3, 1}> { y = MatMul(x, k) }"""
    made, _ = compile_in(tmp_path / "out", onnx.parser.parse_model(source), "int8-pt", np.ones((1, 2)))
    assert made.products == (0, 1)
    assert run(tmp_path / "out", "int8-pt", np.ones((1, 2))).tolist() == [[1.3, 1.3]]


def test_a_worker_needs_no_jax():
    file = Path(sys.modules[type(BACKEND).__module__].__file__)
    code = f"""import runpy, sys
worker = runpy.run_path({worker.__file__!r}, run_name="worker")
assert len(worker["load_backend"]({str(file)!r}).schemes) == {len(SCHEMES)}
import qt_jax.export.sessions, qt_jax.export.graph
assert not {{"jax", "flax"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
