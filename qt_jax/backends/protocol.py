"""Define what a vendor's toolchain is to this package: an environment, schemes, a compile step and runtimes.

A backend is one module that defines `BACKEND`. The harness reads its description in the process that has jax.
`compile` and `load` run in a worker process, in the interpreter of the backend's own environment, which need
not have jax or flax. At its top, such a module therefore imports only numpy, the standard library, this file
and modules beside it that import no more, in the syntax of Python 3.10. It imports the vendor's packages
inside its functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

KINDS = (
    "normative model",
    "vendor simulator",
    "vendor quantizer on CPU",
    "CPU runtime",
    "device",
    "third party's model of a grid",
    "emulated convention",
)

ONNX_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "GRU", "LSTM", "RNN"})
"""ONNX operators that multiply by kernels: convolutions, matrix products and recurrent cells."""

Batch = np.ndarray | Mapping[str, np.ndarray]
"""Inputs of a graph in its own dtypes. The array `(b, ...)` of its one input; of a graph with several inputs,
the arrays by the inputs' names."""

Session = Callable[[Batch], np.ndarray | Sequence[np.ndarray]]
"""Maps a batch to what the graph puts out: the array of its one output, or one array for each output in the
graph's order. Each has the shape and the layout that the ONNX graph gives it."""


def by_name(batch: Batch, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a batch by name.

    Args:
      batch: A batch of a graph with the inputs `names`.
      names: Names of the graph's inputs.

    >>> by_name(np.zeros(2), ["x"])
    {'x': array([0., 0.])}
    """
    return dict(batch) if isinstance(batch, Mapping) else {names[0]: batch}


def only_array(batch: Batch, tool: str) -> np.ndarray:
    """Return the array of a batch with one input. Raises Refused, in the name of `tool`, for several.

    >>> only_array(np.zeros(2), "nncase")
    array([0., 0.])
    """
    if isinstance(batch, Mapping):
        raise Refused(f"{tool} is driven with one input here, and this graph has {', '.join(batch)}")
    return batch


class Refused(Exception):
    """Report that the toolchain does not take a graph. The message is the tool's own, shortened."""


@dataclass(frozen=True)
class Scheme:
    """Describe one way in which a backend turns a float graph into a low-bit one.

    `calibration` names the method that finds activation ranges from calibration images. None means that no
    image is used, because activations stay float or, if `dynamic`, get a new range for every input.

    >>> Scheme("int8-dynamic", weight_bits=8, activation_bits=8, dynamic=True).calibration is None
    True
    """

    name: str
    weight_bits: int
    activation_bits: int
    per_channel: bool | None = None
    """Whether each output channel of a kernel has its own scale; None where nothing is quantized."""
    calibration: str | None = None
    dynamic: bool = False
    number_format: str = "integer"
    """"integer": an affine grid with one scale per tensor or channel; "block": integers with one exponent for
    each small block; "float"."""
    source: tuple[str, str] | None = None
    """(backend, scheme) whose compiled folder this scheme starts from; None starts from the ONNX file."""
    layers: str = "all"
    """"all" that the toolchain can quantize, or "matmul" where convolutions keep more bits than stated."""
    vendor: str | None = None
    """The vendor whose grid this scheme speaks of, where it is not that of the backend."""
    kind: str | None = None
    """One of `KINDS`, where it is not that of the backend."""


@dataclass(frozen=True)
class Runtime:
    """Describe one thing that can execute what was compiled."""

    name: str
    description: str
    batch: int = 1
    """Images per call. 1 where a dynamic range or a simulator takes images one by one."""
    simulated: bool = False
    """Whether it imitates hardware or is a plain reference. It is slow and runs on fewer images."""
    timed: bool = False
    """Whether its wall-clock time says something about a product."""


@dataclass(frozen=True)
class Environment:
    """Describe the virtual environment of a toolchain, which `install` builds with uv."""

    name: str
    python: str
    """The version of Python, such as "3.11"."""
    requirements: tuple[str, ...]
    megabytes: int
    """Size on disk once installed."""
    licence: str
    """Licences of the vendor's packages, as their metadata state them."""
    without_dependencies: tuple[str, ...] = ()
    """Requirements that are installed after the others, without their dependencies."""
    remove: tuple[str, ...] = ()
    """Glob patterns of files in site-packages that break the toolchain and are deleted."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every worker. "{site}" stands for site-packages, "{bin}" for the folder of
    programs. PATH is put before the existing one."""


@dataclass(frozen=True)
class Compiled:
    """Report what `compile` found out, besides the files that it left in its folder."""

    model_bytes: int | None
    """Size in bytes of the file that would be deployed."""
    operators: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Operator -> {"integer": n, "float": n, "host": n}: how many of them the compiled graph executes on
    integers, in floating point, or on a host CPU beside the accelerator."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the record that the compiler itself gives, such as cycles."""
    products: tuple[int, int] | None = None
    """How many of the graph's convolutions, matrix products and recurrent cells are on the scheme's grid, and
    how many there are. None where only `operators` tells."""


class Backend(Protocol):
    """Describe and drive a vendor's toolchain.

    `compile` and `load` may raise, crash or hang. The harness makes a record of it.

    A backend that can leave layers in floating point has an attribute `leaves_float = True`, and its
    `compile` takes one more argument, `float_layers: Sequence[str] = ()`: names of ONNX nodes. It raises
    Refused for a node that the toolchain no longer has under its name.
    """

    name: str
    vendor: str
    stands_for: str
    """The products whose behaviour it predicts, in one line."""
    kind: str
    """One of `KINDS`."""
    environment: Environment | None
    """None if it runs in the interpreter that runs qt_jax. The extra `backends` brings the packages for that,
    except those of TensorRT: its `available` says what to install."""
    packages: tuple[str, ...]
    """Distributions whose versions are recorded beside every number of this backend."""
    schemes: tuple[Scheme, ...]
    runtimes: tuple[Runtime, ...]

    def available(self) -> str | None:
        """Return None if this machine can run the toolchain once its environment is installed.

        Otherwise return what is missing, such as a device or a program, and what would mend it. The harness
        itself checks packages. It calls this method in the process that has jax.
        """
        ...

    def compile(self, source: Path, calibration: Batch, scheme: Scheme, folder: Path) -> Compiled:
        """Quantize with the vendor's own quantizer, and leave in `folder` whatever `load` needs.

        Args:
          source: The float ONNX file, or the folder that `scheme.source` was compiled to.
          calibration: Samples, as a batch of all of them. The arrays may be memory-mapped files.
          scheme: One of `schemes`.
          folder: An empty folder. The worker's working directory is another one, which is deleted.

        Raises:
          Refused: The toolchain does not take the graph.
        """
        ...

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        """Return a function that executes the compiled model. Called once per process, before all images."""
        ...
