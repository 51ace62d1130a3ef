"""Test LiteRT: the description, grids and rewrites anywhere; the real toolchain if it is installed."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from qt_jax.backends import environments, evaluate, litert, saved_model, tflite
from qt_jax.backends.litert import BACKEND
from qt_jax.backends.protocol import KINDS, Refused
from qt_jax.backends.registry import file_of
from qt_jax.backends.rows import code
from qt_jax.backends.tflite import channels_last, dequantize, operators, quantize
from tests.qt_jax.vendor_networks import CUBE, RECURRENT, SOUND_AND_IMAGE, samples

SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((24, 3, 9, 8)).astype(np.float32)


def pooled(activation: str) -> onnx.ModelProto:
    """Return a classifier with a padded max-pooling behind an activation."""
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 3, 9, 8] input) => (float[batch, 4] logits) {{
            stem = Conv<pads = [1, 1, 1, 1]>(input, kernel)
            active = {activation}(stem)
            pool = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 1, 1]>(active)
            mean = GlobalAveragePool(pool)
            flat = Flatten(mean)
            logits = MatMul(flat, weights)
        }}""")
    for name, shape in (("kernel", (12, 3, 3, 3)), ("weights", (12, 4))):
        weights = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    return model


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images})[0]


def test_its_description_is_complete_and_pinned():
    assert BACKEND.kind in KINDS
    assert BACKEND.available() is None
    assert all(requirement.count("==") == 1 for requirement in BACKEND.environment.requirements)
    assert {scheme.source for scheme in BACKEND.schemes} == {None, ("litert", "fp32")}
    assert SCHEMES["int8-dynamic"].dynamic and SCHEMES["int8-dynamic"].calibration is None
    assert [runtime.timed for runtime in BACKEND.runtimes] == [True, False]


def test_all_its_modules_decide_what_it_compiles_to():
    trees = code(file_of(BACKEND))
    for name in ("write_saved_model", "quantize_file", "open_interpreter", "LiteRT"):
        [_] = [tree for tree in trees if f"Def(name='{name}'" in tree]


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_quantizing_rounds_half_away_from_zero_and_saturates(dtype):
    limits = np.iinfo(dtype)
    details = {"dtype": dtype, "quantization": (0.5, -3)}
    x = np.float32([-1.25, -0.25, 0, 0.25, 0.75, 1e6, -1e6])
    q = quantize(x, details)
    assert q.dtype == dtype
    np.testing.assert_array_equal(q, [-6, -4, -3, -2, -1, limits.max, limits.min])


def test_a_grid_point_survives_the_round_trip():
    details = {"dtype": np.int8, "quantization": (0.037, 11)}
    points = np.arange(-128, 128).astype(np.int8)
    x = dequantize(points, details)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(quantize(x, details), points)


def test_float_tensors_pass_unchanged():
    details = {"dtype": np.float32, "quantization": (0.0, 0)}
    assert quantize(IMAGES, details) is IMAGES
    assert dequantize(IMAGES, details) is IMAGES


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5), (2, 5)),
        ((2, 3, 7), (2, 7, 3)),
        ((2, 3, 8, 9), (2, 8, 9, 3)),
        ((1, 2, 3, 4, 5), (1, 3, 4, 5, 2)),
    ],
)
def test_channels_come_last(shape, expected):
    assert channels_last(np.zeros(shape)).shape == expected


def test_operators_are_told_apart_by_what_they_compute_on():
    types = ["float32", "int8", "int32", "float32", "int8", "int32"]
    tensors = [{"index": index, "dtype": np.dtype(name).type} for index, name in enumerate(types)]
    steps = [
        {"op_name": "QUANTIZE", "inputs": [0], "outputs": [1]},
        {"op_name": "CONV_2D", "inputs": [1, 4, 2], "outputs": [1]},
        {"op_name": "CONV_2D", "inputs": [0, 4, -1], "outputs": [3]},
        {"op_name": "CONV_2D", "inputs": [0, 3, -1], "outputs": [3]},
        {"op_name": "SHAPE", "inputs": [5], "outputs": [2, -1]},
        {"op_name": "DEQUANTIZE", "inputs": [1], "outputs": [0]},
    ]
    interpreter = SimpleNamespace(get_tensor_details=lambda: tensors, _get_ops_details=lambda: steps)
    assert operators(interpreter) == {
        "QUANTIZE": {"float": 1},
        "CONV_2D": {"integer": 2, "float": 1},
        "SHAPE": {"integer": 1},
        "DEQUANTIZE": {"float": 1},
    }


