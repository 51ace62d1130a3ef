"""`python -m experiments.cifar --sched quartic`: train, export, deploy at low bits, compare with a twin.

Stages: train -> (float twin) -> describe -> export -> verify -> evaluate -> table, figure, report. Each
leaves its product in the run's folder; a relaunch goes on from the first that is missing.
`experiments.segmentation` is the same with other presets.

What a run says of its networks, so that `python -m qt_jax.export` can export them again on its own.
"""

import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from rich.console import Console

import qt_jax as qt
from experiments import devices, models
from experiments.configs.training import FREE_TO_CHANGE, Config, float_twin
from experiments.data import SEGMENTATION, Dataset, load
from experiments.data.augment import normalize
from experiments.masks import SHOWN, decided_masks, masks_figure
from experiments.models import create
from experiments.run_summary import metric_of, report, write_report
from experiments.runs import FLOAT, claim, graphs_of, training_provenance, vendor_arrays
from experiments.training.loop import train
from experiments.training.quantizers import keeps_ranges, quantization
from qt_jax import records
from qt_jax.backends import ort
from qt_jax.export import verify
from qt_jax.export.deploy import deploy, learned_ranges, ranges_path
from qt_jax.export.encodings import write_ranges
from qt_jax.export.network import Description, Samples, write_description, write_samples
from qt_jax.export.network import load as load_network

RUN_SCHEMES = (
    *("fp32", "int8-pt-minmax", "int8-pc-minmax", "int8-pt-percentile", "int8-pc-percentile"),
    *("int4w-pt-minmax", "int4w-pc-minmax", "int4w-pt-percentile", "int4w-pc-percentile", "int8-dynamic"),
)
"""Those of onnxruntime that end every run."""


def run(config: Config, console: Console) -> None:
    """All stages of one run."""
    directory = config.directory
    if devices.is_leader():
        claim(directory, config, FREE_TO_CHANGE)
    devices.meet("the folder is claimed")
    dataset = load(config.dataset, config.data_dir, seed=0)
    if not devices.is_leader():
        console.quiet = True
    console.print(
        f"{config.dataset}: {len(dataset.train_labels):,} training, {len(dataset.validation_labels):,} "
        f"validation, {len(dataset.test_labels):,} test images; {config.model} on {jax.device_count()} "
        f"{jax.default_backend()} device{'s' if jax.device_count() > 1 else ''}; "
        f"run folder {directory}"
    )
    twins, graphs = {config.quantizer: config}, graphs_of(config.quantizer)
    if float_twin(config) == config:
        twins = {FLOAT: config}
    elif config.compare:
        twins[FLOAT] = float_twin(config)

    model = models.create(config.model, dataset.num_classes, jnp.dtype(config.dtype))
    trained = {method: train(twin, model, dataset, directory, method) for method, twin in twins.items()}
    devices.disconnect()
    if not devices.is_leader():
        return
    for method, twin in twins.items():
        path = directory / graphs[method]
        describe(twin, dataset, f"checkpoints/{method}", path.with_suffix(".json"))
        export(path, console)
    for method in trained:
        evaluate(config, method, dataset, directory, console)
    if config.dataset in SEGMENTATION:
        show_masks(config, {method: directory / graphs[method] for method in trained}, dataset, directory)
    report(config, trained, directory, console)
    write_report(directory)
    console.print(f"{directory}/summary.md, summary.png, report.html, records.jsonl and the ONNX graphs")


def export(path: Path, console: Console) -> None:
    """Writes the verified FP32 graph and its learned ranges; a graph that is there is verified again."""
    network = load_network(path.with_suffix(".json"))
    if not path.exists():
        summary = deploy(network, path)
        operators = ", ".join(f"{count} {name}" for name, count in summary["operators"].items())
        console.print(
            f"{path.name}: {summary['bytes']:,} bytes, {summary['macs'] / 1e6:.1f} M multiply-accumulates, "
            f"opset {summary['opset']} ({operators}); largest difference to JAX "
            f"{max(summary['max_difference'].values()):.1e}; "
            f"ranges: {summary['ranges'] or summary['ranges_reason']}",
        )
        return
    try:
        graph = onnx.load(path)
        verify(graph, network.apply_fn, network.variables, network.samples.parity)
    except (DecodeError, qt.InvalidInput) as error:
        raise qt.InvalidInput(
            f"{path} is not the graph of this run's checkpoint ({error}). Delete it and relaunch."
        ) from error
    if not ranges_path(path).exists() and (ranges := learned_ranges(network, graph)[0]) is not None:
        write_ranges(ranges, ranges_path(path))


