"""Run the stages of one training run: train, describe, export, verify, evaluate, show.

`experiments.cifar` and `experiments.segmentation` launch it. Each stage leaves its product in the run's
folder. A relaunch goes on from the first product that is missing, and repeats no finished work. The float
twin is trained with the same seed and budget and goes through the same stages.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from rich.console import Console

import qt_jax as qt
from experiments import devices, models
from experiments.configs.training import FREE_TO_CHANGE, Config, float_twin, parse
from experiments.data import SEGMENTATION, Dataset, load
from experiments.data.augment import normalize
from experiments.masks import SHOWN, decided_masks, masks_figure
from experiments.run_summary import metric_of, write_report, write_summary
from experiments.runs import FLOAT, claim, graphs_of, identity, model_input, vendor_arrays
from experiments.training.loop import train
from experiments.training.quantizers import keeps_ranges, quantization
from qt_jax import records
from qt_jax.backends import ort
from qt_jax.command_line import exit_status, text_console
from qt_jax.export import save_verified, verify
from qt_jax.export.deploy import deploy, learned_ranges
from qt_jax.export.encodings import ranges_path, write_ranges
from qt_jax.export.network import Deployable, Description, Samples, write_description, write_samples
from qt_jax.export.network import load as load_network

RUN_SCHEMES = (
    *("fp32", "int8-pt-minmax", "int8-pc-minmax", "int8-pt-percentile", "int8-pc-percentile"),
    *("int4w-pt-minmax", "int4w-pc-minmax", "int4w-pt-percentile", "int4w-pc-percentile", "int8-dynamic"),
)
"""Schemes of onnxruntime in which every run evaluates its networks."""

SAMPLES = "samples.npz"
CALIBRATION, PARITY = 512, 1000
"""Most training images that are kept to calibrate with, and validation images to compare with JAX on."""


def launch(
    module: str, presets: Mapping[str, Config], about: str | None, arguments: list[str] | None = None
) -> int:
    """Run the command line of `python -m module`, and return its exit status as `exit_status` does.

    The status is 143 or 130 when SIGTERM or Ctrl-C has ended training, with everything saved.

    Args:
      module: Name of the command's module.
      presets: Name -> config that the flags start from.
      about: Text with which `--help` begins.
      arguments: Flags; None: those of this process.
    """
    console = text_console(soft_wrap=True)
    return exit_status(
        lambda: run(parse(arguments, presets, module, about), console),
        "interrupted; the same command goes on from the last checkpoint",
    )


def run(config: Config, console: Console) -> None:
    """Run all stages of one run."""
    directory = config.directory
    if devices.is_leader():
        claim(directory, config, FREE_TO_CHANGE)
    devices.barrier("the folder is claimed")
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
    if float_twin(config) == dataclasses.replace(config, equalize="none"):
        twins = {FLOAT: config}
    elif config.compare:
        twins[FLOAT] = float_twin(config)

    model = models.create(config.model, dataset.num_classes, jnp.dtype(config.dtype))
    if not (directory / "checkpoints").exists():
        check_equalize(config, dataset)
    trained = {method: train(twin, model, dataset, directory, method) for method, twin in twins.items()}
    devices.disconnect()
    if not devices.is_leader():
        return
    for method, twin in twins.items():
        path = directory / graphs[method]
        describe(twin, dataset, f"checkpoints/{method}", path.with_suffix(".json"))
        export(twin, path, dataset, console)
    for method in trained:
        evaluate(config, method, dataset, directory, console)
    if config.dataset in SEGMENTATION:
        show_masks(config, {method: directory / graphs[method] for method in trained}, dataset, directory)
    write_summary(config, trained, directory, console)
    write_report(directory)
    console.print(
        f"The results are in {directory}/summary.md, summary.png, report.html and records.jsonl, beside the "
        "ONNX graphs."
    )


def describe(config: Config, dataset: Dataset, checkpoints: str, path: Path) -> None:
    """Write the description of a trained network, and the samples beside it, where they are missing.

    With both, `python -m qt_jax.export` can export the network again without this program.

    Args:
      config: Config of this network; for the float twin, that of the twin.
      dataset: Gives the shape, the classes and the samples.
      checkpoints: Folder of the checkpoints, relative to the folder of `path`.
      path: JSON file of the description.
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
    image_shape = dataset.train_images.shape[1:]
    specs = quantization(config, models.create(config.model, dataset.num_classes), image_shape)
    description = Description(
        model="experiments.models:create",
        arguments={"name": config.model, "num_classes": dataset.num_classes},
        call={"train": False},
        input_shape=image_shape,
        checkpoint=checkpoints,
        collections={"params": "average" if config.averages else "params", "batch_stats": "batch_stats"},
        quantization=specs if keeps_ranges(config) else None,
        samples=SAMPLES,
    )
    write_description(description, path)


