"""Compare several models under chosen toolchains, with progress, one line per row, and a report."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qt_jax import records
from qt_jax.backends.arrays import first
from qt_jax.backends.evaluation import (
    DATA,
    RECORDS,
    TestSet,
    evaluate,
    named_layers,
    select_rows,
    split_labels,
)
from qt_jax.backends.inputs import load, prepare
from qt_jax.backends.protocol import Batch
from qt_jax.backends.steps import MAX_GIBIBYTES, Limits
from qt_jax.command_line import Failed, print_rows, terminate_like_interrupt
from qt_jax.errors import InvalidInput
from qt_jax.files import write_whole, writing
from qt_jax.records import Record
from qt_jax.reporting.pivot import is_exact
from qt_jax.scheduler import HERE, Scheduler

INTERRUPTED = "Interrupted. What is finished is kept: the same command goes on from here."
ALL_ROWS_FAILED = "no row ended well"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Choose toolchains, the amount of data, and limits."""

    out: Path
    """Folder for records.jsonl, the report, logs and compiled models. What is there is not done again."""
    backends: tuple[str, ...] = ("all",)
    """Names of backends, or "all"."""
    schemes: tuple[str, ...] | None = None
    """Names of schemes, as `list` gives them. The default is all."""
    runtimes: tuple[str, ...] | None = None
    """Names of runtimes, as `list` gives them. The default is all."""
    limit: int | None = None
    """Number of test images, from the first. The default is all."""
    simulated_limit: int | None = 500
    """Number of test images on simulators and emulators, which are slow. "None": as many as elsewhere."""
    calibration_size: int | None = None
    """Number of calibration images, from the first. The default is all. Every vendor gets the same."""
    jobs: int = 1
    """Rows, or jobs of a scheduler, at a time. Latency is measured afterwards, one row at a time."""
    timeout: float = 1800.0
    """Seconds for each compile, run or timing."""
    memory: float = MAX_GIBIBYTES
    """GiB of private memory for each process that compiles, runs or times."""
    price_per_hour: float | None = None
    """USD for an hour of this machine. The default is 0.05 per CPU, a round figure."""
    retry: bool = False
    """Run rows again that did not end well the last time."""
    output: tuple[str, ...] = ()
    """Names of the outputs to judge. The graph loses the others. The default is all."""
    metric: str | None = None
    """Metric of your own, module:function. It is called with the outputs by name and the labels."""
    void_label: int | None = None
    """Label of pixels that have no class, often 255."""
    float_layers: str | None = None
    """Regular expression of the nodes to leave in floating point. It must match a node's whole name."""
    json: bool = False
    """Print the records as JSON lines on stdout, and all text on stderr."""
    scheduler: Annotated[Scheduler, tyro.conf.OmitArgPrefixes] = HERE
    """Runs the compiles and the simulators."""

    def selection(self) -> tuple[str | tuple[str, ...], tuple[str, ...] | None, tuple[str, ...] | None]:
        """Return backends, schemes and runtimes, as `evaluation.select_rows` takes them."""
        return "all" if "all" in self.backends else self.backends, self.schemes, self.runtimes

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `qt_jax.evaluate` that these settings stand for."""
        backends, schemes, runtimes = self.selection()
        return {
            "backends": backends,
            "schemes": schemes,
            "runtimes": runtimes,
            "outputs": self.output,
            "metric": self.metric,
            "void_label": self.void_label,
            "float_layers": self.float_layers,
            "limit": self.limit,
            "simulated_limit": self.simulated_limit,
            "jobs": self.jobs,
            "limits": Limits(self.timeout, self.memory),
            "folder": self.out,
            "price_per_hour": self.price_per_hour,
            "retry": self.retry,
            "scheduler": self.scheduler,
        }


def evaluate_all(
    models: Sequence[tuple[Path, dict[str, Any]]],
    calibration: Batch,
    test_set: TestSet,
    settings: Settings,
    console: Console,
) -> list[Record]:
    """Evaluate every model under the settings with progress, then write the report if anything is new.

    All models are checked before the first one runs.

    Args:
      models: (path of a float ONNX model, its identity) for each model; see `qt_jax.evaluate`.
      calibration: As `qt_jax.evaluate` takes it.
      test_set: As `qt_jax.evaluate` takes it.
      settings: Toolchains, data and limits.
      console: Prints the progress, one line per new row, and the table.

    Returns:
      The records of all models.

    Raises:
      InvalidInput: As for `qt_jax.evaluate`.
      Failed: No row ended well, apart from the references in FP32.
    """
    from qt_jax.reporting.answer import answer, warnings_of
    from qt_jax.reporting.report import write_report
    from qt_jax.reporting.tables import deployment_table

    terminate_like_interrupt()
    logging.getLogger("qt_jax").addHandler(logging.NullHandler())  # warnings are printed below
    _check(models, calibration, test_set, settings)
    rows: list[Record] = []
    quantized: list[Record] = []
    new: list[Record] = []
    total = len(models) * len(select_rows(*settings.selection()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rows", total=total)

        def keep(record: Record) -> None:
            new.append(record)
            progress.update(task, completed=len(rows) + len(new))
            progress.console.print(_line(record, settings.out), soft_wrap=True)

        for model, identity in models:
            found = evaluate(
                model, calibration, test_set, **settings.arguments(), identity=identity, on_record=keep
            )
            rows += found
            quantized += found[1:] or found  # the reference comes first
            progress.update(task, completed=len(rows))
    console.print(deployment_table(rows))
    for sentence in answer(rows):
        console.print(sentence)
    for warning in warnings_of(rows):
        console.print(f"warning: {warning}", style="yellow")
    for note in warnings_of(rows, "notes"):
        console.print(f"note: {note}")
    reported = _comparable(records.read(settings.out / RECORDS), rows)
    key = hashlib.sha256(json.dumps(reported).encode()).hexdigest()
    written = settings.out / "work" / "report.sha256"
    with writing(settings.out):
        if not written.exists() or written.read_text(encoding="utf-8") != key:
            write_report(reported, settings.out)
            write_whole(written, key)
    where = f"{settings.out}/report.html, summary.md, {RECORDS}"
    console.print(f"{len(new)} of {len(rows)} rows are new. {where}", soft_wrap=True)
    if settings.json:
        print_rows(rows)
    if not any(row["status"] == "ok" for row in quantized):
        raise Failed(f"{ALL_ROWS_FAILED}: the table above says why")
    return rows


def _check(
    models: Sequence[tuple[Path, dict[str, Any]]], calibration: Batch, test_set: TestSet, settings: Settings
) -> None:
    """Prepare every model on the first samples. Raises InvalidInput, which names the model."""
    ranged, _ = split_labels(calibration, settings.out / DATA)
    samples, _ = split_labels(test_set, settings.out / DATA)
    for path, _ in models:
        try:
            prepared = prepare(load(path), first(ranged, 2), first(samples, 2), outputs=settings.output)
            named_layers(prepared.model, settings.float_layers)
        except InvalidInput as error:
            raise InvalidInput(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _comparable(kept: list[Record], rows: list[Record]) -> list[Record]:
    """Return `rows`, preceded by what earlier commands found on the same data.

    The earlier rows of a network that has changed since, under the same name, are left out.
    """
    data = {row["data"] for row in rows}
    keys = {row["key"] for row in rows}
    current = {_named(row): row["checkpoint"] for row in rows}
    earlier = (
        row
        for row in kept
        if row["data"] in data and current.get(_named(row), row["checkpoint"]) == row["checkpoint"]
    )
    return [row for row in earlier if row["key"] not in keys] + rows


def _named(row: Record) -> tuple[Any, ...]:
    """Return what names the network of a row."""
    return row["run"], row["model"], row["method"], row["seed"]


def _line(record: Record, out: Path) -> str:
    """Describe a finished row in one line."""
    head = f"{record['method']} {record['backend']} {record['scheme']} {record['runtime']}"
    if record["status"] != "ok":
        log = f" (log: {out / record['log']})" if record.get("log") else ""
        return f"{head}: {record['status']}: {' '.join(record['reason'].split())}{log}"
    parts = [_score(record)]
    if is_exact(record):
        parts.append("equal to float")
    if record["sqnr_db"] is not None:
        parts.append(f"{record['sqnr_db']:.1f} dB")
    if record.get("worst_sqnr_db") is not None and record["top1"] is None:
        parts.append(f"worst image {record['worst_sqnr_db']:.1f} dB")
    if record["latency_ms_p50"] is not None:
        parts.append(f"{record['latency_ms_p50']:.2f} ms")
    products = record.get("products")
    if products and products["quantized"] < products["total"]:
        parts.append(f"only {products['quantized']} of {products['total']} products on integers")
    return f"{head}: {', '.join(filter(None, parts))}"


def _score(record: Record) -> str:
    """Describe what labels say of a row; without labels, on how many samples it ran."""
    if record["top1"] is not None:
        gain = 100 * (record["top1"] - record["reference_top1"])
        return f"{100 * record['top1']:.2f} % of {record['n']} ({gain:+.2f})"
    if record.get("metric") is None:
        return f"{record['n']} samples"
    gain = record["value"] - record["reference_value"]
    return f"{record['metric']} {record['value']:.4g} on {record['n']} ({gain:+.4g})"
