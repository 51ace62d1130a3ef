"""Describe the inputs of a network: their notation on the command line, and random ones.

`--input-shape 32 32 3` is one float32 input, without the batch. `--input-shape 128:int32` has another dtype.
`--input-shape ids=128:int32` also has a name. The option is repeated for a network with several inputs.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx

from qt_jax.errors import InvalidInput
from qt_jax.export.layout import as_graph

DTYPES = ("float32", "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool")
"""Dtypes that an input may have."""

NOTATION = re.compile(r"(?:(?P<name>[^=:\s]*)=)?(?P<sizes>[^=:]*)(?::(?P<dtype>[^=:]*))?")
"""Notation of one input: `name=sizes:dtype`, of which the name and the dtype may be left out."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Describe one input of a network.

    Attributes:
      shape: Sizes without batch; none for one number in each example, such as a time.
      dtype: Name of a dtype of `DTYPES`.
      name: Name of the forward's argument, which the graph's input takes over; None for an argument that is
        given by its place.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str | None = None

    def spec(self) -> jax.ShapeDtypeStruct:
        """Return the shape and the dtype, as `qt_jax.to_onnx` takes them."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


def parse_inputs(given: Sequence[Sequence[str]]) -> tuple[Input, ...]:
    """Read the words of each `--input-shape`.

    Raises:
      InvalidInput: A size or a dtype is none, two inputs have the same name, or only some have one.

    >>> parse_inputs([["32", "32", "3"]])
    (Input(shape=(32, 32, 3), dtype='float32', name=None),)
    >>> [str(input.spec()) for input in parse_inputs([["ids=128:int32"], ["time=:int32"]])]
    ['ShapeDtypeStruct(shape=(128,), dtype=int32)', 'ShapeDtypeStruct(shape=(), dtype=int32)']
    >>> parse_inputs([["32x32x3"]])
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: --input-shape 32x32x3: '32x32x3' is not a whole number above 0...
    """
    inputs = tuple(_parse_input(" ".join(words)) for words in given)
    names = [input.name for input in inputs if input.name is not None]
    if names and (len(names) < len(inputs) or len(set(names)) < len(names)):
        raise InvalidInput(
            f"--input-shape names {', '.join(names)} of {len(inputs)} inputs: give each input a name of its "
            "own, or none"
        )
    return inputs


def _parse_input(text: str) -> Input:
    """Read one input."""
    match = NOTATION.fullmatch(text)
    if match is None or not text:
        raise InvalidInput(
            f"--input-shape {text!r} is not sizes without batch, such as 32 32 3, 128:int32 or ids=128:int32"
        )
    name, dtype = match["name"], match["dtype"]
    sizes = match["sizes"].split()
    for size in sizes:
        if not (size.isdecimal() and int(size)):
            raise InvalidInput(
                f"--input-shape {text}: {size!r} is not a whole number above 0; give the sizes without "
                "batch, such as 32 32 3, and a dtype behind a colon, such as 128:int32"
            )
    if dtype is not None and dtype not in DTYPES:
        note = " (JAX computes with int32)" if dtype == "int64" else ""
        raise InvalidInput(
            f"--input-shape {text}: {dtype!r} is not a dtype of an input{note}; choose one of "
            f"{', '.join(DTYPES)}"
        )
    if name is not None and not name.isidentifier():
        raise InvalidInput(f"--input-shape {text}: {name!r} is not the name of an argument of the forward")
    if not sizes and dtype is None:
        raise InvalidInput(
            f"--input-shape {text} has no sizes: one number in each example is written {text}:float32"
        )
    return Input(tuple(map(int, sizes)), dtype or "float32", name)


def random_inputs(specs: Sequence[jax.ShapeDtypeStruct]) -> tuple[Any, str]:
    """Draw the inputs of one batch: from the normal distribution, or 0 and 1 where they are whole numbers.

    0 and 1 are valid as tokens of any vocabulary, as types of tokens and as masks.

    Args:
      specs: Shape with batch, and dtype, of each input.

    Returns:
      The array of an only input, else a list of arrays; and what they are, in words.

    >>> random_inputs([jax.ShapeDtypeStruct((2, 3), "int32")])
    (array([[1, 1, 1],
           [0, 0, 0]], dtype=int32), '0 or 1 at random, seed 0')
    """
    random = np.random.default_rng(0)
    floats = [np.issubdtype(spec.dtype, np.floating) for spec in specs]
    arrays = [
        random.standard_normal(spec.shape, np.float32)
        if continuous
        else random.integers(0, 2, spec.shape).astype(spec.dtype)
        for spec, continuous in zip(specs, floats, strict=True)
    ]
    kinds = ["random normal"] * any(floats) + ["0 or 1 at random"] * (not all(floats))
    return arrays[0] if len(arrays) == 1 else arrays, f"{' and '.join(kinds)}, seed 0"


def graph_inputs(model: onnx.ModelProto, inputs: Any, layout: str) -> Mapping[str, np.ndarray]:
    """Return inputs by the graph's names, as the graph takes them.

    Args:
      model: Graph from `qt_jax.to_onnx`.
      inputs: The array of an only input as JAX takes it, or a sequence of arrays in the graph's order.
      layout: Layout of the graph.
    """
    arrays = inputs if isinstance(inputs, list | tuple) else [inputs]
    names = [entry.name for entry in model.graph.input]
    return {name: as_graph(array, layout) for name, array in zip(names, arrays, strict=True)}
