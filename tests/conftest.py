"""Every test runs on four simulated CPU devices, with strict dtype and rank promotion.

Tests compile the same programs again and again, so that JAX keeps them for the length of a session. Where
the variable QT_JAX_COMPILED names a folder, they are kept there for later sessions too.
"""

import contextlib
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Otherwise jax 0.10 counts a program in another folder as another one, also on a CPU.
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ci")

PACKAGE = Path(__file__).parent / "qt_jax"
LONG_FILES = (
    "test_devices",
    "test_accelerator",
    "test_segmentation",
    "test_core_random",
    "test_pruning_random",
    "test_pruning",
    "test_own_model",
    "test_notebooks",
)
"""The files that take longest, the longest first."""


def link_programs(source: Path, target: Path) -> None:
    """Link the compiled programs of one folder into another one that lacks them."""
    for program in source.glob("*-cache"):
        with contextlib.suppress(FileExistsError):
            os.link(program, target / program.name)


def pytest_configure(config):
    """Keep compiled programs in a folder of this process: JAX's writes are not safe for several processes.

    The programs of QT_JAX_COMPILED are linked into it now, and its own ones into QT_JAX_COMPILED at the end.
    """
    shared = os.environ.get("QT_JAX_COMPILED")
    folder = tempfile.TemporaryDirectory(prefix="qt-jax-compiled-", dir=shared)
    config.add_cleanup(folder.cleanup)
    if shared:
        link_programs(Path(shared), Path(folder.name))
        config.add_cleanup(lambda: link_programs(Path(folder.name), Path(shared)))
    jax.config.update("jax_compilation_cache_dir", folder.name)


def pytest_collection_modifyitems(items):
    """Begin with the longest files, and measure coverage in the package's own tests that draw no program.

    A long file at the end would leave a core without work. On Python 3.11 code that is measured is almost
    twice as slow.
    """
    rank = {stem: index for index, stem in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.parent != PACKAGE or item.path.stem.endswith("_random"):
            item.add_marker("no_cover")
