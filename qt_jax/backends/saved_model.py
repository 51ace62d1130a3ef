"""Convert a float ONNX graph to a TensorFlow SavedModel with onnx2tf, and find out what that did to it.

The batch is fixed to 1, because a symbolic one would leave shape arithmetic in the graph. `prepare_graph`
rewrites what TensorFlow's converter cannot quantize once onnx2tf has turned it over: a padded MaxPool (the
graph is refused, or the int8 range is ruined), computed shapes, and a GELU made of Erf.

Surprises
    onnx2tf makes every input of three or more axes channels-last: (b, c, ...) becomes (b, ..., c). It also
    renames outputs and makes most of them channels-last. The float TFLite file is therefore compared with
    ONNX Runtime on a few samples, which tells the order of the axes of each output (`locate_outputs`). A
    graph whose values differ in every order is refused. On some failures onnx2tf raises SystemExit, which
    would end the Python process. It is caught, and the row is refused. onnx2tf downloads sample images for
    its dummy inference unless they lie in the working directory, so random ones are put there.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qt_jax.backends.protocol import Batch, Refused, by_name
from qt_jax.backends.tflite import feeds, open_interpreter, signature

if TYPE_CHECKING:
    # A backend loads where only numpy is installed.
    import onnx

TOLERANCE = 1e-3
"""The largest relative error of the float TFLite file against ONNX Runtime. A wrong layout has far more."""
SAMPLES = 4
"""Samples on which the two are compared."""
DUMMY_IMAGES = ("calibration_image_sample_data_20x128x128x3_float32.npy", (20, 128, 128, 3))
"""The file that onnx2tf would download, and the shape of its images."""

_NEVER_NEGATIVE = ("Relu", "Sigmoid")
_GELU_SINCE = 20
"""The first opset with a Gelu."""


def write_saved_model(source: Path, calibration: Batch, folder: Path) -> dict[str, str]:
    """Convert an ONNX file to a SavedModel of batch 1.

    Returns:
      The name of each ONNX input -> its name in the SavedModel.
    """
    import onnx
    import onnx2tf

    from qt_jax.export.storage import save

    model = onnx.load(source)
    arrays = by_name(calibration, [value.name for value in model.graph.input])
    model = prepare_graph(model, {name: (1, *values.shape[1:]) for name, values in arrays.items()})
    tensors = {name: name for name in arrays}
    if len(tensors) > 1:
        tensors = {name: f"input_{i}" for i, name in enumerate(tensors)}  # TensorFlow would change others
        rename(model.graph, tensors)
    save(model, "fixed.onnx")
    name, samples = DUMMY_IMAGES
    np.save(name, np.random.default_rng(0).random(samples, dtype=np.float32))
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            onnx2tf.convert(
                "fixed.onnx", output_folder_path=str(folder), output_signaturedefs=True, not_use_onnxsim=True
            )
    except ModuleNotFoundError as error:  # onnx2tf has one module per operator
        raise Refused(f"onnx2tf: {error}") from error
    except SystemExit as error:
        raise Refused(_complaint(log.getvalue())) from error
    finally:
        print(log.getvalue())
    for file in folder.glob("*.tflite"):
        file.unlink()
    return tensors


def _complaint(log: str) -> str:
    """Return the errors that onnx2tf printed, without colours and repeated blanks.

    >>> _complaint("fine\\n\\x1b[31mERROR:\\x1b[0m Foo OP  is not implemented\\n")
    'onnx2tf: Foo OP is not implemented'
    """
    plain = re.sub(r"\x1b\[\d+m", "", log)
    errors = [" ".join(line.split()[1:]) for line in plain.splitlines() if line.startswith("ERROR:")]
    return "onnx2tf: " + ("; ".join(errors)[:500] or "it ended without a message")


def rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors of a graph, in place."""
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


