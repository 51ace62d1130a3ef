"""Describe Linen models that others published, and import what builds them."""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal
from unittest.mock import MagicMock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ABSENT = (
    *("tensorflow", "tensorflow.io", "tensorflow.io.gfile", "tensorflow_datasets"),
    *("clu", "immutabledict", "big_vision.pp", "flax.nn"),
)
"""Packages that the repositories import for data, for files or for types, but never call in a forward."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """Describe one input of a model.

    Attributes:
      shape: Sizes without batch.
      dtype: Type of the input.
      name: Name of the argument where the model takes it by keyword; otherwise empty.
      below: Integers are drawn up to this, without it.
      least: Integers are drawn from this on.
    """

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    name: str = ""
    below: int = 40
    least: int = 0

    def draw(self, rng: np.random.Generator, batch: int) -> jax.Array:
        """Return random values for `batch` examples."""
        shape = (batch, *self.shape)
        whole = jnp.issubdtype(self.dtype, jnp.integer)
        return jnp.asarray(
            rng.integers(self.least, self.below, shape) if whole else rng.uniform(size=shape), self.dtype
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """Describe one model: how to build it, what it takes, and how to call it.

    Attributes:
      name: Folder of the sources, and name of the model.
      build: Returns the Linen module.
      inputs: Inputs, in order.
      call: Further keyword arguments of the call at inference.
      pick: Chooses what is exported of the model's outputs.
      layout: "nhwc" for a model that takes and returns its images channels-first by itself.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Argument, ...]
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    pick: Callable[[Any], Any] = lambda outputs: outputs
    layout: Literal["nchw", "nhwc"] = "nchw"


def image(size: int, channels: int = 3, name: str = "") -> Argument:
    """Describe an input of square images."""
    return Argument((size, size, channels), name=name)


def tokens(length: int, name: str = "", below: int = 40) -> Argument:
    """Describe an input of token numbers."""
    return Argument((length,), jnp.int32, name, below)


@dataclasses.dataclass(frozen=True)
class Builders:
    """Make functions that build a model from the sources."""

    sources: Path

    def named(self, module: str, name: str, **arguments: Any) -> Callable[[], nn.Module]:
        """Build the class `name` of an importable module."""
        return lambda: getattr(load(module), name)(**arguments)

    def example(self, path: str) -> Any:
        """Load the models of one example of flax, whose folders all name theirs alike."""
        return load_file(self.sources / "flax" / "examples" / path / "models.py", f"flax_example_{path}")

    def configured(self, family: str, network: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
        """Build a network of `transformers` from the configuration of its family."""

        def build() -> nn.Module:
            config = getattr(load("transformers"), f"{family}Config")(**sizes)
            file = f"transformers.models.{family.lower()}.modeling_flax_{family.lower()}"
            return getattr(load(file), f"Flax{network}Module")(config)

        return build


@contextmanager
def without(names: tuple[str, ...]) -> Iterator[None]:
    """Let imports of packages that are missing succeed, with objects that do nothing."""
    stubs = {name: MagicMock(__spec__=ModuleSpec(name, None)) for name in names if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


@cache
def load(module: str) -> Any:
    """Import a module. `transformers` looks for missing packages itself, and must find them missing."""
    with without(() if module.startswith(("transformers", "diffusers", "vqgan")) else ABSENT):
        return importlib.import_module(module)


@cache
def load_file(file: Path, name: str) -> Any:
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with without(ABSENT):
        spec.loader.exec_module(module)
    return module


def config_dict(**entries: Any) -> Any:
    """Make the ConfigDict that the repositories of Google Research take."""
    return load("ml_collections").ConfigDict(entries)
