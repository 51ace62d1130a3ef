"""The rows of a study: which networks there are to train, with which config, and which of them are done."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

import qt_jax as qt
from experiments.configs.methods import METHODS, Method, config_of
from experiments.configs.study import Preset, Target, Task
from experiments.configs.training import Config
from qt_jax import records

TRAINING, DEPLOYMENT, STRUCTURE = "training.jsonl", "deployment.jsonl", "structure.jsonl"
SEARCH = "search.jsonl"
ATTEMPTS, LOG = "attempts.jsonl", "log.txt"
RESULTS = Path(__file__).parents[1] / "results"
DEFAULT_RESULTS = tyro.conf.arg(help_behavior_hint="(default: experiments/results of this checkout)")
"""How `--help` calls that folder, wherever the checkout is."""
SEARCH_TARGETS = (Target("onnxruntime", "reference", ("int4w-pt-minmax", "int4w-pc-minmax")),)
"""What the search looks at beside FP32, on the validation split."""


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """One network to be trained and deployed.

    Attributes:
      preset, task, name, seed: whose it is; `name` is that of the method.
      config: of its training, complete.
      factor: of the learning rate.
      chosen: the search record that the factor comes from; None: the rate is the task's own.
      source: the row whose network this one starts from or deploys.
      searching: a trial of the search, judged on the validation split.
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
        return METHODS[self.name]

    @property
    def targets(self) -> tuple[Target, ...]:
        """Where its network is deployed, FP32 in onnxruntime apart."""
        return SEARCH_TARGETS if self.searching else self.task.targets(self.name)

    @property
    def digest(self) -> str:
        """Of everything that decides the network, save for the program."""
        source = self.source and self.source.digest
        what = [self.preset.name, changed(self.config), self.method.export, bool(self.method.network), source]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        trial = f" x{self.factor:g}" if self.searching else ""
        return f"{self.task.name} {self.name} {self.seed}{trial}"


def changed(config: Config) -> dict[str, Any]:
    """The fields that differ from the defaults of `Config`, as JSON gives them back.

    >>> changed(Config(seed=3))
    {'seed': 3}
    """
    values = dataclasses.asdict(config)
    default = dataclasses.asdict(Config())
    differ = {name: value for name, value in values.items() if value != default[name]}
    return json.loads(json.dumps(differ, default=str))


def folder_of(row: StudyRow, runs: Path) -> Path:
    """Where a row works; another config is another folder."""
    return runs / f"paper-{row.preset.name}" / row.task.name / f"{row.name}-{row.seed}-{row.digest[:8]}"


def log_of(row: StudyRow, runs: Path) -> Path:
    """What a row has printed."""
    return folder_of(row, runs) / LOG


def results_of(preset: Preset, results: Path = RESULTS) -> Path:
    """The folder of a preset's records, tables and figures."""
    return results / f"paper-{preset.name}"


def study(preset: Preset, found: Sequence[records.Record] = ()) -> list[StudyRow]:
    """All rows of a preset, seeds outermost, so that results are balanced while it runs.

    Args:
      found: the records of the search; without any, every method takes the task's learning rate.
    """
    return [
        row_of(preset, task, name, seed, found)
        for seed in (*preset.seeds, *preset.more_seeds)
        for task in preset.tasks
        for name in (task.methods if seed in preset.seeds else task.replicated)
    ]


def trials(preset: Preset) -> list[StudyRow]:
    """All rows of the search: every method that has a rate of its own, at every factor."""
    return [
        row_of(preset, task, name, preset.search_seed, trial=factor)
        for factor in preset.factors
        for task in preset.tasks
        for name in task.methods
        if METHODS[name].rate is None
    ]


def row_of(
    preset: Preset,
    task: Task,
    name: str,
    seed: int,
    found: Sequence[records.Record] = (),
    trial: float | None = None,
) -> StudyRow:
    """One row, at the learning rate that the search has found, at that of a trial, or at the task's own.

    Raises InvalidInput as `config_of` does.
    """
    method = METHODS[name]
    chosen = best(preset, task, name, found) if trial is None else None
    factor = trial if trial is not None else chosen["factor"] if chosen else 1.0
    config = config_of(METHODS[method.network or name], task.base, seed, factor)
    origin = chosen and f"{chosen['method']} seed {chosen['seed']} factor {factor:g}"
    source = None
    if method.needs is not None:
        source = row_of(preset, task, method.needs, seed, found, None if trial is None else 1.0)
    return StudyRow(preset, task, name, seed, config, factor, origin, source, trial is not None)


def best(preset: Preset, task: Task, name: str, found: Sequence[records.Record]) -> records.Record | None:
    """The search record of the largest criterion for a method on a task; of equals the smaller factor.

    None as long as a factor is missing, or was tried with another config than the present one.
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
    """Rows of these tables, tasks and methods, in their order, with the rows they need first.

    Raises:
      InvalidInput: a name that no row has.
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
    wanted = {*kept, *(row.source for row in kept)}
    return [row for row in rows if row in wanted]


def done(rows: Sequence[StudyRow], folder: Path) -> set[StudyRow]:
    """The rows whose records in a folder of results are complete and of their present config."""
    trained = {key_of(record): record["digest"] for record in records.read(folder / TRAINING)}
    searched = {(*key_of(r), r["factor"]): r["digest"] for r in records.read(folder / SEARCH)}
    deployed: dict[tuple, set[tuple[str, str, str]]] = {}
    for record in records.read(folder / DEPLOYMENT):
        place = (record["backend"], record["scheme"], record["runtime"])
        deployed.setdefault(key_of(record), set()).add(place)
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
    """Task, method and seed of a record."""
    return record["task"], record["method"], record["seed"]


def expected(row: StudyRow) -> set[tuple[str, str, str]]:
    """Backend, scheme and runtime of every record that a finished row has."""
    wanted = {(t.backend, scheme, t.runtime) for t in row.targets for scheme in t.schemes}
    return wanted | {("onnxruntime", "fp32", "reference")}


def forget(row: StudyRow, runs: Path) -> None:
    """Removes what a row has left behind in its folder."""
    shutil.rmtree(folder_of(row, runs), ignore_errors=True)
