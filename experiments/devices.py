"""Train data-parallel over all devices of all hosts, on one mesh with one axis.

Arrays are replicated or split. Everything is defined on the global batch and computed by one program, which
XLA divides among the devices. Batch norm, quantiles, thresholds and metrics are therefore those of one device
on the same batch, except for the order in which floating-point sums are taken.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qt_jax.errors import InvalidInput

AXIS = "batch"
"""Name of the mesh's axis."""


def connect(where: str) -> None:
    """Make this process one of several that train together. Call it before JAX is asked for devices.

    Args:
      where: "auto" where JAX finds the others by itself (TPU pods, Slurm, Open MPI, Kubernetes), else
        ADDRESS:PORT,COUNT,INDEX: address of process 0, number of processes, index of this process.

    Raises:
      InvalidInput: `where` is neither, or the processes cannot be found.

    >>> connect("10.0.0.1,4,0")
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: --distributed takes auto or ADDRESS:PORT,COUNT,INDEX..., got '10.0.0.1,4,0'
    """
    given = re.fullmatch(r"(?P<address>.+:\d+),(?P<count>\d+),(?P<index>\d+)", where)
    if not (where == "auto" or (given and int(given["index"]) < int(given["count"]))):
        raise InvalidInput(
            "--distributed takes auto or ADDRESS:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1, such as "
            f"10.0.0.1:1234,4,0, got {where!r}"
        )
    try:
        if given is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(given["address"], int(given["count"]), int(given["index"]))
    except (ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"--distributed {where}: the processes cannot be connected ({str(error).splitlines()[0]}). Where "
            "no TPU pod, Slurm or Open MPI says who takes part, give ADDRESS:PORT,COUNT,INDEX."
        ) from error


def disconnect() -> None:
    """End the connection. All processes have to call this; each is on its own from then on."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def barrier(name: str) -> None:
    """Wait until all processes have reached the barrier `name`. A single process goes on at once."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(name)


def accelerator() -> str | None:
    """Return the name of the accelerator that JAX computes on, for records; None for a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.device_kind


def is_leader() -> bool:
    """Tell whether this is the one process that writes files and prints."""
    return jax.process_index() == 0


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `devices` along the axis `AXIS`. The default is all devices of all processes."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Place the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_along(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Place equal parts of one axis of an array, one per device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Turn arrays that every process holds alike into global arrays on every device of the mesh."""

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return jax.tree.map(place, tree)


def split_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Spread rows over the devices in their order. Each process provides only the rows of its own devices.

    Rows of zeros are added at the end, up to a multiple of the number of devices.

    >>> split_rows(np.arange(3), data_mesh(jax.devices()[:1])).tolist()
    [0, 1, 2]
    """
    rows = -(-len(array) // mesh.size) * mesh.size

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        held = array[start:stop]
        return np.concatenate([held, np.zeros((stop - start - len(held), *array.shape[1:]), array.dtype)])

    return jax.make_array_from_callback((rows, *array.shape[1:]), split_along(mesh), part)


def constrained(x: jax.Array, mesh: Mesh | None, axis: int = 0) -> jax.Array:
    """Split `x` along an axis over the mesh, in a compiled function. None or one device change nothing."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, split_along(mesh, axis))


def on_host(tree: Any) -> Any:
    """Copy replicated arrays to the host, as numpy arrays."""
    return jax.tree.map(np.asarray, tree)
