"""Graphs around one rule of rescaling each, and the test that no factors change what a graph computes.

With factors that are powers of two no output may change: they are exact in float32, and so is everything that
a homogeneous operator does with them. Hence a rescaled graph gives the same bits, or a rule is wrong.
"""

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qt_jax.equalization.channels import find_freedom
from qt_jax.equalization.rescaling import rescale, tensors_of, with_own_constants
from qt_jax.equalization.walk import Freedom
from qt_jax.export import graph
from qt_jax.export.sessions import open_unoptimized

BATCH = 3
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def normal(*shape, seed=0):
    """Draw float32 numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def positive(*shape):
    return np.abs(normal(*shape)) + np.float32(0.5)


def ints(*values):
    return np.array(values, np.int64)


def scalar(value, dtype=np.float32):
    return np.array(value, dtype)


def node(line, **attributes):
    """Make a node from `Operator input input -> output output`; `_` is an input that is left out."""
    left, _, right = line.partition(" -> ")
    operator, *inputs = left.split(" ")
    domain = attributes.pop("domain", "")
    inputs = ["" if name == "_" else name for name in inputs]
    return helper.make_node(operator, inputs, right.split(" "), name=line, domain=domain, **attributes)


def make(nodes, constants, inputs, outputs=("y",), opset=17):
    """Build a graph: `inputs` maps a name to `(dtype, shape)`."""
    entries = [helper.make_tensor_value_info(name, *entry) for name, entry in inputs.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    domains = {entry.domain for entry in nodes} - {""}
    return helper.make_model(
        helper.make_graph(nodes, "g", entries, results, tensors),
        opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)],
        ir_version=9,
    )


def samples_of(model, batch=BATCH):
    """Draw samples for the inputs of a graph."""
    found = {}
    for entry in model.graph.input:
        kind = entry.type.tensor_type
        shape = [axis.dim_value or batch for axis in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        whole = np.random.default_rng(1).integers(0, 3, shape)
        found[entry.name] = (whole if dtype.kind in "ib" else normal(*shape, seed=1)).astype(dtype)
    return found


def run(model, samples):
    names = [entry.name for entry in model.graph.output]
    return open_unoptimized(model).run(names, samples)


def assert_free(model, samples=None, exact=True) -> Freedom:
    """Check that no factors change the outputs of a graph; return its freedom."""
    samples = samples_of(model) if samples is None else samples
    base = with_own_constants(model)
    freedom = find_freedom(base, tensors_of(base, samples))
    before = run(model, samples)
    rng = np.random.default_rng(0)
    for _ in range(2):
        factors = np.concatenate([[1.0], 2.0 ** rng.integers(-3, 4, freedom.count)])
        for one, two in zip(before, run(rescale(base, freedom, factors), samples), strict=True):
            if exact:
                np.testing.assert_array_equal(one, two)
            else:
                np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max(initial=0))
    factors = np.concatenate([[1.0], np.exp(rng.standard_normal(freedom.count))])
    for one, two in zip(before, run(rescale(base, freedom, factors), samples), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max(initial=0))
    for entry in freedom.scaled:
        value = graph.constants(base)[entry.initializer]
        assert entry.up.ndim == entry.down.ndim == value.ndim
        assert np.broadcast_shapes(entry.up.shape, entry.down.shape, value.shape) == value.shape
    used = [np.zeros(1), *(part.ravel() for entry in freedom.scaled for part in (entry.up, entry.down))]
    assert np.unique(np.concatenate(used)).tolist() == list(range(freedom.count + 1))
    return freedom


class Between(NamedTuple):
    """Hold nodes that stand between a layer that writes `h` and one that reads `r`.

    The first layer is a 1x1 convolution of images `x` (n, 3, 6, 6) to 4 channels, or with `lead="tokens"` a
    product of `x` (n, 5, 3) with a kernel (3, 4). The last one, with `reads` input channels, is of the kind
    `tail`. `count` is the number of factors, by hand.
    """

    count: int
    nodes: tuple
    constants: dict = {}  # noqa: RUF012 - never changed
    reads: int = 4
    lead: str = "images"
    tail: str = ""
    opset: int = 17
    batch: str | int = "n"
    inputs: dict = {}  # noqa: RUF012 - never changed
    outputs: tuple = ()
    exact: bool = True


def model_of(case):
    """Build the graph of a case, with the layers before and after."""
    tail = case.tail or {"images": "conv"}.get(case.lead, "matmul")
    if case.lead == "images":
        first, sizes = [node("Conv x ka ba -> h")], (3, 6, 6)
        constants = {"ka": normal(4, 3, 1, 1), "ba": normal(4)}
    else:
        first, sizes = [node("MatMul x ka -> g"), node("Add g ba -> h")], (5, 3)
        constants = {"ka": normal(3, 4), "ba": normal(4)}
    if tail == "conv":
        last, constants["kb"] = [node("Conv r kb -> y")], normal(5, case.reads, 1, 1)
    elif tail == "flat":
        last, constants["kb"] = [node("Flatten r -> f"), node("MatMul f kb -> y")], normal(case.reads, 5)
    else:
        last, constants["kb"] = [node("MatMul r kb -> y")], normal(case.reads, 5)
    return make(
        [*first, *(node(n) if isinstance(n, str) else node(n[0], **n[1]) for n in case.nodes), *last],
        constants | case.constants,
        {"x": (FLOAT, (case.batch, *sizes)), **case.inputs},
        ("y", *case.outputs),
        case.opset,
    )


T = "tokens"
PASSING = {
    "relu": Between(4, ("Relu h -> r",)),
    "leaky": Between(4, (("LeakyRelu h -> r", {"alpha": 0.25}),)),
    "abs-neg": Between(4, ("Abs h -> a", "Neg a -> r")),
    "identities": Between(4, ("Identity h -> a", "Identity a -> b", "Identity b -> r")),
    "dropout": Between(4, ("Dropout h -> r m",)),
    "dropout-ratio": Between(4, ("Dropout h q -> r",), {"q": scalar(0.25)}),
    "cast-same": Between(4, (("Cast h -> r", {"to": FLOAT}),)),
    "cast-half": Between(0, (("Cast h -> a", {"to": TensorProto.FLOAT16}), ("Cast a -> r", {"to": FLOAT}))),
    "sigmoid": Between(0, ("Sigmoid h -> r",)),
    "erf": Between(0, ("Erf h -> r",)),
    "square": Between(0, ("Mul h h -> r",)),
    "other-domain": Between(0, (("Gelu h -> r", {"domain": "com.microsoft"}),)),
    "prelu": Between(4, ("PRelu h s -> r",), {"s": normal(4, 1, 1)}),
    "prelu-scalar": Between(4, ("PRelu h s -> r",), {"s": scalar(0.1)}),
    "prelu-of-data": Between(4, ("Sigmoid x -> a", "ReduceMean a -> s", "Relu h -> r")),
    "output-read-further": Between(0, ("Relu h -> r",), outputs=("r",)),
    "input-of-relu-is-output": Between(0, ("Relu h -> r",), outputs=("h",)),
}
CLIPS = {
    "no-bounds": Between(4, ("Clip h -> r",)),
    "relu": Between(4, ("Clip h lo -> r",), {"lo": scalar(0)}),
    "relu6": Between(1, ("Clip h lo hi -> r",), {"lo": scalar(0), "hi": scalar(0.75)}),
    "both": Between(1, ("Clip h lo hi -> r",), {"lo": scalar(-0.5), "hi": scalar(0.5)}),
    "no-lower": Between(1, ("Clip h _ hi -> r",), {"hi": scalar(0.5)}),
    "infinite": Between(4, ("Clip h lo hi -> r",), {"lo": scalar(0), "hi": scalar(np.inf)}),
    "largest-float": Between(
        4, ("Clip h lo hi -> r",), {"lo": scalar(0), "hi": scalar(np.finfo(np.float32).max)}
    ),
    "bound-of-two": Between(
        2, ("Clip h lo hi -> a", "Conv a k -> b", "Clip b lo hi -> r"),
        {"lo": scalar(0), "hi": scalar(0.75), "k": normal(4, 4, 1, 1)},
    ),
    "bounds-of-data": Between(
        0, ("ReduceMax x -> m", "Squeeze m -> hi", "Clip h _ hi -> r"),
    ),
}  # fmt: skip
POOLS = {
    name: Between(4, ((f"{operator} h -> r", attributes),), exact=operator not in ("LpPool",
            "GlobalLpPool"))
    for name, operator, attributes in (
        ("average", "AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("average-padded", "AveragePool", {"kernel_shape": [2, 2], "pads": [1] * 4,
                "count_include_pad": 1}),
        ("max", "MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("lp", "LpPool", {"kernel_shape": [2, 2], "p": 2}),
        ("global-average", "GlobalAveragePool", {}),
        ("global-max", "GlobalMaxPool", {}),
        ("global-lp", "GlobalLpPool", {"p": 1}),
    )
} | {
    "max-indices": Between(4, (("MaxPool h -> r i", {"kernel_shape": [2, 2]}),), outputs=("i",)),
    "rows": Between(  # the rows of two tensors have one factor each channel where they are pooled together
        4, ("Conv x kc -> c", ("Concat h c -> a", {"axis": 2}),
            ("MaxPool a -> r", {"kernel_shape": [2, 1], "strides": [1, 1]})),
        {"kc": normal(4, 3, 1, 1)}, 4 * 11 * 6, tail="flat"),
}  # fmt: skip
REDUCTIONS = {
    "mean": Between(4, (("ReduceMean h -> r", {"axes": [2, 3]}),)),
    "dropped": Between(4, (("ReduceMean h -> r", {"axes": [-1, -2], "keepdims": 0}),), tail="matmul"),
    "channels": Between(1, (("ReduceMax h -> r", {"axes": [1]}),), reads=1),
    "all": Between(1, ("ReduceL1 h -> r",), reads=1),
    "one-axis-dropped": Between(
        4, (("ReduceSum h a -> b", {"keepdims": 0}), ("Transpose b -> r", {"perm": [0, 2, 1]})),
                {"a": ints(-1)},
        tail="matmul"),
    "input-axes": Between(4, ("ReduceL2 h a -> r",), {"a": ints(-1, 2)}, opset=18),
    "empty-axes": Between(
        4, (("ReduceMin h a -> r", {"noop_with_empty_axes": 1}),), {"a": ints()}, opset=18
    ),
    "empty-axes-all": Between(1, ("ReduceMean h a -> r",), {"a": ints()}, reads=1, opset=18),
    "squares": Between(0, (("ReduceSumSquare h -> r", {"axes": [2, 3]}),)),
    "product": Between(0, (("ReduceProd h -> r", {"axes": [2, 3]}),)),
    "tokens": Between(4, (("ReduceMean h -> r", {"axes": [1], "keepdims": 0}),), lead=T),
}  # fmt: skip
CONV_C = {"kc": normal(4, 3, 1, 1, seed=2)}
SUMS = {
    "bias": Between(4, ("Add h c -> r",), {"c": normal(4, 1, 1)}),
    "bias-left": Between(4, ("Add c h -> r",), {"c": normal(1, 4, 1, 1)}),
    "scalar": Between(1, ("Add h c -> r",), {"c": scalar(3)}),
    "zero": Between(4, ("Add h c -> r",), {"c": scalar(0)}),
    "zero-in-one-channel": Between(4, ("Add h c -> r",), {"c": np.float32([0, 1, 2, 3]).reshape(4, 1, 1)}),
    "map": Between(1, ("Add h c -> r",), {"c": normal(6, 6)}),
    "channels-and-columns": Between(4, ("Add h c -> r",), {"c": normal(4, 1, 6)}),
    "sub": Between(4, ("Sub h c -> r",), {"c": normal(4, 1, 1)}),
    "sub-left": Between(4, ("Sub c h -> r",), {"c": normal(4, 1, 1)}),
    "max-zero": Between(4, ("Max h c -> r",), {"c": scalar(0)}),
    "max": Between(4, ("Max c h -> r",), {"c": normal(4, 1, 1)}),
    "min-scalar": Between(1, ("Min h c -> r",), {"c": scalar(0.5)}),
    "mean": Between(4, ("Conv x kc -> b", "Mean h b c -> r"), CONV_C | {"c": normal(4, 1, 1)}),
    "two-branches": Between(4, ("Conv x kc -> b", "Add h b -> r"), CONV_C),
    "with-input": Between(0, (("Concat x x -> a", {"axis": 1}), ("Slice a s e i -> b"), "Add h b -> r"),
                          {"s": ints(0), "e": ints(4), "i": ints(1)}),
    "twice": Between(4, ("Add h h -> r",)),
    "sum-of-three": Between(4, ("Relu h -> a", "Conv x kc -> b", "Sum a b h -> r"), CONV_C),
    "broadcast-activation": Between(4, ("GlobalMaxPool h -> a", "Sub h a -> r")),
    "outer": Between(
        1, (("ReduceMean h -> a", {"axes": [1]}), ("ReduceMean h -> b", {"axes": [2, 3]}), "Add a b -> r"),
    ),
    "columns-added": Between(4, (("ReduceMean h -> a", {"axes": [2, 3]}), "Add a c -> r"),
                             {"c": normal(4, 6, 1)}),
    "rank-raised": Between(
        4, ("Add h c -> a", ("Squeeze a z -> r")), {"c": normal(1, 1, 4, 1, 1), "z": ints(0)},
    ),
    "rank-raised-vector": Between(
        4, (("ReduceMean h -> a", {"axes": [2, 3], "keepdims": 0}), "Add a c -> r"),
        {"c": normal(2, 1, 4)}, tail="matmul",
    ),
    "where": Between(4, ("Where m h c -> r",), {"m": np.eye(6) > 0, "c": scalar(0)}),
    "where-vector": Between(4, ("Where m c h -> r",), {"m": np.eye(6) > 0, "c": normal(4, 1, 1)}),
    "where-data": Between(4, ("Less d t -> m", "Conv x kc -> b", "Where m h b -> r"),
                          CONV_C | {"t": scalar(0)}, inputs={"d": (FLOAT, ("n", 1, 6, 6))}),
    "where-own": Between(0, ("Less h t -> m", "Where m h z -> r"), {"t": scalar(0.1), "z": scalar(0)}),
}  # fmt: skip
PRODUCTS = {
    "scalar": Between(4, ("Mul h c -> r",), {"c": scalar(3)}),
    "scalar-of-rank-4": Between(4, ("Mul c h -> r",), {"c": normal(1, 1, 1, 1)}),
    "vector": Between(8, ("Mul h c -> r",), {"c": normal(4, 1, 1)}),
    "vector-left": Between(8, ("Mul c h -> r",), {"c": normal(1, 4, 1, 1)}),
    "divisor": Between(8, ("Div h c -> r",), {"c": positive(4, 1, 1)}),
    "divisor-scalar": Between(4, ("Div h c -> r",), {"c": scalar(3)}),
    "dividend": Between(0, ("Abs h -> a", "Add a e -> b", "Div c b -> r"),
                        {"c": normal(4, 1, 1), "e": scalar(1)}),
    "map": Between(2, ("Mul h c -> r",), {"c": normal(6, 6)}),
    "map-read-apart": Between(1 + 36, ("Mul h c -> r",), {"c": normal(6, 6)}, 144, tail="flat"),
    "all-places": Between(8, ("Mul h c -> r",), {"c": normal(4, 6, 6)}),
    "vector-after-scalar": Between(8, ("Mul h s -> a", "Mul a c -> b", "Relu b -> r"),
                                   {"s": scalar(2.5), "c": normal(4, 1, 1)}),
    "broadcast-by-constant": Between(
        1, (("ReduceMean h -> a", {"axes": [1, 2, 3]}), "Mul a c -> r"), {"c": normal(4, 1, 1)}),
    "gate": Between(4, ("Conv x kc -> b", "Sigmoid b -> c", "Mul h c -> r"), CONV_C),
    "gate-left": Between(4, ("Conv x kc -> b", "Sigmoid b -> c", "Mul c h -> r"), CONV_C),
    "gate-of-map": Between(4, (("ReduceMean x -> b", {"axes": [1]}), "Mul b h -> r")),
    "divided-by-data": Between(4, ("Sigmoid x -> b", ("ReduceMean b -> c", {"axes": [1]}), "Div h c -> r")),
    "divisor-is-free": Between(0, ("Sigmoid x -> b", ("ReduceMean b -> c", {"axes": [1]}), "Abs h -> a",
                                   "Add a e -> d", "Div c d -> r"), {"e": positive(4, 1, 1)}),
    "two-free": Between(0, ("Conv x kc -> b", "Mul h b -> r"), CONV_C),
    "swish": Between(0, ("Sigmoid h -> a", "Mul h a -> r")),
    "hard-swish": Between(0, ("Add h t -> a", "Clip a z s -> b", "Mul h b -> c", "Div c d -> r"),
                          {"t": scalar(3), "z": scalar(0), "s": scalar(6), "d": scalar(6)}),
    "squeeze-excite": Between(
        6, ("GlobalAveragePool h -> a", "Conv a k1 -> b", "Relu b -> c", "Conv c k2 -> d", "Sigmoid d -> e",
            "Mul h e -> r"), {"k1": normal(2, 4, 1, 1), "k2": normal(4, 2, 1, 1)}),
}  # fmt: skip
SHUFFLE = (
    "Reshape h s1 -> a", ("Transpose a -> b", {"perm": [0, 2, 1, 3, 4]}), "Reshape b s2 -> r",
)  # fmt: skip
ROWS = ("Conv x kc -> c", ("Concat h c -> a", {"axis": 2}))
MOVEMENTS = {
    "concat-with-input": Between(4, (("Concat h x -> r", {"axis": 1}),), reads=7),
    "concat-twice": Between(4, (("Concat h h -> r", {"axis": 1}),), reads=8),
    "concat-constant": Between(6, (("Concat c h -> r", {"axis": 1}),), {"c": normal(1, 2, 6, 6)}, 6,
            batch=1),
    "concat-constant-rows": Between(4, (("Concat c h -> r", {"axis": -2}),), {"c": normal(1, 4, 1, 6)},
            batch=1),
    "concat-batch": Between(4, ("Conv x kc -> c", ("Concat h c -> r", {"axis": 0})), CONV_C),
    "concat-rows": Between(4, (*ROWS, "Relu a -> r"), CONV_C),
    "concat-rows-apart": Between(8, (*ROWS, "Relu a -> r"), CONV_C, 288, tail="flat"),
    "concat-rows-of-input": Between(0, ("Slice x s e i -> b", ("Concat x b -> d", {"axis": 1}),
                                        ("Concat h d -> r", {"axis": 2})),
                                    {"s": ints(0), "e": ints(1), "i": ints(1)}),
    "slice": Between(4, ("Slice h s e i t -> r",), {"s": ints(1), "e": ints(4), "i": ints(1),
            "t": ints(2)}, 2),
    "slice-reversed": Between(4, ("Slice h s e i t -> r",),
                              {"s": ints(-1), "e": ints(-9), "i": ints(-3), "t": ints(-1)}),
    "slice-rows": Between(8, (*ROWS, "Slice a s e i t -> r"), CONV_C
                          | {"s": ints(5, 0), "e": ints(99, 99), "i": ints(2, 3), "t": ints(3, 2)},
                          4 * 3 * 3, tail="flat"),
    "slice-empty": Between(4, ("Slice h s e i -> a", ("Concat a h -> r", {"axis": 2})),
                           {"s": ints(3), "e": ints(3), "i": ints(2)}),
    "empty-pooled": Between(0, ("Slice h s e i -> a", ("ReduceSum a z -> b", {"keepdims": 1}),
            "Add b h -> r"),
                            {"s": ints(3), "e": ints(3), "i": ints(2), "z": ints(2)}),
    "split-unequal": Between(4, (("Split h s -> a b", {"axis": 1}), "Relu a -> c",
                                 ("Concat b c -> r", {"axis": 1})), {"s": ints(1, 3)}),
    "split-by-number": Between(9, ("Conv h k -> g", ("Split g -> a b c", {"axis": -3, "num_outputs": 3}),
                                   ("Concat c a b -> r", {"axis": 1})), {"k": normal(5, 4, 1, 1)}, 5,
                                           opset=18),
    "split-one-unread": Between(4, (("Split h -> a b", {"axis": 1}), "Relu b -> r"), {}, 2),
    "split-added": Between(2, (("Split h -> a b", {"axis": 1}), "Add b a -> r"), {}, 2),
    "shuffle": Between(4, SHUFFLE, {"s1": ints(0, 2, 2, 6, 6), "s2": ints(0, 4, 6, 6)}),
    "reshape-of-size": Between(4, (("Shape h -> s", {"end": 1}), ("Concat s t -> u", {"axis": 0}),
            "Reshape h u -> r"),
                               {"t": ints(4, 36, 1)}),
    "reshape-mixes": Between(2, ("Reshape h s -> r",), {"s": ints(0, 6, 4, 6)}, 6),
    "reshape-batch": Between(4, ("Reshape h s -> a", "Relu a -> b", "Reshape b u -> r"),
                             {"s": ints(-1, 36), "u": ints(-1, 4, 6, 6)}),
    "flatten": Between(4, (("Flatten h -> r", {"axis": 1}),), {}, 144, tail="matmul"),
    "to-last": Between(4, (("Transpose h -> r", {"perm": [0, 2, 3, 1]}),), tail="matmul"),
    "squeeze": Between(4, ("GlobalAveragePool h -> a", "Squeeze a z -> b", "Unsqueeze b u -> r"),
                       {"z": ints(-1, -2), "u": ints(1)}, tail="matmul"),
    "depth-to-space": Between(1, (("DepthToSpace h -> r", {"blocksize": 2}),), {}, 1),
    "depth-to-space-apart": Between(4, (("DepthToSpace h -> r", {"blocksize": 2, "mode": "CRD"}),), {},
            144, tail="flat"),
    "space-to-depth": Between(4, (("SpaceToDepth h -> r", {"blocksize": 2}),), {}, 16),
    "tile": Between(4, ("Tile h t -> r",), {"t": ints(1, 2, 1, 3)}, 8),
    "expand": Between(4, ("GlobalMaxPool h -> a", "Expand a t -> r"), {"t": ints(1, 4, 5, 2)}),
    "class-token": Between(4, (("Shape x -> n", {"end": 1}), ("Concat n u -> s", {"axis": 0}),
            "Expand c s -> d",
                               ("Concat d h -> r", {"axis": 1})), {"c": normal(1, 1, 4), "u": ints(1,
                                       4)}, lead=T),
    "class-token-tile": Between(  # of which only the token is read: nothing reads the four of h
        8, (("Shape x -> n", {"end": 1}), ("Concat n u -> s", {"axis": 0}), "Tile c s -> d",
            ("Concat d h -> e", {"axis": 1}), ("Gather e i -> r", {"axis": 1})),
        {"c": normal(1, 1, 4), "u": ints(1, 1), "i": scalar(0, np.int64)}, lead=T),
    "positions": Between(4, ("Add h p -> r",), {"p": normal(1, 5, 4)}, lead=T),
    "gather": Between(4, (("Gather h i -> r", {"axis": 1}),), {"i": ints(3, 0, -4, -2)}),
    "gather-matrix": Between(4, (("Gather h i -> a", {"axis": -3}), "Reshape a s -> r"),
                             {"i": ints(3, 0, -4, -2).reshape(2, 2), "s": ints(0, 4, 6, 6)}),
    "gather-scalar": Between(4, (("Gather h i -> r", {"axis": 2}),), {"i": scalar(-1, np.int64)}, 24,
            tail="flat"),
    "gather-by-data": Between(1, (("Gather h i -> r", {"axis": 1}),), inputs={"i": (INT64, (4,))}),
    "gather-rows-by-data": Between(4, (("Gather h i -> r", {"axis": -1}),), inputs={"i": (INT64, (2,))}),
    "gather-scalar-by-data": Between(1, ("Squeeze i -> j", ("Gather h j -> a", {"axis": 1}),
            "Unsqueeze a u -> r"),
                                     {"u": ints(1)}, 1, inputs={"i": (INT64, (1,))}),
    "embedding": Between(4, ("Gather e i -> a", "Add a h -> r"), {"e": normal(7, 4)}, lead=T,
                         inputs={"i": (INT64, ("n", 5))}),
}  # fmt: skip
PADS = {
    "zeros": Between(4, ("Pad h p -> r",), {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    "ones": Between(0, ("Pad h p c -> r",), {"p": ints(0, 0, 1, 2, 0, 0, 3, 0), "c": scalar(1)}),
    "infinite": Between(0, ("Pad h p c -> a", ("MaxPool a -> r", {"kernel_shape": [2, 2]})),
                        {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "c": scalar(-np.inf)}),
    "reflect": Between(4, (("Pad h p -> r", {"mode": "reflect"}),), {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    "reflect-ones": Between(4, (("Pad h p c -> r", {"mode": "reflect"}),),
                            {"p": ints(0, 0, 1, 2, 0, 0, 3, 0), "c": scalar(1)}),
    "edge-channels": Between(1, (("Pad h p -> r", {"mode": "edge"}),), {"p": ints(0, 1, 0, 0, 0, 1, 0,
            0)}, 6),
    "channels": Between(4, ("Pad h p -> r",), {"p": ints(0, 1, 0, 0, 0, 2, 0, 0)}, 7),
    "channels-shifted": Between(4, ("Pad h p -> r",), {"p": ints(0, 1, 0, 0, 0, -1, 0, 0)}),
    "channels-cropped": Between(4, ("Pad h p -> r",), {"p": ints(0, -1, 0, 0, 0, -1, 0, 0)}, 2),
    "axes": Between(4, ("Pad h p _ a -> r",), {"p": ints(2, 0, -1, 1), "a": ints(-3, 2)}, 5, opset=18),
    "rows": Between(8, (*ROWS, "Pad a p -> r"), CONV_C | {"p": ints(0, 0, -3, 0, 0, 0, 3, 0)}, 288,
            tail="flat"),
    "of-data": Between(0, ("Reshape c s -> d", "Pad h p d -> r"), {"p": ints(0, 0, 1, 0, 0, 0, 1, 0),
            "s": ints()},
                       inputs={"c": (FLOAT, (1,))}),
}  # fmt: skip
TWICE = {"z": np.float32([1, 1, 2, 2])}
RESIZES = {
    "nearest": Between(4, ("Resize h _ z -> r",), TWICE),
    "linear": Between(4, (("Resize h _ z -> r", {"mode": "linear"}),), TWICE),
    "cubic": Between(4, (("Resize h _ z -> r", {"mode": "cubic"}),), TWICE),
    "align": Between(
        4, (("Resize h _ z -> r", {"mode": "linear",
                "coordinate_transformation_mode": "align_corners"}),), TWICE
    ),
    "sizes": Between(4, (("Shape h -> s", {"end": 2}), ("Concat s t -> u", {"axis": 0}),
                         ("Resize h _ _ u -> r", {"mode": "linear"})), {"t": ints(9, 4)}),
    "axes": Between(4, (("Resize h _ _ u -> r", {"mode": "linear", "axes": [3, 2]}),), {"u": ints(4, 9)},
            opset=18),
    "crop": Between(
        0, (("Resize h roi z -> r", {"mode": "linear",
                "coordinate_transformation_mode": "tf_crop_and_resize",
                                     "extrapolation_value": 3.0}),),
        TWICE | {"roi": np.float32([0, 0, -0.5, 0, 1, 1, 1.5, 1])}),
    "same-size": Between(  # 12 rows * 1.05 are 12 rows at other places
        4, (*ROWS, ("Resize a _ z -> r", {"mode": "linear"})), CONV_C | {"z": np.float32([1, 1, 1.05,
                1])}, 288,
        tail="flat"),
    "unmoved-rows": Between(8, (*ROWS, "Resize a _ z -> r"), CONV_C | {"z": np.float32([1, 1, 1, 2])},
            576, tail="flat"),
    "channels": Between(1, ("Resize h _ z -> r",), {"z": np.float32([1, 2, 1, 1])}, 8),
}  # fmt: skip
NORM = {"s": positive(4), "b": normal(4), "m": normal(4), "v": positive(4)}
LAYERS = {
    "conv": Between(6, (("Conv h k b -> r", {"pads": [1, 1, 1, 1]}),), {"k": normal(2, 4, 3, 3),
            "b": normal(2)}, 2),
    "conv-groups": Between(10, (("Conv h k b -> r", {"group": 2}),), {"k": normal(6, 2, 3, 3),
            "b": normal(6)}, 6),
    "depthwise": Between(12, (("Conv h k -> r", {"group": 4}),), {"k": normal(8, 1, 3, 3)}, 8),
    "conv-by-data": Between(0, ("Conv h q -> r",), inputs={"q": (FLOAT, (4, 4, 1, 1))}),
    "conv-1d": Between(8, ("Reshape h s -> a", ("Conv a k b -> c", {"group": 2}),
                           ("Transpose c -> r", {"perm": [0, 2, 1]})),
                       {"s": ints(0, 4, 36), "k": normal(4, 2, 3), "b": normal(4)}, 4, tail="matmul"),
    "conv-3d": Between(8, ("Reshape h s -> a", "Conv a k b -> r"),
                       {"s": ints(0, 4, 4, 3, 3), "k": normal(4, 4, 2, 2, 2), "b": normal(4)},
                               4 * 3 * 2 * 2, tail="flat"),
    "transpose": Between(7, (("ConvTranspose h k b -> r", {"strides": [2, 2]}),),
                         {"k": normal(4, 3, 2, 2), "b": normal(3)}, 3),
    "transpose-groups": Between(10, (("ConvTranspose h k b -> r", {"group": 2, "strides": [2, 1]}),),
                                {"k": normal(4, 3, 2, 3), "b": normal(6)}, 6),
    "transpose-1d": Between(8, ("Reshape h s -> a", ("ConvTranspose a k -> c", {"group": 4}),
                                ("Transpose c -> r", {"perm": [0, 2, 1]})),
                            {"s": ints(0, 4, 36), "k": normal(4, 1, 3)}, 4, tail="matmul"),
    "transpose-3d": Between(6, ("Reshape h s -> a", "ConvTranspose a k -> r"),
                            {"s": ints(0, 4, 4, 3, 3), "k": normal(4, 2, 2, 2, 2)}, 2 * 5 * 4 * 4,
                                    tail="flat"),
    "matmul-vector": Between(6, ("GlobalMaxPool h -> a", "Slice a s e i -> b", "Reshape b t -> c",
            "MatMul c k -> d",
                                 "Unsqueeze d i -> r"),
                             {"s": ints(0), "e": ints(1), "i": ints(0), "t": ints(4), "k": normal(4, 2)}, 2,
                             tail="matmul", batch=1),
    "matmul-left": Between(0, ("MatMul k h -> r",), {"k": normal(6, 6)}),
    "matmul-many": Between(0, ("MatMul h k -> r",), {"k": normal(4, 6, 6)}),
    "batch-norm": Between(8, ("BatchNormalization h s b m v -> r",), NORM),
    "batch-norm-tokens": Between(8, (("Transpose h -> a", {"perm": [0, 2, 1]}),
            "BatchNormalization a s b m v -> c",
                                     ("Transpose c -> r", {"perm": [0, 2, 1]})), NORM, lead=T),
    "batch-norm-shared": Between(8, ("BatchNormalization h s s s v -> r",), NORM),
    "instance-norm": Between(4, ("InstanceNormalization h s b -> r",), NORM),
    "group-norm": Between(4, (("GroupNormalization h s b -> r", {"num_groups": 2}),), NORM, opset=21),
    "group-norm-18": Between(0, (("GroupNormalization h s b -> r", {"num_groups": 2}),),
                             {"s": normal(2), "b": normal(2)}, opset=18),
    "group-norm-18-as-many": Between(4, (("GroupNormalization h s b -> r", {"num_groups": 4}),), NORM,
            opset=18),
    "layer-norm": Between(4, ("LayerNormalization h s b -> r",), NORM, lead=T),
    "layer-norm-no-bias": Between(4, ("LayerNormalization h s -> r",), NORM, lead=T),
    "layer-norm-axis": Between(4, (("LayerNormalization h s b -> r", {"axis": 1}),),
                               {"s": normal(5, 4), "b": normal(5, 4)}, lead=T),
    "layer-norm-axis-apart": Between(20, (("LayerNormalization h s b -> r", {"axis": -2}),),
                                     {"s": normal(5, 4), "b": normal(5, 4)}, 20, lead=T, tail="flat"),
    "layer-norm-statistics": Between(4, ("LayerNormalization h s b -> r mean i",), NORM, lead=T,
            outputs=("mean",)),
    "rms-norm": Between(4, ("RMSNormalization h s -> r",), NORM, lead=T, opset=23),
    "lstm": Between(4, (("LSTM h w w2 -> a", {"hidden_size": 4}), "Squeeze a z -> r"),
                    {"w": normal(1, 16, 4), "w2": normal(1, 16, 4), "z": ints(1)}, lead=T),
    "gru-both-ways": Between(4, (("GRU h w w2 b -> a", {"hidden_size": 2, "direction": "bidirectional"}),
                                 ("Transpose a -> c", {"perm": [0, 2, 1, 3]}), "Reshape c t -> r"),
                             {"w": normal(2, 6, 4), "w2": normal(2, 6, 2), "b": normal(2, 12),
                                     "t": ints(0, 0, 4)}, lead=T),
    "attention": Between(
        8, ("MatMul h kq -> q", "MatMul h kk -> k", "MatMul h kv -> v", "Reshape q s -> q1",
                "Reshape k s -> k1",
            "Reshape v s -> v1", ("Transpose q1 -> q2", {"perm": [0, 2, 1, 3]}),
            ("Transpose k1 -> k2", {"perm": [0, 2, 3, 1]}), ("Transpose v1 -> v2", {"perm": [0, 2, 1, 3]}),
            "MatMul q2 k2 -> a", "Mul a half -> a1", ("Softmax a1 -> p", {"axis": -1}), "MatMul p v2 -> o",
            ("Transpose o -> o1", {"perm": [0, 2, 1, 3]}), "Reshape o1 t -> r"),
        {"kq": normal(4, 4, seed=1), "kk": normal(4, 4, seed=2), "kv": normal(4, 4, seed=3),
                "half": scalar(0.5),
         "s": ints(0, 5, 2, 2), "t": ints(0, 5, 4)}, lead=T),
    "mixing-by-right": Between(4, (("Transpose h -> a", {"perm": [0, 2, 1]}), "MatMul x kp -> p",
                                   ("Softmax p -> q", {"axis": -1}), "MatMul a q -> b",
                                   ("Transpose b -> r", {"perm": [0, 2, 1]})), {"kp": normal(3, 6)},
                                           lead=T),
    "tokens-apart-mixed": Between(
        4, (("LayerNormalization h s b -> c", {"axis": 1}), "MatMul x kp -> p", ("Softmax p -> q",
                {"axis": -1}),
            "MatMul q c -> r"),
        {"s": normal(5, 4), "b": normal(5, 4), "kp": normal(3, 5)}, 20, lead=T, tail="flat"),
    "tokens-apart-mixed-by-right": Between(
        5, (("LayerNormalization h s b -> c", {"axis": 1}), ("ReduceMax x -> m", {"axes": [1]}),
            "MatMul m kp -> p", "Sigmoid p -> q", "Reshape q t -> w", "MatMul c w -> r"),
        {"s": normal(5, 4), "b": normal(5, 4), "kp": normal(3, 8), "t": ints(0, 4, 2)}, 10, lead=T,
                tail="flat"),
    "covariance": Between(0, (("Transpose h -> a", {"perm": [0, 2, 1]}), "MatMul a h -> r"), lead=T),
}  # fmt: skip
POOLED = ("ReduceMean h -> q", {"axes": [1], "keepdims": 0})
GEMMS = {
    name: Between(count, (POOLED, ("Gemm q k b -> r" if bias is not None else "Gemm q k -> r", attributes)),
                  {"k": normal(*((6, 4) if attributes.get("transB") else (4, 6))),
                          "b": bias} if bias is not None
                  else {"k": normal(4, 6)}, 6, lead=T, batch=BATCH)
    for name, count, attributes, bias in (
        ("plain", 10, {}, None),
        ("vector", 10, {"alpha": 0.5, "beta": 3.0, "transB": 1}, normal(6)),
        ("row", 10, {"beta": 0.25}, normal(1, 6)),
        ("matrix", 10, {}, normal(BATCH, 6)),
        ("column", 5, {"transB": 1}, normal(BATCH, 1)),
        ("one", 5, {}, normal(1)),
        ("one-by-one", 5, {}, normal(1, 1)),
        ("scalar", 5, {"alpha": 2.0}, scalar(0.5)),
        ("zero", 10, {}, scalar(0)),
    )
} | {
    "bias-of-data": Between(10, (POOLED, "MatMul q k2 -> b", "Gemm q k b -> r"),
                            {"k": normal(4, 6), "k2": normal(4, 6, seed=1)}, 6, lead=T),
    "transposed-data": Between(0, (POOLED, ("Transpose q -> b", {"perm": [1, 0]}), ("Gemm b k -> r",
            {"transA": 1})),
                               {"k": normal(4, 6)}, 6, lead=T),
    "kernel-of-data": Between(0, (POOLED, "Gemm q k -> r"), {}, 6, lead=T, inputs={"k": (FLOAT, (4, 6))}),
}  # fmt: skip
GROUPS = {
    "passing": PASSING, "clip": CLIPS, "pool": POOLS, "reduction": REDUCTIONS, "sum": SUMS,
            "product": PRODUCTS,
    "movement": MOVEMENTS, "pad": PADS, "resize": RESIZES, "layer": LAYERS, "gemm": GEMMS,
}  # fmt: skip
