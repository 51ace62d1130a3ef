"""Run LiteRT, formerly TensorFlow Lite: Google's runtime on Android and, for microcontrollers, on MCUs.

The float ONNX graph becomes a TensorFlow SavedModel (onnx2tf), and TensorFlow's own TFLite converter
quantizes it, or Google's ai-edge-quantizer. The batch is fixed to 1, because a symbolic one would leave shape
arithmetic in the graph.

Numerics
    Weights are symmetric int8, q = round(w / s) in [-127, 127], s = max|w| / 127. There is one s for each
    output channel ("pc", of Gemm as well as Conv) or one for the kernel ("pt"). Activations are asymmetric
    int8, q = round(x / s) + z in [-128, 127], with one (s, z) for each tensor and s = (max - min) / 255 over
    all calibration images. The range is widened to hold 0. Biases are int32 at scale s_x s_w. `int16act` is
    the "16x8" scheme: activations are symmetric int16 (z = 0), biases int64. In these static schemes every
    operator must have an integer kernel, and the input and the output of the graph are integers too. A graph
    that has an operator without an integer kernel is refused.

    `int8-dynamic` keeps activations float in the file. A convolution or matmul whose weights are int8
    (per channel) quantizes its input to int8 at run time, over the one image it is given. The converter
    leaves weights of fewer than 1,024 elements in float: a small first convolution, for example.

    "aeq" schemes are those of ai-edge-quantizer, Google's newer quantizer, which starts from the float TFLite
    file. Its int8 grids are the same. 4-bit weights are symmetric, q = round(w / s) in [-8, 7] with
    s = max|w| / 7, so that -8 never occurs. "octav" clips max|w| to the value c that OCTAV finds for each
    channel (C. Sakr et al., ICML 2022, https://arxiv.org/abs/2206.06501): s = c / 7, and weights beyond it
    saturate, at -8 too. In static schemes only CONV_2D and FULLY_CONNECTED have 4-bit weights. Other
    operators (depthwise convolutions, for example) have 8-bit weights, or stay float if they have no int8
    kernel. "minmax" takes the extremes of all images. "average" is the tool's default: a moving average of
    each image's extremes that starts with the first image and gives each later one a weight of 0.05, so that
    values beyond it saturate. "dynamic" is as above, with 4-bit weights of any size in CONV_2D and
    FULLY_CONNECTED. "stored" only stores 4-bit weights, which a DEQUANTIZE unpacks, and computes in float.

    A product is accumulated in int32 and scaled by s_x s_w / s_y as a 31-bit integer and a shift, see
    B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, https://arxiv.org/abs/1712.05877. Each runtime rounds that scaling in its own way.
    On a ResNet of 1 M parameters and 1,000 CIFAR-10 images, 30 % of XNNPACK's int8 logits differ from those
    of the reference kernels, and its top-1 differs on 4 images. With 16x8 all logits are equal, and both
    runtimes are equally slow: neither XNNPACK nor the optimized kernels have 16x8 convolutions.

Surprises
    onnx2tf makes every input of three or more axes channels-last: (b, c, ...) becomes (b, ..., c). It also
    renames outputs and makes most of them channels-last. The float TFLite file is therefore compared with
    ONNX Runtime on a few samples, which tells the order of the axes of each output. A graph whose values
    differ in every order is refused. A recurrent cell becomes a loop, which ends the process of TensorFlow's
    calibrator and stops that of ai-edge-quantizer: static schemes are refused. On some failures onnx2tf
    raises SystemExit, which would end the Python process. It is caught, and the row is refused. onnx2tf
    downloads sample images for its dummy inference unless they lie in the working directory, so random ones
    are put there. TensorFlow's converter cannot quantize what onnx2tf makes of a padded MaxPool (the graph is
    refused, or the int8 range is ruined), of computed shapes, or of a GELU made of Erf: `prepare_graph`
    rewrites them.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qt_jax.backends.protocol import (
    Batch,
    Compiled,
    Environment,
    Refused,
    Runtime,
    Scheme,
    Session,
    by_name,
)

if TYPE_CHECKING:
    # Ethos-U imports this module in an environment without onnx.
    import onnx

MODEL, SAVED_MODEL, LAYOUT = "model.tflite", "saved_model", "layout.json"
TOLERANCE = 1e-3
"""The largest relative error of the float TFLite file against ONNX Runtime. A wrong layout has far more."""
SAMPLES = 4
"""Samples on which the two are compared."""

_FLOAT = ("litert", "fp32")
_AVERAGE = "moving average of each image's extremes"
_KERNELS = {"xnnpack": "AUTO", "reference": "BUILTIN_REF"}
"""Runtime -> LiteRT's name for its kernels."""
_SAMPLES = ("calibration_image_sample_data_20x128x128x3_float32.npy", (20, 128, 128, 3))
"""The file that onnx2tf would download, and the shape of its images."""
_NEVER_NEGATIVE = ("Relu", "Sigmoid")
PRODUCTS = {
    "CONV_2D": (0, 1),
    "CONV_3D": (0, 1),
    "DEPTHWISE_CONV_2D": (0, 1),
    "TRANSPOSE_CONV": (2, 1),
    "FULLY_CONNECTED": (0, 1),
    "BATCH_MATMUL": (0, 1),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (0, 1),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (0, 1),
}
"""Operators that multiply -> where their inputs hold the activations, and where the weights."""
_INTEGERS = {"INT4", "INT8", "UINT8", "INT16"}
_GELU_SINCE = 20
"""The first opset with a Gelu."""


