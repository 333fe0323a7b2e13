"""Links of ranks on other hosts: those that are waited for come in, and nothing else."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cluster.errors import WorkerLost
from cluster.rank_links import RankDoor, knock
from cluster.ranks import Frames

HOST = "127.0.0.1"
SOON = 10.0


async def test_links_come_in_in_any_order_and_are_told_apart():
    with RankDoor(HOST) as door:
        collecting = asyncio.ensure_future(door.collect([2, 3]))
        ends = {rank: await knock(HOST, door.port, door.token, rank) for rank in (3, 2)}
        found = await asyncio.wait_for(collecting, SOON)
        inherited = [Frames(socket.fromfd(end, socket.AF_INET, socket.SOCK_STREAM)) for end in found]
    for own, theirs in zip([*ends[2], *ends[3]], inherited, strict=True):
        Frames(own).send(str(own.fileno()).encode())
        assert theirs.receive() == str(own.fileno()).encode()
        own.close()
        theirs.close()


async def test_who_does_not_know_the_token_or_is_not_waited_for_is_shut_out():
    with RankDoor(HOST) as door:
        collecting = asyncio.ensure_future(door.collect([1]))
        strangers = [
            *await knock(HOST, door.port, "0" * len(door.token), 1),
            *await knock(HOST, door.port, door.token, 7),
        ]
        for stranger in strangers:
            closed = asyncio.get_running_loop().sock_recv(stranger, 1)
            assert await asyncio.wait_for(closed, SOON) == b""
            stranger.close()
        assert not collecting.done()
        ends = await knock(HOST, door.port, door.token, 1)
        assert len(await asyncio.wait_for(collecting, SOON)) == len(ends)
    for end in ends:
        end.close()


async def test_a_door_that_is_not_there_is_told():
    with RankDoor(HOST) as door:
        port = door.port
    with pytest.raises(WorkerLost, match=f"rank 1 can't be linked to rank 0 at {HOST}:{port}"):
        await knock(HOST, port, "token", 1)
