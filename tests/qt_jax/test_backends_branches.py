"""Check that an If with one branch for all samples becomes that branch, and computes the same."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from qt_jax.backends.branches import take_branches
from qt_jax.backends.inputs import prepare

NESTED = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[1, 3] x, bool[1] fast, bool[1] loud) => (float[1, 3] y, float[1, 3] z)
    <float[1] two = {2}> {
        f = Squeeze(fast)
        l = Squeeze(loud)
        outer = Neg(x)
        [speed] y, z = If(f) <
            then_branch = a () => (float[1, 3] same, float[1, 3] inner) {
                same = Mul(outer, two)
                inner = If(l) <
                    then_branch = b () => (float[1, 3] up) <float[1] ten = {10}> {
                        t = Mul(same, ten)
                        up = Add(t, x)
                    },
                    else_branch = c () => (float[1, 3] down) { down = Identity(same) }
                >
            },
            else_branch = d () => (float[1, 3] p, float[1, 3] q) { p = Relu(x)  q = Abs(outer) }
        >
    }""")
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def samples(fast, loud):
    return {"x": X, "fast": np.broadcast_to(fast, 4).copy(), "loud": np.broadcast_to(loud, 4).copy()}


def run(model, arrays):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {entry.name for entry in model.graph.input}
    return [
        session.run(None, {name: array[i : i + 1] for name, array in arrays.items() if name in names})
        for i in range(4)
    ]


@pytest.mark.parametrize(
    ("fast", "loud", "left"),
    [
        (True, True, 0),
        (True, False, 0),
        (False, True, 0),
        (True, [True, False, True, True], 1),
        ([True, False, True, True], True, 1),
    ],
)
def test_the_outputs_stay_the_same(fast, loud, left):
    model, arrays = onnx.ModelProto(), samples(fast, loud)
    model.CopyFrom(NESTED)
    taken = take_branches(model, [arrays, arrays])
    assert sum(node.op_type == "If" for node in model.graph.node) == left
    expected = {"speed": "then" if fast is True else "else"} if isinstance(fast, bool) else {}
    assert taken == expected | ({"z": "then" if loud else "else"} if fast is True and left == 0 else {})
    onnx.checker.check_model(model)
    for before, after in zip(run(NESTED, arrays), run(model, arrays), strict=True):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_holds_in_calibration_alone_is_not_taken():
    model = onnx.ModelProto()
    model.CopyFrom(NESTED)
    assert take_branches(model, [samples(True, True), samples(False, True)]) == {}
    assert model == NESTED


def test_a_prepared_graph_has_neither_the_branch_nor_its_input():
    prepared = prepare(NESTED, samples(True, True), samples(True, True))
    assert [entry.name for entry in prepared.model.graph.input] == ["x"] == list(prepared.samples)
    assert all(node.op_type != "If" and node.name for node in prepared.model.graph.node)
    [note] = prepared.notes
    assert "2 Ifs ('speed' then, " in note
