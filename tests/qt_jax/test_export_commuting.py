"""Check that batch norm reaches its layer past what it commutes with, and stays where it does not commute."""

import flax.linen as nn
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import qt_jax as qt
from experiments.models.speed_net import SpeedNet
from qt_jax.export import commuting, folding, graph, to_onnx, verify
from qt_jax.export.qdq import insert_qdq
from qt_jax.export.ranges import tensor_ranges
from qt_jax.export.verification import fake_quant_forward, integer_kernels, parity

GRAPHS = 150
CHANNELS = 4
NORM = "params/n/scale params/n/bias batch_stats/n/mean batch_stats/n/var"
CONV = ("Conv", "input params/c/kernel", "x", {})
RNG = np.random.default_rng(0)


def normal(*shape, rng=RNG):
    return rng.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


def statistics(channels=CHANNELS, sign=1.0, name="n", rng=RNG):
    scale = rng.uniform(0.5, 1.5, channels).astype(np.float32)
    scale[0] *= sign
    variance = rng.uniform(0.1, 2, channels).astype(np.float32)
    return {
        f"params/{name}/scale": scale,
        f"params/{name}/bias": normal(channels, rng=rng),
        f"batch_stats/{name}/mean": normal(channels, rng=rng),
        f"batch_stats/{name}/var": variance,
    }


def norm(source, output, name="n"):
    return ("BatchNormalization", f"{source} {NORM.replace('/n/', f'/{name}/')}", output, {"epsilon": 1e-3})


def folded(model):
    """Fold as `to_onnx` does."""
    moved = folding.fold_affine(folding.fold_batch_norm(commuting.move_to_layers(model)))
    return commuting.fold_into_next(commuting.activate_before_pools(moved))


WINDOW = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ([("MaxPool", "x", "y", WINDOW)], ["MaxPool"]),
        ([("AveragePool", "x", "y", WINDOW)], ["AveragePool"]),
        ([("AveragePool", "x", "y", WINDOW | {"ceil_mode": 1})], ["AveragePool"]),
        ([("GlobalMaxPool", "x", "y", {})], ["GlobalMaxPool"]),
        (
            [("GlobalAveragePool", "x", "p", {}), ("Flatten", "p", "y", {"axis": 1})],
            ["GlobalAveragePool", "Flatten"],
        ),
        ([("ReduceMean", "x axes", "y", {"keepdims": 0})], ["ReduceMean"]),
        ([("ReduceMax", "x axes", "y", {"keepdims": 1})], ["ReduceMax"]),
        (
            [
                ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
                ("Transpose", "t", "y", {"perm": [0, 3, 1, 2]}),
            ],
            [],
        ),
        ([("Reshape", "x sequence", "y", {})], ["Reshape"]),
        ([("Resize", "x  scales", "y", {"mode": "nearest"})], ["Resize"]),
        ([("Resize", "x  scales", "y", {"mode": "linear"})], ["Resize"]),
        ([("Resize", "x  scales", "y", {"mode": "cubic"})], ["Resize"]),
    ],
)
def test_a_norm_moves_before_what_it_commutes_with(between, expected, build, check_equal):
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3), "axes": np.array([2, 3])} | statistics()
    constants["sequence"] = np.array([2, CHANNELS, 36])
    constants["scales"] = np.float32([1, 1, 2, 1.5])
    nodes = [CONV, *between, norm("y", "output")]
    probe = build([*nodes[:-1], ("Identity", "y", "output", {})], constants, [2, 3, 8, 8], 4, 18)
    rank = len(graph.shapes(probe)["y"])
    model = build(nodes, constants, [2, 3, 8, 8], rank, 18)
    after = folded(model)
    found = [operator for operator in operators(after) if operator != "Identity"]
    assert found == ["Conv", *expected]
    check_equal(model, after, normal(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("between", "sign"),
    [
        ([("MaxPool", "x", "y", WINDOW)], -1.0),
        ([("MaxPool", "x", "y", WINDOW)], 0.0),
        ([("GlobalMaxPool", "x", "y", {})], -1.0),
        ([("AveragePool", "x", "y", WINDOW | {"count_include_pad": 1})], 1.0),
        ([("Relu", "x", "y", {})], 1.0),
        ([("MaxPool", "x", "m", WINDOW), ("Relu", "m", "y", {})], 1.0),
    ],
)
def test_a_norm_stays_behind_what_it_does_not_commute_with(between, sign, build, check_equal):
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3)} | statistics(sign=sign)
    model = build([CONV, *between, norm("y", "output")], constants, [2, 3, 8, 8], 4)
    moved = commuting.move_to_layers(model)
    assert operators(moved) == operators(model)
    check_equal(model, moved, normal(2, 3, 8, 8))


