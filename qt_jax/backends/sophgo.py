"""Run Sophgo's TPUs: tpu-mlir's compiler and quantizer, and the C models of the chips that it ships.

Numerics
    Activations are symmetric around 0 with one threshold per tensor and a step of threshold / 127. A tensor
    that cannot be negative is unsigned with a step of threshold / 255. On CV181x it stays signed, and half of
    the int8 grid is empty behind a ReLU. "asym" is affine. Kernels are symmetric int8. The compiled graph
    shows how each chip requantizes:

    ================  =======================================================================================
    BM1684X, BM1688   Convolutions: one scale per output channel, integer multiplier and right shift, rounding
                      half up. Matmuls: one scale per tensor. Additions rescale both sides to a common
                      step with 8-bit multipliers.
    CV181x            The same granularity, with multipliers of 32 bits.
    BM1684            One scale per tensor and only a right shift. The ratio of kernel to activation scales
                      is a power of two. Biases are int16.
    ================  =======================================================================================

    "w4int8" has 8-bit activations and kernels on [-7, 7] with scale max|w| / 7, one per output channel of a
    convolution and one per matmul. "int4" has 4 bits for both. Additions stay uint8. Thresholds minimize the
    Kullback-Leibler divergence of histograms of 2048 bins ("kl") and are then tuned on 5 images, both the
    tool's defaults. "max" is the largest magnitude instead. Calibration sees images one by one, and one table
    serves every chip.

Execution
    The chip's C model runs in this process. It computes a fixed batch, and most of its time does not depend
    on the batch. Graphs with a symbolic batch are therefore compiled for `BATCH` images. The exception is
    int4, which is compiled for one image, because its results depend on the batch. All others gave bit-equal
    logits at batch 1 and 16.

    Layers that are left in float are named in tpu-mlir's quantize table: float32, and bfloat16 on CV181x,
    which has no float32. tpu-mlir fuses a convolution with what follows, which is then in float as well.

Surprises
    Calibration crashes on a GRU or an LSTM. Outputs of CV181x have four axes, whatever the graph says: each
    gets the shape that it has in the converted graph.
    "kl" needs many values. From 20 samples of five logits within 1.9 of zero it once took a threshold of
    0.08, and the logits fell from 44 to 0.6 dB. "max" does not fail so.
    Every bmodel carries the chip's kernel library, some 5 MB of a model's bytes on BM1684X and BM1688.
    BM1684 accepts W4INT8 but keeps 8-bit kernels. For W4INT8, code generation fails on BM1684X and CV181x.
    Full INT4 compiles without a warning and collapses to chance on the C model. Its logits change with the
    batch. They also differ from those of the tool's own interpreter of the same lowered graph, which are
    themselves far from float.
    The tool's own runner picks the C model by rewriting a link inside its installation, so that jobs for
    different chips would disturb each other. Here the right library is loaded beforehand, and the link stays
    as it is.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

BATCH = 16
NEWEST_OPSET, NEWEST_IR = 19, 9
"""The newest that the environment's onnx and onnxruntime read."""

FLOAT = "bm1688-f32"
SINGLE, BATCHED = "single", "batched"
"""Folders beside the compiled float model: the converted graph for one image, and for `BATCH` of them."""
LAYERS, LAYOUT = "layers.json", "layout.json"
"""Files: operation of the converted graph for each ONNX node; names of inputs and shapes of outputs."""

_CALIBRATIONS = {"kl": "kl of 2048 bins, tuned on 5 images", "max": "max, tuned on 5 images"}
_PRODUCTS = {"Conv": "Conv", "ConvTranspose": "Deconv", "Gemm": "MatMul", "MatMul": "MatMul"}
"""ONNX operator -> tpu-mlir's."""
_FUSED = {"Relu", "Clip", "BatchNormalization", "Add", "Mul"}
"""Operators that tpu-mlir may fuse with the one before, which then has their name."""
_SIGNATURE = re.compile(r'"tpu\.(\w+)"\(.* : \((.*)$')
_ELEMENT = re.compile(r"tensor<(?:\d+x)*([^<>,\s]+)")
_MOVES = {"Reshape", "Permute"}
_CHANGED_SINCE = {"AffineGrid", "DFT", "Gelu", "GridSample", "GroupNormalization", "ImageDecoder"}
"""Operators that are new since opset 19, or changed up to opset 21 in more than the types they take."""


def _scheme(
    name: str, weights: int, activations: int, per_channel: bool | None, method: str = "kl"
) -> Scheme:
    """Describe a scheme. Its name begins with the chip."""
    calibration = _CALIBRATIONS[method] if activations <= 8 else None
    source = None if name == FLOAT else ("sophgo", FLOAT)
    number_format = "float" if per_channel is None else "integer"
    return Scheme(name, weights, activations, per_channel, calibration, False, number_format, source)


