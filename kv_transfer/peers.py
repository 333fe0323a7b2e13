"""Who is connected, with which epoch; and the fences that don't fit, refused and counted."""

from __future__ import annotations

from collections import Counter

from cluster.messages import Fence, HandoffMessage, PeerHello, PeerMessage, ProcessIdentity, Role
from cluster.process_identity import same_view


def instance(worker: str, epoch: int) -> str:
    """The name of one life of a worker; what a transfer backend calls a peer."""
    return f"{worker}@{epoch}"


class Peers:
    """The other pool's workers as one engine process knows them. `role` is ours, and so is `epoch`."""

    def __init__(self, role: Role, epoch: int) -> None:
        self.stale: dict[str, int] = Counter()
        """Messages refused, by type."""
        self._role = role
        self._epoch = epoch
        self._connected: dict[str, PeerHello] = {}

    def up(self, hello: PeerHello) -> PeerHello | None:
        """Notes a connection; returns the one that it replaces."""
        before = self._connected.get(hello.worker)
        self._connected[hello.worker] = hello
        return before

    def down(self, worker: str, epoch: int) -> bool:
        """Notes a broken connection; False if that instance was not connected."""
        if not self.connected(worker, epoch):
            return False
        del self._connected[worker]
        return True

    def epoch_of(self, worker: str) -> int | None:
        """Epoch of the connected instance, None without one."""
        hello = self._connected.get(worker)
        return None if hello is None else hello.epoch

    def connected(self, worker: str, epoch: int) -> bool:
        return self.epoch_of(worker) == epoch

    def hello(self, worker: str) -> PeerHello:
        """Of a connected worker."""
        return self._connected[worker]

    def accepts(self, worker: str, epoch: int, message: HandoffMessage) -> bool:
        """Whether the message comes from a connected instance and its fence names that instance and ours."""
        ours, theirs = message.fence.prefill_epoch, message.fence.decode_epoch
        if self._role is Role.DECODE:
            ours, theirs = theirs, ours
        if self.connected(worker, epoch) and (ours, theirs) == (self._epoch, epoch):
            return True
        self.refuse(message)
        return False

    def witnesses(self, process: ProcessIdentity) -> list[PeerHello]:
        """Connected peers with a rank on a host whose kernel knows about this process."""
        hellos = self._connected.values()
        return [hello for hello in hellos if any(same_view(rank.process, process) for rank in hello.ranks)]

    def refuse(self, message: PeerMessage) -> None:
        """Counts a message that is not acted upon."""
        self.stale[type(message).__name__] += 1

    def require_own(self, fence: Fence) -> None:
        """Raises `ValueError` if our own caller uses a fence of another instance."""
        ours = fence.prefill_epoch if self._role is Role.PREFILL else fence.decode_epoch
        if ours != self._epoch:
            raise ValueError(f"{fence} is of another instance than ours, {self._epoch}")
