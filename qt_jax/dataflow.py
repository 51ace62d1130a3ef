"""Follow values through the traced program of a Linen model, whatever modules are called in it.

A `TracedProgram` is the jaxpr of one `apply` as a flat list of equations on numbered values. Compiled calls
are inlined. The bodies of `nn.scan` and the branches of `nn.cond` follow their equation, so that what happens
in them can be seen too. A value is static if it depends on nothing but the variables and constants of the
program. A static value of a loop's body has one element for each step of the loop if it depends on an
operand that is scanned, such as the kernels of a stack of layers.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import copy_p

from qt_jax.errors import InvalidInput

Path = tuple[str, ...]
"""Path of a leaf of the variables, key by key."""

TRANSPARENT = frozenset({"name", "convert_element_type", "copy", "optimization_barrier"})
"""Primitives that hand a tensor on as it is."""

CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "custom_jvp_call", "custom_vjp_call", "eval_jaxpr"), "call_jaxpr"),
}
"""Maps each primitive that is inlined to the parameter that holds the jaxpr it calls."""


class Value(NamedTuple):
    """Describe one value of a program.

    Attributes:
      shape: Its shape, in a loop's body that of one step.
      static: Whether it depends on variables and constants alone.
      loops: The loops of which every step has a value of its own, the outermost first.
    """

    shape: tuple[int, ...]
    static: bool
    loops: tuple[int, ...]


class Equation(NamedTuple):
    """Describe one operation. Operands are the numbers of values, or literals."""

    primitive: Any
    inputs: tuple[int | Literal, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]


class Mark(NamedTuple):
    """Tell where `checkpoint_name` was called: on which value, and inside which loops."""

    value: int
    loops: tuple[int, ...]


class TracedProgram:
    """Hold a traced program. Its first values are the variables, in the order of `leaves`, then the inputs.

    Attributes:
      leaves: Maps the path of each leaf of the variables to its value.
      types: The shape and the dtype of each leaf.
      equations: All operations. Each stands after those that make its operands.
      values: Its values by number.
      constants: The values of the constants by number.
      marks: The calls of `checkpoint_name`, by name.
      lengths: Number of steps of each loop.
      ends: The outputs of the program, of loops' bodies and of branches.
      users: The equations that take each value.
      handed: The values that a loop or a branch makes of each value by handing it on.
    """

    def __init__(self, closed: ClosedJaxpr, leaves: Mapping[Path, jax.ShapeDtypeStruct]):
        self.leaves = {path: number for number, path in enumerate(leaves)}
        self.types = dict(leaves)
        self.equations: list[Equation] = []
        self.values: list[Value] = []
        self.constants: dict[int, Any] = {}
        self.marks: dict[str, list[Mark]] = {}
        self.lengths: list[int] = []
        self.users: dict[int, list[Equation]] = {}
        self.handed: dict[int, list[int]] = {}
        arguments = [
            self._new(_shape(variable), number < len(leaves), ())
            for number, variable in enumerate(closed.jaxpr.invars)
        ]
        self.ends: set[int] = set()
        self._end(self._inline(closed.jaxpr, closed.consts, arguments, ()))

    def is_static(self, x: int | Literal) -> bool:
        """Tell whether an operand depends on variables and constants alone."""
        return isinstance(x, Literal) or self.values[x].static

    def meets(self, value: int) -> set[str]:
        """Return the primitives in which a static value, or what is computed of it, meets the activations."""
        pending, seen, found = [value], {value}, set()
        while pending:
            value = pending.pop()
            reached: list[int] = []
            for equation in self.users.get(value, ()):
                if all(self.is_static(x) for x in equation.inputs):
                    reached += equation.outputs
                elif equation.primitive.name not in (
                    "scan",
                    "cond",
                ):  # what is inside them has users of its own
                    found.add(equation.primitive.name)
            if any(not self.is_static(x) for x in self.handed.get(value, ())):
                found.add("carry")
            pending += [x for x in reached if x not in seen]
            seen |= {*reached}
        return found

    def slice(self, wanted: Iterable[int]) -> tuple[Equation, ...]:
        """Return the equations that the values `wanted` depend on, in order."""
        wanted, needed = set(wanted), []
        for equation in reversed(self.equations):
            if wanted & set(equation.outputs):
                needed.append(equation)
                wanted |= {x for x in equation.inputs if isinstance(x, int)}
        return tuple(reversed(needed))

    def evaluate(self, equations: Iterable[Equation], known: Mapping[int, Any]) -> dict[int, Any]:
        """Compute static values. A value of a loop's body gets a leading axis for each of its loops.

        Args:
          equations: Those that make the values, from `slice`.
          known: The leaves of the variables that these take, by number.
        """
        found = {**known, **self.constants}
        for equation in equations:
            operands = [x.val if isinstance(x, Literal) else found[x] for x in equation.inputs]
            loops = [() if isinstance(x, Literal) else self.values[x].loops for x in equation.inputs]
            found |= zip(equation.outputs, _bind(equation, operands, loops), strict=True)
        return found

    def _new(self, shape: tuple[int, ...], static: bool, loops: tuple[int, ...]) -> int:
        self.values.append(Value(shape, static, loops))
        return len(self.values) - 1

    def _add(
        self,
        primitive: Any,
        inputs: tuple[int | Literal, ...],
        shapes: Sequence[tuple[int, ...]],
        params: Mapping[str, Any],
        around: tuple[int, ...],
        scanned: tuple[int, ...] = (),
    ) -> list[int]:
        """Add an equation inside the loops `around`, and return the numbers of its outputs."""
        static = all(self.is_static(x) for x in inputs)
        numbers = {x for x in inputs if isinstance(x, int)}
        loops = {loop for x in numbers for loop in self.values[x].loops} | {*scanned}
        outputs = [self._new(shape, static, tuple(sorted(loops)) if static else around) for shape in shapes]
        equation = Equation(primitive, inputs, tuple(outputs), params)
        self.equations.append(equation)
        for number in numbers:
            self.users.setdefault(number, []).append(equation)
        if primitive.name == "name":
            self.marks.setdefault(params["name"], []).append(Mark(outputs[0], around))
        return outputs

    def _inline(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[Any],
        arguments: Sequence[int | Literal],
        around: tuple[int, ...],
    ) -> list[int | Literal]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            values[variable] = number = self._new(_shape(variable), True, ())
            self.constants[number] = constant
        for equation in jaxpr.eqns:
            operands = tuple(x if isinstance(x, Literal) else values[x] for x in equation.invars)
            name, params = equation.primitive.name, equation.params
            inner = params.get(CALLS.get(name, ""))
            if inner is not None:
                outputs = self._inline(*opened(inner), operands, around)
            else:
                shapes = [_shape(variable) for variable in equation.outvars]
                outputs = [*self._add(equation.primitive, operands, shapes, params, around)]
                if name == "scan":
                    self._enter_loop(params, operands, outputs, around)
                elif name == "cond":
                    for branch in params["branches"]:
                        self._end(self._inline(*opened(branch), operands[1:], around), outputs)
            values |= zip(equation.outvars, outputs, strict=True)
        return [x if isinstance(x, Literal) else values[x] for x in jaxpr.outvars]

    def _enter_loop(
        self,
        params: Mapping[str, Any],
        operands: Sequence[int | Literal],
        outputs: Sequence[Any],
        around: tuple[int, ...],
    ) -> None:
        """Add the equations of the body of a scan. A carry that comes out as it goes in is a constant."""
        body, constants = opened(params["jaxpr"])
        loop, inside = len(self.lengths), (*around, len(self.lengths))
        self.lengths.append(params["length"])
        ranks = [len(_shape(x) if isinstance(x, Literal) else self.values[x].shape) for x in operands]
        first, carries = split_scan(body, ranks, [len(self.values[x].shape) for x in outputs])
        arguments: list[int | Literal] = []
        for place, (x, variable) in enumerate(zip(operands, body.invars, strict=True)):
            shape = _shape(variable)
            if place < first or (place < first + carries and body.outvars[place - first] is variable):
                arguments.append(x)
            elif place >= first + carries and self.is_static(x):
                arguments += self._add(copy_p, (x,), [shape], {}, around, scanned=(loop,))
            else:
                arguments.append(self._new(shape, False, inside))
                self._hand_on(x, arguments[-1])
        made = self._inline(body, constants, arguments, inside)
        self._end(made, outputs)
        for x, carry in zip(made[:carries], arguments[first : first + carries], strict=True):
            self._hand_on(x, carry)

    def _end(self, made: Sequence[int | Literal], outputs: Sequence[Any] = ()) -> None:
        """Note the outputs of a body, which its equation hands on as `outputs`."""
        self.ends |= {x for x in made if isinstance(x, int)}
        for x, output in zip(made, outputs, strict=False):
            self._hand_on(x, output)

    def _hand_on(self, x: int | Literal, to: int | Literal) -> None:
        if isinstance(x, int) and isinstance(to, int):
            self.handed.setdefault(x, []).append(to)


def trace(
    model: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple[Any, ...],
    options: Mapping[str, Any],
    context: Callable[[], contextlib.AbstractContextManager[Any]],
) -> TracedProgram:
    """Trace `model.apply(variables, *inputs, **options)` inside a context, such as one of `intercept`.

    The arrays among the inputs and options are traced. All else is passed as it is, such as `train=False`.
    """
    leaves, structure = leaves_by_path(variables), jax.tree.structure(variables)
    given, tree = jax.tree.flatten((inputs, dict(options)))
    traced = [
        place
        for place, leaf in enumerate(given)
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    ]

    def forward(leaves: list[Any], arrays: list[Any]) -> Any:
        whole = [*given]
        for place, array in zip(traced, arrays, strict=True):
            whole[place] = array
        inputs, options = jax.tree.unflatten(tree, whole)
        with context():
            outputs = model.apply(jax.tree.unflatten(structure, leaves), *inputs, **options)
        return [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(forward)([*leaves.values()], [given[place] for place in traced])
    types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
    return TracedProgram(closed, dict(zip(leaves, types[: len(leaves)], strict=True)))


def leaves_by_path(tree: Any) -> dict[Path, Any]:
    """Return the arrays of a tree of dicts, lists and tuples by path, in the order of `jax.tree.leaves`.

    >>> leaves_by_path({"losses": {"l2": (1.0, 2.0)}, "params": {"bias": None, "kernel": 3.0}})
    {('losses', 'l2', '0'): 1.0, ('losses', 'l2', '1'): 2.0, ('params', 'kernel'): 3.0}
    """
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def known_leaves(
    program: TracedProgram, equations: Iterable[Equation], values: Iterable[int], variables: Mapping[str, Any]
) -> dict[int, jax.Array]:
    """Return the leaves that equations and values take, by number, in the shapes and dtypes of the trace.

    Raises:
      InvalidInput: A leaf is missing, or has another number of elements.
    """
    taken = {x for equation in equations for x in equation.inputs if isinstance(x, int)} | {*values}
    given, found = leaves_by_path(variables), {}
    for path, number in program.leaves.items():
        if number not in taken:
            continue
        name, (shape, dtype) = "/".join(path), (program.types[path].shape, program.types[path].dtype)
        if path not in given:
            raise InvalidInput(f"the variables lack {name!r}, which the traced network has")
        if np.size(given[path]) != np.prod(shape, dtype=int):
            raise InvalidInput(
                f"{name!r} has shape {np.shape(given[path])}, and {shape} where the network was traced: call "
                "find_fusion with variables of these shapes"
            )
        found[number] = jax.numpy.reshape(given[path], shape).astype(dtype)
    return found


def _bind(equation: Equation, operands: Sequence[Any], loops: Sequence[tuple[int, ...]]) -> Sequence[Any]:
    """Run an equation on operands that have leading axes for their loops, and return its outputs."""

    def bind(*operands: Any) -> Any:
        found = equation.primitive.bind(*operands, **equation.params)
        return found if equation.primitive.multiple_results else [found]

    for loop in sorted({loop for own in loops for loop in own}, reverse=True):
        bind = jax.vmap(bind, in_axes=tuple(0 if loop in own else None for own in loops))
    return bind(*operands)


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr and its constants."""
    return (jaxpr, []) if isinstance(jaxpr, Jaxpr) else (jaxpr.jaxpr, jaxpr.consts)


def split_scan(body: Jaxpr, operands: Sequence[int], outputs: Sequence[int]) -> tuple[int, int]:
    """Return how many of a scan's operands are constants, and how many of those that follow are carries.

    The other operands are scanned row by row. A row has one axis more outside of the loop than inside.

    Args:
      body: The jaxpr of one step.
      operands: Number of axes of each operand.
      outputs: Number of axes of each output, of which the carries come first.
    """
    rows = sum(rank > len(_shape(v)) for rank, v in zip(operands, body.invars, strict=True))
    carries = sum(rank == len(_shape(v)) for rank, v in zip(outputs, body.outvars, strict=True))
    return len(operands) - rows - carries, carries


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
