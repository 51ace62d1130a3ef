"""Test which channels of a graph can be rescaled, with which factors, and what is copied and kept for it."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper

from qt_jax.backends.constant_folding import fold_constants
from qt_jax.equalization import rescaling
from qt_jax.equalization.channels import find_freedom
from qt_jax.equalization.labels import Ties
from qt_jax.equalization.rescaling import range_factors, rescale, tensors_of, with_own_constants
from qt_jax.export import graph
from tests.qt_jax.channel_cases import (
    FLOAT,
    GROUPS,
    LAYERS,
    Between,
    T,
    assert_free,
    ints,
    make,
    model_of,
    node,
    normal,
    run,
    samples_of,
    scalar,
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{kind}-{name}")
        for kind, cases in GROUPS.items()
        for name, case in cases.items()
    ],
)
def test_rule(case):
    assert assert_free(model_of(case), exact=case.exact).count == case.count


def two_layers(first, second, **names):
    """Build `Relu(x @ first) @ second`; `names` are attributes of `make`."""
    nodes = [node("MatMul x a -> h"), node("Relu h -> r"), node("MatMul r b -> y")]
    return make(nodes, {"a": first, "b": second}, {"x": (FLOAT, ("n", len(first)))}, **names)


def test_constants_that_several_nodes_read_are_copied(monkeypatch):
    shared = {"w": normal(3, 3), "w#2": normal(3)}  # a name that a copy would take
    nodes = [node(line) for line in ("MatMul x w -> g", "Add g w#2 -> h", "Relu h -> r", "MatMul r w -> y")]
    model = make(nodes, shared, {"x": (FLOAT, ("n", 3))})
    base = with_own_constants(model)
    assert {tensor.name for tensor in base.graph.initializer} == {"w", "w#2", "w#3"}
    assert [entry.name for entry in base.graph.node] == [entry.name for entry in model.graph.node]
    assert assert_free(model).count == 3
    monkeypatch.setattr(rescaling, "COPIED", 8)
    assert {tensor.name for tensor in with_own_constants(model).graph.initializer} == {"w", "w#2"}
    assert assert_free(model).count == 0


def test_large_constants_stay_shared_and_keep_their_values():
    side = 257  # whose square is above COPIED
    nodes = [node("MatMul x w -> h"), node("Relu h -> r"), node("MatMul r w -> s"), node("MatMul s v -> y")]
    constants = {"w": normal(side, side) / 16, "v": normal(side, 2)}
    assert assert_free(make(nodes, constants, {"x": (FLOAT, ("n", side))})).count == 0


@pytest.mark.parametrize("name", ["a", "b"])
def test_constants_that_are_outputs_keep_their_values(name):
    assert assert_free(two_layers(normal(3, 4), normal(4, 2), outputs=("y", name))).count == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_graphs_of_other_types_are_left_alone(dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {
        "a": normal(3, 4).astype(dtype),
        "c": normal(4).astype(dtype),
        "b": normal(4, 2).astype(dtype),
    }
    lines = (
        "MatMul x a -> g",
        "Mul g c -> h",
        "Relu h -> i",
        "Concat i i -> r",
        "Slice r s e t -> u",
        "MatMul u b -> y",
    )
    nodes = [node(line, **({"axis": 1} if line.startswith("Concat") else {})) for line in lines]
    constants |= {"s": ints(2), "e": ints(6), "t": ints(1)}
    assert assert_free(make(nodes, constants, {"x": (kind, ("n", 3))})).count == 0


def test_constant_nodes_and_functions_become_initializers():
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
    g (float[n, 2] x) => (float[n, 2] y) {
      a = Constant <value = float[2, 2] {1.0, 2.0, 3.0, 4.0}> ()
      c = Constant <value_floats = [0.5, -1.5]> ()
      b = Transpose (a)
      h = MatMul (x, a)
      r = own.layer (h, c)
      y = MatMul (r, b)
    }
    <domain: "own", opset_import: ["" : 17]> layer (h, c) => (r) { s = Add (h, c) r = Relu (s) }""")
    assert assert_free(model).count == 2
    assert {entry.op_type for entry in with_own_constants(model).graph.node} == {"MatMul", "Add", "Relu"}


