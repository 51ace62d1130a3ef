"""Data parallel training over all devices of all hosts: one mesh with one axis, arrays replicated or split.

Everything is defined on the global batch and computed by one program that XLA divides among the devices, so
that batch norm, quantiles, thresholds and metrics are those of one device on the same batch, save for the
order in which floating-point sums are taken.
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
    """Makes this process one of several that train together; to be called before JAX is asked for devices.

    Args:
      where: "auto" where JAX finds the others by itself (TPU pods, Slurm, Open MPI, Kubernetes), else
        ADDRESS:PORT,COUNT,INDEX: where process 0 can be reached, how many there are, which one this is.

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
    """Ends the connection; all processes have to come here, and each is on its own from then on."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def meet(name: str) -> None:
    """Waits until all processes have come to the place called `name`; alone, goes on at once."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(name)


def accelerator() -> str | None:
    """What a record says that JAX computes on; None for a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.device_kind


def is_leader() -> bool:
    """Whether this is the one process that writes files and speaks."""
    return jax.process_index() == 0


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices`, by default all of all processes, along the axis `AXIS`."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_along(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Equal parts of one axis of an array, one a device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds with the same values, as global arrays on every device of the mesh."""

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return jax.tree.map(place, tree)


def split_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows spread over the devices in their order; each process hands its own devices their rows, no other.

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
    """Inside a compiled function: `x` split along an axis over the mesh; None, or one device, leave it."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, split_along(mesh, axis))


def on_host(tree: Any) -> Any:
    """Replicated arrays as numpy arrays."""
    return jax.tree.map(np.asarray, tree)
