"""Measure what data costs before and within a training step: `python -m experiments.benchmarks.input`.

For each data set, the seconds to read it from the cache and to place it on the devices are measured once.
Then three things take turns. The first is only the trainer's input (`draw_batch` and `normalize` of
`experiments.training.step`), one compiled function on the device: the next batch of an order, a random crop
and flip of each image, float32. The second is the same by numpy on the host, with the transfer to the device.
The third is whole training steps, of which the input is a part.

CIFAR-10 is used where the cache holds it, else random images of its shape. Nothing is downloaded.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qt_jax as qt
from experiments import data, devices, models
from experiments.benchmarks import timing
from experiments.benchmarks.timing import WARM_UP, Variant, finish
from experiments.benchmarks.variants import CLASSES, compiled_step
from experiments.configs.training import Config, float_twin
from experiments.data.store import cache_dir
from experiments.training.step import FLIPPABLE, Split, draw_batch, epoch_order, normalize
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.reporting.figures import COLOURS, OTHER_COLOURS, canvas

DEVICE, HOST = "on the device", "numpy on the host"
NETWORKS = ("fast", "resnet20")
RANDOM, RANDOM_IMAGES = "random 32x32", 50_000
PAD = 4
"""Padding of `random_crop_flip` in pixels."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Time loading, placing, drawing, augmenting and normalising images, beside whole training steps.

    Example:
        python -m experiments.benchmarks.input --batch-size 256
    """

    batch_size: int = 128
    """Images per step."""
    repeats: int = 20
    """Rounds counted, after 3 rounds of warm-up."""
    out: Path = Path("runs/input")
    """Folder for records.jsonl, one record for each data set and variant, and input.png."""


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the training images and labels of a data set, or draw random ones."""
    if name == RANDOM:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (RANDOM_IMAGES, 32, 32, 3), np.uint8)
        return images, random.integers(0, CLASSES, RANDOM_IMAGES, np.int32)
    found = data.load(name, validation_size=0)
    return found.train_images, found.train_labels


def available() -> tuple[str, ...]:
    """Return the data sets that need no download."""
    return "digits", "cifar10" if (cache_dir() / "cifar10.npz").exists() else RANDOM


def on_device(config: Config, split: Split) -> Variant:
    """Compile the trainer's input of one step. Its state is the step and the previous batch."""
    channels = split.images.shape[-1]
    order = epoch_order(config, len(split.images), 0)

    def next_batch(step: jax.Array, split: Split, order: jax.Array) -> tuple[jax.Array, ...]:
        images, labels = draw_batch(config, split, order, step)
        return step + 1, normalize(images, (0.5,) * channels, (0.25,) * channels), labels

    compiled = jax.jit(next_batch).lower(jnp.int32(0), split, order).compile()
    return Variant(lambda state: compiled(state[0], split, order), (jnp.int32(0),))


