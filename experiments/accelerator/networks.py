"""Keep trained networks: the network and its curve in the folder of its row, and one record for all time.

The record is written last. A row without one is trained again, and replaces what a cut has left of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.accelerator.program import Trained
from experiments.paper.collect import FINAL, KEYS, replace, write_lines
from experiments.paper.rows import METRICS, NETWORK, TRAINED, StudyRow, folder_of, home_of, key_of
from experiments.training.checkpoints import write_variables
from qt_jax import records
from qt_jax.records import Record
from qt_jax.reporting.tables import with_spread


def trained(rows: Sequence[StudyRow], runs: Path) -> dict[StudyRow, Record]:
    """Return the records of rows of one preset that were trained with their present config."""
    kept = records.read(home_of(rows[0].preset, runs) / TRAINED) if rows else []
    found = {key_of(record): record for record in kept}
    mine = {row: found.get((row.task.name, row.name, row.seed)) for row in rows}
    return {row: record for row, record in mine.items() if record and record["digest"] == row.digest}


def missing(rows: Sequence[StudyRow], runs: Path) -> list[StudyRow]:
    """Return the rows that are to be trained: those that have no record of a status in `FINAL`.

    A row whose network is not in the folder, although its record is, is trained again only where a row that
    is to be trained starts from it.
    """
    found = trained(rows, runs)
    left = {row for row in rows if row not in found or found[row]["status"] not in FINAL}
    lost = {
        row.source
        for row in left
        if row.source in found and not (folder_of(row.source, runs) / NETWORK).exists()
    }
    return [row for row in rows if row in left or (row in lost and found[row]["status"] == "ok")]


def keep(row: StudyRow, runs: Path, result: Trained, about: Mapping[str, Any]) -> Record:
    """Write the network, the curve and, last, the record of a row, and return the record.

    Args:
      row: The row.
      runs: Folder of all runs.
      result: What came of its seed. A network that is not finite is not written.
      about: What else the record states: provenance, flags, and seconds beside those of training.
    """
    folder = folder_of(row, runs)
    if not result.is_finite:
        reason = "training diverged: a loss or a parameter is not finite"
        return note(row, runs, about, status="invalid", reason=reason, seconds=result.seconds)
    shared = {"method": row.name, "seconds": result.seconds / len(result.curve)}
    shared |= {name: about[name] for name in ("commit", "versions", "device")}
    validated = {
        name: value
        for name, value in result.accuracies.items()
        if name.startswith("validation_") and value is not None
    }
    curve = [{**shared, **dict.fromkeys(validated), **epoch} for epoch in result.curve]
    curve[-1] |= validated
    write_variables(folder / NETWORK, result.network)
    write_lines(folder / METRICS, curve)
    return note(row, runs, about, status="ok", seconds=result.seconds, **result.accuracies)


def note(row: StudyRow, runs: Path, about: Mapping[str, Any], **values: Any) -> Record:
    """Write the record of a row in place of an earlier one, and return it."""
    known = {"run": f"paper-{row.preset.name}", "task": row.task.name, "model": row.config.model}
    known |= {"method": row.name, "seed": row.seed, "digest": row.digest, "scheme": "trained"}
    empty = {"row_seconds": None, "top1_six_views": None, "top1_fake_quant": None}
    record = records.new_record(**empty | known | dict(about) | values)
    replace(home_of(row.preset, runs) / TRAINED, [record], KEYS)
    return record


def table(found: Sequence[Record]) -> Table:
    """Return a table of trained networks with one row per kind: means and sample deviations over seeds."""
    shown = Table(title="trained networks, test accuracy in %", box=box.SIMPLE_HEAD)
    for heading in ("task", "method"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("seeds", "FP32", "fake-quantized", "six views", "seconds", "not trained"):
        shown.add_column(heading, justify="right")
    kinds: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        kinds.setdefault((record["task"], record["method"]), []).append(record)
    for (task, method), members in kinds.items():
        good = [record for record in members if record["status"] == "ok"]
        columns = [
            with_spread((r[key] for r in good if r[key] is not None), scale)
            for key, scale in (
                ("top1", 100),
                ("top1_fake_quant", 100),
                ("top1_six_views", 100),
                ("seconds", 1),
            )
        ]
        failed = ", ".join(sorted({record["status"] for record in members} - {"ok"}))
        shown.add_row(task, method, str(len(good)), *columns, failed)
    return shown
