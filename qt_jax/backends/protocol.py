"""What a vendor toolchain is to this package: schemes it offers, a compile step and a run step."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx


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


@dataclass(frozen=True)
class Artifact:
    """What a compile leaves behind; only the backend that made it reads `payload`."""

    payload: Any
    model_bytes: int | None
    """Size in bytes of the file that would be deployed."""
    runtime: str
    """What executes it, with everything about it that changes the numbers."""


class Backend(Protocol):
    """A vendor toolchain. `compile` and `run` may raise anything: the harness turns it into a record.

    `kind` is one of "normative model", "vendor simulator", "vendor quantizer on CPU", "CPU runtime".
    """

    name: str
    vendor: str
    kind: str
    packages: tuple[str, ...]
    """Python packages whose versions belong beside every number this backend gives."""
    schemes: tuple[Scheme, ...]

    def available(self) -> str | None:
        """None if the toolchain can run here, else the reason why not and what would mend it."""
        ...

    def compile(self, model: onnx.ModelProto, calibration: np.ndarray, scheme: Scheme) -> Artifact:
        """Quantize `model` with the vendor's own quantizer. `calibration` is `(n, ...)` float32, as the
        graph's one input takes it. `model` is not modified."""
        ...

    def run(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits `(n, classes)`, float32, of `inputs` `(n, ...)`, float32."""
        ...
