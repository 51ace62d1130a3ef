"""What users install: the files of the wheel, its requirements, and what an import brings with it."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qt_jax as qt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")
UNASKED = ("onnx", "onnxruntime", "jax2onnx", "matplotlib", "markdown_it", "tyro", "psutil", "uv", "submitit")
"""Packages that `import qt_jax` leaves alone, as it does vendors' own."""
VENDORS = (
    "openvino",
    "nncf",
    "tensorflow",
    "ai_edge_litert",
    "nncase",
    "tensorrt",
    "torch",
    "quark",
    "ethosu",
)


def pinned(python: str) -> dict[str, Requirement]:
    """Package -> its line in requirements.txt, for one version of Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python}
    return {
        canonicalize_name(it.name): it for it in found if it.marker is None or it.marker.evaluate(environment)
    }


def stated(python: str) -> list[Requirement]:
    """Every requirement of the package on one version of Python, but the extras that name other extras."""
    lines = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    environment = {"python_version": python}
    return [
        it
        for it in map(Requirement, lines)
        if it.name != PROJECT["name"] and (it.marker is None or it.marker.evaluate(environment))
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_requirements_allow_what_is_tested(python):
    known = pinned(python)
    for requirement in stated(python):
        line = known[canonicalize_name(requirement.name)]
        [pin, *rest] = line.specifier
        exact = pin.operator == "==" and not rest
        allowed = requirement.specifier.contains(pin.version) if exact else None
        assert allowed or requirement.specifier == line.specifier, f"{requirement} does not suit {line}"


@pytest.mark.parametrize("python", PYTHONS)
def test_jax_and_flax_come_in_the_pair_that_is_tested(python):
    """No install may mix the pairs: flax 0.12.8 cannot import flax.nnx, which jax2onnx needs, on jax 0.11."""
    pairs = {version: (pinned(version)["jax"], pinned(version)["flax"]) for version in PYTHONS}
    asked = {it.name: it.specifier for it in stated(python)}
    for jax, flax in pairs.values():
        allowed = [asked[it.name].contains(next(iter(it.specifier)).version) for it in (jax, flax)]
        same = [str(it.specifier) for it in (jax, flax)] == [str(it.specifier) for it in pairs[python]]
        assert allowed == [same, same]


def test_extras_name_extras_that_exist():
    named = [Requirement(line) for lines in EXTRAS.values() for line in lines]
    for requirement in named:
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= EXTRAS.keys()
    [everything] = map(Requirement, EXTRAS["all"])
    assert everything.extras == EXTRAS.keys() - {"all"}


def test_the_wheel_holds_the_package_alone(tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
        [metadata] = [wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qt_jax").rglob("*.py")}
    about = {name for name in names if name.startswith(f"qt_jax-{qt.__version__}.dist-info/")}
    assert names - about == modules | {"qt_jax/py.typed"}
    assert f"\nVersion: {qt.__version__}\n" in metadata
    assert any(name.endswith("/LICENSE") for name in about)


def python(code: str) -> str:
    """What `code` prints in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def test_an_import_brings_nothing_unasked():
    names = set(qt.__all__) - {"equalize", "evaluate", "to_onnx", "to_qdq"}
    touch = f"[getattr(qt_jax, name) for name in {names}]"
    show = "print(*{name.partition('.')[0] for name in sys.modules})"
    assert "jax" not in python(f"import qt_jax, sys; {show}").split()
    loaded = python(f"import qt_jax, sys; {touch}; {show}").split()
    assert "jax" in loaded
    assert not {*UNASKED, *VENDORS, "experiments"} & {*loaded}


def test_missing_extras_are_named():
    code = (
        "import sys\n"
        "sys.modules['onnx'] = None\n"
        "import qt_jax as qt\n"
        "for name in ('to_onnx', 'evaluate'):\n"
        "    try:\n"
        "        getattr(qt, name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(error)\n"
    )
    assert python(code).splitlines() == [
        'onnx is missing: pip install "qt_jax[export]"',
        'onnx is missing: pip install "qt_jax[backends]"',
    ]


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == qt.__version__
    assert citation["license"] == PROJECT["license"]
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == qt.__version__
