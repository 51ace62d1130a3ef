"""Files that appear whole or not at all.

Text files that are written whole or not at all.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes `text` beside `path`, then gives it that name; a kill leaves the old file or the new one.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_whole(path, "done")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('done', 1)
    """
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(text)
    os.replace(scratch, path)


@contextmanager
def staged(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
