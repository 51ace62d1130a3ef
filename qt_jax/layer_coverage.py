"""Tabulate what a config reaches in a model, and what it does not, before training."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import tracers
from flax.core.scope import union_filters
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

from qt_jax.config import QuantConfig, Sites, check_rules_used
from qt_jax.dataflow import leaves_by_path, trace
from qt_jax.errors import InvalidInput
from qt_jax.grid import QuantSpec
from qt_jax.interception import (
    COLLECTION,
    LAYERS,
    Call,
    intercept,
    is_quant_trim_statistic,
    require_linen,
    shadowed,
)
from qt_jax.points import root_of


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """Describe one kernel-bearing module.

    Attributes:
      path: Flax path of the module; "" is the model itself.
      layer: Name of its class, "?" if it was not called.
      parameters: Number of elements of its parameters of rank 2 or more.
      weights, inputs, outputs: The grid of each site as `describe` names it, "-" if it has none.
      reason: Why its weights are not quantized, empty where they are.
    """

    path: str
    layer: str
    parameters: int
    weights: str
    inputs: str
    outputs: str
    reason: str = ""


def describe(spec: QuantSpec | None) -> str:
    """Name a spec in a few words.

    >>> describe(QuantSpec(8, axis=-1)), describe(QuantSpec(4, symmetric=False)), describe(None)
    ('int8 symmetric per-channel', 'uint4 asymmetric per-tensor', '-')
    """
    if spec is None:
        return "-"
    kind = "int" if spec.symmetric else "uint"
    symmetry = "symmetric" if spec.symmetric else "asymmetric"
    return f"{kind}{spec.bits} {symmetry} per-{'tensor' if spec.axis is None else 'channel'}"


def coverage(
    model: nn.Module,
    variables: dict[str, Any],
    *inputs: Any,
    config: QuantConfig = QuantConfig(),  # noqa: B008 - frozen
    console: Console | None = None,
    **options: Any,
) -> list[CoverageRow]:
    """Print which layers and sites are quantized and how, and which kernels are not reached and why.

    It fails for no model that plain Flax traces. The row of a layer that `quant_trim` would refuse says what
    to change.

    Args:
      model, variables: Any Linen module and its variables. The model is traced, not run.
      *inputs, **options: What `model.apply` takes after the variables.
      config: The config to be judged.
      console: Where to print; a new console on standard output if not given.

    Returns:
      One row for every module that owns a parameter of rank 2 or more, in the order of the parameters. Then
      one for every other module that applies a layer with variables of its own making, such as a tied head.

    Raises:
      InvalidInput: A rule of the config matches no layer, the model is not a Linen module, or the variables
        hold no parameters.

    >>> model, x = nn.Dense(2), jax.numpy.ones((1, 3))
    >>> rows = coverage(model, model.init(jax.random.key(0), x), x, console=Console(quiet=True))
    >>> rows[0].layer, rows[0].weights
    ('Dense', 'int8 symmetric per-tensor')
    """
    require_linen(model)
    variables = _without_ranges(nn.unbox(variables))
    if not variables.get("params"):
        raise InvalidInput("the variables hold no 'params': pass all that model.init or the checkpoint holds")
    leaves: dict[str, dict[str, Any]] = {}
    for keys, leaf in leaves_by_path(variables["params"]).items():
        if jax.numpy.ndim(leaf) >= 2:
            leaves.setdefault("/".join(keys[:-1]), {})[keys[-1]] = leaf
    seen = _Calls(frozenset(leaves))
    options["mutable"] = union_filters(options.get("mutable", False), COLLECTION)
    program = trace(model, variables, inputs, options, seen.noted)
    check_rules_used(config, {*seen.layers, *seen.applied.values()})

    rows = []
    for path, owned in leaves.items():
        sites, why = config.sites(path), seen.layers.get(path)
        if path in seen.layers and not sites.weights:
            why = _why_float(config, sites)
        elif path not in seen.layers:
            above = tuple(path.split("/")) if path else ()
            fates = {name: program.meets(program.leaves["params", *above, name]) for name in owned}
            why = seen.why_not(path, fates)
        reached = path in seen.layers and not seen.layers[path]
        specs = (sites.weights, sites.inputs, sites.outputs) if reached else (None, None, None)
        weights, activations, outputs = map(describe, specs)
        size = sum(leaf.size for leaf in owned.values())
        rows.append(CoverageRow(path, seen.name(path), size, weights, activations, outputs, why or ""))
    rows += [
        CoverageRow(path, "?", 0, "-", "-", "-", seen.why_not(path, {}))
        for path in seen.applied
        if path not in leaves
    ]
    _print(rows, console or Console())
    return rows


def _without_ranges(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables without any ranges, whose shapes may be those of another config."""
    statistics = flatten_dict(variables.get(COLLECTION, {}))
    plain = {path: leaf for path, leaf in statistics.items() if not is_quant_trim_statistic(path)}
    return {**variables, COLLECTION: unflatten_dict(plain)}


