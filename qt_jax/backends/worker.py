"""Perform one step of a backend (compile, run or time) in a separate process: `python worker.py JOB.json`.

The harness (`qt_jax.backends.steps`) writes JOB.json and starts this file by its path. The interpreter may
be that of a vendor's environment, without jax. `qt_jax`, `qt_jax.backends` and `qt_jax.export` are therefore
bare packages here, whose `__init__` is not run, and this file imports nothing of the project. The reply goes
to the file that the job names as its `answer`, whole or not at all.
"""

import ctypes
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LARGEST_FILE = 16 * 2**30
"""The largest file in bytes that a step may write. It stops a tool that writes without end."""
WARM_UP, MAX_CALLS, MAX_SECONDS = 10, 300, 3.0
"""Calls before the clock starts; calls and seconds after which timing ends."""


def main(path: str) -> None:
    """Perform the step that the job file at `path` describes, and write the reply.

    The reply holds `result`, or `error` and `refused`, and `seconds`. What a tool raises while it compiles
    counts as a refusal, unless the machine failed: out of memory, OSError or ImportError.
    """
    job = json.loads(Path(path).read_text())
    _die_with_parent()
    limit = job["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    backend = load_backend(job["backend_file"])
    [scheme] = [scheme for scheme in backend.schemes if scheme.name == job["scheme"]]
    step = {"compile": _compile, "run": _run, "time": _time}[job["step"]]
    started = time.perf_counter()
    try:
        reply: dict[str, Any] = {"result": step(backend, scheme, job)}
    except MemoryError as error:
        message = f"out of memory at its limit of {limit / 2**30:g} GiB {error}".rstrip()
        reply = {"error": message, "refused": False}
    except Exception as error:
        import traceback

        traceback.print_exc()
        name = "" if type(error).__name__ == "Refused" else f"{type(error).__name__}: "
        machine_failed = isinstance(error, OSError | ImportError)
        reply = {"error": f"{name}{error}", "refused": job["step"] == "compile" and not machine_failed}
    reply["seconds"] = round(time.perf_counter() - started, 3)
    _write(Path(job["answer"]), json.dumps(reply, allow_nan=False).encode())


def _die_with_parent() -> None:
    """End this process with its parent, so that a killed harness leaves no simulator behind (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def load_backend(file: str) -> Any:
    """Load the module at `file` and return its `BACKEND`.

    The modules beside it and those of `qt_jax` and `qt_jax.export` can be imported. The `__init__` of these
    packages is not run, because it needs jax.
    """
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    places = {"qt_jax": folder.parent, "qt_jax.backends": folder, "qt_jax.export": folder.parent / "export"}
    for name, place in places.items():
        package = types.ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package
    spec = importlib.util.spec_from_file_location(f"qt_jax.backends.{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.BACKEND


def _compile(backend: Any, scheme: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Compile the source; return model_bytes, operators and measured."""
    calibration = np.asarray(np.load(job["calibration"], mmap_mode="r"))
    Path(job["compiled"]).mkdir()
    compiled = backend.compile(Path(job["source"]), calibration, scheme, Path(job["compiled"]))
    return {
        "model_bytes": compiled.model_bytes,
        "operators": {name: dict(counts) for name, counts in compiled.operators.items()},
        "measured": dict(compiled.measured),
    }


def _run(backend: Any, scheme: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Run all images, save their logits, and return how many there are. Progress goes to the log."""
    session, batch, inputs = _session(backend, scheme, job)
    logits, reported = [], time.perf_counter()
    for start in range(0, len(inputs), batch):
        logits.append(np.asarray(session(np.ascontiguousarray(inputs[start : start + batch])), np.float32))
        if time.perf_counter() - reported > 10:
            reported = time.perf_counter()
            print(f"{start + len(logits[-1])} of {len(inputs)} images", flush=True)
    scratch = f"{job['logits']}.partial.npy"
    np.save(scratch, np.concatenate(logits))
    os.replace(scratch, job["logits"])
    return {"n": len(inputs)}


def _time(backend: Any, scheme: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Measure milliseconds and millijoules of single images, and images per second at the larger batch."""
    session, batch, inputs = _session(backend, scheme, job)
    before = _joules()
    single = _clock(session, inputs[:1])
    after = _joules()
    used = None if before is None or after is None else after - before
    calls = WARM_UP + len(single)
    result = {
        "energy_mj": None if used is None or used < 0 else 1e3 * used / calls,
        "latency_ms_p50": round(1e3 * float(np.percentile(single, 50)), 4),
        "latency_ms_p99": round(1e3 * float(np.percentile(single, 99)), 4),
        "throughput_ips": round(1 / float(np.median(single)), 2),
        "throughput_batch": 1,
    }
    if batch > 1:
        size = min(batch, len(inputs))
        rate = size / float(np.median(_clock(session, inputs[:size])))
        result |= {"throughput_ips": round(rate, 2), "throughput_batch": size}
    return result


def _session(backend: Any, scheme: Any, job: dict[str, Any]) -> tuple[Any, int, np.ndarray]:
    """Load what was compiled; return its session, the batch to run it at, and the inputs."""
    [runtime] = [runtime for runtime in backend.runtimes if runtime.name == job["runtime"]]
    batch = 1 if scheme.dynamic else min(runtime.batch, job["max_batch"] or runtime.batch)
    inputs = np.load(job["inputs"], mmap_mode="r")[: job["n"]]
    return backend.load(Path(job["compiled"]), scheme, runtime), batch, inputs


def _clock(session: Any, images: np.ndarray) -> np.ndarray:
    """Return the seconds of each of several calls."""
    images = np.ascontiguousarray(images)
    for _ in range(WARM_UP):
        session(images)
    seconds: list[float] = []
    ends = time.perf_counter() + MAX_SECONDS
    while len(seconds) < MAX_CALLS and (not seconds or time.perf_counter() < ends):
        started = time.perf_counter()
        session(images)
        seconds.append(time.perf_counter() - started)
    return np.asarray(seconds)


def _joules() -> float | None:
    """Return the joules that all CPU packages have used so far, by RAPL; None where it cannot be read."""
    try:
        zones = Path("/sys/class/powercap").glob("*-rapl:*")
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        readings = [int((zone / "energy_uj").read_text()) for zone in packages]
    except (OSError, ValueError):
        return None
    return 1e-6 * sum(readings) if readings else None


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_bytes(content)
    os.replace(scratch, path)


if __name__ == "__main__":
    main(sys.argv[1])
