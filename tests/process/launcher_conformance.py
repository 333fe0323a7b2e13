"""What every launcher's cluster does, wherever it runs.

A test module of a place imports all of this and has a fixture `place`, of the module's scope, with one prefill and two
decode workers. Each test finds the cluster as others left it, so that it is started but once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import pytest

from cluster.errors import ConfigError, LaunchError, NotFound
from cluster.messages import Role
from deploy.launchers.base import Cluster, ProcessKind, Replica, ReplicaState

READY = ReplicaState.READY
PATIENCE = 120.0
"""For anything that a place does; it may have to start several workers."""
POLL_SECONDS = 0.05


class Place(NamedTuple):
    """A cluster that a launcher has brought up."""

    cluster: Cluster
    kill: Callable[[str], Awaitable[None]]
    """Ends a worker's control process, without a word to anybody."""

    async def scaled(self, prefill: int, decode: int) -> None:
        await asyncio.wait_for(self.cluster.scale({Role.PREFILL: prefill, Role.DECODE: decode}), PATIENCE)

    async def pool(self, role: Role) -> dict[str, str]:
        """The instances of its workers that take work, by name."""
        return {
            replica.name: replica.instance
            for replica in await self.cluster.status()
            if replica.kind.value == role.value and replica.state is ReplicaState.READY
        }

    async def until(self, condition: Callable[[list[Replica]], bool]) -> None:
        async def holds() -> None:
            while not condition(await self.cluster.status()):  # noqa: ASYNC110 - there is nothing to be told by
                await asyncio.sleep(POLL_SECONDS)

        await asyncio.wait_for(holds(), PATIENCE)


async def require_stopped(cluster: Cluster) -> None:
    """For the end of a place's fixture."""
    await asyncio.wait_for(cluster.stop(grace_seconds=30.0), PATIENCE)
    with suppress(LaunchError):  # nobody answers: so much is gone
        assert await cluster.status() == []
    await cluster.stop(grace_seconds=0.0)


async def test_status_tells_of_every_process_that_should_run(place):
    await place.scaled(1, 2)
    replicas = await place.cluster.status()
    kinds = sorted(replica.kind.value for replica in replicas)
    assert kinds == ["bootstrap", "decode", "decode", "prefill", "router"]
    assert {replica.state for replica in replicas} == {ReplicaState.READY}
    assert len({replica.name for replica in replicas}) == len({replica.instance for replica in replicas}) == 5
    assert all(replica.node for replica in replicas)


async def test_a_pool_grows_and_shrinks_by_its_youngest_while_nobody_else_is_disturbed(place):
    await place.scaled(1, 1)
    prefill, oldest = await place.pool(Role.PREFILL), await place.pool(Role.DECODE)
    await place.scaled(1, 3)
    grown = await place.pool(Role.DECODE)
    assert len(grown) == 3 and grown.items() >= oldest.items()
    await place.scaled(1, 2)
    shrunk = await place.pool(Role.DECODE)
    assert len(shrunk) == 2 and oldest.items() <= shrunk.items() <= grown.items()
    assert await place.pool(Role.PREFILL) == prefill


async def test_pools_change_at_the_same_time(place):
    await place.scaled(2, 1)
    assert (len(await place.pool(Role.PREFILL)), len(await place.pool(Role.DECODE))) == (2, 1)
    await place.scaled(1, 2)
    assert (len(await place.pool(Role.PREFILL)), len(await place.pool(Role.DECODE))) == (1, 2)


async def test_a_size_that_can_not_serve_is_refused_and_nothing_happens(place):
    await place.scaled(1, 1)
    before = await place.cluster.status()
    for sizes in ({Role.DECODE: 0}, {Role.DECODE: 2, Role.PREFILL: 0}):
        with pytest.raises(ConfigError, match="the least is 1"):
            await place.cluster.scale(sizes)
    assert await place.cluster.status() == before


async def test_a_drained_worker_is_gone_and_not_replaced(place):
    await place.scaled(1, 2)
    before = await place.pool(Role.DECODE)
    leaving = min(before)
    await asyncio.wait_for(place.cluster.drain([leaving]), PATIENCE)
    await place.until(lambda replicas: leaving not in {replica.name for replica in replicas})
    del before[leaving]
    assert await place.pool(Role.DECODE) == before
    await place.scaled(1, 2)
    assert len(await place.pool(Role.DECODE)) == 2


async def test_a_restarted_worker_is_another_one(place):
    await place.scaled(1, 2)
    before = await place.pool(Role.DECODE)
    await asyncio.wait_for(place.cluster.restart([max(before)]), PATIENCE)
    after = await place.pool(Role.DECODE)
    assert len(after) == 2 and after.items() & before.items() == {(min(before), before[min(before)])}


async def test_unknown_workers_are_refused_before_anything_is_done(place):
    await place.scaled(1, 1)
    before = await place.cluster.status()
    (known,) = await place.pool(Role.DECODE)
    for work in (place.cluster.drain, place.cluster.restart):
        with pytest.raises(NotFound, match="nobody-7"):
            await work([known, "nobody-7"])
    assert await place.cluster.status() == before


async def test_who_dies_is_replaced(place):
    await place.scaled(1, 2)
    before = await place.pool(Role.DECODE)
    victim = max(before)
    await place.kill(victim)
    instances = set(before.values())

    def replaced(replicas: list[Replica]) -> bool:
        alive = {each.instance for each in replicas if each.kind is ProcessKind.DECODE and each.state is READY}
        return len(alive) == 2 and before[victim] not in alive and len(alive & instances) == 1

    await place.until(replaced)


async def test_logs_are_read_to_their_end_or_followed(place):
    await place.scaled(1, 1)
    (name,) = await place.pool(Role.DECODE)
    last = [line async for line in place.cluster.logs(name, 1, follow=False)]
    assert len(last) == 1
    following = place.cluster.logs(name, 1, follow=True)
    assert await asyncio.wait_for(anext(following), PATIENCE) == last[0]
    await following.aclose()
    with pytest.raises(NotFound, match="nobody-7"):
        [line async for line in place.cluster.logs("nobody-7", 1, follow=False)]
