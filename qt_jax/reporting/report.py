"""Report what deployment did to networks, from records only: summary.md, figures, and one HTML file of all.

The report begins with what a reader wants first: three sentences that say what deployment costs, where it
breaks and what to do; warnings about model and data; then the worst row and the spread of each network, and
which of Quant-Trim and its float twin wins on 4-bit weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qt_jax.files import write_whole
from qt_jax.records import STATUSES, Record
from qt_jax.reporting.answer import BROKEN_SQNR, CLOSENESS, answer, warnings_of
from qt_jax.reporting.costs import estimate_table, operator_table, provenance, speed_table
from qt_jax.reporting.deployment_figures import (
    agreement_figure,
    drop_figure,
    latency_figure,
    reliability_figure,
    sqnr_figure,
)
from qt_jax.reporting.page import to_html
from qt_jax.reporting.pivot import (
    METHOD_TITLES,
    REFERENCE,
    Column,
    DeploymentTable,
    Metric,
    Row,
    Seeds,
    arrange,
    comparable,
    count_statuses,
    drops,
    group,
    images,
    is_all_float,
    is_convention,
    leads,
    measured,
    pairs,
    partly_float,
    precision,
    scores,
    share,
    spread,
    title,
)
from qt_jax.reporting.statistics import (
    EQUAL_ACCURACY,
    METRICS_OF_DECISIONS,
    agreement,
    disagreeing_pairs,
    noise,
    noise_of_drop,
)
from qt_jax.reporting.tables import (
    ABSENT,
    escaped,
    failures,
    full_table,
    gain,
    judged_outputs,
    markdown_table,
    output_table,
    sizes,
    with_spread,
)

ROWS = (
    "INT8 rows have 8-bit weights and 8-bit activations, static or dynamic. INT4 rows have 4-bit weights "
    "and any activations. Both are on integer grids, and count only where the status is ok and something was "
    "quantized."
)
SPREAD = (
    "The spread is the largest drop of a group of rows minus its smallest. It is taken of drops, because "
    "simulators run on fewer images."
)
SPREAD_OF_OTHERS = "The spread is how far the worst row of a group lies from the best."
NOISE = (
    "The noise is an upper bound on two standard errors of a difference, in points. Images that both "
    "sides decide alike add nothing to it: with a fraction q decided differently and a difference d it is"
    " at most 2 √((q − d²) / n). It covers the choice of test images, not that of training seeds."
)
SEEDS = "Of several seeds the mean ± sample standard deviation is given. Differences are paired by seed."
CONVENTIONS = (
    "Emulated conventions are grids that vendors describe, emulated without any toolchain of theirs. They "
    "are no vendor's rows, and form groups of their own."
)
PARTLY_FLOAT = (
    "A row of which a part stayed in float names how many of its convolutions, matrix products and recurrent "
    "cells were quantized."
)
LOGS = "Paths in these reasons are relative to the folder of the records."

FIGURES = (
    (drop_figure, "drops.png", "Accuracy drop by row and network"),
    (sqnr_figure, "sqnr.png", "SQNR of the outputs by row and network"),
    (
        reliability_figure,
        "reliability.png",
        "Accuracy by confidence: FP32 and the best, median and worst row",
    ),
    (latency_figure, "latency.png", "Accuracy by median latency at batch 1"),
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
    failed = failures(deployment)
    warnings, notes = warnings_of(records), warnings_of(records, "notes")
    sections = {
        "In short": _joined(
            _items(answer(records)), *map(escaped, judged_outputs(deployment)), _items(notes)
        ),
        "Warnings": _items(warnings) if warnings else None,
        "Headline": headline(deployment),
        "Accuracy drop": pictures.get("drops.png"),
        "Closeness to float": pictures.get("sqnr.png"),
        "Quant-Trim against its float twin": head_to_head(deployment),
        "All rows": full_table(deployment),
        "Outputs": output_table(deployment),
        "Rows without a number": f"{failed}\n\n{LOGS}" if failed else None,
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


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)


def _has_operators(records: Sequence[Record]) -> bool:
    return any(record.get("operators") or record["status"] == "refused" for record in records)


def headline(deployment: DeploymentTable) -> str:
    """Tabulate FP32, the worst INT8 and INT4 row, the spread over each, and the statuses, by network.

    Networks of different metrics have tables of their own, and so have emulated conventions.
    """
    parts = []
    for conventions in (False, True):
        for metric, columns in deployment.by_metric().items():
            if not conventions or any(map(is_convention, _cells(deployment, columns))):
                parts.append(_extremes(deployment, columns, metric, conventions))
    counts = [
        [escaped(deployment.name(c)), *(str(count_statuses(deployment, c)[status]) for status in STATUSES)]
        for c in deployment.columns
    ]
    parts.append(markdown_table(["records", *STATUSES], counts))
    return _joined(_items(_exceptions(deployment)), *parts, _items(_definitions(deployment)))


def _cells(deployment: DeploymentTable, columns: Sequence[Column]) -> list[Seeds]:
    return [seeds for column in columns for seeds in deployment.cells[column].values()]


def _extremes(
    deployment: DeploymentTable, columns: Sequence[Column], metric: Metric | None, conventions: bool
) -> str:
    """Tabulate the worst row and the spread of each precision, of networks of one metric."""
    word = "convention" if conventions else "row"
    loss = "its SQNR" if metric is None else "its drop" if metric.fraction else metric.loss
    header = ["network"] + ([] if metric is None else [f"FP32 {metric.title}"])
    for name in ("INT8", "INT4"):
        header += [f"worst {name} {word}", loss, f"spread over {name} {word}s"]
    rows = []
    for column in columns:
        cells = [escaped(deployment.name(column))]
        cells += [] if metric is None else [_float_score(deployment, column, metric)]
        for name in ("INT8", "INT4"):
            found = group(deployment, column, name, conventions)
            if found is None:
                cells += [ABSENT] * 3
                continue
            scale, digits = (1.0, 1) if metric is None else (metric.scale, metric.digits)
            cells += [
                escaped(found.worst),
                _worst(deployment, column, found.worst, metric),
                f"{scale * found.spread:.{digits}f} ({found.size} {word}{'s' * (found.size > 1)})",
            ]
        rows.append(cells)
    return markdown_table(header, rows)


def _exceptions(deployment: DeploymentTable) -> list[str]:
    """Name layers and rows that are not on integers although their group's name says so."""
    records = deployment.records()
    names = dict.fromkeys(layer for record in records for layer in record.get("float_layers") or ())
    lines = [f"Left in float on request: {', '.join(names)}."] if names else []
    partly: dict[str, None] = {}
    wholly: dict[str, None] = {}
    for column in deployment.columns:
        for row, seeds in deployment.cells[column].items():
            if partly_float(seeds):
                partly.setdefault(f"{row} ({share(seeds)} layers quantized)")
            if any(map(is_all_float, seeds.values())):
                wholly.setdefault(str(row))
    if partly:
        lines.append(f"Partly float: {', '.join(partly)}.")
    if wholly:
        lines.append(f"Wholly float, and therefore in no group: {', '.join(wholly)}.")
    return lines


