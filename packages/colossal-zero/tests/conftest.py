"""What the tests of colossal-zero share: one pool of ranks for the whole session."""

from __future__ import annotations

import pytest

from colossal_core.testing import WorkerPool
from colossal_core.testing.suites import session_pool


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> WorkerPool:
    return session_pool(request.config)
