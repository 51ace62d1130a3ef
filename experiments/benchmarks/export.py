"""Compare our ONNX graphs with those of PyTorch and jax2onnx: `python -m experiments.benchmarks.export`.

The same networks with the same weights, once in Linen and once in PyTorch as its users write them, are
exported at the same opset with a dynamic batch. Compared are the nodes, the operators, and the largest
difference between the outputs of the two graphs in onnxruntime. jax2onnx exports the Linen networks too; of
its graphs only nodes and operators are recorded. For the largest networks the time from variables to file is
measured, where ours is compared with JAX and PyTorch's is not, and the peak of memory; see
`experiments.benchmarks.exporters`.

PyTorch's exporter does not write an opset older than 18 itself, and its conversion to 17 fails on the
convolutional networks.
"""

import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich import box
from rich.console import Console
from rich.table import Table

import qt_jax as qt
from experiments import models
from experiments.benchmarks.exporters import (
    JAX2ONNX,
    OURS,
    TORCH,
    Network,
    channels_first,
    cost,
    exporter,
    random_inputs,
    random_variables,
    require_torch,
)
from experiments.benchmarks.public_models import DiffusionUNet, PoolFormer, PublicViT
from experiments.models.resnet import ResNet50
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.provenance import provenance

FAMILIES = (
    *("resnet20", "fast", "mobilenetv2", "mobilenetv3", "convnext", "speed", "vit", "mixer", "lstm", "gru"),
    *("unet", "unet-nearest", "unet-bilinear", "aspp"),
)
"""Networks of `experiments.models`, one of each family."""

NETWORKS = {name: Network(models.create(name, 10), 32) for name in FAMILIES} | {
    "resnet50": Network(ResNet50(), 224),
    "vit-b16": Network(PublicViT(), 224),
    "vit-s16-mean": Network(PublicViT(dim=384, heads=6, hidden=1536, pool="mean"), 224),
    "poolformer-s12": Network(PoolFormer(), 224),
    "diffusion-unet": Network(DiffusionUNet(), 32, takes_times=True),
}
TIMED = ("resnet50", "vit-b16")
"""Networks whose export is measured in time and memory."""
COSTED = (OURS, TORCH)
"""Exporters that are."""
BATCH = 3
"""Images whose outputs are compared."""
PACKAGES = ("jax", "flax", "jax2onnx", "onnx", "onnxscript", "onnxruntime", "torch")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare exported graphs, export times and memory with PyTorch's.

    Example:
        python -m experiments.benchmarks.export --out export.jsonl
    """

    opsets: tuple[int, ...] = (18, 21)
    """Opsets of ai.onnx. Below 18, PyTorch may still write 18; the table shows what it wrote."""
    networks: tuple[str, ...] = tuple(NETWORKS)
    """Networks to export."""
    repeats: int = 3
    """Timed exports after the first one."""
    out: Path | None = None
    """JSON-lines file to which one record for each network and exporter is appended."""


def graphs(network: Network, opset: int) -> dict[str, dict[str, Any]]:
    """Describe the exporters' graphs: opset, nodes, operators, transposes, max_difference, max_output.

    `max_difference` is the largest between the outputs of our graph and PyTorch's for the same inputs, and
    `max_output` is the largest of PyTorch's outputs. An exporter that fails has status and reason instead.
    """
    variables = random_variables(network)
    inputs = channels_first(random_inputs(network, BATCH))
    rows: dict[str, dict[str, Any]] = {}
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (OURS, TORCH, JAX2ONNX):
            path = Path(folder) / f"{name}.onnx"
            try:
                exporter(name, network, variables, opset)(path)
            except Exception as error:  # each exporter has its own
                status = "refused" if isinstance(error, qt.InvalidInput) else "failed"
                rows[name] = {"status": status, "reason": reason(error)}
                continue
            rows[name] = {"status": "ok", **describe(onnx.load(path))}
            if name != JAX2ONNX:
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                names = [entry.name for entry in session.get_inputs()]
                outputs[name] = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    if len(outputs) == 2:
        difference = float(np.max(np.abs(outputs[OURS] - outputs[TORCH])))
        for name in outputs:
            rows[name] |= {"max_difference": difference, "max_output": float(np.max(np.abs(outputs[TORCH])))}
    return rows


def reason(error: Exception) -> str:
    """Return the first line of an error, with its kind where that is not ours."""
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, qt.InvalidInput) else f"{type(error).__name__}: {first}"


def describe(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the opset, the number of nodes, of nodes of each operator, and of Transposes."""
    operators = Counter(node.op_type for node in nodes(model.graph))
    return {
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "transposes": operators["Transpose"],
    }


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, and those of the graphs inside them, as a Loop or a Scan has."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


