"""Put learned activation ranges into the float graph, as Clip nodes of ai.onnx.

In training a quantized layer never sees a number outside its learned range. At lambda = 1 its input is
clip(x, low, high) but for the rounding (Quant-Trim, arXiv 2511.15300, progressive fake quantization). A plain
float graph has lost that. Clip nodes put it back, in FP32 and for every compiler that calibrates: no compiler
then finds a wider range than training did.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
from flax.traverse_util import flatten_dict, unflatten_dict
from onnx import NodeProto, helper

from qt_jax.config import QuantConfig
from qt_jax.export import graph
from qt_jax.export.learned import LearnedLayer, learned_encodings, learned_layers
from qt_jax.export.naming import free_name
from qt_jax.export.operators import weighted_nodes
from qt_jax.interception import COLLECTION, INPUT, LAYERS, Call, intercept

Bounds = tuple[float, float]
"""The lowest and the highest number of a clipped activation."""

TRANSPARENT = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move or select numbers: clipped before or after, the result is the same to the bit."""


def learned_clips(
    model: onnx.ModelProto, variables: Mapping[str, Any], config: QuantConfig
) -> dict[str, Bounds]:
    """Find the activations that may be clipped without changing what any other operator reads.

    Args:
      model: Graph from `to_onnx`.
      variables: Variables as given to `to_onnx`, with Quant-Trim's statistics in `batch_stats`.
      config: Config of training.

    Returns:
      (low, high) for each activation that only quantized layers read: the widest of their learned ranges,
      zero included. An activation with any other reader (a shortcut, a layer in floating point, the end of
      the graph) is left out, because training clipped it on the layer's branch only. The graph's input
      is left out too, because its Clip would stand before the first operator that a compiler could merge it
      with.

    Raises:
      InvalidInput: The statistics cannot be used, as for `qt_jax.export.ranges.tensor_ranges`.

    >>> import flax.linen as nn
    >>> import jax
    >>> import qt_jax as qt
    >>> from qt_jax.export import to_onnx
    >>> net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    >>> x = jax.random.normal(jax.random.key(0), (9, 3))
    >>> variables = qt.attach_statistics(net, net.init(jax.random.key(0), x), QuantConfig(), x)
    >>> with qt.quant_trim(QuantConfig(), 0.0, train=True):
    ...     _, seen = net.apply(variables, x, mutable=["batch_stats"])
    >>> model = to_onnx(net.apply, variables, (3,))
    >>> clips = learned_clips(model, variables | seen, QuantConfig())
    >>> list(clips), [node.op_type for node in insert_clips(model, clips).graph.node]
    (['Relu'], ['Gemm', 'Clip', 'Gemm'])
    """
    inputs = learned_encodings(model, variables, config)[1]
    outputs = {output.name for output in model.graph.output}
    given = {entry.name for entry in model.graph.input}
    source = _sources(model)
    found: dict[str, Bounds] = {}
    for name, readers in graph.readers(model).items():
        following = [node for node in readers if node.op_type != "Shape"]
        alone = all(node.name in inputs and node.input[0] == name for node in following)
        if following and alone and name not in outputs and source(name) not in given:
            ends = [end for node in following for end in (*inputs[node.name].low, *inputs[node.name].high)]
            found[name] = min(0.0, *ends), max(0.0, *ends)
    return found


def insert_clips(model: onnx.ModelProto, clips: Mapping[str, Bounds]) -> onnx.ModelProto:
    """Clip the activations `clips`, at the same opset.

    A Relu becomes Clip(0, high), a Clip is narrowed, and any other tensor gets a new Clip, `<tensor>/Clip`.
    Where operators only move or select the numbers of a tensor, the Clip stands before them.

    Args:
      model: Graph from `to_onnx`.
      clips: Bounds from `learned_clips`.
    """
    source = _sources(model)
    writer = _Writer(model, {source(name): bounds for name, bounds in clips.items()})
    return graph.with_shapes(graph.rebuild(model, writer.nodes(), writer.values))


def clipped_forward(
    apply_fn: Callable[..., Any], model: onnx.ModelProto, clips: Mapping[str, Bounds]
) -> Callable[..., Any]:
    """Let every layer in `apply_fn` clip its input as `insert_clips` clips the tensor that it reads.

    Args:
      apply_fn: `(variables, *inputs) -> anything`, a forward of the Linen model.
      model: Graph that `clips` was made from, which tells what each layer reads.
      clips: Bounds from `learned_clips`.

    >>> import flax.linen as nn
    >>> import jax
    >>> from qt_jax.export import to_onnx
    >>> net, x = nn.Sequential([nn.relu, nn.Dense(1, use_bias=False)]), np.float32([[9.0]])
    >>> variables = {"params": {"layers_1": {"kernel": np.float32([[2.0]])}}}
    >>> clipped_forward(net.apply, to_onnx(net.apply, variables, (1,)), {"Relu": (0.0, 3.0)})(variables, x)
    Array([[6.]], dtype=float32)
    """
    read = {name: clips.get(node.input[0]) for name, node in weighted_nodes(model).items()}

    def forward(variables: Any, *inputs: Any) -> Any:
        layers = learned_layers(model, variables)
        repeated = {layer.path for layer in layers.values() if layer.steps}
        bounds: dict[str, list[Bounds | None]] = defaultdict(list)
        for name, layer in layers.items():
            bounds[layer.path].append(read[name])
        calls: Counter[str] = Counter()

        def clip(call: Call, /, *args: Any, **kwargs: Any) -> Any:
            path = call.path
            if not isinstance(call.module, LAYERS) or path not in bounds:
                return call(*args, **kwargs)
            if path in repeated:
                step: Any = call.module.get_variable(COLLECTION, INPUT)
                if step is None:  # the layer is in floating point, and reads nothing that is clipped
                    return call(*args, **kwargs)
                return call(jnp.clip(args[0], step["low"], step["high"]), *args[1:], **kwargs)
            chosen = bounds[path][min(calls[path], len(bounds[path]) - 1)]  # a module may be called twice
            calls[path] += 1
            if chosen is None:
                return call(*args, **kwargs)
            return call(jnp.clip(args[0], *chosen), *args[1:], **kwargs)

        with intercept(clip):
            return apply_fn(_with_bounds(variables, layers, read), *inputs)

    return forward


