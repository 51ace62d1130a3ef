"""One row: a scheme of a backend on one of its runtimes, from the float graph to a record.

The program of a backend: what, beside its input, decides what it compiles.
"""

import ast
import base64
import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from qt_jax.backends import cost, environments, steps
from qt_jax.backends.protocol import Backend, Runtime, Scheme
from qt_jax.backends.registry import BACKENDS, environments_of, file_of, scheme_of
from qt_jax.metrics import classification_metrics, dense_metrics, reliability
from qt_jax.provenance import cpu, provenance
from qt_jax.records import Record, new_record
from qt_jax.scheduler import Queue

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code(file: Path) -> tuple[str, ...]:
    """The module in `file` and those of qt_jax that it imports, directly or not, as syntax trees.

    Without comments, docstrings and the types of functions, which change no number.

    >>> any("Refused" in module for module in code(PACKAGE / "backends" / "litert_graph.py"))
    True
    """
    found: dict[Path, str] = {}
    ahead = [file.resolve()]
    while ahead:
        path = ahead.pop()
        if path not in found:
            tree = _bare(ast.parse(path.read_text()))
            found[path] = ast.dump(tree)
            ahead += [other for node in ast.walk(tree) for other in _imported(node)]
    return tuple(found[path] for path in sorted(found))


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [part for part in body if not _is_text(part)] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _imported(node: ast.AST) -> list[Path]:
    """The files of qt_jax that `from ... import ...` reads; of a package none but the modules it names."""
    first, *parts = (getattr(node, "module", None) or "").split(".")
    if not isinstance(node, ast.ImportFrom) or first != PACKAGE.name:
        return []
    place = PACKAGE.joinpath(*parts)
    candidates = [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
    return [path for path in candidates if path.is_file()]


REFERENCE = "logit_mse, sqnr_db and agreement have no meaning for the reference itself"

LOGITS = "logits.npy"

UNTIMED = "no product runs like this runtime, so that it is not timed"


@dataclass(frozen=True)
class Job:
    """What every row of one evaluation shares: files, their hashes, limits, and whose records these are."""

    folder: Path
    model: Path
    calibration: Path
    images: Path
    labels: np.ndarray
    hashes: Mapping[str, str]
    limits: steps.Limits
    identity: Mapping[str, Any]
    calibration_size: int
    most_batch: int | None
    """Images that the graph takes at once, where it says so."""
    work: cost.Work | None
    price_per_hour: float
    retry: bool = False
    retried: set[Path] = field(default_factory=set)
    """Steps that were tried again already, so that rows that share one do not each try it."""
    queue: Queue | None = None
    """Takes the steps that do not depend on the machine."""
    turns: dict[Path | None, Lock] = field(default_factory=dict)
    """With a queue, a step is handed over once, and the steps done here take turns (None)."""

    def perform(self, name: str, backend: Backend, step: Mapping[str, Any], anywhere: bool) -> steps.Answer:
        """The answer of the step of this name, from its folder or from a process of its own.

        With a queue that process is a job of it, if the step may be done `anywhere`.
        """
        folder = self.folder / "work" / name
        again = self.retry and folder not in self.retried
        self.retried.add(folder)
        if self.queue is None:
            return steps.perform(folder, backend.environment, step, self.limits, again)
        with self.turns.setdefault(folder if anywhere else None, Lock()):
            how = partial(steps.submit, self.queue) if anywhere else steps.perform
            return how(folder, backend.environment, step, self.limits, again)


@dataclass(frozen=True)
class Evaluation:
    """A scheme of a backend on one runtime, over the first `n` test images of a job."""

    job: Job = field(repr=False)
    backend: Backend
    scheme: Scheme
    runtime: Runtime
    n: int

    @cached_property
    def key(self) -> str:
        """The hash of everything that decides what the record says, but for the clock and for limits."""
        identity = sorted((name, str(value)) for name, value in self.job.identity.items() if name != "run")
        price = self.job.price_per_hour if self.runtime.timed else None
        return _hash(self._run_key, self.job.hashes["labels"], identity, price)

    @cached_property
    def _run_key(self) -> str:
        compiled = _compile_key(self.job, self.backend, self.scheme)
        machine = cpu() if self.runtime.timed else None
        return _hash(compiled, self.job.hashes["images"], self.n, asdict(self.runtime), machine)

    def missing(self) -> str | None:
        """Why this row cannot run here, or None."""
        reasons = [environments.missing(needed) for needed in environments_of(self.backend)]
        return next(filter(None, [*reasons, self.backend.available()]), None)

    def run(self) -> steps.Answer:
        """Compile and run; the answer of the last step that was reached."""
        compiled = compile_scheme(self.job, self.backend, self.scheme)
        return compiled if compiled.status != "ok" else self._step("run", compiled)

    def logits(self) -> np.ndarray:
        """What a successful `run` left; run again if the file has been damaged since."""
        try:
            return np.load(self.run().folder / LOGITS)
        except (OSError, ValueError, EOFError):
            shutil.rmtree(self.run().folder)
            return np.load(self.run().folder / LOGITS)

    def record(self, reference: np.ndarray | None) -> Record:
        """The finished row; `reference` is None where this row is the reference itself."""
        reason = self.missing()
        if reason is not None:
            return self._record({"status": "unavailable", "reason": reason}, 0.0)
        answer = self.run()
        log = str((answer.folder / steps.LOG).relative_to(self.job.folder))
        if answer.status != "ok":
            failed = {"status": answer.status, "reason": answer.reason, "log": log}
            return self._record(failed, answer.seconds)
        compiled = compile_scheme(self.job, self.backend, self.scheme)
        about = {"model_bytes": compiled.result["model_bytes"], "operators": compiled.result["operators"]}
        labels = self.job.labels[: self.n]
        found = measure(self.logits(), labels, None if reference is None else reference[: self.n])
        seconds = compiled.seconds + answer.seconds
        if found["status"] == "ok":
            speed, lack = self._speed(compiled)
            found |= speed | dict(compiled.result["measured"])
            found["reason"] = "; ".join(filter(None, [found["reason"], lack])) or None
        return self._record({"log": log} | about | found, seconds)

    def _speed(self, compiled: steps.Answer) -> tuple[Record, str | None]:
        """Latency, throughput, energy and cost; and why some of them are lacking."""
        timed = self._step("time", compiled) if self.runtime.timed else None
        clock = dict(timed.result) if timed is not None else {}
        lacks = [UNTIMED if timed is None else timed.reason]
        if self.job.work is None:
            lacks.append("energy: the graph leaves the shape of a layer open")
        speed = cost.keys(clock, self.job.work, self.scheme, self.job.price_per_hour)
        return speed, "; ".join(filter(None, lacks)) or None

    def _step(self, step: str, compiled: steps.Answer) -> steps.Answer:
        job = {
            "step": step,
            "backend_file": str(file_of(self.backend)),
            "scheme": self.scheme.name,
            "runtime": self.runtime.name,
            "compiled": str((compiled.folder / "compiled").absolute()),
            "inputs": str(self.job.images.absolute()),
            "n": self.n,
            "most_batch": self.job.most_batch,
            "logits": f"./{LOGITS}",
        }
        name = f"{self.backend.name}-{self.scheme.name}-{self.runtime.name}-{step}-{self._run_key[:12]}"
        return self.job.perform(name, self.backend, job, anywhere=not self.runtime.timed)

    def _record(self, measured: Record, seconds: float) -> Record:
        backend, scheme = self.backend, self.scheme
        calibration = {"n": self.job.calibration_size, "method": scheme.calibration}
        about = provenance(backend.packages) | {"versions": environments.versions(backend)}
        return new_record(
            **{"checkpoint": self.job.hashes["model"], **self.job.identity},
            key=self.key,
            data=_hash(self.job.hashes["images"], self.job.hashes["calibration"], self.job.hashes["labels"]),
            backend=backend.name,
            vendor=backend.vendor,
            stands_for=backend.stands_for,
            kind=backend.kind,
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


def compile_scheme(job: Job, backend: Backend, scheme: Scheme) -> steps.Answer:
    """The compile step of `scheme`, after those it starts from; each is done once for all rows."""
    source = job.model
    if scheme.source is not None:
        origin = BACKENDS.get(scheme.source[0], backend)
        parent = compile_scheme(job, origin, scheme_of(origin, scheme.source[1]))
        if parent.status != "ok":
            return parent
        source = parent.folder / "compiled"
    description = {
        "step": "compile",
        "backend_file": str(file_of(backend)),
        "scheme": scheme.name,
        "source": str(source.absolute()),
        "calibration": str(job.calibration.absolute()),
        "compiled": "./compiled",
    }
    name = f"{backend.name}-{scheme.name}-compile-{_compile_key(job, backend, scheme)[:12]}"
    return job.perform(name, backend, description, anywhere=True)


def _compile_key(job: Job, backend: Backend, scheme: Scheme) -> str:
    parent = None
    if scheme.source is not None:
        origin = BACKENDS.get(scheme.source[0], backend)
        parent = _compile_key(job, origin, scheme_of(origin, scheme.source[1]))
    own = [code(file_of(backend)), code(steps.WORKER), asdict(scheme), environments.versions(backend)]
    return _hash(job.hashes["model"], job.hashes["calibration"], parent, own)


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def measure(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> Record:
    """The record keys that come from logits; `reference` is None where these are the reference themselves.

    Raises InvalidInput for labels that are no classes of the logits.
    """
    alone = (len(labels), *logits.shape[1:2], *labels.shape[1:])
    expected = alone if reference is None else reference.shape
    if logits.shape != expected:
        shapes = f"logits have shape {logits.shape}, expected {expected}"
        return {"status": "invalid", "reason": shapes}
    broken = int(np.sum(~np.isfinite(logits.reshape(len(logits), -1)).all(axis=1)))
    if broken:
        lack = f"logits of {broken} of {len(labels)} images are not finite"
        return {"status": "invalid", "reason": lack}
    judge = _of_images if labels.ndim == 1 else dense_metrics
    return judge(logits, labels, reference) | {
        "status": "ok",
        "reason": REFERENCE if reference is None else None,
    }


def _of_images(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> Record:
    """The metrics of a classifier, and what it decided for each image."""
    own = classification_metrics(logits, labels, reference)
    floating = own if reference is None else classification_metrics(reference, labels)
    decisions = logits.argmax(axis=1).astype("<u2").tobytes()
    return own | {
        "reference_top1": floating["top1"],
        "reliability": reliability(logits, labels),
        "predictions": base64.b64encode(zlib.compress(decisions, 9)).decode(),
    }
