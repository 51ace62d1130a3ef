"""Enumerate the rows of a study: the networks to train, their configs, their files, and which are done.

A row has a folder for its work and, once it is finished, records in the folder of results.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

import qt_jax as qt
from experiments.configs.methods import FLOAT, METHODS, Method, config_of
from experiments.configs.study import Preset, Target, Task
from experiments.configs.training import Config
from qt_jax import records

RESULTS = Path(__file__).parents[1] / "results"
DEFAULT_RESULTS = tyro.conf.arg(help_behavior_hint="(default: experiments/results of this checkout)")
"""Keeps the path of the checkout out of `--help`."""

TRAINING, DEPLOYMENT, STRUCTURE = "training.jsonl", "deployment.jsonl", "structure.jsonl"
SEARCH = "search.jsonl"
GRAPH, DESCRIPTION = "model.onnx", "model.json"
TRAINED, NETWORK = "trained.jsonl", "network.npz"
"""What `experiments.accelerator` leaves: records in the folder of the preset, a network in that of a row."""
ATTEMPTS, METRICS, LOG, LOCK = "attempts.jsonl", "metrics.jsonl", "log.txt", ".lock"


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """Describe one network to train and deploy.

    Attributes:
      preset: The study.
      task: The task.
      name: Name of the method.
      seed: Seed of training.
      config: Complete config of training.
      factor: Factor of the task's learning rate.
      chosen: Names the search record that the factor comes from. None: the rate is the task's own.
      source: The row whose network this one starts from or deploys.
      searching: Whether the row is a trial of the search, which is judged on the validation split.
    """

    preset: Preset
    task: Task
    name: str
    seed: int
    config: Config
    factor: float
    chosen: str | None = None
    source: "StudyRow | None" = None
    searching: bool = False

    @property
    def method(self) -> Method:
        """Return the method."""
        return METHODS[self.name]

    @property
    def targets(self) -> tuple[Target, ...]:
        """Return where the network is deployed, apart from FP32 in onnxruntime."""
        return self.preset.judges if self.searching else self.task.targets(self.name)

    @property
    def waits_for(self) -> "StudyRow | None":
        """Return the row that must have ended before this one begins.

        Rows of an accelerated preset are trained already: only the network of another row is waited for.
        """
        return None if self.preset.accelerated and self.method.network is None else self.source

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that decides the network, except the program."""
        source = self.source and self.source.digest
        what = [self.preset.name, changed(self.config), self.method.export, bool(self.method.network), source]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        trial = f" x{self.factor:g}" if self.searching else ""
        return f"{self.task.name} {self.name} {self.seed}{trial}"


def changed(config: Config) -> dict[str, Any]:
    """Return the fields that differ from the defaults of `Config`, as JSON gives them back.

    >>> changed(Config(seed=3))
    {'seed': 3}
    """
    values = dataclasses.asdict(config)
    default = dataclasses.asdict(Config())
    differ = {name: value for name, value in values.items() if value != default[name]}
    return json.loads(json.dumps(differ, default=str))


def study(preset: Preset, found: Sequence[records.Record] = ()) -> list[StudyRow]:
    """Return all rows of a preset, with the seeds outermost, so that results are balanced while it runs.

    Args:
      preset: The preset.
      found: Records of the search. Without them every method takes the task's learning rate.
    """
    return [
        row_of(preset, task, name, seed, found)
        for seed in (*preset.seeds, *preset.more_seeds)
        for task in preset.tasks
        for name in (task.methods if seed in preset.seeds else task.replicated)
    ]


def trials(preset: Preset) -> list[StudyRow]:
    """Return all rows of the search: every method that has a learning rate to itself, at every factor."""
    return [
        row_of(preset, task, name, preset.search_seed, trial=factor)
        for factor in preset.factors
        for task in preset.tasks
        for name in task.methods
        if METHODS[name].rate is None and METHODS[name].network is None
    ]


def row_of(
    preset: Preset,
    task: Task,
    name: str,
    seed: int,
    found: Sequence[records.Record] = (),
    trial: float | None = None,
) -> StudyRow:
    """Return one row, at the learning rate of a trial, of the search, or of the task.

    Args:
      preset: The preset.
      task: The task.
      name: Name of the method.
      seed: Seed of training.
      found: Records of the search.
      trial: Makes the row a trial of the search, at this factor of the task's learning rate.

    Raises:
      InvalidInput: As `config_of` raises it, or the method deploys what a task starts from that starts from
        nothing.
    """
    method = METHODS[name]
    if method.starting and task.start is None:
        raise qt.InvalidInput(
            f"{name}: the rows of the task {task.name} do not start from another task's network"
        )
    starts = task.start is not None and (method.starting or not method.needs)
    needed = (preset.task(task.start), FLOAT) if starts else (task, method.needs)
    source = None
    if needed[1] is not None:
        source = row_of(preset, *needed, seed, found, None if trial is None else 1.0)
    if method.network and source is not None:
        config = dataclasses.replace(source.config, **method.changes)
        return dataclasses.replace(source, task=task, name=name, config=config, source=source)
    chosen = best(preset, task, name, found) if trial is None else None
    factor = trial if trial is not None else chosen["factor"] if chosen else 1.0
    config = config_of(method, task.base, seed, factor)
    origin = chosen and f"{chosen['method']} seed {chosen['seed']} factor {factor:g}"
    return StudyRow(preset, task, name, seed, config, factor, origin, source, trial is not None)


