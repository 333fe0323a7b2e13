"""A rank's part in transfers, as its topology asks for it: pool registered, transfer engine running, on its thread."""

from __future__ import annotations

from collections.abc import Callable

from cluster.engine_main import EngineContext
from cluster.messages import EngineRank
from cluster.process_identity import current
from kv_transfer.backends import open_backend
from kv_transfer.backends.base import PoolMemory
from kv_transfer.digests import PageDigests
from kv_transfer.driver import Digester
from kv_transfer.remote import FollowerTransfers
from kv_transfer.thread import TransferThread


def open_transfers(
    context: EngineContext, pool: PoolMemory, wake: Callable[[], None], digester: Digester | None
) -> TransferThread:
    """`wake`: see `TransferThread`. `digester`: of pages that the host can't read. Raises `ConfigError` for what can't
    work."""
    kv = context.topology.kv
    agent = f"{context.name}-{context.epoch}" + ("" if context.rank.leads else f"-{context.rank.number}")
    return TransferThread(
        open_backend(kv, agent, pool, context.host),
        (digester or PageDigests(pool)) if kv.verify_digests else None,
        context.clock,
        wake,
        pool.trial_page,
        context.board.transfers_seen,
        kv.write_timeout_seconds,
    )


def follow_transfers(
    context: EngineContext, pool: PoolMemory, run: Callable[[], None], digester: Digester | None
) -> tuple[Callable[[], None], EngineRank]:
    """A follower's: `run` with transfers beside it, which end with it and it with them; and what peers have to know."""
    (steps,), (commands,) = context.rank.steps, context.rank.transfers
    transfers = FollowerTransfers(commands, lambda wake: open_transfers(context, pool, wake, digester), steps.hang_up)

    def work() -> None:
        try:
            run()
        finally:
            transfers.close()

    return work, EngineRank(transfers.descriptor, current())
