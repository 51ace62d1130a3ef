"""Test that random graphs give the same bits when their channels are rescaled by powers of two."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from onnx import helper, shape_inference

from qt_jax.equalization.channels import find_freedom
from qt_jax.equalization.rescaling import rescale, tensors_of, with_own_constants
from tests.qt_jax.channel_cases import FLOAT, ints, make, run, samples_of, scalar


class Composition:
    """Compose a graph: names of tensors with their shapes, of which `unread` are read by no node yet."""

    def __init__(self):
        self.nodes, self.constants = [], {}
        self.shapes = {"x": (2, 4, 6, 4)}
        self.unread = ["x"]
        self.outputs = []

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def weights(self, rng, *shape):
        """Return a constant: a new one, or at times one of the same shape that other nodes read."""
        held = [
            name
            for name, value in self.constants.items()
            if value.shape == shape and value.dtype == np.float32
        ]
        if held and rng.random() < 0.2:
            return held[rng.integers(len(held))]
        return self.constant(rng.standard_normal(shape).astype(np.float32))

    def add(self, operator, *inputs, results=1, **attributes):
        """Append a node; return the name of its output, or their names."""
        start = len(self.shapes)
        outputs = [f"t{start + i}" for i in range(results)]
        new = helper.make_node(operator, inputs, outputs, name=f"n{len(self.nodes)}", **attributes)
        held = {name: self.constants[name] for name in inputs if name in self.constants}
        entries = {name: (FLOAT, self.shapes[name]) for name in inputs if name in self.shapes}
        single = shape_inference.infer_shapes(
            make([new], held, entries, outputs), strict_mode=True, data_prop=True
        )
        for entry in single.graph.output:
            self.shapes[entry.name] = tuple(axis.dim_value for axis in entry.type.tensor_type.shape.dim)
        self.nodes.append(new)
        self.unread = [name for name in self.unread if name not in inputs] + outputs
        return outputs[0] if results == 1 else outputs

    def like(self, rng, name):
        """Return another tensor of the same shape, or the same one."""
        same = [other for other, shape in self.shapes.items() if shape == self.shapes[name]]
        return same[rng.integers(len(same))]

    def model(self, rng):
        """Let products of different factors for each element read what nothing reads, and put these out."""
        for name in list(self.unread):
            flat = self.add("Reshape", name, self.constant(ints(1, -1)))
            self.outputs.append(self.add("MatMul", flat, self.weights(rng, self.shapes[flat][1], 2)))
        return make(self.nodes, self.constants, {"x": (FLOAT, self.shapes["x"])}, self.outputs)


def axis_of(rng, shape):
    return int(rng.integers(len(shape)))


def part_of(rng, shape):
    """Draw a shape that broadcasts to `shape`."""
    kept = rng.random(len(shape)) < 0.5
    sizes = [size if keep else 1 for size, keep in zip(shape, kept, strict=True)]
    return sizes[rng.integers(len(shape) + 1) :]


def convolve(p, rng, x):
    shape = p.shapes[x]
    if len(shape) != 4:
        return p.add("MatMul", x, p.weights(rng, shape[-1], int(rng.integers(1, 6))))
    groups = int(rng.choice([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    size, outputs = int(rng.choice([1, 3])), int(rng.integers(1, 3))
    pads = {"pads": [size // 2] * 4}
    if rng.random() < 0.3:
        kernel = p.weights(rng, shape[1], outputs, size, size)
        return p.add("ConvTranspose", x, kernel, p.weights(rng, groups * outputs), group=groups, **pads)
    kernel = p.weights(rng, groups * outputs, shape[1] // groups, size, size)
    return p.add("Conv", x, kernel, p.weights(rng, groups * outputs), group=groups, **pads)


def multiply(p, rng, x):
    return p.add("MatMul", x, p.weights(rng, p.shapes[x][-1], int(rng.integers(1, 6))))


def gemm(p, rng, x):
    flat, size = p.add("Flatten", x, axis=1), int(rng.integers(1, 6))
    kernel = p.weights(rng, size, p.shapes[flat][1])
    bias = p.weights(rng, *part_of(rng, (p.shapes[flat][0], size)))
    return p.add("Gemm", flat, kernel, bias, transB=1, alpha=0.5)


def activate(p, rng, x):
    kind = rng.choice(["Relu", "Abs", "Neg", "LeakyRelu", "Sigmoid", "Tanh", "PRelu", "Identity"])
    return p.add(kind, x, *([p.weights(rng, *part_of(rng, p.shapes[x]))] if kind == "PRelu" else []))


def clip(p, rng, x):
    low, high = (p.constant(scalar(value)) for value in (rng.choice([0, -0.5]), 2.0))
    return p.add("Clip", x, low, rng.choice([high, ""]))


def add(p, rng, x):
    operands = [x, p.weights(rng, *part_of(rng, p.shapes[x]))]
    return p.add(rng.choice(["Add", "Sub", "Max", "Min"]), *rng.permutation(operands))


def scale(p, rng, x):
    other = p.weights(rng, *part_of(rng, p.shapes[x]))
    return p.add(rng.choice(["Mul", "Div"]), x, other) if rng.random() < 0.8 else p.add("Mul", other, x)


def residual(p, rng, x):
    return p.add(rng.choice(["Add", "Sub", "Max", "Sum", "Mean"]), x, p.like(rng, x))


def gate(p, rng, x):
    other = p.add("Sigmoid", p.like(rng, x))
    if rng.random() < 0.5:
        other = p.add("ReduceMean", other, axes=[axis_of(rng, p.shapes[x])])
    return p.add("Mul", *rng.permutation([x, other]))


def product(p, rng, x):
    return p.add("Mul", x, p.like(rng, x))


def concatenate(p, rng, x):
    return p.add("Concat", x, p.like(rng, x), axis=axis_of(rng, p.shapes[x]) - len(p.shapes[x]))


def cut(p, rng, x):
    axis = axis_of(rng, p.shapes[x])
    size = p.shapes[x][axis]
    step = int(rng.choice([-2, -1, 1, 2]))
    start, end = (int(rng.integers(0, size)), 99) if step > 0 else (-int(rng.integers(1, size + 1)), -99)
    return p.add("Slice", x, *(p.constant(ints(value)) for value in (start, end, axis, step)))


def split(p, rng, x):
    axis = axis_of(rng, p.shapes[x])
    size = p.shapes[x][axis]
    if size < 2:
        return p.add("Relu", x)
    at = int(rng.integers(1, size))
    one, two = p.add("Split", x, p.constant(ints(at, size - at)), results=2, axis=axis)
    return p.add("Concat", two, p.add("Relu", one), axis=axis) if rng.random() < 0.7 else two


def reshape(p, rng, x):
    shape = list(p.shapes[x])
    axis = axis_of(rng, shape)
    if rng.random() < 0.5 and axis + 1 < len(shape) and len(shape) > 2:
        shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    elif shape[axis] % 2 == 0 and len(shape) < 5:
        shape[axis : axis + 1] = rng.permutation([2, shape[axis] // 2]).tolist()
    return p.add("Reshape", x, p.constant(ints(*shape)))


def transpose(p, rng, x):
    return p.add("Transpose", x, perm=rng.permutation(len(p.shapes[x])).tolist())


def pad(p, rng, x):
    shape = p.shapes[x]
    pads = np.zeros((2, len(shape)), np.int64)
    pads[:, axis_of(rng, shape)] = rng.integers(-1, 3, 2)
    pads[1] = np.maximum(pads[1], 1 - np.array(shape) - pads[0])
    return p.add(
        "Pad",
        x,
        p.constant(pads.ravel()),
        mode=rng.choice(["constant", "edge"]) if pads.min() >= 0 else "constant",
    )


def pool(p, rng, x):
    if len(p.shapes[x]) != 4:
        return reduce(p, rng, x)
    window = {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}
    kind = rng.choice(["AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"])
    return p.add(kind, x, **({} if kind.startswith("Global") else window))


def reduce(p, rng, x):
    kind = rng.choice(["ReduceMean", "ReduceMax", "ReduceL1", "ReduceL2"])
    keep = int(len(p.shapes[x]) < 3 or rng.random() < 0.6)
    return p.add(kind, x, axes=[axis_of(rng, p.shapes[x])], keepdims=keep)


def normalize(p, rng, x):
    shape = p.shapes[x]
    if rng.random() < 0.5 and len(shape) > 2:
        scale, bias, mean = (p.weights(rng, shape[1]) for _ in range(3))
        variance = p.constant(rng.uniform(0.5, 2, shape[1]).astype(np.float32))
        return p.add("BatchNormalization", x, scale, bias, mean, variance)
    axis = axis_of(rng, shape)
    scale, bias = (p.weights(rng, *shape[axis:]) for _ in range(2))
    return p.add("LayerNormalization", x, scale, bias, axis=axis)


def tile(p, rng, x):
    repeats = np.ones(len(p.shapes[x]), np.int64)
    repeats[axis_of(rng, p.shapes[x])] = 2
    return p.add("Tile", x, p.constant(repeats))


def gather(p, rng, x):
    axis = axis_of(rng, p.shapes[x])
    index = rng.integers(-p.shapes[x][axis], p.shapes[x][axis], rng.integers(1, 4))
    return p.add("Gather", x, p.constant(index), axis=axis)


def choose(p, rng, x):
    mask = p.constant(rng.random(part_of(rng, p.shapes[x])) < 0.5)
    other = p.like(rng, x) if rng.random() < 0.5 else p.weights(rng, *part_of(rng, p.shapes[x]))
    return p.add("Where", mask, *rng.permutation([x, other]))


def resize(p, rng, x):
    scales = np.ones(len(p.shapes[x]), np.float32)
    scales[axis_of(rng, scales)] = rng.choice([1.05, 1.5, 2.0])
    return p.add("Resize", x, "", p.constant(scales), mode="nearest")


def blocks(p, rng, x):
    shape = p.shapes[x]
    if len(shape) == 4 and shape[1] % 4 == 0:
        return p.add("DepthToSpace", x, blocksize=2, mode=rng.choice(["DCR", "CRD"]))
    if len(shape) == 4 and shape[2] % 2 == shape[3] % 2 == 0:
        return p.add("SpaceToDepth", x, blocksize=2)
    return p.add("Relu", x)


def attend(p, rng, x):
    """Mix along the last axis but one by probabilities, or along the last one."""
    size = p.shapes[x][-2]
    scores = p.add("MatMul", x, p.weights(rng, p.shapes[x][-1], size))
    probabilities = p.add("Softmax", scores, axis=-1)
    return p.add("MatMul", probabilities, p.add("Relu", x))


def put_out(p, rng, x):
    p.outputs.append(x)
    return p.add("Relu", x)


STEPS = (
    activate, add, attend, blocks, choose, clip, concatenate, convolve, cut, gate, gather, gemm,
            multiply, normalize,
    pad, pool, product, put_out, reduce, reshape, residual, resize, scale, split, tile, transpose,
)  # fmt: skip
LARGEST = 1500
"""Number of elements above which no step goes on from a tensor."""
PROGRAMS = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 999)), min_size=3, max_size=12)


def check_program(steps):
    """Compose a program that begins with a layer, and check it.

    Now and then a step goes on from an earlier tensor, which then is read twice.
    """
    program = Composition()
    last = convolve(program, np.random.default_rng(0), "x")
    for step, seed in steps:
        rng = np.random.default_rng(seed)
        if rng.random() < 0.2:
            last = rng.choice(list(program.shapes))
        if np.prod(program.shapes[last]) <= LARGEST and len(program.shapes[last]) > 1:
            last = step(program, rng, str(last))
    assert_same_bits(program.model(np.random.default_rng(1)))


def assert_same_bits(model):
    base = with_own_constants(model)
    samples = samples_of(model)
    freedom = find_freedom(base, tensors_of(base, samples))
    exponents = np.random.default_rng(2).integers(-3, 4, freedom.count)
    rescaled = rescale(base, freedom, np.concatenate([[1.0], 2.0**exponents]))
    for one, two in zip(run(model, samples), run(rescaled, samples), strict=True):
        np.testing.assert_array_equal(one, two)


@settings(max_examples=120)
@given(PROGRAMS)
def test_random_programs_give_the_same_bits(steps):
    check_program(steps)


@pytest.mark.slow
@settings(max_examples=2500)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9999)), min_size=6, max_size=30))
def test_long_random_programs_give_the_same_bits(steps):
    check_program(steps)
