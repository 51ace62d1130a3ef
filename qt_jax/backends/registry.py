"""Every backend this package knows. A new vendor is one file beside this one and one entry here."""

from qt_jax.backends.ort import OnnxRuntime
from qt_jax.backends.protocol import Backend
from qt_jax.errors import InvalidInput

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (OnnxRuntime(),)}


def select(names: str | list[str] | tuple[str, ...]) -> list[Backend]:
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
    return [BACKENDS[name] for name in names]
