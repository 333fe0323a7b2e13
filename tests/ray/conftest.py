"""`make test-ray` runs these; nothing else does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import aiohttp
import pytest

from tests.process.reference.cases import load_reference
from tests.ray.nodes import RayNodes

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]
"""Without Ray there is nothing to be collected; `make test-ray` says what is missing."""

STAND_INS = Path(__file__).parents[1] / "process" / "stand_ins"


@pytest.fixture(scope="session")
def ray_nodes():
    """Two nodes; who kills the second one starts it again."""
    nodes = RayNodes()
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="session")
def reference():
    return load_reference()


@pytest.fixture
async def http():
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session
