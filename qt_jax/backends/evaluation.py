"""Run one float model through backends, schemes and runtimes, and return one record for each of them.

A row that is refused, crashes, hangs or lacks its toolchain has a record that says so.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx

from qt_jax import records
from qt_jax.backends import cost, ort, steps
from qt_jax.backends.arrays import LABELS, first, read_arrays, scan, stored, total_digest
from qt_jax.backends.fidelity import count_broken
from qt_jax.backends.inputs import Prepared, load, prepare
from qt_jax.backends.judging import Metric, choose, constant_outputs, metric_key, plain_labels
from qt_jax.backends.protocol import Backend, Batch, Runtime, Scheme
from qt_jax.backends.registry import BACKENDS, select
from qt_jax.backends.rows import Evaluation, EvaluationJob, Judge
from qt_jax.backends.samples import are_numbers, check_labels, range_warnings
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.sessions import open_unoptimized
from qt_jax.export.storage import model_sha256, save
from qt_jax.files import writing
from qt_jax.records import Record
from qt_jax.scheduler import HERE, Scheduler, open_queue

RECORDS = "records.jsonl"
DATA = "data"
"""The folder of the model and the arrays."""
NO_IDENTITY: Mapping[str, Any] = MappingProxyType({})

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
"""Types of what a layer puts out."""

FEW = 64
"""Number of calibration samples whose decisions are looked at."""

TestSet = Batch | tuple[Batch | str | Path, np.ndarray | None] | str | Path
"""What `evaluate` takes as a test set."""

_log = logging.getLogger("qt_jax")


def evaluate(
    model: onnx.ModelProto | bytes | str | Path,
    calibration: Batch | str | Path,
    test_set: TestSet,
    *,
    backends: str | Sequence[str] = "all",
    schemes: Sequence[str] | None = None,
    runtimes: Sequence[str] | None = None,
    outputs: Sequence[str] = (),
    metric: str | Metric | None = None,
    void_label: int | None = None,
    float_layers: str | None = None,
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

    The network may have any inputs and outputs that are tensors of numbers. Without labels each output is
    compared with that of the float network. With labels the output that they fit is judged:
    `qt_jax.backends.judging` tells how. For a segmenter `top1` is the pixel accuracy, `miou` is filled, and a
    record holds no `predictions`.

    The first row is always FP32 in ONNX Runtime. It is the reference of `logit_mse`, `sqnr_db`, `fidelity`,
    `agreement`, `reference_top1` and `reference_value`. Every other row compiles, runs and is timed in
    separate processes. A row that is refused, crashes, hangs or lacks its toolchain gives a record with its
    status and reason, and the other rows go on. What looks wrong with the network or its data is in each
    record's `warnings`, and is logged.

    Args:
        model: A float ONNX model, its bytes, or the path of one.
        calibration: Samples in the graph's own dtype and layout: the array `(n, ...)` of its one input,
            arrays by the names of its inputs, or a path that `arrays.read_arrays` reads. An input without a
            batch axis takes one more axis. Every vendor's quantizer gets these same samples.
        test_set: Samples, as `calibration`; or a pair of them and labels `(n, ...)` or None; or arrays by
            name, of which "labels" are the labels: no input may have this name. Arrays may be memory-mapped
            and larger than memory.
        backends: "all", or names from `BACKENDS`.
        schemes: Names of the schemes to run besides the reference; None for all.
        runtimes: Names of the runtimes to run besides the reference's; None for all.
        outputs: Names of the outputs to judge. The graph loses the others. None are left out by default.
        metric: A function of the outputs by name and the labels, or its name "module:function". Larger is
            better, unless it has an attribute `larger_is_better` that is False.
        void_label: The label of pixels that have no class, such as 255.
        float_layers: Regular expression that fully matches the names of the nodes to leave in floating
            point. Toolchains that cannot leave them refuse.
        limit: Number of test samples, from the first; None for all.
        simulated_limit: Number of test samples on runtimes that imitate hardware, which are slow; None for as
            many as elsewhere.
        jobs: Number of rows to run in parallel. Timing always has the machine to itself, after all rows have
            run.
        limits: Limits on the seconds of each step and the GiB of each of its processes; None for the
            defaults of `Limits`.
        folder: Keeps records.jsonl, logs, compiled models and outputs. What is found there is not done again.
            None uses a temporary folder.
        identity: Keys of the records that say what was evaluated: run, task, model, method, seed, checkpoint.
        price_per_hour: Price of this machine, in USD; None for `cost.PRICE_PER_CPU_HOUR` per CPU.
        retry: Whether to rerun rows that failed the last time.
        scheduler: Runs the compiles and the simulators, `jobs` at a time. All other steps run here.
        on_record: Called with each new record as soon as it is complete.

    Returns:
        The records (see `qt_jax.records`), the reference first, then by backend, scheme and runtime.

    Raises:
        InvalidInput: A backend, scheme or runtime is unknown, the arrays do not fit, the model is quantized
            or does not run, the folder cannot be written, or the scheduler is unavailable.

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
    if folder is None and scheduler.launcher == "slurm":
        raise InvalidInput("Slurm's jobs need a folder that all hosts share: give one.")
    float_model = load(model)
    with _home(folder) as home, writing(home):
        ranged, ranged_labels = split_labels(calibration, home / DATA)
        samples, labels = split_labels(test_set, home / DATA)
        check_labels(samples, labels)
        if metric is None and labels is not None:
            labels = plain_labels(labels)
        samples, labels = first(samples, limit), None if labels is None else labels[:limit]
        prepared = prepare(float_model, ranged, samples, outputs=outputs)
        del float_model  # `prepared` holds it, or a copy
        n = len(next(iter(prepared.samples.values())))
        known = ranged_labels if ranged_labels is not None and are_numbers(ranged_labels) else None
        judging = Judging(metric, void_label, known)
        named = named_layers(prepared.model, float_layers)
        with open_queue(scheduler, home / "work" / "jobs") as queue:
            job = _prepare_job(home, prepared, labels, identity, limits, price, retry)
            judged = (None if metric is None else metric_key(metric), void_label)
            job = replace(job, queue=queue, float_layers=named, judging=judged)
            simulated = n if simulated_limit is None else min(simulated_limit, n)
            rows = [Evaluation(job, b, s, r, simulated if r.simulated else n) for b, s, r in chosen]
            return _finish(job, rows, jobs, on_record, prepared, judging)


def _computing(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that compute floating-point numbers from the graph's inputs."""
    types = graph.element_types(model)
    constant = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
        elif any(types.get(name, onnx.TensorProto.FLOAT) in FLOATS for name in node.output):
            found.append(node)
    return found


