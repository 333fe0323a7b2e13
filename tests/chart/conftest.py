from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tools() -> Path:
    return Path(os.environ["BATON_TEST_CHART"])
