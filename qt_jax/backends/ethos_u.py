"""Run Arm Ethos-U, the NPUs beside Cortex-M and Cortex-A: TOSA's normative model and Arm's compiler Vela.

The integer TFLite file of the LiteRT backend, which Arm's tools take, goes two ways.

Numerics
    It is lowered to TOSA and executed by Arm's reference model. TOSA is the operator set whose specification
    (https://www.mlplatform.org/tosa/) gives the integer result of every operator. Grids, granularity and
    calibration are LiteRT's. A convolution accumulates in int32 (in int48 where activations are int16).
    RESCALE multiplies the sum by a 32-bit integer and shifts it, rounding at both steps (for int16
    activations: a 16-bit integer, rounding once). A residual addition is done in int32.

    This was compared with TFLite's reference kernels on a ResNet of 1 M parameters and CIFAR-10.
    Convolutions, additions and means gave the same integers wherever every operator was traced (20 images,
    three schemes). FULLY_CONNECTED did not: over 1,000 images 0.08 % of the int8 logits and 7 % of the int16
    ones were one step away, and none of them changed the top-1. TFLite's kernel rounds once, with a 32-bit
    multiplier for either width. This one law, put in place of RESCALE's after the same accumulators, gives
    each of its logits (300 images, all three schemes).

Cost
    Vela compiles the same file for each of `ACCELERATORS`. By its model of the core and of its memories it
    estimates cycles and milliseconds of one inference, memory used, and bytes moved. The record's `cycles` is
    that of the first accelerator. The clock and bandwidths are those of the named system configuration.

Surprises
    Vela dies of some graphs that gather by integer inputs. It leaves operators that it cannot map to the host
    CPU, even all of them, and still succeeds. `operators` counts these as "host", and the cycles do not
    include them. The reference model is not the hardware: that Ethos-U computes what TOSA says is Arm's claim
    and is not checked here.
"""

import csv
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from qt_jax.backends.protocol import Batch, Compiled, Environment, Refused, Runtime, Scheme, Session
from qt_jax.backends.tflite import LAYOUT, MODEL, PRODUCTS, bind, feeds

TOSA = "model.tosa"

ACCELERATORS = {
    "ethos-u55-128": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65-256": ("Ethos_U65_Client_Server", "Dedicated_Sram_384KB"),
    "ethos-u85-256": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}
"""Vela's accelerator -> (system configuration, memory mode), which are Vela's own defaults. The number in the
accelerator's name is its multiply-accumulates per cycle."""

_MEMORIES = ("sram", "dram", "on_chip_flash", "off_chip_flash")


class EthosU:
    """Run the TOSA reference model for logits, and Vela for cycles and memory.

    >>> [(scheme.name, scheme.source) for scheme in BACKEND.schemes][0]
    ('int8-pc-minmax', ('litert', 'int8-pc-minmax'))
    """

    name = "ethos-u"
    vendor = "Arm"
    stands_for = "Ethos-U55, U65 and U85 NPUs in microcontrollers and embedded Linux (Alif, NXP i.MX 93, ...)"
    kind = "normative model"
    environment = Environment(
        "ethos-u",
        python="3.11",
        requirements=(
            "ethos-u-vela==5.2.0",
            "tosa-tools==2026.8.0",
            "tosa-converter-for-tflite==2026.2.0",
            "ai-edge-litert==2.3.0",
            "numpy==2.1.3",
        ),
        megabytes=382,
        licence="Apache-2.0",
    )
    packages = ("ethos-u-vela", "tosa-tools", "tosa-converter-for-tflite", "numpy")
    schemes = (
        Scheme("int8-pc-minmax", 8, 8, True, "minmax", source=("litert", "int8-pc-minmax")),
        Scheme("int8-pt-minmax", 8, 8, False, "minmax", source=("litert", "int8-pt-minmax")),
        Scheme("int16act-pc-minmax", 8, 16, True, "minmax", source=("litert", "int16act-pc-minmax")),
    )
    runtimes = (
        Runtime("tosa-reference-model", "Arm's reference model of the TOSA specification", simulated=True),
    )

    def available(self) -> str | None:
        return None

    def compile(self, source: Path, calibration: Batch, scheme: Scheme, folder: Path) -> Compiled:
        """Leave LiteRT's files, whose grids `load` reads, `model.tosa`, and one folder per accelerator."""
        model = folder / MODEL
        for name in (MODEL, LAYOUT):
            shutil.copyfile(source / name, folder / name)
        _lower(model, folder / TOSA)
        estimates = {name: _vela(model, folder / name, name) for name in ACCELERATORS}
        first = next(iter(ACCELERATORS))
        compiled = folder / first / f"{model.stem}_vela.tflite"
        measured = {
            "cycles": estimates[first]["cycles"] or None,  # 0: all is left to the host
            "accelerator": f"{first.replace('ethos-u', 'Ethos-U')}, estimated by Vela {_vela_version()}",
            "estimates": estimates,
        }
        operators = _operators(model)
        # All are integer in this file, and TOSA computes them so, whether Vela leaves one to the host or not.
        total = sum(operators[name] for name in PRODUCTS)
        counts = placed(operators, _operators(compiled))
        return Compiled(compiled.stat().st_size, counts, measured, products=(total, total))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        import tosa_reference_model
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(folder / MODEL))
        inputs, outputs = bind(interpreter, folder)
        taken, given = (
            [details["index"] for details in described]
            for described in (interpreter.get_input_details(), interpreter.get_output_details())
        )
        graph = (folder / TOSA).read_bytes()

        def run(batch: Batch) -> list[np.ndarray]:
            arrays = {details["index"]: array for details, array in feeds(batch, inputs)}
            results, status = tosa_reference_model.run(graph, [arrays[index] for index in taken])
            if status != tosa_reference_model.GraphStatus.TOSA_VALID:
                raise RuntimeError(f"the TOSA reference model ended with {status.name}")
            tensors = dict(zip(given, results, strict=True))
            return [output.read(tensors[output.details["index"]]) for output in outputs]

        return run


