"""Report what deployment did to networks, from records only: summary.md, figures, and one HTML file of all.

The report begins with what a reader wants first: the worst row and the spread of each network, and which of
Quant-Trim and its float twin wins on 4-bit weights.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from qt_jax.files import write_whole
from qt_jax.records import STATUSES, Record
from qt_jax.reporting.costs import estimate_table, operator_table, provenance, speed_table
from qt_jax.reporting.deployment_figures import (
    agreement_figure,
    drop_figure,
    latency_figure,
    reliability_figure,
)
from qt_jax.reporting.page import to_html
from qt_jax.reporting.pivot import (
    METHOD_TITLES,
    REFERENCE,
    Column,
    DeploymentTable,
    Row,
    arrange,
    comparable,
    count_statuses,
    drops,
    group,
    images,
    measured,
    pairs,
    precision,
    spread,
    title,
)
from qt_jax.reporting.statistics import EQUAL_ACCURACY, agreement, disagreeing_pairs, standard_error
from qt_jax.reporting.tables import (
    ABSENT,
    escaped,
    failures,
    full_table,
    gain,
    markdown_table,
    sizes,
    with_spread,
)

DEFINITIONS = (
    "Top-1 is in %. The drop is the points of top-1 that a row loses against the float model in "
    "onnxruntime on the same n images.",
    "INT8 rows have 8-bit weights and 8-bit activations, static or dynamic. INT4 rows have 4-bit weights "
    "and any activations. Both are on integer grids in all layers, and count only where the status is ok.",
    "The spread is the largest drop of a group of rows minus its smallest. It is taken of drops, because "
    "simulators run on fewer images.",
    "The noise is an upper bound on two standard errors of a difference, in points. Images that both "
    "sides decide alike add nothing to it: with a fraction q decided differently and a difference d it is"
    " at most 2 √((q − d²) / n). It covers the choice of test images, not that of training seeds.",
    "Of several seeds the mean ± sample standard deviation is given. Differences are paired by seed.",
)
"""Definitions below the headline."""

FIGURES = (
    (drop_figure, "drops.png", "Accuracy drop by row and network"),
    (
        reliability_figure,
        "reliability.png",
        "Accuracy by confidence: FP32 and the best, median and worst row",
    ),
    (latency_figure, "latency.png", "Top-1 by median latency at batch 1"),
)
"""Function, file and caption of each figure."""


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write summary.md, its PNG figures and report.html into `folder`, and return the files written.

    A figure for which the records hold nothing is left out, and so is its section. Files of the same names
    are replaced, each whole or not at all.

    Raises:
      InvalidInput: There are no records, one is not a deployment record, or decisions cannot be decoded.

    >>> import tempfile
    >>> record = {"backend": "b", "scheme": "int8", "runtime": "cpu", "status": "ok", "model": "m",
    ...           "method": "float", "top1": 0.5, "reference_top1": 0.6, "n": 100}
    >>> [path.name for path in write_report([record], Path(tempfile.mkdtemp()))]
    ['drops.png', 'summary.md', 'report.html']
    """
    deployment = arrange(records)
    folder.mkdir(parents=True, exist_ok=True)
    alternatives = {}
    for index, column in enumerate(deployment.columns, start=1):
        name = "agreement.png" if len(deployment.columns) == 1 else f"agreement-{index}.png"
        if path := agreement_figure(deployment, column, folder / name):
            alternatives[path] = f"Images decided alike by every two rows: {deployment.name(column)}"
    for draw, name, alternative in FIGURES:
        if path := draw(deployment, folder / name):
            alternatives[path] = alternative
    title = _title(deployment)
    pictures = {path.name: f"![{escaped(text)}]({path.name})" for path, text in alternatives.items()}
    text = _page(deployment, records, title, pictures)
    write_whole(folder / "summary.md", text)
    write_whole(folder / "report.html", to_html(text, title, folder))
    return [*alternatives, folder / "summary.md", folder / "report.html"]


def _title(deployment: DeploymentTable) -> str:
    subjects = dict.fromkeys(
        " ".join(part for part in column[:2] if part) or deployment.name(column)
        for column in deployment.columns
    )
    return f"Deployment of {', '.join(subjects)}"


