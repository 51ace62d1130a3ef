"""Run `python -m qt_jax.backends list | doctor | install NAME... | run MODEL.onnx ...`."""

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from qt_jax.backends import environments, registry
from qt_jax.backends.arrays import first, read_arrays
from qt_jax.backends.evaluation import DATA
from qt_jax.backends.protocol import Environment
from qt_jax.command_line import Failed, exit_status, print_rows, read_flags, statuses, text_console
from qt_jax.comparison import ALL_ROWS_FAILED, INTERRUPTED, Settings, evaluate_all
from qt_jax.errors import InvalidInput
from qt_jax.reporting.pivot import METHOD_TITLES

TABLE_WIDTH = 120
"""Number of columns of tables that go to a file or a pipe."""
NOT_READY = "something is missing"


@dataclasses.dataclass(frozen=True)
class List:
    """List every toolchain, what it stands for, its schemes and its runtimes.

    Example:
        python -m qt_jax.backends list --json
    """

    json: bool = False
    """Print one JSON line per toolchain on stdout."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Tell what each toolchain lacks on this machine, and the command that mends it.

    Example:
        python -m qt_jax.backends doctor openvino litert
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("all",)
    """Names of backends, as `list` gives them, or "all"."""
    json: bool = False
    """Print one JSON line per toolchain on stdout."""


@dataclasses.dataclass(frozen=True)
class Install:
    """Build isolated environments for toolchains with uv, after showing their size and licence.

    Example:
        python -m qt_jax.backends install openvino --yes
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names of backends or environments, as `list` and `doctor` give them, or "all"."""
    yes: Annotated[bool, tyro.conf.arg(aliases=["-y"])] = False
    """Do not ask before downloading."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run float ONNX models through every toolchain, scheme and runtime, and report how each treats them.

    Relaunching the same command goes on where it stopped. A toolchain that refuses a model, crashes or is not
    installed gives a row that says so.

    Example:
        python -m qt_jax.backends run model.onnx --calibration c.npz --test t.npz --out deployed \\
            --backends onnxruntime openvino
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Float ONNX models of any kind. The file's name is the model's name in tables."""
    calibration: Path
    """Samples as the model takes them: .npz of "images" or one array per input, .npy, or a folder of .npy."""
    test: Path
    """The same, with "labels" if there are any. Without labels, outputs are compared with the float model."""
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes]


def _described(name: str, options: type, failure: str | None = None) -> Any:
    """Return tyro's configuration of a subcommand whose help also tells the exit statuses."""
    return tyro.conf.subcommand(name, description=f"{inspect.getdoc(options)}\n\n{statuses(failure)}")


