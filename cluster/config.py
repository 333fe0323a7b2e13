"""The settings of a cluster, typed and frozen: one `Topology` per YAML file, read by every process.

`cluster.topology` turns YAML and `--set` into these; each field's comment is its documentation. Lengths are in tokens,
times in seconds. Only this package reads the environment.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from msgspec import Meta

from cluster.launch_config import Kubernetes, Ray
from cluster.section import (
    Cores,
    Delay,
    Fraction,
    Gpus,
    NonNegative,
    Port,
    Positive,
    Seconds,
    Section,
    Share,
    Text,
)
from cluster.shards import Grid

DEFAULT_POOL_TOKENS = 65536
DEFAULT_MEMORY_FRACTION = 0.9


class Dtype(str, Enum):
    AUTO = "auto"
    """bfloat16 where the device multiplies it in hardware, else float32."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class KVDtype(str, Enum):
    AUTO = "auto"
    """That of the activations, `model.dtype`."""
    FLOAT8 = "float8_e4m3fn"
    """Half of bfloat16's memory, and half as much to hand over; keys and values keep four of its eight bits. Not with
    the native kernels."""


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


class Attention(str, Enum):
    """Of torch's kernels; the native ones have their own."""

    AUTO = "auto"
    """flashinfer on a GPU where it is installed, else torch."""
    FLASHINFER = "flashinfer"
    """flashinfer's kernels: NVIDIA GPUs, bfloat16 and float16."""
    TORCH = "torch"
    """torch's own operators: any device."""


class Device(str, Enum):
    AUTO = "auto"
    """A GPU where torch finds one, else the CPU."""
    CPU = "cpu"
    CUDA = "cuda"


class Switch(str, Enum):
    AUTO = "auto"
    """Where it serves; says so in the log where it can't be had."""
    ALWAYS = "always"
    """A worker that can't have it does not start."""
    NEVER = "never"


class TransferName(str, Enum):
    NIXL = "nixl"
    MOONCAKE = "mooncake"


class Network(str, Enum):
    """What pages travel by from host to host. Within a host an engine may know a shorter way."""

    AUTO = "auto"
    """RDMA if a device is up, else TCP."""
    RDMA = "rdma"
    """RDMA; a worker that finds no device, or whose engine does not open it, does not start."""
    TCP = "tcp"
    """TCP, even where there are RDMA devices."""


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


class ClientCertificates(str, Enum):
    NONE = "none"
    """Whoever connects needs no certificate."""
    REQUIRED = "required"
    """Mutual TLS: whoever connects shows a certificate that `ca` has signed."""


class LauncherName(str, Enum):
    """Where the cluster's processes run, see `deploy.launchers`."""

    LOCAL = "local"
    """On this machine, as long as `baton up` runs."""
    RAY = "ray"
    """The workers on the nodes of a Ray cluster, bootstrap and router where `baton up` runs, and as long as it runs."""
    KUBERNETES = "kubernetes"
    """On the Kubernetes that kubectl reaches, until `baton down`."""


class Model(Section, frozen=True):
    path: Text
    """A Hugging Face folder, a .gguf file, or the demo model's name."""
    dtype: Dtype = Dtype.AUTO
    """Of weights and activations."""
    name: Text | None = None
    """What clients call it; by default the last part of `path`."""
    weights: WeightsFrom = WeightsFrom.FILES
    context_length: Positive | None = None
    """Shortens the model's own."""
    kernels: Kernels = Kernels.AUTO
    attention: Attention = Attention.AUTO
    graphs: Switch = Switch.AUTO
    """Decode steps as CUDA graphs, captured at the start for some batch sizes: the host launches a step by one command
    instead of one per kernel. auto: on a GPU, with flashinfer's attention and without tensor parallelism."""
    compile: bool = False
    """With torch's kernels: norms, rotation and activation go through torch.compile, for half a minute more at the
    start."""
    symmetric_memory: Switch = Switch.NEVER
    """Small sums over the ranks on one host go by memory that their GPUs share, in one kernel, and not by NCCL."""
    device: Device = Device.AUTO
    """Where workers compute; on GPUs, each rank has one. Which ones, `gpus` of the pools says, or the place where the
    cluster runs; a worker that is started by hand takes the first ones of its CUDA_VISIBLE_DEVICES."""