def _page(
    deployment: DeploymentTable, records: Sequence[Record], title: str, pictures: Mapping[str, str]
) -> str:
    """Write the report as Markdown, without the sections about which the records say nothing."""
    agreements = [picture for name, picture in pictures.items() if name.startswith("agreement")]
    sections = {
        "Headline": headline(deployment),
        "Accuracy drop": pictures.get("drops.png"),
        "Quant-Trim against its float twin": head_to_head(deployment),
        "All rows": full_table(deployment),
        "Rows without a number": failures(deployment),
        "Decisions in common": _joined(_disagreements(deployment), *agreements),
        "Calibration": pictures.get("reliability.png"),
        "Speed, energy and cost": _joined(pictures.get("latency.png"), speed_table(deployment)),
        "Estimates by the accelerator's compiler": estimate_table(deployment),
        "Operators": operator_table(records) if _has_operators(records) else None,
        "Where the numbers come from": provenance(deployment),
    }
    parts = [f"# {escaped(title)}"]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _joined(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _has_operators(records: Sequence[Record]) -> bool:
    return any(record.get("operators") or record["status"] == "refused" for record in records)


def headline(deployment: DeploymentTable) -> str:
    """Tabulate FP32, the worst INT8 and INT4 row, the spread over each, and the statuses, by network."""
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


def _float_top1(deployment: DeploymentTable, column: Column) -> str:
    seeds = deployment.seeds(column, REFERENCE)
    top1 = with_spread(measured(seeds, "top1").values(), 100)
    counts = images(seeds)
    return f"{top1} (n {counts[-1]})" if counts and top1 != ABSENT else top1


def _worst_drop(deployment: DeploymentTable, column: Column, row: Row) -> str:
    """Write the drop of a row with its number of images and, if decisions were kept, its noise."""
    seeds, own = deployment.seeds(column, row), deployment.seeds(column, REFERENCE)
    notes = [f"n {', '.join(map(str, images(seeds)))}"] if images(seeds) else []
    both = [((own[s], seeds[s]), lost) for s in seeds if s in own for lost in drops({s: seeds[s]})]
    if (noise := _noise(both)) is not None:
        notes.append(f"noise {noise:.2f}")
    return with_spread(drops(seeds), 100) + (f" ({', '.join(notes)})" if notes else "")


def _noise(differences: Iterable[tuple[tuple[Record, Record], float]]) -> float | None:
    """Return two standard errors of a mean difference, in points; None if one of them is unknown.

    More seeds do not make it smaller, because the seeds share their images.
    """
    errors = []
    for (first, second), difference in differences:
        alike = agreement(first, second)
        if alike is None:
            return None
        errors.append(standard_error(alike, difference, min(first["n"], second["n"])))
    return 200 * math.sqrt(fmean(error**2 for error in errors)) if errors else None


class Contest(NamedTuple):
    """Compare Quant-Trim and its twin in one row.

    Attributes:
      pair: Columns of Quant-Trim and its twin.
      row: Row in which they are compared.
      lead: Points of top-1 by which Quant-Trim leads.
      noise: Two standard errors of the lead in points; None if unknown.
    """

    pair: tuple[Column, Column]
    row: Row
    lead: float
    noise: float | None

    @property
    def certain(self) -> bool:
        return self.noise is not None and abs(self.lead) > self.noise

    @property
    def winner(self) -> str:
        ahead, behind = (title(method) for method in METHOD_TITLES)
        return ahead if self.lead > 0 else behind if self.lead < 0 else "neither"


def contests(deployment: DeploymentTable, name: str) -> list[Contest]:
    """Compare every row of one precision that Quant-Trim and its twin both have."""
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


def head_to_head(deployment: DeploymentTable) -> str | None:
    """Count who wins the INT8 and INT4 rows, and tabulate every INT4 row.

    Returns:
      Markdown; None if there are not both Quant-Trim and its twin.
    """
    found = {name: contests(deployment, name) for name in ("INT8", "INT4")}
    ahead, behind = (title(method) for method in METHOD_TITLES)
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


def _line(deployment: DeploymentTable, contest: Contest) -> list[str]:
    cells = [deployment.seeds(column, contest.row) for column in contest.pair]
    return [
        *(escaped(contest.pair[0].model), escaped(contest.row), sizes(deployment, contest.row, contest.pair)),
        *(with_spread(measured(cell, "top1").values(), 100) for cell in cells),
        gain(deployment, contest.pair, contest.row),
        ABSENT if contest.noise is None else f"{contest.noise:.2f}",
        contest.winner if contest.noise is None or contest.certain else f"{contest.winner}, within noise",
    ]


def _disagreements(deployment: DeploymentTable) -> str | None:
    """List the rows that decide most images differently although they are equally accurate."""
    lines = []
    for column in deployment.columns:
        for pair in disagreeing_pairs(deployment, column):
            lines.append(
                f"- {escaped(deployment.name(column))}: {escaped(pair.first)} and {escaped(pair.second)} "
                f"differ on {100 * pair.fraction_differing:.1f} % of the images although their top-1 differs "
                f"by {100 * pair.top1_distance:.2f}"
            )
    if not lines:
        return None
    introduction = (
        "Two rows are compared on the images that both saw. Most different decisions among rows of the same "
        f"number of images whose top-1 lie within {100 * EQUAL_ACCURACY:g} points, each row named once:"
    )
    return "\n".join([introduction, "", *lines])
