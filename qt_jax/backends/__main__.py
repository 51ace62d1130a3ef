"""`python -m qt_jax.backends list | doctor | install NAME... | run MODEL.onnx ...`."""

import dataclasses
import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qt_jax.backends import environments, registry
from qt_jax.backends.evaluation import RECORDS, evaluate, offered
from qt_jax.backends.steps import MOST_GIBIBYTES, Limits
from qt_jax.errors import InvalidInput
from qt_jax.reporting import records
from qt_jax.reporting.files import write_whole
from qt_jax.reporting.records import Record
from qt_jax.scheduler import HERE, Scheduler

PIPED_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class List:
    """What there is: every toolchain, what it stands for, its schemes and runtimes."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """What each toolchain lacks on this machine, and the command that mends it."""


@dataclasses.dataclass(frozen=True)
class Install:
    """Build isolated environments for toolchains, with uv, after saying their size and licence."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Backends or environments, as `list` and `doctor` name them, or "all"."""
    yes: Annotated[bool, tyro.conf.arg(aliases=["-y"])] = False
    """Do not ask before downloading."""


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


@dataclasses.dataclass(frozen=True)
class Run:
    """One float ONNX model through every toolchain, scheme and runtime; a report of what each made of it."""

    model: Annotated[Path, tyro.conf.Positional]
    """Float ONNX classifier with one input."""
    calibration: Path
    """.npz with "images" (or a single array): float32, as the model takes them."""
    test: Path
    """.npz with "images" and integer "labels"."""
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes]


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Install, tyro.conf.subcommand("install")]
    | Annotated[Run, tyro.conf.subcommand("run")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 after a message about wrong input, 130 if
    interrupted."""
    command = tyro.cli(Command, args=arguments, prog="python -m qt_jax.backends")
    console = wide_console()
    action = {List: show_list, Doctor: show_doctor, Install: install, Run: run}[type(command)]
    try:
        action(command, console)
    except InvalidInput as error:
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted. What is finished is kept: the same command goes on from here.")
        return 130
    return 0


def wide_console() -> Console:
    """Where tables go: as wide as the terminal, or `PIPED_WIDTH` columns into a file or a pipe."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=PIPED_WIDTH)


def show_list(_: List, console: Console) -> None:
    """A table of all backends with their schemes and runtimes."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0))
    for heading in ("backend", "vendor, kind", "stands for", "schemes", "runtimes"):
        table.add_column(heading, no_wrap=heading == "backend", overflow="fold")
    for backend in registry.BACKENDS.values():
        schemes = "\n".join(scheme.name for scheme in backend.schemes)
        runtimes = "\n".join(runtime.name for runtime in backend.runtimes)
        kind = f"{backend.vendor}\n{backend.kind}"
        table.add_row(backend.name, kind, backend.stands_for, schemes, runtimes)
    console.print(table)


def show_doctor(_: Doctor, console: Console) -> None:
    """A table of what each backend lacks here."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("backend", "environment", "size", "state, and what mends it"):
        table.add_column(heading, no_wrap=heading != "state, and what mends it")
    for backend in registry.BACKENDS.values():
        needed = registry.environments_of(backend)
        lacks = [environments.missing(environment) for environment in needed] + [backend.available()]
        state = "; ".join(filter(None, lacks)) or "ready"
        size = f"{sum(environment.megabytes for environment in needed)} MB" if needed else "-"
        names = ", ".join(environment.name for environment in needed) or "this one"
        table.add_row(backend.name, names, size, state)
    console.print(table)
    console.print(f"Environments lie in {environments.root()} (QT_JAX_ENVIRONMENTS).")


def install(command: Install, console: Console) -> None:
    """Build what is missing of the environments named, once the user agrees.

    Raises InvalidInput for unknown names, without consent, and as `environments.install` does.
    """
    wanted = {environment.name: environment for name in command.names for environment in _named(name)}
    if not wanted:
        names = " ".join(command.names) or "nothing"
        raise InvalidInput(f"{names}: no environment to install. `doctor` says what each backend lacks.")
    wanted = {name: it for name, it in wanted.items() if environments.missing(it) is not None}
    if not wanted:
        console.print("Nothing to do: all of it is installed.")
        return
    for environment in wanted.values():
        console.print(f"{environment.name}: {environment.megabytes} MB, Python {environment.python}")
        console.print(f"  licences: {environment.licence}")
        console.print(f"  {', '.join((*environment.requirements, *environment.without_dependencies))}")
    agreed = command.yes or (sys.stdin.isatty() and console.input("Install? [y/N] ").strip().lower() == "y")
    if not agreed:
        raise InvalidInput("Nothing was installed: answer y, or give --yes.")
    for number, environment in enumerate(wanted.values(), start=1):
        console.print(f"[{number}/{len(wanted)}] {environment.name} -> {environments.location(environment)}")
        environments.install(environment)
    console.print("Done. `python -m qt_jax.backends doctor` tells what can run now.")


def _named(name: str) -> list:
    """The environments that `name` stands for."""
    if name == "all":
        return [it for backend in registry.BACKENDS.values() for it in registry.environments_of(backend)]
    if name in registry.BACKENDS:
        return registry.environments_of(registry.BACKENDS[name])
    known = {it.name: it for it in _named("all")}
    if name not in known:
        names = sorted({*registry.BACKENDS, *known})
        raise InvalidInput(f"There is no backend or environment {name!r}: choose among {names}, or 'all'.")
    return [known[name]]


def run(command: Run, console: Console) -> None:
    """One model and the arrays of its files through `evaluate_all`. Raises InvalidInput as that does."""
    calibration = _arrays(command.calibration, ("images",))["images"][: command.settings.calibration_size]
    test = _arrays(command.test, ("images", "labels"))
    if not command.model.is_file():
        raise InvalidInput(f"{command.model} is not there: give the path of a float ONNX model.")
    name = command.model.stem
    identity = {"run": command.settings.out.resolve().name, "model": name, "method": name}
    models = [(command.model, identity)]
    evaluate_all(models, calibration, (test["images"], test["labels"]), command.settings, console)


def evaluate_all(models, calibration, test_set, settings: Settings, console: Console) -> list[Record]:
    """Each (model, identity) under the settings, with progress; then the report, if anything is new."""
    from qt_jax.reporting.deployment_tables import deployment_table
    from qt_jax.reporting.report import write_report

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows: list[Record] = []
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
    return rows


def _comparable(kept: list[Record], rows: list[Record]) -> list[Record]:
    """`rows`, after what earlier commands found of the same networks on the same data."""
    subject = {(row["data"], row["checkpoint"]) for row in rows}
    asked = {row["key"] for row in rows}
    earlier = (row for row in kept if (row["data"], row["checkpoint"]) in subject)
    return [row for row in earlier if row["key"] not in asked] + rows


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


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays called `names` of an .npz file; a file with one array alone needs no name for it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} cannot be read as an .npz file: {error}.") from error
    if len(names) == len(found) == 1:
        return {names[0]: next(iter(found.values()))}
    lacking = [name for name in names if name not in found]
    if lacking:
        raise InvalidInput(f"{path} lacks the arrays {lacking}, it holds {sorted(found)}.")
    return {name: found[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
