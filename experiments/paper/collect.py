"""Collect the records of a finished row in the folder of results, without what is bulky.

The records of a row replace those that it had before. Each file is replaced whole, under a lock.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.paper.evidence import score
from experiments.paper.rows import (
    ATTEMPTS,
    DEPLOYMENT,
    METRICS,
    SEARCH,
    STRUCTURE,
    TRAINING,
    StudyRow,
    changed,
    locked,
)
from experiments.paper.structure import network_structure, schedule_points
from qt_jax import provenance, records
from qt_jax.errors import InvalidInput
from qt_jax.files import write_whole
from qt_jax.records import Record

BULKY = ("predictions", "operators", "limits", "log", "command", "cpu", "key", "stands_for", "run")
"""Keys of a deployment record that no table or figure of the study reads."""

DIGITS = 6
"""Significant digits of the confidences and accuracies in reliability bins."""

KEYS = ("task", "method", "seed")

FINAL = ("ok", "invalid")
"""Statuses of trained networks that training again with the same seed would not change."""


def collect(
    row: StudyRow, folder: Path, trained: Path, found: Sequence[Record], images: np.ndarray, results: Path
) -> None:
    """Write the records of a finished row into the folder of results.

    Args:
      row: The row.
      folder: Folder of the row, with graph and description.
      trained: Folder in which its network was trained, with metrics.
      found: Its deployment records, as `qt.evaluate` gives them.
      images: Images of the validation split, on which the outputs of its layers are compared.
      results: Folder that gets search.jsonl for a trial of the search. For other rows it gets
        structure.jsonl, deployment.jsonl and, last, training.jsonl, whose digest says that the row is done.
    """
    metrics = records.read(trained / METRICS)
    metrics = [epoch for epoch in metrics if epoch["method"] == (row.method.network or row.name)]
    seconds = sum(attempt["seconds"] for attempt in records.read(folder / ATTEMPTS))
    about = {"task": row.task.name, "method": row.name, "seed": row.seed, "digest": row.digest}
    results.mkdir(parents=True, exist_ok=True)
    if row.searching:
        replace(results / SEARCH, [about | trial(row, found, seconds)], (*KEYS, "factor"))
        return
    tau = [{"epoch": epoch["epoch"], "tau": epoch["tau"]} for epoch in metrics if epoch.get("tau")]
    shape = network_structure(folder, images) | {
        "lambda": schedule_points(row.config, metrics[-1]["step"]),
        "tau": tau,
    }
    replace(results / STRUCTURE, [about | shape], KEYS)
    replace(results / DEPLOYMENT, [compact(record) for record in found], KEYS)
    replace(results / TRAINING, [about | training(row, metrics, seconds)], KEYS)


def trial(row: StudyRow, found: Sequence[Record], seconds: float) -> Record:
    """Return what search.jsonl holds of a trial: accuracies on the validation split, and the criterion."""
    shown = {record["scheme"]: score(record) for record in found}
    scores = [value or 0.0 for value in shown.values()]
    worst = row.preset.criterion == "worst"
    if worst and None in shown.values():
        lost = ", ".join(name for name, value in shown.items() if value is None)
        raise InvalidInput(f"{row}: {lost} gave no accuracy, so that the worst deployment is not known")
    return {
        "factor": row.factor,
        "learning_rate": row.config.learning_rate,
        **shown,
        "criterion": min(scores) if worst else fmean(scores),
        "criterion_of": min(shown, key=shown.__getitem__) if worst else "mean",
        "images": found[0]["n"],
        "seconds": round(seconds, 1),
        "commit": provenance.commit(),
    }


def training(row: StudyRow, metrics: Sequence[Mapping[str, Any]], seconds: float) -> Record:
    """Return what training.jsonl holds of a row, apart from its task, method, seed and digest."""
    last = metrics[-1]
    base, own = dataclasses.asdict(row.task.base), dataclasses.asdict(row.config)
    differ = sorted(name for name in own if own[name] != base[name])
    shown = ("epoch", "step", "loss", "accuracy", "lambda", "learning_rate", "seconds")
    shown += tuple(name for name in last if name.startswith("validation_"))
    return {
        "model": row.config.model,
        "dataset": row.config.dataset,
        "config": changed(row.config),
        "changes": json.loads(json.dumps({name: own[name] for name in differ}, default=str)),
        "learning_rate": row.config.learning_rate,
        "rate_from": row.chosen,
        "start": row.method.start or (row.source.name if row.task.start and row.source else None),
        "network": row.method.network,
        "export": row.method.export,
        **{name: last[name] for name in last if name.startswith("validation_")},
        "epochs": [{name: epoch[name] for name in shown} for epoch in metrics],
        "training_seconds": round(sum(epoch["seconds"] for epoch in metrics), 1),
        "seconds": round(seconds, 1),
        **{name: last.get(name) for name in ("commit", "versions", "device")},
        "cpu": provenance.cpu(),
    }


def compact(record: Record) -> Record:
    """Return a deployment record without its bulky keys, and with its reliability bins rounded."""
    kept = {name: value for name, value in record.items() if name not in BULKY}
    if bins := kept.get("reliability"):
        kept["reliability"] = [[None if x is None else float(f"{x:.{DIGITS}g}") for x in row] for row in bins]
    return kept


def united(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Return records of trained networks with one for each row: the new one, unless it is a mere failure.

    >>> row = {"task": "t", "method": "m", "seed": 0}
    >>> good, bad = row | {"status": "ok"}, row | {"status": "crashed"}
    >>> [record["status"] for record in united([good], [bad])], len(united([bad], [good]))
    (['ok'], 1)
    """
    found = {tuple(record[key] for key in KEYS): record for record in old}
    for record in new:
        known = found.get(row := tuple(record[key] for key in KEYS))
        if known is None or record["status"] in FINAL or known["status"] not in FINAL:
            found[row] = record
    return list(found.values())


def replace(path: Path, new: Sequence[Record], keys: Sequence[str]) -> None:
    """Put records into a file, in place of those that agree with one of them in `keys`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "r.jsonl"
    >>> replace(path, [{"seed": 0, "x": 1}, {"seed": 0, "x": 2}], ["seed"])
    >>> replace(path, [{"seed": 0, "x": 3}], ["seed"])
    >>> records.read(path)
    [{'seed': 0, 'x': 3}]
    """
    mine = {tuple(record[key] for key in keys) for record in new}
    with locked(path.parent):
        kept = [record for record in records.read(path) if tuple(record[key] for key in keys) not in mine]
        write_lines(path, (*kept, *new))


def write_lines(path: Path, found: Sequence[Record]) -> None:
    """Write records to a file of JSON lines, whole or not at all, in place of what it holds."""
    write_whole(path, "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in found))