def test_nodes_get_names_that_tensorflow_takes():
    model = pooled("Relu")
    model.graph.node[0].name, model.graph.node[1].name = "Softmax@0", "stem/conv.1"
    assert [node.name for node in saved_model.fix_shape(model, {"input": (1, 3, 9, 8)}).graph.node][:2] == [
        "Softmax_0",
        "stem/conv.1",
    ]


def test_the_batch_is_fixed():
    model = saved_model.fix_shape(pooled("Relu"), {"input": (1, 3, 9, 8)})
    [value] = model.graph.input
    assert [dimension.dim_value for dimension in value.type.tensor_type.shape.dim] == [1, 3, 9, 8]
    [output] = model.graph.output
    assert [dimension.dim_value for dimension in output.type.tensor_type.shape.dim] == [1, 4]
    assert run(model, IMAGES[:1]).shape == (1, 4)


@pytest.mark.parametrize(("activation", "rewritten"), [("Relu", True), ("Sigmoid", True), ("Tanh", False)])
def test_zeros_pad_a_pooling_only_where_nothing_is_negative(activation, rewritten):
    model = pooled(activation)
    before = run(model, IMAGES)
    saved_model.pad_with_zeros(model.graph)
    onnx.checker.check_model(model)
    assert ("Pad" in [node.op_type for node in model.graph.node]) == rewritten
    np.testing.assert_array_equal(run(model, IMAGES), before)


GELUS = {
    "x(1 + erf)/2": ("product = Mul(x, shifted)", "logits = Mul(product, half)"),
    "half first": ("halved = Mul(half, x)", "logits = Mul(halved, shifted)"),
    "x last": ("halved = Mul(shifted, half)", "logits = Mul(halved, x)"),
}


@pytest.mark.parametrize("scale", ["Div(x, root)", "Mul(inverse, x)"])
@pytest.mark.parametrize("form", GELUS)
def test_a_gelu_made_of_erf_becomes_one_node(form, scale):
    model = erf(f"scaled = {scale}", "curve = Erf(scaled)", "shifted = Add(curve, one)", *GELUS[form])
    before = run(model, IMAGES[:1])
    model = saved_model.fuse_gelus(model)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node][-1] == "Gelu"
    assert "Erf" not in [node.op_type for node in model.graph.node]
    np.testing.assert_allclose(run(model, IMAGES[:1]), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "tail",
    [
        ("shifted = Add(curve, half)", "product = Mul(x, shifted)", "logits = Mul(product, half)"),
        ("shifted = Add(curve, one)", "product = Mul(x, shifted)", "logits = Mul(product, root)"),
        ("shifted = Add(curve, one)", "product = Mul(x, shifted)", "logits = Add(product, curve)"),
    ],
)
def test_what_is_not_a_gelu_stays(tail):
    model = erf("scaled = Div(x, root)", "curve = Erf(scaled)", *tail)
    assert saved_model.fuse_gelus(model) is model


def test_around_a_gelu_an_older_graph_is_made_one_of_opset_20():
    """Convert a mean whose axes are an attribute, as they are until opset 17."""
    gelu = ("scaled = Div(x, root)", "curve = Erf(scaled)", "shifted = Add(curve, one)")
    last = ("product = Mul(x, shifted)", "y = Mul(product, half)", "mean = ReduceMean<axes = [2]>(y)")
    model = erf(*gelu, *last, "logits = Sub(y, mean)")
    before = run(model, IMAGES[:1])
    newer = saved_model.prepare_graph(model, {"input": IMAGES[:1].shape})
    onnx.checker.check_model(newer, full_check=True)
    assert [node.op_type for node in newer.graph.node] == ["Neg", "Gelu", "ReduceMean", "Sub"]
    np.testing.assert_allclose(run(newer, IMAGES[:1]), before, rtol=0, atol=1e-6)


