"""Measure how closely QDQ graphs follow training: `python -m experiments.qdq RUN_DIR ...`.

Each run's network is exported on integers. onnxruntime runs it with all optimisations, and the result is
compared with the JAX fake-quant forward at lambda = 1 on the run's parity samples (1,000 validation images).
Three graphs tell the sources of difference apart:

- QDQ pairs only at the learned sites, and activations on 16 bits: hardly more than the order of summation.
- Pairs only at the learned sites, on 8 bits: the same differences, which now tip roundings.
- All pairs: also the pairs that integer kernels need between layers.

A fourth comparison shows how much a network makes of a tipped rounding. It sets JAX's own forward against the
same forward in batches of another size, which sums in another order in float32.
"""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import qt_jax as qt
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.export import to_onnx
from qt_jax.export.integers import deployed_config
from qt_jax.export.network import Deployable, load
from qt_jax.export.qdq import insert_qdq
from qt_jax.export.ranges import tensor_ranges
from qt_jax.export.verification import fake_quant_forward, integer_kernels, parity
from qt_jax.metrics import agreement, sqnr_db
from qt_jax.provenance import provenance

GRAPHS = {
    "learned sites, 16 bits": ("int16-act", True),
    "learned sites": ("int8", True),
    "all sites": ("int8", False),
}
"""Graph -> mode of deployment, and whether QDQ pairs stand only at the learned sites."""
PACKAGES = ("jax", "flax", "onnx", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare QDQ graphs of finished runs with the JAX fake-quant forward.

    Example:
        python -m experiments.qdq runs/cifar10-fast-quartic-0 --out qdq.jsonl
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs of experiments.cifar."""
    out: Path | None = None
    """File to which one JSON line per graph is appended."""


def measure(network: Deployable, name: str) -> dict[str, Any]:
    """Return the parity of one graph of `GRAPHS`, and how many of its layers ran on integers."""
    mode, learned_only = GRAPHS[name]
    config = deployed_config(network.config, mode)
    model = to_onnx(network.apply_fn, network.variables, network.input_shape, opset=21)
    calibration = np.ascontiguousarray(network.samples.calibration.transpose(0, 3, 1, 2))
    ranges = tensor_ranges(model, network.variables, config, calibration)
    graph = insert_qdq(model, ranges, learned_only=learned_only)

    forward = fake_quant_forward(network.apply_fn, config)
    (found,) = parity(graph, forward, network.variables, network.samples.parity, ranges).values()
    kernels = integer_kernels(graph)
    convolutions = {node.name for node in graph.graph.node if node.op_type == "Conv"}
    return found | {
        "convolutions": len(convolutions),
        "integer_convolutions": sum(kernels[layer] for layer in convolutions),
        "products": len(kernels) - len(convolutions),
        "integer_products": sum(ran for layer, ran in kernels.items() if layer not in convolutions),
    }


def jax_itself(network: Deployable) -> dict[str, Any]:
    """Compare the fake-quant forward in batches of 5 with that in batches of 100.

    The sums are taken in another order, so that some roundings differ.
    """
    config = deployed_config(network.config, "int8")

    images = network.samples.parity
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(fake_quant_forward(network.apply_fn, config))
        expected, found = (
            np.concatenate(
                [forward(network.variables, images[i : i + size]) for i in range(0, len(images), size)]
            )
            for size in (100, 5)
        )
    ratio = sqnr_db(expected, found)
    return {
        "top1_agreement": agreement(expected, found),
        "sqnr_db": ratio if math.isfinite(ratio) else None,
    }


def _number(value: float | None, factor: float, digits: int) -> str:
    """Write a number; outputs that are no rows of classes have none."""
    return "-" if value is None else f"{factor * value:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the table with one row per run and graph."""
    shown = Table(title="QDQ in onnxruntime against the JAX forward at lambda = 1", box=box.SIMPLE_HEAD)
    shown.add_column("run", no_wrap=True)
    shown.add_column("graph", no_wrap=True)
    for heading in (
        "top-1\n%",
        "equal\n%",
        "steps",
        "SQNR\ndB",
        "lead\nlost",
        "median\nlead",
        "Conv",
        "Gemm",
    ):
        shown.add_column(heading, justify="right")
    for row in rows:
        if "margins" not in row:
            ratio = "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            shown.add_row(row["run"], row["graph"], _number(row["top1_agreement"], 100, 1), "", "", ratio)
            continue
        margins = row["margins"] or {"largest_lost": None, "median": None}
        shown.add_row(
            row["run"],
            row["graph"],
            _number(row["top1_agreement"], 100, 1),
            f"{100 * row['equal_integers']:.1f}",
            f"{row['largest_difference']:.2f}",
            "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            _number(margins["largest_lost"], 1, 2),
            _number(margins["median"], 1, 0),
            f"{row['integer_convolutions']}/{row['convolutions']}",
            f"{row['integer_products']}/{row['products']}",
        )
    shown.caption = (
        "top-1: same class; equal: equal integers of the output; steps: largest difference, in steps of the\n"
        "output; lead lost: the largest lead of JAX's first class over its second, in steps, where another\n"
        "class was found; Conv, Gemm: layers on integer kernels"
    )
    shown.caption_justify = "left"
    return shown


def run(options: Options, console: Console) -> None:
    """Measure every graph of every run, print the table, and append the rows.

    Raises:
      InvalidInput: A run holds no network that was trained with Quant-Trim, or no samples.
    """
    rows = []
    for path in options.runs:
        network = load(path)
        if network.config is None or network.samples is None:
            raise qt.InvalidInput(
                f"{path} holds no network that was trained with Quant-Trim, or not its samples"
            )
        compared = {"JAX itself, batches of 5": partial(jax_itself, network)}
        compared |= {name: partial(measure, network, name) for name in GRAPHS}
        for name, measured in compared.items():
            console.print(f"{path.name}: {name}")
            rows.append({"run": path.name, "graph": name} | measured())
            if options.out is not None:
                records.append(options.out, rows[-1] | provenance(PACKAGES))
    console.print(table(rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.qdq", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