def evaluate(config: Config, method: str, dataset: Dataset, directory: Path, console: Console) -> None:
    """One record for each of `SCHEMES` that has none yet, on the test set.

    `python -m experiments.backends` takes a finished run through all the other toolchains.
    """
    path = directory / "records.jsonl"
    onnx_path = directory / graphs_of(config.quantizer)[method]
    checkpoint = hashlib.sha256(onnx_path.read_bytes()).hexdigest()
    done = {
        (row["backend"], row["scheme"])
        for row in records.read(path)
        if row["status"] == "ok" and row["method"] == method and row["checkpoint"] == checkpoint
    }
    schemes = [scheme for scheme in RUN_SCHEMES if (ort.BACKEND.name, scheme) not in done]
    if not schemes:
        return
    identity = {
        "run": directory.name,
        "task": config.dataset,
        "model": config.model,
        "method": method,
        "seed": config.seed,
        "sched": "none" if method == FLOAT else config.sched,
        "checkpoint": checkpoint,
        "training": training_provenance(directory, method),
    }

    def keep(record: records.Record) -> None:
        if (record["backend"], record["scheme"]) not in done:
            records.append(path, record)
            done.add((record["backend"], record["scheme"]))
            reached = record[metric_of(config.dataset)[0]]
            shown = "-" if reached is None else f"{100 * reached:.2f} %"
            console.print(f"{method} {record['scheme']}: {shown} ({record['seconds']:.0f} s)")

    qt.evaluate(
        onnx_path,
        *vendor_arrays(config, dataset, config.test_limit),
        backends=[ort.BACKEND.name],
        schemes=schemes,
        runtimes=[ort.REFERENCE.name],
        jobs=os.cpu_count() or 1,
        identity=identity,
        on_record=keep,
    )


def show_masks(config: Config, networks: dict[str, Path], dataset: Dataset, directory: Path) -> None:
    """masks.png, drawn from masks.npz: the first test images as the networks see them."""
    decided = decided_masks(networks, *vendor_arrays(config, dataset, SHOWN), directory / "masks.npz")
    images, truth = dataset.test_images[:SHOWN], dataset.test_labels[:SHOWN]
    masks_figure(images, truth, decided, dataset.class_names, directory / "masks.png")


SAMPLES = "samples.npz"

CALIBRATION, PARITY = 512, 1000
"""At most so many training images to calibrate with, validation images to compare with JAX on."""


def describe(config: Config, dataset: Dataset, checkpoints: str, path: Path) -> None:
    """Writes what is missing: the description of a trained network to `path`, and the samples beside it.

    Args:
      config: of this network; of the twin for the float twin.
      dataset: gives the shape, the classes and the samples.
      checkpoints: their folder, relative to that of `path`.
      path: of the JSON file.
    """
    samples = path.with_name(SAMPLES)
    if not samples.exists():
        chosen = (
            dataset.train_images[: min(CALIBRATION, config.calibration_size)],
            dataset.validation_images[:PARITY],
        )
        arrays = (np.asarray(normalize(images, dataset.mean, dataset.std)) for images in chosen)
        write_samples(Samples(*arrays), samples)
    if path.exists():
        return
    specs = quantization(config, create(config.model, dataset.num_classes), dataset.train_images.shape[1:])
    description = Description(
        model="experiments.models:create",
        arguments={"name": config.model, "num_classes": dataset.num_classes},
        call={"train": False},
        input_shape=dataset.train_images.shape[1:],
        checkpoint=checkpoints,
        collections={"params": "average" if config.ema else "params", "batch_stats": "batch_stats"},
        quantization=specs if keeps_ranges(config) else None,
        samples=SAMPLES,
    )
    write_description(description, path)