def erf(*lines: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 3, 9, 8] input) => (float[batch, 3, 9, 8] logits)
        <float one = {1.0}, float half = {0.5}, float root = {1.4142135}, float inverse = {0.70710677}>
        { x = Neg(input) """
        + "\n".join(lines)
        + "}"
    )


def test_a_class_token_of_an_open_batch_is_a_constant_of_one_image():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 6, 4] input) => (float[batch, 7, 4] logits)
        <float[1, 1, 4] token = {1.0, 2.0, 3.0, 4.0}, int64[1] zero = {0}, int64[2] sizes = {1, 4}> {
            shape = Shape(input)
            batch = Gather(shape, zero)
            wanted = Concat<axis = 0>(batch, sizes)
            tokens = Expand(token, wanted)
            logits = Concat<axis = 1>(tokens, input)
        }""")
    images = IMAGES[:1, 0, :6, :4]
    before = run(model, images)
    lean = saved_model.prepare_graph(model, {"input": (1, 6, 4)})
    assert [node.op_type for node in lean.graph.node] == ["Concat"]
    onnx.checker.check_model(lean)
    np.testing.assert_array_equal(run(lean, images), before)


class FakeConverter:
    """Record the settings. `convert` reads the representative data, or fails."""

    error: Exception | None = None

    @classmethod
    def from_saved_model(cls, path):
        converter = cls()
        converter.target_spec = SimpleNamespace(supported_ops=None)
        converter.optimizations, converter.representative_dataset = [], None
        converter._experimental_disable_per_channel = False
        cls.last = converter
        return converter

    def convert(self):
        if self.error:
            raise self.error
        self.shapes = (
            [batch[0].shape for batch in self.representative_dataset()] if self.representative_dataset else []
        )
        return b"TFL3"


@pytest.fixture
def fake_converter(monkeypatch):
    kernels = ("TFLITE_BUILTINS_INT8", "EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8")
    tensorflow = ModuleType("tensorflow")
    tensorflow.int8, tensorflow.int16 = "int8", "int16"
    tensorflow.lite = SimpleNamespace(
        TFLiteConverter=FakeConverter,
        Optimize=SimpleNamespace(DEFAULT="default"),
        OpsSet=SimpleNamespace(**{name: name for name in kernels}),
    )
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    monkeypatch.setattr(FakeConverter, "error", None)
    return FakeConverter


@pytest.mark.parametrize(
    ("name", "edge", "per_tensor", "calibrated"),
    [
        ("fp32", None, False, False),
        ("int8-pc-minmax", "int8", False, True),
        ("int8-pt-minmax", "int8", True, True),
        ("int16act-pc-minmax", "int16", False, True),
        ("int8-dynamic", None, False, False),
    ],
)
def test_each_scheme_tells_the_converter_what_its_name_says(
    fake_converter, name, edge, per_tensor, calibrated
):
    assert litert._convert("model", IMAGES, SCHEMES[name], {"input": "input"}) == b"TFL3"
    told = fake_converter.last
    assert told.optimizations == ([] if name == "fp32" else ["default"])
    assert told._experimental_disable_per_channel == per_tensor
    assert getattr(told, "inference_input_type", None) == getattr(told, "inference_output_type", None) == edge
    assert told.shapes == ([(1, 9, 8, 3)] * len(IMAGES) if calibrated else [])


def test_what_the_converter_does_not_take_is_refused(fake_converter, monkeypatch):
    monkeypatch.setattr(fake_converter, "error", RuntimeError("not yet supported for op: 'SQRT'"))
    with pytest.raises(Refused, match=r"TFLite converter: .*SQRT"):
        litert._convert("model", IMAGES, SCHEMES["int16act-pc-minmax"], {"input": "input"})


@pytest.mark.parametrize("unknown", [False, True])
def test_an_error_of_onnx2tf_is_a_refusal_with_its_message(unknown, monkeypatch, tmp_path):
    def convert(path, **settings):
        print("\x1b[31mERROR:\x1b[0m Foo OP  is not implemented")
        raise ModuleNotFoundError("No module named 'onnx2tf.ops.Foo'") if unknown else SystemExit(1)

    fake = ModuleType("onnx2tf")
    fake.convert = convert
    monkeypatch.setitem(sys.modules, "onnx2tf", fake)
    monkeypatch.chdir(tmp_path)
    onnx.save(pooled("Relu"), "net.onnx")
    with pytest.raises(Refused, match=r"onnx2tf\.ops\.Foo" if unknown else "Foo OP is not implemented"):
        saved_model.write_saved_model(tmp_path / "net.onnx", IMAGES, tmp_path / "saved_model")
    assert (tmp_path / saved_model.DUMMY_IMAGES[0]).exists()