class Sophgo:
    """Run tpu-mlir's C models. The name of a scheme begins with its chip.

    >>> [scheme.name for scheme in BACKEND.schemes][:3]
    ['bm1688-f32', 'bm1688-int8', 'bm1688-int8-max']
    >>> BACKEND.schemes[1].source
    ('sophgo', 'bm1688-f32')
    """

    name = "sophgo"
    vendor = "Sophgo"
    stands_for = "Sophgo BM1684, BM1684X, BM1688 and CV181x TPUs"
    kind = "vendor simulator"
    environment = Environment(
        name="sophgo",
        python="3.10",
        requirements=(
            "torch==1.12.1",
            "numpy==1.24.3",
            "scipy==1.11.1",
            "tqdm==4.70.1",
            "pillow==10.0.0",
            "plotly==7.1.0",
            "opencv-python-headless==4.8.0.76",
            "protobuf==3.20.3",
            "graphviz==0.21",
            "pycocotools==2.0.6",
            "scikit-image==0.21.0",
            "scikit-learn==1.7.2",
            "pandas==2.0.3",
            "onnx==1.14.1",
            "onnxruntime==1.16.3",
            "onnxruntime-extensions==0.14.0",
            "six==1.17.0",
            "setuptools==79.0.1",
            "psutil==7.2.2",
            "transformers==4.49.0",
            "rich==15.0.0",
            "filelock==4.1.0",
        ),
        without_dependencies=("tpu-mlir==1.30.2", "onnxsim==0.4.17"),
        remove=tuple(
            f"tpu_mlir/lib/third_party/{library}" for library in ("libc.so.6", "libm.so.6", "libpthread.so.0")
        ),
        megabytes=3250,
        licence="BSD-2-Clause (tpu-mlir, with third-party components of their own)",
        variables={
            "TPUC_ROOT": "{site}/tpu_mlir",
            "PATH": "{site}/tpu_mlir/bin",
            "PYTHONPATH": "{site}/tpu_mlir:{site}/tpu_mlir/python:{site}/tpu_mlir/customlayer/python",
            "LD_LIBRARY_PATH": "{site}/tpu_mlir/lib:{site}/tpu_mlir/lib/capi:{site}/tpu_mlir/lib/third_party",
            "OMP_NUM_THREADS": "2",
        },
    )
    packages = ("tpu_mlir", "onnx", "onnxsim", "numpy")
    leaves_float = True
    schemes = (
        _scheme(FLOAT, 32, 32, None),
        _scheme("bm1688-int8", 8, 8, True),
        _scheme("bm1688-int8-max", 8, 8, True, "max"),
        _scheme("bm1684x-int8", 8, 8, True),
        _scheme("bm1684x-int8-asym", 8, 8, True),
        _scheme("cv181x-int8", 8, 8, True),
        _scheme("cv181x-bf16", 16, 16, None),
        _scheme("bm1684-int8", 8, 8, False),
        _scheme("bm1688-w4int8", 4, 8, True),
        _scheme("bm1688-int4", 4, 4, True),
    )
    runtimes = (Runtime("cmodel", "tpu-mlir's C model of the chip", batch=BATCH, simulated=True),)

    def available(self) -> str | None:
        return None

    def compile(
        self,
        source: Path,
        calibration: Batch,
        scheme: Scheme,
        folder: Path,
        float_layers: Sequence[str] = (),
    ) -> Compiled:
        """Compile for the scheme's chip. The float scheme also leaves what the others share."""
        if scheme.source is None:
            _convert(source, calibration, folder)
            source = folder
        else:
            shutil.copy(source / LAYOUT, folder / LAYOUT)
        batched = (source / BATCHED).is_dir() and not scheme.name.endswith("int4")
        work = Path("deploy").absolute()
        shutil.copytree(source / (BATCHED if batched else SINGLE), work)
        chip, quantization, *options = scheme.name.split("-")
        model = folder / _file(chip)
        shutil.copy(source / ("max" if "max" in options else "kl"), work / "table")
        left = _float_table(json.loads((source / LAYERS).read_text()), float_layers, chip)
        (work / "float_layers").write_text(left)
        _tool(
            "model_deploy", work, "--mlir", "net.mlir", "--chip", chip, "--quantize", quantization,
            "--calibration_table", "table", "--model", model.name,
            "--tolerance", "0,0", "--skip_validation",  # nothing is compared: no test input is given
            *(["--asymmetric"] if "asym" in options else []),
            *(["--quantize_table", "float_layers"] if left else []),
        )  # fmt: skip
        shutil.copy(work / model.name, model)
        [lowered] = work.glob("*_tpu.mlir")
        return Compiled(model.stat().st_size, operators(lowered.read_text()))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        """Load the chip's C model. Batches are cut, or padded with zeros, to the compiled one."""
        chip = scheme.name.split("-")[0]
        model, network = _network(str(folder / _file(chip)), chip)
        layout = json.loads((folder / LAYOUT).read_text())
        names = layout["inputs"]
        placed = dict(zip(names, network.inputs, strict=True))
        batch = next(iter(placed.values())).data.shape[0]

        def step(arrays: Mapping[str, np.ndarray], size: int) -> list[np.ndarray]:
            for name, tensor in placed.items():
                tensor.data[:size] = arrays[name].reshape(size, *tensor.data.shape[1:])
                tensor.data[size:] = 0
            network.forward()
            return [
                np.array(output.data, dtype).reshape(batch, *shape)[:size]
                for output, (shape, dtype) in zip(network.outputs, layout["outputs"], strict=True)
            ]

        def session(given: Batch, keep: Any = model) -> list[np.ndarray]:
            arrays = by_name(given, names)
            count = len(arrays[names[0]])
            steps = [
                step({name: values[i : i + batch] for name, values in arrays.items()}, min(batch, count - i))
                for i in range(0, count, batch)
            ]
            return [np.concatenate(parts) for parts in zip(*steps, strict=True)]

        return session