def _definitions(deployment: DeploymentTable) -> list[str]:
    """Define the words of the headline, as far as it uses them."""
    lines = []
    for metric in deployment.by_metric():
        if metric is None:
            lines.append(_sqnr_in_words())
        elif metric.fraction:
            name = metric.title
            lines.append(
                f"{name[0].upper()}{name[1:]} is in %. The drop is the points of {name} that a row loses "
                "against the float model in onnxruntime on the same n images."
            )
        else:
            lines.append(
                f"A row is worse by what it adds to {metric.title}, or takes from it if more is better, "
                "against the float model in onnxruntime on the same n images. Less than zero is better."
            )
    metrics = [metric for metric in deployment.by_metric() if metric is not None]
    lines += [ROWS, SPREAD if deployment.in_points() else SPREAD_OF_OTHERS]
    lines += [NOISE] * any(metric.name in METRICS_OF_DECISIONS for metric in metrics)
    cells = _cells(deployment, deployment.columns)
    return [
        *lines,
        SEEDS,
        *[CONVENTIONS] * any(map(is_convention, cells)),
        *[PARTLY_FLOAT] * any(map(partly_float, cells)),
    ]


def _sqnr_in_words() -> str:
    """Define the SQNR, and say from which values on it means what."""
    words = ", ".join(
        f"from {least:g} dB on {meaning}" if least > 0 else f"below {BROKEN_SQNR:g} dB {meaning}"
        for least, meaning in CLOSENESS
    )
    return (
        "There are no labels. The SQNR says in dB by how much the float model's outputs are larger than the "
        "errors of a row on the same n images, both as root mean squares: at 20 dB ten times. The worst row "
        f"is that of the lowest SQNR, over its judged outputs. As rules of thumb, outputs are {words}."
    )


def _float_score(deployment: DeploymentTable, column: Column, metric: Metric) -> str:
    seeds = deployment.seeds(column, REFERENCE)
    text = with_spread(scores(seeds).values(), metric.scale, metric.digits)
    counts = images(seeds)
    return f"{text} (n {counts[-1]})" if counts and text != ABSENT else text


def _worst(deployment: DeploymentTable, column: Column, row: Row, metric: Metric | None) -> str:
    """Write what a row lost, with its number of images, its noise if known, and what of it is float."""
    seeds = deployment.seeds(column, row)
    notes = [f"n {', '.join(map(str, images(seeds)))}"] if images(seeds) else []
    if metric is None:
        text = with_spread(measured(seeds, "sqnr_db").values(), 1, 1)
    else:
        text = with_spread(drops(seeds), metric.scale, metric.digits)
        if (bound := noise_of_drop(deployment, column, row)) is not None:
            notes.append(f"noise {100 * bound:.2f}")
    if partly_float(seeds):
        notes.append(f"{share(seeds)} layers quantized")
    return text + (f" ({', '.join(notes)})" if notes else "")


class Contest(NamedTuple):
    """Compare Quant-Trim and its twin in one row.

    Attributes:
      pair: Columns of Quant-Trim and its twin.
      row: Row in which they are compared.
      lead: By how much Quant-Trim leads, in points if the metric is a fraction.
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
    """Compare every row of one precision that Quant-Trim and its twin both have, but emulated conventions."""
    found = []
    for pair in pairs(deployment):
        metric = deployment.metric(pair[0])
        for row in deployment.rows:
            cells = [deployment.seeds(column, row) for column in pair]
            both = comparable(*cells)
            if metric and both and precision(cells[0]) == name and not is_convention(cells[0]):
                margins = leads(both)
                known = metric.name in METRICS_OF_DECISIONS
                bound = noise(
                    (agreement(one, other) if known else None, margin, min(one["n"], other["n"]))
                    for (one, other), margin in zip(both, margins, strict=True)
                )
                lead = metric.scale * spread(margins)[0]
                found.append(Contest(pair, row, lead, None if bound is None else 100 * bound))
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
    metric = deployment.metric(contest.pair[0])
    assert metric is not None, "only rows with a score are compared"
    scale, digits = metric.scale, metric.digits
    return [
        *(escaped(contest.pair[0].model), escaped(contest.row), sizes(deployment, contest.row, contest.pair)),
        *(with_spread(scores(cell).values(), scale, digits) for cell in cells),
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
