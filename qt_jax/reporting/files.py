"""Text files that are written whole or not at all."""

import os
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