CAPTURED = """<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 2] x, bool[1] c) => (float[n, 2] y, float[n, 2] z)
<float[2, 2] w = {1.0, -2.0, 3.0, 4.0}, float[2, 2] v = {0.5, 2.0, 1.5, -1.0}, float[2] unread = {1.0,
        1.0}> {
  p = Constant <value = float[2] {3.0, 5.0}> ()
  q = Neg (p)
  s = Squeeze (c)
  h = MatMul (x, w)
  r = Relu (h)
  y = MatMul (r, v)
  z = If (s) <
    then_branch = a () => (float[n, 2] t) { k = Constant <value = float[2] {1.0, 7.0}> () u = MatMul (x, w)
                                            t0 = Add (u, q) t = Mul (t0, k) },
    else_branch = b () => (float[n, 2] t) { t = READ }>
}"""


@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize(
    ("read", "count"), [("MatMul (x, v)", 2), ("Neg (r)", 0), ("Mul (x, p)", 2), ("Add (h, q)", 0)]
)
def test_branches_keep_what_they_capture(read, count, condition):
    model = onnx.parser.parse_model(CAPTURED.replace("READ", read))
    samples = {"x": normal(1, 2), "c": np.array([condition])}
    base = with_own_constants(model)
    names = {tensor.name for tensor in base.graph.initializer}
    assert {"w", "w#2"} <= names and "unread" not in names
    for one, two in zip(run(model, samples), run(base, samples), strict=True):
        np.testing.assert_array_equal(one, two)
    assert assert_free(model, samples).count == count


