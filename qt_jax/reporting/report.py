"""What deployment did to networks, from records alone: summary.md, figures, one HTML file with all of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qt_jax.reporting.agreement import EQUAL_ACCURACY, disagreeing_pairs
from qt_jax.reporting.deployment import Deployment, arrange
from qt_jax.reporting.deployment_costs import estimate_table, operator_table, provenance, speed_table
from qt_jax.reporting.deployment_figures import latency_figure, reliability_figure
from qt_jax.reporting.deployment_tables import escaped, failures, full_table
from qt_jax.reporting.files import write_whole
from qt_jax.reporting.headline import head_to_head, headline
from qt_jax.reporting.heatmaps import agreement_figure, drop_figure
from qt_jax.reporting.page import to_html
from qt_jax.reporting.records import Record

FIGURES = (
    (drop_figure, "drops.png", "Accuracy drop by row and network"),
    (
        reliability_figure,
        "reliability.png",
        "Accuracy by confidence: FP32 and the best, median and worst row",
    ),
    (latency_figure, "latency.png", "Top-1 by median latency at batch 1"),
)


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write summary.md, its PNG figures and report.html into `folder`, and return what was written.

    A figure for which the records hold nothing is left out, and so is its section. Files of the same names
    are replaced, each whole or not at all.

    Raises InvalidInput if there are no records, one is no deployment record, or decisions cannot be decoded.

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


def _title(deployment: Deployment) -> str:
    subjects = dict.fromkeys(
        " ".join(part for part in column[:2] if part) or deployment.name(column)
        for column in deployment.columns
    )
    return f"Deployment of {', '.join(subjects)}"


def _page(deployment: Deployment, records: Sequence[Record], title: str, pictures: Mapping[str, str]) -> str:
    """The report as Markdown: a section a question, left out where the records say nothing about it."""
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


def _disagreements(deployment: Deployment) -> str | None:
    """The rows that decide most images differently although they are equally accurate."""
    lines = []
    for column in deployment.columns:
        for pair in disagreeing_pairs(deployment, column):
            lines.append(
                f"- {escaped(deployment.name(column))}: {escaped(pair.first)} and {escaped(pair.second)} "
                f"differ on {100 * pair.differ:.1f} % of the images although their top-1 differs by "
                f"{100 * pair.apart:.2f}"
            )
    if not lines:
        return None
    introduction = (
        "Two rows are compared on the images that both saw. Most different decisions among rows of the same "
        f"number of images whose top-1 lie within {100 * EQUAL_ACCURACY:g} points, each row named once:"
    )
    return "\n".join([introduction, "", *lines])


def _has_operators(records: Sequence[Record]) -> bool:
    return any(record.get("operators") or record["status"] == "refused" for record in records)
