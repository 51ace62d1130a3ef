"""Tabulate records for the terminal and as Markdown, with Quant-Trim beside its float twin.

`accuracy_table` and `to_markdown` show the accuracy of one task and model by scheme. `deployment_table` and
`full_table` show deployment records row by row.
"""

import re
from collections.abc import Callable, Iterable, Sequence

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
    Metric,
    Row,
    Seeds,
    arrange,
    comparable,
    compare,
    difference,
    drops,
    ended_well,
    images,
    leads,
    measured,
    pairs,
    partly_float,
    scores,
    share,
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

    For each network it shows the score, the drop and the SQNR, or the status; without labels SQNR, cosine and
    the SQNR of the worst image. With Quant-Trim and its twin it shows the gain. Rows that are partly float
    say how many of their layers were quantized. Of several seeds the means are shown. Two networks fit 80
    columns. More than three networks show only their drops.

    Raises:
      InvalidInput: The records cannot be arranged, as `qt_jax.reporting.pivot.arrange` says.

    >>> record = {"backend": "b", "scheme": "int8", "status": "ok", "top1": 0.5}
    >>> deployment_table([record]).row_count
    2
    """
    deployment = arrange(records)
    few = len(deployment.columns) <= TERMINAL_NETWORKS
    shown = {column: _terminal_keys(deployment.metric(column), few) for column in deployment.columns}
    twins = _scored_pairs(deployment) if few else []
    partial = any(partly_float(deployment.seeds(c, r)) for c in deployment.columns for r in deployment.rows)
    table = Table(box=box.SIMPLE_HEAD, padding=0, title="Deployment", caption_justify="left")
    table.caption = "\n".join(_caption(deployment, partial))
    table.add_column("\nscheme", overflow="fold", min_width=12)
    table.add_column("\nn", justify="right", no_wrap=True)
    if partial:
        table.add_column("\nlayers", justify="right", no_wrap=True)
    for column, keys in shown.items():
        name = deployment.name(column)
        for head in (f"{name}\n{keys[0]}", *(f"\n{key}" for key in keys[1:])):
            table.add_column(head, justify="right", min_width=len(BRIEF["unavailable"]) if not few else None)
    for _ in twins:
        table.add_column("\ngain", justify="right", no_wrap=True)
    for backend in dict.fromkeys(row.backend for row in deployment.rows):
        mine = [row for row in deployment.rows if row.backend == backend]
        runtimes = {row.runtime for row in mine}
        table.add_row(Text(backend if len(runtimes) > 1 else f"{backend} {mine[0].runtime}", style="bold"))
        for row in mine:
            cells = [sizes(deployment, row)]
            if partial:
                cells.append(shares(deployment, row, deployment.columns, full=False))
            for column, keys in shown.items():
                found = numbers(deployment, column, row, mean=True)
                failed = ", ".join(BRIEF.get(word, word) for word in statuses(deployment.seeds(column, row)))
                first = failed if found[keys[0]] == ABSENT and failed else found[keys[0]]
                cells += [first, *(found[key] for key in keys[1:])]
            cells += [gain(deployment, pair, row, mean=True) for pair in twins]
            label = f"  {row.scheme} {row.runtime}" if len(runtimes) > 1 else f"  {row.scheme}"
            table.add_row(Text(label), *cells)
    return table


def _terminal_keys(metric: Metric | None, few: bool) -> tuple[str, ...]:
    """Return the columns that the terminal has room for."""
    if metric is None:
        return ("SQNR", "cosine", "worst") if few else ("SQNR",)
    return (metric.title, metric.loss, "SQNR") if few else (metric.loss,)


def _caption(deployment: DeploymentTable, partial: bool) -> list[str]:
    """Explain the units of the terminal's table, and say what was judged."""
    units = []
    for metric in deployment.by_metric():
        if metric is None:
            units.append("worst: SQNR of the worst image in dB")
        elif metric.fraction:
            units.append(f"{metric.title} in %; drop, gain: points of {metric.title}")
        else:
            units.append(f"worse by: change of {metric.title} for the worse")
    classifiers = all(metric is not None and metric.name == "top1" for metric in deployment.by_metric())
    outputs = "logits" if classifiers else "outputs"
    lines = ["; ".join([*units, f"SQNR of the {outputs} against FP32 in dB"])]
    if partial:
        lines.append("layers: with products, quantized of all; a row with fewer than all is partly float")
    return lines + judged_outputs(deployment)


