"""Make one row: compile a scheme of a backend, run it on one runtime, and write down the result as a record.

A row has a key, the hash of everything that decides what its record says. The code of the backend is part of
the key, so that a changed backend compiles again (`code`).
"""

import ast
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from qt_jax.backends import cost, environments, steps
from qt_jax.backends.fidelity import Output, Outputs
from qt_jax.backends.judging import Criterion
from qt_jax.backends.measurement import measure
from qt_jax.backends.protocol import Backend, Runtime, Scheme
from qt_jax.backends.registry import BACKENDS, environments_of, file_of, scheme_of
from qt_jax.provenance import cpu, provenance
from qt_jax.records import Record, new_record
from qt_jax.scheduler import Queue

PACKAGE = Path(__file__).parents[1]
"""The folder of qt_jax, whose modules `code` follows."""
OUTPUTS = "outputs"
"""The folder of outputs in the folder of a run step, as the worker writes them."""
PRODUCTS = re.compile(r"conv|gemm|matmul|einsum|fully_?connected|gru|lstm|rnn", re.IGNORECASE)
"""Names of operators that multiply by kernels, in the words of all vendors."""
UNTIMED = "no product runs like this runtime, so that it is not timed"


@dataclass(frozen=True)
class EvaluationJob:
    """Hold what all rows of one evaluation share.

    Attributes:
      folder: The folder of the evaluation, which gets its steps.
      model: The ONNX file.
      outputs: The graph's outputs, and whether each has a batch axis in front; None if that is not certain.
      calibration: The `.npy` file of calibration samples by input. The first ones are meant.
      samples: The `.npy` file of test samples by input. The first ones are meant.
      labels: Labels `(n, ...)`; None without any.
      hashes: SHA-256 of "model", "calibration", "images" and "labels", which is "" without any.
      judging: What decides how outputs are judged, for the key: the metric and the void label.
      float_layers: Names of the nodes to leave in floating point.
      limits: What each step may take.
      identity: Keys of the records that say what was evaluated: run, task, model, method, seed, checkpoint.
      calibration_size: How many calibration images there are.
      max_batch: How many images the graph takes at once, if it fixes that number; else None.
      work: Operations and elements of one image; None if a shape is unknown.
      price_per_hour: Price of this machine, in USD.
      retry: Whether to perform a step again whose answer is not "ok".
      retried: Folders of the steps that were already retried. Rows that share a step retry it once.
      queue: The scheduler's queue, which takes the steps that do not depend on the machine; None without one.
      locks: With a queue, one lock per step, so that each is submitted once, and one (None) for all steps
        performed here, so that they take turns.
    """

    folder: Path
    model: Path
    outputs: Mapping[str, bool | None]
    calibration: Mapping[str, Path]
    samples: Mapping[str, Path]
    labels: np.ndarray | None
    hashes: Mapping[str, str]
    judging: tuple[str | None, int | None]
    float_layers: tuple[str, ...]
    limits: steps.Limits
    identity: Mapping[str, Any]
    calibration_size: int
    max_batch: int | None
    work: cost.Work | None
    price_per_hour: float
    retry: bool = False
    retried: set[Path] = field(default_factory=set)
    queue: Queue | None = None
    locks: dict[Path | None, Lock] = field(default_factory=dict)

    def perform(self, name: str, backend: Backend, step: Mapping[str, Any], anywhere: bool) -> steps.Answer:
        """Return the answer of a step, from its folder or by performing it.

        Args:
          name: The name of the step's folder.
          backend: The backend whose environment runs the step.
          step: What the worker reads.
          anywhere: Whether the step may run on another machine. With a queue it is then submitted.
        """
        folder = self.folder / "work" / name
        again = self.retry and folder not in self.retried
        self.retried.add(folder)
        if self.queue is None:
            return steps.perform(folder, backend.environment, step, self.limits, again)
        with self.locks.setdefault(folder if anywhere else None, Lock()):
            how = partial(steps.submit, self.queue) if anywhere else steps.perform
            return how(folder, backend.environment, step, self.limits, again)