class Judging(NamedTuple):
    """Hold what the caller says about judging.

    Attributes:
      metric: A metric of the caller's own; None for what the labels allow.
      void_label: The label of pixels without a class; None without any.
      calibration_labels: Labels of the calibration samples; None if they are not known.
    """

    metric: str | Metric | None
    void_label: int | None
    calibration_labels: np.ndarray | None


def split_labels(given: TestSet, scratch: Path) -> tuple[Batch, np.ndarray | None]:
    """Return the samples and the labels of what `evaluate` takes as a test set.

    Raises:
      InvalidInput: A path cannot be read, or a tuple has another number of parts.
    """
    if isinstance(given, str | Path):
        given = read_arrays(given, scratch)
    labels: Any = None
    if isinstance(given, Mapping):
        labels = given.get(LABELS)
        given = {name: array for name, array in given.items() if name != LABELS}
    elif isinstance(given, tuple | list):
        if len(given) not in (1, 2):
            raise InvalidInput(
                f"The test set has {len(given)} parts: give samples, or a pair of samples and labels."
            )
        given, labels = (*given, None)[:2]
    if isinstance(given, str | Path):
        given = read_arrays(given, scratch)
    samples: Batch = dict(given) if isinstance(given, Mapping) else np.asanyarray(given)
    labels = None if labels is None else np.asanyarray(labels)
    return samples, labels


def named_layers(model: onnx.ModelProto, pattern: str | None) -> tuple[str, ...]:
    """Return the names of the nodes that a pattern fully matches, in the order of the graph.

    Nodes that compute sizes, or depend on constants alone, do not count: toolchains fold them.

    Raises:
      InvalidInput: The pattern is no regular expression, or matches no node.

    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ... g (float[b, 3] x) => (float[b, 3] y) { [head] y = Relu(x) }''')
    >>> named_layers(model, "he.*")
    ('head',)
    """
    if pattern is None:
        return ()
    names = [node.name for node in _computing(model)]
    try:
        found = tuple(name for name in names if re.fullmatch(pattern, name))
        near = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise InvalidInput(f"--float-layers {pattern!r} is no regular expression: {error}.") from error
    if not found:
        hint = (
            f"it is part of {', '.join(near[:3])}: try '.*{pattern}.*'" if near else f"{', '.join(names[:8])}"
        )
        what = hint if near else f"the graph's nodes are {hint}{', ...' if len(names) > 8 else ''}"
        raise InvalidInput(f"--float-layers {pattern!r} matches the whole name of no node; {what}.")
    return found


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
    for name in ("limit", "simulated_limit", "jobs"):
        if positive[name] is not None and not isinstance(positive[name], int | np.integer):
            raise InvalidInput(f"{name} must be a whole number, got {positive[name]}.")
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
    prepared: Prepared,
    labels: np.ndarray | None,
    identity: Mapping[str, Any],
    limits: steps.Limits,
    price: float,
    retry: bool,
) -> EvaluationJob:
    """Write the model and the arrays to files named by their content, and return what all rows share.

    A memory-mapped `.npy` file stays where it is.
    """
    data = home / DATA
    data.mkdir(exist_ok=True)
    hashes = {"model": model_sha256(prepared.model), "labels": "" if labels is None else scan(labels).digest}
    paths: dict[str, dict[str, Path]] = {}
    for what, title, arrays in (
        ("calibration", "calibration", prepared.calibration),
        ("samples", "images", prepared.samples),
    ):
        digests = {name: found.digest for name, found in prepared.scans[what].items()}
        hashes[title] = total_digest(digests)
        paths[what] = {
            name: stored(array, data / f"{title}-{digests[name][:12]}.npy") for name, array in arrays.items()
        }
    model = data / f"model-{hashes['model'][:12]}.onnx"
    if not model.exists():
        save(prepared.model, model)
    return EvaluationJob(
        home,
        model=model,
        outputs=prepared.outputs,
        calibration=paths["calibration"],
        samples=paths["samples"],
        labels=labels,
        hashes=hashes,
        judging=(None, None),
        float_layers=(),
        limits=limits,
        identity=identity,
        calibration_size=len(next(iter(prepared.calibration.values()))),
        max_batch=1 if prepared.batch == 1 else None,
        work=cost.work(prepared.model),
        price_per_hour=price,
        retry=retry,
    )