def judged_outputs(deployment: DeploymentTable) -> list[str]:
    """Say which outputs were judged and which were left out, with one line for networks that agree.

    Nothing is said of older records, which do not name outputs.

    >>> judged_outputs(arrange([{"backend": "b", "scheme": "s", "status": "ok", "judged": ["boxes"]}]))
    ['Judged: boxes.']
    """
    lines: dict[str, list[str]] = {}
    for column in deployment.columns:
        for record in deployment.records([column]):
            if record.get("judged"):
                others = record.get("not_judged")
                text = f"{', '.join(record['judged'])}." + (
                    f" Left out: {', '.join(others)}." if others else ""
                )
                names = lines.setdefault(text, [])
                if deployment.name(column) not in names:
                    names.append(deployment.name(column))
    if len(lines) == 1:
        return [f"Judged: {text}" for text in lines]
    return [f"Judged in {', '.join(names)}: {text}" for text, names in lines.items()]


def full_table(deployment: DeploymentTable) -> str:
    """Write all rows as Markdown, with one table per task and model and the methods side by side.

    Who a row speaks for, and how many of its layers were quantized, is shown where the records tell it.
    """
    parts = []
    for subject in dict.fromkeys(column[:2] for column in deployment.columns):
        columns = [column for column in deployment.columns if column[:2] == subject]
        twins = [pair for pair in _scored_pairs(deployment) if pair[0] in columns]
        keys = _full_keys(deployment, columns)
        records = deployment.records(columns)
        kinds = any(record.get("kind") for record in records)
        counted = any(record.get("products") for record in records)
        header = [
            "backend",
            "scheme",
            "runtime",
            *["speaks for"] * kinds,
            "n",
            *["quantized layers"] * counted,
        ]
        header += [
            f"{escaped(title(column.method) or 'network')} {key}"
            for column in columns
            for key in keys[column]
        ]
        rows = []
        for row in deployment.rows:
            if not any(deployment.seeds(column, row) for column in columns):
                continue
            cells = [*map(escaped, row)]
            cells += [escaped(kind(deployment, row, columns))] * kinds
            cells += [sizes(deployment, row, columns), *[shares(deployment, row, columns)] * counted]
            for column in columns:
                seeds = deployment.seeds(column, row)
                found = numbers(deployment, column, row)
                first, *others = keys[column]
                if found[first] == ABSENT and statuses(seeds):
                    found[first] = ", ".join(statuses(seeds))
                cells += [found[key] for key in (first, *others)]
            rows.append(cells + [gain(deployment, pair, row) for pair in twins])
        if len(deployment.columns) > len(columns):
            parts.append(f"### {escaped(' '.join(part for part in subject if part))}")
        parts.append(markdown_table(header + ["gain"] * len(twins), rows, words=3 + kinds))
    return "\n\n".join(parts)


def _scored_pairs(deployment: DeploymentTable) -> list[tuple[Column, Column]]:
    """Return the pairs of Quant-Trim and its twin that labels can tell apart."""
    return [pair for pair in pairs(deployment) if deployment.metric(pair[0]) is not None]


def _full_keys(deployment: DeploymentTable, columns: Iterable[Column]) -> dict[Column, tuple[str, ...]]:
    """Return the keys of `numbers` that the full table shows of each network."""
    found = {}
    for column in columns:
        metric, records = deployment.metric(column), deployment.records([column])
        keys = ["SQNR", "cosine", "worst image", "largest error"] if metric is None else [metric.title]
        if metric is not None:
            keys += ["mIoU"] if metric.title == "pixel accuracy" else []
            keys += ["AUC"] if metric.name == "accuracy" and any(r.get("auc") for r in records) else []
            keys += [metric.loss, "SQNR"] + (["agreement", "ECE"] if metric.name == "top1" else ["cosine"])
        elif any(
            item.get("equal") is not None for record in records for item in record.get("fidelity") or ()
        ):
            keys.append("equal")
        found[column] = tuple(keys)
    return found


def kind(deployment: DeploymentTable, row: Row, columns: Iterable[Column]) -> str:
    """Write whose product a row speaks for and how, such as "Canaan, vendor simulator"."""
    records = [record for column in columns for record in deployment.seeds(column, row).values()]
    texts = (", ".join(record[key] for key in ("vendor", "kind") if record.get(key)) for record in records)
    return "; ".join(dict.fromkeys(filter(None, texts))) or ABSENT


def shares(deployment: DeploymentTable, row: Row, columns: Iterable[Column], full: bool = True) -> str:
    """Write how many layers of a row were quantized, such as "8 of 9"; not where it is all, unless `full`."""
    cells = [deployment.seeds(column, row) for column in columns]
    found = [share(seeds) for seeds in cells if full or partly_float(seeds)]
    return ", ".join(dict.fromkeys(filter(None, found))) or ABSENT


def marked(deployment: DeploymentTable, column: Column, row: Row) -> str:
    """Name a row, with the share of its quantized layers if a part of it is float."""
    seeds = deployment.seeds(column, row)
    return f"{row}, {share(seeds)} layers quantized" if partly_float(seeds) else str(row)


