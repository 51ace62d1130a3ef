"""Draw random small Linen programs, and a config of Quant-Trim for each.

A program has a twin that holds the same parameters and computes the same function without any lifted
transformation: where the program has nn.jit, nn.remat or nn.cond, the twin calls the module itself, and where
it has nn.scan or nn.vmap, the twin loops over the slices in Python. Names tell the bodies of the lifted
transformations: a module whose name ends in "_body" is lifted, and one that ends in "_stack_body"
has its variables stacked along axis 0. The twin calls slice i of it "_stack_body__i".

Steps are drawn while the network is traced, from a generator that starts at the block's seed anew for every
trace. Each step keeps the shape (batch, height, width, channels), so that any step may follow any other.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt

Draw = np.random.Generator
SHAPE = (2, 5, 5, 4)
CHANNELS = SHAPE[-1]
AXES = {"params": 0, "batch_stats": 0}
SLICE = re.compile(r"(_stack_body)__(\d+)")


def pick(rng: Draw, *choices):
    return choices[rng.integers(len(choices))]


class User(nn.Module):
    """Call a layer that belongs to another module."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class Branches(nn.Module):
    """Apply one of two modules that belong to another one."""

    left: nn.Module
    right: nn.Module
    twin: bool

    @nn.compact
    def __call__(self, x, flag):
        if self.is_initializing():
            return self.left(x, flag) + self.right(x, flag)
        if self.twin:
            return (self.left if flag else self.right)(x, flag)
        left, right = (lambda m, x, flag: m.left(x, flag)), (lambda m, x, flag: m.right(x, flag))
        return nn.cond(flag, left, right, self, x, flag)


class Block(nn.Module):
    """Apply `steps` random steps. Lifted transformations are nested at most `depth` deep.

    Attributes:
      seed: Seed of the steps.
      train: Whether batch norms normalise by the batch, and dropout drops.
      twin: Whether to be the twin.
      dtype: Type of the arithmetic, or None.
      drops: Whether dropout is among the steps. Slices draw other masks than a loop over them.
    """

    seed: int
    train: bool
    twin: bool = False
    dtype: Any = None
    drops: bool = False
    depth: int = 0
    steps: int = 2

    @nn.compact
    def __call__(self, x, flag):
        rng, y = np.random.default_rng(self.seed), x
        for index in range(self.steps):
            steps = STEPS + LIFTED * 4 if self.depth else STEPS
            step = pick(rng, *steps)
            y = step(self, f"{step.__name__}{index}", rng, y, flag)
        return y.astype(x.dtype)

    def fields(self, name: str, rng: Draw, drops: bool) -> dict[str, Any]:
        """Return the fields of a block inside this one."""
        fields = {"seed": int(rng.integers(2**31)), "train": self.train, "twin": self.twin}
        fields |= {"dtype": self.dtype, "drops": self.drops and drops, "depth": self.depth - 1}
        return fields | {"name": name, "steps": pick(rng, 1, 1, 2)}


class Carried(Block):
    """Be a block that nn.scan takes as a class."""

    @nn.compact
    def __call__(self, x, flag):
        return super().__call__(x, flag), None


class Arranged(Block):
    """Make the layers in `setup`, and apply them in a random order, some more than once and some never."""

    def setup(self):
        rng = np.random.default_rng(self.seed)
        self.dense = nn.Dense(CHANNELS, dtype=self.dtype)
        self.layers = [layer(self, None, rng) for layer in (convolution, einsum)]
        self.norm = batch_norm(self, None)

    def __call__(self, x, flag):
        rng = np.random.default_rng(self.seed + 1)
        choices = [self.dense, *self.layers, self.norm, nn.relu]
        y = choices[int(rng.integers(3))](x)
        for choice in rng.integers(0, len(choices), 2):
            y = y + choices[choice](y if rng.integers(3) else x)
        return nn.tanh(y).astype(x.dtype)


# --- layers: (block, name, rng) -> a module that keeps the shape ---


def convolution(block: Block, name: str | None, rng: Draw, **options) -> nn.Module:
    given = {
        "kernel_size": pick(rng, (1, 1), (3, 3), (3, 1)),
        "feature_group_count": pick(rng, 1, 1, 2, CHANNELS),
        "use_bias": bool(rng.integers(2)),
    }
    return nn.Conv(CHANNELS, **given | options, dtype=block.dtype, name=name)


