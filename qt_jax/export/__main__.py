"""Export a checkpoint to a verified ONNX file: `python -m qt_jax.export RUN_DIR --out model.onnx`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from qt_jax.command_line import exit_status, parse, print_rows, text_console
from qt_jax.errors import InvalidInput
from qt_jax.export.bare import from_checkpoint
from qt_jax.export.deploy import deploy
from qt_jax.export.inputs import parse_inputs
from qt_jax.export.network import Deployable, config_from_json, load

TABLE_WIDTH = 160
"""Number of columns of tables that go to a file or a pipe."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Export a trained Flax Linen network to standard ONNX: FP32, or on integers (QDQ).

    The file gets its name only after it has passed onnx.checker, loaded in onnxruntime and been compared with
    the JAX forward. The network's own code is imported, by the name that the run or --model gives.

    Examples:
        python -m qt_jax.export runs/cifar10-fast-quartic-0 --out model.onnx
        python -m qt_jax.export runs/cifar10-fast-quartic-0 --out int8.onnx --qdq int8
      A checkpoint of your own:
        python -m qt_jax.export CHECKPOINT --model my_package.nets:Net --input-shape 32 32 3 --out net.onnx
      A forward with further arguments:
        ... --call '{"train": false}'
      Whole numbers, such as tokens:
        ... --input-shape 128:int32
      Several inputs, by their place or by the names of the forward's arguments:
        ... --input-shape 32 32 3 --input-shape 5
        ... --input-shape input_ids=128:int32 --input-shape attention_mask=128:int32
      One number in each example, such as the time of a diffusion model:
        ... --input-shape 32 32 3 --input-shape :float32
      One output of several, by its key, field or number:
        ... --output logits
      A checkpoint with several trees of parameters, such as an average:
        ... --variables ema_params
      A file of flax.serialization.to_bytes:
        python -m qt_jax.export net.msgpack --model my_package.nets:Net --input-shape 128:int32 --out net.onnx

    A checkpoint may hold the variables of model.init, bare parameters, a TrainState, any dictionary of these,
    or several items. The variables are found by the names and shapes that the model makes. Parameters of
    bfloat16 and float16 are exported as float32.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a run (its model.json describes the network), or such a JSON file. With --model it is a
    checkpoint of orbax: a step, or the folder of steps, of which the newest counts; or a msgpack file."""
    out: Path
    """ONNX file to write. The learned ranges of an FP32 graph are written beside it, to *.ranges.json."""
    qdq: Literal["int8", "int4", "int16-act"] | None = None
    """Quantize with QuantizeLinear / DequantizeLinear, on the learned ranges. int8: weights and activations;
    int4: weights on 4 bits, activations on 8; int16-act: weights on 8, activations on 16."""
    clips: bool = False
    """Put the learned activation ranges into the FP32 graph, as Clip nodes."""
    opset: int | None = None
    """Opset of ai.onnx, 13 to 21. The default is 17, and 21 for int4 and int16-act, which need it."""
    per_tensor: bool = False
    """Use one weight scale per layer in place of one per output channel."""
    signed: bool = False
    """Store activations as INT8 or INT16 in place of UINT8 or UINT16: the same numbers, for compilers that
    take only these. onnxruntime on x86 has integer kernels for the unsigned ones by default."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Layout of the graph's inputs and outputs."""
    fold_batch_norm: bool = True
    """Fold batch norm into the layer before it."""
    dynamic_batch: bool = True
    """Take any batch. Otherwise the batch is exactly 1."""
    json: bool = False
    """Print the summary as one JSON object."""

    model: str | None = None
    """For a bare checkpoint: package.module:factory, which returns the Linen module."""
    input_shape: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="[NAME=]SIZE ...[:DTYPE]"),
    ] = ()
    """For a bare checkpoint: shape of one input without batch, such as 32 32 3, float32 unless a dtype stands
    behind it, such as 128:int32. Repeat the option for each argument of the forward, in order; or name the
    argument, such as input_ids=128:int32."""
    arguments: str | None = None
    """For a bare checkpoint: JSON object of the factory's keyword arguments."""
    call: str | None = None
    """For a bare checkpoint: JSON object of keyword arguments of the forward, such as '{"train": false}'."""
    output: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all)")
    ] = ()
    """For a bare checkpoint: outputs to keep, in this order. An output is named by its key in a dictionary,
    its field in a dataclass or its number in a tuple, with / between where they are nested."""
    variables: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="(default: found)")
    ] = ()
    """For a bare checkpoint in which several trees fit the model: path of the one to take, such as ema_params
    or state/ema/params. A second path may give the batch_stats."""
    quantization: str | None = None
    """For a bare checkpoint with Quant-Trim's statistics: JSON object of the fields of qt.QuantConfig that
    differ from its defaults."""
    samples: Path | None = None
    """For a bare checkpoint: .npz of real inputs as the model takes them: "calibration" (from the training
    split) and "parity" (7 or more); for several inputs "calibration_0", "parity_0" and so on, or with their
    names in place of the numbers. Without it parity is measured on random inputs."""


