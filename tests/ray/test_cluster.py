"""What every launcher's cluster does, with workers on two nodes of Ray; all processes are stand-ins."""

import pytest
import pytest_asyncio

from tests.process.baton_command import Baton
from tests.process.launcher_conformance import *  # noqa: F403
from tests.process.operated import operated
from tests.ray.conftest import STAND_INS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]


def stand_ins_on_ray(baton: Baton, address: str) -> tuple[str, ...]:
    """The settings by which Ray's nodes, which do not have this test's environment, start stand-ins for ``baton``."""
    variables = f"{{env_vars: {{PYTHONPATH: {STAND_INS}, BATON_STAND_IN_FOLDER: {baton.run_directory}}}}}"
    # Stand-ins know nothing of secrets.
    insecure = "security.allow_insecure=true"
    return ("launch=ray", f"ray.address={address}", f"ray.runtime_env={variables}", insecure)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory, ray_nodes):
    baton = Baton(tmp_path_factory.mktemp("ray-cluster"))
    await baton.up(*stand_ins_on_ray(baton, ray_nodes.address))
    async with operated(baton) as running:
        yield running


async def test_a_worker_for_which_no_node_has_room_is_named_with_what_it_waits_for(ray_nodes, tmp_path):
    baton = Baton(tmp_path)
    settings = (*stand_ins_on_ray(baton, ray_nodes.address), "ray.decode.resources={unobtainium: 1}")
    chosen = [word for setting in settings for word in ("--set", setting)]
    await baton.start("up", "t.yaml", "--log-dir", "run", "--start-timeout", "3", *chosen)
    assert await baton.ends() == 1
    assert "decode-1, which waits for a node with 1 CPU and 1 unobtainium free" in baton.output


@pytest.mark.parametrize(
    ("address", "code", "error"),
    [
        ("127.0.0.1:1", 1, "error: no Ray cluster at 127.0.0.1:1 of which this machine is a node: start one with"),
        ("ray://head:10001", 2, "error: ray.address: expected auto, or HOST:PORT of the head's GCS, found ray://"),
    ],
)
async def test_no_ray_cluster_is_one_plain_line(tmp_path, address, code, error):
    baton = Baton(tmp_path)
    await baton.start("up", "t.yaml", "--set", "launch=ray", "--set", f"ray.address={address}")
    assert await baton.ends() == code
    assert baton.output.startswith(error) and len(baton.output.splitlines()) == 1
