"""Share compiled programs between the tests of whole runs, whose time compiling dominates."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module")
def shared_compilations(tmp_path_factory):
    """Turn on JAX's persistent compilation cache, in a folder of this test session."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "jax-cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