def output_table(deployment: DeploymentTable) -> str | None:
    """Tabulate every judged output of every row; None where no network has several."""
    header = ["row", "output", "shape", "type", "SQNR", "cosine", "largest error", "largest value"]
    parts = []
    for column in deployment.columns:
        lines = []
        for row in deployment.rows:
            seeds = deployment.seeds(column, row)
            for seed, record in seeds.items():
                label = f"{row}, seed {seed}" if len(seeds) > 1 else str(row)
                if ended_well(record):
                    lines += [[escaped(label), *_output(item)] for item in record.get("fidelity") or ()]
        if len({line[1] for line in lines}) > 1:
            if len(deployment.columns) > 1:
                parts.append(f"### {escaped(deployment.name(column))}")
            parts.append(markdown_table([*header, "equal", "worst image"], lines, words=4))
    if not parts:
        return None
    notes = (
        "SQNR of an output against the float graph in dB, over all images. An integer output has none: it is "
        "equal to the float graph's in the percentage of its elements that is given.",
        "The worst image is that of the lowest SQNR, by its place in the test set.",
    )
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def _output(item: Record) -> list[str]:
    """Write one judged output of one row."""
    shape = item.get("shape")
    worst = item.get("worst_image") or {}
    place = f"{worst.get('index')}" + (
        f": {worst['sqnr_db']:.1f} dB" if worst.get("sqnr_db") is not None else ""
    )
    return [
        escaped(item["output"]),
        "varies" if shape is None else "×".join(map(str, shape)) or "scalar",
        escaped(item.get("dtype") or ABSENT),
        _plain(item.get("sqnr_db"), ".1f"),
        _plain(item.get("cosine"), ".4f"),
        _plain(item.get("largest_error"), ".3g"),
        _plain(item.get("largest_value"), ".3g"),
        ABSENT if item.get("equal") is None else f"{100 * item['equal']:.2f}",
        ABSENT if worst.get("index") is None else place,
    ]


def _plain(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form).replace("-", MINUS)


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


def numbers(deployment: DeploymentTable, column: Column, row: Row, mean: bool = False) -> dict[str, str]:
    """Return the cells of one network and row, with the spread over seeds or only the mean.

    The score and the drop are under the metric's title and its word for a loss.
    """
    seeds, metric = deployment.seeds(column, row), deployment.metric(column)
    keys = ("sqnr_db", "worst_sqnr_db", "cosine", "agreement", "ece", "miou", "auc")
    found = {key: measured(seeds, key).values() for key in keys}
    sqnr, worst = (_text(found[key], 1, 1, mean=mean) for key in ("sqnr_db", "worst_sqnr_db"))
    cells = {
        **{"SQNR": sqnr, "worst": worst, "worst image": worst},
        "cosine": _text(found["cosine"], 1, 4, mean=mean),
        "agreement": _text(found["agreement"], 100, mean=mean),
        "ECE": _text(found["ece"], 100, mean=mean),
        "mIoU": _text(found["miou"], 100, mean=mean),
        "AUC": _text(found["auc"], 100, mean=mean),
        "largest error": _over_outputs(seeds, "largest_error", max, ".3g"),
        "equal": _over_outputs(seeds, "equal", min, ".2%").rstrip("%"),
    }
    if metric is not None:
        lost = [] if row == REFERENCE else drops(seeds)
        cells |= {
            metric.title: _text(scores(seeds).values(), metric.scale, metric.digits, mean=mean),
            metric.loss: _text(lost, metric.scale, metric.digits, mean=mean),
        }
    return cells


def _over_outputs(seeds: Seeds, key: str, choose: Callable[[Iterable[float]], float], form: str) -> str:
    """Write the worst value under `key` over the judged outputs of all seeds."""
    items = (item for record in seeds.values() if ended_well(record) for item in record.get("fidelity") or ())
    values = [item[key] for item in items if item.get(key) is not None]
    return _plain(choose(values) if values else None, form)


def gain(deployment: DeploymentTable, pair: tuple[Column, Column], row: Row, mean: bool = False) -> str:
    """Write by how much the first network of a pair leads in a row, in points if the metric is a fraction."""
    metric = deployment.metric(pair[0])
    if metric is None:
        return ABSENT
    both = comparable(*(deployment.seeds(column, row) for column in pair))
    return _text(leads(both), metric.scale, metric.digits, signed=True, mean=mean)


def _text(
    values: Iterable[float], scale: float, digits: int = 2, signed: bool = False, mean: bool = False
) -> str:
    values = list(values)
    return with_spread([spread(values)[0]] if mean and values else values, scale, digits, signed)
