"""Write what deployments cost as Markdown: operators, cycles, latency, energy, money, and provenance."""

from collections.abc import Iterable, Sequence
from typing import Any

from qt_jax.records import Record
from qt_jax.reporting.deployment_figures import front, latencies
from qt_jax.reporting.pivot import Column, DeploymentTable, Row, Seeds, arrange, measured
from qt_jax.reporting.tables import ABSENT, escaped, markdown_table, with_spread

SPEED = {
    "latency_ms_p50": ("p50 ms", 1.0, 2),
    "latency_ms_p99": ("p99 ms", 1.0, 2),
    "throughput_ips": ("images/s", 1.0, 0),
    "energy_mj": ("mJ per image", 1.0, 3),
    "cost": ("USD per million", 1.0, 4),
    "model_bytes": ("KiB", 1 / 1024, 0),
}
"""Heading, scale and digits of each key of a record."""


def operator_table(records: Sequence[Record]) -> str:
    """Tabulate what each toolchain executes on integers, in floating point or on a host, or why it refused.

    The operators are those of the compiled graph, under the toolchain's own names. Networks for which a
    scheme did the same share a line.

    Raises:
      InvalidInput: The records cannot be arranged, as `qt_jax.reporting.pivot.arrange` says.

    >>> record = {"backend": "b", "scheme": "int8", "status": "ok", "operators": {"Conv": {"integer": 2}}}
    >>> print(operator_table([record]).splitlines()[2])
    | b int8 | Conv 2 | – | – |
    """
    deployment = arrange(records)
    places = ("integer", "float", "host")
    cells: dict[tuple[Row, Column], list[str]] = {}
    for row in deployment.rows:
        for column in deployment.columns:
            found = _first(deployment.seeds(column, row), "operators")
            if found:
                cells[row._replace(runtime=""), column] = [_counted(found, place) for place in places]
            elif said := _refusal(deployment.seeds(column, row)):
                cells[row._replace(runtime=""), column] = [said, ABSENT, ABSENT]
    lines = _shared(deployment, cells)
    return markdown_table(["scheme", "integer", "float", "host"], lines, words=4)


def estimate_table(deployment: DeploymentTable) -> str | None:
    """Tabulate the cycles, time and memory that compilers state for accelerators; None if none does."""
    cells: dict[tuple[Row, Column], list[str]] = {}
    for row in deployment.rows:
        for column in deployment.columns:
            found = _first(deployment.seeds(column, row), "estimates") or {}
            for name, values in found.items():
                cells[row._replace(runtime=name), column] = [
                    _number(values.get("cycles"), ",.0f"),
                    _number(values.get("milliseconds"), ".3f"),
                    _number(values.get("sram_bytes"), ",.0f", 1024),
                ]
    if not cells:
        return None
    return markdown_table(["scheme and accelerator", "cycles", "ms", "SRAM KiB"], _shared(deployment, cells))


def speed_table(deployment: DeploymentTable) -> str | None:
    """Tabulate latency, throughput, energy and cost where measured, with their sources; None if nowhere."""
    timed = [key for key in SPEED if key != "model_bytes"]
    sources: dict[str, int] = {}
    rows = []
    for column in deployment.columns:
        best = front(latencies(deployment, column))
        for row in deployment.rows:
            seeds = deployment.seeds(column, row)
            if not any(measured(seeds, key) for key in timed):
                continue
            cells = [escaped(deployment.name(column)), escaped(row), "front" if row in best else ""]
            for key, (_, scale, digits) in SPEED.items():
                text = with_spread(measured(seeds, key).values(), scale, digits)
                if text != ABSENT:
                    text += _mark(_first(seeds, f"{key.partition('_')[0]}_source"), sources)
                    batch = _first(seeds, "throughput_batch") if key == "throughput_ips" else None
                    text += f" (batch {batch})" if batch else ""
                cells.append(text)
            rows.append(cells)
    if not rows:
        return None
    header = ["network", "row", "front", *(heading for heading, _, _ in SPEED.values())]
    better = "more accurate" if deployment.in_points() else "closer to float"
    notes = [
        "p50, p99: latency of one image at batch 1; front: no other row of the network is both faster "
        f"and {better}. Only runtimes whose wall-clock time says something about a product are timed."
    ]
    notes += [f"[{number}] {escaped(source)}" for source, number in sources.items()]
    return "\n\n".join([markdown_table(header, rows, words=3), "\n".join(f"- {note}" for note in notes)])


