"""What a study is at: a live display, plain lines where nobody watches, and the table of `--list`."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.paper.collect import held
from experiments.paper.rows import ATTEMPTS, SEARCH, TRAINING, StudyRow, done, folder_of, key_of, log_of
from experiments.paper.schedule import Progress, last_words, time_left
from qt_jax import records

STATES = ("done", "running", "failed", "begun", "pending")


class Display:
    """Shows a run of rows: a live view on a terminal, else a line for each row that ends."""

    def __init__(
        self, rows: Sequence[StudyRow], ready: set[StudyRow], slots: int, runs: Path, results: Path, console
    ):
        self.rows, self.ready, self.slots, self.runs = list(rows), ready, slots, runs
        self.console: Console = console
        self.known = {row: s for row, s in durations(rows, results).items() if row in ready}
        self.told: set[StudyRow] = set()
        self.live = Live(console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def opening(self) -> str:
        """What there is to do."""
        return f"{len(self.rows)} rows, {len(self.ready)} done; {self.slots} at a time"

    def update(self, progress: Progress) -> None:
        """Tells what has ended since the last call, and shows the rest."""
        left = time_left(progress, self.known, self.slots, time.monotonic())
        ended = len(self.ready) + len(progress.finished) + len(progress.failed)
        count = f"{ended}/{len(self.rows)}"
        for row, seconds in progress.finished.items():
            if row not in self.told:
                self.console.print(f"{count} {row}: {duration(seconds)}; {_rest(left)}")
        for row, words in progress.failed.items():
            if row not in self.told:
                self.console.print(f"{count} {row}: FAILED, {words}\n(log: {log_of(row, self.runs)})")
        self.told |= {*progress.finished, *progress.failed}
        if self.console.is_terminal:
            self.live.update(self._view(progress, ended, left))

    def _view(self, progress: Progress, ended: int, left: float | None) -> Group:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=len(self.rows), completed=ended, width=30)
        failed = f", {len(progress.failed)} failed" if progress.failed else ""
        head.add_row(bar, f"{ended}/{len(self.rows)} rows{failed}, {_rest(left)}")
        body = Table.grid(padding=(0, 1))
        for running in progress.running:
            lines = last_words(log_of(running.row, self.runs)).splitlines()
            spent = duration(time.monotonic() - running.started)
            said = Text(lines[-1] if lines else "", style="dim", no_wrap=True, overflow="ellipsis")
            body.add_row(str(running.row), spent, said)
        return Group(head, body)


def listing(rows: Sequence[StudyRow], runs: Path, results: Path) -> Table:
    """A rich table, a line a task and method: the state of each seed; in its caption the hours spent."""
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
        cells = {(row.seed, row.factor if row.searching else None): states[row] for row in mine}
        minutes = sum(spent.get(row, 0.0) for row in mine) / 60
        table.add_row(task, name, *(cells.get(column, "") for column in columns), f"{minutes:.1f}")
    counts = Counter(states.values())
    told = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
    table.caption = f"{len(rows)} rows: {told}; {sum(spent.values()) / 3600:.2f} hours on them"
    return table


def state(row: StudyRow, runs: Path) -> str:
    """What has become of a row that is not done: running, failed, begun (and interrupted), pending."""
    folder = folder_of(row, runs)
    if not folder.exists():
        return "pending"
    if held(folder):
        return "running"
    attempts = records.read(folder / ATTEMPTS)
    return "failed" if attempts and attempts[-1]["error"] else "begun"


def durations(rows: Sequence[StudyRow], results: Path) -> dict[StudyRow, float]:
    """Seconds that each row has taken, as its record says."""
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
    """Seconds as readers say them.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _rest(left: float | None) -> str:
    return "time left unknown" if left is None else f"{duration(left)} left"
