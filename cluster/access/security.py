"""A process's part in the `security` section: what it shows to the others, and what it demands of them."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Callable

import aiohttp
from aiohttp import hdrs, web

from cluster.access.gate import PROBES, ProvingMiddleware, close_gate
from cluster.access.keys import KeyRing, KeySource, open_ring
from cluster.access.tls import client_context, server_context
from cluster.clock import Clock, MonotonicClock
from cluster.config import Router, Security
from cluster.errors import ConfigError

SHORTEST_SECRET = 16
"""In characters: who hears a proof may try secrets at leisure."""


class ClusterSecurity:
    """The cluster's secret and TLS, followed when their files change. Raises `ConfigError` for what can't be used."""

    def __init__(self, config: Security, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or MonotonicClock()
        self._secret: KeyRing | None = open_ring(_secret_source(config), self._clock)
        self.server_tls: ssl.SSLContext | None = server_context(config.tls, "security.tls")
        """Of a worker's or bootstrap's port."""
        self._client_tls = client_context(config.tls, "security.tls")

    def require_for(self, host: str, setting: str) -> None:
        """Raises `ConfigError` if `host`, the address of a worker or bootstrap, may be reached by strangers who would
        then be served. `setting` is the address's key."""
        if self._secret is None:
            _require_protection(
                host, setting, self._config, "a secret: set security.secret_file", self._config.secret_variable
            )

    def guard(self, app: web.Application, on_refused: Callable[[str], None]) -> None:
        """Lets only the cluster's own processes in, if there is a secret. Before the application starts."""
        if self._secret is not None:
            open_paths = PROBES if self._config.open_probes else frozenset[str]()
            close_gate(app, self._secret, open_paths, on_refused, self._clock)

    def session(self) -> aiohttp.ClientSession:
        """A session for what workers and bootstrap serve. The caller closes it. There is a link to each worker of the
        cluster in it, for as long as that lives: aiohttp's own limit is 100 connections."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._client_tls or True),
            middlewares=[] if self._secret is None else [ProvingMiddleware(self._secret)],
        )


def read_secret(config: Security) -> str | None:
    """The secret of the topology or of the environment, in all its lines, for a process that must be given it; None
    where there is none. Raises `ConfigError` for one that can't be used."""
    ring = open_ring(_secret_source(config), MonotonicClock())
    return None if ring is None else b"\n".join(ring.keys()).decode()


def open_api_keys(config: Router, security: Security, clock: Clock | None = None) -> KeyRing | None:
    """The keys that clients of the router may show; None where everybody may ask. Raises `ConfigError` for keys that
    can't be read, and where strangers would be served for want of keys."""
    source = KeySource("router.api_keys_file", config.api_keys_file, config.api_keys_variable)
    keys = open_ring(source, clock or MonotonicClock())
    if keys is None:
        means = "API keys: set router.api_keys_file"
        _require_protection(config.host, "router.host", security, means, config.api_keys_variable)
    return keys


def router_session(config: Router, security: Security) -> aiohttp.ClientSession:
    """A session of one who may ask the router. The caller closes it. Raises `ConfigError`."""
    keys = open_api_keys(config, security)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=client_context(config.tls, "router.tls") or True),
        headers={} if keys is None else {hdrs.AUTHORIZATION: f"Bearer {keys.keys()[0].decode()}"},
        timeout=aiohttp.ClientTimeout(total=None),
    )


def _secret_source(config: Security) -> KeySource:
    return KeySource("security.secret_file", config.secret_file, config.secret_variable, SHORTEST_SECRET)


def _require_protection(host: str, setting: str, config: Security, means: str, variable: str) -> None:
    """Raises `ConfigError` unless `host` is of this machine alone, or `security.allow_insecure` says that it is well
    so. `means` and the environment's `variable` are what else would help."""
    if config.allow_insecure or is_loopback(host):
        return
    raise ConfigError(
        f"{setting}: {host} can be reached by other machines, and whoever reaches it would be served. Give it {means}, "
        f"or the environment variable {variable}; or listen on 127.0.0.1; or, on a network of your own, set "
        "security.allow_insecure: true"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address. Of names, "localhost" alone is known to be so."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
