"""`python -m experiments.report RUN_DIR`: one HTML file of a training run, which opens anywhere.

Reads what the folder holds, of a finished run or one under way, and writes report.html into it. Nothing is
trained, exported or measured here.

What a run has shown, as a table, a Markdown page and a figure, from its records and metrics alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from flax.traverse_util import flatten_dict
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from rich.console import Console

import qt_jax as qt
from experiments.configs.training import Config, lambda_schedule
from experiments.data import SEGMENTATION
from experiments.runs import QUANT_TRIM, graphs_of
from qt_jax import records
from qt_jax.export.encodings import read_ranges
from qt_jax.export.network import read_description, restore
from qt_jax.files import staged, write_whole
from qt_jax.reporting.figures import summary_figure
from qt_jax.reporting.pivot import title
from qt_jax.reporting.run_report import Run, Weights, run_page
from qt_jax.reporting.tables import accuracy_table, to_markdown


def report(config: Config, trained: dict[str, Any], directory: Path, console: Console) -> None:
    """The table in the terminal, summary.md and summary.png, from records.jsonl and metrics.jsonl."""
    rows = records.read(directory / "records.jsonl")
    metrics = records.read(directory / "metrics.jsonl")
    if missing := trained.keys() - {row["method"] for row in metrics}:
        raise qt.InvalidInput(
            f"{directory}/metrics.jsonl has no epoch of {' and '.join(sorted(missing))}, although training "
            "is complete. Restore the file, or choose another --out."
        )
    write_whole(directory / "summary.md", summary(config, rows, metrics))
    metric, validation = metric_of(config.dataset)
    history = [
        {
            "epoch": row["epoch"],
            f"fp32_{metric}": row[f"{validation}_fp32"],
            f"fake_quant_{metric}": row[f"{validation}_fake_quant"],
        }
        for row in metrics
        if f"{validation}_fake_quant" in row
    ]
    total = max(row["step"] for row in metrics)
    steps = np.linspace(0, total, 400)
    lam = np.asarray(lambda_schedule(config, total)(steps.astype(np.int32)))
    weights = {
        method: {
            "/".join(path[:-1]): leaf.ravel()
            for path, leaf in flatten_dict(variables["params"]).items()
            if path[-1] == "kernel"
        }
        for method, variables in trained.items()
    }
    with staged(directory / "summary.png") as scratch:
        summary_figure(rows, (steps, lam), weights, scratch, history, metric)
    console.print(accuracy_table(rows, metric), soft_wrap=False)


def metric_of(dataset: str) -> tuple[str, str]:
    """The record's key that a run is judged by, and how its validation is called in metrics.jsonl."""
    return ("miou", "validation_miou") if dataset in SEGMENTATION else ("top1", "validation")


def summary(config: Config, rows: list[records.Record], metrics: list[dict[str, Any]]) -> str:
    """summary.md: the table, the drift between FP32 and fake quantization, the cost, the provenance."""
    metric, validation = metric_of(config.dataset)
    lines = [
        f"# {config.dataset}, {config.model}, --sched {config.sched}, seed {config.seed}",
        "",
        to_markdown(rows, metric),
    ]
    if metric == "miou":
        lines += ["## Pixel accuracy", "", to_markdown(rows)]
    for method in dict.fromkeys(row["method"] for row in metrics):
        mine = [row for row in metrics if row["method"] == method]
        last = mine[-1]
        seconds = sum(row["seconds"] for row in mine)
        text = f"- {method}: {last['epoch']} epochs, {seconds / 60:.1f} minutes of training"
        text += f", {validation.replace('_miou', ' mIoU')} FP32 {100 * last[f'{validation}_fp32']:.2f} %"
        if f"{validation}_fake_quant" in last:
            text += f", fake-quantized {100 * last[f'{validation}_fake_quant']:.2f} %"
        lines.append(text)
    row, cpu = rows[-1], rows[-1]["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    lines += [
        "",
        f"`{row['command']}`, commit {row['commit']}, {row['date']}",
        "",
        f"{cpu['model']}, {cpu['cores']} cores; {', '.join(cpu['flags'] or ['flags unreadable'])}",
        "",
        versions,
        "",
    ]
    return "\n".join(lines)


RAW = "Kernels of the checkpoints, before batch norm is folded into them."

FOLDED = "Kernels of the exported graphs, batch norm folded into them; the checkpoints are not there."

PICTURES = {"Masks of the first test images": "masks.png"}


def write_report(folder: Path, out: Path | None = None, backends: Sequence[Path] = ()) -> Path:
    """Writes the report of the run in `folder`, whole or not at all, and returns its path.

    Raises:
      InvalidInput: `folder` holds no run, a file of it or of `backends` is damaged, or `out` cannot be
        written.
    """
    for path in backends:
        if not path.is_file():
            raise qt.InvalidInput(f"{path} is not there: --backends takes files of records (records.jsonl).")
    others = [record for path in backends for record in records.read(path)]
    page = run_page(read_run(folder, others))
    path = out or folder / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise qt.InvalidInput(
            f"{path} cannot be written ({error.strerror}): choose another --out."
        ) from error
    return path


