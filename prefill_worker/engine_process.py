"""`python -m prefill_worker.engine_process`: a rank of a prefill worker: its device, KV pool and transfer agent."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cluster.engine_main import EngineContext, main
from cluster.engine_messages import EngineReady
from cluster.messages import EngineRank
from cluster.process_identity import current
from cluster.step_loop import StepHandler
from engine.device_memory import full_is_refused
from engine.engine import Engine, EngineConfig
from engine.followers import Follower
from engine.loaded_model import load_model
from engine.page_digests import device_digests
from engine.profiling import ProfiledSteps
from kv_transfer.backends.base import PoolMemory
from kv_transfer.opening import follow_transfers, open_transfers
from kv_transfer.remote import RemoteTransfers
from kv_transfer.sender import HandoffSender
from prefill_worker.prefill_loop import PrefillLoop


def build(context: EngineContext) -> tuple[StepHandler, EngineReady]:
    """Loads the model, registers its pool, warms up. Raises `ConfigError` for what can't work."""
    topology, epoch = context.topology, context.epoch
    with full_is_refused():
        engine = Engine(_config(context), context.board.advance, context.rank)
        speed = engine.warm_up()
    pool = PoolMemory(
        engine.pool_address, engine.pool_bytes // engine.page_bytes, engine.page_bytes, engine.pool_device
    )
    thread = open_transfers(context, pool, context.channel.wake, engine.page_digests())
    sender = HandoffSender(
        thread,
        engine.layout,
        context.send_to_peer,
        context.clock,
        topology.kv.verify_digests,
        epoch=epoch,
        lifetime=topology.router.request_timeout_seconds,
        followers=[RemoteTransfers(follower, thread.deliver) for follower in context.rank.transfers],
    )
    ready = EngineReady(
        epoch,
        engine.layout,
        engine.model,
        engine.ledger.total,
        thread.descriptor,
        current(),
        speed,
        engine.memory.use(),
    )
    loop = PrefillLoop(engine, sender, context.send, context.channel.receive_only, context.clock, epoch, thread.close)
    return ProfiledSteps(loop, lambda: engine.steps, context.send, context.expect_silence), ready


def follow(context: EngineContext) -> tuple[Callable[[], None], EngineRank]:
    """Of a rank other than 0: its part of the model, of the pool and of the transfers."""
    with full_is_refused():
        model = load_model(_config(context), context.rank)
    pool = PoolMemory(model.cache.address, model.cache.pages, model.cache.page_bytes, model.cache.device)
    run = Follower(model.decoder, context.rank.steps[0], model.line, context.board.advance).run
    return follow_transfers(context, pool, run, device_digests(model.cache))


def _config(context: EngineContext) -> EngineConfig:
    return EngineConfig.from_topology(context.topology, context.topology.prefill, threads=len(context.cores))


if __name__ == "__main__":
    sys.exit(main("prefill_worker.engine_process", lambda topology: topology.prefill.cpus, build, follow))