def _why_float(config: QuantConfig, sites: Sites) -> str:
    """Say why the weights of a layer that is reached stay in floating point."""
    if sites.rule is None:
        return "the config's default leaves weights in floating point"
    return f"set so by rule {config.rules[sites.rule].path!r}"


@dataclasses.dataclass
class _Calls:
    """Note which modules one forward pass calls.

    Attributes:
      owners: The paths of the modules that own a parameter of rank 2 or more.
      classes: The class of each module of which any method was called, by path, as the user wrote it.
      layers: Why no range can be kept for each layer that was called, by path; empty if it can. A layer that
        multiplies in code of its own, and not in that of Linen, is none.
      own_code: The paths of those.
      applied: The path of a layer in the variables that another module, by path, makes for it.
      methods: The module of each method that is running, its root scope as it began, and the trace that it
        is part of.
      running: The modules whose `__call__` is running.
    """

    owners: frozenset[str]
    classes: dict[str, type[nn.Module]] = dataclasses.field(default_factory=dict)
    layers: dict[str, str] = dataclasses.field(default_factory=dict)
    own_code: set[str] = dataclasses.field(default_factory=set)
    applied: dict[str, str] = dataclasses.field(default_factory=dict)
    methods: list[tuple[nn.Module, Any, Any]] = dataclasses.field(default_factory=list)
    running: list[Call] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note the calls inside the context."""
        with intercept(self._note_method, every_method=True), intercept(self._note_call):
            yield

    def _note_method(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        known, found = self.classes.get(call.path), type(call.module)
        if known is None or issubclass(known, found):  # a lifted class calls the one that it was made of
            self.classes[call.path] = found
        self.methods.append((call.module, root_of(call.module), tracers.current_trace()))
        try:
            return call(*args, **kwargs)
        finally:
            self.methods.pop()

    def _note_call(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        self.running.append(call)
        try:
            if not isinstance(call.module, LAYERS):
                return call(*args, **kwargs)
            promote, promoted = call.module.promote_dtype, False

            def promote_noted(*arrays: Any, **options: Any) -> Any:
                nonlocal promoted
                promoted = True
                return promote(*arrays, **options)

            with shadowed(call.module, promote_dtype=promote_noted):
                outputs = call(*args, **kwargs)
            if promoted:
                self._note_layer(call, outputs)
            else:
                self.own_code.add(call.path)
            return outputs
        finally:
            self.running.pop()

    def _note_layer(self, call: Call, outputs: Any) -> None:
        carries = [running.module.is_mutable_collection(COLLECTION) for running in self.running]
        around = self.running[carries.index(False) - 1] if False in carries[1:] else None
        own = call.path in self.owners and issubclass(type(call.module), self.classes[call.path])
        why = ""
        if around is not None and not own:
            self.applied[around.path] = call.path
            return
        if around is not None:
            why = _why_not_carried(around)
        elif self._trace_of(call.module) != tracers.current_trace():
            why = (
                "called inside one of JAX's own transformations, which Flax does not know of: use nn.cond, "
                "nn.scan, nn.remat, nn.vmap or nn.jit, with the module as its argument"
            )
        elif jax.numpy.iscomplexobj(outputs):
            why = f"computes with complex numbers: leave it out, qt.Rule({call.path!r}, skip=True)"
        self.layers[call.path] = self.layers.get(call.path) or why

    def _trace_of(self, module: nn.Module) -> Any:
        """Return the trace in which the first method of the module's pass was called."""
        within = next(root for called, root, _ in reversed(self.methods) if called is module)
        return next(trace for _, root, trace in self.methods if root is within)

    def name(self, path: str) -> str:
        """Return the name of the class of the module at a path, one that a user writes."""
        if self._is_part_of_lstm(path):
            return "OptimizedLSTMCell"
        return self.classes[path].__name__ if path in self.classes else "?"

    def _is_part_of_lstm(self, path: str) -> bool:
        around = self.classes.get(path.rpartition("/")[0])
        return around is not None and issubclass(around, nn.OptimizedLSTMCell)

    def why_not(self, path: str, fates: Mapping[str, set[str]]) -> str:
        """Say why a module is not reached.

        Args:
          path: Its path.
          fates: The primitives in which each of its parameters meets the activations, by name.
        """
        if self._is_part_of_lstm(path):
            return (
                "nn.OptimizedLSTMCell multiplies in its own code: nn.LSTMCell is the same cell of nn.Dense "
                "layers, with the same parameters"
            )
        if path in self.applied:
            return (
                "applies a layer with variables of its own making, such as a tied head: call it as a "
                f"submodule, or leave it out with qt.Rule({self.applied[path]!r}, skip=True)"
            )
        found = self.classes.get(path)
        if found is None and not any(fates.values()):
            return "never called in this forward pass"
        if found is not None and issubclass(found, LAYERS) and path not in self.own_code:
            return "called through another method than __call__"
        return "; ".join(f"{name}: {_fate(primitives)}" for name, primitives in fates.items())


