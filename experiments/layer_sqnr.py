"""Measure by layer what Clip nodes and new batch norm gain: `python -m experiments.layer_sqnr RUN_DIR`.

A finished run's network is exported as it is, with its learned ranges as Clip nodes, with its batch norms
re-estimated on training images, and with both (re-estimated with the clips in force). onnxruntime quantizes
each of these graphs. On the validation split every layer's output in the integer deployment is compared with
the same tensor of the float graph. The test set is not touched. Rows are appended to layer_sqnr.jsonl in the
run's folder, and layer_sqnr-METHOD.md is written from them.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import tyro
from rich.console import Console

import qt_jax as qt
from experiments.data import SEGMENTATION, Dataset, load
from experiments.data.augment import normalize
from experiments.runs import QUANT_TRIM, graphs_of, model_input, read_config_json
from qt_jax import records
from qt_jax.backends import ort
from qt_jax.command_line import command
from qt_jax.diagnosis.simulation import compare
from qt_jax.diagnosis.toolchains import LAYER_SCHEMES, quantized
from qt_jax.export import to_onnx
from qt_jax.export.clips import clipped_forward, insert_clips, learned_clips
from qt_jax.export.network import Deployable, create_module, read_description
from qt_jax.export.network import load as load_network
from qt_jax.files import write_whole
from qt_jax.provenance import provenance
from qt_jax.reporting.tables import markdown_line

PLAIN, CLIPS, NORMS, BOTH = "plain", "clips", "batch norm", "clips + batch norm"
OPSET = 21
"""First opset with INT4."""
BATCH = 500
"""Images per batch when batch norm is re-estimated."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure each layer's SQNR with and without Clip nodes and re-estimated batch norm.

    Example:
        python -m experiments.layer_sqnr runs/cifar10-fast-quartic-0
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run of experiments.cifar."""
    method: str = QUANT_TRIM
    """Network of the run: its --quantizer, or float, the twin, which has no ranges to clip to."""
    data_dir: Path | None = None
    """Folder or archive that holds the data set, as for experiments.cifar."""
    images: int = 5000
    """Number of training images on which batch norm is re-estimated."""


def variants(
    network: Deployable, train_apply: Callable[..., Any], images: np.ndarray
) -> dict[str, onnx.ModelProto]:
    """Export the float graph of each variant that the network has.

    Args:
      network: Network of a finished run.
      train_apply: `(variables, images) -> (logits, updated)` in training mode.
      images: Images as the model takes them, for batch norm.

    Returns:
      Name of the variant -> its graph. A network without ranges has no variant with clips.
    """
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

    def export(variables: Any) -> onnx.ModelProto:
        return to_onnx(network.apply_fn, variables, network.input_shape, opset=OPSET)

    graphs = {PLAIN: export(network.variables)}
    graphs[NORMS] = export(qt.reestimate_batch_norm(train_apply, network.variables, batches))
    if network.config is None:
        return graphs
    clips = learned_clips(graphs[PLAIN], network.variables, network.config)
    clipped = clipped_forward(train_apply, graphs[PLAIN], clips)
    graphs[CLIPS] = insert_clips(graphs[PLAIN], clips)
    renewed = export(qt.reestimate_batch_norm(clipped, network.variables, batches))
    return graphs | {BOTH: insert_clips(renewed, clips)}


def measure(
    graphs: Mapping[str, onnx.ModelProto], dataset: Dataset, calibration: np.ndarray, console: Console
) -> list[dict[str, Any]]:
    """Measure FP32 and each of `LAYER_SCHEMES` for each variant.

    Args:
      graphs: Name of the variant -> float graph.
      dataset: Gives the validation split.
      calibration: Images for onnxruntime's quantizer, as the graphs take them.
      console: Where progress goes.

    Returns:
      One row per variant and scheme: the metrics on the validation split, and the SQNR of the layers.
    """
    images, labels = model_input(dataset, dataset.validation_images), dataset.validation_labels
    offers = {offer.name: offer for offer in ort.BACKEND.schemes}
    rows = []
    for variant, graph in graphs.items():
        deployed = {name: quantized(graph, calibration, scheme) for name, scheme in LAYER_SCHEMES.items()}
        reference, logits, ratios = compare(graph, deployed, images)
        found = {"fp32": qt.metrics.classification_metrics(reference, labels)}
        for scheme in LAYER_SCHEMES:
            found[scheme] = qt.metrics.classification_metrics(logits[scheme], labels, reference)
            found[scheme] |= {"layers_sqnr_db": ratios[scheme]}
        for scheme, metrics in found.items():
            offer = offers[scheme]
            bits = {"weight_bits": offer.weight_bits, "activation_bits": offer.activation_bits}
            bits |= {"per_channel": offer.per_channel}
            rows.append({"variant": variant, "scheme": scheme, **bits, **metrics})
            console.print(f"{variant}, {scheme}: top-1 {100 * metrics['top1']:.2f} %")
    return rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return one table per scheme: top-1, then the SQNR of the logits and of each layer, by variant.

    >>> row = {"variant": "plain", "scheme": "int8", "top1": 0.5, "layers_sqnr_db": {"stem": 20.0}}
    >>> print(to_markdown([row]).splitlines()[-1])
    | stem | 20.0 |
    """
    last = {(row["scheme"], row["variant"]): row for row in rows}
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        columns = [last.get((scheme, name), {}) for name in names]
        lines += [
            f"## {scheme}",
            "",
            markdown_line(["", *names]),
            markdown_line(["---", *["---:"] * len(names)]),
        ]
        lines.append(markdown_line(["top-1, %", *(_cell(row.get("top1"), 100, 2) for row in columns)]))
        if scheme != "fp32":
            lines.append(markdown_line(["logits, dB", *(_cell(row.get("sqnr_db"), 1, 1) for row in columns)]))
        by_layer = [row.get("layers_sqnr_db") or {} for row in columns]
        for layer in dict.fromkeys(layer for found in by_layer for layer in found):
            cells = [_cell(found.get(layer), 1, 1) for found in by_layer]
            lines.append(markdown_line([layer, *cells]))
        lines.append("")
    return "\n".join(lines)