@pytest.mark.parametrize("condition", [False, True])
def test_rebuilding_keeps_what_branches_of_branches_capture(condition):
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17]>
    g (float[n, 2] x, bool[1] c) => (float[n, 2] y)
    <float[2] w = {1.0, -2.0}, float[2] v = {0.5, 2.0}> {
      s = Squeeze (c)
      a = Neg (x)
      b = Neg (w)
      dead = Neg (a)
      y = If (s) <
        then_branch = outer () => (float[n, 2] t) {
          t = If (s) < then_branch = inner () => (float[n, 2] i) { i = Add (a, b) },
                       else_branch = other () => (float[n, 2] j) { j = Identity (x) } > },
        else_branch = last () => (float[n, 2] t) { t = Mul (x, v) }>
    }""")
    samples = {"x": normal(2, 2), "c": np.array([condition])}
    rebuilt = graph.rebuild(model, model.graph.node, graph.constants(model))
    assert [entry.op_type for entry in rebuilt.graph.node] == ["Squeeze", "Neg", "Neg", "If"]
    folded = fold_constants(model)
    assert [entry.op_type for entry in folded.graph.node] == ["Squeeze", "Neg", "If"]
    assert set(graph.constants(folded)) == {"b", "v"}
    for other in (rebuilt, folded):
        np.testing.assert_array_equal(run(model, samples)[0], run(other, samples)[0])


@pytest.mark.parametrize("cut", ["slice", "gather"])
def test_tables_have_the_same_factors_at_places_for_longer_samples(cut):
    """Samples of 5 tokens tell the freedom; with samples of 9 the function is the same, too."""
    lines = [
        ("Shape x -> l0", {"start": 1, "end": 2}),
        ("Squeeze l0 -> l", {}),
        ("Range zero l one -> i", {}),
    ]
    lines += [("Gather p i -> q", {})] if cut == "gather" else [("Slice p s l0 -> q", {})]
    case = Between(4, (*lines, "Add h q -> a", "Relu a -> r"),
                   {"p": normal(9, 4), "zero": scalar(0, np.int64), "one": scalar(1, np.int64),
                           "s": ints(0)}, lead=T)  # fmt: skip
    model = model_of(case)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "l"
    short, long = {"x": normal(2, 5, 3)}, {"x": normal(2, 9, 3)}
    base = with_own_constants(model)
    freedom = find_freedom(base, tensors_of(base, short))
    assert freedom.count == 4
    factors = 2.0 ** np.arange(5)
    for samples in (short, long):
        found = run(rescale(base, freedom, factors), samples)
        np.testing.assert_array_equal(run(model, samples)[0], found[0])


def test_samples_of_a_fixed_batch_and_of_an_input_without_one():
    nodes = [node("MatMul x a -> h"), node("Add h c -> g"), node("Relu g -> r"), node("MatMul r b -> y")]
    inputs = {"x": (FLOAT, (2, 3)), "c": (FLOAT, (4,))}
    base = with_own_constants(make(nodes, {"a": normal(3, 4), "b": normal(4, 2)}, inputs))
    values = tensors_of(base, {"x": normal(6, 3), "c": normal(6, 4)})
    assert {name: values[name].shape for name in "xchry"} == {
        "x": (2, 3), "c": (4,), "h": (2, 4), "r": (2, 4), "y": (2, 2)
    }  # fmt: skip
    assert find_freedom(base, values).count == 0  # what is added is an input


def test_factors_and_their_constants_are_those_written_by_hand():
    model = model_of(LAYERS["transpose-groups"])
    base = with_own_constants(model)
    freedom = find_freedom(base, tensors_of(base, samples_of(model)))
    factors = np.exp(normal(freedom.count + 1).astype(np.float64))
    factors[0] = 1
    h, r = factors[freedom.channels["h"]], factors[freedom.channels["r"]]
    assert len(h) == 4 and len(r) == 6 and len({*h, *r}) == 10
    before, after = graph.constants(base), graph.constants(rescale(base, freedom, factors))
    kernel = before["k"].astype(np.float64)  # (4, 3, 2, 3): inputs 0 and 1 write outputs 0 to 2
    expected = kernel / h[:, None, None, None]
    expected[:2] *= r[:3, None, None]
    expected[2:] *= r[3:, None, None]
    np.testing.assert_allclose(after["k"], expected, rtol=1e-6)
    np.testing.assert_allclose(after["b"], before["b"] * r, rtol=1e-6)
    np.testing.assert_allclose(after["ka"], before["ka"] * h[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(after["ba"], before["ba"] * h, rtol=1e-6)
    np.testing.assert_allclose(after["kb"], before["kb"] / r[None, :, None, None], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("named", [False, True])
def test_two_layers_get_the_factors_of_nagel(seed, named):
    """Equation (11): the outputs of layer 1 are divided by s = sqrt(r1 r2) / r2, up to one number for all."""
    first, second = normal(5, 7, seed=seed), normal(7, 4, seed=seed)
    first *= np.float32(2.0) ** np.arange(-3, 4)
    model = two_layers(first, second)
    for entry in model.graph.node:
        entry.name = entry.name if named else ""
    base = with_own_constants(model)
    freedom = find_freedom(base, tensors_of(base, {"x": normal(1, 5)}))
    found = range_factors(base, freedom)[freedom.channels["h"]]
    range1, range2 = np.abs(first.astype(np.float64)).max(0), np.abs(second.astype(np.float64)).max(1)
    expected = range2 / np.sqrt(range1 * range2)
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-6)


def test_layers_in_a_row_end_with_equal_ranges():
    nodes = [
        node("Conv x a -> h"), node("Relu h -> r"), node("Conv r d -> g", group=6), node("Relu g -> s"),
        node("Conv s b -> y"),
    ]  # fmt: skip
    scales = (4.0 ** np.arange(-3, 3, dtype=np.float32))[:, None, None, None]
    constants = {"a": normal(6, 3, 1, 1) * scales, "d": normal(6, 1, 3, 3) / scales, "b": normal(2, 6, 1, 1)}
    base = with_own_constants(make(nodes, constants, {"x": (FLOAT, ("n", 3, 5, 5))}))
    freedom = find_freedom(base, tensors_of(base, {"x": normal(1, 3, 5, 5)}))
    assert freedom.count == 12
    factors = range_factors(base, freedom)
    after = graph.constants(rescale(base, freedom, factors))
    relative = {name: np.abs(value) / np.abs(value).max() for name, value in after.items()}
    np.testing.assert_allclose(relative["a"].max((1, 2, 3)), relative["d"].max((1, 2, 3)), rtol=0.01)
    np.testing.assert_allclose(relative["d"].max((1, 2, 3)), relative["b"].max((0, 2, 3)), rtol=0.01)


def test_channels_of_no_weights_keep_their_factor():
    first, second = normal(5, 4), normal(4, 3)
    first[:, 0] = 0
    second[1] = 0
    base = with_own_constants(two_layers(first, second))
    freedom = find_freedom(base, tensors_of(base, {"x": normal(1, 5)}))
    factors = range_factors(base, freedom)
    assert factors[freedom.channels["h"][:2]].tolist() == [1, 1]
    assert factors[0] == 1 and np.ptp(factors[freedom.channels["h"][2:]]) > 0


def test_ties_of_axes_without_elements_demand_nothing():
    ties = Ties()
    labels = ties.fresh((2, 0, 3))
    other = ties.fresh((2, 1, 3))
    ties.tie(labels, other)
    assert ties.along(labels, [1]).tolist() == np.zeros((2, 1, 3)).tolist()
    assert ties.along(other, [1]) is other
    assert ties.resolve().tolist() == list(range(7))