def _why_not_carried(around: Call) -> str:
    """Say why nothing can be kept for a layer that the module `around` calls by a lifted transformation."""
    if isinstance(around.module, nn.RNN):
        return (
            f'nn.RNN keeps no ranges by default: give nn.RNN(cell, variable_axes={{"{COLLECTION}": 0}}), '
            "which keeps one for each step of sequences of this length"
        )
    if isinstance(around.module, (nn.WeightNorm, nn.SpectralNorm)):
        return f"{type(around.module).__name__} computes its kernel, and carries no {COLLECTION!r}"
    name, path = type(around.module).__name__, around.path
    return (
        f"{repr(path) if path else 'the model'} ({name}) calls it by a transformation that does not carry "
        f'{COLLECTION!r}: give "{COLLECTION}": 0 among the variable_axes of its nn.scan or nn.vmap, or make '
        "it the carry_variables of its nn.while_loop"
    )


PRODUCTS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})
"""Primitives of products of matrices, in which a compiler quantizes both operands."""

FATES = {
    **dict.fromkeys(("gather", "dynamic_slice"), "a table look-up"),
    **dict.fromkeys(("add", "sub"), "added"),
    **dict.fromkeys(("mul", "div"), "scales by elements"),
    "concatenate": "joined to the activations",
    "carry": "the first state of a loop",
}
"""What happens to a parameter where it meets the activations, by primitive."""


def _fate(primitives: set[str]) -> str:
    """Say what happens to a parameter that meets the activations in these primitives.

    >>> _fate({"add"}), _fate({"gather", "dot_general"})
    ('added, no product', "a table look-up, multiplied in the module's own code (...")
    """
    others = sorted({FATES.get(name, f"enters {name}") for name in primitives - PRODUCTS})
    if products := primitives & PRODUCTS:
        layer = "nn.Conv" if products == {"conv_general_dilated"} else "nn.Dense or nn.Einsum"
        return ", ".join([*others, f"multiplied in the module's own code ({layer} would be reached)"])
    return ", ".join([*others, "no product"]) if others else "not used in this forward pass"


def _print(rows: list[CoverageRow], console: Console) -> None:
    table = Table(title="Quant-Trim coverage")
    for name in ("path", "layer", "parameters", "weights", "inputs", "outputs", "not quantized because"):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    for row in rows:
        cells = (row.path or "(top)", row.layer, f"{row.parameters:,}", row.weights, row.inputs, row.outputs)
        table.add_row(*cells, row.reason, style=None if row.weights != "-" else "yellow")
    reached = sum(row.parameters for row in rows if row.weights != "-")
    total = sum(row.parameters for row in rows)
    table.caption = f"{reached:,} of {total:,} kernel parameters quantized"
    console.print(table)
