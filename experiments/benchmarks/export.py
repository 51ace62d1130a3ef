"""Compare our ONNX graphs with those of torch.onnx.export: `python -m experiments.benchmarks.export`.

The same networks with the same weights, once in Linen and once in PyTorch as its users write them, are
exported at the same opset with a dynamic batch. Compared are the nodes, the operators, and the largest
difference between the outputs of the two graphs in onnxruntime. For the largest network the time from
variables to file is measured too, where ours is verified against JAX and PyTorch's is not, and the peak of
memory; see `experiments.benchmarks.exporters`.

The default opset is 18. PyTorch's exporter does not write an older one itself, and its conversion to 17 fails
on the convolutional networks.
"""

import dataclasses
import sys
import tempfile
from collections import Counter
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
    OURS,
    TORCH,
    Network,
    cost,
    exporter,
    random_images,
    random_variables,
    require_torch,
)
from experiments.models.resnet import ResNet50
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.provenance import provenance

NETWORKS = {
    "resnet20": Network(models.create("resnet20", 10), 32),
    "mobilenetv2": Network(models.create("mobilenetv2", 10), 32),
    "vit": Network(models.create("vit", 10), 32),
    "unet": Network(models.create("unet", 10), 32),
    "resnet50": Network(ResNet50(), 224),
}
TIMED = ("resnet50",)
"""Networks whose export is measured in time and memory."""
BATCH = 3
"""Images whose outputs are compared."""
PACKAGES = ("jax", "flax", "jax2onnx", "onnx", "onnxscript", "onnxruntime", "torch")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare exported graphs, export times and memory with PyTorch's.

    Example:
        python -m experiments.benchmarks.export --out export.jsonl
    """

    opset: int = 18
    """Opset of ai.onnx for both. Below 18, PyTorch may still write 18; the table shows what it wrote."""
    repeats: int = 3
    """Timed exports after the first one."""
    out: Path | None = None
    """JSON-lines file to which one record for each network and exporter is appended."""


def graphs(network: Network, opset: int) -> dict[str, dict[str, Any]]:
    """Describe both exporters' graphs: opset, nodes, operators, transposes, max_difference, max_output.

    `max_difference` is the largest between the outputs of the two graphs for the same images, and
    `max_output` is the largest of PyTorch's outputs. An exporter that refuses has status and reason instead.
    """
    variables = random_variables(network)
    images = np.ascontiguousarray(random_images(network, BATCH).transpose(0, 3, 1, 2))
    rows: dict[str, dict[str, Any]] = {}
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (OURS, TORCH):
            path = Path(folder) / f"{name}.onnx"
            try:
                exporter(name, network, variables, opset)(path)
            except qt.InvalidInput as error:
                rows[name] = {"status": "refused", "reason": str(error)}
                continue
            rows[name] = {"status": "ok", **describe(onnx.load(path))}
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            outputs[name] = session.run(None, {session.get_inputs()[0].name: images})[0]
    if len(outputs) == 2:
        difference = float(np.max(np.abs(outputs[OURS] - outputs[TORCH])))
        for row in rows.values():
            row |= {"max_difference": difference, "max_output": float(np.max(np.abs(outputs[TORCH])))}
    return rows


def describe(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the opset, the number of nodes, of nodes of each operator, and of Transposes."""
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "transposes": operators["Transpose"],
    }


def measure(options: Options, console: Console) -> list[records.Record]:
    """Measure, and return one record for each network and exporter."""
    found = []
    for name, network in NETWORKS.items():
        with console.status(f"{name}: graphs"):
            rows = graphs(network, options.opset)
        for variant, row in rows.items():
            if name in TIMED and row["status"] == "ok":
                with console.status(f"{name}: time and memory of {variant}"):
                    row |= cost(variant, network, options.opset, options.repeats)
            source = provenance(PACKAGES)
            identity = {"benchmark": "export", "model": name, "variant": variant}
            found.append(records.new_record(**identity, **row, **source))
    return found


def table(rows: list[records.Record]) -> Table:
    """Return the table for the terminal."""
    shown = Table(title="Exported graphs, and what the export of the largest costs", box=box.SIMPLE_HEAD)
    shown.add_column("network", no_wrap=True)
    shown.add_column("exporter", no_wrap=True)
    for heading in ("opset", "nodes", "Transpose", "max diff", "cold s", "warm s", "peak MB"):
        shown.add_column(heading, justify="right")
    notes = [
        "max diff: between the outputs of the two graphs in onnxruntime, same images",
        "cold, warm: variables to file, ours verified; first export in a process, median of later ones",
        "peak: resident memory above that before the export, and in multiples of the parameters",
    ]
    for row in rows:
        if row["status"] != "ok":
            shown.add_row(row["model"], row["variant"], row["status"])
            notes.append(f"{row['model']}, {row['variant']}: {row['reason']}")
            continue
        shown.add_row(
            row["model"],
            row["variant"],
            *(str(row[key]) for key in ("opset", "nodes", "transposes")),
            _number(row.get("max_difference"), "{:.1e}"),
            _number(row.get("cold_s"), "{:.1f}"),
            _number(row.get("warm_s"), "{:.1f}"),
            _number(row.get("peak_bytes"), "{:,.0f}", 1e-6)
            + _number(row.get("peak_ratio"), " ({:.1f}x)", 1.0, ""),
        )
        operators = ", ".join(f"{count} {name}" for name, count in row["operators"].items())
        notes.append(f"{row['model']}, {row['variant']}: {operators}")
    shown.caption, shown.caption_justify = "\n".join(notes), "left"
    return shown


def _number(value: float | None, form: str, unit: float = 1.0, absent: str = "–") -> str:
    return absent if value is None else form.format(value * unit)


def run(options: Options, console: Console) -> list[records.Record]:
    """Measure, print the table, append the records.

    Raises:
      InvalidInput: PyTorch is not installed, or a count is below 1.
    """
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