class LiteRT:
    """Run LiteRT on the CPU, compiled by onnx2tf and the TFLite converter.

    >>> [scheme.name for scheme in BACKEND.schemes if not scheme.calibration][:3]
    ['fp32', 'int8-dynamic', 'int4w-aeq-dynamic']
    >>> [runtime.name for runtime in BACKEND.runtimes]
    ['xnnpack', 'reference']
    """

    name = "litert"
    vendor = "Google"
    stands_for = "Android phones (XNNPACK on the CPU) and microcontrollers (TFLite's integer kernels)"
    kind = "CPU runtime"
    environment = Environment(
        "litert",
        python="3.11",
        requirements=(
            "tensorflow-cpu==2.21.0",
            "tf_keras==2.21.0",
            "onnx2tf==1.28.8",
            "onnx_graphsurgeon==0.6.1",
            "sng4onnx==2.0.1",
            "psutil==7.2.2",
            "ai-edge-litert==2.3.0",
            "ai-edge-quantizer==0.10.0",
            "onnx==1.21.0",
            "onnxruntime==1.32.0",
            "numpy==2.1.3",
        ),
        megabytes=2250,
        licence="Apache-2.0 (TensorFlow, Keras, LiteRT, ai-edge-quantizer, onnx_graphsurgeon), "
        "MIT (onnx2tf, sng4onnx)",
        variables={"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"},
    )
    packages = ("ai-edge-litert", "ai-edge-quantizer", "tensorflow-cpu", "onnx2tf", "numpy")
    schemes = (
        Scheme("fp32", 32, 32, number_format="float"),
        Scheme("int8-pc-minmax", 8, 8, True, "minmax", source=_FLOAT),
        Scheme("int8-pt-minmax", 8, 8, False, "minmax", source=_FLOAT),
        Scheme("int16act-pc-minmax", 8, 16, True, "minmax", source=_FLOAT),
        Scheme("int8-dynamic", 8, 8, True, dynamic=True, source=_FLOAT),
        Scheme("int8-aeq-pc-minmax", 8, 8, True, "minmax", source=_FLOAT),
        Scheme("int8-aeq-pc-average", 8, 8, True, _AVERAGE, source=_FLOAT),
        Scheme("int4w-aeq-pc-minmax", 4, 8, True, "minmax", source=_FLOAT),
        Scheme("int4w-aeq-pt-minmax", 4, 8, False, "minmax", source=_FLOAT),
        Scheme("int4w-aeq-octav-pc-minmax", 4, 8, True, "minmax", source=_FLOAT),
        Scheme("int4w-aeq-dynamic", 4, 8, True, dynamic=True, source=_FLOAT),
        Scheme("int4w-aeq-octav-dynamic", 4, 8, True, dynamic=True, source=_FLOAT),
        Scheme("int4w-aeq-stored", 4, 32, True, source=_FLOAT),
        Scheme("int4w-aeq-octav-stored", 4, 32, True, source=_FLOAT),
    )
    runtimes = (
        Runtime("xnnpack", "XNNPACK, TFLite's optimized kernels for the rest; 1 thread", timed=True),
        Runtime("reference", "TFLite's plain reference kernels, without a delegate; 1 thread"),
    )

    def available(self) -> str | None:
        return None

    def compile(self, source: Path, calibration: Batch, scheme: Scheme, folder: Path) -> Compiled:
        """Leave `model.tflite` and `layout.json`, and for fp32 the SavedModel that the others start from."""
        if scheme.name == "fp32":
            tensors = _saved_model(source, calibration, folder / SAVED_MODEL)
            model = _convert(folder / SAVED_MODEL, calibration, scheme, tensors)
            (folder / MODEL).write_bytes(model)
            layout = _compare(folder / MODEL, source, calibration, tensors)
            (folder / LAYOUT).write_text(json.dumps({"inputs": tensors, "outputs": layout}))
        else:
            tensors = json.loads((source / LAYOUT).read_text())["inputs"]
            if scheme.calibration:
                _refuse_loops(source / MODEL)
            if "-aeq-" in scheme.name:
                model = _quantize(source / MODEL, calibration, scheme, tensors)
            else:
                model = _convert(source / SAVED_MODEL, calibration, scheme, tensors)
            (folder / MODEL).write_bytes(model)
            shutil.copyfile(source / LAYOUT, folder / LAYOUT)
        executed = operators(_interpreter(folder / MODEL, "reference"))
        return Compiled(len(model), executed, products=products(folder / MODEL, scheme))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        interpreter = _interpreter(folder / MODEL, runtime.name)
        inputs, outputs = bind(interpreter, folder)

        def run(batch: Batch) -> list[np.ndarray]:
            for details, array in feeds(batch, inputs):
                interpreter.set_tensor(details["index"], array)
            interpreter.invoke()
            return [output.read(interpreter.get_tensor(output.details["index"])) for output in outputs]

        return run


