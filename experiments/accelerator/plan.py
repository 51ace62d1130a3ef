"""Order the rows by their worth, and estimate how long each of them takes.

The estimate of a row comes from rows of its kind that were trained before. Without any, it comes from the
throughput that docs/speed.md states for an NVIDIA H200.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean

from rich import box
from rich.table import Table

from experiments.configs.study import FIRST_METHODS, Preset
from experiments.paper.collect import FINAL
from experiments.paper.rows import StudyRow, study
from qt_jax.records import Record

IMAGES_PER_SECOND = {"speed": 333_500.0, "resnet18": 81_700.0}
"""Training images per second of networks with Quant-Trim in bfloat16 on an NVIDIA H200, docs/speed.md."""

TRAINING_IMAGES = {"cifar10": 45_000}
"""Training images of data sets, apart from the validation split."""

AROUND = 0.5
"""Seconds of a row beside training: measuring the network and writing it."""

COMPILATION = {"speed": 22.0, "resnet18": 45.0}
"""Seconds in which a program is compiled there: the speed network's as docs/speed.md states it, twice as long
for twice as many layers. Other networks count as `OTHER_COMPILATION`."""

OTHER_COMPILATION = 10.0
"""Seconds in which a program of a small network is compiled on a CPU."""

Kind = tuple[str, str]
"""Task and method of a row: rows of a kind differ in the seed alone and share a program."""


def kind(row: StudyRow) -> Kind:
    """Return the kind of a row."""
    return row.task.name, row.name


def parts(preset: Preset) -> list[list[StudyRow]]:
    """Return all rows in the order of their worth, in parts whose programs are compiled together.

    The networks of the first task come first, trained from scratch and fine-tuned, and of them the methods
    of `FIRST_METHODS`. Within a part seeds are outermost, so that a cut leaves as many seeds of every method.

    >>> from experiments.configs.study import preset
    >>> [len(part) for part in parts(preset("quarter-hour"))]
    [140, 100, 9]
    """
    networks = list(dict.fromkeys(task.base.model for task in preset.tasks))

    def worth(row: StudyRow) -> tuple[int, bool]:
        return networks.index(row.task.base.model), row.name not in FIRST_METHODS

    rows = sorted(study(preset), key=worth)
    return [list(part) for _, part in groupby(rows, key=worth)]


def batches(rows: Iterable[StudyRow], at_once: int) -> Iterator[list[StudyRow]]:
    """Yield rows in batches of at most `at_once` seeds of one kind, each where its first row stands."""
    waiting = list(rows)
    while waiting:
        first = kind(waiting[0])
        batch = [row for row in waiting if kind(row) == first][:at_once]
        yield batch
        waiting = [row for row in waiting if row not in batch]


def expected_seconds(row: StudyRow, measured: Mapping[Kind, Sequence[float]]) -> float:
    """Estimate how long a row takes, in seconds; 0 if nothing is known of its kind.

    Args:
      row: The row.
      measured: Seconds that rows of each kind have taken.
    """
    if found := measured.get(kind(row)):
        return fmean(found)
    config = row.config
    if config.model not in IMAGES_PER_SECOND:
        return 0.0
    images = TRAINING_IMAGES[config.dataset] // config.batch_size * config.batch_size
    return config.epochs * images / IMAGES_PER_SECOND[config.model] + AROUND


def affordable(
    batches: Iterable[list[StudyRow]], seconds: float, measured: Mapping[Kind, Sequence[float]], jobs: int
) -> list[list[StudyRow]]:
    """Return the batches that end within some seconds, after their programs have been compiled.

    Args:
      batches: Batches in the order of their worth, see `batches`.
      seconds: Seconds that are left.
      measured: Seconds that rows of each kind have taken.
      jobs: Programs that are compiled at a time.
    """
    kept, programs, training = [], {}, 0.0
    for batch in batches:
        more = programs | {program_key(batch): COMPILATION.get(batch[0].config.model, OTHER_COMPILATION)}
        rows = sum(expected_seconds(row, measured) for row in batch)
        compiling = max(more.values()) * math.ceil(len(more) / jobs)
        if compiling + training + rows <= seconds:
            kept.append(batch)
            programs, training = more, training + rows
    return kept


ProgramKey = tuple[Kind, int]
"""Kind of the rows that share a program, and how many seeds it trains at once."""


def program_key(batch: Sequence[StudyRow]) -> ProgramKey:
    """Return what tells the program of a batch from others."""
    return kind(batch[0]), len(batch)


def seconds_by_kind(trained: Iterable[Record]) -> dict[Kind, list[float]]:
    """Return the seconds that trained rows have taken, by kind, from their records."""
    found: dict[Kind, list[float]] = {}
    for record in trained:
        if record["row_seconds"] is not None:
            found.setdefault((record["task"], record["method"]), []).append(record["row_seconds"])
    return found


def listing(parts: Sequence[Sequence[StudyRow]], found: Mapping[StudyRow, Record]) -> Table:
    """Return a table of the rows with one line per kind, in their order, and the seconds they will take.

    Args:
      parts: Rows as `parts` gives them.
      found: Records of those that were trained.
    """
    shown = Table(title="rows in the order of their worth", box=box.SIMPLE_HEAD)
    for heading in ("task", "method"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("epochs", "seeds", "ended", "seconds per row", "seconds left", "up to here"):
        shown.add_column(heading, justify="right")
    measured, total = seconds_by_kind(found.values()), 0.0
    for part in parts:
        for (task, method), rows in by_kind(part).items():
            ended = sum(row in found and found[row]["status"] in FINAL for row in rows)
            seconds = expected_seconds(rows[0], measured)
            left = seconds * (len(rows) - ended)
            total += left
            known = [f"{seconds:.2f}", f"{left:.0f}", f"{total:.0f}"] if seconds else ["?", "?", "?"]
            shown.add_row(task, method, str(rows[0].config.epochs), str(len(rows)), str(ended), *known)
        shown.add_section()
    shown.caption = "without compilation: one program for each line that is not complete"
    return shown


def by_kind(rows: Sequence[StudyRow]) -> dict[Kind, list[StudyRow]]:
    """Return the rows by kind, in their order."""
    kinds: dict[Kind, list[StudyRow]] = {}
    for row in rows:
        kinds.setdefault(kind(row), []).append(row)
    return kinds
