"""Every backend this package knows. A new vendor is one file beside this one and one entry here."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from qt_jax.backends import ethos_u, k230, litert, openvino, ort, ryzen_ai, sophgo, tensorrt
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
