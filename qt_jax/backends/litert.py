"""Run LiteRT, formerly TensorFlow Lite: Google's runtime on Android and, for microcontrollers, on MCUs.

The float ONNX graph becomes a TensorFlow SavedModel (onnx2tf), and TensorFlow's own TFLite converter
quantizes it. The batch is fixed to 1, because a symbolic one would leave shape arithmetic in the graph.

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

    A product is accumulated in int32 and scaled by s_x s_w / s_y as a 31-bit integer and a shift, see
    B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, https://arxiv.org/abs/1712.05877. Each runtime rounds that scaling in its own way.
    On a ResNet of 1 M parameters and 1,000 CIFAR-10 images, 30 % of XNNPACK's int8 logits differ from those
    of the reference kernels, and its top-1 differs on 4 images. With 16x8 all logits are equal, and both
    runtimes are equally slow: neither XNNPACK nor the optimized kernels have 16x8 convolutions.

Surprises
    onnx2tf makes every input of three or more axes channels-last: (b, c, ...) becomes (b, ..., c). On some
    failures onnx2tf raises SystemExit, which would end the Python process. It is caught, and the row is
    refused. onnx2tf downloads sample images for its dummy inference unless they lie in the
    working directory, so random ones are put there. TensorFlow's converter cannot quantize what onnx2tf makes
    of a padded MaxPool (the graph is refused, or the int8 range is ruined), of computed shapes, or of a GELU
    made of Erf: `prepare_graph` rewrites them.

Not offered
    INT4 weights: TensorFlow's converter has no such post-training option. Its low-bit flag takes the
    widths of fake quantization in the trained graph.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qt_jax.backends.protocol import Compiled, Environment, Refused, Runtime, Scheme, Session

if TYPE_CHECKING:
    # Ethos-U imports this module in an environment without onnx.
    import onnx

MODEL, SAVED_MODEL = "model.tflite", "saved_model"

_FLOAT = ("litert", "fp32")
_KERNELS = {"xnnpack": "AUTO", "reference": "BUILTIN_REF"}
"""Runtime -> LiteRT's name for its kernels."""
_SAMPLES = ("calibration_image_sample_data_20x128x128x3_float32.npy", (20, 128, 128, 3))
"""The file that onnx2tf would download, and the shape of its images."""
_NEVER_NEGATIVE = ("Relu", "Sigmoid")
_GELU_SINCE = 20
"""The first opset with a Gelu."""


class LiteRT:
    """Run LiteRT on the CPU, compiled by onnx2tf and the TFLite converter.

    >>> [scheme.name for scheme in BACKEND.schemes if not scheme.calibration]
    ['fp32', 'int8-dynamic']
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
            "onnx==1.21.0",
            "onnxruntime==1.32.0",
            "numpy==2.1.3",
        ),
        megabytes=2130,
        licence="Apache-2.0 (TensorFlow, Keras, LiteRT, onnx_graphsurgeon), MIT (onnx2tf, sng4onnx)",
        variables={"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"},
    )
    packages = ("ai-edge-litert", "tensorflow-cpu", "onnx2tf", "numpy")
    schemes = (
        Scheme("fp32", 32, 32, number_format="float"),
        Scheme("int8-pc-minmax", 8, 8, True, "minmax", source=_FLOAT),
        Scheme("int8-pt-minmax", 8, 8, False, "minmax", source=_FLOAT),
        Scheme("int16act-pc-minmax", 8, 16, True, "minmax", source=_FLOAT),
        Scheme("int8-dynamic", 8, 8, True, dynamic=True, source=_FLOAT),
    )
    runtimes = (
        Runtime("xnnpack", "XNNPACK, TFLite's optimized kernels for the rest; 1 thread", timed=True),
        Runtime("reference", "TFLite's plain reference kernels, without a delegate; 1 thread"),
    )

    def available(self) -> str | None:
        return None

    def compile(self, source: Path, calibration: np.ndarray, scheme: Scheme, folder: Path) -> Compiled:
        """Leave `model.tflite` in `folder`, and for fp32 also the SavedModel that the others start from."""
        if scheme.name == "fp32":
            _saved_model(source, calibration.shape[1:], folder / SAVED_MODEL)
            source = folder
        model = _convert(source / SAVED_MODEL, calibration, scheme)
        (folder / MODEL).write_bytes(model)
        interpreter = _interpreter(folder / MODEL, "reference")
        expected = channels_last(calibration[:1]).shape
        if (taken := tuple(interpreter.get_input_details()[0]["shape"].tolist())) != expected:
            raise Refused(f"onnx2tf made an input of shape {taken} where {expected} was expected")
        return Compiled(len(model), operators(interpreter))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        interpreter = _interpreter(folder / MODEL, runtime.name)
        [input_], [output] = interpreter.get_input_details(), interpreter.get_output_details()

        def run(image: np.ndarray) -> np.ndarray:
            interpreter.set_tensor(input_["index"], quantize(channels_last(image), input_))
            interpreter.invoke()
            logits = dequantize(interpreter.get_tensor(output["index"]), output)
            return logits.reshape(len(image), -1)

        return run


BACKEND = LiteRT()


def _saved_model(source: Path, shape: tuple[int, ...], folder: Path) -> None:
    """Convert an ONNX file to a SavedModel of batch 1."""
    import onnx
    import onnx2tf

    from qt_jax.export.storage import save

    save(prepare_graph(onnx.load(source), (1, *shape)), "fixed.onnx")
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


def prepare_graph(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Rewrite a graph so that TensorFlow can quantize what onnx2tf makes of it.

    An open batch needs arithmetic on shapes, for example to repeat a class token for every image. It is
    computed beforehand, because onnx2tf loses track of it.

    Args:
      model: A float ONNX model, which is changed.
      shape: The shape of its input, batch included.

    Returns:
      A model that computes the same.

    Raises:
      Refused: The graph does not have exactly one input.
    """
    from qt_jax.backends.constant_folding import fold_constants, known_shapes

    model = fold_constants(known_shapes(fix_shape(model, shape)))
    model = fold_constants(fuse_gelus(model))  # attributes that have become inputs are Constant nodes
    pad_with_zeros(model.graph)
    return model