BARE = ("input_shape", "arguments", "call", "output", "variables", "quantization", "samples")
"""Options that only a bare checkpoint takes."""


def network(options: Options) -> Deployable:
    """Load the network that the command line names.

    Raises:
      InvalidInput: An option does not go with the others, or is not a JSON object. `network.load` and
        `bare.from_checkpoint` raise it too.
    """
    if options.model is None:
        given = [name for name in BARE if getattr(options, name) not in (None, ())]
        if given:
            raise InvalidInput(
                f"--{given[0].replace('_', '-')} is for a bare checkpoint, together with --model and "
                "--input-shape"
            )
        return load(options.source)
    if not options.input_shape:
        raise InvalidInput("--model needs --input-shape: the sizes of one input, without batch")
    return from_checkpoint(
        options.source,
        options.model,
        parse_inputs(options.input_shape),
        arguments=_object("arguments", options.arguments),
        call=_object("call", options.call),
        places=options.variables,
        outputs=options.output,
        quantization=config_from_json(_object("quantization", options.quantization)),
        samples=options.samples,
    )


def _object(name: str, text: str | None) -> dict[str, Any]:
    """Read the JSON object of an option; an option that is not given is an empty object."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidInput(f"--{name} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"--{name} {text!r} is not a JSON object such as '{{\"features\": 16}}'")
    return value


def run(options: Options, console: Console) -> dict[str, Any]:
    """Export, print the summary and return it."""
    found = network(options)
    summary = deploy(
        found,
        options.out,
        qdq=options.qdq,
        clips=options.clips,
        opset=options.opset,
        per_channel=not options.per_tensor,
        signed=options.signed,
        layout=options.layout,
        fold_batch_norm=options.fold_batch_norm,
        dynamic_batch=options.dynamic_batch,
    )
    summary |= {"notes": dict(found.notes)}
    if options.json:
        print_rows([summary])
        return summary
    console.print(facts(summary))
    if summary["layers"]:
        console.print(layers(summary))
    return summary


def facts(summary: dict[str, Any]) -> Table:
    """Make the table of what the file holds and how it compares with JAX."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    macs = "unknown" if summary["macs"] is None else f"{summary['macs']:,}"
    rows = {
        "file": f"{summary['file']}, {summary['bytes']:,} bytes",
        "graph": f"{'FP32' if summary['qdq'] is None else 'QDQ ' + summary['qdq']}, opset {summary['opset']}",
        "operators": ", ".join(f"{count} {name}" for name, count in summary["operators"].items()),
        "parameters": f"{summary['parameters']:,}",
        "MACs": f"{macs} for one input",
        "ranges": summary["ranges"] or f"no file: {summary['ranges_reason']}",
    } | summary["notes"]
    for size, difference in summary.get("max_difference", {}).items():
        rows[f"parity, batch {size}"] = (
            f"largest difference to JAX {difference:.1e} (inputs: {summary['inputs']})"
        )
    for output, found in summary.get("parity", {}).items():
        rows[f"parity, {output}"] = _parity(found)
    if summary["clips"]:
        rows["clips"] = f"{len(summary['clips'])} activations clipped to their learned ranges"
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _parity(found: dict[str, Any]) -> str:
    """Put the parity of one output in words."""
    parts = []
    if found["top1_agreement"] is not None:
        parts.append(f"top-1 agrees on {100 * found['top1_agreement']:.2f} %")
    parts.append(f"{100 * found['equal_integers']:.2f} % equal integers")
    parts.append(f"largest difference {found['largest_difference']:.2f} steps")
    parts.append("no error" if found["sqnr_db"] is None else f"SQNR {found['sqnr_db']:.1f} dB")
    return f"{', '.join(parts)}, against JAX at lambda = 1 on {found['n']} real inputs"


def layers(summary: dict[str, Any]) -> Table:
    """Make the table of what is quantized and what is not, by layer."""
    rows, measured = summary["layers"], summary["qdq"] is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "layer",
        "operator",
        "weights",
        "input",
        *(["on integers"] if measured else []),
        "because",
    ):
        table.add_column(heading, overflow="fold")
    for row in rows:
        ran = ["yes" if row["integer_kernel"] else "no"] if measured else []
        cells = (row["layer"], row["operator"], row["weights"] or "-", row["input"] or "-", *ran)
        table.add_row(*cells, row["reason"] or "", style=None if row["reason"] is None else "yellow")
    quantized = sum(row["weights"] is not None and row["input"] is not None for row in rows)
    table.caption = (
        f"{quantized} of {len(rows)} layers quantized" if measured else f"{quantized} of {len(rows)} ranged"
    )
    if measured:
        integer = sum(bool(row["integer_kernel"]) for row in rows)
        table.caption += f", {integer} on integer kernels in onnxruntime on this CPU"
    table.caption_justify = "left"
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, as `command_line.exit_status` does."""

    def export() -> None:
        options = parse(Options, arguments, "qt_jax.export")
        run(options, text_console(width=TABLE_WIDTH, stderr=options.json))

    return exit_status(export)


if __name__ == "__main__":
    sys.exit(main())
