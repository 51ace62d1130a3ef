"""Perform one step of a backend (compile, run or time) in a separate process: `python worker.py JOB.json`.

The harness (`qt_jax.backends.steps`) writes JOB.json and starts this file by its path. The interpreter may
be that of a vendor's environment, without jax. `qt_jax`, `qt_jax.backends` and `qt_jax.export` are therefore
bare packages here, whose `__init__` is not run, and this file imports nothing of the project. The reply goes
to the file that the job names as its `answer`, whole or not at all.
"""

import ctypes
import importlib.util
import json
import mmap
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
    job = json.loads(Path(path).read_text(encoding="utf-8"))
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
    """Compile the source; return model_bytes, operators, products and measured."""
    n = job["calibration_size"]
    calibration = _batch(
        {name: np.load(path, mmap_mode="r")[:n] for name, path in job["calibration"].items()}
    )
    Path(job["compiled"]).mkdir()
    arguments = (Path(job["source"]), calibration, scheme, Path(job["compiled"]))
    if not job["float_layers"]:
        compiled = backend.compile(*arguments)
    elif getattr(backend, "leaves_float", False):
        compiled = backend.compile(*arguments, job["float_layers"])
    else:
        raise _refusal()(f"{backend.name} has no way to leave layers in floating point")
    products = getattr(compiled, "products", None)
    return {
        "model_bytes": compiled.model_bytes,
        "operators": {name: dict(counts) for name, counts in compiled.operators.items()},
        "products": None if products is None else list(products),
        "measured": dict(compiled.measured),
    }


def _refusal() -> type[Exception]:
    """Return the protocol's exception, which exists once a backend is loaded."""
    from qt_jax.backends.protocol import Refused

    return Refused


def _run(backend: Any, scheme: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Run all samples, save their outputs, and return how many there are. Progress goes to the log."""
    session, batch, inputs = _session(backend, scheme, job)
    n = len(next(iter(inputs.values())))
    names = job["outputs"]
    Path(job["folder"]).mkdir()
    writers = [_Writer(Path(job["folder"], str(place)), n, names[name]) for place, name in enumerate(names)]
    reported = time.perf_counter()
    for start in range(0, n, batch):
        size = min(batch, n - start)
        found = session(_batch({name: _rows(array, start, size) for name, array in inputs.items()}))
        outputs = [found] if isinstance(found, np.ndarray) else list(found)
        if len(outputs) != len(names):
            raise ValueError(f"the session returned {len(outputs)} outputs, the graph has {', '.join(names)}")
        for writer, output in zip(writers, outputs, strict=True):
            writer.add(_number(np.asarray(output)), size)
        if time.perf_counter() - reported > 10:
            reported = time.perf_counter()
            print(f"{start + size} of {n} images", flush=True)
    for writer in writers:
        writer.close()
    return {"n": n}


def _batch(arrays: dict[str, np.ndarray]) -> Any:
    """Return the array of the one input, or the arrays of several by name."""
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _rows(array: np.ndarray, start: int, size: int) -> np.ndarray:
    """Copy rows of a memory-mapped array, whose pages then leave this process's memory."""
    rows = np.array(array[start : start + size], order="C")
    mapping = getattr(array, "_mmap", None)
    if isinstance(mapping, mmap.mmap):
        mapping.madvise(mmap.MADV_DONTNEED)
    return rows


def _number(output: np.ndarray) -> np.ndarray:
    """Return an output as float32, or as it is if it holds integers or truth values."""
    return output if output.dtype.kind in "biu" else np.asarray(output, np.float32)


class _Writer:
    """Write one output of all samples to a file, batch by batch.

    The file is `PLACE.npy`, an array `(n, ...)`. If the shape differs between samples it is `PLACE.npz`
    instead, with the shape of each sample (`shapes`) and all elements in a row (`values`).
    """

    def __init__(self, place: Path, n: int, batched: bool | None) -> None:
        self._path, self._n, self._batched = place.with_suffix(".npy"), n, batched
        self._file: Any = None
        self._row: tuple[Any, tuple[int, ...]] | None = None
        self._varied: list[np.ndarray] = []
        self._done = 0

    def add(self, output: np.ndarray, size: int) -> None:
        """Add the output of `size` samples. One without a batch axis in front is that of one sample."""
        rows = output if self._batched else output[None]
        if not rows.ndim or len(rows) != size:
            raise ValueError(f"an output has shape {output.shape} for {size} samples")
        row = (rows.dtype, rows.shape[1:])
        if self._row is None:
            self._row, self._file = row, self._path.open("wb")
            about = {"descr": np.lib.format.dtype_to_descr(row[0]), "fortran_order": False}
            np.lib.format.write_array_header_1_0(self._file, about | {"shape": (self._n, *row[1])})
        if self._file is not None and row != self._row:
            self._vary()
        if self._file is not None:
            self._file.write(rows.tobytes())
        else:
            self._varied += list(rows)
        self._done += size

    def _vary(self) -> None:
        """Take what was written so far back into memory: shapes differ."""
        dtype, shape = self._row or (np.float32, ())
        self._file.close()
        self._file = None
        count = self._done * int(np.prod(shape, dtype=np.int64))
        header = self._path.stat().st_size - count * np.dtype(dtype).itemsize
        written = np.fromfile(self._path, dtype, count, offset=header)
        self._varied = list(written.reshape(self._done, *shape))
        self._path.unlink()

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
            return
        ranks = {part.ndim for part in self._varied}
        if len(ranks) > 1:
            raise ValueError(f"an output has {sorted(ranks)} axes, which differs between samples")
        shapes = np.array([part.shape for part in self._varied], np.int64)
        values = np.concatenate([part.ravel() for part in self._varied])
        np.savez(self._path.with_suffix(".npz"), shapes=shapes, values=values)


def _time(backend: Any, scheme: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Measure milliseconds and millijoules of single images, and images per second at the larger batch."""
    session, batch, inputs = _session(backend, scheme, job)
    n = len(next(iter(inputs.values())))
    before = _joules()
    single = _clock(session, _batch({name: _rows(array, 0, 1) for name, array in inputs.items()}))
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
        size = min(batch, n)
        several = _batch({name: _rows(array, 0, size) for name, array in inputs.items()})
        rate = size / float(np.median(_clock(session, several)))
        result |= {"throughput_ips": round(rate, 2), "throughput_batch": size}
    return result


def _session(backend: Any, scheme: Any, job: dict[str, Any]) -> tuple[Any, int, dict[str, np.ndarray]]:
    """Load what was compiled; return its session, the batch to run it at, and the inputs by name."""
    [runtime] = [runtime for runtime in backend.runtimes if runtime.name == job["runtime"]]
    batch = 1 if scheme.dynamic else min(runtime.batch, job["max_batch"] or runtime.batch)
    inputs = {name: np.load(path, mmap_mode="r")[: job["n"]] for name, path in job["inputs"].items()}
    return backend.load(Path(job["compiled"]), scheme, runtime), batch, inputs


def _clock(session: Any, images: Any) -> np.ndarray:
    """Return the seconds of each of several calls."""
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