BACKEND = LiteRT()


class Output(NamedTuple):
    """Describe how an output of the ONNX graph is read from a tensor of the TFLite file."""

    details: dict
    """LiteRT's description of the tensor."""
    axes: list[int]
    """The tensor's axes in the order of the ONNX output."""
    shape: list[int]
    """Shape of the ONNX output at batch 1."""
    dtype: str

    def read(self, q: np.ndarray) -> np.ndarray:
        """Return the ONNX output, dequantized.

        >>> details = {"dtype": np.float32, "quantization": (0.0, 0), "shape": (1, 4, 5, 3)}
        >>> Output(details, [0, 3, 1, 2], [1, 3, 4, 5], "float32").read(np.zeros((1, 4, 5, 3))).shape
        (1, 3, 4, 5)
        """
        values = dequantize(q, self.details).reshape(self.details["shape"])
        return values.transpose(self.axes).reshape(self.shape).astype(self.dtype, copy=False)


def bind(interpreter: Any, folder: Path) -> tuple[dict[str, dict], list[Output]]:
    """Return the tensor of each ONNX input, by name, and how to read each ONNX output, in order."""
    layout = json.loads((folder / LAYOUT).read_text())
    tensors, results = _signature(interpreter)
    inputs = {name: tensors[tensor] for name, tensor in layout["inputs"].items()}
    return inputs, [
        Output(results[tensor], axes, shape, dtype) for tensor, axes, shape, dtype in layout["outputs"]
    ]


