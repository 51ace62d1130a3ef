"""Test what the backends say about themselves."""

from qt_jax.backends import BACKENDS
from qt_jax.backends.protocol import KINDS


def test_every_backend_describes_itself():
    for backend in BACKENDS.values():
        assert backend.kind in KINDS and backend.vendor and backend.stands_for
        names = [scheme.name for scheme in backend.schemes]
        assert len(set(names)) == len(names) and len(backend.runtimes) > 0
        for scheme in backend.schemes:
            assert not (scheme.dynamic and scheme.calibration)
            if scheme.source:
                origin, source = scheme.source
                assert source in [other.name for other in BACKENDS[origin].schemes]
        if backend.environment is not None:
            assert backend.environment.licence and backend.environment.megabytes > 0
            assert all("==" in requirement for requirement in backend.environment.requirements)
