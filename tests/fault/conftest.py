"""`make test-fault` runs these; nothing else does."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from bench.machine import describe_setting
from bench.report import write
from tests.fault.plan import Kind
from tests.fault.results import CampaignResult, page
from tests.process.conftest import pytest_runtest_makereport  # noqa: F401 - logs of the cluster, when a test fails
from tests.process.reference.cases import load_reference

DEFAULT_SEED = 20_261_120
DEFAULT_FAULTS = 112
"""Of each campaign, one for each transfer engine: each kind at each moment, and at any."""


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption("--fault-seed", type=int, default=DEFAULT_SEED, help="of faults, questions and their order")
    group.addoption("--faults", type=int, default=DEFAULT_FAULTS, help="how many, for each transfer engine")
    group.addoption("--fault-kinds", help="only these, as named in tests/fault/plan.py: KILL_ENGINE,CUT")
    group.addoption("--fault-results", type=Path, help="a folder; without one, nothing is written")


@pytest.fixture(scope="session")
def fault_seed(pytestconfig):
    return pytestconfig.getoption("--fault-seed", DEFAULT_SEED)


@pytest.fixture(scope="session")
def fault_count(pytestconfig):
    return pytestconfig.getoption("--faults", DEFAULT_FAULTS)


@pytest.fixture(scope="session")
def fault_kinds(pytestconfig):
    chosen = pytestconfig.getoption("--fault-kinds", None)
    return [Kind[name] for name in chosen.split(",")] if chosen else list(Kind)


@pytest.fixture(scope="session")
def reference():
    return load_reference()


@pytest.fixture(scope="session")
def results(pytestconfig):
    """Campaigns put their results here; at the end they are written down."""
    found: list[CampaignResult] = []
    yield found
    folder = pytestconfig.getoption("--fault-results", None)
    if found and folder is not None:
        write(found, describe_setting(["make", "test-fault"]), page(found), folder)


@pytest.fixture(scope="session")
def answers():
    """The right ones, by question: the first cluster gives them before anything happens to it."""
    return {}


@pytest.fixture
async def http():
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session
