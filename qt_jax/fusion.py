"""Find what a vendor's compiler folds and fuses, in the traced program.

Before it quantizes, every compiler folds batch norm into the kernel before it. The integer grid then holds
w * gain, not w, with gain = gamma / sqrt(variance + epsilon), one for each output channel. A compiler also
requantizes the operands of a residual sum. The published method puts its points on the raw kernel and on the
inputs of layers (Quant-Trim, arXiv 2511.15300). This module finds the other points.

It looks only at data flow: every layer's output is followed through the jaxpr of the inference pass,
whatever modules are called and however they are named.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from qt_jax.errors import InvalidInput
from qt_jax.interception import COLLECTION, GAIN, LAYERS, Call, intercept

TRANSPARENT = frozenset({"name", "convert_element_type", "copy", "optimization_barrier"})
"""Primitives that hand a tensor on as it is."""

JOINS = frozenset({"add", "mul", "concatenate"})
"""Primitives whose operands a compiler requantizes."""

CALLS = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "checkpoint", "remat2"), "jaxpr"),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
"""Maps each primitive that is inlined to the parameter that holds the jaxpr it calls."""


class Equation(NamedTuple):
    """Describe one operation of the inlined program. Operands are the numbers of values, or literals."""

    primitive: Any
    inputs: tuple[int | Literal, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]


class Factor(NamedTuple):
    """Name a value that a layer's output is multiplied with, or divided by."""

    value: int
    divides: bool


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Hold the gains of every layer's kernel as functions of the variables, and the outputs to requantize.

    Attributes:
      outputs: Paths of the modules whose output is an operand of a sum, product or concatenation of
        activations, or an output of the model. They are meant for `QuantConfig.fused_outputs`.
    """

    outputs: tuple[str, ...]
    _factors: Mapping[str, tuple[Factor, ...]]
    _equations: tuple[Equation, ...]
    _leaves: Mapping[tuple[str, ...], int]
    _constants: Mapping[int, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the paths of the layers whose kernel has a gain."""
        return tuple(self._factors)

    def gains(self, variables: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Return the gains by layer path, float32 `(channels,)`.

        Folding multiplies the kernel's output channels with them. The function can be traced, and computes
        only what the gains need: for batch norm gamma * rsqrt(variance + epsilon).
        """
        leaves = flatten_dict(dict(variables))
        known = {number: leaves[path] for path, number in self._leaves.items() if path in leaves}
        known |= self._constants
        for equation in self._equations:
            operands = [x.val if isinstance(x, Literal) else known[x] for x in equation.inputs]
            found = equation.primitive.bind(*operands, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
            known |= zip(equation.outputs, found, strict=True)
        gains = {}
        for path, factors in self._factors.items():
            gain = jnp.ones((), jnp.float32)
            for factor in factors:
                value = jnp.ravel(known[factor.value]).astype(jnp.float32)
                gain = gain / value if factor.divides else gain * value
            gains[path] = gain
        return gains

    def refresh(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables with the gains of their normalisation statistics in `batch_stats`.

        Call it on the result of every training step, so that the gains always belong to the statistics
        beside them. `attach_statistics` with a config that is `folded` makes the places for the gains.

        Raises:
          InvalidInput: There is no place for a gain.
        """
        statistics = flatten_dict(dict(variables.get(COLLECTION, {})))
        for path, gain in self.gains(variables).items():
            place = (*path.split("/"), GAIN) if path else (GAIN,)
            if place not in statistics:
                raise InvalidInput(
                    f"no place for the gain of {path!r} in {COLLECTION!r}: attach the statistics with a "
                    "QuantConfig(folded=True) first"
                )
            shape = statistics[place].shape
            statistics[place] = jnp.broadcast_to(gain, (math.prod(shape),)).reshape(shape)
        return {**variables, COLLECTION: unflatten_dict(statistics)}


def find_fusion(model: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Fusion:
    """Follow every layer's output through the traced inference pass.

    A layer's kernel has a gain if its output is used once, and is then only added to and multiplied with
    values that depend only on the variables, channel by channel. Batch norm on running statistics does so,
    and a layer scale. A factor that is one number for all channels ends the search: it moves no grid, and
    exporters leave it where it is. An `nn.Einsum` has no gain, since its kernel may have its features on any
    axis.

    Args:
      model: Any Linen module.
      variables: Its collections. Shapes matter, values do not.
      *inputs, **options: What `model.apply` takes after the variables in inference, such as `train=False`.

    Returns:
      A `Fusion`, which gives the gains of any variables of these shapes.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train=False):
    ...         x = nn.Dense(4, use_bias=False, name="first")(x)
    ...         x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    ...         return nn.Dense(2, name="second")(x)
    >>> x = jnp.ones((1, 3))
    >>> variables = Net().init(jax.random.key(0), x)
    >>> fusion = find_fusion(Net(), variables, x)
    >>> fusion.layers, fusion.outputs
    (('first',), ('second',))
    >>> fusion.gains(variables)["first"].round(4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    marks: dict[str, None] = {}  # an ordered set of paths

    def mark(call: Call, /, *args: Any, **kwargs: Any) -> Any:
        path, outputs = call.path, call(*args, **kwargs)
        if not path or not isinstance(outputs, jax.Array):
            return outputs
        marks.setdefault(path)
        if isinstance(call.module, LAYERS) and not isinstance(call.module, nn.Einsum):
            outputs = checkpoint_name(outputs, f"layer:{path}")
        return checkpoint_name(outputs, f"module:{path}")

    def forward(leaves: dict[tuple[str, ...], Any], inputs: tuple[Any, ...]) -> Any:
        with intercept(mark):
            return model.apply(unflatten_dict(leaves), *inputs, **options)

    leaves = flatten_dict(dict(variables))
    closed = jax.make_jaxpr(forward)(leaves, inputs)
    order = sorted(leaves)  # as a dict of tuples is flattened
    program = _Program(closed, len(leaves))
    numbers = dict(zip(order, range(len(leaves)), strict=True))
    factors = {path: found for path in marks if (found := program.factors(f"layer:{path}"))}
    needed = program.slice({factor.value for found in factors.values() for factor in found})
    return Fusion(
        outputs=tuple(path for path in marks if program.joins(f"module:{path}")),
        _factors=factors,
        _equations=needed,
        _leaves=numbers,
        _constants=program.constants,
    )


class _Program:
    """Hold a jaxpr with its calls inlined. The first `leaves` values are variables, then come the inputs."""

    def __init__(self, closed: ClosedJaxpr, leaves: int):
        self.equations: list[Equation] = []
        self.shapes: list[tuple[int, ...]] = []
        self.constants: dict[int, Any] = {}
        arguments = [self._new(_shape(v)) for v in closed.jaxpr.invars]
        self.results = set(self._inline(closed.jaxpr, closed.consts, arguments))
        self.static = set(range(leaves)) | self.constants.keys()
        self.users: dict[int, list[Equation]] = {}
        for equation in self.equations:
            for value in {x for x in equation.inputs if isinstance(x, int)}:
                self.users.setdefault(value, []).append(equation)
            if all(self._is_static(x) for x in equation.inputs):
                self.static |= set(equation.outputs)

    def _new(self, shape: tuple[int, ...]) -> int:
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _is_static(self, x: int | Literal) -> bool:
        return isinstance(x, Literal) or x in self.static

    def _inline(
        self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[int | Literal]
    ) -> list[int | Literal]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            values[variable] = number = self._new(_shape(variable))
            self.constants[number] = constant
        for equation in jaxpr.eqns:
            operands = tuple(x if isinstance(x, Literal) else values[x] for x in equation.invars)
            inner = equation.params.get(CALLS.get(equation.primitive.name, ""))
            if inner is not None:
                body, consts = (inner, []) if isinstance(inner, Jaxpr) else (inner.jaxpr, inner.consts)
                outputs = self._inline(body, consts, operands)
            else:
                fresh = [self._new(_shape(v)) for v in equation.outvars]
                known = Equation(equation.primitive, operands, tuple(fresh), equation.params)
                self.equations.append(known)
                outputs = [*fresh]
            values |= zip(equation.outvars, outputs, strict=True)
        return [x if isinstance(x, Literal) else values[x] for x in jaxpr.outvars]

    def _marked(self, name: str) -> list[int]:
        return [e.outputs[0] for e in self.equations if e.params.get("name") == name]

    def factors(self, mark: str) -> tuple[Factor, ...]:
        """Return the factors, one per channel, that the output under `mark` is multiplied or divided by.

        The output is followed through shifts and factors by static values, up to the first other operation.
        There are no factors unless exactly one output bears the mark.
        """
        outputs = self._marked(mark)
        if len(outputs) != 1:  # a layer that is applied twice has no single gain
            return ()
        [value] = outputs
        channels = self.shapes[value][-1:]
        found: list[Factor] = []
        while len(self.users.get(value, ())) == 1 and value not in self.results:
            [equation] = self.users[value]
            name = equation.primitive.name
            others = [x for x in equation.inputs if x != value]
            if name not in TRANSPARENT:
                if name not in ("add", "sub", "mul", "div") or len(others) != 1:
                    break
                [other] = others
                after = equation.inputs[0] == value
                if not self._is_static(other) or not (after or name in ("add", "mul")):
                    break
                if name in ("mul", "div"):
                    if isinstance(other, Literal) or not self._varies_by_channel(other, channels):
                        break
                    found.append(Factor(other, name == "div"))
            [value] = equation.outputs
        return tuple(found)

    def _varies_by_channel(self, x: int, channels: tuple[int, ...]) -> bool:
        """Return whether a static value has one number for each element of the last axis."""
        shape = self.shapes[x]
        return shape[-1:] == channels and all(size == 1 for size in shape[:-1])

    def joins(self, mark: str) -> bool:
        """Return whether an output under `mark` is itself an operand of a join or an output of the model."""
        found = False
        for value in self._marked(mark):
            pending = [value]
            while pending:
                value = pending.pop()
                found |= value in self.results
                for equation in self.users.get(value, ()):
                    name = equation.primitive.name
                    if name == "name" and equation.params["name"].startswith("module:"):
                        continue  # the module around this one returns it, and has a mark for it
                    if name in TRANSPARENT:
                        pending += equation.outputs
                    elif name in JOINS:
                        others = [x for x in equation.inputs if x != value]
                        found |= any(not self._is_static(x) for x in others)
        return found

    def slice(self, wanted: set[int]) -> tuple[Equation, ...]:
        """Return the equations that the values `wanted` depend on, in order."""
        needed: list[Equation] = []
        for equation in reversed(self.equations):
            if wanted & set(equation.outputs):
                needed.append(equation)
                wanted |= {x for x in equation.inputs if isinstance(x, int)}
        return tuple(reversed(needed))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