def _signature(interpreter: Any) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return LiteRT's descriptions of the inputs and of the outputs, by their names in the SavedModel.

    The runner must not outlive this call, because an interpreter that is shared refuses to run.
    """
    runner = interpreter.get_signature_runner()
    return runner.get_input_details(), runner.get_output_details()


def feeds(batch: Batch, inputs: Mapping[str, dict]) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield the description of each input with the array that it takes."""
    arrays = by_name(batch, list(inputs))
    for name, details in inputs.items():
        yield details, np.ascontiguousarray(quantize(channels_last(arrays[name]), details))


def _compare(model: Path, source: Path, calibration: Batch, tensors: Mapping[str, str]) -> list[tuple]:
    """Find the outputs of the ONNX graph in the float TFLite file, by their values.

    onnx2tf renames outputs and makes them channels-last. Names and sizes do not always tell which axis is
    which, so ONNX Runtime computes the same samples.

    Returns:
      For each ONNX output (name in the TFLite file's signature, axes, shape, dtype), see `Output`.

    Raises:
      Refused: An input has an unexpected shape, or no tensor agrees with an output within `TOLERANCE`.
    """
    import onnxruntime

    interpreter = _interpreter(model, "reference")
    taken, results = _signature(interpreter)
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


def _saved_model(source: Path, calibration: Batch, folder: Path) -> dict[str, str]:
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
    name, samples = _SAMPLES
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


def _complaint(log: str) -> str:
    """Return the errors that onnx2tf printed, without colours and repeated blanks.

    >>> _complaint("fine\\n\\x1b[31mERROR:\\x1b[0m Foo OP  is not implemented\\n")
    'onnx2tf: Foo OP is not implemented'
    """
    plain = re.sub(r"\x1b\[\d+m", "", log)
    errors = [" ".join(line.split()[1:]) for line in plain.splitlines() if line.startswith("ERROR:")]
    return "onnx2tf: " + ("; ".join(errors)[:500] or "it ended without a message")


def _convert(saved_model: Path, calibration: Batch, scheme: Scheme, tensors: Mapping[str, str]) -> bytes:
    """Return the bytes of the TFLite file that TensorFlow's converter makes for the scheme.

    Args:
      saved_model: The folder of the SavedModel.
      calibration: Samples.
      scheme: One of the schemes.
      tensors: The name of each ONNX input -> its name in the SavedModel.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    if scheme.name != "fp32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter._experimental_disable_per_channel = not scheme.per_channel
    if scheme.calibration:
        kernels, edges = {
            8: (tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.int8),
            16: (tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8, tf.int16),
        }[scheme.activation_bits]
        converter.target_spec.supported_ops = [kernels]
        converter.inference_input_type = converter.inference_output_type = edges
        converter.representative_dataset = lambda: _representatives(calibration, tensors)
    try:
        return converter.convert()
    except Exception as error:
        # ConverterError from the converter, RuntimeError or ValueError from the calibrator and quantizer.
        raise Refused(f"TFLite converter: {str(error).strip()[:500]}") from error


def _quantize(model: Path, calibration: Batch, scheme: Scheme, tensors: Mapping[str, str]) -> bytes:
    """Return the TFLite file that ai-edge-quantizer makes of the float one for the scheme."""
    from ai_edge_quantizer import calibrator, quantizer, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    _fill(manager, scheme)
    ranges = None
    try:
        tool = quantizer.Quantizer(str(model), manager.get_quantization_recipe())
        if scheme.calibration:
            update = qsv_utils.min_max_update
            if scheme.calibration == _AVERAGE:
                update = qsv_utils.moving_average_update
            tracer = calibrator.Calibrator(str(model), num_threads=1, qsv_update_func=update)
            samples = (
                dict(zip(tensors.values(), sample, strict=True)) if isinstance(sample, list) else sample
                for sample in _representatives(calibration, tensors)
            )
            tracer.calibrate({"serving_default": list(samples)}, manager)
            ranges = tracer.get_model_qsvs()
        return bytes(tool.quantize(ranges, enable_progress_report=False).quantized_model)
    except (RuntimeError, ValueError, KeyError) as error:
        raise Refused(f"ai-edge-quantizer: {str(error).strip()[:500]}") from error


def _fill(manager: Any, scheme: Scheme) -> None:
    """Give ai-edge-quantizer's recipe what a scheme asks for."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    algorithms = algorithm_manager.AlgorithmName
    octav = "-octav-" in scheme.name
    algorithm = algorithms.OCTAV if octav else algorithms.MIN_MAX_UNIFORM_QUANT
    granularity = qtyping.QuantGranularity["CHANNELWISE" if scheme.per_channel else "TENSORWISE"]
    operations = qtyping.TFLOperationName
    everything = (".*", operations.ALL_SUPPORTED)
    if scheme.dynamic:
        manager.add_dynamic_config(*everything, scheme.weight_bits, granularity, algorithm)
    elif not scheme.calibration:
        manager.add_weight_only_config(*everything, scheme.weight_bits, granularity, algorithm)
    else:
        manager.add_static_config(*everything, scheme.activation_bits, 8, granularity)
        if scheme.weight_bits == 4:
            for operation in (operations.CONV_2D, operations.FULLY_CONNECTED):
                manager.add_static_config(".*", operation, scheme.activation_bits, 4, granularity, algorithm)