BACKEND = EthosU()


def placed(source: Counter, compiled: Counter) -> dict[str, dict[str, int]]:
    """Count the operators on the NPU and on the host, given those of the file before and after Vela.

    Operators that Vela left in its TFLite file run on the host. Those that it moved to the NPU are gone.

    >>> placed(Counter(CONV_2D=8, SOFTMAX=1), Counter({"ethos-u": 1, "SOFTMAX": 1}))
    {'CONV_2D': {'integer': 8}, 'SOFTMAX': {'host': 1}}
    """
    counts = {
        name: {"integer": total - compiled[name], "host": compiled[name]} for name, total in source.items()
    }
    return {name: {kind: n for kind, n in kinds.items() if n > 0} for name, kinds in counts.items()}


def estimate(summary: dict[str, str]) -> dict:
    """Turn one row of Vela's summary CSV into numbers.

    Vela gives memory used in KiB and traffic in bytes per inference. "dram" and "flash" (on and off the chip
    together) are the memories beyond the SRAM.
    """
    used = {name: float(summary[f"{name}_memory_used"]) for name in _MEMORIES}
    moved = {name: int(summary[f"{name}_total_bytes"]) for name in _MEMORIES}
    return {
        "cycles": int(summary["cycles_total"]),
        "milliseconds": 1e3 * float(summary["inference_time"]),
        "clock_hz": float(summary["core_clock"]),
        "macs": int(summary["nn_macs"]),
        "sram_bytes": round(1024 * used["sram"]),
        "dram_bytes": round(1024 * used["dram"]),
        "flash_bytes": round(1024 * (used["on_chip_flash"] + used["off_chip_flash"])),
        "sram_moved_bytes": moved["sram"],
        "dram_moved_bytes": moved["dram"],
        "flash_moved_bytes": moved["on_chip_flash"] + moved["off_chip_flash"],
        "system_config": summary["system_config"],
        "memory_mode": summary["memory_mode"],
    }


def _lower(model: Path, target: Path) -> None:
    """Lower a TFLite file to the TOSA flatbuffer that the reference model reads, by way of MLIR."""
    _tool("tosa-converter-for-tflite", str(model), "--bytecode", "-o", "model.mlirbc")
    _tool(
        "tosa-opt",
        "model.mlirbc",
        "--tosa-serialize",
        f"--tosa-flatbuffer-filename={target}",
        "-o",
        "/dev/null",
    )


def _vela(model: Path, folder: Path, accelerator: str) -> dict[str, float]:
    """Compile for one accelerator and return Vela's estimates."""
    system, memory = ACCELERATORS[accelerator]
    _tool(
        *("vela", str(model), "--output-dir", str(folder), "--accelerator-config", accelerator),
        *("--config", "Arm/vela.ini", "--system-config", system, "--memory-mode", memory),
    )
    with next(folder.glob("*_summary_*.csv")).open(newline="") as file:
        [summary] = csv.DictReader(file)
    return estimate(summary)


def _tool(name: str, *arguments: str) -> None:
    """Run one of the environment's programs. If it fails, its last lines are the reason."""
    program = Path(sys.executable).with_name(name)
    ended = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ended.stdout)
    if ended.returncode < 0:
        raise ChildProcessError(f"{name} was killed by signal {-ended.returncode}")
    if ended.returncode:
        raise Refused(f"{name}: {ended.stdout.strip()[-500:] or f'exit status {ended.returncode}'}")


def _operators(model: Path) -> Counter[str]:
    """Count the operators of a TFLite file by name, with Vela's own reader of the format."""
    from ethosu.vela.tflite.BuiltinOperator import BuiltinOperator
    from ethosu.vela.tflite.Model import Model

    names = {code: name for name, code in vars(BuiltinOperator).items() if not name.startswith("_")}
    graph = Model.GetRootAs(model.read_bytes(), 0)
    counts: Counter[str] = Counter()
    for subgraph in map(graph.Subgraphs, range(graph.SubgraphsLength())):
        for operator in map(subgraph.Operators, range(subgraph.OperatorsLength())):
            code = graph.OperatorCodes(operator.OpcodeIndex())
            custom = code.CustomCode()
            # Codes below 128 are in the older, one-byte field as well. Larger ones are only in the newer.
            builtin = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            counts[custom.decode() if custom else builtin] += 1
    return counts


def _vela_version() -> str:
    from importlib import metadata

    return metadata.version("ethos-u-vela")
