"""Check that Transposes between the two layouts stand where they are fewest, on nets and on drawn graphs."""

import itertools

import flax.linen as nn
import numpy as np
import pytest

from qt_jax.export import graph
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.placement import place_transposes

RNG = np.random.default_rng(0)
GRAPHS = 120
SIZES = [2, 3, 4, 5]
LAST, FIRST = {"perm": TO_CHANNELS_LAST[4]}, {"perm": TO_CHANNELS_FIRST[4]}
CONSTANTS = {
    "scale": RNG.normal(size=3).astype(np.float32),
    "first": RNG.normal(size=(3, 1, 1)).astype(np.float32),
    "number": np.float32(0.5),
    "halves": np.array([4, 4]),
}


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


class PoolBlock(nn.Module):
    """Mix tokens by a pool, then channels by an MLP, as PoolFormer does, with layer norms over channels."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        y = nn.avg_pool(y, (3, 3), (1, 1), "SAME", count_include_pad=False) - y
        x = x + self.param("scale", nn.initializers.ones, (1, 1, 1, x.shape[-1])) * y
        y = nn.Dense(8)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y, approximate=False))


class PoolNet(nn.Module):
    """Apply `blocks` blocks between two convolutions."""

    blocks: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1)(x)
        for _ in range(self.blocks):
            x = PoolBlock()(x)
        return nn.Conv(2, (3, 3), padding=1)(x)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_shortcuts_lie_in_the_layout_of_most_operators(blocks, export):
    """Two Transposes around each pool, and one at either end."""
    found = export(PoolNet(blocks), (8, 8, 3), opset=21)
    assert found.operators["Transpose"] == 2 * blocks + 2


POOL = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
FEWER = {
    "numbers by channel": (
        [
            ("MaxPool", "input", "p", POOL),
            ("Transpose", "p", "a", LAST),
            ("LayerNormalization", "a scale", "n", {"axis": -1}),
            ("Transpose", "n", "m", FIRST),
            ("Mul", "m first", "s", {}),
            ("Add", "s p", "r", {}),
            ("Transpose", "r", "t", LAST),
            ("LayerNormalization", "t scale", "u", {"axis": -1}),
            ("Transpose", "u", "output", FIRST),
        ],
        2,
    ),
    "a concat and a split": (
        [
            ("Transpose", "input", "a", LAST),
            ("LayerNormalization", "a scale", "n", {"axis": -1}),
            ("Transpose", "n", "m", FIRST),
            ("Concat", "m input", "c", {"axis": 2}),
            ("Split", "c halves", "d e", {"axis": 2}),
            ("Softmax", "d", "f", {"axis": 1}),
            ("Clip", "e number", "g", {}),
            ("Transpose", "f", "h", LAST),
            ("Transpose", "g", "i", LAST),
            ("LayerNormalization", "h scale", "j", {"axis": -1}),
            ("LayerNormalization", "i scale", "k", {"axis": -1}),
            ("Sub", "j k", "l", {}),
            ("Transpose", "l", "output", FIRST),
        ],
        2,
    ),
}


@pytest.mark.parametrize("name", FEWER)
def test_operators_change_their_layout_together(name, build, check_equal):
    nodes, left = FEWER[name]
    model = build(nodes, CONSTANTS, SIZES, output_rank=4, opset=18)
    placed = place_transposes(model)
    assert operators(placed).count("Transpose") == left
    check_equal(model, placed, normal(*SIZES))


AS_FEW = {
    "one way": [
        ("Relu", "input", "a", {}),
        ("Transpose", "a", "b", LAST),
        ("LayerNormalization", "b scale", "c", {"axis": -1}),
        ("Transpose", "c", "output", FIRST),
    ],
    "the bias of a product": [
        ("Transpose", "input", "a", LAST),
        ("MatMul", "a square", "b", {}),
        ("Add", "b scale", "c", {}),
        ("Transpose", "c", "d", FIRST),
        ("Add", "d input", "output", {}),
    ],
    "another order": [
        ("Transpose", "input", "a", {"perm": [0, 1, 3, 2]}),
        ("Relu", "a", "b", {}),
        ("Transpose", "b", "output", {"perm": [0, 1, 3, 2]}),
    ],
    "one tensor in three orders": [
        ("Transpose", "input", "a", LAST),
        ("Relu", "a", "b", {}),
        ("Transpose", "b", "c", LAST),
        ("Relu", "c", "d", {}),
        ("Transpose", "d", "output", LAST),
    ],
}


@pytest.mark.parametrize("name", AS_FEW)
def test_where_as_few_would_remain_nothing_changes(name, build):
    constants = CONSTANTS | {"square": normal(3, 3)}
    model = build(AS_FEW[name], constants, SIZES, output_rank=4, opset=18)
    assert place_transposes(model) is model


def drawn(rng):
    """Draw layer norms, pools and elementwise operators, with a Transpose wherever one is needed.

    Returns:
      The nodes as `build` takes them, the layout of each operator that has one, and which image each
      operator reads: pairs of an image and its reader.
    """
    nodes, reads, layouts = [], [], {"input": "first"}
    images, fixed = ["input"], {"input": "first", "output": "first"}

    def read(image, layout):
        moved = image if layouts[image] == layout else f"{image}/{layout}"
        if moved not in layouts:
            layouts[moved] = layout
            nodes.append(("Transpose", image, moved, LAST if layout == "last" else FIRST))
        return moved

    count = int(rng.integers(3, 10))
    for name in (*(f"x{number}" for number in range(count)), "output"):
        kind = rng.choice(["norm", "pool", "Relu", "Add", "Add"]) if name != "output" else "pool"
        layouts[name] = {"norm": "last", "pool": "first"}.get(kind, str(rng.choice(["first", "last"])))
        recent = images[-3:] if name != "output" else images[-1:]
        sources = [str(rng.choice(recent)) for _ in range(2 if kind == "Add" else 1)]
        reads += [(source, name) for source in sources]
        inputs = " ".join(read(source, layouts[name]) for source in sources)
        if kind == "norm":
            nodes.append(("LayerNormalization", f"{inputs} scale", name, {"axis": -1}))
        else:
            nodes.append(("MaxPool", inputs, name, POOL) if kind == "pool" else (kind, inputs, name, {}))
        if kind in ("norm", "pool"):
            fixed[name] = layouts[name]
        images.append(name)
    return nodes, fixed, reads


def fewest_transposes(fixed, reads, live):
    """Count the Transposes of the best choice, by trying all."""
    reads = [(source, reader) for source, reader in reads if reader in live]
    free = sorted({name for pair in reads for name in pair} - fixed.keys())
    counts = []
    for choice in itertools.product(["first", "last"], repeat=len(free)):
        layout = fixed | dict(zip(free, choice, strict=True))
        counts.append(len({source for source, reader in reads if layout[reader] != layout[source]}))
    return min(counts)


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_no_choice_of_layouts_has_fewer(seed, build, check_equal):
    nodes, fixed, reads = drawn(np.random.default_rng(seed))
    model = build(nodes, CONSTANTS, SIZES, output_rank=4, opset=18)
    model = graph.rebuild(model, model.graph.node, graph.constants(model))  # without dead ends
    live = {name for node in model.graph.node for name in node.output}
    placed = place_transposes(model)
    assert operators(placed).count("Transpose") == fewest_transposes(fixed, reads, live)
    check_equal(model, placed, normal(*SIZES))
