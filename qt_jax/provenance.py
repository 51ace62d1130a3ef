"""Tell where a number comes from: software versions, CPU, commit, date and command."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ARITHMETIC_FLAGS = (
    *("fma", "avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""CPU flags that decide which kernels a runtime picks. Without VNNI, int8 products may saturate on x86."""


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """Return the record keys versions, cpu, accelerator, commit, date and command, as of now.

    `accelerator` is null. A program that does not run on the CPU overwrites it.

    Args:
      packages: Names of the packages whose versions are recorded.

    >>> sorted(provenance(["numpy"]))
    ['accelerator', 'command', 'commit', 'cpu', 'date', 'versions']
    """
    return {
        "versions": versions(packages),
        "cpu": cpu(),
        "accelerator": None,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
    }


def command() -> str:
    """Return the command line of this process, with `python -m` if a module was run."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else None
    program = ["python", "-m", name] if name else [os.path.basename(sys.argv[0])]
    return shlex.join([*program, *sys.argv[1:]])


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of Python and of each package, None for a package that is not installed.

    >>> versions(["no-such-package"])["no-such-package"] is None
    True
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return model, core count and flags of the CPU.

    `flags` are those of `ARITHMETIC_FLAGS` that the CPU has, or None if they cannot be read.
    """
    fields = {"model name": platform.processor() or platform.machine()}
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "flags", "Features"):
                fields[key.strip()] = value.strip()
    except OSError:
        pass
    listed = fields.get("flags", fields.get("Features"))
    flags = None if listed is None else [flag for flag in ARITHMETIC_FLAGS if flag in listed.split()]
    return {"model": fields["model name"], "cores": os.cpu_count(), "flags": flags}


@functools.cache
def commit(file: Path = Path(__file__)) -> str | None:
    """Return the commit that `file` stands at, with "-dirty" if tracked files differ from it.

    Return None if git is missing, has no commit yet, or does not track `file`. An installed package that
    happens to lie inside somebody's repository must not be labelled with that repository's commit.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], check=True, capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