Command = (
    Annotated[List, _described("list", List)]
    | Annotated[Doctor, _described("doctor", Doctor, NOT_READY)]
    | Annotated[Install, _described("install", Install)]
    | Annotated[Run, _described("run", Run, ALL_ROWS_FAILED)]
)
ABOUT = "Run float ONNX models through vendors' own toolchains, each in a separate environment."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, as `command_line.exit_status` does.

    The status is 1 if `doctor` finds that something is missing, or `run` has no row that ended well.
    """

    def parse_and_run() -> None:
        given = read_flags(Command, arguments, "qt_jax.backends", description=ABOUT)
        match given:
            case List():
                show_list(given, text_console(width=TABLE_WIDTH))
            case Doctor():
                show_doctor(given, text_console(width=TABLE_WIDTH, stderr=given.json))
            case Install():
                install(given, text_console(width=TABLE_WIDTH))
            case Run():
                run(given, text_console(width=TABLE_WIDTH, stderr=given.settings.json))

    return exit_status(parse_and_run, INTERRUPTED)


def show_list(command: List, console: Console) -> None:
    """Print all backends with their schemes and runtimes."""
    rows = registry.descriptions()
    if command.json:
        print_rows(rows)
    else:
        console.print(registry.descriptions_table(rows))


def show_doctor(command: Doctor, console: Console) -> None:
    """Print what each backend lacks on this machine.

    Raises:
      InvalidInput: A name is unknown.
      Failed: Something is missing.
    """
    rows = registry.readiness("all" if "all" in command.names else command.names)
    if command.json:
        print_rows(rows)
    else:
        console.print(registry.readiness_table(rows))
        console.print(f"Environments lie in {environments.root()} (QT_JAX_ENVIRONMENTS).")
    not_ready = [row["backend"] for row in rows if not row["ready"]]
    if not_ready:
        raise Failed(f"{len(not_ready)} of {len(rows)} toolchains lack something: {', '.join(not_ready)}")


def install(command: Install, console: Console) -> None:
    """Build those of the named environments that are missing, once the user agrees.

    Raises:
      InvalidInput: A name is unknown, the user does not agree, or `environments.install` fails.
    """
    wanted = {environment.name: environment for name in command.names for environment in _named(name)}
    if not wanted:
        names = " ".join(command.names) or "nothing"
        raise InvalidInput(f"{names}: no environment to install. `doctor` says what each backend lacks.")
    wanted = {name: it for name, it in wanted.items() if environments.missing(it) is not None}
    if not wanted:
        console.print("Nothing to do: everything is installed.")
        return
    for environment in wanted.values():
        console.print(f"{environment.name}: {environment.megabytes} MB, Python {environment.python}")
        console.print(f"  licences: {environment.licence}")
        console.print(f"  {', '.join((*environment.requirements, *environment.without_dependencies))}")
    agreed = command.yes or (sys.stdin.isatty() and console.input("Install? [y/N] ").strip().lower() == "y")
    if not agreed:
        raise InvalidInput("Nothing was installed: answer y, or give --yes.")
    for number, environment in enumerate(wanted.values(), start=1):
        console.print(f"[{number}/{len(wanted)}] {environment.name} -> {environments.location(environment)}")
        environments.install(environment)
    console.print("Done. `python -m qt_jax.backends doctor` tells what can run now.")


def _named(name: str) -> list[Environment]:
    """Return the environments that `name` stands for."""
    if name == "all":
        return [it for backend in registry.BACKENDS.values() for it in registry.environments_of(backend)]
    if name in registry.BACKENDS:
        return registry.environments_of(registry.BACKENDS[name])
    known = {it.name: it for it in _named("all")}
    if name not in known:
        names = sorted({*registry.BACKENDS, *known})
        raise InvalidInput(f"There is no backend or environment {name!r}: choose among {names}, or 'all'.")
    return [known[name]]


def run(command: Run, console: Console) -> None:
    """Read models and arrays from their files and evaluate them. Raises as `evaluate_all` does."""
    names = [_label(path) for path in command.models]
    if not names or len(set(names)) != len(names):
        raise InvalidInput(f"Give float ONNX models whose files have different names, got {names}.")
    for path in command.models:
        if not path.is_file():
            raise InvalidInput(f"{path} is not there: give the path of a float ONNX model.")
    size = command.settings.calibration_size
    if size is not None and size < 1:
        raise InvalidInput(f"--calibration-size must be above 0, got {size}.")
    scratch = command.settings.out / DATA
    ranged = read_arrays(command.calibration, scratch)
    calibration = first(ranged, size)
    test = read_arrays(command.test, scratch)
    shared = {"run": command.settings.out.resolve().name}
    models = [
        (path, {**shared, "model": label, "method": label})
        for path in command.models
        for label in [_label(path)]
    ]
    evaluate_all(models, calibration, test, command.settings, console)


def _label(path: Path) -> str:
    """Return the file's name without its suffix.

    The suffix stays where the name without it is a method of `METHOD_TITLES`: tables would show the file as
    that method.
    """
    return path.name if path.stem in METHOD_TITLES else path.stem


if __name__ == "__main__":
    sys.exit(main())