class KV(Section, frozen=True):
    page_size: Positive = 16
    pool_tokens: Positive | None = None
    """Capacity of one worker's pool. By default 65,536 on a CPU; on a GPU, what `memory_fraction` leaves."""
    memory_fraction: Fraction | None = None
    """How much of its device's memory a rank takes, weights and work space included; the pool is what is left, and as
    large on all ranks of a worker. Of a GPU it is a fraction of all its memory: 0.45 for each of two workers on one. On
    a CPU, of what the machine or its cgroup has available at the start. Where it is set, it decides, and not
    `pool_tokens`. By default 0.9 on a GPU, unless `pool_tokens` is set."""
    dtype: KVDtype = KVDtype.AUTO
    """The same in both pools: pages are handed over as they are."""
    transfer: TransferName = TransferName.NIXL
    network: Network = Network.AUTO
    rdma_devices: list[Text] = []
    """With `network: rdma`, the devices to use, by their names in /sys/class/infiniband (mlx5_0); by default all that
    are up, among which the engine chooses. Of several that are named here, NIXL divides each write among all."""
    verify_digests: bool = True
    """Decode checks each page's digest before it reads from it. Of pages in a GPU's memory the GPU computes them."""
    prefix_cache: bool = True
    """Pages of earlier requests serve prompts that begin alike: they are neither computed nor sent again."""
    write_timeout_seconds: Seconds = 15.0
    """A decode worker to which no write has ended for so long, while some are under way, is given up: the transfer
    engine is ended and started anew, and where it can't be (Mooncake), the engine process. It is killed, too, if a call
    into the transfer engine has not come back for so long. Engines tell of most faults by themselves, NIXL over TCP
    after 5 s, Mooncake after 10."""
    max_quarantine_share: Share = 0.5
    """Of a pool's pages, how many may wait for writers that are silent. A decode worker with more of them takes no new
    work, ends what it has and starts its engine process anew, with all its pages..."""
    max_quarantine_seconds: Seconds = 30.0
    """...unless they come back within so long."""


class Bootstrap(Section, frozen=True):
    host: Text = "127.0.0.1"
    port: Port = 8998
    heartbeat_seconds: Seconds = 1.0
    lease_seconds: Seconds = 3.0
    """A worker that is silent for so long gets no new work."""


class Tls(Section, frozen=True):
    """TLS of a server, and of those who connect to it. Off without a certificate; all files are PEM.

    security: {tls: {certificate: node.pem, key: node.key, ca: cluster-ca.pem, client_certificates: required}}
    """

    certificate: Text | None = None
    """File of the server's certificate and those between it and its authority; with it, the server speaks TLS only."""
    key: Text | None = None
    """File of its private key, without a passphrase; by default in the certificate's file."""
    ca: Text | None = None
    """File of the authorities that are trusted, by either side; by default, where we connect, the system's."""
    client_certificates: ClientCertificates = ClientCertificates.NONE
    check_names: bool = True
    """Who connects requires that the certificate names the host it asked for. false: any that `ca` has signed will
    do, where workers have addresses that nobody knows before."""

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


class Security(Section, frozen=True):
    """Who may speak to workers and bootstrap.

    security: {secret_file: /etc/baton/secret}
    """

    secret_file: Text | None = None
    """The cluster's secret, known to all of its processes: at least 16 characters on a line. Lines with # are
    comments. The first line is what this process proves, any of them is accepted: so a secret is changed without a
    stop. Read again when it changes."""
    secret_variable: Text = "BATON_CLUSTER_SECRET"
    """The environment variable with the secret, where no file is named."""
    open_probes: bool = True
    """/health, /ready, /live and /metrics of workers and bootstrap answer without proof of the secret, and so does
    bootstrap's /targets: the addresses of the workers, for Prometheus."""
    allow_insecure: bool = False
    """Lets processes listen on addresses that others can reach, without secret or API keys: on a network of your own
    only."""
    tls: Tls = Tls()
    """Between the processes: of bootstrap and workers, and of all that connect to them."""