def _finish(
    job: EvaluationJob,
    rows: list[Evaluation],
    jobs: int,
    on_record: Callable[[Record], None] | None,
    prepared: Prepared,
    judging: Judging,
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

    def keep(row: Evaluation, judge: Judge, is_reference: bool = False) -> None:
        record = row.record(judge, is_reference)
        with steps.lock(job.folder / "work" / RECORDS):  # another process may have made the row meanwhile
            found.update((kept.get("key"), kept) for kept in records.read(path))
            if not known(row):
                records.append(path, record)
                found[row.key] = record
        if on_record is not None:
            on_record(found[row.key])

    reference_row, *others = rows
    pending = [row for row in others if not known(row)]
    if pending or not known(reference_row):
        judge = _judge(reference_row, prepared, judging)
        for sentence in (*judge.warnings, *judge.notes):
            _log.warning(sentence)
        if not known(reference_row):
            keep(reference_row, judge, is_reference=True)
        ready = [row for row in pending if row.missing() is None]
        for row in pending:
            if row not in ready:
                keep(row, judge)
        for row in _in_parallel(ready, jobs):
            if not row.runtime.timed:
                keep(row, judge)
        for row in ready:
            if row.runtime.timed:
                keep(row, judge)
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


def _judge(row: Evaluation, prepared: Prepared, judging: Judging) -> Judge:
    """Run the float model and find out how all rows are judged.

    Raises:
      InvalidInput: The float model does not run, its outputs are not finite, or the labels do not fit them.
    """
    answer = row.run()
    if answer.status != "ok":
        log = answer.folder / steps.LOG
        raise InvalidInput(
            f"ONNX Runtime cannot run the float model to compare with: {answer.reason} (log: {log}; "
            "limits: --timeout, --memory)"
        )
    reference = row.outputs()
    labels = row.job.labels
    criterion, warnings, notes = choose(
        reference,
        labels,
        metric=judging.metric,
        void_label=judging.void_label,
        left_out=prepared.left_out,
    )
    for name in criterion.judged:
        if broken := count_broken(reference[name]):
            raise InvalidInput(
                f"The float model cannot serve as a reference: {name} of {broken} of {row.n} images are not "
                "finite. Choose other outputs with --output, or mend the data."
            )
    judged = {name: reference[name] for name in criterion.judged}
    found = [*warnings, *constant_outputs(judged), *range_warnings(prepared.scans)]
    if criterion.kind == "classes" and labels is not None and labels.ndim == 1:
        found += _calibration_warnings(prepared, criterion.judged[0], judging.calibration_labels)
    return Judge(criterion, reference, tuple(found), (*prepared.notes, *notes))


def _calibration_warnings(prepared: Prepared, output: str, labels: np.ndarray | None) -> list[str]:
    """Return a warning if all calibration samples are of one class, by labels or as the network decides."""
    arrays = {name: array[:FEW] for name, array in prepared.calibration.items()}
    n = len(next(iter(arrays.values())))
    if n < 2:
        return []
    how = "of class"
    if labels is None:
        session = open_unoptimized(prepared.model)
        size = min(prepared.batch, n)
        parts = (
            session.run([output], {name: array[i : i + size] for name, array in arrays.items()})[0]
            for i in range(0, n - n % size, size)
        )
        labels = np.concatenate([part.reshape(part.shape[:2]).argmax(axis=1) for part in parts])
        how = "taken for class"
    if len(np.unique(labels)) > 1:
        return []
    return [
        f"All calibration images looked at are {how} {labels.flat[0]}: ranges measured on one class do not "
        "hold for the others. Take images at random from the training set."
    ]