def fix_shape(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Fix the shape of the graph's one input and the batch of its outputs, in place, and return the model.

    Nodes are renamed to the characters that TensorFlow allows in a scope.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise Refused(f"the graph has inputs {[value.name for value in inputs]}; it must have one")
    dimensions = inputs[0].type.tensor_type.shape.dim
    for dimension, size in zip(dimensions, shape, strict=True):
        dimension.dim_value = size
    for output in model.graph.output:
        if output.type.tensor_type.shape.dim:
            output.type.tensor_type.shape.dim[0].dim_value = shape[0]
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


def _convert(saved_model: Path, calibration: np.ndarray, scheme: Scheme) -> bytes:
    """Return the bytes of the TFLite file that TensorFlow's converter makes for the scheme."""
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
        images = channels_last(calibration)
        converter.representative_dataset = lambda: ([image[None]] for image in images)
    try:
        return converter.convert()
    except Exception as error:
        # ConverterError from the converter, RuntimeError or ValueError from the calibrator and quantizer.
        raise Refused(f"TFLite converter: {str(error).strip()[:500]}") from error


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
        outputs = [types[index] for index in operator["outputs"]]
        hybrid = "int8" in inputs[1:] and name not in ("QUANTIZE", "DEQUANTIZE")
        kind = "float" if "float32" in inputs + outputs and not hybrid else "integer"
        counts.setdefault(name, Counter())[kind] += 1
    return {name: dict(kinds) for name, kinds in counts.items()}


def channels_last(images: np.ndarray) -> np.ndarray:
    """Move the channels of `(b, c, ...)` last, as onnx2tf does for every input. Vectors stay as they are.

    >>> channels_last(np.zeros((1, 3, 8, 6))).shape, channels_last(np.zeros((1, 7))).shape
    ((1, 8, 6, 3), (1, 7))
    """
    return np.moveaxis(images, 1, -1)


def quantize(x: np.ndarray, details: dict) -> np.ndarray:
    """Quantize as TFLite's QUANTIZE does: x / s in float32, rounded half away from zero, plus z, saturated.

    Args:
      x: Values, float32.
      details: LiteRT's description of the tensor that takes them. A float tensor takes x as it is.

    >>> quantize(np.float32([-0.5, 0.5, 1.5, 900]), {"dtype": np.int8, "quantization": (1.0, 2)})
    array([  1,   3,   4, 127], dtype=int8)
    """
    if details["dtype"] == np.float32:
        return x
    scale, zero_point = details["quantization"]
    steps = np.asarray(x / np.float32(scale), np.float64)
    limits = np.iinfo(details["dtype"])
    rounded = np.copysign(np.floor(np.abs(steps) + 0.5), steps) + zero_point
    return np.clip(rounded, limits.min, limits.max).astype(details["dtype"])


def dequantize(q: np.ndarray, details: dict) -> np.ndarray:
    """Return s (q - z) in float32. The values of a float tensor stay as they are.

    >>> dequantize(np.int8([-128, 2, 3]), {"dtype": np.int8, "quantization": (0.5, 2)})
    array([-65. ,   0. ,   0.5], dtype=float32)
    """
    if details["dtype"] == np.float32:
        return q
    scale, zero_point = details["quantization"]
    return np.float32(scale) * (q.astype(np.float32) - np.float32(zero_point))