@dataclass(frozen=True)
class Judge:
    """Hold what all rows of an evaluation are compared with.

    Attributes:
      criterion: What is judged.
      reference: Outputs of the float network for all samples.
      warnings: Sentences about what looks wrong with the network and its data.
      notes: Sentences about how the network was prepared and is judged.
    """

    criterion: Criterion
    reference: Outputs
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Evaluate a scheme of a backend on one runtime, over the first `n` test images of a job."""

    job: EvaluationJob = field(repr=False)
    backend: Backend
    scheme: Scheme
    runtime: Runtime
    n: int

    @cached_property
    def key(self) -> str:
        """Hash everything that decides what the record says, except the clock and the limits."""
        identity = sorted((name, str(value)) for name, value in self.job.identity.items() if name != "run")
        price = self.job.price_per_hour if self.runtime.timed else None
        return _hash(self._run_key, self.job.hashes["labels"], identity, price, self.job.judging)

    @cached_property
    def _run_key(self) -> str:
        compiled = _compile_key(self.job, self.backend, self.scheme)
        machine = cpu() if self.runtime.timed else None
        return _hash(compiled, self.job.hashes["images"], self.n, asdict(self.runtime), machine)

    def missing(self) -> str | None:
        """Return why this row cannot run on this machine, or None."""
        reasons = [environments.missing(needed) for needed in environments_of(self.backend)]
        return next(filter(None, [*reasons, self.backend.available()]), None)

    def run(self) -> steps.Answer:
        """Compile and run; return the answer of the last step that was reached."""
        compiled = compile_scheme(self.job, self.backend, self.scheme)
        return compiled if compiled.status != "ok" else self._step("run", compiled)

    def outputs(self) -> dict[str, Output]:
        """Return the outputs of a successful `run`, which is repeated if their files are damaged."""
        try:
            return read_outputs(self.run().folder / OUTPUTS, self.job.outputs)
        except (OSError, ValueError, EOFError, KeyError):
            shutil.rmtree(self.run().folder)
            return read_outputs(self.run().folder / OUTPUTS, self.job.outputs)

    def record(self, judge: Judge, is_reference: bool = False) -> Record:
        """Run the row and return its record.

        Args:
          judge: What the row is compared with.
          is_reference: Whether this row is the reference itself.
        """
        about: Record = {"warnings": list(judge.warnings), "notes": list(judge.notes)}
        about |= {"float_layers": list(self.job.float_layers), "products": None}
        reason = self.missing()
        if reason is not None:
            return self._record(about | {"status": "unavailable", "reason": reason}, 0.0)
        answer = self.run()
        log = str((answer.folder / steps.LOG).relative_to(self.job.folder))
        if answer.status != "ok":
            failed = {"status": answer.status, "reason": answer.reason, "log": log}
            return self._record(about | failed, answer.seconds)
        compiled = compile_scheme(self.job, self.backend, self.scheme)
        about |= {"model_bytes": compiled.result["model_bytes"], "operators": compiled.result["operators"]}
        products = quantized_products(compiled.result, self.scheme)
        about["products"] = products
        seconds = compiled.seconds + answer.seconds
        if products is not None and not products["quantized"]:
            reason = _nothing_quantized(compiled.result["operators"], products["total"])
            return self._record(about | {"log": log, "status": "invalid", "reason": reason}, seconds)
        reference = {name: output[: self.n] for name, output in judge.reference.items()}
        labels = None if self.job.labels is None else self.job.labels[: self.n]
        found = measure(judge.criterion, self.outputs(), None if is_reference else reference, labels)
        if found["status"] == "ok":
            speed, reason = self._speed(compiled)
            found |= speed | dict(compiled.result["measured"])
            found["reason"] = "; ".join(filter(None, [found["reason"], reason])) or None
        return self._record({"log": log} | about | found, seconds)

    def _speed(self, compiled: steps.Answer) -> tuple[Record, str | None]:
        """Return latency, throughput, energy and cost, and why some of them are missing."""
        timed = self._step("time", compiled) if self.runtime.timed else None
        clock = dict(timed.result) if timed is not None else {}
        reasons = [UNTIMED if timed is None else timed.reason]
        if self.job.work is None:
            reasons.append("energy: the graph leaves the shape of a layer open")
        speed = cost.keys(clock, self.job.work, self.scheme, self.job.price_per_hour)
        return speed, "; ".join(filter(None, reasons)) or None

    def _step(self, step: str, compiled: steps.Answer) -> steps.Answer:
        """Perform the step "run" or "time" on what was compiled."""
        description = {
            "step": step,
            "backend_file": str(file_of(self.backend)),
            "scheme": self.scheme.name,
            "runtime": self.runtime.name,
            "compiled": str((compiled.folder / "compiled").absolute()),
            "inputs": {name: str(path.absolute()) for name, path in self.job.samples.items()},
            "outputs": dict(self.job.outputs),
            "n": self.n,
            "max_batch": self.job.max_batch,
            "folder": f"./{OUTPUTS}",
        }
        name = f"{self.backend.name}-{self.scheme.name}-{self.runtime.name}-{step}-{self._run_key[:12]}"
        return self.job.perform(name, self.backend, description, anywhere=not self.runtime.timed)

    def _record(self, measured: Record, seconds: float) -> Record:
        """Return the record of this row: what was measured, and what it was measured on."""
        backend, scheme = self.backend, self.scheme
        calibration = {"n": self.job.calibration_size, "method": scheme.calibration}
        about = provenance(backend.packages) | {"versions": environments.versions(backend)}
        return new_record(
            **{"checkpoint": self.job.hashes["model"], **self.job.identity},
            key=self.key,
            data=_hash(self.job.hashes["images"], self.job.hashes["calibration"], self.job.hashes["labels"]),
            backend=backend.name,
            vendor=scheme.vendor or backend.vendor,
            stands_for=backend.stands_for,
            kind=scheme.kind or backend.kind,
            runtime=self.runtime.name,
            simulated=self.runtime.simulated,
            scheme=scheme.name,
            number_format=scheme.number_format,
            layers=scheme.layers,
            weight_bits=scheme.weight_bits,
            activation_bits=scheme.activation_bits,
            per_channel=scheme.per_channel,
            dynamic=scheme.dynamic,
            calibration=calibration if scheme.calibration is not None else None,
            seconds=round(seconds, 3),
            limits=asdict(self.job.limits),
            **about | measured,
        )


def read_outputs(folder: Path, names: Mapping[str, bool | None]) -> dict[str, Output]:
    """Return the outputs that a worker has written: memory-mapped arrays, or lists where shapes vary.

    Where it is not certain that an output has a batch axis, an axis of one element in all samples is one.
    """
    found: dict[str, Output] = {}
    for place, (name, batched) in enumerate(names.items()):
        path = folder / f"{place}.npy"
        if path.exists():
            array = np.load(path, mmap_mode="r")
            found[name] = array[:, 0] if batched is None and array.shape[1:2] == (1,) else array
            continue
        with np.load(path.with_suffix(".npz")) as file:
            shapes, values = file["shapes"], file["values"]
        ends = np.cumsum(shapes.prod(axis=1))[:-1]
        parts = zip(np.split(values, ends), shapes, strict=True)
        found[name] = [part.reshape(shape) for part, shape in parts]
    return found


def quantized_products(result: Mapping[str, Any], scheme: Scheme) -> dict[str, int] | None:
    """Return how many products of a compiled graph are on integers ("quantized"), and of how many ("total").

    Products are convolutions, matrix products and recurrent cells. Of a graph without any, all operators
    count.

    Args:
      result: What a compile step found: its "operators", and "products" if the backend counts them itself.
      scheme: The scheme. Only those on integers are counted.

    Returns:
      None for a scheme that quantizes nothing to integers, and where the toolchain does not tell.

    >>> counts = {"Conv": {"integer": 3, "float": 1}, "Relu": {"float": 2}}
    >>> quantized_products({"operators": counts, "products": None}, Scheme("int8", 8, 8))
    {'quantized': 3, 'total': 4}
    """
    if scheme.number_format != "integer" or scheme.weight_bits >= 32:
        return None
    operators = result["operators"]
    counts = {name: kinds for name, kinds in operators.items() if PRODUCTS.search(name)} or operators
    if (products := result.get("products")) is not None and (products[1] or not counts):
        return {"quantized": products[0], "total": products[1]} if products[1] else None
    total = sum(sum(kinds.values()) for kinds in counts.values())
    integer = sum(kinds.get("integer", 0) for kinds in counts.values())
    return {"quantized": integer, "total": total} if total else None


def _nothing_quantized(operators: Mapping[str, Mapping[str, int]], total: int) -> str:
    """Say that a toolchain left a network in floating point."""
    counts = {name: sum(kinds.values()) for name, kinds in operators.items() if PRODUCTS.search(name)}
    listed = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or f"{total} operators"
    return (
        f"nothing was quantized: the toolchain left everything in floating point ({listed}), so that this is "
        "no low-bit row"
    )


def compile_scheme(job: EvaluationJob, backend: Backend, scheme: Scheme) -> steps.Answer:
    """Compile a scheme, after those it starts from, and return the answer of the last step reached.

    Each scheme is compiled once for all rows.
    """
    source = job.model
    if scheme.source is not None:
        parent = compile_scheme(job, *_source(backend, scheme.source))
        if parent.status != "ok":
            return parent
        source = parent.folder / "compiled"
    description = {
        "step": "compile",
        "backend_file": str(file_of(backend)),
        "scheme": scheme.name,
        "source": str(source.absolute()),
        "calibration": {name: str(path.absolute()) for name, path in job.calibration.items()},
        "calibration_size": job.calibration_size,
        "compiled": "./compiled",
        "float_layers": list(job.float_layers) if scheme.weight_bits < 32 else [],
    }
    name = f"{backend.name}-{scheme.name}-compile-{_compile_key(job, backend, scheme)[:12]}"
    return job.perform(name, backend, description, anywhere=True)


def _source(backend: Backend, source: tuple[str, str]) -> tuple[Backend, Scheme]:
    """Return the backend and the scheme that a scheme of `backend` starts from."""
    origin = BACKENDS.get(source[0], backend)
    return origin, scheme_of(origin, source[1])


def _compile_key(job: EvaluationJob, backend: Backend, scheme: Scheme) -> str:
    """Hash everything that decides what a scheme compiles to."""
    parent = None if scheme.source is None else _compile_key(job, *_source(backend, scheme.source))
    own = [code(file_of(backend)), code(steps.WORKER), asdict(scheme), environments.versions(backend)]
    return _hash(job.hashes["model"], job.hashes["calibration"], parent, own, job.float_layers)


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def code(file: Path) -> tuple[str, ...]:
    """Return the syntax trees of a module and of those of qt_jax that it imports, directly or not.

    Comments, docstrings and type annotations of functions are left out, because they change no number. The
    modules must be imported by `from ... import ...`.

    Args:
      file: The module's file.

    Returns:
      One dumped tree per module, ordered by path.

    >>> any("Refused" in module for module in code(PACKAGE / "backends" / "litert.py"))
    True
    """
    found: dict[Path, str] = {}
    ahead = [file.resolve()]
    while ahead:
        path = ahead.pop()
        if path not in found:
            tree = _bare(ast.parse(path.read_text(encoding="utf-8")))
            found[path] = ast.dump(tree)
            ahead += [other for node in ast.walk(tree) for other in _imported(node)]
    return tuple(found[path] for path in sorted(found))


def _bare(tree: ast.Module) -> ast.Module:
    """Remove docstrings and the types of functions from a tree, in place, and return it."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [part for part in body if not _is_text(part)] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree


def _is_text(statement: ast.stmt) -> bool:
    """Tell whether a statement is only a string."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _imported(node: ast.AST) -> list[Path]:
    """Return the modules of qt_jax that a `from ... import ...` names, without the `__init__` of packages."""
    first, *parts = (getattr(node, "module", None) or "").split(".")
    if not isinstance(node, ast.ImportFrom) or first != PACKAGE.name:
        return []
    place = PACKAGE.joinpath(*parts)
    candidates = [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
    return [path for path in candidates if path.is_file()]
