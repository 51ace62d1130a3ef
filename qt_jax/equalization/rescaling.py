"""Prepare a graph for rescaling, apply factors to its constants, and choose factors in closed form."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import inliner

from qt_jax.backends.constant_folding import folded
from qt_jax.backends.inputs import real_inputs
from qt_jax.equalization.channels import RECURRENT
from qt_jax.equalization.walk import Freedom
from qt_jax.export import graph
from qt_jax.export.operators import WEIGHTED
from qt_jax.export.sessions import open_unoptimized

COPIED = 2**16
"""Number of elements up to which a constant that several nodes read is copied for each. A larger one stays
shared, and keeps its values."""

ROUNDS = 200
"""Number of passes over all layers in which the closed form is sought."""

LARGEST_FACTOR = 2.0**16
"""Bound of factors and of their inverses: a channel of almost no weights is not scaled without end."""


def with_own_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with constants as initializers, a small one for each node that reads it.

    Functions are inlined. What depends on constants alone is computed. The function of the graph is the same.

    >>> kernel = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")
    >>> nodes = [onnx.helper.make_node("MatMul", [a, "w"], [b]) for a, b in ("xh", "hy")]
    >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 2]) for name in "xy")
    >>> shared = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [kernel]))
    >>> [tensor.name for tensor in with_own_constants(shared).graph.initializer]
    ['w', 'w#2']
    """
    model = inliner.inline_local_functions(model) if model.functions else model
    model = folded(model)
    values = graph.constants(model)
    held = {name for name, value in values.items() if value.size > COPIED}
    outputs = {entry.name for entry in model.graph.output}
    captured = (set(graph.names_read(node)) - set(node.input) for node in model.graph.node)
    seen = Counter(set().union(*captured))  # graphs inside nodes keep what they read
    taken = set(values) | {name for node in model.graph.node for name in node.output}
    nodes = []
    for node in model.graph.node:
        inputs = list(node.input)
        for place, name in enumerate(node.input):
            if name not in values or name in held | outputs or values[name].dtype != np.float32:
                continue
            seen[name] += 1
            if seen[name] > 1:
                while f"{name}#{seen[name]}" in taken:
                    seen[name] += 1
                inputs[place] = f"{name}#{seen[name]}"
                values.add(inputs[place], values[name], values.origins.get(name, ""), values.gains.get(name))
        nodes.append(graph.rewired(node, inputs) if inputs != list(node.input) else node)
    return graph.rebuild(model, nodes, values)


def tensors_of(model: onnx.ModelProto, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every tensor of a graph by name, for the first sample or, of a fixed batch, the first samples.

    Args:
      model: Graph to run.
      samples: Arrays `(n, ...)` by input.
    """
    given = next(feeds(model, samples))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    present = {entry.name for entry in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in present)
    found = zip(made, open_unoptimized(watched).run(made, given), strict=True)
    arrays = {name: np.asarray(value) for name, value in found if isinstance(value, np.ndarray | np.generic)}
    return {**given, **arrays}


def feeds(model: onnx.ModelProto, samples: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yield samples as the graph takes them: as many at once as its batch fixes, or one.

    Args:
      model: Any graph.
      samples: Arrays `(n, ...)` by input. Those of an input without a batch axis have one axis more.
    """
    shapes = {entry.name: entry.type.tensor_type.shape.dim for entry in real_inputs(model)}
    fixed = [sizes[0].dim_value for name, sizes in shapes.items() if len(sizes) == samples[name].ndim]
    size = max([1, *fixed])
    count = len(next(iter(samples.values())))
    for start in range(0, max(count // size, 1) * size, size):
        yield {
            name: np.asarray(array[start] if array.ndim > len(shapes[name]) else array[start : start + size])
            for name, array in samples.items()
        }


def rescale(model: onnx.ModelProto, freedom: Freedom, factors: np.ndarray) -> onnx.ModelProto:
    """Return the graph with its constants multiplied by `f[up] / f[down]`.

    Args:
      model: Graph from `with_own_constants`.
      freedom: Its free factors.
      factors: Factors f, float64 `(count + 1,)`, positive, with f[0] = 1.
    """
    values = graph.constants(model)
    for name, value in scaled_constants(values, freedom, factors).items():
        values.add(name, value.astype(np.float32), values.origins.get(name, ""))
    return graph.rebuild(model, model.graph.node, values)


def scaled_constants(
    values: Mapping[str, np.ndarray], freedom: Freedom, factors: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the constants that absorb factors, multiplied by them, in float64."""
    return {
        entry.initializer: values[entry.initializer] * (factors[entry.up] / factors[entry.down])
        for entry in freedom.scaled
    }


def range_factors(model: onnx.ModelProto, freedom: Freedom) -> np.ndarray:
    """Return the factors that equalize the ranges of kernels, layer against layer.

    With u the largest weight, relative to the layer's largest, among those that write a channel, and d the
    same among those that read it, each factor is multiplied by sqrt(d / u), again and again, until u = d for
    all channels. Where several layers write or read a channel, the largest counts. Where no kernel writes it,
    but a normalization, that one's scale and bias take the kernel's place.

    Source: for two layers in a row this is equation (11) of Nagel et al., "Data-Free Quantization Through
    Weight Equalization and Bias Correction" (arXiv 1906.04721), up to one common factor of all channels:
    ranges are relative to the layer's, so that it makes no difference.

    Args:
      model: Graph from `with_own_constants`.
      freedom: Its free factors.

    Returns:
      Factors, float64 `(count + 1,)`, for `rescale`.
    """
    constants = graph.constants(model)
    kernels = {node.input[1] for node in model.graph.node if node.op_type in WEIGHTED | RECURRENT}
    factors = np.ones(freedom.count + 1)
    for _ in range(ROUNDS):
        values = scaled_constants(constants, freedom, factors)
        written, affine, read = (np.zeros(freedom.count + 1) for _ in range(3))
        for entry in freedom.scaled:
            value = np.abs(values[entry.initializer])
            value /= value.max(initial=0) or 1.0
            _largest(written if entry.initializer in kernels else affine, entry.up, value)
            if entry.initializer in kernels:
                _largest(read, entry.down, value)
        written = np.where(written > 0, written, affine)
        both = (written > 0) & (read > 0)
        both[0] = False
        step = np.sqrt(read[both] / written[both])
        factors[both] = np.clip(factors[both] * step, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        if np.abs(np.log(step)).max(initial=0) < 1e-3:
            break
    return factors


def _largest(found: np.ndarray, labels: np.ndarray, value: np.ndarray) -> None:
    """Raise `found` at each label to the largest of the values that bear it."""
    wide = tuple(axis for axis in range(value.ndim) if labels.shape[axis] == 1)
    reduced = value.max(axis=wide, keepdims=True, initial=0)
    np.maximum.at(found, np.broadcast_to(labels, reduced.shape).ravel(), reduced.ravel())
