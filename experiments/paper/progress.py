"""Show the progress of a study: a live display, plain lines where nobody watches, the table of `--list`."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.paper.launch import Progress, last_lines
from experiments.paper.rows import (
    ATTEMPTS,
    NETWORK,
    SEARCH,
    TRAINING,
    StudyRow,
    done,
    folder_of,
    held,
    key_of,
    log_of,
)
from qt_jax import records

STATES = ("done", "running", "failed", "begun", "trained", "pending")


class Display:
    """Show rows while they run: as a live view on a terminal, elsewhere as one line per row that ends.

    Args:
      rows: All rows, those that are done included.
      ready: Rows that are done.
      slots: Rows that run at a time.
      runs: Folder of all runs.
      results: Folder of the preset's results.
      console: Where to show them.
    """

    def __init__(
        self,
        rows: Sequence[StudyRow],
        ready: set[StudyRow],
        slots: int,
        runs: Path,
        results: Path,
        console: Console,
    ):
        self.rows, self.ready, self.slots, self.runs = list(rows), ready, slots, runs
        self.console = console
        self.known = {row: s for row, s in durations(rows, results).items() if row in ready}
        self.reported: set[StudyRow] = set()
        self.live = Live(console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def opening(self) -> str:
        """Return a line that says how many rows there are."""
        return f"{len(self.rows)} rows, {len(self.ready)} done; {self.slots} at a time"

    def update(self, progress: Progress) -> None:
        """Print the rows that have ended since the last call, and show the others."""
        left = time_left(progress, self.known, self.slots, time.monotonic())
        ended = len(self.ready) + len(progress.finished) + len(progress.failed)
        count = f"{ended}/{len(self.rows)}"
        for row, seconds in progress.finished.items():
            if row not in self.reported:
                self.console.print(f"{count} {row}: {duration(seconds)}; {_left(left)}")
        for row, lines in progress.failed.items():
            if row not in self.reported:
                self.console.print(f"{count} {row}: FAILED, {lines}\n(log: {log_of(row, self.runs)})")
        self.reported |= {*progress.finished, *progress.failed}
        if self.console.is_terminal:
            self.live.update(self._view(progress, ended, left))

    def _view(self, progress: Progress, ended: int, left: float | None) -> Group:
        """Return a progress bar above one line per running row."""
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=len(self.rows), completed=ended, width=30)
        failed = f", {len(progress.failed)} failed" if progress.failed else ""
        head.add_row(bar, f"{ended}/{len(self.rows)} rows{failed}, {_left(left)}")
        body = Table.grid(padding=(0, 1))
        for running in progress.running:
            lines = last_lines(log_of(running.row, self.runs)).splitlines()
            spent = duration(time.monotonic() - running.started)
            printed = Text(lines[-1] if lines else "", style="dim", no_wrap=True, overflow="ellipsis")
            body.add_row(str(running.row), spent, printed)
        return Group(head, body)


def time_left(progress: Progress, known: Mapping[StudyRow, float], slots: int, now: float) -> float | None:
    """Estimate the seconds until all rows have ended, from how long similar rows took.

    Similar rows are those of the same task with the same deployments; if there are none, those of the same
    task; if there are none, all rows. The estimate is None while no row has ended.

    Args:
      progress: Progress of the rows.
      known: Seconds of rows that were finished before, beside those in `progress`.
      slots: Rows that run at a time.
      now: `time.monotonic()`.
    """
    measured = {**known, **progress.finished}
    if not measured:
        return None
    alike: dict[tuple, list[float]] = {}
    for row, seconds in measured.items():
        for kind in _kinds(row):
            alike.setdefault(kind, []).append(seconds)

    def expected(row: StudyRow) -> float:
        found = next(alike[kind] for kind in _kinds(row) if kind in alike)
        return fmean(found)

    rest = [max(0.0, expected(r.row) - (now - r.started)) for r in progress.running]
    work = sum(rest) + sum(map(expected, progress.waiting))
    return max([work / slots, *rest])


def _kinds(row: StudyRow) -> list[tuple]:
    """Return the kinds of rows that a row belongs to, the narrowest first."""
    return [(row.task.name, row.targets), (row.task.name,), ()]


def _left(seconds: float | None) -> str:
    return "time left unknown" if seconds is None else f"{duration(seconds)} left"


def listing(rows: Sequence[StudyRow], runs: Path, results: Path) -> Table:
    """Return a rich table with the state of every row: one line per task and method, one column per seed.

    Its caption counts the states and says how many hours were spent.
    """
    complete = done(rows, results)
    states = {row: "done" if row in complete else state(row, runs) for row in rows}
    columns = list(dict.fromkeys((row.seed, row.factor if row.searching else None) for row in rows))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("task")
    table.add_column("method")
    for seed, factor in columns:
        table.add_column(f"seed {seed}" if factor is None else f"rate x{factor:g}")
    table.add_column("minutes", justify="right")
    spent = durations(rows, results)
    for task, name in dict.fromkeys((row.task.name, row.name) for row in rows):
        mine = [row for row in rows if (row.task.name, row.name) == (task, name)]
        shown = {(row.seed, row.factor if row.searching else None): states[row] for row in mine}
        minutes = sum(spent.get(row, 0.0) for row in mine) / 60
        table.add_row(task, name, *(shown.get(column, "") for column in columns), f"{minutes:.1f}")
    counts = Counter(states.values())
    counted = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
    table.caption = f"{len(rows)} rows: {counted}; {sum(spent.values()) / 3600:.2f} hours on them"
    return table


def state(row: StudyRow, runs: Path) -> str:
    """Return the state of a row that is not done: running, failed, begun, trained or pending.

    A row that is begun was interrupted. One that is trained has a network from `experiments.accelerator`.
    """
    folder = folder_of(row, runs)
    if not folder.exists():
        return "pending"
    if held(folder):
        return "running"
    attempts = records.read(folder / ATTEMPTS)
    if not attempts and (folder / NETWORK).exists():
        return "trained"
    return "failed" if attempts and attempts[-1]["error"] else "begun"


def durations(rows: Sequence[StudyRow], results: Path) -> dict[StudyRow, float]:
    """Return the seconds that each row has taken, according to its record."""
    found = {key_of(record): record["seconds"] for record in records.read(results / TRAINING)}
    found |= {(*key_of(r), r["factor"]): r["seconds"] for r in records.read(results / SEARCH)}
    seconds = {}
    for row in rows:
        key = (row.task.name, row.name, row.seed)
        key = (*key, row.factor) if row.searching else key
        if key in found:
            seconds[row] = found[key]
    return seconds


def duration(seconds: float) -> str:
    """Write seconds for readers.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
