"""Write files that appear whole or not at all.

The content goes into a scratch file beside the target, which takes the target's name once it is complete. A
reader, or a kill at any moment, finds the old file or the new one. Each writer has a scratch file to itself,
so that threads, processes and machines may write one path at once: the last to finish wins. A scratch file is
removed when its writer fails. Only a kill can leave one behind, named `TARGET.TOKEN.partial`. The next writer
of the same target removes those that are older than `ABANDONED` seconds.
"""

import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qt_jax.errors import InvalidInput

ABANDONED = 3600.0
"""Age in seconds at which a scratch file counts as left by a kill: no writer is expected to take longer."""

TOKEN_BYTES = 6
"""Random bytes in the name of a scratch file, written as twice as many hexadecimal digits."""


NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
"""Errors of a disk that is full or may not be written to."""


@contextmanager
def writing(folder: str | os.PathLike) -> Iterator[None]:
    """Turn the error of a disk that is full or read-only, in the block, into one sentence.

    Args:
      folder: What the block writes to, for the message.

    Raises:
      InvalidInput: The block could not write.

    >>> with writing("results"):  # doctest: +ELLIPSIS
    ...     raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: results cannot be written: No space left on device. ...
    """
    try:
        yield
    except OSError as error:
        short = "requested and" in str(error) and error.errno is None  # numpy's words for a full disk
        if error.errno not in NOT_WRITABLE and not short:
            raise
        where = error.filename if isinstance(error.filename, str) else os.fspath(folder)
        problem = "No space left on device" if short else error.strerror
        remedy = (
            "Choose" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else "Make room, or choose"
        )
        raise InvalidInput(
            f"{where} cannot be written: {problem}. What is there is whole. {remedy} another folder, and run "
            "the same again."
        ) from error


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_whole(path, "done")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('done', 1)
    """
    with staged(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def staged(path: str | os.PathLike) -> Iterator[Path]:
    """Give the block a scratch file to write, which becomes `path` if the block ends without an error.

    The folder of `path` is made if it is missing. When `path` has been replaced, the scratch files of earlier
    writers of `path` that have not been written to for `ABANDONED` seconds are removed.

    Yields:
      The path of the scratch file, which does not exist yet. Its suffix is not that of `path`: hand an open
      file to writers that choose a format, or append a suffix, by name (`np.save`).

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.onnx"
    >>> with staged(path) as scratch:
    ...     _ = scratch.write_bytes(b"graph")
    >>> path.read_bytes()
    b'graph'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(TOKEN_BYTES)}.partial")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    _remove_abandoned(path)


@contextmanager
def staged_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give the block a scratch folder beside `path`, for files that it then moves to their places.

    The folder is removed when the block ends. Those that a kill has left are removed as by `staged`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.onnx"
    >>> with staged_folder(path) as folder:
    ...     _ = (folder / "part").write_bytes(b"graph")
    ...     os.replace(folder / "part", path)
    >>> [entry.name for entry in path.parent.iterdir()]
    ['model.onnx']
    """
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(TOKEN_BYTES)}.partial")
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove the scratch files of `path` that a kill has left, as far as they can be removed."""
    now = time.time()
    token = "[0-9a-f]" * (2 * TOKEN_BYTES)
    for scratch in path.parent.glob(f"{glob.escape(path.name)}.{token}.partial"):
        with suppress(OSError):  # another writer may have removed it
            parts = [scratch, *scratch.iterdir()] if scratch.is_dir() else [scratch]
            if now - max(part.stat().st_mtime for part in parts) > ABANDONED:
                shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()
