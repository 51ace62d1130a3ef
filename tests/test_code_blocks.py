"""Check every code block of README and of the documentation: run Python, run or parse commands.

The Python blocks of one page run one after the other in one namespace, in a folder that looks like the root
of the repository. A Python block that begins with `# NAME.py` is written to that file, and the next block
imports it. A `text` block right after a Python block holds what that block prints.
"""

import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from experiments.configs.training import PRESETS, SEGMENTATION_PRESETS, Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "bash", "text", "diff", "bibtex", "json"}

RUN = (
    "python -m qt_jax.backends list",
    "python -m qt_jax.backends doctor",
    "python -m qt_jax.export experiments/results/cifar10-resnet8 --out runs/model.onnx",
    "python -m qt_jax.export experiments/results/cifar10-resnet8 --out runs/q.onnx --qdq int8",
    "python -m qt_jax.export experiments/results/cifar10-resnet8 --out runs/clips.onnx --clips",
    "python -m experiments.report experiments/results/cifar10-resnet8 --out runs/report.html",
    "python -m experiments.paper --list",
)
"""Commands that the test runs. All others train, measure, download or need a vendor. They are only parsed."""

OPTIONS = {
    "experiments.cifar": (Config, PRESETS["cpu"]),
    "experiments.segmentation": (Config, SEGMENTATION_PRESETS["cpu"]),
    "qt_jax.backends": "Command",
    "experiments.accelerator.parcels": "Command",
}
"""Module -> the class that its flags are parsed into, with defaults. Other modules have a class `Options`."""

HOMES = {"qt_jax.equalize": "qt_jax.equalization.command"}
"""Command that refuses to be imported -> the module that holds its class `Options`."""

OTHER_COMMANDS = {
    "python -m venv .venv": None,
    "source .venv/bin/activate": None,
    "pip install -r": ROOT,
    "pip install -qr": ROOT,
    "pip install -e .": ROOT / "pyproject.toml",
    "mkdir -p runs/own": None,
    "cd runs/own": None,
    "python ../../docs/examples/": ROOT / "tests" / "test_own_model.py",  # which runs them
    "ruff check .": ROOT / "pyproject.toml",
    "ruff format --check .": ROOT / "pyproject.toml",
    "pip download --no-deps --only-binary=:all:": ROOT / "experiments" / "accelerator" / "wheels.txt",
    "bash experiments/accelerator/start.sh": ROOT / "docs" / "guides" / "accelerator.md",
    "pip download --no-deps rapidocr-onnxruntime==1.4.4": ROOT / "experiments" / "text_direction.py",
}
"""Command -> the file that holds the command or its requirement. These commands are not run."""


def blocks(page):
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


def commands(page):
    """Yield the words of each command in a page's shell blocks.

    Continued lines are joined, lines are split at `&&`, and comments are dropped. The programs of `.venv` and
    `python3` count as the programs of an active environment.
    """
    for language, text in blocks(page):
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    program = words[0].removeprefix(".venv/bin/").replace("python3", "python")
                    yield [program, *words[1:end]]
                    words = words[end + 1 :]


def with_language(*languages):
    found = [page for page in PAGES if languages[0] in {language for language, _ in blocks(page)}]
    return pytest.mark.parametrize("page", found, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Provide a working directory that links to the folders of the repository. New files lie beside them."""
    for name in ("docs", "experiments", "notebooks", "qt_jax", "requirements.txt", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_name_their_language(page):
    assert {language for language, _ in blocks(page)} <= LANGUAGES
    assert page.read_text().count("\n```") == 2 * len(blocks(page))


@with_language("python")
def test_python_runs(page, checkout, capsys, monkeypatch):
    namespace = {"__name__": page.stem}
    found = blocks(page)
    for (language, text), (following, printed) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "python":
            continue
        if name := re.match(r"# (\w+)\.py\n", text):
            (checkout / f"{name[1]}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name[1], raising=False)
            continue
        exec(compile(text, page.name, "exec"), namespace)
        output = capsys.readouterr().out
        if following == "text" and output:
            assert output.split() == printed.split()


@functools.cache
def documented():
    return {" ".join(words) for page in PAGES for words in commands(page)}


@pytest.mark.parametrize("command", RUN)
def test_cheap_commands_run(command, checkout, capsys):
    assert command in documented(), "no page has this command any more"
    module, *arguments = shlex.split(command)[2:]
    done = (0, 1) if arguments == ["doctor"] else (0,)  # 1: a toolchain is not installed here
    assert entry(module).main(arguments) in done
    assert capsys.readouterr().out


@with_language("bash")
def test_commands_parse(page, monkeypatch, checkout):
    for words in commands(page):
        line = " ".join(words)
        if words[:2] != ["python", "-m"] or words[2] == "venv":
            [known] = [prefix for prefix in OTHER_COMMANDS if line.startswith(prefix)] or [None]
            assert known is not None, f"{page.name}: say in this test what becomes of: {line}"
            check_other(known, line)
        elif words[2] == "pytest":
            check_pytest(words[3:])
        else:
            parse(words[2], words[3:])


def check_other(known, line):
    """Check that the file of the command exists and holds what the command needs."""
    where = OTHER_COMMANDS[known]
    if known in ("pip install -r", "pip install -qr"):
        assert all((where / name).is_file() for name in line.removeprefix(known).split())
    elif known.startswith("python ../"):
        script = line.split()[1].removeprefix("../../")
        assert (ROOT / script).is_file() and Path(script).name in where.read_text()
    elif known.startswith("pip download"):
        assert line in where.read_text()


def check_pytest(arguments):
    declared = (ROOT / "pyproject.toml").read_text()
    for before, word in zip([None, *arguments], arguments, strict=False):
        if before == "-m":
            assert f'"{word}:' in declared
        elif not word.startswith("-"):
            assert (ROOT / word).exists(), word


def entry(module):
    """Return the module that `python -m` runs."""
    found = importlib.import_module(HOMES.get(module, module))
    return importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found


def parse(module, arguments):
    """Fail with the message of tyro if the module does not take these arguments."""
    options = OPTIONS.get(module, "Options")
    default = {}
    if isinstance(options, tuple):
        options, default["default"] = options
    else:
        options = getattr(entry(module), options)
    try:
        tyro.cli(options, args=arguments, **default)
    except SystemExit as ended:
        raise AssertionError(f"python -m {module} does not take {' '.join(arguments)}") from ended
