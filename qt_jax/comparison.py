"""Several models through the toolchains that settings name: progress, a line for each row, the report."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qt_jax import records
from qt_jax.backends.evaluation import RECORDS, evaluate, offered
from qt_jax.backends.steps import MOST_GIBIBYTES, Limits
from qt_jax.command_line import Failed, print_rows, terminate_like_interrupt
from qt_jax.files import write_whole
from qt_jax.records import Record
from qt_jax.scheduler import HERE, Scheduler

GOES_ON = "Interrupted. What is finished is kept: the same command goes on from here."
NO_ROW = "no row ended well"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which toolchains, on how much data, within which limits."""

    out: Path
    """Folder for records.jsonl, the report, logs and compiled models; what is there is not done again."""
    backends: tuple[str, ...] = ("all",)
    """Names, or "all"."""
    schemes: tuple[str, ...] | None = None
    """Names, as `list` gives them; default: all."""
    runtimes: tuple[str, ...] | None = None
    """Names, as `list` gives them; default: all."""
    limit: int | None = None
    """Test images, from the first; default: all."""
    simulated_limit: int | None = 500
    """Test images on simulators and emulators, which are slow. "None": as many as elsewhere."""
    calibration_size: int | None = None
    """Calibration images, from the first; default: all. Every vendor gets the same."""
    jobs: int = 1
    """Rows, or jobs of a scheduler, at a time. Latency is measured afterwards, one row at a time."""
    timeout: float = 1800.0
    """Seconds for each compile, run or timing."""
    memory: float = MOST_GIBIBYTES
    """GiB of private memory for each process of them."""
    price_per_hour: float | None = None
    """USD for an hour of this machine; default: 0.05 for each CPU, a round figure."""
    retry: bool = False
    """Run again what did not end well the last time."""
    json: bool = False
    """Print the records as JSON lines on stdout, and all text on stderr."""
    scheduler: Annotated[Scheduler, tyro.conf.OmitArgPrefixes] = HERE
    """Who does compiles and runs of simulators."""

    def selection(self) -> tuple[str | tuple[str, ...], tuple[str, ...] | None, tuple[str, ...] | None]:
        """Backends, schemes and runtimes, as `evaluation.offered` takes them."""
        return "all" if "all" in self.backends else self.backends, self.schemes, self.runtimes

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `qt_jax.evaluate` that these settings stand for."""
        backends, schemes, runtimes = self.selection()
        return {
            "backends": backends,
            "schemes": schemes,
            "runtimes": runtimes,
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
    calibration: np.ndarray,
    test_set: tuple[np.ndarray, np.ndarray],
    settings: Settings,
    console: Console,
) -> list[Record]:
    """Each (model, identity) under the settings, with progress; then the report, if anything is new.

    Raises:
      InvalidInput: as `evaluate` does.
      Failed: no row ended well, the references in FP32 aside.
    """
    from qt_jax.reporting.report import write_report
    from qt_jax.reporting.tables import deployment_table

    terminate_like_interrupt()
    rows: list[Record] = []
    judged: list[Record] = []
    fresh: list[Record] = []
    total = len(models) * len(offered(*settings.selection()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rows", total=total)

        def keep(record: Record) -> None:
            fresh.append(record)
            progress.update(task, completed=len(rows) + len(fresh))
            progress.console.print(_line(record), soft_wrap=True)

        for model, identity in models:
            made = evaluate(
                model, calibration, test_set, **settings.arguments(), identity=identity, on_record=keep
            )
            rows += made
            judged += made[1:] or made  # the reference comes first
            progress.update(task, completed=len(rows))
    console.print(deployment_table(rows))
    reported = _comparable(records.read(settings.out / RECORDS), rows)
    key = hashlib.sha256(json.dumps(reported).encode()).hexdigest()
    mark = settings.out / "work" / "report.sha256"
    if not mark.exists() or mark.read_text() != key:
        write_report(reported, settings.out)
        write_whole(mark, key)
    where = f"{settings.out}/report.html, summary.md, {RECORDS}"
    console.print(f"{len(fresh)} of {len(rows)} rows are new. {where}", soft_wrap=True)
    if settings.json:
        print_rows(rows)
    if not any(row["status"] == "ok" for row in judged):
        raise Failed(f"{NO_ROW}: the table above says why")
    return rows


def _comparable(kept: list[Record], rows: list[Record]) -> list[Record]:
    """`rows`, after what earlier commands found of these networks and of others on the same data.

    Of a network that has changed since, under the same name, the earlier rows are left out.
    """
    data = {row["data"] for row in rows}
    asked = {row["key"] for row in rows}
    current = {_named(row): row["checkpoint"] for row in rows}
    earlier = (
        row
        for row in kept
        if row["data"] in data and current.get(_named(row), row["checkpoint"]) == row["checkpoint"]
    )
    return [row for row in earlier if row["key"] not in asked] + rows


def _named(row: Record) -> tuple[Any, ...]:
    return row["run"], row["model"], row["method"], row["seed"]


def _line(record: Record) -> str:
    """One finished row, in one line."""
    head = f"{record['method']} {record['backend']} {record['scheme']} {record['runtime']}"
    if record["status"] != "ok":
        log = f" (log: {record['log']})" if record.get("log") else ""
        return f"{head}: {record['status']}: {' '.join(record['reason'].split())}{log}"
    gain = 100 * (record["top1"] - record["reference_top1"])
    ratio = "" if record["sqnr_db"] is None else f", {record['sqnr_db']:.1f} dB"
    clock = "" if record["latency_ms_p50"] is None else f", {record['latency_ms_p50']:.2f} ms"
    return f"{head}: {100 * record['top1']:.2f} % of {record['n']} ({gain:+.2f}){ratio}{clock}"