def prepare_graph(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Rewrite a graph so that TensorFlow can quantize what onnx2tf makes of it.

    An open batch needs arithmetic on shapes, for example to repeat a class token for every image. It is
    computed beforehand, because onnx2tf loses track of it.

    Args:
      model: A float ONNX model, which is changed.
      shapes: The shape of each input, batch included.

    Returns:
      A model that computes the same.
    """
    from qt_jax.backends.constant_folding import fold_constants, known_shapes

    model = fold_constants(known_shapes(fix_shape(model, shapes)))
    model = fold_constants(fuse_gelus(model))  # attributes that have become inputs are Constant nodes
    pad_with_zeros(model.graph)
    return model


def fix_shape(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Fix the shapes of the graph's inputs and the batch of its outputs, in place, and return the model.

    Nodes are renamed to the characters that TensorFlow allows in a scope.
    """
    for value in model.graph.input:
        for dimension, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dimension.dim_value = size
    for output in model.graph.output:
        dimensions = output.type.tensor_type.shape.dim
        if dimensions and not dimensions[0].dim_value:
            dimensions[0].dim_value = 1
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", node.name)
    return model


def fuse_gelus(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace x (1 + erf(x / sqrt 2)) / 2, in any order of its factors, by one Gelu of opset 20.

    TFLite has no Erf. It has a Gelu with a kernel for int8. Without such a pattern, `model` itself is
    returned.
    """
    from onnx import version_converter

    if all(node.op_type != "Erf" for node in model.graph.node):
        return model
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    newer = version_converter.convert_version(model, max(opset, _GELU_SINCE))
    _join_gelus(newer.graph)
    return newer if any(node.op_type == "Gelu" for node in newer.graph.node) else model


def _join_gelus(graph: onnx.GraphProto) -> None:
    """Replace the nodes of every GELU made of Erf by one Gelu, in place."""
    from onnx import helper, numpy_helper

    values = {t.name: numpy_helper.to_array(t).item() for t in graph.initializer if np.prod(t.dims) == 1}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for erf in [node for node in graph.node if node.op_type == "Erf"]:
        scaled = producers.get(erf.input[0])
        if scaled is None:
            continue
        x = _scaled_by(scaled, np.sqrt(0.5), values)
        chain, factors = [erf], []
        while x and len(readers.get(chain[-1].output[0], [])) == 1 and chain[-1].output[0] not in outputs:
            [node] = readers[chain[-1].output[0]]
            others = [name for name in node.input if name != chain[-1].output[0]]
            one = node.op_type == "Add" and len(chain) == 1 and np.isclose(values.get(others[0], 0.0), 1.0)
            if not one and (node.op_type != "Mul" or len(chain) == 1 or len(others) != 1):
                break
            chain.append(node)
            factors += [] if one else others
            if _is_half_of(x, factors, producers, values):
                node.CopyFrom(helper.make_node("Gelu", [x], list(node.output), name=erf.name))
                for dead in chain[:-1]:
                    graph.node.remove(dead)
                if len(readers[scaled.output[0]]) == 1:
                    graph.node.remove(scaled)
                break


def _scaled_by(node: onnx.NodeProto, factor: float, values: dict[str, float]) -> str | None:
    """Return the x of a node that computes `factor` x by Mul or Div, else None."""
    first, *rest = node.input
    if node.op_type == "Div" and np.isclose(values.get(rest[0], 0.0), 1 / factor):
        return first
    if node.op_type == "Mul":
        for x, other in ((first, rest[0]), (rest[0], first)):
            if np.isclose(values.get(other, 0.0), factor):
                return x
    return None


def _is_half_of(x: str, factors: list[str], producers: dict, values: dict[str, float]) -> bool:
    """Tell whether the product of the factors is x / 2."""
    if len(factors) == 2:
        return x in factors and any(np.isclose(values.get(name, 0.0), 0.5) for name in factors)
    return (
        len(factors) == 1 and factors[0] in producers and _scaled_by(producers[factors[0]], 0.5, values) == x
    )


def pad_with_zeros(graph: onnx.GraphProto) -> None:
    """Replace MaxPool(x, pads) by MaxPool(Pad(x, 0)) where no element of x is negative: the maxima are equal.

    onnx2tf pads with the lowest float, which ruins the int8 range of the padded tensor. All logits are then
    alike, or the graph is refused. Behind other activations the pooling is left as it is.
    """
    from onnx import helper, numpy_helper

    producers = {name: node.op_type for node in graph.node for name in node.output}
    nodes = []
    for node in graph.node:
        pads = next((item for item in node.attribute if item.name == "pads"), None)
        if node.op_type == "MaxPool" and pads and producers.get(node.input[0]) in _NEVER_NEGATIVE:
            widths, padded = f"{node.output[0]}_pads", f"{node.output[0]}_padded"
            before, after = np.split(np.int64(pads.ints), 2)
            edges = np.concatenate([[0, 0], before, [0, 0], after])
            graph.initializer.append(numpy_helper.from_array(edges, widths))
            nodes.append(helper.make_node("Pad", [node.input[0], widths], [padded]))
            node.input[0] = padded
            node.attribute.remove(pads)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def locate_outputs(model: Path, source: Path, calibration: Batch, tensors: Mapping[str, str]) -> list[tuple]:
    """Find the outputs of the ONNX graph in the float TFLite file, by their values.

    onnx2tf renames outputs and makes them channels-last. Names and sizes do not always tell which axis is
    which, so ONNX Runtime computes the same samples.

    Returns:
      For each ONNX output (name in the TFLite file's signature, axes, shape, dtype), see `tflite.Output`.

    Raises:
      Refused: An input has an unexpected shape, or no tensor agrees with an output within `TOLERANCE`.
    """
    import onnxruntime

    interpreter = open_interpreter(model, "reference")
    taken, results = signature(interpreter)
    inputs = {name: taken[tensor] for name, tensor in tensors.items()}
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    wanted, found = [], []
    for sample in _samples(by_name(calibration, list(tensors))):
        for details, array in feeds(sample, inputs):
            if tuple(details["shape"]) != array.shape:
                raise Refused(
                    f"onnx2tf made an input of shape {tuple(details['shape'].tolist())} where {array.shape} "
                    "was expected"
                )
            interpreter.set_tensor(details["index"], array)
        interpreter.invoke()
        wanted.append(session.run(None, sample))
        found.append({name: interpreter.get_tensor(value["index"]) for name, value in results.items()})
    names = [output.name for output in session.get_outputs()]
    return [_locate(name, [values[i] for values in wanted], found) for i, name in enumerate(names)]


def _samples(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the first `SAMPLES` samples, each a batch of one; a random one if there is none."""
    count = min(SAMPLES, *(len(values) for values in arrays.values()))
    if not count:
        random = np.random.default_rng(0)
        return [{k: random.normal(size=(1, *v.shape[1:])).astype(v.dtype) for k, v in arrays.items()}]
    return [{k: np.array(v[i : i + 1]) for k, v in arrays.items()} for i in range(count)]


def _locate(
    name: str, wanted: list[np.ndarray], found: list[dict[str, np.ndarray]]
) -> tuple[str, list[int], list[int], str]:
    """Return the tensor with the values of one output, and its axes in the order of that output.

    Args:
      name: The output's name.
      wanted: Its value for each sample.
      found: The values of all candidates for each sample, by name.

    Raises:
      Refused: No candidate agrees within `TOLERANCE`.

    >>> x = np.arange(8.0).reshape(1, 2, 2, 2)
    >>> _locate("y", [x], [{"a": -x, "b": x.transpose(0, 2, 3, 1)}])
    ('b', [0, 3, 1, 2], [1, 2, 2, 2], 'float64')
    """
    shape = wanted[0].shape
    least, place = np.inf, None
    for tensor, value in found[0].items():
        for axes in _orders(value.shape, shape):
            error = max(
                _relative_error(values[tensor].transpose(axes).reshape(shape), want)
                for values, want in zip(found, wanted, strict=True)
            )
            if error < least:
                least, place = error, (tensor, axes, list(shape), wanted[0].dtype.name)
    if place is None or not least <= TOLERANCE:
        raise Refused(
            f"onnx2tf changed what the graph computes: no output of its TFLite file agrees with {name!r} of "
            f"the ONNX graph in any order of axes (the nearest differs by {least:.2g} of its norm)"
        )
    return place


def _orders(given: tuple[int, ...], wanted: tuple[int, ...]) -> list[list[int]]:
    """Return the orders of axes that turn one shape into the other, the channels-last one first.

    If the numbers of axes differ and the numbers of elements do not, the axes stay as they are.
    """
    if len(given) != len(wanted):
        return [list(range(len(given)))] if np.prod(given) == np.prod(wanted) else []
    rest = range(1, len(given))
    orders = [[0, *order] for order in itertools.permutations(rest)] if given else [[]]
    orders.sort(key=lambda order: order != [0, *rest[-1:], *rest[:-1]])
    return [order for order in orders if tuple(given[axis] for axis in order) == wanted]


def _relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return |found - wanted| / |wanted| in Euclidean norms; infinity if it is not a number."""
    difference = np.linalg.norm(np.subtract(found, wanted, dtype=np.float64))
    error = difference / max(np.linalg.norm(wanted.astype(np.float64)), np.finfo(np.float32).tiny)
    return float(error) if np.isfinite(error) else np.inf
