"""Pack bytes in parts of a limited size, with the checksums that tell a missing or damaged part.

A parcel has the parts NAME.00, NAME.01 and so on, which may travel one by one, and the manifest NAME.json
with the size and the SHA-256 of each part and of the whole. The manifest is written last: a parcel that has
one is complete where it was packed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from qt_jax.errors import InvalidInput
from qt_jax.files import staged, write_whole


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """State what a part, or the whole, must be.

    Attributes:
      size: Number of bytes.
      sha256: SHA-256 of the bytes, hexadecimal.
    """

    size: int
    sha256: str


def fingerprint(content: bytes) -> Fingerprint:
    """Return size and SHA-256 of bytes."""
    return Fingerprint(len(content), hashlib.sha256(content).hexdigest())


def manifest_of(folder: Path, name: str) -> Path:
    """Return the path of the manifest of a parcel."""
    return folder / f"{name}.json"


def part_of(folder: Path, name: str, index: int) -> Path:
    """Return the path of a part of a parcel, counted from 0."""
    return folder / f"{name}.{index:02d}"


def pack(content: bytes, name: str, folder: Path, most: int) -> int:
    """Write a parcel in place of an earlier one of its name, and return the number of its files.

    Args:
      content: What it holds.
      name: Name of the parcel.
      folder: Folder of its files.
      most: Bytes of a part at most.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pack(b"seven b", "letter", Path(folder), most=3), unpack(Path(folder), "letter")
    (4, b'seven b')
    """
    manifest_of(folder, name).unlink(missing_ok=True)
    for earlier in folder.glob(f"{name}.[0-9][0-9]"):
        earlier.unlink()
    parts = [content[start : start + most] for start in range(0, len(content), most)]
    for index, part in enumerate(parts):
        with staged(part_of(folder, name, index)) as scratch:
            scratch.write_bytes(part)
    manifest = {
        "whole": dataclasses.asdict(fingerprint(content)),
        "parts": [dataclasses.asdict(fingerprint(part)) for part in parts],
    }
    write_whole(manifest_of(folder, name), json.dumps(manifest, indent=1))
    return len(parts) + 1


def unpack(folder: Path, name: str) -> bytes:
    """Return the content of a parcel.

    Raises:
      InvalidInput: The manifest or parts are missing or damaged. The message names them all.
    """
    whole, expected = read_manifest(folder, name)
    paths = [part_of(folder, name, index) for index in range(len(expected))]
    parts = [path.read_bytes() if path.is_file() else b"" for path in paths]
    wrong = [
        f"{path.name} is {'damaged' if path.is_file() else 'missing'}"
        for path, part, known in zip(paths, parts, expected, strict=True)
        if fingerprint(part) != known
    ]
    if wrong:
        raise InvalidInput(
            f"{folder}: {', '.join(wrong)}, of {len(paths)} parts: bring them and {name}.json again"
        )
    content = b"".join(parts)
    if fingerprint(content) != whole:
        raise InvalidInput(f"{manifest_of(folder, name)} is damaged: bring it again")
    return content


def read_manifest(folder: Path, name: str) -> tuple[Fingerprint, list[Fingerprint]]:
    """Return what a parcel's manifest says of the whole and of each part.

    Raises:
      InvalidInput: It is missing or damaged.
    """
    path = manifest_of(folder, name)
    if not path.is_file():
        raise InvalidInput(f"{path} is missing: bring this manifest with the parts {name}.00 and so on")
    try:
        held = json.loads(path.read_bytes())
        return Fingerprint(**held["whole"]), [Fingerprint(**part) for part in held["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is damaged: bring it again") from error
