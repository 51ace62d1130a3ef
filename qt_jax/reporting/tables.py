"""Tabulate records for the terminal and as Markdown, with Quant-Trim beside its float twin.

`accuracy_table` and `to_markdown` show the accuracy of one task and model by scheme. `deployment_table` and
`full_table` show deployment records row by row.
"""

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from qt_jax.records import Record
from qt_jax.reporting.pivot import (
    METHOD_TITLES,
    METRICS,
    REFERENCE,
    Column,
    Comparison,
    DeploymentTable,
    Row,
    Seeds,
    arrange,
    comparable,
    compare,
    difference,
    drops,
    images,
    measured,
    pairs,
    spread,
    statuses,
    title,
)

LEGEND = (
    "top-1 in %; drop: points of top-1 below the network's own FP32; SQNR of the logits against FP32 in dB; "
    "gain: points of top-1 by which Quant-Trim leads the float twin"
)

AGREEMENT = "agreement: images on which the decision is that of the network's own FP32, in %"

COLUMNS = ("top-1", "drop", "SQNR", "agreement")
"""Columns of each method in the table by scheme."""

TERMINAL_COLUMNS = COLUMNS[:3]

TERMINAL_NETWORKS = 3
"""Number of networks beyond which the terminal shows only their drops."""

BRIEF = {"unavailable": "unavail."}
"""Short forms of statuses that are too long for a column of the terminal."""

ABSENT = "–"
"""Stands in a cell without a number."""

MINUS = "−"
"""Minus sign of negative numbers."""


