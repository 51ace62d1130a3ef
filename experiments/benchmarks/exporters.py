"""Export a network by qt_jax and by PyTorch behind one signature, and measure the time and memory of it.

qt_jax converts, and verifies the file against the JAX forward at two batch sizes. PyTorch is called as in its
documentation (dynamo, its own optimizer on, weights in a separate file) and checks nothing.

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
from qt_jax.export import save_verified, to_onnx

OURS, TORCH = "qt_jax", "torch"

VERIFIED = 7
"""Images that the verification of a file needs."""

Exporter = Callable[[Path], dict[str, float]]
"""Writes the file and returns the seconds it took: convert_s, and verify_s where the exporter verifies."""


class Network(NamedTuple):
    """Hold a Linen module for square images, and the height of these in pixels."""

    module: nn.Module
    image_size: int


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
    images = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(network.module.init, jax.random.key(0), images)
    random = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key in ("scale", "var"):
            values = random.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
            values = random.normal(0.0, fan_in**-0.5, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_images(network: Network, count: int) -> np.ndarray:
    """Draw images `(count, height, width, 3)`, float32 of unit variance."""
    shape = (count, network.image_size, network.image_size, 3)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def exporter(name: str, network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    """Return the exporter of that name. Each call of it writes the network to a file."""
    return {OURS: _ours, TORCH: _torch}[name](network, variables, opset)


def _ours(network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    images = random_images(network, VERIFIED)

    def export(path: Path) -> dict[str, float]:
        def apply_fn(variables, images):  # new in every call: nothing is compiled yet
            return network.module.apply(variables, images, train=False)

        start = time.perf_counter()
        model = to_onnx(apply_fn, variables, images.shape[1:], opset=opset, check=False)
        converted = time.perf_counter()
        save_verified(model, path, apply_fn, variables, images)
        return {"convert_s": converted - start, "verify_s": time.perf_counter() - converted}

    return export


def _torch(network: Network, variables: dict[str, Any], opset: int) -> Exporter:
    import torch

    from experiments.benchmarks.torch_models import load_variables, twin

    model = twin(network.module, network.image_size)
    load_variables(model, variables)
    example = torch.zeros(2, 3, network.image_size, network.image_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    def export(path: Path) -> dict[str, float]:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                path,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: "batch"},),
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
        return {"convert_s": time.perf_counter() - start}

    return export


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
      and their parts cold_verify_s and warm_verify_s, None where the exporter does not verify.
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
