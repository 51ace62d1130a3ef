"""Load a trained network: its description (`model.json`), the module it names, and its checkpoint.

A run writes a `Description` and `Samples` beside its checkpoint. `load` reads them back as a `Deployable`, so
that the network can be exported without the code of the run.
"""

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict

from qt_jax.config import QuantConfig, Rule
from qt_jax.errors import InvalidInput
from qt_jax.files import staged, write_whole
from qt_jax.grid import QuantSpec
from qt_jax.interception import COLLECTION, is_quant_trim_statistic

VERSION = 1
"""Version of the description."""

NAME = "model.json"
"""File name of the description of a run's network."""

MARKER = "_METADATA"
"""File by which a folder is recognized as a checkpoint of orbax."""


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
        values = json.loads(path.read_text())
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
    """Hold real inputs as the model takes them, float32 `(n, *input_shape)`: images NHWC and normalized.

    Attributes:
      calibration: A few hundred inputs from the training split, to calibrate what has no learned grid.
      parity: At least 7 inputs on which the exported graph is compared with JAX. More inputs say more.
    """

    calibration: np.ndarray
    parity: np.ndarray


def write_samples(samples: Samples, path: str | os.PathLike) -> None:
    """Write `samples` as a compressed .npz of two arrays, `calibration` and `parity`, whole or not at all."""
    with staged(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, calibration=samples.calibration, parity=samples.parity)


def read_samples(path: str | os.PathLike, input_shape: tuple[int, ...]) -> Samples:
    """Read the samples in a file of `write_samples`.

    Raises:
      InvalidInput: The file is missing or damaged, lacks an array, or holds inputs of another shape.
    """
    path = Path(path)
    try:
        with np.load(path) as file:
            arrays = {name: file[name].astype(np.float32) for name in ("calibration", "parity")}
    except Exception as error:  # numpy raises whatever zipfile and zlib do
        raise InvalidInput(
            f"{path} holds no samples ({type(error).__name__}: {error}): it must be an .npz of two float32 "
            f'arrays, "calibration" and "parity", of shape (n, {", ".join(map(str, input_shape))})'
        ) from error
    for name, array in arrays.items():
        if array.shape[1:] != input_shape or not len(array) or not np.all(np.isfinite(array)):
            raise InvalidInput(
                f'"{name}" of {path} has shape {array.shape} or numbers that are not finite; the model takes '
                f"(n, {', '.join(map(str, input_shape))}), n at least 1"
            )
    return Samples(**arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class Deployable:
    """Hold a network that is ready to be exported.

    Attributes:
      apply_fn: `(variables, inputs) -> outputs`, the forward of inference.
      variables: Flax collections of numpy arrays.
      input_shape: Shape of the input, without batch.
      config: Config of training; None if the variables hold no ranges of Quant-Trim.
      samples: Real inputs, or None.
    """

    apply_fn: Callable[..., Any]
    variables: Mapping[str, Any]
    input_shape: tuple[int, ...]
    config: QuantConfig | None
    samples: Samples | None


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
    key = description.collections.get("params", "params")
    if not held.get(key):
        raise InvalidInput(
            f"the checkpoint {base / description.checkpoint} has no parameters under {key!r}; it holds "
            f"{', '.join(map(repr, held))}"
        )
    variables = {name: held.get(key) or {} for name, key in description.collections.items()}
    learned = any(map(is_quant_trim_statistic, flatten_dict(variables.get(COLLECTION, {}))))
    call = dict(description.call)

    def apply_fn(variables: Mapping[str, Any], inputs: Any) -> Any:
        return module.apply(variables, inputs, **call)

    samples = None
    if description.samples is not None:
        samples = read_samples(base / description.samples, description.input_shape)
    config = description.quantization if learned else None
    return Deployable(apply_fn, variables, description.input_shape, config, samples)


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


def restore(path: str | os.PathLike) -> dict[str, Any]:
    """Restore a checkpoint of orbax as a tree of numpy arrays, whatever devices it was saved from.

    Args:
      path: The checkpoint, a step of a `CheckpointManager`, or a folder of steps, of which the newest counts.

    Raises:
      InvalidInput: There is no checkpoint, or it is damaged.
    """
    folder = epath.Path(find(Path(path)).absolute())
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(folder).tree
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arrays))
    except (ValueError, KeyError, TypeError, OSError) as error:
        symptom = str(error).partition("\n")[0][:200]
        raise InvalidInput(f"the checkpoint {folder} is damaged: {symptom}") from error
    finally:
        handler.close()
    if not isinstance(tree, dict):
        raise InvalidInput(f"the checkpoint {folder} holds a {type(tree).__name__}, not collections by name")
    return tree


def find(path: Path) -> Path:
    """Find the folder of the checkpoint that `path` is, or holds.

    Raises:
      InvalidInput: There is none, or there are several. The message says what `path` is instead.
    """
    if (path / MARKER).exists():
        return path
    children = [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []
    items = [child for child in children if (child / MARKER).exists() and not child.name.isdecimal()]
    steps = [child for child in children if child.name.isdecimal()]
    if len(items) > 1:
        raise InvalidInput(
            f"{path} holds several checkpoints: name one of {', '.join(map(str, sorted(items)))}"
        )
    if items:
        return items[0]
    if steps:
        return find(max(steps, key=lambda step: int(step.name)))
    if path.is_file():
        raise InvalidInput(
            f"{path} is a file, not a checkpoint of orbax, which is a folder: read it in Python, with the "
            "library that wrote it, and export with qt_jax.to_onnx(model.apply, variables, input_shape)"
        )
    raise InvalidInput(
        f"{path} is not a checkpoint of orbax and holds none"
        + ("" if path.is_dir() else " (there is no such folder)")
        + ": name a folder saved by orbax, one of its steps, or the folder of all steps"
    )
