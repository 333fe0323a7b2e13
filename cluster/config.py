"""The settings of a cluster, typed and frozen: one `Topology` per YAML file, read by every process.

`cluster.topology` turns YAML and `--set` into these; each field's comment is its documentation. Lengths are in tokens,
times in seconds. Only this package reads the environment.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Delay = Annotated[float, Meta(ge=0)]
"""In seconds; 0: none."""
Share = Annotated[float, Meta(ge=0, le=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Cores = list[list[NonNegative]]
"""For each replica, the cores it is pinned to; also its number of compute threads."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: unknown keys are refused."""


class Dtype(str, Enum):
    AUTO = "auto"
    """bfloat16 where the device multiplies it in hardware, else float32."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class WeightsFrom(str, Enum):
    FILES = "files"
    DUMMY = "dummy"
    """Random weights in the shape of config.json: for load tests."""


class Kernels(str, Enum):
    AUTO = "auto"
    """Native where they can be had, else torch."""
    NATIVE = "native"
    """C++ for CPUs with AVX-512, compiled at the first start."""
    TORCH = "torch"
    """torch's own operators: any device."""


class TransferName(str, Enum):
    NIXL = "nixl"
    MOONCAKE = "mooncake"


class PolicyName(str, Enum):
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"


class SchedulingPolicy(str, Enum):
    """Who goes first, where not all can. Ageing keeps every request from waiting for ever, see `engine.policies`."""

    FIRST_COME = "first_come"
    SHORTEST_FIRST = "shortest_first"
    """The fewest tokens to compute."""
    LONGEST_FIRST = "longest_first"
    LONGEST_PREFIX = "longest_prefix"
    """The most tokens whose KV is in the prefix cache."""
    PRIORITY = "priority"
    """The request's own `priority`: the higher, the more urgent."""


class LogLevel(str, Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Model(Section, frozen=True):
    path: Text
    """A Hugging Face folder, a .gguf file, or the demo model's name."""
    dtype: Dtype = Dtype.AUTO
    """Of weights, activations and KV cache."""
    name: Text | None = None
    """What clients call it; by default the last part of `path`."""
    weights: WeightsFrom = WeightsFrom.FILES
    context_length: Positive | None = None
    """Shortens the model's own."""
    kernels: Kernels = Kernels.AUTO


class KV(Section, frozen=True):
    page_size: Positive = 16
    pool_tokens: Positive = 65536
    """Capacity of one worker's pool."""
    transfer: TransferName = TransferName.NIXL
    verify_digests: bool = True
    """Decode checks each page's digest before it reads from it."""
    prefix_cache: bool = True
    """Pages of earlier requests serve prompts that begin alike: they are neither computed nor sent again."""


class Bootstrap(Section, frozen=True):
    host: Text = "127.0.0.1"
    port: Port = 8998
    heartbeat_seconds: Seconds = 1.0
    lease_seconds: Seconds = 3.0
    """A worker that is silent for so long gets no new work."""


class Router(Section, frozen=True):
    host: Text = "127.0.0.1"
    port: Port = 8000
    policy: PolicyName = PolicyName.LEAST_LOAD
    default_max_tokens: Positive = 8192
    """Where a request names no limit (and the context leaves so much). Pages are kept for as many tokens as answers
    take, not for as many as they may: see `decode.scheduling.commit_quantile`."""
    request_timeout_seconds: Seconds = 600.0
    max_body_bytes: Positive = 8 * 1024 * 1024
    max_choices: Positive = 128
    """Upper limit of prompts x n in one request."""


class Worker(Section, frozen=True):
    """Of each worker, in both pools."""

    drain_seconds: Seconds = 30.0
    """After SIGTERM or `baton drain`: how long requests under way may take to finish. What is left then goes back to
    its router, which goes on with it elsewhere."""
    stall_limit_seconds: Seconds = 60.0
    """An engine process that has made no progress for so long is killed and started anew, and `/live` says 503 until
    then. (It is not ready, and gets no new work, after less than three heartbeats.)"""


class Restarts(Section, frozen=True):
    """Of an engine process by its worker, and of a cluster's processes by `baton up`."""

    most: Positive = 5
    """Of one process within `window_seconds`; when it dies once more, it is given up. The first comes at once, the
    next ones after a pause that doubles."""
    window_seconds: Seconds = 300.0
    longest_pause_seconds: Seconds = 10.0


class PrefillScheduling(Section, frozen=True):
    policy: SchedulingPolicy = SchedulingPolicy.FIRST_COME
    ageing_seconds: Seconds = 10.0
    """Who has waited for so long goes before all that have not; under `priority`, a level is worth so much waiting."""


class DecodeScheduling(Section, frozen=True):
    policy: SchedulingPolicy = SchedulingPolicy.FIRST_COME
    """Of the queue for pages; unified, of prompts too."""
    ageing_seconds: Seconds = 10.0
    """As in `prefill.scheduling`."""
    commit_quantile: Share = 0.9
    """A request enters with pages for its prompt and for as many tokens as this share of recent answers stayed below
    (never more than its max_tokens). One that grows longer than the pool allows goes on later, elsewhere or here, with
    the same tokens. 1: pages for max_tokens, always."""
    conservativeness: Share = 0.0
    """Unified only: how far a step's prompt tokens give way to its decodes. 0: `chunk_tokens` at any time; 1: a handful
    while others decode; between, see `engine.pacing`."""
    prefill_delay_seconds: Delay = 0.0
    """Unified only: for so long new prompts may be held back while others decode, to be computed together."""
    retract_every_steps: NonNegative = 0
    """For tests: retracts the youngest that decodes after so many steps, again and again, pages or not. 0: never."""


class Prefill(Section, frozen=True):
    replicas: NonNegative = 1
    """0: a unified cluster, decode workers prefill by themselves."""
    host: Text = "127.0.0.1"
    chunk_tokens: Positive = 512
    """Tokens computed in one step, over all sequences of the batch."""
    max_running: Positive = 64
    """Sequences that hold pages here: being computed, or being handed over."""
    cpus: Cores = []
    scheduling: PrefillScheduling = PrefillScheduling()


class Decode(Section, frozen=True):
    replicas: Positive = 1
    host: Text = "127.0.0.1"
    chunk_tokens: Positive = 512
    """Unified only: prompt tokens computed beside the decodes of one step."""
    max_running: Positive = 64
    cpus: Cores = []
    scheduling: DecodeScheduling = DecodeScheduling()


class Logging(Section, frozen=True):
    level: LogLevel = LogLevel.INFO
    json: bool = True
    """One JSON object per line; false: plain text, for terminals."""
    profile_dir: Text | None = None
    """Where workers write the traces of `/profile/start`; by default baton-profiles among the temporary files."""


class Topology(Section, frozen=True):
    """A whole cluster."""

    model: Model
    kv: KV = KV()
    bootstrap: Bootstrap = Bootstrap()
    router: Router = Router()
    prefill: Prefill = Prefill()
    decode: Decode = Decode()
    worker: Worker = Worker()
    restarts: Restarts = Restarts()
    logging: Logging = Logging()

    @property
    def unified(self) -> bool:
        return self.prefill.replicas == 0

    @property
    def served_model(self) -> str:
        """The model's name in the API."""
        return self.model.name or self.model.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def bootstrap_url(self) -> str:
        return f"http://{self.bootstrap.host}:{self.bootstrap.port}"

    @property
    def pool_pages(self) -> int:
        return -(-self.kv.pool_tokens // self.kv.page_size)
