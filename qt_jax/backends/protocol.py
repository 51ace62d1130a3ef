"""What a vendor toolchain is to this package: an environment, schemes, a compile step, runtimes.

A backend is one module that defines `BACKEND`. The harness reads the description here, next to jax; `compile`
and `load` run in a worker process, in the interpreter of the backend's own environment, where neither jax nor
flax need be. Such a module therefore imports nothing but numpy, the standard library and this file at its top
(Python 3.10 syntax), and the vendor's packages inside its functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

KINDS = ("normative model", "vendor simulator", "vendor quantizer on CPU", "CPU runtime", "device")

Session = Callable[[np.ndarray], np.ndarray]
"""Inputs `(b, ...)` float32, as the ONNX graph's one input takes them, to logits `(b, classes)` float32."""


class Refused(Exception):
    """The toolchain will not take this graph; the message is the tool's own, shortened to what matters."""


@dataclass(frozen=True)
class Scheme:
    """One way in which a backend turns a float graph into a low-bit one.

    `calibration` names how activation ranges come from calibration images; None means that no image is
    looked at, because activations stay float or, if `dynamic`, are ranged anew for every input.

    >>> Scheme("int8-dynamic", weight_bits=8, activation_bits=8, dynamic=True).calibration is None
    True
    """

    name: str
    weight_bits: int
    activation_bits: int
    per_channel: bool | None = None
    """Whether each output channel of a kernel has a scale of its own; None where nothing is quantized."""
    calibration: str | None = None
    dynamic: bool = False
    number_format: str = "integer"
    """"integer": an affine grid with one scale a tensor or channel; "block": integers with an exponent for
    each small block; "float"."""
    source: tuple[str, str] | None = None
    """(backend, scheme) whose compiled folder this scheme starts from; None: from the ONNX file."""
    layers: str = "all"
    """"all" that the toolchain can quantize, or "matmul" where its convolutions keep more bits than said."""


@dataclass(frozen=True)
class Runtime:
    """One thing that can execute what was compiled."""

    name: str
    description: str
    batch: int = 1
    """Images a call. 1 where a dynamic range or a simulator takes images one by one."""
    simulated: bool = False
    """Slow because it imitates hardware or is a plain reference: runs on the smaller number of images."""
    timed: bool = False
    """Whether its wall-clock time says something about a product."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, as `install` builds it with uv."""

    name: str
    python: str
    """The version of Python, such as "3.11"."""
    requirements: tuple[str, ...]
    megabytes: int
    """Size on disk once installed."""
    licence: str
    """Licences of the vendor's packages, as their metadata state them."""
    without_dependencies: tuple[str, ...] = ()
    """Requirements to install after the others, without what they ask for."""
    remove: tuple[str, ...] = ()
    """Files in site-packages, as glob patterns, that break the toolchain and are deleted."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every worker; "{site}" stands for site-packages, "{bin}" for its programs.
    PATH is put before the existing one."""


@dataclass(frozen=True)
class Compiled:
    """What `compile` reports besides the files it left in its folder."""

    model_bytes: int | None
    """Size in bytes of the file that would be deployed."""
    operators: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Operator -> {"integer": n, "float": n, "host": n}: how many of them the compiled graph executes on
    integers, in floating point, or hands to a host CPU beside the accelerator."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the record that the compiler itself gives, such as cycles."""


class Backend(Protocol):
    """A vendor toolchain. `compile` and `load` may raise, crash or hang: the harness makes a record of it."""

    name: str
    vendor: str
    stands_for: str
    """The products whose behaviour it tells, in one line."""
    kind: str
    """One of `KINDS`."""
    environment: Environment | None
    """None: it runs in the interpreter that runs qt_jax, whose requirements.txt has what it needs."""
    packages: tuple[str, ...]
    """Distributions whose versions belong beside every number this backend gives."""
    schemes: tuple[Scheme, ...]
    runtimes: tuple[Runtime, ...]

    def available(self) -> str | None:
        """None if this machine can run it once its environment is there, else why not and what would mend
        it (a missing device or program; packages are the harness's business). Called next to jax."""
        ...

    def compile(self, source: Path, calibration: np.ndarray, scheme: Scheme, folder: Path) -> Compiled:
        """Quantize with the vendor's own quantizer and leave in `folder` whatever `load` needs.

        `source` is the float ONNX file, or the folder that `scheme.source` was compiled to. `calibration`
        is `(n, ...)` float32, as the graph's one input takes it. `folder` is empty; the worker's working
        directory is another, which is deleted. Raises Refused where the toolchain will not take the graph.
        """
        ...

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        """What executes the compiled model; called once a process, before all images."""
        ...