def transposed_convolution(block: Block, name: str | None, rng: Draw) -> nn.Module:
    size, transpose = pick(rng, (2, 2), (3, 3)), bool(rng.integers(2))
    return nn.ConvTranspose(CHANNELS, size, transpose_kernel=transpose, dtype=block.dtype, name=name)


def dense(block: Block, name: str | None, rng: Draw) -> nn.Module:
    return nn.Dense(CHANNELS, use_bias=bool(rng.integers(2)), dtype=block.dtype, name=name)


def general(block: Block, name: str | None, rng: Draw) -> nn.Module:
    return nn.DenseGeneral(SHAPE[-2:], axis=(-2, -1), dtype=block.dtype, name=name)


def einsum(block: Block, name: str | None, rng: Draw) -> nn.Module:
    return nn.Einsum((CHANNELS, CHANNELS), "...a,ab->...b", dtype=block.dtype, name=name)


def batch_norm(block: Block, name: str | None) -> nn.Module:
    options = {"momentum": 0.8, "epsilon": 1e-2, "dtype": block.dtype, "name": name}
    return nn.BatchNorm(not block.train, **options)


def layer(block: Block, name: str | None, rng: Draw) -> nn.Module:
    return pick(rng, convolution, convolution, transposed_convolution, dense, general, einsum)(
        block, name, rng
    )


# --- steps: (block, name, rng, x, flag) -> a tensor of the same shape ---


def single(block: Block, name: str, rng: Draw, x, flag):
    return layer(block, name, rng)(x)


def normed(block: Block, name: str, rng: Draw, x, flag):
    x = convolution(block, name, rng, use_bias=bool(rng.integers(2)))(x)
    return nn.relu(batch_norm(block, f"{name}_norm")(x))


def attention(block: Block, name: str, rng: Draw, x, flag):
    tokens = nn.LayerNorm(dtype=block.dtype, epsilon=0.1, name=f"{name}_norm")(x)
    tokens = tokens.reshape(x.shape[0], -1, x.shape[-1])
    attend = nn.MultiHeadDotProductAttention(2, dtype=block.dtype, deterministic=True, name=name)
    source = (nn.relu(tokens),) if rng.integers(2) else ()
    return x + attend(tokens, *source).reshape(x.shape)


def activation(block: Block, name: str, rng: Draw, x, flag):
    x = nn.GroupNorm(2, epsilon=0.1, dtype=block.dtype, name=name)(x) if rng.integers(2) else x
    return pick(rng, nn.relu, nn.gelu)(x)


def dropout(block: Block, name: str, rng: Draw, x, flag):
    if not block.drops:
        return nn.gelu(x)
    return nn.Dropout(0.3, deterministic=not block.train, name=name)(x)


def residual(block: Block, name: str, rng: Draw, x, flag):
    return nn.relu(x + pick(rng, single, normed)(block, name, rng, x, flag))


def shared(block: Block, name: str, rng: Draw, x, flag):
    """Apply one layer to two tensors or more, and perhaps another one to the first of them."""
    one = layer(block, name, rng)
    y = one(x) + one(pick(rng, 0.3, 3.0) * nn.relu(x))
    y = one(y) if rng.integers(2) else y
    return y + layer(block, f"{name}_other", rng)(x) if rng.integers(2) else y


def consumers(block: Block, name: str, rng: Draw, x, flag):
    """Apply several layers to one tensor."""
    x = nn.relu(x) if rng.integers(2) else x
    ys = [layer(block, f"{name}_{i}", rng)(x) for i in range(rng.integers(2, 4))]
    return sum(ys[1:], ys[0])


def tied(block: Block, name: str, rng: Draw, x, flag):
    one = layer(block, name, rng)
    return one(x) + User(one, name=f"{name}_user")(nn.gelu(x))


def sequential(block: Block, name: str, rng: Draw, x, flag):
    return nn.Sequential([layer(block, None, rng), nn.relu, layer(block, None, rng)], name=name)(x)


# --- steps with a lifted transformation ---


def called(block: Block, name: str, rng: Draw, x, flag):
    """Apply a body under nn.jit or nn.remat, lifted as a class or as a function, once or twice."""
    lift, kind, by_class = pick(rng, nn.jit, nn.remat), pick(rng, Block, Arranged), rng.integers(2)
    fields = block.fields(f"{name}_body", rng, drops=False)
    body = lift(kind)(**fields) if by_class and not block.twin else kind(**fields)
    for _ in range(pick(rng, 1, 1, 2)):
        if block.twin or by_class:
            x = body(x, flag)
        else:
            x = lift(lambda body, x, flag: body(x, flag))(body, x, flag)
    return x


