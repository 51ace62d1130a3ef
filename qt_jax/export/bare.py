"""Load a network from a checkpoint that nothing describes, such as one of a training loop of one's own.

The module is named, and the shapes of its inputs are given. What the module makes on them says which
variables to look for in the checkpoint, and which outputs there are.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.errors
import jax

from qt_jax.config import QuantConfig
from qt_jax.errors import InvalidInput
from qt_jax.export.checkpoints import restore
from qt_jax.export.inputs import Input
from qt_jax.export.network import Deployable, assemble, bound_forward, create_module, read_samples
from qt_jax.export.variables import PARAMS, Shapes, expected_variables, find_variables


def from_checkpoint(
    checkpoint: str | os.PathLike,
    model: str,
    inputs: Sequence[Input],
    *,
    arguments: Mapping[str, Any],
    call: Mapping[str, Any],
    places: Sequence[str] = (),
    outputs: Sequence[str] = (),
    quantization: QuantConfig | None = None,
    samples: str | os.PathLike | None = None,
) -> Deployable:
    """Load a network from a checkpoint that nothing describes.

    Args:
      checkpoint: Checkpoint, as `checkpoints.restore` takes it.
      model: `package.module:factory`, a function or class that returns the Linen module.
      inputs: Inputs of the forward, in the order of its arguments.
      arguments: Keyword arguments of the factory.
      call: Keyword arguments of the forward.
      places: Paths in the checkpoint that the variables are taken from, see `variables.find_variables`.
      outputs: Names of the outputs to keep, in the order of the graph; none for all.
      quantization: Config of training.
      samples: File of samples, see `read_samples`.

    Raises:
      InvalidInput: As `deployable` and `find_variables`. The forward fails on these inputs, or has no such
        output, or several outputs of which one has no batch.
    """
    module = create_module(model, arguments)
    specs = [jax.ShapeDtypeStruct((1, *input.shape), input.dtype) for input in inputs]
    given = "inputs of " + ", ".join(f"shape {spec.shape} {spec.dtype}" for spec in specs)
    with _refusal(f"{model} cannot be initialised on {given}"):
        expected = expected_variables(bound_forward(module.init, inputs, call), specs)
    if not expected[PARAMS]:
        raise InvalidInput(f"{model} has no parameters: there is nothing to take from a checkpoint")
    variables, found = find_variables(restore(checkpoint), expected, str(checkpoint), places)
    forward = bound_forward(module.apply, inputs, call)
    real = None if samples is None else read_samples(samples, inputs)
    network = assemble(forward, variables, inputs, quantization, real)
    with _refusal(f"the forward of {model} fails on {given}", _missing(expected, found, str(checkpoint))):
        returned = jax.eval_shape(forward, network.variables, *specs)
    chosen = _chosen(_by_name(returned), outputs, model)
    names = [input.name for input in inputs if input.name is not None]

    def apply_fn(variables: Mapping[str, Any], *arrays: Any) -> Any:
        leaves = _by_name(forward(variables, *arrays))
        return tuple(leaves[name] for name in chosen)

    origins = ", ".join(f"{collection} from {place}" for collection, place in found.items())
    return dataclasses.replace(
        network,
        apply_fn=apply_fn,
        input_names=tuple(names) or None,
        output_names=_output_names(chosen, names) if outputs or len(chosen) > 1 else None,
        notes={"variables": origins, **network.notes},
    )


def _by_name(returned: Any) -> dict[str, Any]:
    """Return the arrays that a forward returns by their names: `logits`, or `hidden_states/0`, or `1`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(returned)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _chosen(returned: Mapping[str, Any], outputs: Sequence[str], model: str) -> tuple[str, ...]:
    """Return the names of the outputs to export.

    Raises:
      InvalidInput: There is no such output, it is given twice, or one has no batch.
    """
    listed = ", ".join(f"{name or '(the only one)'} {tuple(leaf.shape)}" for name, leaf in returned.items())
    for name in outputs:
        if name not in returned:
            raise InvalidInput(f"--output {name}: {model} has no such output; its outputs are {listed}")
        if outputs.count(name) > 1:
            raise InvalidInput(f"--output {name} is given twice: name each output once, of {listed}")
    chosen = tuple(outputs or returned)
    for name in chosen:
        if returned[name].shape[:1] != (1,):
            raise InvalidInput(
                f"the output {name or 'of the model'} has shape {tuple(returned[name].shape)} for a batch of "
                f"1, and does not lead with the batch: choose others with --output; there are {listed}"
            )
    return chosen


def _output_names(chosen: Sequence[str], inputs: Sequence[str]) -> tuple[str, ...]:
    """Name the graph's outputs: as the model does, save for numbers and names of inputs."""
    return tuple(f"output_{name}" if name in inputs or name[:1].isdecimal() else name for name in chosen)


@contextmanager
def _refusal(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever the model's code raises into one line, with the line of the code if the error names it.

    Args:
      what: What fails.
      advice: What to do about it; empty for what suits the error.

    Raises:
      InvalidInput: The block fails.
    """
    try:
        yield
    except Exception as error:  # whatever the model's code raises
        first, *rest = str(error).strip().splitlines() or [""]
        place = next((f" {line.strip()}" for line in rest if "from line" in line), "")
        reason = f"{type(error).__name__}: {first[:300]}{place}".rstrip(".")
        raise InvalidInput(f"{what}: {reason}. {advice or _advice(error)}") from error


def _missing(expected: Mapping[str, Shapes], found: Mapping[str, str], checkpoint: str) -> str:
    """Say which collections the checkpoint lacks; nothing if it has all."""
    lacking = [collection for collection in expected if collection not in found]
    if not lacking:
        return ""
    example = "/".join(next(iter(expected[lacking[0]])))
    return (
        f"The model has {' and '.join(lacking)} (such as {example}), which {checkpoint} lacks, or has in "
        "other shapes: save all variables of the model, not only its parameters."
    )


def _advice(error: Exception) -> str:
    """Say what to change when the model's code fails on the inputs."""
    if isinstance(error, flax.errors.ModifyScopeVariableError | flax.errors.InvalidRngError):
        return "Call the model for inference, such as --call '{\"train\": false}'."
    return (
        "Give --input-shape for each input, in the order of the forward's arguments, without batch, and a "
        "dtype for whole numbers, such as 128:int32; --call gives the forward's other arguments."
    )
