"""Tables with a row for every layer: the SQNR of its output in a deployment."""

from experiments.configs.methods import METHODS
from experiments.paper.evidence import FLOAT, Evidence
from qt_jax.reporting.deployment_tables import escaped, markdown_table
from qt_jax.reporting.tables import ABSENT

TABLES = ("points", "export")
"""Of methods that are compared layer by layer, beside float training: quantization points and exports."""


def layer_sqnr(evidence: Evidence, task: str, scheme: str) -> dict[str, dict[str, list[float]]]:
    """Method -> layer -> SQNR in dB of its output, one for each seed; layers without one are left out.

    Only seeds that all of these methods have: means over different seeds are no comparison.

    Args:
      scheme: of onnxruntime, one of those that structure.jsonl has.
    """
    rows = [r for r in evidence.structure if r["task"] == task and _compared(r["method"])]
    seeds: dict[str, set[int]] = {}
    for record in rows:
        seeds.setdefault(record["method"], set()).add(record["seed"])
    common = set.intersection(*seeds.values()) if seeds else set()
    found: dict[str, dict[str, list[float]]] = {}
    for record in rows:
        mine = found.setdefault(record["method"], {})
        for layer in record["layers"]:
            if record["seed"] in common and layer["sqnr_db"][scheme] is not None:
                mine.setdefault(layer["layer"], []).append(layer["sqnr_db"][scheme])
    return found


def _compared(method: str) -> bool:
    return method == FLOAT or bool(set(TABLES) & set(METHODS[method].tables))


def by_layer(evidence: Evidence, task: str, scheme: str) -> str:
    """A table of `layer_sqnr`: a row a layer, a column a method; means over seeds, and of all layers last."""
    found = layer_sqnr(evidence, task, scheme)
    layers = list(dict.fromkeys(layer for mine in found.values() for layer in mine))
    rows = [[escaped(layer), *(_mean(mine.get(layer, [])) for mine in found.values())] for layer in layers]
    every = ([x for seeds in mine.values() for x in seeds] for mine in found.values())
    rows.append(["**mean of layers**", *map(_mean, every)])
    return markdown_table(["layer", *(METHODS[method].title for method in found)], rows)


def _mean(decibels: list[float]) -> str:
    return f"{sum(decibels) / len(decibels):.1f}" if decibels else ABSENT