def lifted_layer(block: Block, name: str, rng: Draw, x, flag):
    """Lift a layer itself by nn.jit or nn.remat."""
    lift, options = pick(rng, nn.jit, nn.remat), {"dtype": block.dtype, "name": f"{name}_body"}
    kind, given = pick(rng, (nn.Dense, {}), (nn.Conv, {"kernel_size": (3, 3)}))
    return (kind if block.twin else lift(kind))(CHANNELS, **given, **options)(x)


def scanned(block: Block, name: str, rng: Draw, x, flag):
    length, by_class = pick(rng, 2, 3), rng.integers(2)
    fields = block.fields(f"{name}_stack_body", rng, drops=False)
    if block.twin:
        for body in slices(Block, fields, length):
            x = body(x, flag)
        return x
    options = {"variable_axes": AXES, "split_rngs": {"params": True}, "length": length}
    options |= {"in_axes": nn.broadcast}
    if by_class:
        return nn.scan(Carried, **options)(**fields)(x, flag)[0]
    scan = nn.scan(lambda body, x, flag: (body(x, flag), None), **options)
    return scan(Block(**fields), x, flag)[0]


def mapped(block: Block, name: str, rng: Draw, x, flag):
    """Apply several bodies side by side, to one tensor or to one each."""
    length, one, by_class = int(rng.integers(2, 4)), bool(rng.integers(2)), rng.integers(2)
    fields = block.fields(f"{name}_stack_body", rng, drops=False)
    scales = [1.0 + i for i in range(length)]
    xs = [x if one else scale * x for scale in scales]
    if block.twin:
        bodies = slices(Block, fields, length)
        return jnp.mean(jnp.stack([body(x, flag) for body, x in zip(bodies, xs, strict=True)]), 0)
    options = {"variable_axes": AXES, "split_rngs": {"params": True}, "axis_size": length}
    options |= {"in_axes": (None if one else 0, None)}
    x = x if one else jnp.stack(xs)
    if by_class:
        return jnp.mean(nn.vmap(Block, **options)(**fields)(x, flag), 0)
    return jnp.mean(nn.vmap(lambda body, x, flag: body(x, flag), **options)(Block(**fields), x, flag), 0)


def branched(block: Block, name: str, rng: Draw, x, flag):
    """Choose one of two bodies by the flag.."""
    kinds = [pick(rng, Block, Arranged) for _ in range(2)]
    fields = [block.fields(f"{name}_{side}_body", rng, drops=False) for side in ("left", "right")]
    left, right = (kind(**given) for kind, given in zip(kinds, fields, strict=True))
    return Branches(left, right, block.twin, name=name)(x, flag)


def slices(kind: type[Block], fields: dict[str, Any], length: int) -> list[Block]:
    return [kind(**{**fields, "name": f"{fields['name']}__{i}"}) for i in range(length)]


Step = Callable[..., jax.Array]
STEPS: tuple[Step, ...] = (single, single, normed, normed, attention, activation, dropout, residual)
STEPS += (shared, shared, consumers, tied, sequential)
LIFTED: tuple[Step, ...] = (called, lifted_layer, scanned, mapped, branched)


class Network(nn.Module):
    """Apply a random block and a head. The fields are those of `Block`."""

    seed: int
    train: bool
    twin: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x, flag):
        rng = np.random.default_rng(self.seed)
        fields = {"depth": pick(rng, 0, 1, 1, 1, 2), "steps": pick(rng, 1, 1, 2), "drops": True}
        kind = pick(rng, Block, Block, Block, Arranged)
        fields |= {"train": self.train, "twin": self.twin, "dtype": self.dtype, "name": "block"}
        x = kind(seed=int(rng.integers(2**31)), **fields)(x, flag)
        return nn.Dense(3, dtype=self.dtype, name="head")(jnp.mean(x, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class Program:
    """Hold a network, a config without rules and fused outputs, and the batches of three training passes.

    Attributes:
      folds: Whether grids lie where folding puts them.
      fuses: Whether outputs that a compiler requantizes have a grid.
      batches: (x, flag) for each pass.
      lambdas: Lambda of each pass.
    """

    seed: int
    dtype: Any
    config: qt.QuantConfig
    fuses: bool
    batches: tuple[tuple[np.ndarray, np.ndarray], ...]
    lambdas: tuple[float, ...]

    def network(self, *, train: bool, twin: bool = False) -> Network:
        return Network(self.seed, train, twin, self.dtype)

    def draw_variables(self) -> dict[str, Any]:
        """Draw parameters and statistics as training leaves them: no scale or variance is 1, no bias 0."""
        rng, inputs = np.random.default_rng([self.seed, 3]), self.batches[0]

        def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if path[-1].key in ("scale", "var"):
                return jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), leaf.dtype)
            return jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype)

        shapes = jax.eval_shape(self.network(train=False).init, jax.random.key(0), *inputs)
        return jax.tree.map_with_path(draw, shapes)


