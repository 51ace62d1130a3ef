"""Train the study's networks in a quarter of an hour on one GPU: `python -m experiments.accelerator`.

The rows are those of a preset of the study, in the order of their worth. Each is written as it ends, so that
a cut costs one row, and a relaunch goes on with the next. Export and deployment follow on a CPU, from the
same folder: `python -m experiments.paper --preset quarter-hour`. docs/guides/accelerator.md tells how a bare
machine is prepared.
"""

import dataclasses
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from rich.console import Console

import qt_jax as qt
from experiments import devices
from experiments.accelerator import measurements, networks, plan
from experiments.accelerator.program import Placed, SeedProgram, build, place, rehearsed, train
from experiments.configs.study import preset
from experiments.configs.training import Config
from experiments.data import Dataset, load
from experiments.paper.rows import NETWORK, StudyRow, folder_of, held, home_of, locked, select
from experiments.training.checkpoints import read_variables
from qt_jax import records
from qt_jax.command_line import Failed, command, terminate_like_interrupt
from qt_jax.provenance import provenance

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
"""Packages whose versions a record states."""

MOST_JOBS = 16
"""Most programs that are compiled at a time by default."""

LONGEST_REASON = 300
"""Characters of the reason in a record of a failure."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train the networks of the study on one GPU, in the order of their worth, until the time is up.

    Relaunching the same command goes on where it stopped.

    Example:
        python -m experiments.accelerator --preset quarter-hour-reduced --methods float quant-trim
    """

    preset: Literal["quarter-hour", "quarter-hour-reduced"] = "quarter-hour"
    """quarter-hour: full networks on CIFAR-10, for a GPU or TPU; quarter-hour-reduced: the same rows with
    small networks on the digits of scikit-learn, for two CPU cores."""
    minutes: float = 10.0
    """Minutes from the launch. No row begins that would not end within them."""
    tasks: tuple[str, ...] = ()
    """Only these tasks, with the networks they start from."""
    methods: tuple[str, ...] = ()
    """Only these methods, with the networks they start from."""
    seeds_at_once: int = 1
    """Seeds in one compiled program, by jax.vmap."""
    compile_jobs: int | None = None
    """Programs that are compiled at a time. Default: one per core, at most 16."""
    measure: bool = True
    """Take the open measurements of docs/speed.md after the rows."""
    list: bool = False
    """Show the rows with the seconds that each is expected to take, and stop."""
    runs: Path = Path("runs")
    """Folder of networks, curves and records."""

    def __post_init__(self):
        if self.seeds_at_once < 1 or (self.compile_jobs is not None and self.compile_jobs < 1):
            raise qt.InvalidInput("--seeds-at-once and --compile-jobs must be at least 1")
        if not self.minutes > 0:
            raise qt.InvalidInput(f"--minutes must be above 0, got {self.minutes:g}")


DataKey = tuple[str, Path | None, int | None]
"""What decides the training images: name and folder of the data set, and their limit."""


def data_key(config: Config) -> DataKey:
    """Return the key of the training images of a config."""
    return config.dataset, config.data_dir, config.train_limit


class Session(NamedTuple):
    """Hold what all rows of one launch share.

    Attributes:
      options: Flags of the launch.
      console: Prints what happens.
      ends: `time.monotonic()` at which the time is up.
      data: Maps the `data_key` of a config to the data set and to its splits on the device.
      about: What all records of the launch state: provenance and flags.
    """

    options: Options
    console: Console
    ends: float
    data: Mapping[DataKey, tuple[Dataset, Placed]]
    about: Mapping[str, Any]

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, as `command` does; it is 1 if rows have failed."""
    return command(
        "experiments.accelerator",
        Options,
        run,
        arguments,
        failure="rows have failed",
        interrupted="interrupted; the same command goes on from here",
        soft_wrap=True,
    )


def run(options: Options, console: Console) -> None:
    """Train the rows that are missing, take the measurements, and print what there is and what is left.

    Raises:
      InvalidInput: There is no accelerator for the full preset, or another process trains in the folder.
      Failed: A row or a measurement has failed.
    """
    terminate_like_interrupt()
    ends = time.monotonic() + 60 * options.minutes
    chosen = preset(options.preset)
    parts = plan.parts(chosen)
    wanted = set(select([row for part in parts for row in part], (), options.tasks, options.methods))
    parts = [[row for row in part if row in wanted] for part in parts]
    home = home_of(chosen, options.runs)
    if options.list:
        console.print(plan.listing(parts, networks.trained([*wanted], options.runs)))
        return
    set_up(home / "jax-cache")
    if jax.default_backend() == "cpu" and not chosen.name.endswith("-reduced"):
        raise qt.InvalidInput(
            f"JAX finds no GPU or TPU here, and --preset {chosen.name} takes days on a CPU: take --preset "
            f"{chosen.name}-reduced, or install JAX for the accelerator"
        )
    workplace = home / "accelerator"
    workplace.mkdir(parents=True, exist_ok=True)
    if held(workplace):
        raise qt.InvalidInput(f"another process trains in {home}: wait for it, or name another --runs")
    with locked(workplace):
        session = Session(options, console, ends, load_data(wanted), about(options))
        rows = [row for part in parts for row in part]
        for part in parts:
            train_part(session, part, rows)
        failed = take_measurements(session, chosen.name, home) if options.measure else []
    conclude(session, rows, failed)


def set_up(cache: Path) -> None:
    """Let JAX keep compiled programs in a folder, and leave memory of the accelerator to other processes."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load_data(rows: set[StudyRow]) -> dict[DataKey, tuple[Dataset, Placed]]:
    """Load the data sets of the rows, and place them on the device."""
    found = {}
    for name, folder, limit in {data_key(row.config) for row in rows}:
        dataset = load(name, folder, seed=0)
        found[name, folder, limit] = dataset, place(dataset, limit)
    return found