def accuracy_table(records: Sequence[Record], metric: str = "top1") -> Table:
    """Make a rich table that fits 80 columns, with one row per scheme.

    It shows top-1, drop and SQNR of each method, and the gain. With `metric` "miou" it shows mIoU instead of
    top-1. With several seeds every number is mean ± sample standard deviation. Drop and gain are paired by
    seed.

    Raises:
      InvalidInput: The records cannot be compared, as `qt_jax.reporting.pivot.compare` says.

    >>> record = {"backend": "b", "scheme": "fp32", "method": "float", "seed": 0, "top1": 0.5, "status": "ok"}
    >>> accuracy_table([record]).row_count
    1
    """
    comparison = compare(records)
    name = _name(comparison, metric)
    _, *rows = _grid(comparison, TERMINAL_COLUMNS, metric)
    caption = "\n".join(_notes(comparison, metric))
    table = Table(
        title=f"{name} by scheme".replace("top", "Top"),
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("\nscheme", no_wrap=True)
    for method in comparison.methods:
        _, *others = TERMINAL_COLUMNS
        for column in (f"{title(method)}\n{name}", *(f"\n{other}" for other in others)):
            table.add_column(column, justify="right")
    if _paired(comparison):
        table.add_column("\ngain", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def to_markdown(records: Sequence[Record], metric: str = "top1") -> str:
    """Write the same table as GitHub-flavoured Markdown, with its legend and the reasons of failed rows
    below.

    >>> record = {"backend": "b", "scheme": "fp32", "method": "float", "seed": 0, "top1": 0.5, "status": "ok"}
    >>> print(to_markdown([record]).splitlines()[2])
    | fp32 | 50.00 | – | – | – |
    """
    comparison = compare(records)
    header, *rows = _grid(comparison, COLUMNS, metric)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [markdown_line(cells) for cells in (header, rule, *rows)]
    return "\n".join(
        [
            *lines,
            "",
            *[
                f"- {note}"
                for note in (*_notes(comparison, metric), _named(AGREEMENT, _name(comparison, metric)))
            ],
            "",
        ]
    )


def markdown_line(cells: Iterable[str]) -> str:
    """Write one row of a Markdown table.

    >>> markdown_line(["scheme", "top-1"])
    '| scheme | top-1 |'
    """
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _paired(comparison: Comparison) -> bool:
    """Tell whether both Quant-Trim and its twin are there."""
    return all(method in comparison.cells for method in METHOD_TITLES)


def _name(comparison: Comparison, metric: str) -> str:
    """Return the name of the metric; the top-1 of segmentation is taken over pixels."""
    cells = (seeds for schemes in comparison.cells.values() for seeds in schemes.values())
    segmentation = any(measured(seeds, "miou") for seeds in cells)
    return "pixel accuracy" if segmentation and metric == "top1" else METRICS[metric]


def _named(text: str, name: str) -> str:
    """Rephrase a text about top-1 for the metric called `name`, whose decisions are of pixels."""
    return text if name == METRICS["top1"] else text.replace("top-1", name).replace("images", "pixels")


def _grid(comparison: Comparison, columns: tuple[str, ...], metric: str) -> list[list[str]]:
    """Return the header and the rows, as text."""
    paired = _paired(comparison)
    names = [_named(column, _name(comparison, metric)) for column in columns]
    header = ["scheme", *[f"{title(m)} {name}" for m in comparison.methods for name in names]]
    grid = [header + ["gain"] * paired]
    for scheme in comparison.schemes:
        row = [scheme]
        for method in comparison.methods:
            cells = _method_cells(comparison, method, scheme, metric)
            row += [cells[column] for column in columns]
        if paired:
            ahead, behind = (measured(comparison.cells[m].get(scheme, {}), metric) for m in METHOD_TITLES)
            row.append(with_spread(difference(ahead, behind), 100, signed=True))
        grid.append(row)
    return grid


def _method_cells(comparison: Comparison, method: str, scheme: str, metric: str) -> dict[str, str]:
    """Return the cells of one method and scheme, by column."""
    schemes = comparison.cells[method]
    seeds = schemes.get(scheme, {})
    reached = measured(seeds, metric)
    if not reached:
        statuses = sorted({record["status"] for record in seeds.values()})
        return {column: ABSENT for column in COLUMNS} | {"top-1": ", ".join(statuses) or ABSENT}
    own = measured(schemes.get(comparison.reference, {}), metric)
    drop = [] if scheme == comparison.reference else difference(own, reached)
    sqnr, agreement = measured(seeds, "sqnr_db").values(), measured(seeds, "agreement").values()
    cells = (
        with_spread(reached.values(), 100),
        with_spread(drop, 100),
        with_spread(sqnr, 1, 1),
        with_spread(agreement, 100),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def with_spread(values: Iterable[float], scale: float, digits: int = 2, signed: bool = False) -> str:
    """Write `mean ± spread`, or only the mean for one value, or a dash for none."""
    values = [scale * value for value in values]
    if not values:
        return ABSENT
    mean, deviation = spread(values)
    mean = round(mean, digits) + 0.0  # no negative zero
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", MINUS)
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _notes(comparison: Comparison, metric: str) -> list[str]:
    """List the units, the seeds and images behind the numbers, and the reasons of failures."""
    records = [
        r for schemes in comparison.cells.values() for seeds in schemes.values() for r in seeds.values()
    ]
    seeds = {
        method: len(comparison.cells[method].get(comparison.reference, {})) for method in comparison.methods
    }
    images = sorted({record["n"] for record in records if record.get("n")})
    counts = ", ".join(f"{title(method)} {count}" for method, count in seeds.items())
    notes = [
        _named(LEGEND, _name(comparison, metric)),
        f"seeds: {counts}; test images: {', '.join(map(str, images)) or 'not recorded'}",
    ]
    for record in records:
        if record["status"] != "ok":
            where = (
                f"{title(record['method'])}, seed {record['seed']}, {record['backend']} {record['scheme']}"
            )
            notes.append(f"{where}: {record['status']}: {' '.join(str(record['reason']).split())}")
    return notes


def escaped(text: object) -> str:
    """Put `text` on one line, and escape what Markdown would take for markup.

    >>> escaped("two   words")
    'two words'
    """
    return re.sub(r"([\\`*_{}\[\]<>#~&])", r"\\\1", " ".join(str(text).split()))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Write a Markdown table whose first `words` columns are text and whose other columns are numbers.

    >>> print(markdown_table(["row", "n"], [["a", "1"]]))
    | row | n |
    | --- | ---: |
    | a | 1 |
    """
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(markdown_line(cells) for cells in (header, rule, *rows))


def deployment_table(records: Sequence[Record]) -> Table:
    """Make a rich table with one row per backend, scheme and runtime.

    For each network it shows top-1, drop and SQNR, or the status. With Quant-Trim and its twin it shows the
    gain in points of top-1. Of several seeds the means are shown. Two networks fit 80 columns. More than
    three networks show only their drops.

    Raises:
      InvalidInput: The records cannot be arranged, as `qt_jax.reporting.pivot.arrange` says.

    >>> record = {"backend": "b", "scheme": "int8", "status": "ok", "top1": 0.5}
    >>> deployment_table([record]).row_count
    2
    """
    deployment = arrange(records)
    few = len(deployment.columns) <= TERMINAL_NETWORKS
    shown = ("top-1", "drop", "SQNR") if few else ("drop",)
    twins = pairs(deployment) if few else []
    table = Table(box=box.SIMPLE_HEAD, padding=0, title="Deployment", caption_justify="left")
    table.caption = "top-1 in %; drop, gain: points of top-1; SQNR of the logits against FP32 in dB"
    table.add_column("\nscheme", overflow="fold", min_width=12)
    table.add_column("\nn", justify="right", no_wrap=True)
    for column in deployment.columns:
        name = deployment.name(column)
        for head in (f"{name}\n{shown[0]}", *(f"\n{key}" for key in shown[1:])):
            table.add_column(head, justify="right", min_width=len(BRIEF["unavailable"]) if not few else None)
    for _ in twins:
        table.add_column("\ngain", justify="right", no_wrap=True)
    for backend in dict.fromkeys(row.backend for row in deployment.rows):
        mine = [row for row in deployment.rows if row.backend == backend]
        runtimes = {row.runtime for row in mine}
        table.add_row(Text(backend if len(runtimes) > 1 else f"{backend} {mine[0].runtime}", style="bold"))
        for row in mine:
            cells = [sizes(deployment, row)]
            for column in deployment.columns:
                seeds = deployment.seeds(column, row)
                found = numbers(seeds, row, mean=True)
                failed = ", ".join(BRIEF.get(word, word) for word in statuses(seeds))
                first = found[shown[0]] if measured(seeds, "top1") else failed or ABSENT
                cells += [first, *(found[key] for key in shown[1:])]
            cells += [gain(deployment, pair, row, mean=True) for pair in twins]
            label = f"  {row.scheme} {row.runtime}" if len(runtimes) > 1 else f"  {row.scheme}"
            table.add_row(Text(label), *cells)
    return table


def full_table(deployment: DeploymentTable) -> str:
    """Write all rows as Markdown, with one table per task and model and the methods side by side."""
    parts = []
    for subject in dict.fromkeys(column[:2] for column in deployment.columns):
        columns = [column for column in deployment.columns if column[:2] == subject]
        twins = [pair for pair in pairs(deployment) if pair[0] in columns]
        keys = ("top-1", "drop", "SQNR", "agreement", "ECE")
        header = ["backend", "scheme", "runtime", "n"]
        header += [
            f"{escaped(title(column.method) or 'network')} {key}" for column in columns for key in keys
        ]
        rows = []
        for row in deployment.rows:
            if not any(deployment.seeds(column, row) for column in columns):
                continue
            cells = [*map(escaped, row), sizes(deployment, row, columns)]
            for column in columns:
                seeds = deployment.seeds(column, row)
                found = numbers(seeds, row)
                if not measured(seeds, "top1") and statuses(seeds):
                    found["top-1"] = ", ".join(statuses(seeds))
                cells += [found[key] for key in keys]
            rows.append(cells + [gain(deployment, pair, row) for pair in twins])
        if len(deployment.columns) > len(columns):
            parts.append(f"### {escaped(' '.join(part for part in subject if part))}")
        parts.append(markdown_table(header + ["gain"] * len(twins), rows, words=3))
    return "\n\n".join(parts)


def failures(deployment: DeploymentTable) -> str | None:
    """List the reasons of rows that did not end ok, with one line per reason and all rows that it stopped."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for column in deployment.columns:
        for row in deployment.rows:
            for record in deployment.seeds(column, row).values():
                if record["status"] != "ok":
                    key = (
                        row.backend,
                        record["status"],
                        escaped(record.get("reason") or "no reason recorded"),
                    )
                    found.setdefault(key, {}).setdefault(" ".join(part for part in row[1:] if part))
    lines = [
        f"- {escaped(backend)} **{status}** ({escaped(', '.join(names))}): {reason}"
        for (backend, status, reason), names in found.items()
    ]
    return "\n".join(lines) or None


def sizes(deployment: DeploymentTable, row: Row, columns: Iterable[Column] | None = None) -> str:
    """Write the numbers of images of a row."""
    chosen = deployment.columns if columns is None else columns
    found = {n for column in chosen for n in images(deployment.seeds(column, row))}
    return ", ".join(map(str, sorted(found))) or ABSENT


def numbers(seeds: Seeds, row: Row, mean: bool = False) -> dict[str, str]:
    """Return the cells of one network and row, with the spread over seeds or only the mean."""
    found = {key: measured(seeds, key).values() for key in ("top1", "sqnr_db", "agreement", "ece")}
    return {
        "top-1": _text(found["top1"], 100, mean=mean),
        "drop": _text([] if row == REFERENCE else drops(seeds), 100, mean=mean),
        "SQNR": _text(found["sqnr_db"], 1, 1, mean=mean),
        "agreement": _text(found["agreement"], 100, mean=mean),
        "ECE": _text(found["ece"], 100, mean=mean),
    }


def gain(deployment: DeploymentTable, pair: tuple[Column, Column], row: Row, mean: bool = False) -> str:
    """Write by how many points of top-1 the first network of a pair leads in a row."""
    both = comparable(*(deployment.seeds(column, row) for column in pair))
    return _text([a["top1"] - b["top1"] for a, b in both], 100, signed=True, mean=mean)


def _text(
    values: Iterable[float], scale: float, digits: int = 2, signed: bool = False, mean: bool = False
) -> str:
    values = list(values)
    return with_spread([spread(values)[0]] if mean and values else values, scale, digits, signed)
