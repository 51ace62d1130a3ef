"""Read the samples of a network from files, look through them once, and keep them where workers find them.

Samples may be larger than memory. An `.npy` file is memory-mapped, nothing here holds more than `CHUNK_BYTES`
of it at a time, and it is read in place: no copy is made. What is in memory, or compressed, is written to one
`.npy` file per array.
"""

import hashlib
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload
from zipfile import BadZipFile

import numpy as np

from qt_jax.backends.protocol import Batch
from qt_jax.errors import InvalidInput
from qt_jax.files import staged

Arrays = dict[str, np.ndarray]
"""Arrays by name."""

IMAGES, LABELS = "images", "labels"
"""Names of the array of a network with one input, and of what its outputs are compared with."""

CHUNK_BYTES = 2**26
"""Bytes of an array that are looked at together."""

JOINED = re.compile(r"joined-[0-9a-f]{12}\.npy")
"""Names of the files in which parts are joined."""

COPY_ON_WRITE = "c"
"""Mode of a memory map whose changes stay in memory."""

IN_MEMORY = 2**30
"""Bytes up to which the parts of a folder are joined in memory. Larger ones are joined in a file."""


def read_arrays(path: str | Path, scratch: Path | None = None) -> Arrays:
    """Read arrays from a file or a folder.

    ==================  ===============================================================================
    `.npz`              its arrays, in memory
    `.npy`              one array, memory-mapped, called "images"
    a folder            its `NAME.npy` and its subfolders NAME of parts, if an array is called "images"
                        or "labels" or if there are subfolders; else its files are parts of "images"
    ==================  ===============================================================================

    Parts are `.npy` files of equal shape but for the first axis. They are joined in the order of their names.

    Args:
      path: The file or the folder.
      scratch: Folder for parts that are joined in a file; None for the folder itself.

    Raises:
      InvalidInput: Something cannot be read, is not an array of numbers, or parts do not fit.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "c.npy"
    >>> np.save(path, np.zeros((2, 3)))
    >>> {name: array.shape for name, array in read_arrays(path).items()}
    {'images': (2, 3)}
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, scratch or path)
    if path.suffix == ".npy":
        return {IMAGES: _mapped(path)}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise InvalidInput(
            f"{path} cannot be read as an .npz file: {error}. Give an .npz or .npy file, or a folder of .npy "
            "files, that numpy wrote without pickled objects."
        ) from error


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInput(f"{path} cannot be read as an .npy file: {error}.") from error


def _read_folder(folder: Path, scratch: Path) -> Arrays:
    files = _parts(folder)
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and _parts(entry))
    if not files and not folders:
        raise InvalidInput(f"{folder} holds no .npy files: give the folder of the arrays, or one file.")
    named = {file.stem for file in files} & {IMAGES, LABELS}
    if not folders and not named:
        return {IMAGES: _joined(files, scratch)}
    found = {file.stem: _mapped(file) for file in files}
    return found | {entry.name: _joined(_parts(entry), scratch) for entry in folders}


def _parts(folder: Path) -> list[Path]:
    """Return the `.npy` files of a folder in the order of their names, where numbers count as numbers.

    Files that `_joined` has written are no parts.
    """

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(run), "") if run.isdigit() else (-1, run) for run in re.split(r"(\d+)", path.name)]

    return sorted((path for path in folder.glob("*.npy") if not JOINED.fullmatch(path.name)), key=order)


def _joined(files: list[Path], scratch: Path) -> np.ndarray:
    """Join the parts of one array along the first axis, in memory or in a file of `scratch`."""
    parts = [_mapped(file) for file in files]
    first = parts[0]
    for file, part in zip(files, parts, strict=True):
        if part.ndim == 0 or part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            raise InvalidInput(
                f"{file} holds {part.dtype} {part.shape} and {files[0]} {first.dtype} {first.shape}: the "
                "parts of an array have one dtype, and one shape but for the first axis."
            )
    if len(parts) == 1:
        return first
    if sum(part.nbytes for part in parts) <= IN_MEMORY:
        return np.concatenate(parts)
    shape = (sum(map(len, parts)), *first.shape[1:])
    marks = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    target = scratch / f"joined-{hashlib.sha256(repr(marks).encode()).hexdigest()[:12]}.npy"
    if not target.exists():
        with staged(target) as partial, partial.open("wb") as joined:
            _write_header(joined, first.dtype, shape)
            for part in parts:
                for chunk in chunks(part):
                    joined.write(np.ascontiguousarray(chunk).tobytes())
    return _mapped(target)


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of an array, as many at a time as `CHUNK_BYTES` hold, but at least one.

    The pages of a memory-mapped file do not stay in this process's memory once its rows have been looked at.

    >>> [chunk.shape for chunk in chunks(np.zeros((2, 3)))]
    [(2, 3)]
    """
    size = max(1, CHUNK_BYTES // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), size):
        yield array[start : start + size]
        release(array)


def release(array: np.ndarray) -> None:
    """Let the system take back the pages of a memory-mapped file that have been read.

    A file that was mapped to be changed in memory alone is left as it is: the changes would be lost.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        if getattr(base, "mode", None) == COPY_ON_WRITE:
            return
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


class Scan(NamedTuple):
    """Hold what one pass over an array found.

    Attributes:
      digest: SHA-256 of dtype, shape and content, in hexadecimal digits.
      finite: Whether every number is finite.
      low, high: Least and largest number, of the finite ones; both 0 where there is none.
      ranged: Whether these numbers are a range: there are floating-point numbers.
    """

    digest: str
    finite: bool
    low: float
    high: float
    ranged: bool = True


def scan(array: np.ndarray) -> Scan:
    """Look through an array of numbers once.

    >>> found = scan(np.array([1.0, np.inf, -2.0]))
    >>> found.finite, found.low, found.high
    (False, -2.0, 1.0)
    """
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    finite, low, high = True, np.inf, -np.inf
    for chunk in chunks(array) if array.ndim else [array]:
        digest.update(np.ascontiguousarray(chunk).data)
        values = chunk
        if np.issubdtype(array.dtype, np.inexact):
            good = np.isfinite(chunk)
            if not good.all():
                finite, values = False, chunk[good]
        if values.size and array.dtype.kind in "biuf":
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    low, high = (low, high) if low <= high else (0.0, 0.0)
    return Scan(digest.hexdigest(), finite, low, high, bool(array.size) and array.dtype.kind == "f")


@overload
def first(samples: np.ndarray, n: int | None) -> np.ndarray: ...
@overload
def first(samples: Mapping[str, np.ndarray], n: int | None) -> Arrays: ...
def first(samples: Batch, n: int | None) -> Batch:
    """Return the first `n` rows of an array or of several by name, or all for None.

    An array without axes stays as it is.

    >>> first(np.arange(5), 2), first({"x": np.array(3)}, 2)
    (array([0, 1]), {'x': array(3)})
    """
    if isinstance(samples, Mapping):
        return {name: first(array, n) for name, array in samples.items()}
    return samples[:n] if samples.ndim else samples


def stored(array: np.ndarray, target: Path) -> Path:
    """Return an `.npy` file that begins with the rows of `array`: the file that it maps, or `target`.

    `target` is written if it is not there. A reader takes the first `len(array)` rows.
    """
    if (own := _file_of(array)) is not None:
        return own
    if not target.exists():
        with staged(target) as scratch, scratch.open("wb") as file:
            _write_header(file, array.dtype, array.shape)
            for chunk in chunks(array) if array.ndim else [array]:
                file.write(np.ascontiguousarray(chunk).tobytes())
    return target


def _file_of(array: np.ndarray) -> Path | None:
    """Return the `.npy` file whose first rows are those of `array`; None if it maps no such file."""
    if not isinstance(array, np.memmap) or array.mode == COPY_ON_WRITE:
        return None
    name, mapping = array.filename, getattr(array, "_mmap", None)
    if name is None or not isinstance(mapping, mmap.mmap):
        return None
    try:
        whole = np.load(name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    start = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]  # the file's first byte
    place = array.__array_interface__["data"][0] - start
    rows = (whole.dtype, whole.shape[1:]) == (array.dtype, array.shape[1:]) and len(array) <= len(whole)
    same = rows and array.flags.c_contiguous and whole.flags.c_contiguous and place == whole.offset
    return Path(name).absolute() if same else None


def total_digest(digests: Mapping[str, str]) -> str:
    """Return one digest for the arrays of all inputs: that of the array itself where there is one input.

    >>> total_digest({"x": "ab"})
    'ab'
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
