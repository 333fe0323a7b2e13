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
Port = Annotated[int, Meta(ge=0, le=65535)]
Cores = list[list[NonNegative]]
"""For each replica, the cores it is pinned to; also its number of compute threads."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: unknown keys are refused."""


class Dtype(str, Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class WeightsFrom(str, Enum):
    FILES = "files"
    DUMMY = "dummy"
    """Random weights in the shape of config.json: for load tests."""


class TransferName(str, Enum):
    NIXL = "nixl"
    MOONCAKE = "mooncake"


class PolicyName(str, Enum):
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"


class LogLevel(str, Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Model(Section, frozen=True):
    path: Text
    """A Hugging Face folder, a .gguf file, or the demo model's name."""
    dtype: Dtype = Dtype.BFLOAT16
    """Of weights, activations and KV cache."""
    name: Text | None = None
    """What clients call it; by default the last part of `path`."""
    weights: WeightsFrom = WeightsFrom.FILES
    context_length: Positive | None = None
    """Shortens the model's own."""


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
    default_max_tokens: Positive = 2048
    """Where a request names no limit (and the context leaves so much)."""
    request_timeout_seconds: Seconds = 600.0
    max_body_bytes: Positive = 8 * 1024 * 1024
    max_choices: Positive = 128
    """Upper limit of prompts x n in one request."""


class Prefill(Section, frozen=True):
    replicas: NonNegative = 1
    """0: a unified cluster, decode workers prefill by themselves."""
    host: Text = "127.0.0.1"
    chunk_tokens: Positive = 512
    """Tokens computed in one step, over all sequences of the batch."""
    max_running: Positive = 64
    """Sequences that hold pages here: being computed, or being handed over."""
    cpus: Cores = []


class Decode(Section, frozen=True):
    replicas: Positive = 1
    host: Text = "127.0.0.1"
    chunk_tokens: Positive = 512
    """Unified only: prompt tokens computed beside the decodes of one step."""
    max_running: Positive = 64
    cpus: Cores = []


class Logging(Section, frozen=True):
    level: LogLevel = LogLevel.INFO
    json: bool = True
    """One JSON object per line; false: plain text, for terminals."""


class Topology(Section, frozen=True):
    """A whole cluster."""

    model: Model
    kv: KV = KV()
    bootstrap: Bootstrap = Bootstrap()
    router: Router = Router()
    prefill: Prefill = Prefill()
    decode: Decode = Decode()
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
