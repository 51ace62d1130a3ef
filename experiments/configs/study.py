"""Define the presets of the study: their tasks, the methods compared on each, and the deployments.

- converged: networks trained to convergence on two CPU cores, and every method as a fine-tuning of them.
- cpu: two CPU cores, small networks, short budgets, three or five seeds. It takes hours; the results are in
  experiments/results/paper-cpu.
- accelerator: one GPU or TPU, full networks, full budgets, five seeds. It takes hours and was not run yet.
- quarter-hour: what one GPU trains in ten to fifteen minutes, for `experiments.accelerator`.
- smoke: every stage on a scrap of data, in minutes.
- accelerator-reduced, quarter-hour-reduced: the rows of these presets on a scrap of data.
"""

import dataclasses
from typing import Literal

import qt_jax as qt
from experiments.configs.methods import BASELINES, FLOAT, FLOAT_BASELINES, METHODS, NEUTRAL_METHODS
from experiments.configs.training import PRESETS, SEGMENTATION_PRESETS, Config
from qt_jax.backends import grids


@dataclasses.dataclass(frozen=True)
class Target:
    """Name the schemes of one backend on one of its runtimes."""

    backend: str
    runtime: str
    schemes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Describe a data set, a network, and the methods that are compared on them.

    Attributes:
      name: Name of the task in records and tables.
      base: The config that methods change: data, network, budget, and otherwise the published recipe.
      methods: Names of methods, see `methods_of`.
      main: Where the rows of the main table are deployed.
      ablation: Where all other rows are deployed.
      replicated: Methods that are also trained with the preset's `more_seeds`.
      start: Every row starts from the float network of the same seed of the task of this name: it fine-tunes.
        None: rows start from drawn parameters.
    """

    name: str
    base: Config
    methods: tuple[str, ...]
    main: tuple[Target, ...]
    ablation: tuple[Target, ...]
    replicated: tuple[str, ...] = ()
    start: str | None = None

    def targets(self, method: str) -> tuple[Target, ...]:
        """Return where the network of a method is deployed."""
        return self.main if BASELINES in METHODS[method].tables else self.ablation


SEARCHED = (Target("onnxruntime", "reference", ("int4w-pt-minmax", "int4w-pc-minmax")),)
"""Deployments of a trial whose criterion is the mean over them and FP32."""

GRIDS = Target(
    "grids",
    "onnxruntime",
    tuple(scheme.name for scheme in grids.BACKEND.schemes if not scheme.name.endswith("-weights")),
)
"""All conventions of grids, with activations on 8 bits."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Describe a study.

    Attributes:
      name: Name of the preset. Its results go to `experiments/results/paper-<name>`.
      tasks: The tasks.
      seeds: Seeds of training, the same for all methods of all tasks.
      factors: Factors of the task's learning rate, which `--search` tries for each method.
      search_seed: Seed of the search, which is not among `seeds`.
      judges: Where a trial of the search is deployed, on the validation split.
      criterion: What the search takes of these deployments: their mean, FP32 with them, or the worst one.
      more_seeds: Further seeds for the methods that a task replicates.
      pinned: True: a row computes on one core, and as many rows run at a time as there are cores. False: one
        row runs at a time, on the whole machine.
      minutes: Time limit of one step of one deployment.
      accelerated: `experiments.accelerator` trains the networks; `experiments.paper` deploys those it finds.
    """

    name: str
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    search_seed: int = 1000
    judges: tuple[Target, ...] = SEARCHED
    criterion: Literal["mean", "worst"] = "mean"
    more_seeds: tuple[int, ...] = ()
    pinned: bool = True
    minutes: float = 20.0
    accelerated: bool = False

    def task(self, name: str) -> Task:
        """Return the task of this name.

        Raises:
          InvalidInput: The preset has no such task.
        """
        found = {task.name: task for task in self.tasks}
        if name not in found:
            raise qt.InvalidInput(f"--task {name!r} is unknown here; choose one of {', '.join(found)}")
        return found[name]


def preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
      InvalidInput: No preset has this name.

    >>> preset("cpu").seeds
    (0, 1, 2)
    """
    if name not in STUDIES:
        raise qt.InvalidInput(f"--preset {name!r} is unknown; choose one of {', '.join(STUDIES)}")
    return STUDIES[name]


