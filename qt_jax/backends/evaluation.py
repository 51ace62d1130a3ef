"""Run one float model through backends, schemes and runtimes, and return one record for each of them.

A row that is refused, crashes, hangs or lacks its toolchain has a record that says so.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from qt_jax import records
from qt_jax.backends import cost, ort, steps
from qt_jax.backends.inputs import fixed_batch, load, prepare
from qt_jax.backends.protocol import Backend, Runtime, Scheme
from qt_jax.backends.registry import BACKENDS, select
from qt_jax.backends.rows import Evaluation, EvaluationJob
from qt_jax.errors import InvalidInput
from qt_jax.export.storage import model_sha256, save
from qt_jax.files import staged
from qt_jax.records import Record
from qt_jax.scheduler import HERE, Scheduler, open_queue

RECORDS = "records.jsonl"
NO_IDENTITY: Mapping[str, Any] = MappingProxyType({})


def evaluate(
    model: onnx.ModelProto | str | Path,
    calibration: np.ndarray,
    test_set: tuple[np.ndarray, np.ndarray],
    *,
    backends: str | Sequence[str] = "all",
    schemes: Sequence[str] | None = None,
    runtimes: Sequence[str] | None = None,
    limit: int | None = None,
    simulated_limit: int | None = 500,
    jobs: int = 1,
    limits: steps.Limits | None = None,
    folder: str | Path | None = None,
    identity: Mapping[str, Any] = NO_IDENTITY,
    price_per_hour: float | None = None,
    retry: bool = False,
    scheduler: Scheduler = HERE,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Measure accuracy, fidelity and speed of a float network under every backend, scheme and runtime.

    The network is a classifier or a segmenter. For a segmenter `top1` is the pixel accuracy, `miou` is
    filled, all other metrics are over pixels (see `qt_jax.metrics`), and a record holds no `predictions`.

    The first row is always FP32 in ONNX Runtime. It is the reference of `logit_mse`, `sqnr_db`, `agreement`
    and `reference_top1`. Every other row compiles, runs and is timed in separate processes. A row that is
    refused, crashes, hangs or lacks its toolchain gives a record with its status and reason, and the other
    rows go on.

    Args:
        model: A float ONNX model, or the path of one. It has one input, and its first output is logits
            `(n, classes)`, or `(n, classes, height, width)` for a segmenter.
        calibration: Images `(n, ...)` float32, as the model's input takes them (NCHW for our exports). Every
            vendor's quantizer gets these same images.
        test_set: Images `(n, ...)` float32, as `calibration`, and labels `(n,)`, or `(n, height, width)` for
            a segmenter, integers.
        backends: "all", or names from `BACKENDS`.
        schemes: Names of the schemes to run besides the reference; None for all.
        runtimes: Names of the runtimes to run besides the reference's; None for all.
        limit: Number of test images, from the first; None for all.
        simulated_limit: Number of test images on runtimes that imitate hardware, which are slow; None for as
            many as elsewhere.
        jobs: Number of rows to run in parallel. Timing always has the machine to itself, after all rows have
            run.
        limits: Limits on the seconds of each step and the GiB of each of its processes; None for the
            defaults of `Limits`.
        folder: Keeps records.jsonl, logs, compiled models and logits. What is found there is not done again.
            None uses a temporary folder.
        identity: Keys of the records that say what was evaluated: run, task, model, method, seed, checkpoint.
        price_per_hour: Price of this machine, in USD; None for `cost.PRICE_PER_CPU_HOUR` per CPU.
        retry: Whether to rerun rows that failed the last time.
        scheduler: Runs the compiles and the simulators, `jobs` at a time. All other steps run here.
        on_record: Called with each new record as soon as it is complete.

    Returns:
        The records (see `qt_jax.records`), the reference first, then by backend, scheme and runtime.

    Raises:
        InvalidInput: A backend, scheme or runtime is unknown, the arrays do not fit, the model does not run,
            or the scheduler is unavailable.

    Example:
        >>> import onnx.parser
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ... g (float[b, 3] input) => (float[b, 3] logits) { logits = Relu(input) }''')
        >>> images = np.eye(3, dtype=np.float32)
        >>> [record] = evaluate(model, images, (images, np.arange(3)), schemes=[], identity={"seed": 0})
        >>> record["scheme"], record["top1"], record["seed"]
        ('fp32', 1.0, 0)
    """
    chosen = select_rows(backends, schemes, runtimes)
    limits = steps.Limits() if limits is None else limits
    price = cost.PRICE_PER_CPU_HOUR * (os.cpu_count() or 1) if price_per_hour is None else price_per_hour
    _check_settings(limit, simulated_limit, jobs, limits, price)
    calibration = np.asarray(calibration)
    images, labels = (np.asarray(array)[:limit] for array in test_set)
    model = prepare(load(model), calibration, images, labels)
    if folder is None and scheduler.launcher == "slurm":
        raise InvalidInput("Slurm's jobs need a folder that all hosts share: give one.")
    with _home(folder) as home, open_queue(scheduler, home / "work" / "jobs") as queue:
        job = _prepare_job(home, model, calibration, images, labels, identity, limits, price, retry)
        job = replace(job, queue=queue)
        simulated = len(images) if simulated_limit is None else min(simulated_limit, len(images))
        rows = [Evaluation(job, b, s, r, simulated if r.simulated else len(images)) for b, s, r in chosen]
        return _finish(job, rows, jobs, on_record)


