"""Show what a run has found: a table, a Markdown page, a figure and an HTML report.

All of them are made from what the run's folder holds, and from nothing else. Nothing is trained, exported or
measured here. `write_report` also serves a run that is still under way.
"""

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
from experiments.runs import QUANT_TRIM, graphs_of, read_config_json
from qt_jax import records
from qt_jax.export.encodings import read_ranges
from qt_jax.export.network import read_description, restore
from qt_jax.files import staged, write_whole
from qt_jax.reporting.figures import summary_figure
from qt_jax.reporting.pivot import title
from qt_jax.reporting.run_report import RunContents, Weights, run_page
from qt_jax.reporting.tables import accuracy_table, to_markdown

RAW = "Kernels of the checkpoints, before batch norm is folded into them."

FOLDED = "Kernels of the exported graphs, with batch norm folded in. The checkpoints are not there."

PICTURES = {"Masks of the first test images": "masks.png"}


def metric_of(dataset: str) -> tuple[str, str]:
    """Return the key of records by which a run is judged, and the prefix of its keys in metrics.jsonl."""
    return ("miou", "validation_miou") if dataset in SEGMENTATION else ("top1", "validation")


def write_summary(config: Config, trained: dict[str, Any], directory: Path, console: Console) -> None:
    """Print the table, and write summary.md and summary.png.

    Args:
      config: Config of the run.
      trained: Method -> variables of its network, for the histograms of the figure.
      directory: Folder of the run, with records.jsonl and metrics.jsonl.
      console: Where the table goes.

    Raises:
      InvalidInput: metrics.jsonl has no epoch of one of the networks.
    """
    rows = records.read(directory / "records.jsonl")
    metrics = records.read(directory / "metrics.jsonl")
    if missing := trained.keys() - {row["method"] for row in metrics}:
        raise qt.InvalidInput(
            f"{directory}/metrics.jsonl has no epoch of {' and '.join(sorted(missing))}, although training "
            "is complete. Restore the file, or choose another --out."
        )
    write_whole(directory / "summary.md", summary_page(config, rows, metrics))
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
    weights = {method: _kernels(variables["params"]) for method, variables in trained.items()}
    with staged(directory / "summary.png") as scratch:
        summary_figure(rows, (steps, lam), weights, scratch, history, metric)
    console.print(accuracy_table(rows, metric), soft_wrap=False)


def summary_page(config: Config, rows: list[records.Record], metrics: list[dict[str, Any]]) -> str:
    """Return summary.md: table, drift between FP32 and fake quantization, cost of training, provenance."""
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


def write_report(folder: Path, out: Path | None = None, backends: Sequence[Path] = ()) -> Path:
    """Write the HTML report of the run in `folder`, whole or not at all, and return its path.

    Args:
      folder: Folder of the run.
      out: File to write; None: report.html in `folder`.
      backends: Further files of records, such as those of `experiments.backends`.

    Raises:
      InvalidInput: `folder` does not hold a run, one of its files or of `backends` is damaged, or `out`
        cannot be written.
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


def read_run(folder: Path, others: Sequence[records.Record] = ()) -> RunContents:
    """Read what the folder of a run holds.

    Args:
      folder: Folder of a run of `experiments.cifar` or `experiments.segmentation`.
      others: Records of further backends.

    Raises:
      InvalidInput: `folder` does not hold a run, or one of its files is damaged.
    """
    config = read_config_json(folder)
    metric, validation = metric_of(config["dataset"])
    metrics, rows = (records.read(folder / name) for name in ("metrics.jsonl", "records.jsonl"))
    graphs = graphs_of(config.get("quantizer", QUANT_TRIM))  # older runs do not say which
    weights, source = read_weights(folder, graphs)
    ranges, diagnosis = folder / "model.ranges.json", folder / "diagnosis.md"
    return RunContents(
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
        diagnosis=diagnosis.read_text(encoding="utf-8") if diagnosis.exists() else None,
        diagnosis_drawings={
            f"diagnosis/{path.stem}.png": path.read_text(encoding="utf-8")
            for path in (folder / "diagnosis").glob("*.svg")
        },
    )


def facts(
    config: Mapping[str, Any], metrics: Sequence[records.Record], rows: Sequence[records.Record]
) -> dict[str, str]:
    """Say in words what was trained on what, how and for how long."""
    quantizer = config.get("quantizer", QUANT_TRIM)
    told = {
        "data set": config["dataset"],
        "model": config["model"],
        "method": f"{title(quantizer)}, --sched {config.get('sched')}",
        "grids in training": _grids(config),
        "reverse pruning": _reverse_pruning(config),
        "budget": f"{config.get('epochs')} epochs, {config.get('batch_size')} images per step",
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
        return "none: there was no fake quantization"
    sites = f" at the {config['sites']} of layers" if "sites" in config else ""  # older runs do not say
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
    """Read the kernels of every network, in the order of the network.

    They come from the newest checkpoints, or from the initializers of the graphs if a checkpoint is missing.

    Args:
      folder: Folder of the run.
      graphs: Method -> name of its graph, as `graphs_of` returns them.

    Returns:
      Method -> layer -> kernel `(size,)`, and a sentence that names the source.

    Raises:
      InvalidInput: A checkpoint or a graph is damaged.
    """
    exported = {method: _graph_kernels(folder / name) for method, name in graphs.items()}
    raw = {
        method: _checkpoint_kernels((folder / name).with_suffix(".json"), folder / "checkpoints" / method)
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


def _graph_kernels(path: Path) -> dict[str, np.ndarray]:
    """Map layers to their kernels, the initializers of rank 2 or more. Without a graph there are none."""
    if not path.exists():
        return {}
    try:
        graph = onnx.load(path).graph
    except DecodeError as error:
        raise qt.InvalidInput(
            f"{path} is not an ONNX graph ({error}): delete it and relaunch the run."
        ) from error
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    return {
        name.removesuffix("/kernel"): value.ravel()
        for name, value in values.items()
        if value.ndim >= 2 and np.issubdtype(value.dtype, np.floating)
    }


def _checkpoint_kernels(description: Path, checkpoints: Path) -> dict[str, np.ndarray]:
    """Map layers to the kernels of the newest checkpoint. Without checkpoints there are none."""
    if not checkpoints.is_dir():
        return {}
    key = read_description(description).collections["params"] if description.exists() else "params"
    return _kernels(restore(checkpoints).get(key) or {})


def _kernels(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Map each layer's path to its flattened kernel."""
    return {
        "/".join(path[:-1]): leaf.ravel()
        for path, leaf in flatten_dict(params).items()
        if path[-1] == "kernel"
    }