def methods_of(*tables: str) -> tuple[str, ...]:
    """Return the names of the methods of any of these tables, in the order of `METHODS`.

    >>> methods_of("main")[0]
    'float'
    """
    return tuple(name for name, method in METHODS.items() if set(tables) & set(method.tables))


def reduced(preset: Preset) -> Preset:
    """Return a preset that checks that everything runs: the first seed, eight steps per row, little data.

    >>> reduced(Preset("p", (), (0, 1))).name
    'p-reduced'
    """
    scrap = {"epochs": 1, "train_limit": 512, "batch_size": 64, "steps_per_dispatch": 1}
    scrap |= {"reverse_pruning_every": 2, "calibration_size": 32, "test_limit": 100}
    tasks = tuple(
        dataclasses.replace(task, base=dataclasses.replace(task.base, **scrap)) for task in preset.tasks
    )
    return dataclasses.replace(
        preset, name=f"{preset.name}-reduced", tasks=tasks, seeds=preset.seeds[:1], more_seeds=()
    )


# Deployments.

INT4_WEIGHTS = ("int4w-pt-minmax", "int4w-pc-minmax", "int4w-narrow-pt-minmax", "int4w-narrow-pc-minmax")

OPENVINO_INT4 = Target("openvino", "cpu", ("int4w-pt-sym-minmax-accurate", "int4w-pc-sym-minmax-accurate"))

MAIN = (
    Target(
        "onnxruntime",
        "reference",
        ("int8-pt-minmax", "int8-pc-minmax", "int8-pt-percentile", "int8-s8s8-pt-minmax", *INT4_WEIGHTS),
    ),
    Target(
        "openvino",
        "cpu",
        (
            *("int8-pc-sym-mean", "int4w-pt-sym-mean", "int4w-pt-sym-minmax-accurate"),
            *("int4w-pc-sym-mean", "int4w-pc-sym-minmax-accurate"),
        ),
    ),
    Target("litert", "xnnpack", ("int8-pt-minmax",)),
    Target("ryzen-ai", "onnxruntime", ("xint8", "mxfp4e2m1")),
    Target("sophgo", "cmodel", ("bm1688-w4int8",)),
)
"""Deployments of classifiers in the main table."""

GPU_MAIN = (*MAIN, Target("tensorrt", "gpu", ("int8-pc-minmax",)))
"""Deployments of classifiers in the main table on a machine with a GPU."""

ABLATION = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", "int8-pc-minmax", *INT4_WEIGHTS)),
    OPENVINO_INT4,
)
"""Deployments of classifiers in all other tables."""

DENSE = (Target("onnxruntime", "reference", ("int8-pt-minmax", *INT4_WEIGHTS)), OPENVINO_INT4)
"""Deployments of segmentation networks."""