def draw_program(seed: int) -> Program:
    """Draw a program. Its second pass takes the other side of every branch, and may be of not-a-numbers."""
    rng = np.random.default_rng([seed, 1])
    lambdas = pick(rng, (0.0, 1.0, 0.3), (1.0, 0.3, 1.0), (0.3, 1.0, 1.0))
    first, scales = bool(rng.integers(2)), rng.uniform(0.5, 2.0, 3)
    scales[1] = pick(rng, *[scales[1]] * 9, np.nan)
    batches = tuple(
        (np.float32(scale * rng.normal(rng.uniform(-0.5, 0.5), 1.0, SHAPE)), np.bool_(first ^ (i == 1)))
        for i, scale in enumerate(scales)
    )
    dtype = pick(rng, None, None, jnp.bfloat16)
    return Program(seed, dtype, draw_config(rng), bool(rng.integers(4) == 0), batches, lambdas)


def draw_spec(rng: Draw, *, symmetric: bool, axis: int | None = None) -> qt.QuantSpec:
    """Draw a spec. The full symmetric grid of a min-max range is left out: its end lies on a tie."""
    spec = qt.QuantSpec(
        bits=pick(rng, 4, 8),
        symmetric=symmetric,
        axis=axis,
        narrow_range=pick(rng, None, None, True, False),
        ste=pick(rng, "identity", "clipped"),
        quantile=pick(rng, 1.0, 0.999, 0.97),
    )
    return dataclasses.replace(spec, narrow_range=None) if symmetric and spec.quantile == 1.0 else spec


def draw_config(rng: Draw) -> qt.QuantConfig:
    return qt.QuantConfig(
        weights=draw_spec(rng, symmetric=bool(rng.integers(4)), axis=pick(rng, None, -1)),
        activations=draw_spec(rng, symmetric=bool(rng.integers(2))),
        outputs=pick(rng, None, None, draw_spec(rng, symmetric=bool(rng.integers(2)))),
        momentum=pick(rng, 0.0, 0.5, 0.9, 0.99),
        sample_size=pick(rng, 4096, 4096, 61, 7),
        folded=bool(rng.integers(3) == 0),
    )


def draw_rules(seed: int, paths: list[str]) -> tuple[qt.Rule, ...]:
    """Draw up to two rules for some of these paths of layers."""
    rng = np.random.default_rng([seed, 2])
    chosen = rng.permutation(paths)[: rng.integers(0, min(3, len(paths)))]
    return tuple(
        pick(
            rng,
            qt.Rule(path, skip=True),
            qt.Rule(path, weights=None),
            qt.Rule(path, inputs=draw_spec(rng, symmetric=bool(rng.integers(2)))),
            qt.Rule(path, weights=draw_spec(rng, symmetric=True), outputs=draw_spec(rng, symmetric=False)),
        )
        for path in map(re.escape, map(str, chosen))
    )


def lifted_path(path: str) -> str:
    """Return the program's path of a module of the twin.

    >>> lifted_path("block/scanned0_stack_body__1/dense")
    'block/scanned0_stack_body/dense'
    """
    return SLICE.sub(r"\1", path)


def twin_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of one collection as the twin names them, stacked ones cut into slices.

    >>> twin_tree({"a_stack_body": {"kernel": np.arange(2)}})
    {'a_stack_body__0': {'kernel': np.int64(0)}, 'a_stack_body__1': {'kernel': np.int64(1)}}
    """
    found = {}
    for path, leaf in flatten_dict(dict(tree)).items():
        stacks = [i for i, name in enumerate(path) if name.endswith("_stack_body")]
        for index in np.ndindex(np.shape(leaf)[: len(stacks)]):
            cut = list(path)
            for i, number in zip(stacks, index, strict=True):
                cut[i] = f"{path[i]}__{number}"
            found[tuple(cut)] = leaf[index] if stacks else leaf
    return unflatten_dict(found)