def provenance(deployment: DeploymentTable) -> str:
    """Tabulate every backend with what it stands for and its versions; list CPU, data, commit and command."""
    records = [
        record
        for column in deployment.columns
        for seeds in deployment.cells[column].values()
        for record in seeds.values()
    ]
    rows = []
    for backend in dict.fromkeys(row.backend for row in deployment.rows):
        mine = [record for record in records if record["backend"] == backend]
        versions = _different(
            f"{name} {version}"
            for record in mine
            for name, version in (record.get("versions") or {}).items()
            if version
        )
        texts = (_different(r.get(key) for r in mine) for key in ("vendor", "kind", "stands_for"))
        rows.append([escaped(backend), *map(escaped, texts), escaped(versions)])
    dates = sorted(record["date"] for record in records if record.get("date"))
    lines = {
        "CPU": _different(map(_cpu, records)),
        "data": _different(record.get("data") for record in records),
        "commit": _different(record.get("commit") for record in records),
        "dates": _different(dates[i] for i in (0, -1)) if dates else ABSENT,
        "command": "; ".join(
            f"`{command.replace('`', chr(39))}`"
            for command in dict.fromkeys(record.get("command") for record in records)
            if command
        )
        or ABSENT,
    }
    header = ["backend", "vendor", "kind", "stands for", "versions"]
    return "\n\n".join(
        [
            markdown_table(header, rows, words=5),
            "\n".join(
                f"- {key}: {text if key == 'command' else escaped(text)}" for key, text in lines.items()
            ),
        ]
    )


def _first(seeds: Seeds, key: str) -> Any:
    """Return the value under `key` of the first seed that has one."""
    return next((record[key] for record in seeds.values() if record.get(key)), None)


def _counted(operators: dict[str, dict[str, int]], place: str) -> str:
    """List what is executed in one place, the most frequent first."""
    counts = {name: places.get(place) or 0 for name, places in operators.items()}
    ordered = sorted((name for name in counts if counts[name]), key=lambda name: (-counts[name], name))
    return ", ".join(f"{escaped(name)} {counts[name]}" for name in ordered) or ABSENT


def _refusal(seeds: Seeds) -> str | None:
    for record in seeds.values():
        if record["status"] == "refused":
            return f"refused: {escaped(record.get('reason') or 'no reason recorded')}"
    return None


def _shared(deployment: DeploymentTable, cells: dict[tuple[Row, Column], list[str]]) -> list[list[str]]:
    """Make one line per row; where networks differ in a row, one line per variant, with their names."""
    lines = []
    for row in dict.fromkeys(row for row, _ in cells):
        groups: dict[tuple[str, ...], list[str]] = {}
        for column in deployment.columns:
            if (row, column) in cells:
                groups.setdefault(tuple(cells[row, column]), []).append(deployment.name(column))
        for texts, names in groups.items():
            whose = f" ({', '.join(names)})" if len(groups) > 1 else ""
            lines.append([escaped(f"{row}{whose}"), *texts])
    return lines


def _number(value: float | None, form: str, divisor: float = 1) -> str:
    return ABSENT if value is None else format(value / divisor, form)


def _mark(source: object, sources: dict[str, int]) -> str:
    """Return the footnote of a source, numbered in order of appearance."""
    return f" [{sources.setdefault(str(source), len(sources) + 1)}]" if source else ""


def _different(values: Iterable[object]) -> str:
    """Join the different values in order of appearance."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value)) or ABSENT


def _cpu(record: Record) -> str | None:
    cpu = record.get("cpu")
    if not cpu:
        return None
    return (
        f"{cpu.get('model')}, {cpu.get('cores')} cores ({' '.join(cpu.get('flags') or ['flags unreadable'])})"
    )
