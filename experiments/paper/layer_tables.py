"""Tables with a row for every layer: the SQNR of its output in a deployment."""

from experiments.configs.methods import METHODS
from experiments.paper.evidence import FLOAT, Evidence
from qt_jax.reporting.deployment_tables import escaped, markdown_table
from qt_jax.reporting.tables import ABSENT

TABLES = ("points", "export")
"""Of methods that are compared layer by layer, beside float training: quantization points and exports."""


def layer_sqnr(evidence: Evidence, task: str, scheme: str) -> dict[str, dict[str, list[float]]]:
    """Method -> layer -> SQNR in dB of its output, one for each seed; layers without one are left out.

    Args:
      scheme: of onnxruntime, one of those that structure.jsonl has.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for record in evidence.structure:
        method = record["method"]
        if record["task"] == task and (method == FLOAT or set(TABLES) & set(METHODS[method].tables)):
            mine = found.setdefault(method, {})
            for layer in record["layers"]:
                if layer["sqnr_db"][scheme] is not None:
                    mine.setdefault(layer["layer"], []).append(layer["sqnr_db"][scheme])
    return found


def by_layer(evidence: Evidence, task: str, scheme: str) -> str:
    """A table of `layer_sqnr`: a row a layer, a column a method, means over seeds, and of all layers last."""
    found = layer_sqnr(evidence, task, scheme)
    layers = list(dict.fromkeys(layer for mine in found.values() for layer in mine))
    rows = [[escaped(layer), *(_mean(mine.get(layer, [])) for mine in found.values())] for layer in layers]
    every = ([x for seeds in mine.values() for x in seeds] for mine in found.values())
    rows.append(["**mean of layers**", *map(_mean, every)])
    return markdown_table(["layer", *(METHODS[method].title for method in found)], rows)


def _mean(decibels: list[float]) -> str:
    return f"{sum(decibels) / len(decibels):.1f}" if decibels else ABSENT
