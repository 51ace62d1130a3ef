"""What a preset of the study is: its tasks, their methods, and the toolchains each network goes through."""

import dataclasses

from experiments.configs.cifar import Config
from experiments.configs.method import BASELINES
from experiments.configs.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Target:
    """Schemes of one backend on one of its runtimes."""

    backend: str
    runtime: str
    schemes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and a network, and the methods that are compared on them.

    Attributes:
      name: of the task in records and tables.
      base: the config that methods change: data, network, budget, and else the published recipe.
      methods: names, see `methods_of`.
      main, ablation: where the rows of the main table and all others are deployed.
      replicated: methods that are trained with the preset's `more_seeds`, too.
    """

    name: str
    base: Config
    methods: tuple[str, ...]
    main: tuple[Target, ...]
    ablation: tuple[Target, ...]
    replicated: tuple[str, ...] = ()

    def targets(self, method: str) -> tuple[Target, ...]:
        """Where the network of this method is deployed."""
        return self.main if BASELINES in METHODS[method].tables else self.ablation


@dataclasses.dataclass(frozen=True)
class Preset:
    """A study.

    Attributes:
      name: of the preset; results go to `experiments/results/paper-<name>`.
      seeds: of training, the same for all methods of all tasks.
      more_seeds: for the methods that a task has replicated.
      factors: of the task's learning rate, which `--search` tries for each method.
      search_seed: of the search, not among `seeds`.
      pinned: a row computes on one core, and as many rows at a time as there are cores; else one at a time,
        on the whole machine.
      minutes: that one step of one deployment may take.
    """

    name: str
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    search_seed: int = 1000
    more_seeds: tuple[int, ...] = ()
    pinned: bool = True
    minutes: float = 20.0


def reduced(preset: Preset) -> Preset:
    """A preset on a scrap of its data, to see whether everything runs: its first seed, eight steps a row.

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


def methods_of(*tables: str) -> tuple[str, ...]:
    """The names of the methods of any of these tables, in the order of the registry.

    >>> methods_of("main")[0]
    'float'
    """
    return tuple(name for name, method in METHODS.items() if set(tables) & set(method.tables))