def select_rows(
    backends: str | Sequence[str] = "all",
    schemes: Sequence[str] | None = None,
    runtimes: Sequence[str] | None = None,
) -> list[tuple[Backend, Scheme, Runtime]]:
    """Return the backend, scheme and runtime of every row that `evaluate` makes of one model.

    Args:
      backends: As `evaluate` takes them.
      schemes: As `evaluate` takes them.
      runtimes: As `evaluate` takes them.

    Returns:
      The rows, the reference first.

    Raises:
      InvalidInput: A backend, scheme or runtime is unknown.

    >>> [(b.name, s.name, r.name) for b, s, r in select_rows("onnxruntime", ["int8-dynamic"], ["optimized"])]
    [('onnxruntime', 'fp32', 'reference'), ('onnxruntime', 'int8-dynamic', 'optimized')]
    """
    reference = (BACKENDS[ort.BACKEND.name], ort.FP32, ort.REFERENCE)
    rows = [(b, s, r) for b in select(backends) for s in b.schemes for r in b.runtimes]
    for what, names, name_of in (
        ("schemes", schemes, lambda row: row[1].name),
        ("runtimes", runtimes, lambda row: row[2].name),
    ):
        if names is None:
            continue
        known = {name_of(row) for row in [*rows, reference]}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InvalidInput(
                f"No chosen backend offers the {what} {unknown}: choose among {sorted(known)}."
            )
        rows = [row for row in rows if name_of(row) in names]
    return [reference, *(row for row in rows if row != reference)]


def _check_settings(
    limit: int | None, simulated_limit: int | None, jobs: int, limits: steps.Limits, price: float
) -> None:
    """Raise InvalidInput for a setting that is out of range."""
    positive: dict[str, float | None] = {"limit": limit, "simulated_limit": simulated_limit, "jobs": jobs}
    positive |= {"the time limit": limits.seconds, "the memory limit": limits.gibibytes}
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise InvalidInput(f"{name} must be above 0, got {value}.")
    if price < 0:
        raise InvalidInput(f"The price of an hour cannot be {price}: give 0 or more.")


@contextmanager
def _home(folder: str | Path | None) -> Iterator[Path]:
    """Make the folder of an evaluation, or a temporary one that is deleted afterwards."""
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{folder} cannot be made: {error.strerror}. Choose another.") from error
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="qt_jax-") as temporary:
        yield Path(temporary)


