"""Check padding, transposed convolutions and resizes against JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.padding import explicit_padding, fold_pad

RNG = np.random.default_rng(0)
POOL = {"kernel_shape": [3, 3], "pads": [0] * 4, "strides": [2, 2]}
ONE = np.array([0, 0, 1, 0, 0, 0, 0, 1])


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


FOLDED = {
    "zeros before a convolution": ("Conv", {}, 0.0, True),
    "ones before a convolution": ("Conv", {}, 1.0, False),
    "-inf before a maximum": ("MaxPool", {}, -np.inf, True),
    "zeros before a maximum": ("MaxPool", {}, 0.0, False),
    "zeros before a mean that counts them": ("AveragePool", {"count_include_pad": 1}, 0.0, True),
    "zeros before a mean that does not": ("AveragePool", {}, 0.0, False),
}


@pytest.mark.parametrize("name", FOLDED)
def test_padding_joins_its_window(name, build, check_equal):
    operator, attributes, value, folds = FOLDED[name]
    constants = {"pads": ONE, "value": np.float32(value), "params/c/kernel": normal(4, 3, 3, 3)}
    inputs = "x params/c/kernel" if operator == "Conv" else "x"
    nodes = [("Pad", "input pads value", "x", {}), (operator, inputs, "output", POOL | attributes)]
    model = explicit_padding(build(nodes, constants, ["batch", 3, 7, 8], 4))
    folded = fold_pad(model)
    assert [node.op_type for node in folded.graph.node] == ([operator] if folds else ["Pad", operator])
    if folds:
        assert graph.attributes(folded.graph.node[0])["pads"] == [1, 0, 0, 1]
    check_equal(model, folded, normal(2, 3, 7, 8))


@pytest.mark.parametrize(
    ("pads", "mode"),
    [
        ([0, 0, -1, 0, 0, 0, 0, 0], "constant"),
        ([0, 1, 0, 0, 0, 0, 0, 0], "constant"),
        ([0, 0, 1, 1, 0, 0, 1, 1], "reflect"),
        ([0, 0, 1, 1, 0, 0, 1, 1], "edge"),
    ],
)
def test_other_padding_stays(pads, mode, build, check_equal):
    """Cropping, padded channels, and pads that are not a number."""
    channels = 3 + pads[1]
    constants = {"pads": np.array(pads), "params/c/kernel": normal(4, channels, 3, 3)}
    nodes = [("Pad", "input pads", "x", {"mode": mode}), ("Conv", "x params/c/kernel", "output", {})]
    model = explicit_padding(build(nodes, constants, ["batch", 3, 7, 8], 4))
    folded = fold_pad(model)
    assert [node.op_type for node in folded.graph.node] == ["Pad", "Conv"]
    check_equal(model, folded, normal(2, 3, 7, 8))


def test_a_pool_takes_pads_below_its_kernel_only(build):
    constants = {"pads": np.array([0, 0, 3, 0, 0, 0, 0, 0]), "value": np.float32(-np.inf)}
    nodes = [("Pad", "input pads value", "x", {}), ("MaxPool", "x", "output", POOL)]
    folded = fold_pad(explicit_padding(build(nodes, constants, ["batch", 3, 7, 8], 4)))
    assert [node.op_type for node in folded.graph.node] == ["Pad", "MaxPool"]


PADDED = {
    "max pool": (lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 0))), {"MaxPool"}),
    "max pool by position": (lambda x: nn.max_pool(x, (3, 2), (1, 2), "SAME"), {"MaxPool"}),
    "average pool": (lambda x: nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (0, 1))), {"AveragePool"}),
    "convolution": (
        lambda x: nn.Conv(4, (3, 3), padding=1)(jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)))),
        set(),
    ),
    "circular": (lambda x: nn.Conv(4, (3, 3), padding="CIRCULAR")(x), {"Concat", "Slice"}),
}


@pytest.mark.parametrize("name", PADDED)
def test_explicit_padding(name, export_body):
    body, expected = PADDED[name]
    with jax.numpy_dtype_promotion("standard"):
        operators = export_body(body).operators
    assert set(operators) == expected | {"Conv", "GlobalAveragePool", "Flatten", "Gemm"}


@pytest.mark.parametrize(
    "options",
    [
        {"strides": (2, 2)},
        {"strides": (2, 2), "padding": "VALID"},
        {"strides": (3, 4), "padding": "VALID"},
        {"strides": (3, 4), "padding": "SAME"},
        {"strides": (2, 1), "padding": ((1, 2), (1, 1))},
        {"kernel_dilation": (2, 1), "padding": "VALID"},
        {"use_bias": False},
    ],
)
def test_transposed_convolutions(options, export):
    """Also with strides beyond the kernel, between whose copies nothing lies. One of stride 1 is a Conv."""
    found = export(nn.ConvTranspose(3, (2, 3), **options), (4, 5, 2))
    assert found.operators == {"ConvTranspose" if "strides" in options else "Conv": 1}


def test_a_transposed_convolution_beyond_its_reach(export):
    with pytest.raises(InvalidInput, match=r'by "kernel" pads its input beyond the kernel\'s reach'):
        export(nn.ConvTranspose(3, (2, 2), (2, 2), padding=((3, 3), (1, 1))), (4, 5, 2))
    export(
        nn.ConvTranspose(3, (2, 2), padding=((3, 3), (1, 1))), (4, 5, 2)
    )  # of stride 1: a plain convolution


class Resize(nn.Module):
    method: str
    size: tuple[int, int]
    antialias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[0], *self.size, x.shape[3])
        return jax.image.resize(x, shape, self.method, antialias=self.antialias)


@pytest.mark.parametrize("method", ["nearest", "linear", "bilinear", "cubic"])
@pytest.mark.parametrize("size", [(16, 10), (7, 9), (8, 16), (13, 5), (49, 41)])
def test_enlarging(method, size, export):
    """7 -> 16 and the like, whose scales float32 does not hold."""
    assert export(Resize(method, size), (7, 5, 2)).operators == {"Resize": 1}


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("size", [(3, 5), (4, 2), (10, 3)])
def test_reducing_without_antialias(method, size, export):
    assert export(Resize(method, size, antialias=False), (7, 5, 2)).operators == {"Resize": 1}


def test_sizes_come_out_whole_at_every_scale(export):
    """The recorded shapes are those of onnxruntime too: it would warn and fall back otherwise."""

    class Ladder(nn.Module):
        @nn.compact
        def __call__(self, x):
            sizes = [(5, 9), (12, 22), (23, 25), (41, 49)]
            return tuple(Resize("nearest", size)(x) for size in sizes)

    model = export(Ladder(), (3, 5, 1)).model
    shapes = graph.shapes(model)
    assert [shapes[output.name][2:] for output in model.graph.output] == [
        (5, 9),
        (12, 22),
        (23, 25),
        (41, 49),
    ]


@given(
    size=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    width=st.integers(1, 3),
    stride=st.integers(1, 3),
    mode=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
)
def test_pads_equal_those_of_jax(size, width, stride, mode, build):
    window = {"kernel_shape": [width] * 2, "strides": [stride] * 2}
    nodes = [("MaxPool", "input", "output", {"auto_pad": mode, **window})]
    model = explicit_padding(build(nodes, {}, ["batch", 3, *size], 4))
    pads = jax.lax.padtype_to_pads(size, [width] * 2, [stride] * 2, mode.removesuffix("_UPPER"))
    stated = graph.attributes(model.graph.node[0])
    assert stated["pads"] == [low for low, _ in pads] + [high for _, high in pads]
    assert "auto_pad" not in stated and stated["dilations"] == [1, 1]


def test_windows_that_cannot_be_stated_are_refused(build):
    window = {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}
    with pytest.raises(InvalidInput, match="unknown height or width"):
        explicit_padding(build([("MaxPool", "input", "output", window)], {}, ["batch", 3, "h", "w"], 4))
    with pytest.raises(InvalidInput, match="computed from the images"):
        explicit_padding(build([("Conv", "input input", "output", {})], {}, [1, 3, 3, 3], 4))