def on_host(config: Config, images: np.ndarray, labels: np.ndarray) -> Variant:
    """Do the same by numpy: reflect, crop, mirror, normalise, and put the batch on the device."""
    random = np.random.default_rng(0)
    order = random.permutation(len(images))

    def advance(state: tuple) -> tuple:
        start = state[0] % (len(order) // config.batch_size) * config.batch_size
        chosen = order[start : start + config.batch_size]
        batch = crop_flip(random, images[chosen], flip=config.dataset in FLIPPABLE)
        batch = (batch.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.25)
        return state[0] + 1, *jax.device_put((batch, labels[chosen]))

    return Variant(advance, (0,))


def crop_flip(random: np.random.Generator, images: np.ndarray, *, flip: bool) -> np.ndarray:
    """Do what `experiments.data.augment.random_crop_flip` does, image by image, on the padded batch."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
    cropped = np.empty_like(images)
    mirrored = random.random(count) < (0.5 if flip else 0.0)
    for i, (top, left) in enumerate(random.integers(0, 2 * PAD + 1, (count, 2))):
        crop = padded[i, top : top + height, left : left + width]
        cropped[i] = crop[:, ::-1] if mirrored[i] else crop
    return cropped


def seconds(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Return the result of a call, and the seconds that it took."""
    start = time.perf_counter()
    found = jax.block_until_ready(function(*arguments))
    return found, time.perf_counter() - start


def measure(name: str, options: Options, progress: Progress) -> list[records.Record]:
    """Return the records of one data set: one for each kind of input, and one for each network's step.

    `share_of_device` and `share_of_host` are the medians of these inputs divided by that of the step. The
    first is part of the step. The second would be added to it if nothing overlapped.
    """
    (images, labels), load_s = seconds(load, name)
    mesh = devices.data_mesh(jax.devices()[:1])
    split, place_s = seconds(
        lambda: Split(devices.split_rows(images, mesh), devices.split_rows(labels, mesh))
    )
    dataset = "digits" if name == "digits" else "cifar10"
    config = float_twin(Config(dataset=dataset, batch_size=options.batch_size, learning_rate=0.01))
    timed = {DEVICE: on_device(config, split), HOST: on_host(config, images, labels)}
    for network in NETWORKS:
        model = models.create(network, CLASSES)
        timed[network] = compiled_step(config, model, split, WARM_UP + options.repeats)
    rows = timing.summarise(timing.measure(timed, options.repeats, progress), DEVICE, (DEVICE,))
    source = timing.source()
    found = []
    for variant, row in rows.items():
        median = row["step_ms_p50"]
        shares = {
            f"share_of_{place}": rows[way]["step_ms_p50"] / median if variant in NETWORKS else None
            for place, way in (("device", DEVICE), ("host", HOST))
        }
        found.append(
            records.new_record(
                benchmark="input",
                dataset=name,
                n=len(images),
                image_shape=list(images.shape[1:]),
                variant=variant,
                batch_size=options.batch_size,
                repeats=options.repeats,
                status="ok",
                load_s=load_s,
                place_s=place_s,
                placed_bytes=images.nbytes + labels.nbytes,
                **{key: row[key] for key in ("step_ms_p50", "step_ms_p25", "step_ms_p75", "step_ms_min")},
                throughput_ips=1e3 * options.batch_size / median,
                **shares,
                **source,
            )
        )
    return found


def table(options: Options, rows: list[records.Record]) -> Table:
    """Return the table for the terminal."""
    notes = [
        f"{row['dataset']}: {row['n']:,} images, {row['placed_bytes'] / 1e6:.1f} MB, read in "
        f"{row['load_s']:.2f} s, placed in {row['place_s']:.3f} s"
        for row in rows
        if row["variant"] == DEVICE
    ]
    shown = Table(
        title=f"Input of one training step: batch {options.batch_size}, {options.repeats} rounds, "
        f"{jax.devices()[0].device_kind}",
        caption="\n".join(notes),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("data set", "input, or step of"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("median ms", "quartiles", "images/s", "input's share", "numpy's time / step"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row["dataset"],
            row["variant"],
            f"{row['step_ms_p50']:.2f}",
            f"{row['step_ms_p25']:.2f}-{row['step_ms_p75']:.2f}",
            f"{row['throughput_ips']:,.0f}",
            *("" if row[key] is None else f"{row[key]:.2%}" for key in ("share_of_device", "share_of_host")),
        )
    return shown


def input_figure(rows: list[records.Record], path: Path) -> None:
    """Write a PNG of the milliseconds per batch of both inputs and the steps, one panel per data set."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = canvas(5 * len(names), 3.2)
    colours = {DEVICE: COLOURS["quant-trim"], HOST: COLOURS["float"]}
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = [row for row in rows if row["dataset"] == name]
        variants, medians = ([row[key] for row in mine] for key in ("variant", "step_ms_p50"))
        places = range(len(mine))
        axes.scatter(
            medians, places, s=60, color=[colours.get(variant, OTHER_COLOURS[0]) for variant in variants]
        )
        for place, median in zip(places, medians, strict=True):
            axes.annotate(f"   {median:.2f}", (median, place), verticalalignment="center")
        axes.set_yticks(places, [f"step: {way}" if way in NETWORKS else way for way in variants])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(0.25)
        axes.set_xlabel(f"ms per batch of {mine[0]['batch_size']}")
        axes.set_title(name, loc="left")
    finish(figure, path)


def run(options: Options, console: Console) -> None:
    """Measure, print the table, append the records, draw the figure.

    Raises:
      InvalidInput: A count is below 1.
    """
    if options.repeats < 1:
        raise qt.InvalidInput(f"--repeats must be at least 1, got {options.repeats}")
    options.out.mkdir(parents=True, exist_ok=True)
    path, figure = options.out / "records.jsonl", options.out / "input.png"
    rows = []
    with Progress(console=console, transient=True) as progress:
        for name in available():
            rows += measure(name, options, progress)
    console.print(table(options, rows))
    for row in rows:
        records.append(path, row)
    input_figure(rows, figure)
    console.print(f"{path}, {figure}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status, as `command` does."""
    return command("experiments.benchmarks.input", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