@pytest.mark.parametrize(("shape", "target"), [((5,), (9,)), ((4, 5, 3), (4, 5, 4))])
def test_a_scale_behind_channels_that_are_interpolated_stays(shape, target):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x) if x.ndim == 2 else nn.Conv(6, (3, 3))(x)
            x = jax.image.resize(x, (len(x), *target), "linear", antialias=False)
            return x * self.param("gain", nn.initializers.normal(), (1,) * (x.ndim - 1) + target[-1:])

    x = normal(3, *shape)
    variables = Net().init(jax.random.key(0), x)
    verify(to_onnx(Net().apply, variables, shape), Net().apply, variables, x, batch_sizes=(1, 3))


def test_nothing_moves_where_another_node_reads_what_lies_between(build, check_equal):
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3)} | statistics()
    nodes = [CONV, ("MaxPool", "x", "y", WINDOW), norm("y", "z"), ("Add", "y z", "output", {})]
    model = build(nodes, constants, [2, 3, 8, 8], 4)
    assert operators(commuting.move_to_layers(model)) == operators(model)
    check_equal(model, folded(model), normal(2, 3, 8, 8))


def test_nothing_moves_that_reaches_no_layer(build):
    nodes = [("MaxPool", "input", "y", WINDOW), norm("y", "output")]
    model = build(nodes, statistics(), [2, CHANNELS, 8, 8], 4)
    assert operators(commuting.move_to_layers(model)) == operators(model)


def test_a_gain_passes_an_average_that_counts_padding_and_a_shift_does_not(build, check_equal):
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3), "gain": normal(CHANNELS, 1, 1)}
    pool = ("AveragePool", "x", "y", WINDOW | {"count_include_pad": 1})
    for operator, expected in (("Mul", ["Conv", "AveragePool"]), ("Add", ["Conv", "AveragePool", "Add"])):
        model = build([CONV, pool, (operator, "gain y", "output", {})], constants, [2, 3, 8, 8], 4)
        assert operators(folded(model)) == expected
        check_equal(model, folded(model), normal(2, 3, 8, 8))


def test_arithmetic_moves_in_its_order(build, check_equal):
    """A batch norm written out behind a pool: each operator settles on the one before."""
    column = RNG.uniform(0.5, 2, (CHANNELS, 1, 1)).astype(np.float32)
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3), "shift": normal(CHANNELS, 1, 1)}
    nodes = [
        CONV,
        ("MaxPool", "x", "y", WINDOW),
        ("Sub", "y shift", "a", {}),
        ("Div", "a column", "b", {}),
        ("Mul", "two b", "c", {}),
        ("Add", "shift c", "output", {}),
    ]
    model = build(nodes, constants | {"column": column, "two": np.float32(2)}, [2, 3, 8, 8], 4)
    assert operators(folded(model)) == ["Conv", "MaxPool"]
    check_equal(model, folded(model), normal(2, 3, 8, 8))


@pytest.mark.parametrize("same", [True, False])
def test_a_norm_behind_a_flatten_moves_if_a_channel_has_one_gain(same, build, check_equal):
    """The features of a channel follow each other; a norm that varies among them folds into the Gemm."""
    numbers = statistics(CHANNELS if same else CHANNELS * 36)
    if same:
        numbers = {name: value.repeat(36) for name, value in numbers.items()}
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3), "params/h/kernel": normal(CHANNELS * 36, 5)}
    nodes = [
        CONV,
        ("Flatten", "x", "y", {"axis": 1}),
        norm("y", "z"),
        ("Gemm", "z params/h/kernel", "output", {}),
    ]
    model = build(nodes, constants | numbers, [2, 3, 8, 8])
    moved = commuting.move_to_layers(model)
    assert operators(moved).index("BatchNormalization") == (1 if same else 2)
    assert operators(folded(model)) == ["Conv", "Flatten", "Gemm"]
    check_equal(model, folded(model), normal(2, 3, 8, 8))


