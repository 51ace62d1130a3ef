"""The presets of the study, by name."""

import importlib

import qt_jax as qt
from experiments.configs.preset import Preset, reduced

NAMES = ("cpu", "accelerator", "smoke", "accelerator-reduced")


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
      InvalidInput: there is none.

    >>> preset("cpu").seeds
    (0, 1, 2)
    """
    if name not in NAMES:
        raise qt.InvalidInput(f"--preset {name!r} is unknown; choose one of {', '.join(NAMES)}")
    full = name.removesuffix("-reduced")
    found = importlib.import_module(f"{__name__}.{full}").PRESET
    return found if full == name else reduced(found)
