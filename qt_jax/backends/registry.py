"""Every backend this package knows. A new vendor is one file beside this one and one entry here.

What backends there are and what this machine lacks of them, as rows; the tables of these rows.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from qt_jax.backends import environments, ethos_u, k230, litert, openvino, ort, ryzen_ai, sophgo, tensorrt
from qt_jax.backends.protocol import Backend, Environment, Scheme
from qt_jax.errors import InvalidInput

_MODULES = (ort, openvino, litert, ethos_u, k230, sophgo, ryzen_ai, tensorrt)

BACKENDS: dict[str, Backend] = {module.BACKEND.name: module.BACKEND for module in _MODULES}
"""Name -> backend. Your own goes in with `BACKENDS[backend.name] = backend`; the file that defines its class
must define `BACKEND`."""


def select(names: str | Sequence[str]) -> list[Backend]:
    """The backends of these names, or all of them for "all". Raises InvalidInput for an unknown name.

    >>> [backend.vendor for backend in select(["onnxruntime"])]
    ['Microsoft']
    """
    if names == "all":
        return list(BACKENDS.values())
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise InvalidInput(f"Unknown backends {unknown}: choose among {sorted(BACKENDS)}, or 'all'.")
    return [BACKENDS[name] for name in dict.fromkeys(names)]


def scheme_of(backend: Backend, name: str) -> Scheme:
    """The scheme of this name, which `backend` is known to offer."""
    [found] = [scheme for scheme in backend.schemes if scheme.name == name]
    return found


def file_of(backend: Backend) -> Path:
    """The module a worker loads to get `backend`."""
    return Path(inspect.getfile(type(backend)))


def environments_of(backend: Backend) -> list[Environment]:
    """What `backend` needs installed: its own environment, and those of the backends it starts from."""
    sources = {scheme.source[0] for scheme in backend.schemes if scheme.source} - {backend.name}
    needed = [BACKENDS[name].environment for name in sorted(sources)] + [backend.environment]
    return [environment for environment in needed if environment is not None]


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
        for backend in BACKENDS.values()
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
    for backend in select(names):
        needed = environments_of(backend)
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