CUBIC = np.random.default_rng(3).normal(size=(1, 4, 4, 4)).astype(np.float32)


def test_an_output_is_found_by_its_values_and_not_by_its_sizes():
    found = [{"other": -CUBIC, "map": CUBIC.transpose(0, 2, 3, 1)}, {"other": CUBIC, "map": CUBIC}]
    assert saved_model._locate("y", [CUBIC], found[:1])[:2] == ("map", [0, 3, 1, 2])
    assert saved_model._locate("y", [CUBIC], found[1:])[:2] == ("other", [0, 1, 2, 3])
    mirrored = CUBIC.transpose(0, 3, 2, 1)
    with pytest.raises(Refused, match="no output of its TFLite file agrees with 'y'"):
        saved_model._locate("y", [CUBIC, CUBIC], [{"map": mirrored}, {"map": CUBIC}])


def test_orders_of_axes_have_the_channels_last_one_first():
    assert saved_model._orders((1, 2, 2, 2), (1, 2, 2, 2))[0] == [0, 3, 1, 2]
    assert saved_model._orders((1, 8, 9, 3), (1, 3, 8, 9)) == [[0, 3, 1, 2]]
    assert saved_model._orders((1, 5), (1, 5)) == [[0, 1]]
    assert saved_model._orders((1, 6), (1, 2, 3)) == [[0, 1]]
    assert saved_model._orders((1, 6), (1, 2, 4)) == []


def test_a_tensor_without_a_grid_takes_and_gives_its_own_type():
    details = {"dtype": np.int32, "quantization": (0.0, 0)}
    tokens = np.array([[3, 7]])
    assert quantize(tokens, details).dtype == np.int32
    assert dequantize(np.int32([3]), details).dtype == np.int32


def graphs(monkeypatch, *operators, types, constant):
    found = tflite.Subgraph(operators, types, constant)
    for module in (litert, tflite):
        monkeypatch.setattr(module, "subgraphs", lambda model: iter([found]))


def test_weights_count_where_they_are_stored_as_integers(monkeypatch):
    operators = (
        ("DEQUANTIZE", [0], [1]),
        ("CONV_2D", [4, 1], [4]),
        ("FULLY_CONNECTED", [4, 2], [4]),
        ("FULLY_CONNECTED", [4, 0], [4]),
        ("BATCH_MATMUL", [4, 4], [4]),
        ("FULLY_CONNECTED", [3, 0], [3]),
    )
    types = ["INT4", "FLOAT32", "FLOAT32", "INT8", "FLOAT32"]
    graphs(monkeypatch, *operators, types=types, constant=[True, False, True, False, False])
    assert tflite.products("model", SCHEMES["fp32"]) is None
    assert tflite.products("model", SCHEMES["int4w-aeq-stored"]) == (3, 4)  # no product of two activations
    assert tflite.products("model", SCHEMES["int4w-aeq-dynamic"]) == (3, 5)
    assert tflite.products("model", SCHEMES["int4w-aeq-pc-minmax"]) == (1, 5)


def test_a_loop_is_refused_before_it_ends_the_process(monkeypatch):
    graphs(monkeypatch, ("WHILE", [0], [0]), types=["FLOAT32"], constant=[False])
    with pytest.raises(Refused, match="WHILE"):
        litert._refuse_loops("model")


@pytest.mark.vendor
def test_the_real_toolchain_runs_every_scheme_on_both_runtimes(tmp_path):
    if reason := environments.missing(BACKEND.environment):
        pytest.skip(reason)
    model = pooled("Relu")
    labels = run(model, IMAGES).argmax(1)
    rows = evaluate(model, IMAGES, (IMAGES, labels), backends=["litert"], folder=tmp_path)
    rows = {(row["scheme"], row["runtime"]): row for row in rows if row["backend"] == "litert"}
    assert len(rows) == len(BACKEND.schemes) * len(BACKEND.runtimes)
    for (scheme, _), row in rows.items():
        # TensorFlow's dynamic scheme leaves kernels of fewer than 1,024 elements in float, here all of them.
        assert row["status"] == ("invalid" if scheme == "int8-dynamic" else "ok"), row["reason"]
    for runtime in BACKEND.runtimes:
        assert rows["fp32", runtime.name]["sqnr_db"] > 100
        assert rows["int8-pc-minmax", runtime.name]["sqnr_db"] > 25
        assert rows["int16act-pc-minmax", runtime.name]["sqnr_db"] > 30
        assert rows["int8-aeq-pc-minmax", runtime.name]["sqnr_db"] > 25
    static = rows["int8-pt-minmax", "reference"]["operators"]
    assert set().union(*static.values()) == {"integer"}
    four = {name: row for (name, _), row in rows.items() if name.startswith("int4w")}
    assert {(*row["products"].values(),) for row in four.values()} == {(2, 2)}


