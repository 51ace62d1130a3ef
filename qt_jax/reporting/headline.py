"""What a reader wants first: the worst row and the spread of each network, and who wins on 4-bit weights."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from qt_jax.reporting.agreement import agreement, standard_error
from qt_jax.reporting.cells import METHODS, measured, spread, title
from qt_jax.reporting.deployment import (
    REFERENCE,
    Column,
    Deployment,
    Row,
    comparable,
    count_statuses,
    drops,
    group,
    images,
    pairs,
    precision,
)
from qt_jax.reporting.deployment_tables import escaped, gain, markdown_table, sizes
from qt_jax.reporting.records import STATUSES, Record
from qt_jax.reporting.tables import ABSENT, with_spread

DEFINITIONS = (
    "top-1 in %. Drop: points of top-1 that a row loses against the float model in onnxruntime on the same n "
    "images.",
    "INT8 rows have 8-bit weights and 8-bit activations, static or dynamic; INT4 rows 4-bit weights and any "
    "activations; both on integer grids, in all layers, and only where the status is ok.",
    "Spread: the largest drop of a group of rows minus its smallest. Drops, because simulators run on fewer "
    "images.",
    "Noise: two standard errors of a difference in points, from above. Images that both sides decide alike "
    "add nothing to it: with a fraction q decided differently and a difference d it is at most "
    "2 √((q − d²) / n). It covers the choice of test images, not that of training seeds.",
    "Several seeds: mean ± sample standard deviation, differences paired by seed.",
)


def headline(deployment: Deployment) -> str:
    """A line a network: FP32, the worst INT8 and INT4 row, the spread over each, and how the rows ended."""
    header = ["network", "FP32 top-1"]
    for name in ("INT8", "INT4"):
        header += [f"worst {name} row", "its drop", f"spread over {name} rows"]
    rows = []
    for column in deployment.columns:
        cells = [escaped(deployment.name(column)), _float_top1(deployment, column)]
        for name in ("INT8", "INT4"):
            found = group(deployment, column, name)
            cells += (
                [ABSENT] * 3
                if found is None
                else [
                    escaped(found.worst),
                    _worst_drop(deployment, column, found.worst),
                    f"{100 * found.spread:.2f} ({found.size} row{'s' * (found.size > 1)})",
                ]
            )
        rows.append(cells)
    counts = [
        [escaped(deployment.name(c)), *(str(count_statuses(deployment, c)[status]) for status in STATUSES)]
        for c in deployment.columns
    ]
    numbers = [markdown_table(header, rows), markdown_table(["records", *STATUSES], counts)]
    return "\n\n".join([*numbers, "\n".join(f"- {line}" for line in DEFINITIONS)])


class Contest(NamedTuple):
    """One row of Quant-Trim and its twin: points of top-1 between them, and two standard errors if known."""

    pair: tuple[Column, Column]
    row: Row
    lead: float
    noise: float | None

    @property
    def certain(self) -> bool:
        return self.noise is not None and abs(self.lead) > self.noise

    @property
    def winner(self) -> str:
        ahead, behind = (title(method) for method in METHODS)
        return ahead if self.lead > 0 else behind if self.lead < 0 else "neither"


def contests(deployment: Deployment, name: str) -> list[Contest]:
    """Every row of one precision that Quant-Trim and its twin both have."""
    found = []
    for pair in pairs(deployment):
        for row in deployment.rows:
            cells = [deployment.seeds(column, row) for column in pair]
            both = comparable(*cells)
            if both and precision(cells[0]) == name:
                leads = [a["top1"] - b["top1"] for a, b in both]
                noise = _noise(zip(both, leads, strict=True))
                found.append(Contest(pair, row, 100 * spread(leads)[0], noise))
    return found


def head_to_head(deployment: Deployment) -> str | None:
    """Who wins how many INT8 and INT4 rows, and every INT4 row; None without Quant-Trim and its twin."""
    found = {name: contests(deployment, name) for name in ("INT8", "INT4")}
    ahead, behind = (title(method) for method in METHODS)
    parts = []
    for name, rows in found.items():
        leads = Counter(contest.winner for contest in rows)
        clear = Counter(contest.winner for contest in rows if contest.certain)
        if rows:
            parts.append(
                f"{name}: of {len(rows)} rows {ahead} wins {leads[ahead]} and the {behind} {leads[behind]}. "
                f"By more than the noise of the test images {ahead} wins {clear[ahead]} of them and the "
                f"{behind} {clear[behind]}."
            )
    if found["INT4"]:
        header = ["model", "row", "n", ahead, behind, "gain", "noise", "winner"]
        lines = [_line(deployment, contest) for contest in found["INT4"]]
        parts.append(markdown_table(header, lines, words=2))
    return "\n\n".join(parts) or None


def _line(deployment: Deployment, contest: Contest) -> list[str]:
    cells = [deployment.seeds(column, contest.row) for column in contest.pair]
    return [
        *(escaped(contest.pair[0].model), escaped(contest.row), sizes(deployment, contest.row, contest.pair)),
        *(with_spread(measured(cell, "top1").values(), 100) for cell in cells),
        gain(deployment, contest.pair, contest.row),
        ABSENT if contest.noise is None else f"{contest.noise:.2f}",
        contest.winner if contest.noise is None or contest.certain else f"{contest.winner}, within noise",
    ]


def _noise(differences: Iterable[tuple[tuple[Record, Record], float]]) -> float | None:
    """Two standard errors of a mean difference, in points, which does not shrink: the seeds share images."""
    errors = []
    for (first, second), difference in differences:
        alike = agreement(first, second)
        if alike is None:
            return None
        errors.append(standard_error(alike, difference, min(first["n"], second["n"])))
    return 200 * math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None


def _float_top1(deployment: Deployment, column: Column) -> str:
    seeds = deployment.seeds(column, REFERENCE)
    top1 = with_spread(measured(seeds, "top1").values(), 100)
    counts = images(seeds)
    return f"{top1} (n {counts[-1]})" if counts and top1 != ABSENT else top1


def _worst_drop(deployment: Deployment, column: Column, row: Row) -> str:
    """The drop of a row with its number of images and, if decisions were kept, its noise."""
    seeds, own = deployment.seeds(column, row), deployment.seeds(column, REFERENCE)
    notes = [f"n {', '.join(map(str, images(seeds)))}"] if images(seeds) else []
    both = [((own[s], seeds[s]), lost) for s in seeds if s in own for lost in drops({s: seeds[s]})]
    if (noise := _noise(both)) is not None:
        notes.append(f"noise {noise:.2f}")
    return with_spread(drops(seeds), 100) + (f" ({', '.join(notes)})" if notes else "")
