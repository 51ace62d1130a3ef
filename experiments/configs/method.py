"""What a row of the study is: one method, said as changes to a task's base config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import qt_jax as qt
from experiments.configs.cifar import Config

BASELINES = "main"
"""The table of the methods that are compared with each other; its rows go through the most backends."""

Export = Literal["plain", "clips", "batch-norm"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the study.

    Attributes:
      title: its name in tables and figures.
      tables: those it is a row of: "main", or ablations such as "schedule".
      changes: fields of `Config` and their values.
      scales: fields of `Config` and what the task's value is multiplied by; counts are rounded, at least 1.
      start: the method whose trained network of the same task and seed training starts from.
      network: the method whose trained network of the same task and seed is deployed, instead of a new one.
      export: plain; clips: learned ranges as Clip nodes; batch-norm: its statistics estimated again on the
        float graph.
      rate: the method whose searched learning rate this one takes; None: its own.
    """

    title: str
    tables: tuple[str, ...] = (BASELINES,)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: str | None = None
    network: str | None = None
    export: Export = "plain"
    rate: str | None = None

    @property
    def needs(self) -> str | None:
        """The method that must be trained before this one."""
        return self.start or self.network


def config_of(method: Method, base: Config, seed: int, factor: float = 1.0) -> Config:
    """The config of `method` on a task.

    Args:
      base: the task's, which is that of the published recipe.
      seed: of the run.
      factor: of the learning rate, from the search.

    Raises:
      InvalidInput: a change that is no field of `Config`, or a value that `Config` refuses.

    >>> config_of(Method("half", scales={"epochs": 0.5}), Config(epochs=10), seed=3).epochs
    5
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted({*method.changes, *method.scales} - known):
        raise qt.InvalidInput(
            f"the method {method.title!r} changes {', '.join(unknown)}, which Config has not: choose among "
            f"{', '.join(sorted(known))}"
        )
    values = {**method.changes, "seed": seed}
    for name, scale in {"learning_rate": 1.0, **method.scales}.items():
        value = values.get(name, getattr(base, name)) * scale
        values[name] = max(1, round(value)) if isinstance(getattr(base, name), int) else value
    values["learning_rate"] *= factor
    return dataclasses.replace(base, **values)
