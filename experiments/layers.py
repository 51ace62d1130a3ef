"""`python -m experiments.layers RUN_DIR`: which layer's weights cost what at INT4, on the validation split.

Each kernel of the exported float graph is rounded alone to onnxruntime's symmetric INT4 grid, [-8, 7] with
s = 2 max|w| / 15 per tensor, all else staying in float; then all of them, and all but each. The test set is
not touched. Rows are appended to layers.jsonl in the run's folder.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import onnx
import tyro
from onnx import numpy_helper
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qt_jax as qt
from experiments.data import Dataset, load
from experiments.runs import QUANT_TRIM, graphs_of, model_input
from qt_jax import records
from qt_jax.command_line import command, print_rows
from qt_jax.export.sessions import named_inputs, open_session, run_batches
from qt_jax.provenance import provenance

GRID = qt.QuantSpec(bits=4, narrow_range=False, quantile=1.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """Round one layer's weights at a time to INT4 and see what it costs, on the validation split.

    Example:
        python -m experiments.layers runs/cifar10-fast-quartic-0
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished `python -m experiments.cifar`."""
    data_dir: Path | None = None
    """Folder or archive that holds the data set, as for `experiments.cifar`."""
    json: bool = False
    """Print the rows as JSON lines on stdout, and all text on stderr."""


def kernels(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights of rank 2 or more, by the name of their initializer."""
    values = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    return {name: value for name, value in values.items() if value.ndim >= 2}


def rounded(graph: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """A copy of the graph in which the kernels called `names` lie on the INT4 grid."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for item in copy.graph.initializer:
        if item.name in names:
            value = numpy_helper.to_array(item)
            high = jnp.float32(np.abs(value).max())
            on_grid = np.asarray(qt.fake_quant(jnp.asarray(value), -high, high, GRID))
            item.CopyFrom(numpy_helper.from_array(on_grid, item.name))
    return copy


def logits(graph: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """The float graph's logits in onnxruntime."""
    [output] = [entry.name for entry in graph.graph.output]
    batches = run_batches(open_session(graph, optimize=False), named_inputs(graph, images), [output])
    return np.concatenate([batch[output] for batch in batches])


def sensitivity(graph: onnx.ModelProto, dataset: Dataset, title: str, console: Console) -> dict[str, dict]:
    """The classification metrics with each choice of kernels rounded, by the choice's name."""
    images = model_input(dataset, dataset.validation_images)
    names = set(kernels(graph))
    choices = {name: {name} for name in kernels(graph)} | {"all": names}
    choices |= {f"all but {name}": names - {name} for name in kernels(graph)}
    reference = logits(graph, images)
    return {"none": qt.metrics.classification_metrics(reference, dataset.validation_labels)} | {
        choice: qt.metrics.classification_metrics(
            logits(rounded(graph, chosen), images), dataset.validation_labels, reference
        )
        for choice, chosen in track(
            choices.items(), title, transient=True, console=console, disable=not console.is_terminal
        )
    }


def table(found: dict[str, dict[str, dict]]) -> Table:
    """Top-1 and SQNR by choice of kernels, a pair of columns for each method."""
    shown = Table(title="Weights rounded to INT4 per tensor, validation split", box=box.SIMPLE_HEAD)
    shown.add_column("rounded", no_wrap=True)
    for method in found:
        shown.add_column(f"{method}\ntop-1 %", justify="right")
        shown.add_column("\nSQNR dB", justify="right")
    for choice in next(iter(found.values())):
        cells = []
        for metrics in (found[method][choice] for method in found):
            cells += [f"{100 * metrics['top1']:.2f}"]
            cells += ["-" if metrics["sqnr_db"] is None else f"{metrics['sqnr_db']:.1f}"]
        shown.add_row(choice.removesuffix("/kernel"), *cells)
    return shown


def run(options: Options, console: Console) -> None:
    """Measures every graph of the run, prints the table, appends the rows."""
    path = options.run / "config.json"
    if not path.exists():
        raise qt.InvalidInput(
            f"{options.run} holds no config.json: name the folder of a finished experiments.cifar"
        )
    config = json.loads(path.read_text())
    dataset = load(config["dataset"], options.data_dir, seed=0)
    names = graphs_of(config.get("quantizer", QUANT_TRIM))  # which older runs do not say
    graphs = {m: options.run / name for m, name in names.items() if (options.run / name).exists()}
    if not graphs:
        raise qt.InvalidInput(f"{options.run} holds no ONNX graph yet: let experiments.cifar finish first")
    found = {
        method: sensitivity(onnx.load(path), dataset, method, console) for method, path in graphs.items()
    }
    console.print(table(found))
    source = provenance(["onnxruntime", "onnx", "numpy"])
    for method, choices in found.items():
        for choice, metrics in choices.items():
            identity = {"run": options.run.name, "task": config["dataset"], "model": config["model"]}
            identity |= {"method": method, "seed": config["seed"], "split": "validation", "rounded": choice}
            row = records.new_record(**identity, weight_bits=4, per_channel=False, status="ok")
            row |= metrics | source
            records.append(options.run / "layers.jsonl", row)
            if options.json:
                print_rows([row])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `command` does."""
    return command("experiments.layers", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
