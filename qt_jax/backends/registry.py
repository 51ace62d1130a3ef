"""List every backend of this package, what each offers, and what this machine lacks to run it.

A new vendor is one file beside this one and one entry in `_MODULES`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from qt_jax.backends import (
    aimet,
    environments,
    esp_ppq,
    ethos_u,
    grids,
    k230,
    litert,
    openvino,
    ort,
    ryzen_ai,
    sophgo,
    tensorrt,
)
from qt_jax.backends.protocol import Backend, Environment, Scheme
from qt_jax.errors import InvalidInput

_MODULES = (ort, grids, openvino, litert, ethos_u, k230, sophgo, ryzen_ai, aimet, esp_ppq, tensorrt)

BACKENDS: dict[str, Backend] = {module.BACKEND.name: module.BACKEND for module in _MODULES}
"""Name -> backend. To register your own, set `BACKENDS[backend.name] = backend`. The file that defines its
class must define `BACKEND`."""


def select(names: str | Sequence[str]) -> list[Backend]:
    """Return the backends of these names, or all of them for "all".

    Raises:
      InvalidInput: A name is unknown.

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
    """Return the scheme of this name, which `backend` must offer."""
    [found] = [scheme for scheme in backend.schemes if scheme.name == name]
    return found


def file_of(backend: Backend) -> Path:
    """Return the file of the module that defines `backend`, which a worker loads."""
    return Path(inspect.getfile(type(backend)))


def environments_of(backend: Backend) -> list[Environment]:
    """Return the environments that `backend` needs: its own, and those of the backends it starts from."""
    sources = {scheme.source[0] for scheme in backend.schemes if scheme.source} - {backend.name}
    needed = [BACKENDS[name].environment for name in sorted(sources)] + [backend.environment]
    return [environment for environment in needed if environment is not None]


def descriptions() -> list[dict[str, Any]]:
    """Describe every backend: backend, vendor, kind, stands_for, packages, schemes, runtimes.

    >>> row = descriptions()[0]
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


def descriptions_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Arrange the rows of `descriptions` as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0))
    for heading in ("backend", "vendor, kind", "stands for", "schemes", "runtimes"):
        table.add_column(heading, no_wrap=heading == "backend", overflow="fold")
    for row in rows:
        schemes, runtimes = ("\n".join(it["name"] for it in row[key]) for key in ("schemes", "runtimes"))
        table.add_row(row["backend"], f"{row['vendor']}\n{row['kind']}", row["stands_for"], schemes, runtimes)
    return table


def readiness(names: str | Sequence[str] = "all") -> list[dict[str, Any]]:
    """Tell for each backend whether it can run here: backend, environments, megabytes, ready, lacks.

    `lacks` holds one sentence for each thing that is missing, with the command that mends it.

    Args:
      names: As `select` takes them.

    Raises:
      InvalidInput: A name is unknown.

    >>> readiness(["onnxruntime"])
    [{'backend': 'onnxruntime', 'environments': [], 'megabytes': 0, 'ready': True, 'lacks': []}]
    """
    rows = []
    for backend in select(names):
        needed = environments_of(backend)
        missing = [*(environments.missing(environment) for environment in needed), backend.available()]
        lacks = [reason for reason in missing if reason is not None]
        rows.append(
            {
                "backend": backend.name,
                "environments": [environment.name for environment in needed],
                "megabytes": sum(environment.megabytes for environment in needed),
                "ready": not lacks,
                "lacks": lacks,
            }
        )
    return rows


def readiness_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Arrange the rows of `readiness` as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("backend", "environment", "size", "state, and what mends it"):
        table.add_column(heading, no_wrap=heading != "state, and what mends it")
    for row in rows:
        size = f"{row['megabytes']} MB" if row["environments"] else "-"
        names = ", ".join(row["environments"]) or "this one"
        table.add_row(row["backend"], names, size, "; ".join(row["lacks"]) or "ready")
    return table
