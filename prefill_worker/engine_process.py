"""`python -m prefill_worker.engine_process`: owns a prefill worker's device, KV pool and transfer agent."""

from __future__ import annotations

import sys

from cluster.engine_main import EngineContext, main
from cluster.engine_messages import EngineReady
from cluster.process_identity import current
from cluster.step_loop import StepHandler
from engine.engine import Engine, EngineConfig
from engine.profiling import ProfiledSteps
from kv_transfer.backends import open_backend
from kv_transfer.backends.base import PoolMemory
from kv_transfer.digests import PageDigests
from kv_transfer.sender import HandoffSender
from kv_transfer.thread import TransferThread
from prefill_worker.prefill_loop import PrefillLoop


def build(context: EngineContext) -> tuple[StepHandler, EngineReady]:
    """Loads the model, registers its pool, warms up. Raises `ConfigError` for what can't work."""
    topology, section, epoch = context.topology, context.topology.prefill, context.epoch
    engine = Engine(EngineConfig.from_topology(topology, section, threads=len(context.cores)), context.board.advance)
    speed = engine.warm_up()
    pool = PoolMemory(engine.pool_address, engine.pool_bytes // engine.page_bytes, engine.page_bytes)
    backend = open_backend(topology.kv, f"{context.name}-{epoch}", pool, context.host)
    check = topology.kv.verify_digests
    digester = PageDigests(pool) if check else None
    thread = TransferThread(
        backend,
        digester,
        context.clock,
        context.channel.wake,
        pool.trial_page,
        context.board.transfers_seen,
        topology.kv.write_timeout_seconds,
    )
    sender = HandoffSender(
        thread,
        engine.layout,
        context.send_to_peer,
        context.clock,
        check,
        epoch=epoch,
        lifetime=topology.router.request_timeout_seconds,
    )
    ready = EngineReady(epoch, engine.layout, engine.model, engine.ledger.total, backend.descriptor, current(), speed)
    loop = PrefillLoop(engine, sender, context.send, context.channel.receive_only, context.clock, epoch, thread.close)
    return ProfiledSteps(loop, lambda: engine.steps, context.send, context.expect_silence), ready


if __name__ == "__main__":
    sys.exit(main("prefill_worker.engine_process", lambda topology: topology.prefill.cpus, build))