BACKEND = Sophgo()


def _file(chip: str) -> str:
    """Return the file name of a chip's compiled model."""
    return "model.cvimodel" if chip.startswith("cv") else "model.bmodel"


def _network(file: str, chip: str) -> tuple[Any, Any]:
    """Open a compiled model; return the object that has to stay alive, and the network."""
    if chip.startswith("cv"):
        import pyruntime_cvi

        network = pyruntime_cvi.Model(file, output_all_tensors=False)
        return network, network
    root = Path(os.environ["TPUC_ROOT"])
    ctypes.CDLL(str(root / "lib" / f"libcmodel_{chip}.so"), mode=ctypes.RTLD_GLOBAL)
    import pyruntime_bm

    model = pyruntime_bm.Model(file, 0, "")
    return model, model.Net(model.networks[0])


def _convert(source: Path, calibration: Batch, folder: Path) -> None:
    """Write the graph in tpu-mlir's own form and its calibration tables to `folder`."""
    from qt_jax.export.storage import save

    model = read(source)
    prepared = Path("float.onnx").absolute()
    save(model, prepared)
    arrays = by_name(calibration, [value.name for value in model.graph.input])
    fixed = any(value.type.tensor_type.shape.dim[0].dim_value == 1 for value in model.graph.input)
    for place, batch in ((SINGLE, 1),) if fixed else ((SINGLE, 1), (BATCHED, BATCH)):
        work = Path(place).absolute()
        work.mkdir()
        shapes = str([[batch, *values.shape[1:]] for values in arrays.values()]).replace(" ", "")
        _tool(
            "model_transform", work, "--model_name", "net", "--model_def", prepared,
            "--input_shapes", shapes, "--mlir", "net.mlir",
        )  # fmt: skip
        (folder / place).mkdir()
        for file in (work / "net.mlir", *work.glob("*weight.npz")):
            shutil.copy(file, folder / place)
    converted = (folder / SINGLE / "net.mlir").read_text()
    (folder / LAYERS).write_text(json.dumps(layers(model.graph, converted)))
    (folder / LAYOUT).write_text(json.dumps({"inputs": list(arrays), "outputs": _outputs(model, converted)}))
    samples = Path("samples").absolute()
    samples.mkdir()
    count = len(next(iter(arrays.values())))
    for i in range(count):
        np.savez(samples / f"{i:06}.npz", **{name: values[i : i + 1] for name, values in arrays.items()})
    for method in _CALIBRATIONS:
        _tool(
            "run_calibration", Path(SINGLE).absolute(), "net.mlir", "--dataset", samples,
            "--input_num", count, "--cali_method", method, "-o", folder / method,
        )  # fmt: skip


