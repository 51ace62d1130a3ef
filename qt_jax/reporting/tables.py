"""Accuracy by scheme, Quant-Trim beside its float twin: on the terminal and as Markdown."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from qt_jax.reporting.cells import METHODS, METRICS, Comparison, compare, difference, measured, spread, title
from qt_jax.reporting.records import Record

LEGEND = (
    "top-1 in %; drop: points of top-1 below the network's own FP32; SQNR of the logits against FP32 in dB; "
    "gain: points of top-1 by which Quant-Trim leads the float twin"
)
AGREEMENT = "agreement: images on which the decision is that of the network's own FP32, in %"
COLUMNS = ("top-1", "drop", "SQNR", "agreement")
TERMINAL_COLUMNS = COLUMNS[:3]
ABSENT = "–"
MINUS = "−"


def accuracy_table(records: Sequence[Record], metric: str = "top1") -> Table:
    """A rich table that fits 80 columns: a row a scheme; top-1, drop and SQNR of each method; the gain.

    With `metric` "miou" it is mIoU instead of top-1. With several seeds every number is mean ± sample
    standard deviation; drop and gain are paired by seed.
    Raises InvalidInput as `qt_jax.reporting.cells.compare` does.

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
    """The same table as GitHub-flavoured Markdown, with its legend and the reasons of failed rows below.

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
    """One row of a Markdown table.

    >>> markdown_line(["scheme", "top-1"])
    '| scheme | top-1 |'
    """
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _paired(comparison: Comparison) -> bool:
    """Whether both Quant-Trim and its twin are there."""
    return all(method in comparison.cells for method in METHODS)


def _name(comparison: Comparison, metric: str) -> str:
    """What the metric is called; the top-1 of segmentation is over pixels."""
    cells = (seeds for schemes in comparison.cells.values() for seeds in schemes.values())
    segmentation = any(measured(seeds, "miou") for seeds in cells)
    return "pixel accuracy" if segmentation and metric == "top1" else METRICS[metric]


def _named(text: str, name: str) -> str:
    """A text on a table of top-1, said of what is called `name`; a decision is a pixel's there."""
    return text if name == METRICS["top1"] else text.replace("top-1", name).replace("images", "pixels")


def _grid(comparison: Comparison, columns: tuple[str, ...], metric: str) -> list[list[str]]:
    """Header and rows, as text."""
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
            ahead, behind = (measured(comparison.cells[m].get(scheme, {}), metric) for m in METHODS)
            row.append(with_spread(difference(ahead, behind), 100, signed=True))
        grid.append(row)
    return grid


def _method_cells(comparison: Comparison, method: str, scheme: str, metric: str) -> dict[str, str]:
    """The cells of one method and scheme, by column."""
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
    """`mean ± spread`, or the mean alone for one value, or a dash for none."""
    values = [scale * value for value in values]
    if not values:
        return ABSENT
    mean, deviation = spread(values)
    mean = round(mean, digits) + 0.0  # no negative zero
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", MINUS)
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _notes(comparison: Comparison, metric: str) -> list[str]:
    """What the reader must know: the units, how much stands behind the numbers, and what failed why."""
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