def about(options: Options) -> dict[str, Any]:
    """Return what all records of a launch state."""
    shared = provenance(PACKAGES) | {"accelerator": devices.accelerator()}
    return shared | {"device": jax.devices()[0].device_kind, "seeds_at_once": options.seeds_at_once}


def train_part(session: Session, part: Sequence[StudyRow], rows: Sequence[StudyRow]) -> None:
    """Compile the programs of a part's missing rows, and train them in their order, as far as time allows.

    Args:
      session: What all rows share.
      part: Rows whose programs are compiled together.
      rows: All rows of the launch.
    """
    options = session.options
    missing = set(networks.missing(rows, options.runs))
    waiting = [
        row for row in part if row in missing and (row.source in missing or have_start([row], options.runs))
    ]
    measured = plan.seconds_by_kind(networks.trained(rows, options.runs).values())
    batches = plan.affordable(
        plan.batches(waiting, options.seeds_at_once), session.left(), measured, jobs_of(options)
    )
    programs = compiled(session, batches)
    for batch in batches:
        program, compile_seconds = programs[plan.program_key(batch)]
        expected = sum(plan.expected_seconds(row, measured) for row in batch)
        if isinstance(program, Exception):
            fail(session, batch, program)
        elif session.left() > expected and have_start(batch, options.runs):
            seconds = train_batch(session, batch, program, compile_seconds)
            measured.setdefault(plan.kind(batch[0]), []).extend(seconds)


def train_batch(
    session: Session, batch: Sequence[StudyRow], program: SeedProgram, compile_seconds: float
) -> list[float]:
    """Train the rows of a batch and write what came of them. Return the seconds that each has taken."""
    runs, started = session.options.runs, time.perf_counter()
    try:
        results = train(program, [row.seed for row in batch], start_of(batch, runs))
    except Exception as error:  # costs these rows, not those that follow
        fail(session, batch, error)
        return []
    seconds = (time.perf_counter() - started) / len(batch)
    for row, result in zip(batch, results, strict=True):
        images = row.config.epochs * program.steps_per_epoch * row.config.batch_size
        shared = {**session.about, "compile_seconds": compile_seconds, "row_seconds": seconds}
        shared |= {"images_per_second": images / result.seconds}
        record = networks.keep(row, runs, result, shared)
        session.console.print(f"{row}: {said(record)}; {session.left():.0f} s left")
    return [seconds] * len(batch)


def jobs_of(options: Options) -> int:
    """Return how many programs are compiled at a time."""
    return options.compile_jobs or min(MOST_JOBS, os.cpu_count() or 1)


def compiled(
    session: Session, batches: Sequence[Sequence[StudyRow]]
) -> dict[plan.ProgramKey, tuple[SeedProgram | Exception, float]]:
    """Compile the programs of the batches, several at a time, and return each with the seconds it took.

    A program that cannot be built is represented by its error.
    """
    firsts = {plan.program_key(batch): batch[0] for batch in batches}

    def compile_one(key: plan.ProgramKey) -> tuple[SeedProgram | Exception, float]:
        started, row = time.perf_counter(), firsts[key]
        config = dataclasses.replace(row.config, seed=0)
        program: SeedProgram | Exception
        try:
            program = rehearsed(build(config, *session.data[data_key(config)], at_once=key[1]))
        except Exception as error:
            program = error
        return program, time.perf_counter() - started

    if not firsts:
        return {}
    started = time.perf_counter()
    status = session.console.status(f"compiling {len(firsts)} programs")
    with status, ThreadPoolExecutor(jobs_of(session.options)) as executor:
        programs = dict(zip(firsts, executor.map(compile_one, firsts), strict=True))
    seconds = time.perf_counter() - started
    session.console.print(f"{len(firsts)} programs compiled in {seconds:.0f} s; {session.left():.0f} s left")
    return programs


