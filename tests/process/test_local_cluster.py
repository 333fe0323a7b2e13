"""The cluster of a `baton up` on this machine, operated from another process; its processes are stand-ins."""

import pytest
import pytest_asyncio

from tests.process.baton_command import Baton
from tests.process.launcher_conformance import *  # noqa: F403
from tests.process.operated import operated

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory):
    baton = Baton(tmp_path_factory.mktemp("local-cluster"))
    await baton.up()
    async with operated(baton) as place:
        yield place
