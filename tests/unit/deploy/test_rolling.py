"""Draining and restarting by name, on a cluster that exists in memory."""

from __future__ import annotations

import msgspec
import pytest

from cluster.clock import ManualClock
from cluster.errors import LaunchError, NotFound
from cluster.messages import Member
from deploy import rolling
from deploy.rolling import Rolling
from tests.unit.deploy.example_members import member_status

NAMES = ("decode-0", "decode-1", "prefill-0", "prefill-1")


class Cluster:
    """Both sides of what is asked. A drained worker needs some looks until it is gone, or back."""

    def __init__(self, looks: int = 3) -> None:
        self.statuses = {name: member_status(name) for name in NAMES}
        self.clock = ManualClock()
        self.log: list[str] = []
        self.told: list[str] = []
        self.router_lags = 0
        self._looks = looks
        self._leaving: dict[str, int] = {}
        self.rolling = Rolling(self, self, self.clock, 60.0, self.told.append)

    async def workers(self):
        for name in list(self._leaving):
            self._look(name)
        return list(self.statuses.values())

    async def drain(self, member: Member, *, restart: bool) -> None:
        assert not self._leaving or not restart, "one at a time"
        self.log.append(f"{member.worker} {'restart' if restart else 'drain'}")
        self._leaving[member.worker] = self._looks

    async def is_gone(self, member: Member) -> bool:
        return self._look(member.worker) == 0

    async def takes_work(self, worker: str, epoch: int) -> bool:
        self.router_lags -= 1
        return self.router_lags < 0

    def _look(self, name: str) -> int:
        self.clock.advance(1.0)
        self._leaving[name] -= 1
        left = self._leaving[name]
        if left == 0:
            del self._leaving[name]
            self.log.append(f"{name} back")
            status = self.statuses[name]
            member = msgspec.structs.replace(status.member, epoch=status.member.epoch + 1)
            self.statuses[name] = msgspec.structs.replace(status, member=member)
        return left


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(rolling, "POLL_SECONDS", 0.0)


async def test_a_restart_goes_from_one_to_the_next_prefill_pool_first():
    cluster = Cluster()
    await cluster.rolling.restart([])
    order = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert cluster.log == [line for name in order for line in (f"{name} restart", f"{name} back")]
    assert cluster.told[:2] == ["prefill-0 is draining", "prefill-0 takes work again, after 3.0 s"]


async def test_the_next_waits_until_the_router_too_knows_the_last():
    cluster = Cluster()
    cluster.router_lags = 5
    await cluster.rolling.restart(["decode-1", "prefill-0"])
    assert cluster.log == ["decode-1 restart", "decode-1 back", "prefill-0 restart", "prefill-0 back"]
    assert cluster.router_lags < 0


async def test_drained_workers_leave_together():
    cluster = Cluster()
    await cluster.rolling.drain(["decode-1", "prefill-0"])
    assert cluster.log[:2] == ["decode-1 drain", "prefill-0 drain"]
    assert cluster.told[2:] == ["decode-1 has ended", "prefill-0 has ended"]


async def test_an_unknown_name_is_refused_with_the_known_ones_before_anything_is_done():
    cluster = Cluster()
    for work in (cluster.rolling.drain, cluster.rolling.restart):
        with pytest.raises(NotFound, match=r"no worker decode-7; bootstrap knows these: decode-0, .*, prefill-1$"):
            await work(["decode-0", "decode-7"])
    assert cluster.log == []


async def test_who_does_not_come_back_is_named():
    with pytest.raises(LaunchError, match="prefill-0 has not come back within 60 s"):
        await Cluster(looks=1000).rolling.restart([])
