"""Train CIFAR-10 in seconds on one GPU, with and without Quant-Trim: `python -m experiments.speedrun`.

The target is 94 %. Every seed is a training from scratch in one compiled function, timed from the call to the
last parameter. The draw of the parameters, the whitening, the order of the images, all epochs and the last
measurement of batch norm count. Compilation, and the copy of the images to the device, happen once for all
seeds and do not count; the time of compilation is recorded too. Then each network is exported and deployed by
ONNX Runtime, on the CPU, in FP32 and INT8.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qt_jax as qt
from experiments.data import Dataset, load
from experiments.data.augment import VIEWS
from experiments.devices import accelerator
from experiments.speedrun.deployment import SPEEDRUN_SCHEMES, deploy
from experiments.speedrun.program import Speedrun, make_evaluation, make_training
from experiments.training.checkpoints import read_variables, write_variables
from qt_jax import records
from qt_jax.command_line import command
from qt_jax.provenance import provenance
from qt_jax.reporting.tables import with_spread

PACKAGES = ("jax", "jaxlib", "flax", "optax", "onnxruntime", "onnx", "jax2onnx")


@dataclasses.dataclass(frozen=True)
class Options:
    """Train CIFAR-10 in seconds, with Quant-Trim and without, deploy at INT8, compare.

    A relaunch skips what is in the folder. Train on a GPU, and deploy elsewhere with the same command.

    Example:
        python -m experiments.speedrun --seeds 1 --train-limit 5000
    """

    recipe: Speedrun = dataclasses.field(default_factory=Speedrun)
    seeds: int = 10
    """Trainings of each method, with seeds 0, 1, ..."""
    split: Literal["test", "validation"] = "test"
    """test: train on all 50,000 training images, judge on the test images. validation: train on 45,000, judge
    on the other 5,000, to choose a recipe."""
    compare: bool = True
    """Train the float twin too."""
    deploy: bool = True
    """Export and deploy the trained networks; not for the validation split."""
    train_limit: int | None = None
    """Use only this many training images."""
    data_dir: Path | None = None
    """Folder or archive that holds CIFAR-10; otherwise the cache, then a download."""
    out: Path = Path("runs/speedrun")
    """Folder of records.jsonl and the trained parameters."""

    def __post_init__(self):
        if self.seeds < 1:
            raise qt.InvalidInput(f"--seeds must be at least 1, got {self.seeds}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status, as `command` does."""
    return command("experiments.speedrun", Options, run, arguments)


