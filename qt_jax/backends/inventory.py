"""What backends there are and what this machine lacks of them, as rows; the tables of these rows."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from qt_jax.backends import environments, registry


def offers() -> list[dict[str, Any]]:
    """One row for each backend: backend, vendor, kind, stands_for, packages, schemes, runtimes.

    >>> row = offers()[0]
    >>> row["backend"], row["runtimes"][0]["name"]
    ('onnxruntime', 'reference')
    """
    return [
        {
            "backend": backend.name,
            "vendor": backend.vendor,
            "kind": backend.kind,
            "stands_for": backend.stands_for,
            "packages": list(backend.packages),
            "schemes": [asdict(scheme) for scheme in backend.schemes],
            "runtimes": [asdict(runtime) for runtime in backend.runtimes],
        }
        for backend in registry.BACKENDS.values()
    ]


def conditions(names: str | Sequence[str] = "all") -> list[dict[str, Any]]:
    """One row for each backend of these names: backend, environments, megabytes, ready, lacks.

    `lacks` holds a sentence for each thing that is missing here, with the command that mends it.

    Raises:
      InvalidInput: there is no such backend.

    >>> conditions(["onnxruntime"])
    [{'backend': 'onnxruntime', 'environments': [], 'megabytes': 0, 'ready': True, 'lacks': []}]
    """
    rows = []
    for backend in registry.select(names):
        needed = registry.environments_of(backend)
        lacks = [*(environments.missing(environment) for environment in needed), backend.available()]
        found = [lack for lack in lacks if lack is not None]
        rows.append(
            {
                "backend": backend.name,
                "environments": [environment.name for environment in needed],
                "megabytes": sum(environment.megabytes for environment in needed),
                "ready": not found,
                "lacks": found,
            }
        )
    return rows


def offers_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What `list` shows of `offers`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0))
    for heading in ("backend", "vendor, kind", "stands for", "schemes", "runtimes"):
        table.add_column(heading, no_wrap=heading == "backend", overflow="fold")
    for row in rows:
        schemes, runtimes = ("\n".join(it["name"] for it in row[key]) for key in ("schemes", "runtimes"))
        table.add_row(row["backend"], f"{row['vendor']}\n{row['kind']}", row["stands_for"], schemes, runtimes)
    return table


def conditions_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What `doctor` shows of `conditions`."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("backend", "environment", "size", "state, and what mends it"):
        table.add_column(heading, no_wrap=heading != "state, and what mends it")
    for row in rows:
        size = f"{row['megabytes']} MB" if row["environments"] else "-"
        names = ", ".join(row["environments"]) or "this one"
        table.add_row(row["backend"], names, size, "; ".join(row["lacks"]) or "ready")
    return table