def layers(graph: Any, converted: str) -> dict[str, str]:
    """Return the name in tpu-mlir's graph of every ONNX node that has one there.

    An operation is called by an output and the operator of its ONNX node. If operators were fused, it has the
    name of the last one.

    Args:
      graph: The ONNX graph.
      converted: The text of tpu-mlir's graph.
    """
    places = dict(re.findall(r'^(#loc\d+) = loc\("(.*)"\)$', converted, re.MULTILINE))
    found = re.findall(r'"top\.(\w+)"\(.* loc\((#loc\d+)\)$', converted, re.MULTILINE)
    operators = {places[place]: operator for operator, place in found if place in places}
    readers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    named = {}
    for node in graph.node:
        last, wanted = node, _PRODUCTS.get(node.op_type)
        while True:
            name = f"{last.output[0]}_{last.op_type}"
            if name in operators and wanted in (None, operators[name]):
                named[node.name] = name
                break
            following = readers[last.output[0]]
            if name in operators or len(following) != 1 or following[0].op_type not in _FUSED:
                break
            [last] = following
    return named


def _float_table(names: Mapping[str, str], float_layers: Sequence[str], chip: str) -> str:
    """Return tpu-mlir's table of the operations that stay in float; empty if there is none.

    CV181x has no float32: they stay in bfloat16. Raises Refused for a node that tpu-mlir has not kept.
    """
    lost = [layer for layer in float_layers if layer not in names]
    if lost:
        raise Refused(f"tpu-mlir has no operation for the node {lost[0]!r}, or has fused it with others")
    mode = "BF16" if chip.startswith("cv") else "F32"
    return "".join(f"{names[layer]} {mode}\n" for layer in float_layers)


def _outputs(model: Any, converted: str) -> list[tuple[list[int], str]]:
    """Return the shape of each output for one image, in the graph's order, and its dtype."""
    import onnx

    [types] = re.findall(r"^ *return .* : (.*?)(?: loc\(.*\))?$", converted, re.MULTILINE)
    shapes = [[int(size) for size in text.split("x")[:-1]] for text in re.findall(r"tensor<([^>]*)>", types)]
    dtypes = [
        onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type).name
        for output in model.graph.output
    ]
    if any(not shape or shape[0] != 1 for shape in shapes) or len(shapes) != len(dtypes):
        raise Refused(f"tpu-mlir made outputs of the shapes {shapes}, which do not begin with the batch")
    return [(shape[1:], dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def read(source: Path) -> Any:
    """Read a model for the environment's onnx, which is old.

    Operators that are not in `_CHANGED_SINCE` mean the same in opset 19 as in 20 and 21, so the opset is
    lowered to `NEWEST_OPSET`.

    Raises:
      Refused: The graph has an operator of `_CHANGED_SINCE` and a newer opset.
    """
    import onnx

    model = onnx.load(source)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > NEWEST_OPSET:
            changed = ", ".join(sorted({node.op_type for node in model.graph.node} & _CHANGED_SINCE))
            if changed:
                raise Refused(f"{changed} of opset {opset.version}: tpu-mlir reads opset {NEWEST_OPSET}.")
            opset.version = NEWEST_OPSET
    model.ir_version = min(model.ir_version, NEWEST_IR)
    return model


def _tool(name: str, work: Path, *arguments: object) -> None:
    """Run one of tpu-mlir's programs in the folder `work`. Its output goes to the step's log."""
    script = Path(os.environ["TPUC_ROOT"], "python", "tools", f"{name}.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    log = work / f"{name}.log"
    with log.open("w") as stream:
        code = subprocess.run(
            command, cwd=work, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    text = log.read_text(errors="replace")
    print(text, flush=True)
    if code < 0:
        raise ChildProcessError(f"{name} was killed by signal {-code}")
    if code:
        raise Refused(f"{name} ended with {code}: {complaint(text)}")


def complaint(log: str) -> str:
    """Return the last line of a log that names an error, or else its last line.

    >>> complaint("INFO : start\\nloc(x): error: unsupported Foo\\nTraceback:\\nKeyError: 'Foo'\\n bye")
    "KeyError: 'Foo'"
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    errors = [line for line in lines if re.search(r"error|not support|assert|fail", line, re.IGNORECASE)]
    return (errors or lines or ["it said nothing"])[-1][-300:]


def operators(lowered: str) -> dict[str, dict[str, int]]:
    """Count the operators of a lowered graph: integer if no tensor that they read or write is floating.

    The casts at both ends therefore count as float. "GenericCpu" is what the compiler leaves to the host.
    """
    counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"integer": 0, "float": 0, "host": 0})
    for line in lowered.splitlines():
        found = _SIGNATURE.search(line)
        if found and found[1] not in _MOVES:
            elements = _ELEMENT.findall(found[2])
            floating = any(element.startswith(("f", "bf", "!quant.calibrated")) for element in elements)
            where = "host" if found[1] == "GenericCpu" else "float" if floating else "integer"
            counts[found[1]][where] += 1
    return {kind: dict(count) for kind, count in counts.items()}