def run(options: Options, console: Console) -> list[dict[str, Any]]:
    """Train and deploy what is not in the folder yet, print the table, return all rows.

    Raises:
      InvalidInput: Rows in the folder are of another recipe or split, or there is not one whole batch.
    """
    dataset = load("cifar10", options.data_dir, seed=0)
    if options.split == "test":
        dataset = dataclasses.replace(
            dataset,
            train_images=np.concatenate([dataset.train_images, dataset.validation_images]),
            train_labels=np.concatenate([dataset.train_labels, dataset.validation_labels]),
        )
    else:
        dataset = dataclasses.replace(
            dataset, test_images=dataset.validation_images, test_labels=dataset.validation_labels
        )
    dataset = dataclasses.replace(
        dataset,
        train_images=dataset.train_images[: options.train_limit],
        train_labels=dataset.train_labels[: options.train_limit],
    )
    if len(dataset.train_images) < options.recipe.batch_size:
        raise qt.InvalidInput(
            f"--recipe.batch-size {options.recipe.batch_size} is larger than the training split "
            f"({len(dataset.train_images)})"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "records.jsonl"
    methods = {"quant-trim": options.recipe}
    if options.compare and options.recipe.quant_trim:
        methods["float"] = dataclasses.replace(options.recipe, quant_trim=False)
    for method, recipe in methods.items():
        train_seeds(options, method, recipe, dataset, path, console)
    if options.deploy and options.split == "test":
        for method, recipe in methods.items():
            deploy_seeds(options, method, recipe, dataset, path, console)
    rows = records.read(path)
    console.print(table(rows))
    return rows


def done(path: Path, options: Options, recipe: Speedrun) -> list[dict[str, Any]]:
    """Return the rows in the folder.

    Raises:
      InvalidInput: A row is of another recipe, split or set of images.
    """
    rows = records.read(path)
    mine = {**dataclasses.asdict(recipe), "quant_trim": None}
    for row in rows:
        if {**row["recipe"], "quant_trim": None} != mine or row["split"] != options.split:
            raise qt.InvalidInput(f"{path} holds rows of another recipe or split: name another --out")
        if row["train_limit"] != options.train_limit:
            raise qt.InvalidInput(f"{path} holds rows of another --train-limit: name another --out")
    return rows


def train_seeds(
    options: Options, method: str, recipe: Speedrun, dataset: Dataset, path: Path, console: Console
) -> None:
    """Train each seed that has no row, and write its row and its file of parameters."""
    trained = {row["seed"] for row in done(path, options, recipe) if row["method"] == method}
    seeds = [seed for seed in range(options.seeds) if seed not in trained]
    if not seeds:
        return
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    test_images = jnp.asarray(dataset.test_images)
    settings = (recipe, dataset.mean, dataset.std, dataset.num_classes)
    with console.status(f"compiling {method}"):
        started = time.perf_counter()
        train = jax.jit(make_training(*settings)).lower(images, labels, jax.random.key(0)).compile()
        compiling = time.perf_counter() - started
        evaluate = jax.jit(make_evaluation(*settings), static_argnums=2)
        jax.block_until_ready(train(images, labels, jax.random.key(2**31)))  # load kernels, fill caches
    for seed in track(seeds, f"training {method}", console=console, disable=not console.is_terminal):
        key = jax.block_until_ready(jax.random.key(seed))
        started = time.perf_counter()
        variables = jax.block_until_ready(train(images, labels, key))
        seconds = time.perf_counter() - started
        accuracy = {
            views: float(np.mean(evaluate(variables, test_images, views).argmax(-1) == dataset.test_labels))
            for views in (1, VIEWS)
        }
        write_variables(variables_path(path, method, seed), variables)
        steps = round(recipe.epochs * (len(images) // recipe.batch_size))
        row = records.new_record(
            benchmark="speedrun",
            task="cifar10",
            model="speed_net",
            method=method,
            seed=seed,
            scheme="trained",
            recipe=dataclasses.asdict(recipe),
            split=options.split,
            train_limit=options.train_limit,
            n=len(dataset.test_labels),
            top1=accuracy[1],
            top1_six_views=accuracy[VIEWS],
            seconds=seconds,
            compile_seconds=compiling,
            images_per_second=steps * recipe.batch_size / seconds,
            status="ok",
            **provenance(PACKAGES) | {"accelerator": accelerator()},
        )
        records.append(path, row)


def deploy_seeds(
    options: Options, method: str, recipe: Speedrun, dataset: Dataset, path: Path, console: Console
) -> None:
    """Deploy each seed that has parameters, and write a row for each scheme that has none."""
    rows = [row for row in done(path, options, recipe) if row["method"] == method]
    trained = {row["seed"]: row for row in rows if row["scheme"] == "trained"}
    kept = ("benchmark", "task", "model", "method", "seed", "recipe", "split", "train_limit")
    for seed in sorted(trained):
        known = {row["scheme"] for row in rows if row["seed"] == seed}
        missing = [scheme for scheme in SPEEDRUN_SCHEMES if scheme not in known]
        file = variables_path(path, method, seed)
        if missing and not file.exists():
            console.print(f"{file} is not there: seed {seed} of {method} is not deployed", style="yellow")
            continue
        if missing:
            identity = {key: trained[seed][key] for key in kept}
            for row in deploy(recipe, read_variables(file), dataset, missing):
                record = records.new_record(**identity, **row, status="ok", **provenance(PACKAGES))
                records.append(path, record)


def variables_path(path: Path, method: str, seed: int) -> Path:
    """Return the path of the parameters of one training."""
    return path.with_name(f"{method}-{seed}.npz")


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of the mean and the sample standard deviation over the seeds, by method and scheme."""
    shown = Table(title="CIFAR-10, seconds of training and accuracy", box=box.SIMPLE_HEAD)
    shown.add_column("method", no_wrap=True)
    shown.add_column("as", no_wrap=True)
    for heading in ("seeds", "one view, %", "six views, %", "seconds", "images/s"):
        shown.add_column(heading, justify="right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["scheme"]), []).append(row)
    for (method, scheme), members in groups.items():
        timed = scheme == "trained"
        shown.add_row(
            method,
            scheme,
            str(len(members)),
            with_spread((row["top1"] for row in members), 100),
            with_spread((row["top1_six_views"] for row in members), 100),
            with_spread((row["seconds"] for row in members), 1) if timed else "",
            f"{np.mean([row['images_per_second'] for row in members]):,.0f}" if timed else "",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
