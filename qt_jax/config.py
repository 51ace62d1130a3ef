"""Choose which layers and sites are quantized, and how.

A `QuantConfig` holds defaults for three sites of every layer (weights, inputs, outputs), and rules for the
exceptions. The first rule that matches a layer's path wins. Configs are frozen and hashable.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable

from qt_jax.errors import InvalidInput
from qt_jax.grid import QuantSpec

INHERIT = "inherit"
"""Value of a rule's site that keeps the default of the `QuantConfig`."""

Site = QuantSpec | None
"""Spec of one quantization point, or None if it stays in floating point."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Set the sites of the layers whose path matches.

    Attributes:
      path: Regular expression, matched against the whole Flax path, such as "encoder/block1/conv".
      weights, inputs, outputs: A `QuantSpec`, None for floating point, or `INHERIT` (the default).
      skip: Whether to leave the layer as it is.

    Raises:
      InvalidInput: `path` is not a regular expression, or a site is none of these.

    >>> Rule("head", weights=QuantSpec(bits=8, axis=-1)).matches("head")
    True
    >>> Rule(r".*/conv1").matches("stage1/conv1/kernel")
    False
    """

    path: str
    weights: Site | str = INHERIT
    inputs: Site | str = INHERIT
    outputs: Site | str = INHERIT
    skip: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except re.error as error:
            raise InvalidInput(f"rule {self.path!r} is not a regular expression: {error}") from error
        for name in ("weights", "inputs", "outputs"):
            value = getattr(self, name)
            if not (value is None or value == INHERIT or isinstance(value, QuantSpec)):
                raise InvalidInput(
                    f"rule {self.path!r}: {name} must be a QuantSpec, None or INHERIT, got {value!r}"
                )

    def matches(self, path: str) -> bool:
        """Return whether the whole of `path` matches."""
        return re.fullmatch(self.path, path) is not None


@dataclasses.dataclass(frozen=True)
class Sites:
    """Hold the specs of one layer's quantization points, and the index of the rule that set them, if any."""

    weights: Site
    inputs: Site
    outputs: Site
    rule: int | None = None


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Configure `quant_trim` as one frozen, hashable value.

    Attributes:
      weights: Default for kernels. In the paper it is symmetric, and the range an upper quantile of |w|.
      activations: Default for the inputs of every layer. It is asymmetric in the paper.
      outputs: Default for the outputs of every layer. It is None, since the next layer's input covers them.
      rules: Exceptions. The first rule whose path matches a layer wins.
      momentum: Momentum of the moving averages of the ranges, in [0, 1).
      sample_size: Number of elements observed of each tensor. A larger sample is surer and slower. Where the
        quantile is 1 the whole tensor is observed.
      folded: Whether to lay the grids of the kernels where a vendor does: over the kernel times the gain of
        its batch norm, which `Fusion.refresh` keeps up to date. The paper's grids lie over the raw kernel.
      fused_outputs: Paths of modules whose output also gets the grid of `activations`, since a vendor
        requantizes it. Take them from `find_fusion(...).outputs`.
      seed: Seed of the draws of `QuantSpec.grids`.
      axis_name: Mapped device axis under `shard_map` or `pmap`; None under plain `jit`.

    Raises:
      InvalidInput: A field is out of its range or of another type.

    >>> config = QuantConfig(weights=QuantSpec(4), rules=(Rule("head", skip=True),))
    >>> config.sites("stem").weights.bits, config.sites("head").weights
    (4, None)
    """

    weights: Site = QuantSpec(bits=8)  # noqa: RUF009 - frozen
    activations: Site = QuantSpec(bits=8, symmetric=False)  # noqa: RUF009 - frozen
    outputs: Site = None
    rules: tuple[Rule, ...] = ()
    momentum: float = 0.99
    sample_size: int = 4096
    folded: bool = False
    fused_outputs: tuple[str, ...] = ()
    seed: int = 0
    axis_name: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise InvalidInput(f"QuantConfig.momentum must lie in [0, 1), got {self.momentum!r}")
        if self.sample_size < 1:
            raise InvalidInput(f"QuantConfig.sample_size must be at least 1, got {self.sample_size!r}")
        for name in ("weights", "activations", "outputs"):
            if not isinstance(getattr(self, name), QuantSpec | None):
                raise InvalidInput(
                    f"QuantConfig.{name} must be a QuantSpec or None, got {getattr(self, name)!r}"
                )
        if not (isinstance(self.rules, tuple) and all(isinstance(rule, Rule) for rule in self.rules)):
            raise InvalidInput("QuantConfig.rules must be a tuple of Rule, so that the config can be hashed")

    def sites(self, path: str) -> Sites:
        """Return the specs of the layer at `path`."""
        for index, rule in enumerate(self.rules):
            if rule.matches(path):
                if rule.skip:
                    return Sites(None, None, None, index)
                return Sites(
                    _chosen(rule.weights, self.weights),
                    _chosen(rule.inputs, self.activations),
                    _chosen(rule.outputs, self.outputs),
                    index,
                )
        return Sites(self.weights, self.activations, self.outputs)


def _chosen(site: Site | str, default: Site) -> Site:
    return default if isinstance(site, str) else site


def check_rules_used(config: QuantConfig, paths: Iterable[str]) -> None:
    """Raise InvalidInput for a rule that is the first match of no layer, and name the nearest paths.

    >>> check_rules_used(QuantConfig(rules=(Rule("haed"),)), ["stem", "head"])
    Traceback (most recent call last):
    qt_jax.errors.InvalidInput: rule 'haed' matches no layer; near misses: 'head'. ...
    """
    paths = sorted(set(paths))
    used = {config.sites(path).rule for path in paths}
    for index, rule in enumerate(config.rules):
        if index in used:
            continue
        shadowed = [path for path in paths if rule.matches(path)]
        if shadowed:
            earlier = next(other.path for other in config.rules if other.matches(shadowed[0]))
            raise InvalidInput(
                f"rule {rule.path!r} is never used: an earlier rule, {earlier!r}, takes {shadowed[0]!r} "
                "before it. The first match wins: move the more special rule up, or drop it."
            )
        near = [path for path in paths if re.search(rule.path, path)]
        near += difflib.get_close_matches(rule.path, paths, n=3, cutoff=0.4)
        near = list(dict.fromkeys(near))[:3] or paths[:3]
        raise InvalidInput(
            f"rule {rule.path!r} matches no layer; near misses: {', '.join(map(repr, near))}. "
            "A rule is a regular expression for the whole path (.* stands for any part); "
            "qt.coverage(model, variables, input) lists every path."
        )