def _prepare_job(
    home: Path,
    model: onnx.ModelProto,
    calibration: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    identity: Mapping[str, Any],
    limits: steps.Limits,
    price: float,
    retry: bool,
) -> EvaluationJob:
    """Write the model and the arrays to files named by their content, and return what all rows share."""
    data = home / "data"
    data.mkdir(exist_ok=True)
    arrays = {"calibration": calibration, "images": images, "labels": labels}
    hashes = {"model": model_sha256(model)}
    hashes |= {name: _digest(array) for name, array in arrays.items()}
    paths = {name: data / f"{name}-{hashes[name][:12]}.npy" for name in ("calibration", "images")}
    paths["model"] = data / f"model-{hashes['model'][:12]}.onnx"
    for name, path in paths.items():
        if path.exists():
            continue
        if name == "model":
            save(model, path)
            continue
        with staged(path) as scratch, scratch.open("wb") as file:
            np.save(file, arrays[name])
    return EvaluationJob(
        home,
        model=paths["model"],
        calibration=paths["calibration"],
        images=paths["images"],
        labels=labels,
        hashes=hashes,
        limits=limits,
        identity=identity,
        calibration_size=len(calibration),
        max_batch=fixed_batch(model),
        work=cost.work(model),
        price_per_hour=price,
        retry=retry,
    )


def _digest(array: np.ndarray) -> str:
    description = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(description + np.ascontiguousarray(array).tobytes()).hexdigest()


def _finish(
    job: EvaluationJob, rows: list[Evaluation], jobs: int, on_record: Callable[[Record], None] | None
) -> list[Record]:
    """Return the records of all rows: those found in the folder, and those made now.

    Rows run in parallel, except that timed ones are timed one by one after all rows have run.
    """
    steps.STOPPING.clear()
    path = job.folder / RECORDS
    found = {record.get("key"): record for record in records.read(path)}
    if None in found:
        raise InvalidInput(f"{path} was written by another command: choose another folder for this one.")

    def known(row: Evaluation) -> bool:
        record = found.get(row.key)
        if record is None or (job.retry and record["status"] != "ok"):
            return False
        if record["status"] in ("timeout", "crashed") and job.limits.exceed(record["limits"]):
            return False
        return record["status"] != "unavailable" or record["reason"] == row.missing()

    def keep(row: Evaluation, reference: np.ndarray | None) -> None:
        record = row.record(reference)
        records.append(path, record)
        found[row.key] = record
        if on_record is not None:
            on_record(record)

    reference_row, *others = rows
    pending = [row for row in others if not known(row)]
    if pending or not known(reference_row):
        reference = _reference(reference_row)
        if not known(reference_row):
            keep(reference_row, None)
        ready = [row for row in pending if row.missing() is None]
        for row in pending:
            if row not in ready:
                keep(row, reference)
        for row in _in_parallel(ready, jobs):
            if not row.runtime.timed:
                keep(row, reference)
        for row in ready:
            if row.runtime.timed:
                keep(row, reference)
    return [found[row.key] for row in rows]


def _in_parallel(rows: Sequence[Evaluation], jobs: int) -> Iterator[Evaluation]:
    """Run rows in a pool of `jobs` threads and yield each, in order. An interruption ends all workers."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [(row, pool.submit(row.run)) for row in rows]
        try:
            for row, finished in running:
                finished.result()
                yield row
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            steps.stop_all()
            raise


def _reference(row: Evaluation) -> np.ndarray:
    """Return the logits of the float model. Raises InvalidInput if they cannot serve as a reference."""
    answer = row.run()
    if answer.status != "ok":
        log = answer.folder / steps.LOG
        raise InvalidInput(
            f"ONNX Runtime cannot run the float model to compare with: {answer.reason} (log: {log}; "
            "limits: --timeout, --memory)"
        )
    logits = row.logits()
    labels = row.job.labels[: row.n]
    if logits.ndim < 2 or logits.shape != (row.n, logits.shape[1], *labels.shape[1:]):
        needed = "classes" if labels.ndim == 1 else f"classes, {labels.shape[1]}, {labels.shape[2]}"
        raise InvalidInput(
            f"The float model's first output has shape {logits.shape} for {row.n} images; labels of shape "
            f"{labels.shape} need logits (n, {needed})."
        )
    broken = int(np.sum(~np.isfinite(logits.reshape(row.n, -1)).all(axis=1)))
    if broken:
        raise InvalidInput(
            f"The float model cannot serve as a reference: logits of {broken} of {row.n} images are not "
            "finite."
        )
    return logits