def measure(options: Options, console: Console) -> list[records.Record]:
    """Measure, and return one record for each network and exporter."""
    found = []
    for name in options.networks:
        for opset in options.opsets:
            with console.status(f"{name}: graphs at opset {opset}"):
                rows = graphs(NETWORKS[name], opset)
            for variant, row in rows.items():
                timed = name in TIMED and opset == options.opsets[0] and variant in COSTED
                if timed and row["status"] == "ok":
                    with console.status(f"{name}: time and memory of {variant}"):
                        row |= cost(variant, NETWORKS[name], opset, options.repeats)
                row.setdefault("opset", opset)
                identity = {"benchmark": "export", "model": name, "variant": variant}
                found.append(records.new_record(**identity, **row, **provenance(PACKAGES)))
    return found


def table(rows: list[records.Record]) -> Table:
    """Return the table for the terminal."""
    shown = Table(title="Exported graphs, and what the export of the largest ones costs", box=box.SIMPLE_HEAD)
    shown.add_column("network", no_wrap=True)
    shown.add_column("exporter", no_wrap=True)
    for heading in ("opset", "nodes", "Transpose", "max diff", "cold s", "warm s", "CPU s", "peak MB"):
        shown.add_column(heading, justify="right")
    notes = [
        "max diff: between the outputs of our graph and PyTorch's in onnxruntime, same inputs",
        "cold, warm: variables to file, ours compared with JAX; first in a process, median of later ones",
        "CPU: what all cores together compute in a warm one, which other work on the machine moves less",
        "peak: resident memory above that before the export, and in multiples of the parameters",
    ]
    for row in rows:
        if row["status"] != "ok":
            shown.add_row(row["model"], row["variant"], str(row["opset"]), row["status"])
            notes.append(f"{row['model']}, {row['variant']}, opset {row['opset']}: {row['reason']}")
            continue
        shown.add_row(
            row["model"],
            row["variant"],
            *(str(row[key]) for key in ("opset", "nodes", "transposes")),
            _number(row.get("max_difference"), "{:.1e}"),
            _number(row.get("cold_s"), "{:.1f}"),
            _number(row.get("warm_s"), "{:.1f}"),
            _number(row.get("warm_cpu_s"), "{:.1f}"),
            _number(row.get("peak_bytes"), "{:,.0f}", 1e-6)
            + _number(row.get("peak_ratio"), " ({:.1f}x)", 1.0, ""),
        )
        operators = ", ".join(f"{count} {name}" for name, count in row["operators"].items())
        notes.append(f"{row['model']}, {row['variant']}, opset {row['opset']}: {operators}")
    shown.caption, shown.caption_justify = "\n".join(notes), "left"
    return shown


def _number(value: float | None, form: str, unit: float = 1.0, absent: str = "–") -> str:
    return absent if value is None else form.format(value * unit)


def run(options: Options, console: Console) -> list[records.Record]:
    """Measure, print the table, append the records.

    Raises:
      InvalidInput: PyTorch is not installed, a count is below 1, or a network is not known.
    """
    if unknown := set(options.networks) - set(NETWORKS):
        raise qt.InvalidInput(f"there is no {sorted(unknown)[0]!r}: choose among {', '.join(NETWORKS)}")
    if options.repeats < 1:
        raise qt.InvalidInput(f"--repeats must be at least 1, got {options.repeats}")
    require_torch()
    rows = measure(options, console)
    console.print(table(rows))
    for row in rows if options.out else ():
        records.append(options.out, row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status, as `command` does."""
    return command("experiments.benchmarks.export", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