class RouterLimits(Section, frozen=True):
    """What one router takes on; beyond it, requests get 429 with Retry-After.

    router: {limits: {choices: 256, queued_tokens: 65536, queue_seconds: 20}}
    """

    choices: Positive = 2048
    """Prompts x n of all requests between arrival and end."""
    queued_tokens: Positive = 1048576
    """Prompt tokens whose computing has not begun, over all workers."""
    queue_seconds: Seconds = 120.0
    """The longest wait for the first compute, as far as the present rate foretells it."""
    prompt_tokens: Positive | None = None
    """Of one prompt; by default as many as the model's context and the KV pool hold."""
    connections: Positive = 4096
    """Open at the same time; further ones are answered 429 and closed."""
    header_bytes: Annotated[int, Meta(ge=1024)] = 16384
    """Of the request line, and of any one header; there may be 128 headers."""
    body_seconds: Seconds = 30.0
    """How long a request's body may take to arrive."""
    idle_seconds: Seconds = 75.0
    """A connection on which no request has arrived, or no further one, for so long is closed."""
    stuck_seconds: Seconds = 60.0
    """A client that takes nothing of its stream for so long loses its connection, and its request is cancelled."""


class Recovery(Section, frozen=True):
    """When a request's attempt has failed: the next one, and the workers that are left alone meanwhile."""

    max_attempts: Positive = 64
    """Of one choice of a request, in all. One that brings down each worker it meets must not meet them all for ever."""
    max_attempts_without_progress: Positive = 8
    """In a row, none of which brought the client further than the first token that it gave. Not counted are those that
    say nothing against the request: its worker fell silent, or was lost before it had begun."""
    first_delay_seconds: Seconds = 0.1
    """The first failure is answered at once, a second in a row after so long, each further one after twice as long."""
    longest_delay_seconds: Seconds = 1.0
    """Also between two looks for a worker, while there is none: the request's own deadline ends the search."""
    absence_seconds: Delay = 30.0
    """A new request, too, waits for a pool whose workers are all away, up to so long after the last of them was there:
    they may be on their way back. After that, and where there never was one, it gets a 503 at once."""
    breaker_failures: Positive = 3
    """A worker that is blamed so often, and does nothing well in between, gets work only if there is no other."""
    breaker_seconds: Seconds = 2.0
    """For so long; then one attempt goes there to see. Doubles with each that fails, up to the next setting."""
    longest_breaker_seconds: Seconds = 30.0


class BreakEven(Section, frozen=True):
    """Prompts may be prefilled where they decode, see `router.break_even`."""

    enabled: bool = False
    """A request goes to a decode worker alone where that delays everybody less than handing over."""
    delay_weight: Annotated[float, Meta(ge=0)] = 1.0
    """What a second of longer steps for one who is reading counts, beside a second until a first token. Below 1: gaps
    may grow, within what the conservativeness of `decode.scheduling` allows, for shorter queues."""


class Router(Section, frozen=True):
    host: Text = "127.0.0.1"
    port: Port = 8000
    policy: PolicyName = PolicyName.LEAST_LOAD
    break_even: BreakEven = BreakEven()
    default_max_tokens: Positive = 8192
    """Where a request names no limit (and the context leaves so much). Pages are kept for as many tokens as answers
    take, not for as many as they may: see `decode.scheduling.commit_quantile`."""
    request_timeout_seconds: Seconds = 600.0
    drain_seconds: Seconds = 10.0
    """After SIGTERM: how long streams under way may take to finish. New requests get a 503 meanwhile."""
    max_body_bytes: Positive = 8 * 1024 * 1024
    max_choices: Positive = 128
    """Upper limit of prompts x n in one request."""
    event_ids: bool = True
    """A stream whose client names an X-Request-Id carries `id:` lines, from which the client can go on after a broken
    connection. False: for clients that name their requests and take every line of a stream for data."""
    recovery: Recovery = Recovery()
    limits: RouterLimits = RouterLimits()
    api_keys_file: Text | None = None
    """The keys that clients may show (Authorization: Bearer KEY), one per line; lines with # are comments. Read again
    when it changes. Without keys, everybody may ask."""
    api_keys_variable: Text = "BATON_API_KEYS"
    """The environment variable with the keys, one per line, where no file is named."""
    open_probes: bool = True
    """/health and /metrics answer without a key."""
    tls: Tls = Tls()
    """Towards clients."""


