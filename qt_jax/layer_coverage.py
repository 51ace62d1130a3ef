"""Tabulate what a config reaches in a model, and what it does not, before training."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

from qt_jax.config import QuantConfig, Sites
from qt_jax.grid import QuantSpec
from qt_jax.interception import COLLECTION, LAYERS, Call, intercept, is_quant_trim_statistic
from qt_jax.trim import quant_trim


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

    Args:
      model, variables: Any Linen module and its variables. The model is traced, not run.
      *inputs, **options: What `model.apply` takes after the variables.
      config: The config to be judged.
      console: Where to print; a new console on standard output if not given.

    Returns:
      One row for every module that owns a parameter of rank 2 or more, in the order of the parameters.

    Raises:
      InvalidInput: A rule of the config matches no layer.

    >>> model, x = nn.Dense(2), jax.numpy.ones((1, 3))
    >>> rows = coverage(model, model.init(jax.random.key(0), x), x, console=Console(quiet=True))
    >>> rows[0].layer, rows[0].weights
    ('Dense', 'int8 symmetric per-tensor')
    """
    variables = _without_ranges(variables)
    classes: dict[str, type[nn.Module]] = {}

    def note_class(call: Call, /, *args: Any, **kwargs: Any) -> Any:
        classes.setdefault(call.path, type(call.module))
        return call(*args, **kwargs)

    def forward(variables: dict[str, Any]) -> dict[str, Any]:
        with intercept(note_class, every_method=True), quant_trim(config, 0.0, train=False) as visit:
            model.apply(variables, *inputs, mutable=[COLLECTION], **options)
        return visit.layers

    visited: dict[str, Any] = {}
    jax.eval_shape(lambda variables: visited.update(forward(variables)), variables)

    sizes: dict[str, int] = {}
    for path, leaf in flatten_dict(variables["params"]).items():
        if leaf.ndim >= 2:
            owner = "/".join(path[:-1])
            sizes[owner] = sizes.get(owner, 0) + leaf.size

    rows = []
    for path, size in sizes.items():
        layer = classes[path].__name__ if path in classes else "?"
        if path in visited:
            sites = visited[path]
            reason = "" if sites.weights else _why_float(config, sites)
            specs = (describe(sites.weights), describe(sites.inputs), describe(sites.outputs))
            rows.append(CoverageRow(path, layer, size, *specs, reason))
        else:
            rows.append(CoverageRow(path, layer, size, "-", "-", "-", _why_not(classes.get(path))))
    _print(rows, console or Console())
    return rows


def _without_ranges(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the variables without any ranges, whose shapes may be those of another config."""
    statistics = flatten_dict(variables.get(COLLECTION, {}))
    plain = {path: leaf for path, leaf in statistics.items() if not is_quant_trim_statistic(path)}
    return {**variables, COLLECTION: unflatten_dict(plain)}


def _why_float(config: QuantConfig, sites: Sites) -> str:
    """Say why the weights of a layer that is reached stay in floating point."""
    if sites.rule is None:
        return "the config's default leaves weights in floating point"
    return f"set so by rule {config.rules[sites.rule].path!r}"


def _why_not(module_class: type[nn.Module] | None) -> str:
    """Say why a module was not reached."""
    if module_class is None:
        return "never called in this forward pass"
    if issubclass(module_class, nn.Embed):
        return "a table look-up, no product"
    if issubclass(module_class, LAYERS):
        return "called through another method than __call__"
    return f"{module_class.__name__} multiplies in its own code; nn.Dense or nn.Einsum would be reached"


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
