"""Put an exported graph on integers: the modes of deployment, their configs and opsets, and the QDQ graph.

`QDQ_BITS` are the integers that a QDQ graph may have. `deployed_config` restates the config of training on
them. `quantize` makes the graph.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import onnx

from qt_jax.config import QuantConfig, Rule, Site
from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import Ranges
from qt_jax.export.inputs import graph_inputs
from qt_jax.export.qdq import FIRST_OPSET, insert_qdq, storage_bits
from qt_jax.export.ranges import tensor_ranges
from qt_jax.grid import QuantSpec

QDQ_BITS = {"int8": (8, 8), "int4": (4, 8), "int16-act": (8, 16)}
"""Maps the name of a QDQ graph's integers to the bits of its weights and activations."""

DEFAULT_OPSET = 17
"""Default opset of ai.onnx, where it has the integers."""

Chosen = TypeVar("Chosen", Site, Site | str)


def bits_of(integers: str) -> tuple[int, int]:
    """Return the bits of weights and activations that `QDQ_BITS` has under a name.

    Raises:
      InvalidInput: The name is unknown.

    >>> bits_of("int4")
    (4, 8)
    """
    if integers not in QDQ_BITS:
        raise InvalidInput(f"QDQ mode {integers!r} is unknown; choose one of {', '.join(QDQ_BITS)}")
    return QDQ_BITS[integers]


def opset_for(integers: str | None, opset: int | None) -> int:
    """Return the opset to export with.

    Args:
      integers: Name of `QDQ_BITS`, or None for a graph in floating point.
      opset: The opset that the user gave; None for the default, or for the first that has the integers.

    Raises:
      InvalidInput: The opset lacks the integers, or their name is unknown.

    >>> opset_for("int8", None), opset_for("int4", None)
    (17, 21)
    """
    if integers is None:
        return opset or DEFAULT_OPSET
    first = max(FIRST_OPSET[storage_bits(bits)] for bits in bits_of(integers))
    if opset is not None and opset < first:
        raise InvalidInput(
            f"QDQ mode {integers} needs integers that ONNX has from opset {first}, not {opset}: leave the "
            f"opset out, or give {first}"
        )
    return max(DEFAULT_OPSET, first) if opset is None else opset


def deployed_config(config: QuantConfig, integers: str) -> QuantConfig:
    """Return `config` with every spec on the bits of a QDQ graph; what is in floating point stays so.

    The learned ranges do not depend on bits. Only the grids over them change. `quant_trim` with this config
    is the JAX forward that the QDQ graph computes.

    Args:
      config: Config of training.
      integers: Name of `QDQ_BITS`.

    Raises:
      InvalidInput: The name is unknown.

    >>> deployed_config(QuantConfig(rules=(Rule("head", skip=True),)), "int4").weights.bits
    4
    """
    weight_bits, activation_bits = bits_of(integers)

    def on(bits: int, site: Chosen) -> Chosen:
        return dataclasses.replace(site, bits=bits) if isinstance(site, QuantSpec) else site

    def rule(rule: Rule) -> Rule:
        return dataclasses.replace(
            rule,
            weights=on(weight_bits, rule.weights),
            inputs=on(activation_bits, rule.inputs),
            outputs=on(activation_bits, rule.outputs),
        )

    return dataclasses.replace(
        config,
        weights=on(weight_bits, config.weights),
        activations=on(activation_bits, config.activations),
        outputs=on(activation_bits, config.outputs),
        rules=tuple(map(rule, config.rules)),
    )


def quantize(
    model: onnx.ModelProto,
    variables: Mapping[str, Any],
    config: QuantConfig,
    calibration: Any,
    integers: str,
    *,
    layout: str = "nchw",
    per_channel: bool = True,
    signed: bool = False,
) -> tuple[onnx.ModelProto, Ranges]:
    """Put the graph of a trained network on integers.

    Args:
      model: Graph from `to_onnx`, at an opset that has the integers (`opset_for`).
      variables: Variables as given to `to_onnx`, with Quant-Trim's statistics in `batch_stats`.
      config: Config of training.
      calibration: Real inputs as JAX takes them: one array, or a sequence where the graph has several inputs.
      integers: Name of `QDQ_BITS`.
      layout: Layout of the graph.
      per_channel: As `tensor_ranges` takes it.
      signed: As `insert_qdq` takes it.

    Returns:
      The QDQ graph, and the ranges of `model` that it holds.

    Raises:
      InvalidInput: As for `tensor_ranges` and `insert_qdq`, or there is another number of calibration inputs.
    """
    given = len(calibration) if isinstance(calibration, list | tuple) else 1
    if given != len(model.graph.input):
        raise InvalidInput(
            f"calibration holds {given} arrays, and the graph reads {len(model.graph.input)} inputs: give "
            "one array of many examples for each"
        )
    feeds = graph_inputs(model, calibration, layout)
    deployed = deployed_config(config, integers)
    ranges = tensor_ranges(model, variables, deployed, feeds, per_channel=per_channel)
    return insert_qdq(model, ranges, signed=signed), ranges