def deploy_float(
    config: Config, trained: Deployable, path: Path, dataset: Dataset, clips: bool = False
) -> dict[str, Any]:
    """Write the verified FP32 graph to `path`, and return what `deploy` says of it.

    With `--equalize` its channels are rescaled. Learned ranges then hold no more, and are not written.
    `python -m qt_jax.export` exports the network as it was trained.

    Args:
      config: Config of the network.
      trained: The network, with samples.
      path: ONNX file to write.
      dataset: Gives the images on which factors of channels are chosen.
      clips: As `deploy` takes it.

    Raises:
      InvalidInput: The graph cannot be rescaled, or it is to have Clip nodes, too.
    """
    if config.equalize == "none":
        return deploy(trained, path, clips=clips)
    if clips:
        raise qt.InvalidInput(
            "Clip nodes hold ranges of the channels as they were trained: do not rescale them"
        )
    calibration = model_input(dataset, dataset.train_images[: config.calibration_size])
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        before = Path(scratch) / path.name
        summary = deploy(trained, before)
        neutral = qt.equalize(before, calibration, method=config.equalize, seed=config.seed)
    parity = trained.samples.parity
    verified = save_verified(neutral.model, path, trained.apply_fn, trained.variables, parity)
    reason = f"{neutral.freedom.count} factors rescale the channels ({neutral.seconds:.0f} s)"
    reason += ", so that learned ranges do not hold any more" if summary["ranges"] else ""
    return summary | verified | {"file": str(path), "ranges": None, "ranges_reason": reason}


def check_equalize(config: Config, dataset: Dataset) -> None:
    """Rescale the graph of the network before it is trained, with one step, so that a refusal comes first.

    Raises:
      InvalidInput: The channels of this network cannot be rescaled in this way.
    """
    if config.equalize == "none":
        return
    model = models.create(config.model, dataset.num_classes)
    images = model_input(dataset, dataset.train_images[: min(8, config.calibration_size)])
    shape = dataset.train_images.shape[1:]
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape), jnp.float32))
    graph = qt.to_onnx(partial(model.apply, train=False), variables, shape)
    try:
        qt.equalize(graph, images, method=config.equalize, steps=1)
    except qt.InvalidInput as error:
        raise qt.InvalidInput(
            f"--equalize {config.equalize} does not suit --model {config.model}. {error}"
        ) from None


def export(config: Config, path: Path, dataset: Dataset, console: Console) -> None:
    """Write the verified FP32 graph to `path`, with its learned ranges beside it.

    A graph that is already there is verified again.

    Args:
      config: Config of this network; for the float twin, that of the twin.
      path: ONNX file; its description is beside it.
      dataset: Gives the images on which factors of channels are chosen.
      console: Prints what happens.

    Raises:
      InvalidInput: The graph that is there does not belong to the checkpoint.
    """
    network = load_network(path.with_suffix(".json"))
    if not path.exists():
        summary = deploy_float(config, network, path, dataset)
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
    if config.equalize != "none" or ranges_path(path).exists():
        return
    if (ranges := learned_ranges(network, graph)[0]) is not None:
        write_ranges(ranges, ranges_path(path))


def evaluate(config: Config, method: str, dataset: Dataset, directory: Path, console: Console) -> None:
    """Add one record for each of `RUN_SCHEMES` that has none yet, measured on the test set.

    `python -m experiments.backends` takes a finished run through all other toolchains.
    """
    path = directory / "records.jsonl"
    onnx_path = directory / graphs_of(config.quantizer)[method]
    known = {"sched": "none" if method == FLOAT else config.sched}
    known |= identity(directory, dataclasses.asdict(config), method, onnx_path)
    done = {
        (row["backend"], row["scheme"])
        for row in records.read(path)
        if row["status"] == "ok" and row["method"] == method and row["checkpoint"] == known["checkpoint"]
    }
    schemes = [scheme for scheme in RUN_SCHEMES if (ort.BACKEND.name, scheme) not in done]
    if not schemes:
        return

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
        identity=known,
        on_record=keep,
    )


def show_masks(config: Config, networks: dict[str, Path], dataset: Dataset, directory: Path) -> None:
    """Draw masks.png from masks.npz: the first test images as the networks see them."""
    decided = decided_masks(networks, *vendor_arrays(config, dataset, SHOWN), directory / "masks.npz")
    images, truth = dataset.test_images[:SHOWN], dataset.test_labels[:SHOWN]
    masks_figure(images, truth, decided, dataset.class_names, directory / "masks.png")
