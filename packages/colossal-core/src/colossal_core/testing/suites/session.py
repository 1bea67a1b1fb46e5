"""The pool of ranks of a pytest session: one, whichever suites and tests ask for it."""

from __future__ import annotations

import pytest

from colossal_core.testing.pool import WorkerPool

_POOL = pytest.StashKey[WorkerPool]()


def session_pool(config: pytest.Config) -> WorkerPool:
    """The session's pool, made at the first call and closed when pytest ends. Use it in a fixture of your own tests too."""
    if _POOL not in config.stash:
        pool = WorkerPool()
        config.stash[_POOL] = pool
        config.add_cleanup(pool.close)
    return config.stash[_POOL]
