"""The demo model in pods, from `baton up` to `baton down`: transfers between namespaces of networks and pids, and the
tokens of the un-split model.
"""

from __future__ import annotations

import asyncio

import pytest

from cluster.messages import Role
from tests.kubernetes.installation import PATIENCE, Installation
from tests.process.api import eventually
from tests.process.reference.cases import load_reference

pytestmark = pytest.mark.kubernetes

SETTINGS = ("model.dtype=float32", "kv.pool_tokens=4096", "worker.drain_seconds=5")
VALUES = {"router": {"replicas": 1}}
SHOWN = 4
"""Cases of the reference that are asked."""


@pytest.fixture(scope="module")
def baton(kubernetes, tmp_path_factory):
    installation = Installation(kubernetes, "model", SETTINGS, VALUES, tmp_path_factory.mktemp("model"))
    try:
        output, code = installation.baton("up", str(installation.file), f"--start-timeout={PATIENCE:g}")
        assert code == 0, output
        assert output.splitlines()[-1].startswith("ready: smollm2-135m-instruct at http://baton-router.model.svc:80,")
        yield installation
        output, code = installation.baton("down", f"--topology={installation.file}")
        assert code == 0, output
        assert installation.kubectl("get", "pods,services", "--output=name") == ""
    finally:
        installation.stop()


async def handed_over(api, url):
    """The bytes that a prefill worker has written to others."""
    async with api.session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("baton_handoff_bytes_total"))


async def test_pods_hand_over_and_give_the_tokens_of_the_model_before_and_after_one_dies(baton):
    cases = load_reference().cases[:SHOWN]
    async with baton.api() as api:

        async def ask(case):
            return (await api.stream(case.prompt, max_tokens=case.new_tokens, temperature=0, ignore_eos=True)).tokens

        async def agree():
            answers = await asyncio.gather(*(ask(case) for case in cases))
            assert answers == [case.expected for case in cases]

        await agree()
        members = {each.member.role: each for each in await baton.members()}
        assert await handed_over(api, members[Role.PREFILL].member.url) > 0
        decode = members[Role.DECODE]
        asking = asyncio.create_task(agree())
        baton.kill(decode.member.worker)
        await asking

        async def back():
            members = {each.member.worker: each for each in await baton.members() if each.load.ready}
            found = members.get(decode.member.worker)
            return found is not None and found.member.epoch > decode.member.epoch

        await eventually(back, "the decode worker is there again", PATIENCE)
        await agree()
