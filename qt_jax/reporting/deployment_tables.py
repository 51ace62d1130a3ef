"""Deployment records row by row, Quant-Trim beside its float twin: on the terminal and as Markdown."""

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from qt_jax.reporting.cells import measured, spread, title
from qt_jax.reporting.deployment import (
    REFERENCE,
    Column,
    Deployment,
    Row,
    Seeds,
    arrange,
    comparable,
    drops,
    images,
    pairs,
    statuses,
)
from qt_jax.reporting.records import Record
from qt_jax.reporting.tables import ABSENT, markdown_line, with_spread

TERMINAL_NETWORKS = 3
"""With more networks side by side, the terminal shows their drops only."""
BRIEF = {"unavailable": "unavail."}
"""Statuses too long for a column of the terminal."""


def escaped(text: object) -> str:
    """`text` on one line, with what Markdown would take for markup escaped.

    >>> escaped("two   words")
    'two words'
    """
    return re.sub(r"([\\`*_{}\[\]<>#~&])", r"\\\1", " ".join(str(text).split()))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are text, the others numbers.

    >>> print(markdown_table(["row", "n"], [["a", "1"]]))
    | row | n |
    | --- | ---: |
    | a | 1 |
    """
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(markdown_line(cells) for cells in (header, rule, *rows))


def deployment_table(records: Sequence[Record]) -> Table:
    """A rich table: rows by backend, scheme and runtime; for each network top-1, drop, SQNR, or its status.

    With Quant-Trim and its twin there is the gain in points of top-1. Of several seeds the means are shown.
    Two networks fit 80 columns; more than three show their drops alone.

    Raises InvalidInput as `qt_jax.reporting.deployment.arrange` does.

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


def full_table(deployment: Deployment) -> str:
    """All rows as Markdown, a table a task and model, methods side by side."""
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


def failures(deployment: Deployment) -> str | None:
    """What did not end ok and what was said: a line a reason, with all rows that it stopped."""
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


def sizes(deployment: Deployment, row: Row, columns: Iterable[Column] | None = None) -> str:
    """The numbers of images of a row, as text."""
    chosen = deployment.columns if columns is None else columns
    found = {n for column in chosen for n in images(deployment.seeds(column, row))}
    return ", ".join(map(str, sorted(found))) or ABSENT


def numbers(seeds: Seeds, row: Row, mean: bool = False) -> dict[str, str]:
    """The cells of one network and row, with the spread over seeds or the `mean` alone."""
    found = {key: measured(seeds, key).values() for key in ("top1", "sqnr_db", "agreement", "ece")}
    return {
        "top-1": _text(found["top1"], 100, mean=mean),
        "drop": _text([] if row == REFERENCE else drops(seeds), 100, mean=mean),
        "SQNR": _text(found["sqnr_db"], 1, 1, mean=mean),
        "agreement": _text(found["agreement"], 100, mean=mean),
        "ECE": _text(found["ece"], 100, mean=mean),
    }


def gain(deployment: Deployment, pair: tuple[Column, Column], row: Row, mean: bool = False) -> str:
    """By how many points of top-1 the first network of a pair leads in a row."""
    both = comparable(*(deployment.seeds(column, row) for column in pair))
    return _text([a["top1"] - b["top1"] for a, b in both], 100, signed=True, mean=mean)


def _text(
    values: Iterable[float], scale: float, digits: int = 2, signed: bool = False, mean: bool = False
) -> str:
    values = list(values)
    return with_spread([spread(values)[0]] if mean and values else values, scale, digits, signed)
