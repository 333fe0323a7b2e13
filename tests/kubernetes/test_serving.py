"""What operators do with kubectl, and what befalls pods, while clients read: nobody loses a token.

Workers are real control processes with stand-ins for engines, which give a token a beat: what is tried is the control
plane. Objects that the chart makes are applied as they are, but for that. With the real model: `test_model.py`.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.kubernetes.installation import PATIENCE, Installation, with_metronomes
from tests.kubernetes.readers import reading
from tests.kubernetes.stand_ins.metronome import token
from tests.process.api import eventually

pytestmark = pytest.mark.kubernetes

SETTINGS = ("worker.drain_seconds=1", "router.drain_seconds=10", "bootstrap.lease_seconds=5")
VALUES = {"router": {"replicas": 2, "preStopSeconds": 3}}
READERS = 6


@pytest.fixture(scope="module")
def baton(kubernetes, tmp_path_factory):
    installation = Installation(kubernetes, "serving", SETTINGS, VALUES, tmp_path_factory.mktemp("serving"))
    try:
        installation.start(with_metronomes)
        yield installation
    finally:
        installation.stop()


@pytest.fixture
async def api(baton):
    async with baton.api() as api:
        yield api


def undisturbed(baton, *components):
    return {component: baton.pods(component) for component in components}


async def until(condition, what):
    async def holds():
        return await asyncio.to_thread(condition)

    await eventually(holds, what, PATIENCE)


async def scaled(baton, component, size):
    """Until the service leads to so many workers, and bootstrap knows as many."""
    await asyncio.to_thread(baton.kubectl, "scale", f"deployment/baton-{component}", f"--replicas={size}")
    await until(lambda: len(baton.endpoints(component)) == size, f"a slice with {size} endpoints")
    assert await asyncio.to_thread(baton.endpoints, component) == baton.pods(component).keys()

    async def known():
        members = [each.member.worker for each in await baton.members() if each.load.ready]
        return {name for name in members if component in name} == baton.pods(component).keys()

    await eventually(known, f"bootstrap knows {size} {component} workers", PATIENCE)


async def test_a_request_is_answered_by_way_of_the_service(baton, api):
    prompt = [1001, 1002, 1003]
    got = await api.complete(prompt, max_tokens=5, temperature=0)
    assert got.tokens == [token(prompt, offset) for offset in range(5)]
    assert len(baton.endpoints("router")) == 2
    names = {each.member.worker for each in await baton.members()}
    assert names == baton.pods("prefill").keys() | baton.pods("decode").keys()


async def test_one_pool_is_scaled_while_the_other_and_the_streams_are_undisturbed(baton, api):
    others = undisturbed(baton, "prefill", "router", "bootstrap")
    first = baton.pods("decode")
    async with reading(api, READERS) as account:
        await account.more(READERS)
        await scaled(baton, "decode", 4)
        assert first.items() <= baton.pods("decode").items()
        await account.more(2 * READERS)
        await scaled(baton, "decode", 2)
        await account.more(2 * READERS)
    assert not account.wrong
    assert undisturbed(baton, "prefill", "router", "bootstrap") == others


async def test_a_killed_pod_is_started_anew_and_registers_again(baton, api):
    await scaled(baton, "decode", 2)
    others = undisturbed(baton, "prefill", "router", "bootstrap")
    victim, before = min(baton.pods("decode").items())
    (epoch,) = [each.member.epoch for each in await baton.members() if each.member.worker == victim]
    async with reading(api, READERS) as account:
        await account.more(READERS)
        baton.kill(victim)

        async def registered():
            members = {each.member.worker: each for each in await baton.members() if each.load.ready}
            return victim in members and members[victim].member.epoch > epoch

        await eventually(registered, f"{victim} is there again", PATIENCE)
        await until(lambda: victim in baton.endpoints("decode"), "its endpoint")
        await account.more(2 * READERS)
    assert not account.wrong
    assert baton.pods("decode")[victim] == (before[0], before[1] + 1)
    assert undisturbed(baton, "prefill", "router", "bootstrap") == others


async def test_a_pod_that_is_gone_with_its_node_is_replaced(baton, api):
    await scaled(baton, "prefill", 2)
    victim = min(baton.pods("prefill"))
    async with reading(api, READERS) as account:
        await account.more(READERS)
        await asyncio.to_thread(baton.kubectl, "delete", "pod", victim, "--force", "--grace-period=0")
        await until(lambda: len(baton.endpoints("prefill") - {victim}) == 2, "a replacement")
        await account.more(2 * READERS)
    assert not account.wrong
    await scaled(baton, "prefill", 1)


@pytest.mark.parametrize("component", ["decode", "prefill", "bootstrap", "router"])
async def test_a_rolling_update_under_load_loses_nothing(baton, api, component):
    before = baton.pods(component)
    async with reading(api, READERS) as account:
        await account.more(READERS)
        await asyncio.to_thread(baton.kubectl, "rollout", "restart", f"deployment/baton-{component}")
        status = ("rollout", "status", f"deployment/baton-{component}", f"--timeout={PATIENCE:g}s")
        await asyncio.to_thread(baton.kubectl, *status)
        await until(lambda: not before.keys() & baton.endpoints(component), "endpoints of new pods only")
        await account.more(3 * READERS)
    assert not account.wrong
    assert not before.keys() & baton.pods(component).keys()


async def test_secrets_and_network_policies_are_taken_as_they_are_rendered(baton):
    there = baton.kubectl("get", "secrets,networkpolicies,serviceaccounts,configmaps", "--output=name").split()
    rendered = [made for made in baton.objects if made["kind"] not in ("Deployment", "Service")]
    assert len(rendered) >= 6
    for made in rendered:
        assert any(name.endswith(f"/{made['metadata']['name']}") for name in there), made["kind"]