def _refuse_loops(model: Path) -> None:
    """Refuse a graph with a loop, whose inside neither calibrator sees. TensorFlow's process dies of it."""
    if any(name == "WHILE" for graph in _read(model) for name, _, _ in graph.operators):
        raise Refused(
            "the calibrators do not take a loop (WHILE), which onnx2tf makes of a recurrent cell: take a "
            "scheme without calibration"
        )


class Subgraph(NamedTuple):
    """Describe the main graph of a TFLite file, or the inside of a loop."""

    operators: list[tuple[str, list[int], list[int]]]
    """Name, inputs and outputs of each operator."""
    types: list[str]
    """The type of each tensor, such as "INT8"."""
    constant: list[bool]
    """Whether each tensor is stored in the file."""


def _read(model: Path) -> Iterator[Subgraph]:
    """Yield the graphs of a TFLite file."""
    from ai_edge_litert.tools import flatbuffer_utils

    content = flatbuffer_utils.read_model(str(model))
    names = [flatbuffer_utils.opcode_to_name(content, i) or "" for i in range(len(content.operatorCodes))]
    for graph in content.subgraphs:
        yield Subgraph(
            [(names[node.opcodeIndex], list(node.inputs), list(node.outputs)) for node in graph.operators],
            [flatbuffer_utils.type_to_name(tensor.type) for tensor in graph.tensors],
            [content.buffers[tensor.buffer].data is not None for tensor in graph.tensors],
        )


def products(model: Path, scheme: Scheme) -> tuple[int, int] | None:
    """Count the convolutions, matmuls and recurrent cells on the scheme's grid, and all, those in loops too.

    One is on the grid if its weights are stored as integers and, in a calibrated scheme, its activations are
    integers as well. Where only weights are quantized, products of two activations are not counted.
    """
    if scheme.number_format == "float":
        return None
    quantized = total = 0
    for graph in _read(model):
        unpacked = {
            outputs[0]: inputs[0] for name, inputs, outputs in graph.operators if name == "DEQUANTIZE"
        }
        for name, inputs, _ in graph.operators:
            if name not in PRODUCTS:
                continue
            activations, weights = (inputs[i] for i in PRODUCTS[name])
            if graph.constant[unpacked.get(weights, weights)]:
                weights = unpacked.get(weights, weights)
            elif scheme.activation_bits == 32:
                continue
            total += 1
            read = [weights, activations] if scheme.calibration else [weights]
            quantized += all(graph.types[tensor] in _INTEGERS for tensor in read)
    return quantized, total


