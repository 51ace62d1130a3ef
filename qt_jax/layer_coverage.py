"""What a config reaches in a model, and what it does not, as a table to read before training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

from qt_jax.config import QuantConfig, Sites
from qt_jax.grid import QuantSpec
from qt_jax.interception import COLLECTION, LAYERS, is_range
from qt_jax.trim import quant_trim


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One kernel-bearing module: its sites, and why it is not reached (empty where it is)."""

    path: str
    layer: str
    parameters: int
    weights: str
    inputs: str
    outputs: str
    reason: str = ""


def describe(spec: QuantSpec | None) -> str:
    """A spec in a few letters.

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
    """Prints which layers and sites are quantized and how, and which kernels are not reached and why.

    Args:
      model, variables: any Linen module and its variables; the model is traced, not run.
      *inputs, **options: what `model.apply` takes after the variables.
      config: the config to be judged.
      console: where to print; a new one on standard output if not given.

    Returns:
      One row for every module that owns a parameter of rank 2 or more, in the order of the parameters.

    Raises:
      InvalidInput: a rule of the config that matches no layer.

    >>> model, x = nn.Dense(2), jax.numpy.ones((1, 3))
    >>> rows = coverage(model, model.init(jax.random.key(0), x), x, console=Console(quiet=True))
    >>> rows[0].layer, rows[0].weights
    ('Dense', 'int8 symmetric per-tensor')
    """
    variables = _without_ranges(variables)
    classes: dict[str, type[nn.Module]] = {}

    def note_class(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        classes.setdefault("/".join(context.module.path), type(context.module))
        return call(*args, **kwargs)

    def forward(variables: dict[str, Any]) -> dict[str, Any]:
        with nn.intercept_methods(note_class), quant_trim(config, 0.0, train=False) as visit:
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
    """The variables less any ranges, which another config may have shaped."""
    statistics = flatten_dict(variables.get(COLLECTION, {}))
    plain = {path: leaf for path, leaf in statistics.items() if not is_range(path)}
    return {**variables, COLLECTION: unflatten_dict(plain)}


def _why_float(config: QuantConfig, sites: Sites) -> str:
    """Why the weights of a layer that is reached stay in floating point."""
    if sites.rule is None:
        return "the config's default leaves weights in floating point"
    return f"set so by rule {config.rules[sites.rule].path!r}"


def _why_not(module_class: type[nn.Module] | None) -> str:
    """Why the interceptor passed a module by."""
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
