"""Run LiteRT, formerly TensorFlow Lite: Google's runtime on Android and, for microcontrollers, on MCUs.

The float ONNX graph becomes a TensorFlow SavedModel (`saved_model`), and TensorFlow's own TFLite converter
quantizes it, or Google's ai-edge-quantizer (`ai_edge_quantizer`), which starts from the float TFLite file.
`tflite` reads and feeds what they make.

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
    leaves weights of fewer than 1,024 elements in float: a small first convolution, for example. The "aeq"
    schemes are described in `ai_edge_quantizer`.

    A product is accumulated in int32 and scaled by s_x s_w / s_y as a 31-bit integer and a shift, see
    B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, https://arxiv.org/abs/1712.05877. Each runtime rounds that scaling in its own way.
    On a ResNet of 1 M parameters and 1,000 CIFAR-10 images, 30 % of XNNPACK's int8 logits differ from those
    of the reference kernels, and its top-1 differs on 4 images. With 16x8 all logits are equal, and both
    runtimes are equally slow: neither XNNPACK nor the optimized kernels have 16x8 convolutions.

Surprises
    A recurrent cell becomes a loop, which ends the process of TensorFlow's calibrator and stops that of
    ai-edge-quantizer: static schemes are refused. What onnx2tf does to a graph is told in `saved_model`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qt_jax.backends.ai_edge_quantizer import AEQ_SCHEMES, FLOAT, quantize_file
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
from qt_jax.backends.saved_model import locate_outputs, write_saved_model
from qt_jax.backends.tflite import (
    LAYOUT,
    MODEL,
    bind,
    channels_last,
    feeds,
    open_interpreter,
    operators,
    products,
    subgraphs,
)

SAVED_MODEL = "saved_model"


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
        Scheme("int8-pc-minmax", 8, 8, True, "minmax", source=FLOAT),
        Scheme("int8-pt-minmax", 8, 8, False, "minmax", source=FLOAT),
        Scheme("int16act-pc-minmax", 8, 16, True, "minmax", source=FLOAT),
        Scheme("int8-dynamic", 8, 8, True, dynamic=True, source=FLOAT),
        *AEQ_SCHEMES,
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
            tensors = write_saved_model(source, calibration, folder / SAVED_MODEL)
            model = _convert(folder / SAVED_MODEL, calibration, scheme, tensors)
            (folder / MODEL).write_bytes(model)
            layout = locate_outputs(folder / MODEL, source, calibration, tensors)
            (folder / LAYOUT).write_text(json.dumps({"inputs": tensors, "outputs": layout}))
        else:
            tensors = json.loads((source / LAYOUT).read_text())["inputs"]
            if scheme.calibration:
                _refuse_loops(source / MODEL)
            if scheme in AEQ_SCHEMES:
                model = quantize_file(source / MODEL, _samples(calibration, tensors), scheme)
            else:
                model = _convert(source / SAVED_MODEL, calibration, scheme, tensors)
            (folder / MODEL).write_bytes(model)
            shutil.copyfile(source / LAYOUT, folder / LAYOUT)
        executed = operators(open_interpreter(folder / MODEL, "reference"))
        return Compiled(len(model), executed, products=products(folder / MODEL, scheme))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        interpreter = open_interpreter(folder / MODEL, runtime.name)
        inputs, outputs = bind(interpreter, folder)

        def run(batch: Batch) -> list[np.ndarray]:
            for details, array in feeds(batch, inputs):
                interpreter.set_tensor(details["index"], array)
            interpreter.invoke()
            return [output.read(interpreter.get_tensor(output.details["index"])) for output in outputs]

        return run


BACKEND = LiteRT()


def _refuse_loops(model: Path) -> None:
    """Refuse a graph with a loop, whose inside neither calibrator sees. TensorFlow's process dies of it."""
    if any(name == "WHILE" for graph in subgraphs(model) for name, _, _ in graph.operators):
        raise Refused(
            "the calibrators do not take a loop (WHILE), which onnx2tf makes of a recurrent cell: take a "
            "scheme without calibration"
        )


def _samples(calibration: Batch, tensors: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the calibration samples one by one, by the names of the SavedModel's inputs."""
    arrays = {
        tensors[name]: channels_last(values) for name, values in by_name(calibration, list(tensors)).items()
    }
    for i in range(len(next(iter(arrays.values())))):
        yield {name: values[i : i + 1] for name, values in arrays.items()}


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
        # A graph of one input takes lists, one of several inputs takes dictionaries.
        converter.representative_dataset = lambda: (
            list(sample.values()) if len(sample) == 1 else sample for sample in _samples(calibration, tensors)
        )
    try:
        return converter.convert()
    except Exception as error:
        # ConverterError from the converter, RuntimeError or ValueError from the calibrator and quantizer.
        raise Refused(f"TFLite converter: {str(error).strip()[:500]}") from error