def have_start(batch: Sequence[StudyRow], runs: Path) -> bool:
    """Tell whether the networks that the rows start from are in their folders."""
    return all(row.source is None or (folder_of(row.source, runs) / NETWORK).exists() for row in batch)


def start_of(batch: Sequence[StudyRow], runs: Path) -> list[tuple[dict[str, Any], Path]]:
    """Return the networks that the rows start from, with their files; empty if they start from none."""
    files = [folder_of(row.source, runs) / NETWORK for row in batch if row.source is not None]
    return [(read_variables(file), file) for file in files]


def fail(session: Session, batch: Sequence[StudyRow], error: Exception) -> None:
    """Write records of rows that could not be trained."""
    status = "refused" if isinstance(error, qt.InvalidInput) else "crashed"
    status = "unavailable" if isinstance(error, ImportError) else status
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST_REASON)
    for row in batch:
        networks.note(row, session.options.runs, session.about, status=status, reason=reason)
        session.console.print(f"{row}: {status}, {reason}", style="red")


def said(record: records.Record) -> str:
    """Return a line about a row that was trained."""
    if record["status"] != "ok":
        return f"{record['status']}, {record['reason']}"
    shown = {"FP32": "top1", "fake-quantized": "top1_fake_quant", "six views": "top1_six_views"}
    parts = [f"{name} {100 * record[key]:.2f} %" for name, key in shown.items() if record[key] is not None]
    return ", ".join([*parts, f"{record['seconds']:.2f} s"])


def take_measurements(session: Session, name: str, home: Path) -> list[str]:
    """Take the measurements for which time is left, and return those that failed."""
    failed = []
    for measurement in measurements.pending(preset(name), home):
        if session.left() > measurement.seconds:
            record = measurements.take(measurement, home, session.left())
            reason = f", {record['reason']}" if record["reason"] else ""
            session.console.print(
                f"{measurement.name}: {record['status']}{reason}; {session.left():.0f} s left"
            )
            failed += [measurement.name] if record["status"] != "ok" else []
    return failed


def conclude(session: Session, rows: Sequence[StudyRow], failed: Sequence[str]) -> None:
    """Print the table of the trained networks and what is left, with the commands that go on.

    Raises:
      Failed: A row, or a measurement among `failed`, has failed.
    """
    options, preset_name = session.options, session.options.preset
    found, left = networks.trained(rows, options.runs), networks.missing(rows, options.runs)
    session.console.print(networks.table([*found.values()]))
    for line in remaining(rows, left, found, options):
        session.console.print(line)
    deploy = f"python -m experiments.paper --preset {preset_name} --runs {options.runs}"
    session.console.print(f"Export and deploy on a CPU: {deploy}")
    if names := [*(str(row) for row in left if row in found), *failed]:
        raise Failed(f"{len(names)} have failed: {', '.join(names)}")


def remaining(
    rows: Sequence[StudyRow],
    left: Sequence[StudyRow],
    found: Mapping[StudyRow, records.Record],
    options: Options,
) -> list[str]:
    """Return lines that say what is left of the rows and of the measurements.

    Args:
      rows: All rows of the launch.
      left: Those that are to be trained.
      found: Records of the others, and of those that failed.
      options: Flags of the launch.
    """
    chosen = rows[0].preset
    home = home_of(chosen, options.runs)
    lines = ["all rows are trained"]
    if left:
        measured = plan.seconds_by_kind(found.values())
        seconds = sum(plan.expected_seconds(row, measured) for row in left)
        lines = [f"left: {len(left)} of {len(rows)} rows, about {seconds:.0f} s without compilation"]
    orphans = [row for row in left if row.source not in left and not have_start([row], options.runs)]
    if orphans:
        lines.append(
            f"{len(orphans)} of them cannot be trained: the networks that they start from have diverged, or "
            f"are not in {home}"
        )
    waiting = [one.name for one in measurements.pending(chosen, home)] if options.measure else []
    if waiting:
        lines.append(f"not measured: {', '.join(waiting)}")
    if waiting or len(left) > len(orphans):
        lines.append("The same command goes on from here.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
