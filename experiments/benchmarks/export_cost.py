"""Time and memory of one export, each measured in a process of its own.

Process start is off the clock: beforehand the process exports a network of one layer, because both exporters
import most of their modules on their first call. `start_s` says how long that takes.
"""

import ctypes
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.exporters import Network, exporter, random_variables
from experiments.models.resnet import ResNet

ONE_LAYER = Network(ResNet((), width=1), 8)


def cost(name: str, network: Network, opset: int, repeats: int) -> dict[str, Any]:
    """What it costs exporter `name` to write `network`: what `seconds` and `memory` return."""

    def elsewhere(measure: Callable, *arguments: Any) -> dict[str, Any]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(measure, name, network, opset, *arguments).result()

    return elsewhere(seconds, repeats) | elsewhere(memory)


def seconds(name: str, network: Network, opset: int, repeats: int) -> dict[str, Any]:
    """Seconds in this process, which should be new: start_s, cold_s, warm_s, and of those cold_verify_s and
    warm_verify_s (None where the exporter does not verify).

    cold is the first export of this network, warm the median of `repeats` that follow it.
    """
    variables = random_variables(network)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _import_everything(name, opset, path)
        started = time.perf_counter()
        export = exporter(name, network, variables, opset)
        first, *others = (export(path) for _ in range(1 + repeats))
    verified = "verify_s" in first
    return {
        "start_s": started - start,
        "cold_s": sum(first.values()),
        "cold_verify_s": first.get("verify_s"),
        "warm_s": statistics.median(sum(laps.values()) for laps in others),
        "warm_verify_s": statistics.median(laps["verify_s"] for laps in others) if verified else None,
        "repeats": repeats,
    }


def memory(name: str, network: Network, opset: int) -> dict[str, Any]:
    """Bytes in this process, which should be new: parameter_bytes, peak_bytes, and peak_ratio of the two.

    The peak is the largest resident set during one export (VmHWM in Linux's /proc/self/status, set back
    beforehand) above the resident set right before it; None where there is no such file.
    """
    variables = random_variables(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _import_everything(name, opset, path)
        export = exporter(name, network, variables, opset)
        before = _reset_peak()
        export(path)
        peak = None if before is None else _resident("VmHWM") - before
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    ratio = None if peak is None else peak / parameters
    return {"parameter_bytes": parameters, "peak_bytes": peak, "peak_ratio": ratio}


def _import_everything(name: str, opset: int, path: Path) -> None:
    exporter(name, ONE_LAYER, random_variables(ONE_LAYER), opset)(path)


def _reset_peak() -> int | None:
    """Sets the high-water mark back to the resident set, and returns that; None where Linux is not.

    Memory that was freed but kept by the allocator goes back first, or an export could use it unseen.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """Bytes that /proc/self/status gives for a field."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