def _representatives(calibration: Batch, tensors: Mapping[str, str]) -> Iterator[Any]:
    """Yield the samples one by one: a list for a graph of one input, else a dictionary."""
    arrays = {
        tensors[name]: channels_last(values) for name, values in by_name(calibration, list(tensors)).items()
    }
    for i in range(len(next(iter(arrays.values())))):
        sample = {name: values[i : i + 1] for name, values in arrays.items()}
        yield list(sample.values()) if len(sample) == 1 else sample


def _interpreter(model: Path, runtime: str) -> Any:
    """Open a TFLite file with the kernels of a runtime."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType[_KERNELS[runtime]]
    interpreter = Interpreter(str(model), num_threads=1, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    return interpreter


def operators(interpreter: Any) -> dict[str, dict[str, int]]:
    """Count the operators of a TFLite graph, by whether they compute on integers or in floating point.

    An operator without any float tensor counts as integer. So does one with float inputs and int8 weights,
    which quantizes its input as it runs. QUANTIZE and DEQUANTIZE compute in floating point.
    """
    types = {tensor["index"]: np.dtype(tensor["dtype"]).name for tensor in interpreter.get_tensor_details()}
    counts: dict[str, Counter] = {}
    for operator in interpreter._get_ops_details():
        name = operator["op_name"]
        inputs = [types[index] for index in operator["inputs"] if index >= 0]
        outputs = [types[index] for index in operator["outputs"] if index >= 0]
        hybrid = "int8" in inputs[1:] and name not in ("QUANTIZE", "DEQUANTIZE")
        kind = "float" if "float32" in inputs + outputs and not hybrid else "integer"
        counts.setdefault(name, Counter())[kind] += 1
    return {name: dict(kinds) for name, kinds in counts.items()}


def channels_last(images: np.ndarray) -> np.ndarray:
    """Move the channels of `(b, c, ...)` last, as onnx2tf does for every input. `(b, k)` stays as it is.

    >>> channels_last(np.zeros((1, 3, 8, 6))).shape, channels_last(np.zeros((1, 7))).shape
    ((1, 8, 6, 3), (1, 7))
    """
    return np.moveaxis(images, 1, -1) if images.ndim > 2 else images


def quantize(x: np.ndarray, details: dict) -> np.ndarray:
    """Quantize as TFLite's QUANTIZE does: x / s in float32, rounded half away from zero, plus z, saturated.

    Args:
      x: Values, float32.
      details: LiteRT's description of the tensor that takes them. One without a grid takes x as it is.

    >>> quantize(np.float32([-0.5, 0.5, 1.5, 900]), {"dtype": np.int8, "quantization": (1.0, 2)})
    array([  1,   3,   4, 127], dtype=int8)
    """
    scale, zero_point = details["quantization"]
    if not scale:
        return x.astype(details["dtype"], copy=False)
    steps = np.asarray(x / np.float32(scale), np.float64)
    limits = np.iinfo(details["dtype"])
    rounded = np.copysign(np.floor(np.abs(steps) + 0.5), steps) + zero_point
    return np.clip(rounded, limits.min, limits.max).astype(details["dtype"])


def dequantize(q: np.ndarray, details: dict) -> np.ndarray:
    """Return s (q - z) in float32. The values of a tensor without a grid stay as they are.

    >>> dequantize(np.int8([-128, 2, 3]), {"dtype": np.int8, "quantization": (0.5, 2)})
    array([-65. ,   0. ,   0.5], dtype=float32)
    """
    scale, zero_point = details["quantization"]
    if not scale:
        return q
    return np.float32(scale) * (q.astype(np.float32) - np.float32(zero_point))
