"""Find what a vendor's compiler folds and fuses, in the traced program.

Before it quantizes, every compiler folds batch norm into the kernel before it. The integer grid then holds
w * gain, not w, with gain = gamma / sqrt(variance + epsilon), one for each output channel. A compiler also
requantizes the operands of a residual sum. The published method puts its points on the raw kernel and on the
inputs of layers (Quant-Trim, arXiv 2511.15300). This module finds the other points.

It looks only at data flow: every layer's output is followed through the jaxpr of the inference pass
(`qt_jax.dataflow`), whatever modules are called and however they are named.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from qt_jax import pooling
from qt_jax.dataflow import TRANSPARENT, Equation, TracedProgram, known_leaves, trace
from qt_jax.errors import InvalidInput
from qt_jax.interception import COLLECTION, GAIN, LAYERS, Call, intercept, require_linen, shadowed

JOINS = frozenset({"add", "mul", "concatenate"})
"""Primitives whose operands a compiler requantizes."""


class Factor(NamedTuple):
    """Name a static value that a layer's output is multiplied with, or divided by.

    Attributes:
      value: Its number.
      divides: Whether the output is divided by it.
      behind_maximum: Whether a maximum stands between, past which a factor moves only if it is positive for
        every channel.
    """

    value: int
    divides: bool
    behind_maximum: bool


class Folded(NamedTuple):
    """Describe a layer whose kernel has a gain.

    Attributes:
      factors: What its output is multiplied with and divided by.
      loops: The loops around the layer, the outermost first.
      transposed: Whether the features are the kernel's last axis but one.
    """

    factors: tuple[Factor, ...]
    loops: tuple[int, ...]
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Hold the gains of every layer's kernel as functions of the variables, and the outputs to requantize.

    Attributes:
      outputs: Paths of the modules whose output is an operand of a sum, product or concatenation of
        activations. They are meant for `QuantConfig.fused_outputs`.
    """

    outputs: tuple[str, ...]
    _folded: Mapping[str, Folded]
    _program: TracedProgram
    _equations: tuple[Equation, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the paths of the layers whose kernel has a gain."""
        return tuple(self._folded)

    def gains(self, variables: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Return the gains by layer path, float32 `(channels,)`, inside nn.scan `(length, channels)`.

        Folding multiplies the kernel's output channels with them. The function can be traced, and computes
        only what the gains need: for batch norm gamma * rsqrt(variance + epsilon).

        Args:
          variables: As the network was traced with. A leaf may have another shape of as many elements.

        Raises:
          InvalidInput: A leaf is missing, or has another number of elements.
        """
        values, lengths = self._program.values, self._program.lengths
        factors = [factor.value for layer in self._folded.values() for factor in layer.factors]
        leaves = known_leaves(self._program, self._equations, factors, nn.unbox(variables))
        known = self._program.evaluate(self._equations, leaves)
        gains = {}
        for path, layer in self._folded.items():
            gain = jnp.ones((1,) * (len(layer.loops) + 1), jnp.float32)
            moves = jnp.ones_like(gain, bool)
            for factor in layer.factors:
                steps = [lengths[i] if i in values[factor.value].loops else 1 for i in layer.loops]
                value = jnp.reshape(known[factor.value], (*steps, -1)).astype(jnp.float32)
                if factor.behind_maximum:
                    moves = moves & jnp.all(value > 0, axis=-1, keepdims=True)
                    value = jnp.where(moves, value, 1.0)
                gain = gain / value if factor.divides else gain * value
            gains[path] = jnp.broadcast_to(gain, (*(lengths[i] for i in layer.loops), gain.shape[-1]))
        return gains

    def refresh(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables with the gains of their normalisation statistics in `batch_stats`.

        Call it on the result of every training step, so that the gains always belong to the statistics
        beside them. `attach_statistics` with a config that is `folded` makes the places for the gains. A
        layer whose kernel that config does not quantize has none, and is passed over.

        Raises:
          InvalidInput: There is no place for any gain, or one of another shape; or as in `gains`.
        """
        statistics = flatten_dict(dict(variables.get(COLLECTION, {})))
        if self._folded and not any(path[-1] == GAIN for path in statistics):
            raise InvalidInput(
                f"no place for the gain of {self.layers[0]!r} in {COLLECTION!r}: attach the statistics with "
                "a QuantConfig(folded=True) first"
            )
        for path, gain in self.gains(variables).items():
            place = (*path.split("/"), GAIN) if path else (GAIN,)
            if place not in statistics:
                continue
            gain = gain[..., None] if self._folded[path].transposed else gain
            shape = statistics[place].shape
            if shape[-gain.ndim :] != gain.shape:
                raise InvalidInput(
                    f"the gain of {path!r} has shape {gain.shape}, and its place in {COLLECTION!r} {shape}: "
                    f'inside nn.scan, lift the collection along axis 0, variable_axes={{"{COLLECTION}": 0}}'
                )
            statistics[place] = jnp.broadcast_to(gain, shape)
        return {**variables, COLLECTION: unflatten_dict(statistics)}


def find_fusion(model: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Fusion:
    """Follow every layer's output through the traced inference pass.

    A layer's kernel has a gain if its output is used once, and is then only added to and multiplied with
    values that depend only on the variables, channel by channel. Batch norm on running statistics does so,
    and a layer scale. Pools, means and reshapes may stand between, which `to_onnx` moves such factors past;
    a maximum only while they are positive for every channel. A factor that is one number for all channels
    ends the search: it moves no grid, and exporters leave it where it is. Layers inside nn.scan have one gain
    for each kernel of the stack. A kernel that all steps share has one only if all steps have the same
    factors.

    An `nn.Einsum` has no gain, since its kernel may have its features on any axis. Neither has a layer whose
    kernel nn.vmap stacks, since compilers fold nothing into a product of two batches.

    Args:
      model: Any Linen module.
      variables: Its collections. Shapes matter, values do not.
      *inputs, **options: What `model.apply` takes after the variables in inference, such as `train=False`.

    Returns:
      A `Fusion`, which gives the gains of any variables of these shapes.

    Raises:
      InvalidInput: The model is not a Linen module.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train=False):
    ...         x = nn.Dense(4, use_bias=False, name="first")(x)
    ...         x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    ...         return x + nn.Dense(4, name="second")(x)
    >>> x = jnp.ones((1, 3))
    >>> variables = Net().init(jax.random.key(0), x)
    >>> fusion = find_fusion(Net(), variables, x)
    >>> fusion.layers, fusion.outputs
    (('first',), ('second',))
    >>> fusion.gains(variables)["first"].round(4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    require_linen(model)
    marked: dict[str, int] = {}  # how often each path was marked, in the order of the calls
    kernels: dict[str, tuple[int, bool]] = {}  # rank where it is used, and whether it is transposed

    def mark(call: Call, /, *args: Any, **kwargs: Any) -> Any:
        path, module = call.path, call.module
        before = marked.get(path)
        if isinstance(module, LAYERS) and not isinstance(module, nn.Einsum):
            promote = module.promote_dtype

            def promote_marked(inputs: jax.Array, kernel: jax.Array, *rest: Any, **options: Any) -> Any:
                kernels[path] = kernel.ndim, getattr(module, "transpose_kernel", False)
                return promote(inputs, checkpoint_name(kernel, f"kernel:{path}"), *rest, **options)

            with shadowed(module, promote_dtype=promote_marked):
                outputs = call(*args, **kwargs)
        else:
            outputs = call(*args, **kwargs)
        if not path or not isinstance(outputs, jax.Array) or marked.get(path) != before:
            return outputs  # a lifted class, such as nn.remat(nn.Dense), was marked inside the transformation
        marked[path] = marked.get(path, 0) + 1
        if path in kernels:
            outputs = checkpoint_name(outputs, f"layer:{path}")
        return checkpoint_name(outputs, f"module:{path}")

    program = trace(model, nn.unbox(variables), inputs, options, lambda: intercept(mark))
    folded = {}
    for path, (rank, transposed) in kernels.items():
        if layer := _folded(program, path, rank, transposed):
            folded[path] = layer
    wanted = {factor.value for layer in folded.values() for factor in layer.factors}
    outputs = tuple(path for path in marked if _is_joined(program, f"module:{path}"))
    return Fusion(outputs, folded, program, program.slice(wanted))


def _folded(program: TracedProgram, path: str, rank: int, transposed: bool) -> Folded | None:
    """Return what folds into the kernel of a layer, which has this rank, or None.

    The output is followed through shifts and factors by static values, up to the first other operation.
    """
    outputs, kernels = program.marks.get(f"layer:{path}", []), program.marks.get(f"kernel:{path}", [])
    if len(outputs) != 1 or not kernels:  # a layer that is applied twice has no single gain
        return None
    [(value, loops)], kernel = outputs, program.values[kernels[0].value]
    if len(kernel.shape) != rank:
        return None
    axis, maximum = len(program.values[value].shape) - 1, False
    factors: list[Factor] = []
    while len(program.users.get(value, ())) == 1 and value not in program.ends:
        [equation] = program.users[value]
        name = equation.primitive.name
        others = [x for x in equation.inputs if x != value]
        if name in ("add", "sub", "mul", "div"):
            [other] = others or [value]
            after = equation.inputs[0] == value
            if not program.is_static(other) or not (after or name in ("add", "mul")):
                break
            if name in ("mul", "div"):
                if isinstance(other, Literal) or not _is_gain(program, other, value, axis, kernel.loops):
                    break
                factors.append(Factor(other, name == "div", maximum))
        else:
            passed = pooling.passed(program, equation, axis)
            if passed is None:
                break
            equation, axis = passed
            maximum |= name in pooling.MAXIMA
        [value] = equation.outputs
    return Folded(tuple(factors), loops, transposed) if factors else None


def _is_gain(program: TracedProgram, x: int, of: int, axis: int, loops: tuple[int, ...]) -> bool:
    """Tell whether a static value has one number for each channel of a value, and for each of these loops.

    Args:
      program: The program.
      x: The static value.
      of: The value that it is multiplied with.
      axis: Axis of the channels of that.
      loops: The loops of which every step has a kernel of its own.
    """
    shape, whole = program.values[x].shape, program.values[of].shape
    wanted = tuple(size if place == axis else 1 for place, size in enumerate(whole))
    return shape == wanted and set(program.values[x].loops) <= {*loops}


def _is_joined(program: TracedProgram, name: str) -> bool:
    """Tell whether a value of this mark is itself an operand of a join of activations."""
    pending = [mark.value for mark in program.marks.get(name, ())]
    seen = {*pending}
    while pending:
        value = pending.pop()
        reached = [*program.handed.get(value, ())]
        for equation in program.users.get(value, ()):
            kind = equation.primitive.name
            if kind == "name" and equation.params["name"].startswith("module:"):
                continue  # the module around this one returns it, and has a mark for it
            if kind in TRANSPARENT:
                reached += equation.outputs
            elif kind in JOINS and not all(program.is_static(x) for x in equation.inputs if x != value):
                return True
        pending += [x for x in reached if x not in seen]
        seen |= {*reached}
    return False