def _with_bounds(
    variables: Mapping[str, Any], layers: Mapping[str, LearnedLayer], read: Mapping[str, Bounds | None]
) -> Mapping[str, Any]:
    """Replace the input ranges of layers that nn.scan repeats by the bounds of each step.

    The scan then hands each step its own. Where a step is not clipped the bounds are infinite.
    """
    statistics = flatten_dict(dict(variables.get(COLLECTION, {})), sep="/")
    open_ends = {"low": -np.inf, "high": np.inf}
    bounds: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        if layer.steps and layer.statistic(INPUT, "low") in statistics:
            for end, value in zip(open_ends, read[name] or open_ends.values(), strict=True):
                where = layer.statistic(INPUT, end)
                shape = np.shape(statistics[where])
                bounds.setdefault(where, np.full(shape, open_ends[end], np.float32))[layer.steps] = value
    return {**variables, COLLECTION: unflatten_dict(statistics | bounds, sep="/")}


def _sources(model: onnx.ModelProto) -> Callable[[str], str]:
    """Return a function from a tensor to the tensor at the start of its chain.

    A chain is made of `TRANSPARENT` operators, and each tensor in it has one reader.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    read = graph.uses(model)

    def source(name: str) -> str:
        while name in makers and makers[name].op_type in TRANSPARENT and read[makers[name].input[0]] == 1:
            name = makers[name].input[0]
        return name

    return source


class _Writer:
    """Write the clipped graph.

    Attributes:
      values: Constants by name; the bounds are added.
      renamed: Maps a tensor to the tensor that replaces it.
      taken: Names that are taken.
    """

    def __init__(self, model: onnx.ModelProto, clips: Mapping[str, Bounds]):
        self.model, self.clips = model, clips
        self.values = graph.constants(model)
        self.renamed: dict[str, str] = {}
        made = [name for node in model.graph.node for name in (node.name, *node.output)]
        self.taken = {entry.name for entry in model.graph.input} | self.values.keys() | set(made)

    def nodes(self) -> list[NodeProto]:
        """Return the nodes of the clipped graph, in order."""
        found: list[NodeProto] = []
        for node in self.model.graph.node:
            node = graph.rewired(node, [self.renamed.get(name, name) for name in node.input])
            found += self._clipped(node) if node.output[0] in self.clips else [node]
        return found

    def _clipped(self, node: NodeProto) -> list[NodeProto]:
        """Return `node` with its output clipped."""
        output = node.output[0]
        low, high = self.clips[output]
        if node.op_type == "Relu":
            name = self._free(f"{node.name.rpartition('/')[0]}/Clip".removeprefix("/"))
            self.renamed[output] = name
            return [self._clip(name, node.input[0], name, max(low, 0.0), high)]
        held = [self.values.get(name) for name in node.input[1:] if name]
        if node.op_type == "Clip" and all(value is not None for value in held):
            ends = [float(self.values[name]) if name else None for name in [*node.input[1:], "", ""][:2]]
            low = low if ends[0] is None else max(low, ends[0])
            high = high if ends[1] is None else min(high, ends[1])
            return [self._clip(node.name, node.input[0], output, low, high)]
        return [node, self._own(output)]

    def _own(self, tensor: str) -> NodeProto:
        """Make a new Clip behind `tensor`, which replaces it."""
        name = self._free(f"{tensor}/Clip")
        self.renamed[tensor] = name
        return self._clip(name, tensor, name, *self.clips[tensor])

    def _clip(self, name: str, source: str, output: str, low: float, high: float) -> NodeProto:
        """Make a Clip of that name, and add its bounds to the constants."""
        ends = f"{name}/min", f"{name}/max"
        self.values |= dict(zip(ends, (np.asarray(end, np.float32) for end in (low, high)), strict=True))
        return helper.make_node("Clip", [source, *ends], [output], name=name)

    def _free(self, base: str) -> str:
        """Take a name: `base`, with a number where that is taken."""
        name = free_name(base, self.taken)
        self.taken.add(name)
        return name
