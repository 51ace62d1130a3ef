"""What a run has shown, as a table, a Markdown page and a figure, from its records and metrics alone."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console

import qt_jax as qt
from experiments.configs.cifar import Config, lambda_schedule
from experiments.data import SEGMENTATION
from qt_jax.reporting import records
from qt_jax.reporting.figures import summary_figure
from qt_jax.reporting.files import write_whole
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
    scratch = directory / "summary.partial.png"
    summary_figure(rows, (steps, lam), weights, scratch, history, metric)
    os.replace(scratch, directory / "summary.png")
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