def own_rows(model, folder, schemes, runtimes=None):
    if reason := environments.missing(BACKEND.environment):
        pytest.skip(reason)
    rows = evaluate(
        model,
        samples(model, 24, 1),
        samples(model, 16, 2),
        backends=["litert"],
        schemes=schemes,
        runtimes=runtimes,
        folder=folder,
    )
    return {(row["scheme"], row["runtime"]): row for row in rows if row["backend"] == "litert"}


@pytest.mark.vendor
@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (CUBE, {"map": [8, 8, 8], "logits": [5]}),
        (SOUND_AND_IMAGE, {"frames": [6, 12], "logits": [5]}),
    ],
    ids=["cube", "sound and image"],
)
def test_every_output_has_the_layout_of_the_onnx_graph(model, shapes, tmp_path):
    least = {"fp32": 100, "int8-pc-minmax": 20, "int8-aeq-pc-minmax": 20, "int4w-aeq-stored": 10}
    for (scheme, _), row in own_rows(model, tmp_path, list(least)).items():
        assert row["status"] == "ok", row["reason"]
        assert {f["output"]: f["shape"] for f in row["fidelity"]} == shapes
        assert all(f["sqnr_db"] > least[scheme] for f in row["fidelity"])


@pytest.mark.vendor
def test_a_recurrent_cell_is_counted_inside_its_loop(tmp_path):
    schemes = ["int8-pc-minmax", "int8-aeq-pc-minmax", "int4w-aeq-stored"]
    rows = own_rows(RECURRENT, tmp_path, schemes, ["reference"])
    for scheme in schemes[:2]:
        assert rows[scheme, "reference"]["status"] == "refused"
        assert "loop" in rows[scheme, "reference"]["reason"]
    stored = rows["int4w-aeq-stored", "reference"]
    assert stored["status"] == "ok", stored["reason"]
    assert stored["products"]["quantized"] == stored["products"]["total"] > 1


@pytest.mark.vendor
@pytest.mark.parametrize("granularity", ["pt", "pc"])
def test_four_bit_kernels_are_on_the_grid_of_seven_steps(granularity, tmp_path):
    """Compare with numpy on a network that is linear but for 8-bit grids: kernels on [-7, 7], max|w| / 7."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 6, 1, 1)).astype(np.float32) * np.float32([1, 2, 4, 8])[:, None, None, None]
    images = rng.normal(size=(48, 6, 8, 8)).astype(np.float32) + rng.normal(size=(48, 6, 1, 1)).astype(
        np.float32
    )
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 6, 8, 8] input) => (float[batch, 4, 8, 8] map) { map = Conv(input, kernel) }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "kernel"))
    if reason := environments.missing(BACKEND.environment):
        pytest.skip(reason)
    scheme = f"int4w-aeq-{granularity}-minmax"
    scale = np.abs(kernel).max(axis=(1, 2, 3) if granularity == "pc" else None, keepdims=True) / 7

    def answers(weights):
        return np.einsum("bchw,oc->bohw", images.astype(np.float64), weights[:, :, 0, 0])

    float_map, grid = answers(kernel), answers(np.round(kernel / scale) * scale)
    expected = 10 * np.log10((float_map**2).sum() / ((grid - float_map) ** 2).sum())
    rows = evaluate(
        model, images, images, backends=["litert"], schemes=[scheme], runtimes=["reference"], folder=tmp_path
    )
    [row] = [row for row in rows if row["backend"] == "litert"]
    assert row["sqnr_db"] == pytest.approx(expected, abs=0.5)
