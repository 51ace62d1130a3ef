"""Export a network by qt_jax, PyTorch and jax2onnx behind one signature, and measure its time and memory.

qt_jax is called with its defaults, under which it compares the graph with the JAX forward in onnxruntime.
PyTorch is called as in its documentation (dynamo, its own optimizer on, weights in a separate file) and
checks nothing. jax2onnx is called on the same forward, and what it returns is written as it is.

Time and memory are each measured in a new process. Its start is not timed. Both exporters import most of
their modules on their first call, so the process first exports a network of one layer. `start_s` tells how
long that takes.
"""

import ctypes
import gc
import importlib.util
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments.models.resnet import ResNet
from qt_jax.export import save, to_onnx

OURS, TORCH, JAX2ONNX = "qt_jax", "torch", "jax2onnx"

Exporter = Callable[[Path], None]
"""Converts the network and writes the file."""


class Network(NamedTuple):
    """Hold a Linen module for square images, their height in pixels, and whether it takes times too."""

    module: nn.Module
    image_size: int
    takes_times: bool = False

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the inputs, without the batch."""
        return [(self.image_size, self.image_size, 3), *([()] if self.takes_times else [])]


ONE_LAYER = Network(ResNet((), width=1), 8)
"""Network that an exporter writes first, to import its modules."""


def require_torch() -> None:
    """Raise InvalidInput, with the remedy, where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise qt.InvalidInput(
            "the comparison needs PyTorch, which is not installed: python -m pip install -r "
            "experiments/benchmarks/requirements.txt"
        )


def random_variables(network: Network) -> dict[str, Any]:
    """Draw variables that look like those of a trained network.

    Kernels are He-scaled, and batch norms are not the identity.
    """
    inputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in network.shapes()]
    shapes = jax.eval_shape(network.module.init, jax.random.key(0), *inputs)
    random = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key in ("scale", "var"):
            values = random.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
            values = random.normal(0.0, fan_in**-0.5, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_inputs(network: Network, count: int) -> list[np.ndarray]:
    """Draw images `(count, height, width, 3)`, float32 of unit variance, and times `(count,)` if taken."""
    random = np.random.default_rng(1)
    images, *others = network.shapes()
    times = [random.uniform(0.0, 1000.0, (count, *shape)).astype(np.float32) for shape in others]
    return [random.normal(size=(count, *images)).astype(np.float32), *times]


def exporter(name: str, network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    """Return the exporter of that name. Each call of it writes the network to a file."""
    return {OURS: _ours, TORCH: _torch, JAX2ONNX: _jax2onnx}[name](network, variables, opset)


def _ours(network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    shapes: Any = network.shapes() if network.takes_times else network.shapes()[0]

    def export(path: Path) -> None:
        def apply_fn(variables, *inputs):  # new in every call: nothing is compiled yet
            return network.module.apply(variables, *inputs, train=False)

        save(to_onnx(apply_fn, variables, shapes, opset=opset), path)

    return export


def _torch(network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    import torch

    from experiments.benchmarks.torch_models import load_variables, twin

    model = twin(network.module, network.image_size)
    load_variables(model, variables)
    examples = [torch.from_numpy(x) for x in channels_first(random_inputs(network, 2))]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    def export(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(examples),
                path,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: "batch"},) * len(examples),
                verbose=False,
            )

    return export


def _jax2onnx(network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    import jax2onnx

    def export(path: Path) -> None:
        def forward(*inputs):
            return network.module.apply(variables, *inputs, train=False)

        shapes = [("batch", *shape) for shape in network.shapes()]
        model = jax2onnx.to_onnx(forward, inputs=shapes, opset=opset, return_mode="proto")
        save(model, path)

    return export


def channels_first(inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Return the inputs with images as `(batch, channels, height, width)`."""
    return [np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x for x in inputs]


def cost(name: str, network: Network, opset: int, repeats: int) -> dict[str, Any]:
    """Measure what it costs exporter `name` to write `network`: the results of `seconds` and `memory`."""

    def elsewhere(measure: Callable, *arguments: Any) -> dict[str, Any]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(measure, name, network, opset, *arguments).result()

    return elsewhere(seconds, repeats) | elsewhere(memory)


def seconds(name: str, network: Network, opset: int, repeats: int) -> dict[str, Any]:
    """Measure seconds in this process, which should be new.

    Returns:
      start_s; cold_s, the first export of this network; warm_s, the median of the `repeats` that follow it;
      and cold_cpu_s and warm_cpu_s, the seconds that all cores together computed meanwhile.
    """
    variables = random_variables(network)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _import_everything(name, opset, path)
        started = time.perf_counter()
        export = exporter(name, network, variables, opset)
        laps = []
        for _ in range(1 + repeats):
            begun = time.perf_counter(), time.process_time()
            export(path)
            laps.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    (cold, cold_cpu), (warm, warm_cpu) = laps[0], map(statistics.median, zip(*laps[1:], strict=True))
    return {
        "start_s": started - start,
        "cold_s": cold,
        "cold_cpu_s": cold_cpu,
        "warm_s": warm,
        "warm_cpu_s": warm_cpu,
        "repeats": repeats,
    }


def memory(name: str, network: Network, opset: int) -> dict[str, Any]:
    """Measure bytes in this process, which should be new: parameter_bytes, peak_bytes, and their peak_ratio.

    The peak is the largest resident set during one export (VmHWM in Linux's /proc/self/status, reset before)
    minus the resident set right before it. It is None where that file does not exist.
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
    """Reset the high-water mark to the resident set, and return that, or None where this is not Linux.

    Memory that was freed but kept by the allocator is given back first, or an export could use it unseen.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """Return the bytes that /proc/self/status states for a field."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