class Worker(Section, frozen=True):
    """Of each worker, in both pools."""

    drain_seconds: Seconds = 30.0
    """After SIGTERM or `baton drain`: how long requests under way may take to finish. What is left then goes back to
    its router, which goes on with it elsewhere."""
    stall_limit_seconds: Seconds = 120.0
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
    fill_steps: bool = True
    """A step that completes a prompt is filled up with a part of the next. False: it ends so much sooner, and with it
    the wait for a first token; worth it where a few dozen tokens keep the device busy, as on a CPU."""


class DecodeScheduling(Section, frozen=True):
    policy: SchedulingPolicy = SchedulingPolicy.FIRST_COME
    """Of the queue for pages; unified, of prompts too."""
    ageing_seconds: Seconds = 10.0
    """As in `prefill.scheduling`."""
    commit_quantile: Share = 0.9
    """A request enters with pages for its prompt and for as many tokens as this share of recent answers stayed below
    (never more than its max_tokens). One that grows longer than the pool allows goes on later, elsewhere or here, with
    the same tokens. 1: pages for max_tokens, always."""
    conservativeness: Share | None = None
    """How far a step's prompt tokens give way to its decodes. 0: `chunk_tokens` at any time; 1: a handful while others
    decode; between, see `engine.pacing`. By default 0 in a unified cluster, and 1 beside a prefill pool."""
    prefill_delay_seconds: Delay = 0.0
    """For so long new prompts may be held back while others decode, to be computed together."""
    ahead: Switch = Switch.AUTO
    """A step is launched before the host has read the tokens of the one before it. An answer that a stop token ends
    costs one token more than it has. auto: on a GPU, without tensor parallelism; a CPU has nothing to gain by it."""
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
    tensor_parallel: Positive = 1
    """Engine processes that each worker's model is spread over: its heads, MLPs and vocabulary, and with the heads the
    KV of each token. At most as many as the model has query heads. The pools need not have the same."""
    pipeline_parallel: Positive = 1
    """Stages that the model's layers are divided among, each of `tensor_parallel` engine processes; prompts go through
    them in chunks, one behind the other. At most as many as the model has layers. The pools need not have the same."""
    nodes: Positive = 1
    """Hosts that the ranks of each worker are spread over, as many on each: for a model that exceeds one host. What its
    ranks say to each other there goes over the network as it is, like the KV: on a network of your own only."""
    cpus: Cores = []
    gpus: Gpus = []
    scheduling: PrefillScheduling = PrefillScheduling()

    @property
    def grid(self) -> Grid:
        """Of each worker's ranks."""
        return Grid(self.tensor_parallel, self.pipeline_parallel)


class Decode(Section, frozen=True):
    replicas: Positive = 1
    host: Text = "127.0.0.1"
    chunk_tokens: Positive = 512
    """Unified only: prompt tokens computed beside the decodes of one step."""
    max_running: Positive = 64
    tensor_parallel: Positive = 1
    """As in `prefill`."""
    pipeline_parallel: Positive = 1
    """As in `prefill`."""
    nodes: Positive = 1
    """As in `prefill`."""
    cpus: Cores = []
    gpus: Gpus = []
    scheduling: DecodeScheduling = DecodeScheduling()

    @property
    def grid(self) -> Grid:
        """Of each worker's ranks."""
        return Grid(self.tensor_parallel, self.pipeline_parallel)


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
    security: Security = Security()
    launch: LauncherName = LauncherName.LOCAL
    """Where it runs."""
    ray: Ray = Ray()
    kubernetes: Kubernetes = Kubernetes()

    @property
    def unified(self) -> bool:
        return self.prefill.replicas == 0

    @property
    def served_model(self) -> str:
        """The model's name in the API."""
        return self.model.name or self.model.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def bootstrap_url(self) -> str:
        return f"{self.internal_scheme}://{self.bootstrap.host}:{self.bootstrap.port}"

    @property
    def internal_scheme(self) -> str:
        """Of the URLs of workers and bootstrap."""
        return self.security.tls.scheme

    @property
    def pool_pages(self) -> int:
        """Of one worker, unless a fraction of memory decides (`kv.memory_fraction`)."""
        return -(-(self.kv.pool_tokens or DEFAULT_POOL_TOKENS) // self.kv.page_size)