def _cell(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}"


def run(options: Options, console: Console) -> None:
    """Measure every variant, append the rows, and write the page.

    Raises:
      InvalidInput: The folder does not hold the run of a classifier, or the run has no such network.
    """
    config = read_config_json(options.run)
    graphs = graphs_of(config.get("quantizer", QUANT_TRIM))
    if options.method not in graphs or config["dataset"] in SEGMENTATION:
        raise qt.InvalidInput(
            f"{options.run} cannot be measured with --method {options.method} on {config['dataset']}: choose "
            f"one of {', '.join(graphs)}, and the run of a classifier"
        )
    description = (options.run / graphs[options.method]).with_suffix(".json")
    network = load_network(description)
    described = read_description(description)
    module = create_module(described.model, described.arguments)

    def train_apply(variables, images):
        return module.apply(variables, images, train=True, mutable=["batch_stats"])

    dataset = load(config["dataset"], options.data_dir, seed=0)
    calibration = model_input(dataset, dataset.train_images[: config["calibration_size"]])
    images = np.asarray(normalize(dataset.train_images[: options.images], dataset.mean, dataset.std))
    measured = measure(variants(network, train_apply, images), dataset, calibration, console)
    identity = {"run": options.run.name, "task": config["dataset"], "model": config["model"]}
    identity |= {"method": options.method, "seed": config["seed"], "split": "validation", "status": "ok"}
    identity |= {"backend": ort.BACKEND.name, "vendor": ort.BACKEND.vendor}
    identity |= {"reestimation_images": len(images)}
    source = provenance(["jax", "flax", "onnxruntime", "onnx", "numpy"])
    kept = options.run / "layer_sqnr.jsonl"
    for row in measured:
        records.append(kept, records.new_record(**identity | source | row))
    mine = [row for row in records.read(kept) if row["method"] == options.method]
    page = options.run / f"layer_sqnr-{options.method}.md"
    write_whole(page, to_markdown(mine))
    console.print(to_markdown(mine))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.layer_sqnr", Options, run, arguments, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
