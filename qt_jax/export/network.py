"""Load a trained network: its description (`model.json`), the module it names, and its checkpoint.

A run writes a `Description` and `Samples` beside its checkpoint. `load` reads them back as a `Deployable`, so
that the network can be exported without the code of the run. `qt_jax.export.bare`
makes a `Deployable` of a checkpoint that nothing describes.
"""

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from qt_jax.config import QuantConfig, Rule
from qt_jax.errors import InvalidInput
from qt_jax.export.checkpoints import restore
from qt_jax.export.inputs import Input
from qt_jax.export.variables import PARAMS, single_precision
from qt_jax.files import staged, write_whole
from qt_jax.grid import QuantSpec
from qt_jax.interception import COLLECTION, is_quant_trim_statistic

VERSION = 1
"""Version of the description."""

NAME = "model.json"
"""File name of the description of a run's network."""


@dataclasses.dataclass(frozen=True)
class Description:
    """Describe one trained network.

    Attributes:
      model: `package.module:factory`, a function or class that returns the Linen module.
      arguments: Keyword arguments of the factory.
      call: Keyword arguments of the module's `__call__` at inference, such as `{"train": False}`.
      input_shape: Shape of the one input, without batch: `(height, width, channels)` for images.
      checkpoint: Folder of an orbax checkpoint, or of checkpoints by step (the newest counts), relative to
        the description.
      collections: Maps a Flax collection to the key of the checkpoint that holds it. A moving average is
        exported in place of the parameters by `{"params": "average", ...}`. A key that is absent is an empty
        collection.
      quantization: Config of training; None for a network that was not trained with Quant-Trim.
      samples: File of `write_samples`, relative to the description; None if there is none.
    """

    model: str
    input_shape: tuple[int, ...]
    checkpoint: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    collections: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"params": "params", "batch_stats": "batch_stats"}
    )
    quantization: QuantConfig | None = None
    samples: str | None = None

    def __post_init__(self) -> None:
        shape = self.input_shape
        if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            raise InvalidInput(f"input_shape must hold whole numbers above 0, without the batch; got {shape}")
        for name in ("arguments", "call", "collections"):
            if not isinstance(getattr(self, name), Mapping):
                raise InvalidInput(
                    f"{name} must be an object of names and values, got {getattr(self, name)!r}"
                )


def write_description(description: Description, path: str | os.PathLike) -> None:
    """Write `description` as JSON, whole or not at all; `read_description` gives an equal value back.

    The keys are `version` and the fields of `Description`, with specs and rules as objects.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), NAME)
    >>> config = QuantConfig(rules=(Rule("head", skip=True),))
    >>> description = Description("nets:Net", (32, 32, 3), "checkpoints", {"width": 2}, quantization=config)
    >>> write_description(description, path)
    >>> read_description(path) == description
    True
    """
    values = {field.name: getattr(description, field.name) for field in dataclasses.fields(description)}
    values |= {name: dict(values[name]) for name in ("arguments", "call", "collections")}
    if description.quantization is not None:
        values["quantization"] = dataclasses.asdict(description.quantization)
    write_whole(path, json.dumps({"version": VERSION} | values, indent=1) + "\n")


def read_description(path: str | os.PathLike) -> Description:
    """Read the description that `write_description` wrote.

    Raises:
      InvalidInput: The file is missing or damaged, is not a description, or has another version.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("version")
        if version != VERSION:
            raise InvalidInput(f"its version is {version!r}, this qt_jax reads {VERSION}")
        if values.get("quantization") is not None:
            values["quantization"] = config_from_json(values["quantization"])
        return Description(**values | {"input_shape": tuple(values["input_shape"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path} does not describe a network ({type(error).__name__}: {error}): write it with "
            "qt_jax.export.network.write_description"
        ) from error


def config_from_json(values: Mapping[str, Any]) -> QuantConfig:
    """Make the config whose fields JSON holds; those left out have their defaults.

    Raises:
      InvalidInput: A field is unknown, or a value is out of range.

    >>> weights = config_from_json({"weights": {"bits": 4, "axis": -1}, "activations": None}).weights
    >>> weights  # doctest: +NORMALIZE_WHITESPACE
    QuantSpec(bits=4, symmetric=True, axis=-1, narrow_range=None, ste='identity', quantile=0.999,
    grids='own')
    """

    def specs(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: QuantSpec(**value) if isinstance(value, dict) else value for name, value in values.items()
        }

    try:
        rules = tuple(Rule(**specs(rule)) for rule in values.get("rules", ()))
        outputs = tuple(values.get("fused_outputs", ()))
        return QuantConfig(**specs({**values, "rules": rules, "fused_outputs": outputs}))
    except (TypeError, AttributeError) as error:
        raise InvalidInput(f"this is not a quantization config: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Hold real inputs as the model takes them, `(n, *input_shape)`: images float32, NHWC and normalized.

    A network with several inputs has a tuple of arrays in each field.

    Attributes:
      calibration: A few hundred inputs from the training split, to calibrate what has no learned grid.
      parity: At least 7 inputs on which the exported graph is compared with JAX. More inputs say more.
    """

    calibration: Any
    parity: Any


