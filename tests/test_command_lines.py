"""Test every command of the project: what its help says, and how it ends."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tyro

from qt_jax import command_line
from qt_jax.errors import InvalidInput

ROOT = Path(__file__).parents[1]
WORKER = "qt_jax.backends.worker"
"""The harness starts this module by its path with the file of a job. Users do not."""
SUBCOMMANDS = {
    "qt_jax.backends": ("list", "doctor", "install", "run"),
    "experiments.accelerator.parcels": ("data", "join", "send", "receive"),
}


def commands() -> list[str]:
    """Return the modules that `python -m` runs."""
    files = (path for package in ("qt_jax", "experiments") for path in (ROOT / package).rglob("*.py"))
    ending = 'if __name__ == "__main__":\n    sys.exit(main())\n'
    modules = (path.relative_to(ROOT).with_suffix("") for path in files if ending in path.read_text())
    return sorted(".".join(path.parts).removesuffix(".__main__") for path in modules)


COMMANDS = commands()
CASES = [(module, ()) for module in COMMANDS if module not in SUBCOMMANDS]
CASES += [(module, (name,)) for module, names in SUBCOMMANDS.items() for name in names]


def main_of(module: str) -> Any:
    """Return `main` of a command."""
    package = (ROOT / module.replace(".", "/")).is_dir()
    return importlib.import_module(f"{module}.__main__" if package else module).main


@pytest.fixture
def parsed(monkeypatch):
    """Collect what tyro is asked to parse."""
    asked: list[Any] = []
    original = tyro.cli

    def cli(options: Any, **settings: Any) -> Any:
        asked.append(options)
        return original(options, **settings)

    monkeypatch.setattr(tyro, "cli", cli)
    return asked


def options_of(asked: Any, subcommand: tuple[str, ...]) -> type:
    """Return the dataclass of a command's flags."""
    for choice in get_args(asked) if subcommand else ():
        bare = get_args(choice)[0]
        if bare.__name__.lower() == subcommand[0]:
            return bare
    return asked


def flags(options: type) -> list[tuple[type, str]]:
    """Return (class, field) of every flag, also of nested classes."""
    hints, found = get_type_hints(options), []
    for field in dataclasses.fields(options):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            found += flags(inner)
        else:
            found.append((options, field.name))
    return found


def documented(options: type) -> set[str]:
    """Return the fields of a class that a string follows."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(definition, ast.ClassDef)
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return {
        first.target.id
        for first, second in pairs
        if isinstance(first, ast.AnnAssign)
        and isinstance(first.target, ast.Name)
        and isinstance(second, ast.Expr)
        and isinstance(second.value, ast.Constant)
        and isinstance(second.value.value, str)
    }


def positional(options: type, name: str) -> bool:
    """Tell whether a field is given by its place, without a flag."""
    hint = get_type_hints(options, include_extras=True)[name]
    return get_origin(hint) is Annotated and tyro.conf.Positional in hint.__metadata__


def test_the_commands_are_found():
    assert {"qt_jax.export", "qt_jax.backends", "experiments.cifar", "experiments.paper.row"} <= {*COMMANDS}
    assert WORKER not in COMMANDS and len(COMMANDS) > 15


@pytest.mark.parametrize(("module", "subcommand"), CASES, ids=[" ".join((m, *s)) for m, s in CASES])
def test_help(module, subcommand, parsed, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(module)([*subcommand, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "\x1b" not in printed.out and "\r" not in printed.out
    assert printed.out.startswith(f"usage: python -m {module}")
    assert f"    python -m {module}" in printed.out, "no example"
    assert "Exit status: 0 done, " in printed.out
    options = options_of(parsed[-1], subcommand)
    for owner, name in flags(options):
        assert name in documented(owner), f"{owner.__name__}.{name} has no line that says what it is"
        if not positional(owner, name):
            assert f"-{name.replace('_', '-')}" in printed.out or f".{name.replace('_', '-')}" in printed.out
    assert str(ROOT) not in printed.out, "a folder of this machine"


@pytest.mark.parametrize(("module", "subcommand"), CASES, ids=[" ".join((m, *s)) for m, s in CASES])
def test_an_unknown_flag_is_wrong_input(module, subcommand, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(module)([*subcommand, "--no-such-flag"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "\x1b" not in printed.err


def raising(error: BaseException) -> Any:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InvalidInput("x is 3: give 2"), 2, "error: x is 3: give 2\n"),
        (command_line.Failed("two of three"), 1, "failed: two of three\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (command_line.Terminated(), 143, "interrupted\n"),
    ],
)
def test_exit_status(error, status, said, capsys):
    assert command_line.exit_status(raising(error)) == status
    assert capsys.readouterr() == ("", said)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.exit_status(lambda: 1 // 0)


@pytest.mark.parametrize("stderr", [False, True])
def test_no_colours_in_a_pipe_or_when_asked(stderr, monkeypatch, capsys):
    command_line.text_console(stderr=stderr).print("words", style="bold red")
    assert "".join(capsys.readouterr()) == "words\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    command_line.text_console(stderr=stderr).print("words", style="red")
    assert "\x1b[31m" in "".join(capsys.readouterr())
    monkeypatch.setenv("NO_COLOR", "1")
    command_line.text_console(stderr=stderr).print("words", style="red")
    assert re.search(r"\x1b\[\d*3\d", "".join(capsys.readouterr())) is None


@pytest.mark.parametrize("no_color", ["", "1"])
def test_help_has_colours_on_a_terminal_unless_told_otherwise(no_color, monkeypatch, capsys):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(SystemExit):
        main_of("experiments.diagnose")(["--help"])
    assert ("\x1b[" in capsys.readouterr().out) is (no_color == "")


def test_a_reader_that_has_seen_enough_is_no_defect():
    command = (sys.executable, "-m", "qt_jax.backends", "list")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