def best(preset: Preset, task: Task, name: str, found: Sequence[records.Record]) -> records.Record | None:
    """Return the search record with the largest criterion for a method on a task.

    Of several records with the same criterion it is the one with the smallest factor. It is None as long as a
    factor is missing, or was tried with a config other than the present one.
    """
    name = METHODS[name].rate or METHODS[name].network or name
    digests = {row_of(preset, task, name, preset.search_seed, trial=f).digest for f in preset.factors}
    mine = {trial["digest"]: trial for trial in found if trial["digest"] in digests}
    if mine.keys() != digests:
        return None
    return max(mine.values(), key=lambda trial: (trial["criterion"], -trial["factor"]))


def select(
    rows: Sequence[StudyRow],
    tables: Sequence[str] = (),
    tasks: Sequence[str] = (),
    methods: Sequence[str] = (),
) -> list[StudyRow]:
    """Select the rows of these tables, tasks and methods, in their order, with the rows that they need.

    Raises:
      InvalidInput: No row has one of the names, or no row has all of them.
    """
    choices = {
        "--only": (tables, lambda row: row.method.tables),
        "--tasks": (tasks, lambda row: (row.task.name,)),
        "--methods": (methods, lambda row: (row.name,)),
    }
    kept = list(rows)
    for flag, (names, of) in choices.items():
        known = {name for row in rows for name in of(row)}
        if unknown := sorted(set(names) - known):
            raise qt.InvalidInput(
                f"{flag} {' '.join(unknown)} is unknown here; choose among {', '.join(sorted(known))}"
            )
        kept = [row for row in kept if not names or set(names) & set(of(row))]
    if not kept:
        raise qt.InvalidInput("no row is of all these tables, tasks and methods: --list shows what there is")
    wanted = {*kept, *(source for row in kept for source in sources(row))}
    return [row for row in rows if row in wanted]


def sources(row: StudyRow) -> list[StudyRow]:
    """Return the rows whose networks a row needs, the next one first."""
    return [] if row.source is None else [row.source, *sources(row.source)]


def done(rows: Sequence[StudyRow], folder: Path) -> set[StudyRow]:
    """Return the rows whose records in a folder of results are complete and of their present config."""
    trained = {key_of(record): record["digest"] for record in records.read(folder / TRAINING)}
    searched = {(*key_of(r), r["factor"]): r["digest"] for r in records.read(folder / SEARCH)}
    deployed: dict[tuple, set[tuple[str, str, str]]] = {}
    for record in records.read(folder / DEPLOYMENT):
        deployment = (record["backend"], record["scheme"], record["runtime"])
        deployed.setdefault(key_of(record), set()).add(deployment)
    complete = set()
    for row in rows:
        key = (row.task.name, row.name, row.seed)
        if row.searching:
            if searched.get((*key, row.factor)) == row.digest:
                complete.add(row)
        elif trained.get(key) == row.digest and expected(row) <= deployed.get(key, set()):
            complete.add(row)
    return complete


def key_of(record: Mapping[str, Any]) -> tuple[str, str, int]:
    """Return task, method and seed of a record."""
    return record["task"], record["method"], record["seed"]


def expected(row: StudyRow) -> set[tuple[str, str, str]]:
    """Return backend, scheme and runtime of every deployment record that a finished row has."""
    wanted = {(t.backend, scheme, t.runtime) for t in row.targets for scheme in t.schemes}
    return wanted | {("onnxruntime", "fp32", "reference")}


def results_of(preset: Preset, results: Path = RESULTS) -> Path:
    """Return the folder of a preset's records, tables and figures."""
    return results / f"paper-{preset.name}"


def home_of(preset: Preset, runs: Path) -> Path:
    """Return the folder of all rows of a preset."""
    return runs / f"paper-{preset.name}"


def folder_of(row: StudyRow, runs: Path) -> Path:
    """Return the folder in which a row works. Another config has another folder."""
    return home_of(row.preset, runs) / folder_name(row.task.name, row.name, row.seed, row.digest)


def folder_name(task: str, method: str, seed: int, digest: str) -> Path:
    """Return the folder of a row within that of its preset."""
    return Path(task, f"{method}-{seed}-{digest[:8]}")


def log_of(row: StudyRow, runs: Path) -> Path:
    """Return the file of what a row has printed."""
    return folder_of(row, runs) / LOG


def forget(row: StudyRow, runs: Path) -> None:
    """Remove the folder of a row; what `experiments.accelerator` has left in it stays."""
    folder = folder_of(row, runs)
    if not row.preset.accelerated:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (NETWORK, METRICS):
            path.unlink()


def has_network(row: StudyRow, runs: Path) -> bool:
    """Tell whether `experiments.accelerator` has left the network that a row deploys."""
    trained = row.source if row.method.network else row
    return (folder_of(trained, runs) / NETWORK).exists()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process while the block runs. Other processes wait for it.

    `qt_jax.scheduler` says what holds for several hosts.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # NFS cannot lock folders
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def held(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder, see `locked`."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