def write_samples(samples: Samples, path: str | os.PathLike) -> None:
    """Write the samples of one input as a compressed .npz of two arrays, whole or not at all."""
    with staged(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, calibration=samples.calibration, parity=samples.parity)


def read_samples(path: str | os.PathLike, inputs: Sequence[Input]) -> Samples:
    """Read the samples in a file of `write_samples`.

    With several inputs the file has arrays for each: `calibration_0`, `parity_0`, `calibration_1` and so on,
    or `calibration_ids` and `parity_ids` for an input that is named "ids".

    Raises:
      InvalidInput: The file is missing or damaged, lacks an array, or holds inputs of another shape.
    """
    path = Path(path)
    suffixes = [f"_{input.name or index}" for index, input in enumerate(inputs)] if len(inputs) > 1 else [""]
    wanted = {
        f"{part}{suffix}": input
        for part in ("calibration", "parity")
        for suffix, input in zip(suffixes, inputs, strict=True)
    }
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in wanted}
    except Exception as error:  # numpy raises whatever zipfile and zlib do
        kinds = {f"{input.dtype} ({', '.join(map(str, ('n', *input.shape)))})" for input in inputs}
        raise InvalidInput(
            f"{path} holds no samples ({type(error).__name__}: {error}): it must be an .npz of the arrays "
            f"{', '.join(map(repr, wanted))}, {' and '.join(sorted(kinds))}"
        ) from error
    for name, input in wanted.items():
        arrays[name] = _sample(path, name, arrays[name], input)
    if len({len(array) for name, array in arrays.items() if name.startswith("parity")}) > 1:
        raise InvalidInput(f"the parity arrays of {path} differ in length: each example has every input")
    calibration, parity = (
        tuple(array for name, array in arrays.items() if name.startswith(part))
        for part in ("calibration", "parity")
    )
    return Samples(calibration, parity) if len(inputs) > 1 else Samples(calibration[0], parity[0])


def _sample(path: Path, name: str, array: np.ndarray, input: Input) -> np.ndarray:
    """Return an array of samples in the dtype of its input.

    Raises:
      InvalidInput: It is not of the input's shape, or holds what its dtype does not.
    """
    shape = ", ".join(map(str, ("n", *input.shape)))
    if array.shape[1:] != input.shape or not array.ndim or not len(array) or array.dtype.kind not in "biuf":
        raise InvalidInput(
            f'"{name}" of {path} has shape {array.shape} and dtype {array.dtype}; the model takes numbers of '
            f"shape ({shape}), n at least 1"
        )
    if not np.all(np.isfinite(array)):
        raise InvalidInput(f'"{name}" of {path} holds numbers that are not finite')
    cast = array.astype(input.dtype)
    if input.dtype != "float32" and not np.array_equal(cast, array):
        raise InvalidInput(f'"{name}" of {path} holds numbers that are not {input.dtype}, as the model takes')
    return cast