def test_the_rows_of_a_gemm_that_become_an_image_repeat_the_norm(build, check_equal):
    constants = {"params/c/kernel": normal(3, CHANNELS * 6), "image": np.array([2, 2, 3, CHANNELS])}
    nodes = [
        ("Gemm", "input params/c/kernel", "x", {}),
        ("Reshape", "x image", "r", {}),
        ("Transpose", "r", "y", {"perm": [0, 3, 1, 2]}),
        norm("y", "output"),
    ]
    model = build(nodes, constants | statistics(), [2, 3], 4)
    assert operators(folded(model)) == ["Gemm", "Reshape", "Transpose"]
    check_equal(model, folded(model), normal(2, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_norms_and_scales_fold_into_a_product_of_sequences(bias, build, check_equal):
    constants = {"params/c/kernel": normal(3, CHANNELS), "params/c/bias": normal(CHANNELS)} | statistics()
    nodes = [
        ("MatMul", "input params/c/kernel", "m", {}),
        *[("Add", "m params/c/bias", "x", {})] * bias,
        ("Transpose", "x" if bias else "m", "t", {"perm": [0, 2, 1]}),
        norm("t", "n"),
        ("Transpose", "n", "y", {"perm": [0, 2, 1]}),
        ("Div", "y root", "output", {}),
    ]
    model = build(nodes, constants | {"root": np.float32(3)}, [2, 5, 3], 3)
    moved = commuting.move_to_layers(model)
    assert [operator for operator in operators(moved) if operator != "Identity"] == ["MatMul", "Add"]
    values = graph.constants(moved)
    kernel = next(node.input[1] for node in moved.graph.node if node.op_type == "MatMul")
    gain = constants["params/n/scale"] / np.sqrt(constants["batch_stats/n/var"] + 1e-3) / 3
    np.testing.assert_allclose(values.gains[kernel], gain, rtol=1e-6)
    check_equal(model, moved, normal(2, 5, 3))


def test_a_kernel_that_two_products_share_is_not_copied_for_a_scale(build):
    nodes = [
        ("MatMul", "input w", "x", {}),
        ("Mul", "x half", "y", {}),
        ("MatMul", "y w", "output", {}),
    ]
    model = build(nodes, {"w": normal(4, 4), "half": np.float32(0.5)}, [2, 5, 4], 3)
    assert operators(commuting.move_to_layers(model)) == operators(model)


@pytest.mark.parametrize("pads", [0, 1])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_without_a_layer_before_it_folds_into_the_next(pads, group, bias, build, check_equal):
    constants = {"params/c/kernel": normal(6, CHANNELS // group, 3, 3), "params/c/bias": normal(6)}
    layer = ("Conv", "n params/c/kernel" + " params/c/bias" * bias, "output", {"group": group})
    layer[3].update(pads=[pads] * 4)
    model = build([norm("input", "n"), layer], constants | statistics(), [2, CHANNELS, 8, 8], 4)
    after = folded(model)
    assert operators(after) == ["Conv"] if not pads else ["BatchNormalization", "Conv"]
    check_equal(model, after, normal(2, CHANNELS, 8, 8))
    if not pads:
        values = graph.constants(after)
        kernel, added = after.graph.node[0].input[1:]
        assert (values.flax_path(kernel), values.flax_path(added)) == ("c/kernel", "c/bias")
        assert kernel not in values.gains


@pytest.mark.parametrize("transposed", [0, 1])
def test_normalised_rows_fold_into_a_gemm(transposed, build, check_equal):
    shape = (5, 4) if transposed else (4, 5)
    constants = {"w": normal(*shape), "mean": normal(4), "std": np.float32([0.5, 1, 2, 3])}
    nodes = [
        ("Sub", "input mean", "x", {}),
        ("Div", "x std", "y", {}),
        ("Gemm", "y w", "output", {"transB": transposed}),
    ]
    model = build(nodes, constants, [3, 4])
    assert operators(folded(model)) == ["Gemm"]
    check_equal(model, folded(model), normal(3, 4))


def test_an_activation_goes_before_the_pool_of_its_layer(build, check_equal):
    constants = {"params/c/kernel": normal(CHANNELS, 3, 3, 3), "six": np.float32(0.5), "zero": np.float32(0)}
    nodes = [CONV, ("MaxPool", "x", "y", WINDOW), ("Clip", "y zero six", "output", {})]
    model = build(nodes, constants, [2, 3, 8, 8], 4)
    after = commuting.activate_before_pools(model)
    assert operators(after) == ["Conv", "Clip", "MaxPool"]
    check_equal(model, after, normal(2, 3, 8, 8))


class Sample:
    """Draw a graph: a layer, up to four operators behind it, then an affine one.

    Some tensors between are outputs too.
    """

    def __init__(self, seed, build):
        self.rng = np.random.default_rng(seed)
        self.build = build
        self.nodes, self.constants, self.outputs = [], {}, []
        self.shape = self.layer()
        for _ in range(self.rng.integers(1, 5)):
            getattr(self, self.rng.choice(self.choices()))()
            if self.rng.random() < 0.05:
                self.outputs.append(self.nodes[-1][2])
        self.affine()
        if len(self.shape) == 2 and self.rng.random() < 0.5:
            self.add("Gemm", self.constant("params/h/kernel", normal(self.shape[1], 5, rng=self.rng)))

    @property
    def last(self):
        return self.nodes[-1][2] if self.nodes else "input"

    def constant(self, name, value):
        self.constants[name] = value
        return name

    def add(self, operator, *inputs, first=None, **attributes):
        source = [self.last, *inputs] if first is None else [first, self.last]
        self.nodes.append((operator, " ".join(source), f"t{len(self.nodes)}", attributes))
        model = self.model([])
        self.shape = graph.shapes(model)[self.last]

    def model(self, outputs):
        whole = self.build(self.nodes, self.constants, self.input, 2, 18)
        del whole.graph.output[:]
        for name in outputs:
            entry = helper.make_tensor_value_info(name, TensorProto.FLOAT, graph.shapes(whole)[name])
            whole.graph.output.append(entry)
        return whole

    def layer(self):
        kind = self.rng.choice(["Conv", "ConvTranspose", "Gemm", "MatMul"])
        self.input = {"Gemm": [3, 5], "MatMul": [3, 6, 5]}.get(kind, [3, 4, 7, 6])
        group = int(self.rng.choice([1, 2]))
        shape = {"Conv": (8, 4 // group, 3, 3), "ConvTranspose": (4, 8 // group, 2, 2), "Gemm": (5, 24)}
        attributes = {"group": group} if kind.startswith("Conv") else {}
        kernel = normal(*shape.get(kind, (5, 8)), rng=self.rng)
        self.add(kind, self.constant("params/l/kernel", kernel), **attributes)
        if kind == "MatMul" and self.rng.random() < 0.5:
            self.add("Add", self.constant("params/l/bias", normal(8, rng=self.rng)))
        return self.shape

    def choices(self):
        image = ["pool"] * 4 + ["whole", "flatten", "transpose", "reduce", "affine", "relu"]
        rows = ["affine", "split", "relu"]
        return {4: image, 3: ["transpose", "reduce", "affine"], 2: rows}[len(self.shape)]

    def affine(self):
        kind = str(self.rng.choice(["BatchNormalization"] * 3 + ["Add", "Sub", "Mul", "Div"]))
        name = f"n{len(self.nodes)}"
        if kind == "BatchNormalization":
            values = statistics(self.shape[1], self.rng.choice([1, 1, -1]), name, self.rng)
            if self.rng.random() < 0.3:  # one number for all channels
                values = {key: np.full_like(value, abs(value[0])) for key, value in values.items()}
            self.constants |= values
            self.add(kind, *values, epsilon=1e-3)
            return
        rank = len(self.shape)
        shape = [(), self.shape[1:], (self.shape[-1],), (self.shape[1], *(1,) * (rank - 2))]
        value = self.rng.uniform(0.5, 1.5, shape[self.rng.integers(4)]) * self.rng.choice([1, 1, 1, -1])
        constant = self.constant(name, np.asarray(value, np.float32))
        first = constant if self.rng.random() < 0.3 else None
        self.add(kind, constant, first=first)

    def pool(self):
        if min(self.shape[2:]) < 3:
            return
        kernel = [int(size) for size in self.rng.integers(1, 4, 2)]
        strides = [int(step) for step in self.rng.integers(1, 3, 2)]
        attributes = {"kernel_shape": kernel, "strides": strides}
        if self.rng.random() < 0.3 and min(kernel) > 1:
            attributes["ceil_mode"] = 1  # ONNX and onnxruntime disagree on a window wholly in the padding
        else:
            attributes["pads"] = [int(self.rng.integers(kernel[i % 2])) for i in range(4)]
        if self.rng.random() < 0.5:
            self.add("AveragePool", **attributes, count_include_pad=int(self.rng.random() < 0.5))
        else:
            self.add("MaxPool", **attributes)

    def whole(self):
        self.add(str(self.rng.choice(["GlobalAveragePool", "GlobalMaxPool"])))

    def flatten(self):
        self.add("Flatten", axis=1)

    def transpose(self):
        self.add(
            "Transpose", perm=[0, *(int(axis) + 1 for axis in self.rng.permutation(len(self.shape) - 1))]
        )

    def reduce(self):
        axes = np.sort(self.rng.permutation(np.arange(1, len(self.shape)))[: self.rng.integers(1, 3)])
        axes = self.constant(f"axes{len(self.nodes)}", axes[: len(self.shape) - 2])
        self.add(str(self.rng.choice(["ReduceMax", "ReduceMean"])), axes, keepdims=int(self.rng.integers(2)))

    def split(self):
        if self.shape[1] % 4 == 0:
            image = np.array([3, self.shape[1] // 4, 2, 2])
            self.add("Reshape", self.constant(f"image{len(self.nodes)}", image))

    def relu(self):
        self.add("Relu")


def run_all(model, images):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": images})


def test_random_graphs_keep_their_numbers(build):
    before = after = 0
    for seed in range(GRAPHS):
        sample = Sample(seed, build)
        model = sample.model(list(dict.fromkeys([*sample.outputs, sample.last])))
        images = normal(*sample.input, rng=sample.rng)
        wanted = run_all(model, images)
        if not all(np.isfinite(output).all() for output in wanted):  # a window beyond the image
            continue
        plain = folding.fold_affine(folding.fold_batch_norm(model))
        for changed in (commuting.move_to_layers(model), folded(model)):
            onnx.checker.check_model(changed, full_check=True)
            for found, output in zip(run_all(changed, images), wanted, strict=True):
                scale = max(1.0, np.abs(output).max())
                np.testing.assert_allclose(found / scale, output / scale, atol=1e-4, err_msg=f"seed {seed}")
        before += operators(plain).count("BatchNormalization")
        after += operators(changed).count("BatchNormalization")
    assert after < 0.7 * before


class Scaled(nn.Module):
    """Put a norm with a scale behind a max pool."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.max_pool(nn.Conv(4, (3, 3), padding=1, name="conv")(x), (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="last")(x))
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


def trained(model, images):
    """Draw variables as training leaves them: no statistic or bias is 0 or 1."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        if len(leaf.shape) > 1:
            return normal(*leaf.shape, rng=rng) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: model.init(jax.random.key(0), images)))


@pytest.mark.parametrize(
    ("model", "sign", "norms"), [(SpeedNet((4, 8, 8)), 1, 0), (Scaled(), 1, 0), (Scaled(), -1, 1)]
)
def test_norms_behind_the_max_pools_of_a_network(model, sign, norms):
    images = normal(7, 16, 16, 3)
    variables = trained(model, images)
    if "norm" in variables["params"]:
        variables["params"]["norm"]["scale"][1] *= sign
    exported = to_onnx(model.apply, variables, images.shape[1:])
    assert operators(exported).count("BatchNormalization") == norms
    largest = verify(exported, model.apply, variables, images)["max_difference"]
    assert max(largest.values()) < 1e-5


def test_the_integers_of_a_norm_behind_a_pool_are_those_of_training():
    """The Relu stands before the pool: the layer is rounded once, on the grid that the next has learned."""
    model, images, config = Scaled(), normal(32, 16, 16, 3), qt.QuantConfig()
    variables = qt.attach_statistics(model, trained(model, images), config, images)

    @jax.jit
    def update(variables):
        with qt.quant_trim(config, 0.5, train=True):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    variables = {**variables, **update(variables)}
    exported = to_onnx(model.apply, variables, images.shape[1:])
    assert "BatchNormalization" not in operators(exported)
    ranges = tensor_ranges(exported, variables, config, images.transpose(0, 3, 1, 2))
    assert {ranges.tensors[kernel].source for kernel in ranges.kernels.values()} == {"learned"}
    forward = fake_quant_forward(model.apply, config)
    full = insert_qdq(exported, ranges)
    assert all(integer_kernels(full).values())
    fresh = normal(200, 16, 16, 3)
    exact, found = (
        parity(quantized, forward, variables, fresh, ranges)["logits"]["sqnr_db"]
        for quantized in (insert_qdq(exported, ranges, learned_only=True), full)
    )
    assert found > exact - 3.0


def test_a_learned_input_stays_what_it_was():
    """The norm before a layer with a learned range is not folded into it; without ranges it is."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Dense(6, name="first")(x))
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            return nn.Dense(5, name="head")(x)

    x = normal(7, 4)
    variables = Net().init(jax.random.key(0), x)
    assert operators(to_onnx(Net().apply, variables, (4,))) == ["Gemm", "Relu", "Gemm"]
    attached = qt.attach_statistics(Net(), variables, qt.QuantConfig(), x)
    kept = to_onnx(Net().apply, attached, (4,))
    assert operators(kept) == ["Gemm", "Relu", "BatchNormalization", "Gemm"]


SCORES = {
    "multiplied by a number": (("Mul", "s number", "output", {}), True),
    "divided by a number": (("Div", "s number", "output", {}), True),
    "multiplied by numbers that are all equal": (("Mul", "s equal", "output", {}), True),
    "a number divided by them": (("Div", "number s", "output", {}), False),
    "a number added": (("Add", "s number", "output", {}), False),
    "multiplied by a number for each key": (("Mul", "s keys", "output", {}), False),
    "multiplied by a number for each query": (("Mul", "s queries", "output", {}), False),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_number_passes_the_product_of_two_tensors(name, build, check_equal):
    """The scores of attention are scaled in the kernel and the bias of the queries."""
    last, moves = SCORES[name]
    nodes = [
        ("MatMul", "input params/q/kernel", "qx", {}),
        ("Add", "qx params/q/bias", "q", {}),
        ("MatMul", "input params/k/kernel", "k", {}),
        ("Transpose", "k", "kt", {"perm": [0, 2, 1]}),
        ("MatMul", "q kt", "s", {}),
        last,
    ]
    constants = {
        "params/q/kernel": normal(CHANNELS, 5),
        "params/q/bias": normal(5),
        "params/k/kernel": normal(CHANNELS, 5),
        "number": np.float32(0.3),
        "equal": np.full((3, 1), 0.3, np.float32),
        "keys": normal(3) + 3,
        "queries": normal(3, 1) + 3,
    }
    model = build(nodes, constants, [2, 3, CHANNELS], output_rank=3)
    moved = folded(model)
    left = [node[0] for node in (nodes[:-1] if moves else nodes)]
    assert sorted(operators(moved)) == sorted(left + ["Identity"] * moves)
    check_equal(model, moved, normal(2, 3, CHANNELS))
    kernel = moved.graph.node[0].input[1]
    gain = graph.constants(moved).gains[kernel]
    factor = {"Mul": 0.3, "Div": 1 / 0.3}[last[0]] if moves else 1.0
    np.testing.assert_allclose(gain, factor, rtol=1e-6)
