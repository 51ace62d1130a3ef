"""Compile and run with a backend in the interpreter of its own environment, without the harness around it.

Tests of a backend can thereby look at its files and numbers, and pay for the start of a process only once.
"""

import pickle
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qt_jax.backends import environments, registry, worker
from qt_jax.backends.protocol import Backend, Compiled

_SCRIPT = """
import importlib.util, pathlib, pickle, sys
place, backend_file, job_file = sys.argv[1:]
spec = importlib.util.spec_from_file_location("worker", place)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
backend = worker.load_backend(backend_file)
job = pickle.loads(pathlib.Path(job_file).read_bytes())
answers = {}
for scheme in backend.schemes:
    if scheme.name not in job["schemes"]:
        continue
    folder = pathlib.Path(job["folder"], scheme.name)
    try:
        if "data" in job:
            session = backend.load(folder, scheme, backend.runtimes[0])
            found = session(job["data"])
            answers[scheme.name] = list(found) if isinstance(found, (list, tuple)) else [found]
        else:
            folder.mkdir(parents=True)
            source = pathlib.Path(job["source"])
            rest = scheme, folder, job["float_layers"]
            answers[scheme.name] = backend.compile(source, job["calibration"], *rest)
    except Exception as error:
        answers[scheme.name] = f"{type(error).__name__}: {error}"
pathlib.Path(job_file).with_suffix(".answer").write_bytes(pickle.dumps(answers))
"""


def compile_all(
    backend: Backend,
    model: onnx.ModelProto,
    calibration: np.ndarray | Mapping[str, np.ndarray],
    schemes: Sequence[str],
    folder: Path,
    float_layers: Sequence[str] = (),
) -> dict[str, Compiled | str]:
    """Return what each scheme reports, or its error. Compiled files lie in `folder / scheme`."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "source.onnx")
    job = {
        "source": str(folder / "source.onnx"),
        "calibration": calibration,
        "float_layers": list(float_layers),
    }
    return _perform(backend, job, schemes, folder)


def run_all(
    backend: Backend, data: np.ndarray | Mapping[str, np.ndarray], schemes: Sequence[str], folder: Path
) -> dict[str, list[np.ndarray] | str]:
    """Return the outputs of each scheme that `compile_all` left in `folder`, from another process."""
    return _perform(backend, {"data": data}, schemes, folder)


def _perform(
    backend: Backend, job: Mapping[str, Any], schemes: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run `_SCRIPT` in the environment of `backend`."""
    path = folder / "job"
    path.write_bytes(pickle.dumps({**job, "schemes": list(schemes), "folder": str(folder)}))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    subprocess.run(
        [
            environments.interpreter(backend.environment),
            "-c",
            _SCRIPT,
            worker.__file__,
            registry.file_of(backend),
            path.absolute(),
        ],
        env=environments.variables(backend.environment),
        cwd=scratch,
        check=True,
        capture_output=True,
    )
    return pickle.loads(path.with_suffix(".answer").read_bytes())