@dataclasses.dataclass(frozen=True, eq=False)
class Deployable:
    """Hold a network that is ready to be exported.

    Attributes:
      apply_fn: `(variables, *inputs) -> outputs`, the forward of inference.
      variables: Flax collections of numpy arrays.
      input_shape: Shape of the input, without batch; of several inputs as `qt_jax.to_onnx` takes them.
      config: Config of training; None if the variables hold no ranges of Quant-Trim.
      samples: Real inputs, or None.
      input_names: Names of the graph's inputs; None for the defaults of `qt_jax.to_onnx`.
      output_names: Names of the graph's outputs; None for the defaults.
      notes: What the user is to know of the variables, by topic.
    """

    apply_fn: Callable[..., Any]
    variables: Mapping[str, Any]
    input_shape: Any
    config: QuantConfig | None
    samples: Samples | None
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load(path: str | os.PathLike) -> Deployable:
    """Load the network that a run's folder, or a description in it, describes.

    The module is imported by the name in the description. This runs the code of the package that it names, as
    found on `sys.path` (with `python -m`, the current directory first). Load only what you trust.

    Args:
      path: Folder that holds `model.json`, or such a file under any name.

    Raises:
      InvalidInput: There is no description, or it is damaged. `deployable` raises it too.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    if not path.exists():
        raise InvalidInput(f"{path} is not there: name the folder of a run, or a description in it")
    if not file.exists():
        raise InvalidInput(
            f"{file} is not there: nothing says which network this is. If the run is older than this file, "
            "repeat the command that trained it, which resumes and adds it. For any other checkpoint give "
            "--model package.module:factory and --input-shape."
        )
    return deployable(read_description(file), file.parent)


def deployable(description: Description, base: str | os.PathLike = ".") -> Deployable:
    """Load the network of a description whose paths are relative to `base`.

    Raises:
      InvalidInput: The module cannot be imported or has no such factory, or the factory does not return a
        Linen module. The checkpoint is missing, damaged or lacks a collection. The samples are missing or
        have another shape.

    >>> deployable(Description("flax.linen:Dence", (3,), "checkpoints", {"features": 2}))
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: module flax.linen has no 'Dence'...
    """
    base = Path(base)
    module = create_module(description.model, description.arguments)
    held = restore(base / description.checkpoint)
    key = description.collections.get(PARAMS, PARAMS)
    if not held.get(key):
        raise InvalidInput(
            f"the checkpoint {base / description.checkpoint} has no parameters under {key!r}; it holds "
            f"{', '.join(map(repr, held))}"
        )
    variables = {name: held.get(key) or {} for name, key in description.collections.items()}
    inputs = (Input(tuple(description.input_shape)),)
    samples = None if description.samples is None else read_samples(base / description.samples, inputs)
    apply_fn = bound_forward(module.apply, inputs, description.call)
    return assemble(apply_fn, variables, inputs, description.quantization, samples)


def assemble(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    inputs: Sequence[Input],
    quantization: QuantConfig | None,
    samples: Samples | None,
) -> Deployable:
    """Make a network of its parts, with its variables in float32."""
    variables, cast = single_precision(variables)
    learned = any(map(is_quant_trim_statistic, flatten_dict(variables.get(COLLECTION, {}))))
    plain = len(inputs) == 1 and inputs[0].dtype == "float32"
    return Deployable(
        apply_fn,
        variables,
        inputs[0].shape if plain else [input.spec() for input in inputs],
        quantization if learned else None,
        samples,
        notes={} if cast is None else {"precision": cast},
    )


def bound_forward(
    method: Callable[..., Any], inputs: Sequence[Input], call: Mapping[str, Any]
) -> Callable[..., Any]:
    """Bind the keyword arguments of a module's method, and give it its inputs by place or by name.

    Args:
      method: `apply` or `init` of a module.
      inputs: Inputs of the forward.
      call: Its other keyword arguments.

    Returns:
      `(first, *arrays) -> result`, of which `first` are the variables or the keys.
    """
    names = [input.name for input in inputs if input.name is not None]
    fixed = dict(call)

    def forward(first: Any, *arrays: Any) -> Any:
        if not names:
            return method(first, *arrays, **fixed)
        return method(first, **dict(zip(names, arrays, strict=True)), **fixed)

    return forward


def create_module(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the factory `package.module:factory` with keyword arguments, and return the module.

    Raises:
      InvalidInput: As `deployable`.

    >>> create_module("flax.linen:Dense", {"features": 2}).features
    2
    """
    package, colon, factory = name.partition(":")
    if not (package and colon and factory):
        raise InvalidInput(f"the model {name!r} is not of the form package.module:factory")
    try:
        imported = importlib.import_module(package)
    except Exception as error:  # whatever that module raises when it runs
        raise InvalidInput(
            f"the module {package!r} of the model {name!r} cannot be imported ({error}). Run the "
            "command where it can be: from the root of that project, or with PYTHONPATH set."
        ) from error
    try:
        make = attrgetter(factory)(imported)
    except AttributeError as error:
        raise InvalidInput(f"module {package} has no {factory!r}, which the model {name!r} names") from error
    try:
        module = make(**arguments)
    except Exception as error:  # whatever the factory raises
        raise InvalidInput(
            f"{name} cannot be called with {dict(arguments)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"{name} makes a {type(module).__name__}, not a flax.linen.Module")
    return module
