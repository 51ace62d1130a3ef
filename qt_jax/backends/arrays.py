"""Images and labels in .npz files, as the command lines take them."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from qt_jax.errors import InvalidInput


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays called `names` of an .npz file; a file with one array alone needs no name for it.

    Raises InvalidInput if the file cannot be read, or lacks one.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "c.npz"
    >>> np.savez(path, np.zeros((2, 3)))
    >>> read_arrays(path, ("images",))["images"].shape
    (2, 3)
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise InvalidInput(f"{path} cannot be read as an .npz file: {error}.") from error
    if len(names) == len(found) == 1:
        return {names[0]: next(iter(found.values()))}
    lacking = [name for name in names if name not in found]
    if lacking:
        raise InvalidInput(f"{path} lacks the arrays {lacking}, it holds {sorted(found)}.")
    return {name: found[name] for name in names}