def read_run(folder: Path, others: Sequence[records.Record] = ()) -> Run:
    """What the folder of a run holds.

    Args:
      folder: of `experiments.cifar` or `experiments.segmentation`.
      others: records of further backends.
    """
    config = read_config_json2(folder)
    metric, validation = metric_of(config["dataset"])
    metrics, rows = (records.read(folder / name) for name in ("metrics.jsonl", "records.jsonl"))
    graphs = graphs_of(config.get("quantizer", QUANT_TRIM))  # which older runs do not say
    weights, source = read_weights(folder, graphs)
    ranges, diagnosis = folder / "model.ranges.json", folder / "diagnosis.md"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        facts=facts(config, metrics, rows),
        metrics=metrics,
        records=rows,
        others=others,
        metric=metric,
        validation=validation,
        weights=weights,
        weights_source=source,
        ranges=read_ranges(ranges) if ranges.exists() else None,
        pictures={text: name for text, name in PICTURES.items() if (folder / name).exists()},
        diagnosis=diagnosis.read_text() if diagnosis.exists() else None,
        diagnosis_drawings={
            f"diagnosis/{path.stem}.png": path.read_text() for path in (folder / "diagnosis").glob("*.svg")
        },
    )


def read_config_json2(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises InvalidInput if there is none, or one of something else."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        if missing := [key for key in ("dataset", "model", "seed") if key not in config]:
            raise ValueError(f"it does not say {' and '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise qt.InvalidInput(
            f"{folder} holds no run of experiments.cifar: {path.name} cannot be read ({error}). Name the "
            "folder that a run wrote."
        ) from error
    return config


def facts(
    config: Mapping[str, Any], metrics: Sequence[records.Record], rows: Sequence[records.Record]
) -> dict[str, str]:
    """What was trained on what, how and for how long, in words."""
    quantizer = config.get("quantizer", QUANT_TRIM)
    told = {
        "data set": config["dataset"],
        "model": config["model"],
        "method": f"{title(quantizer)}, --sched {config.get('sched')}",
        "grids in training": _grids(config),
        "reverse pruning": _reverse_pruning(config),
        "budget": f"{config.get('epochs')} epochs, {config.get('batch_size')} images a step",
        "optimizer": f"SGD, learning rate {config.get('learning_rate')} ({config.get('lr_schedule')}),"
        f" momentum {config.get('momentum')}, weight decay {config.get('weight_decay')}",
        "seed": str(config["seed"]),
    }
    for method in dict.fromkeys(row.get("method") for row in metrics):
        mine = [row for row in metrics if row.get("method") == method]
        minutes = sum(row.get("seconds") or 0 for row in mine) / 60
        done = max(row["epoch"] for row in mine)
        told[f"trained: {title(str(method))}"] = f"{done} epochs in {minutes:.1f} minutes"
    images = sorted({row["n"] for row in rows if row.get("n")})
    told["test images"] = ", ".join(f"{count:,}" for count in images) or "none yet"
    return told


def _grids(config: Mapping[str, Any]) -> str:
    if config.get("sched") == "none":
        return "none, there was no fake quantization"
    sites = f" at the {config['sites']} of layers" if "sites" in config else ""  # which older runs do not say
    return f"weights {config.get('bits')} bits, activations {config.get('activation_bits')} bits{sites}"


def _reverse_pruning(config: Mapping[str, Any]) -> str:
    quantile = config.get("reverse_pruning")
    if quantile is None:
        return "none"
    every, start = config.get("reverse_pruning_every"), config.get("reverse_pruning_start")
    return (
        f"at the {quantile} quantile of |w|, every {every} steps from {100 * (start or 0):g} % of training on"
    )


def read_weights(folder: Path, graphs: Mapping[str, str]) -> tuple[Weights, str]:
    """Method -> layer -> kernel `(size,)`, in the order of the network, and a sentence that says from where.

    The newest checkpoints, or the initializers of the graphs where a checkpoint is missing.

    Raises:
      InvalidInput: a checkpoint or a graph is damaged.
    """
    exported = {method: graph_kernels(folder / name) for method, name in graphs.items()}
    raw = {
        method: checkpoint_kernels((folder / name).with_suffix(".json"), folder / "checkpoints" / method)
        for method, name in graphs.items()
    }
    if not all(raw[method] for method in graphs if exported[method] or raw[method]):
        return {method: kernels for method, kernels in exported.items() if kernels}, FOLDED
    order = {layer: place for kernels in exported.values() for place, layer in enumerate(kernels)}
    return {
        method: {layer: kernels[layer] for layer in sorted(kernels, key=lambda n: order.get(n, len(order)))}
        for method, kernels in raw.items()
        if kernels
    }, RAW


def graph_kernels(path: Path) -> dict[str, np.ndarray]:
    """Layer -> initializer of rank 2 or more of the graph at `path`; none where there is no graph."""
    if not path.exists():
        return {}
    try:
        graph = onnx.load(path).graph
    except DecodeError as error:
        raise qt.InvalidInput(
            f"{path} is no ONNX graph ({error}): delete it and relaunch the run."
        ) from error
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    return {
        name.removesuffix("/kernel"): value.ravel()
        for name, value in values.items()
        if value.ndim >= 2 and np.issubdtype(value.dtype, np.floating)
    }


def checkpoint_kernels(description: Path, checkpoints: Path) -> dict[str, np.ndarray]:
    """Layer -> kernel of the newest checkpoint; none where there is none."""
    if not checkpoints.is_dir():
        return {}
    key = read_description(description).collections["params"] if description.exists() else "params"
    kernels = flatten_dict(restore(checkpoints).get(key) or {})
    return {"/".join(path[:-1]): leaf.ravel() for path, leaf in kernels.items() if path[-1] == "kernel"}