SMOKE_TARGETS = (
    Target("onnxruntime", "reference", ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")),
)

# Presets.

FEW_METHODS = ("float", "qat-w4", "lsq-w4", "quant-trim", "recommended")
"""Methods that the preset cpu compares on tasks other than its first."""

DEPTHWISE_METHODS = (
    *FEW_METHODS,
    "folded",
    "recommended-raw",
    "recommended-fused",
    "clips",
    "batch-norm",
    "recommended-clips",
)
"""Methods on depthwise convolutions, where the published quantization points are weakest."""

TUNED_ONLY = (*FLOAT_BASELINES, *NEUTRAL_METHODS)
"""Methods of which only studies of fine-tuning have rows."""

FIVE_EPOCHS = tuple(name for name, method in METHODS.items() if name not in TUNED_ONLY)
"""Methods of the study of short trainings from scratch."""

CPU_BASE = Config(preset="cpu", model="fast8", epochs=5)
CPU = Preset(
    name="cpu",
    tasks=(
        Task(
            name="cifar10-fast8",
            base=CPU_BASE,
            methods=FIVE_EPOCHS,
            main=MAIN,
            ablation=ABLATION,
            replicated=("float", "quant-trim", "recommended"),
        ),
        Task(
            name="cifar10-mobilenetv2",
            base=dataclasses.replace(CPU_BASE, model="mobilenetv2-tiny"),
            methods=DEPTHWISE_METHODS,
            main=MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar10-vit",
            base=dataclasses.replace(CPU_BASE, model="vit-tiny", learning_rate=0.05),
            methods=FEW_METHODS,
            main=MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="fashion-fast8",
            base=dataclasses.replace(CPU_BASE, dataset="fashion-mnist"),
            methods=FEW_METHODS,
            main=MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="composed-unet",
            base=SEGMENTATION_PRESETS["cpu"],
            methods=FEW_METHODS,
            main=DENSE,
            ablation=DENSE,
        ),
    ),
    seeds=(0, 1, 2),
    more_seeds=(3, 4),
)

SPEED_HALF = Config(
    preset="cpu",
    model="speed-half",
    epochs=12,
    learning_rate=0.3,
    label_smoothing=0.2,
    shift=2,
    flips="alternating",
)
"""A network that is right on nine of ten images of CIFAR-10 after half an hour on two cores."""

EVERYWHERE = (
    Target(
        "onnxruntime",
        "reference",
        ("int8-pt-minmax", "int8-pc-minmax", "int4w-pt-minmax", "int4w-pc-minmax"),
    ),
    GRIDS,
)
"""Deployments of all methods of the converged study."""

TUNED = (
    *(FLOAT, *FLOAT_BASELINES),
    *("qat-w4", "qat-w4-folded", "lsq-w4", "pact-w4", "qwix-w4"),
    *("reverse-pruning-only", "quant-trim", "recommended", *NEUTRAL_METHODS),
)
"""Methods that are compared as a fine-tuning of a converged network."""


def fine_tuning(scratch: Task, epochs: int, learning_rate: float) -> Task:
    """Return the task of fine-tuning the float networks of a task, with this budget for every method."""
    base = dataclasses.replace(scratch.base, epochs=epochs, learning_rate=learning_rate)
    return Task(
        f"{scratch.name}-tuned",
        base,
        TUNED,
        main=scratch.main,
        ablation=scratch.ablation,
        start=scratch.name,
    )


CONVERGED_CIFAR = Task(
    "cifar10-speed", SPEED_HALF, (FLOAT, "quant-trim", "neutral"), main=EVERYWHERE, ablation=EVERYWHERE
)

CONVERGED = Preset(
    name="converged",
    tasks=(CONVERGED_CIFAR, fine_tuning(CONVERGED_CIFAR, epochs=3, learning_rate=0.05)),
    seeds=(0, 1, 2, 3, 4),
    factors=(0.4, 1.0, 2.5),
    judges=(GRIDS,),
    criterion="worst",
    minutes=30.0,
)

GPU_BASE = PRESETS["gpu"]
MAIN_METHODS = tuple(name for name in methods_of(BASELINES) if name not in TUNED_ONLY)
ACCELERATOR = Preset(
    name="accelerator",
    tasks=(
        Task(
            name="cifar10-resnet18",
            base=GPU_BASE,
            methods=FIVE_EPOCHS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar10-mobilenetv2",
            base=dataclasses.replace(GPU_BASE, model="mobilenetv2"),
            methods=MAIN_METHODS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar10-vit",
            base=dataclasses.replace(
                GPU_BASE, model="vit", learning_rate=0.05, lr_schedule="cosine", epochs=120
            ),
            methods=MAIN_METHODS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="cifar100-resnet18",
            base=dataclasses.replace(GPU_BASE, dataset="cifar100"),
            methods=MAIN_METHODS,
            main=GPU_MAIN,
            ablation=ABLATION,
        ),
        Task(
            name="composed-unet",
            base=SEGMENTATION_PRESETS["gpu"],
            methods=MAIN_METHODS,
            main=DENSE,
            ablation=DENSE,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    pinned=False,
)

SPEED_BASE = Config(
    preset="gpu",
    model="speed",
    epochs=16,
    batch_size=1024,
    learning_rate=1.5,
    final_rate=0.07,
    bias_rate=64.0,
    momentum=0.85,
    weight_decay=1.3e-3,
    label_smoothing=0.2,
    average_every=5,
    frozen=("whitening/kernel",),
    shift=2,
    flips="alternating",
    dtype="bfloat16",
    steps_per_dispatch=1000,
    warmup=0.3,
    range_momentum=0.9,
    reverse_pruning_every=25,
    reverse_pruning_start=0.3,
    reestimate=10_000,
)
"""The recipe of `experiments.speedrun` with the published Quant-Trim. Batch norm is re-estimated for all
methods, as there. It has ReLU, which every vendor fuses, in place of GELU. It takes three epochs more for
that and for the validation split, on which it does not train."""

FIRST_METHODS = (FLOAT, "quant-trim", "recommended", "qat", "qat-w4", "lsq-w4", "reverse-pruning-only")
"""Methods that the quarter of an hour trains first, in this order."""

SPEED_METHODS = tuple(
    name
    for name in dict.fromkeys((*FIRST_METHODS, *methods_of(BASELINES), "recommended-w4"))
    if name not in TUNED_ONLY
)
"""Every baseline there is, and the candidate recipes."""


def quarter_hour(
    name: str,
    speed: Config,
    resnet: Config,
    seeds: tuple[int, ...],
    more_seeds: tuple[int, ...],
    main: tuple[Target, ...],
    ablation: tuple[Target, ...],
) -> Preset:
    """Return the study of a quarter of an hour on a GPU: its tasks lie in the order of their worth.

    Args:
      name: Name of the preset.
      speed: Config of the speed network from scratch. It is fine-tuned for a quarter of its epochs, at a
        quarter of its learning rate (FINDINGS of the first fine-tuning: 4 epochs at 0.05 after 0.2).
      resnet: Config of the residual network.
      seeds, more_seeds: As in `Preset`; the speed network has them all.
      main, ablation: As in `Task`.
    """
    tuned = dataclasses.replace(
        speed, epochs=max(1, speed.epochs // 4), learning_rate=speed.learning_rate / 4
    )
    shared = {"methods": SPEED_METHODS, "replicated": SPEED_METHODS, "main": main, "ablation": ablation}
    scratch = Task(f"{speed.dataset}-94", speed, **shared)
    deep = Task(
        f"{resnet.dataset}-{resnet.model}",
        resnet,
        (FLOAT, "quant-trim", "recommended"),
        main=main,
        ablation=ablation,
    )
    return Preset(
        name=name,
        tasks=(scratch, Task(f"{scratch.name}-fine-tuned", tuned, start=scratch.name, **shared), deep),
        seeds=seeds,
        more_seeds=more_seeds,
        pinned=False,
        accelerated=True,
    )


QUARTER_HOUR = quarter_hour(
    "quarter-hour",
    speed=SPEED_BASE,
    resnet=dataclasses.replace(
        GPU_BASE, epochs=30, batch_size=512, learning_rate=0.4, steps_per_dispatch=1000
    ),
    seeds=(0, 1, 2),
    more_seeds=tuple(range(3, 10)),
    main=MAIN,
    ablation=ABLATION,
)

DIGITS_SCRAP = {"preset": "cpu", "dataset": "digits", "batch_size": 64, "train_limit": 1280}
DIGITS_SCRAP |= {"steps_per_dispatch": 1, "calibration_size": 64}

QUARTER_HOUR_REDUCED = quarter_hour(
    "quarter-hour-reduced",
    speed=dataclasses.replace(
        SPEED_BASE,
        model="speed-tiny",
        learning_rate=1.0,
        bias_rate=8.0,
        shift=1,
        reverse_pruning_every=5,
        **DIGITS_SCRAP,
    ),
    resnet=dataclasses.replace(
        GPU_BASE, model="resnet8", epochs=4, shift=1, reverse_pruning_every=5, **DIGITS_SCRAP
    ),
    seeds=(0,),
    more_seeds=(1,),
    main=SMOKE_TARGETS,
    ablation=SMOKE_TARGETS,
)
"""The same rows on two CPU cores, without a network: small networks on the digits of scikit-learn."""

SMOKE = Preset(
    name="smoke",
    tasks=(
        Task(
            name="digits",
            base=Config(
                preset="cpu",
                dataset="digits",
                model="tiny",
                epochs=2,
                batch_size=64,
                train_limit=256,
                reverse_pruning_every=2,
                calibration_size=16,
                test_limit=100,
            ),
            methods=("float", "quant-trim", "recommended", "fine-tuned", "clips", "batch-norm"),
            main=SMOKE_TARGETS,
            ablation=SMOKE_TARGETS,
        ),
    ),
    seeds=(0, 1),
    factors=(0.5, 1.0),
)

STUDIES = {
    "cpu": CPU,
    "converged": CONVERGED,
    "accelerator": ACCELERATOR,
    "smoke": SMOKE,
    "accelerator-reduced": reduced(ACCELERATOR),
    "quarter-hour": QUARTER_HOUR,
    "quarter-hour-reduced": QUARTER_HOUR_REDUCED,
}
"""Maps the name of a preset, as on the command line, to the preset."""
