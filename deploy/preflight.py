"""What can be known to go wrong before anything is started: ports that are taken, a model that is not there."""

from __future__ import annotations

import errno
import socket

import msgspec
import psutil

from cluster.access.security import ClusterSecurity, open_api_keys
from cluster.access.tls import server_context
from cluster.config import Topology
from cluster.errors import ConfigError
from cluster.model_files import resolve_model


def prepare(topology: Topology) -> Topology:
    """The topology with a free port wherever it says 0. Raises `ConfigError` for what can't be started here."""
    resolve_model(topology.model.path)
    bootstrap, router = topology.bootstrap, topology.router
    prepared = msgspec.structs.replace(
        topology,
        bootstrap=msgspec.structs.replace(bootstrap, port=_free_port("bootstrap", bootstrap.host, bootstrap.port)),
        router=msgspec.structs.replace(router, port=_free_port("router", router.host, router.port)),
    )
    _require_access(prepared)
    return prepared


def _require_access(topology: Topology) -> None:
    """Whether each process could read its keys and certificates, and listen where it should."""
    security = ClusterSecurity(topology.security)
    for section in ("bootstrap", "prefill", "decode"):
        security.require_for(getattr(topology, section).host, f"{section}.host")
    open_api_keys(topology.router, topology.security)
    server_context(topology.router.tls, "router.tls")


def _free_port(section: str, host: str, port: int) -> int:
    """`port`, or any free one for 0, after having listened on it for a moment."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server will do it: connections of a former process that still linger are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
            found: int = probe.getsockname()[1]
            return found
    except socket.gaierror as error:
        raise ConfigError(f"{section}.host: {host!r} is not an address: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(_why_not(section, host, port, error)) from error


def _why_not(section: str, host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{section}.port: {port} is in use on {host}{_user_of(port)}; "
            f"stop that, or choose another one: --set {section}.port=PORT (0: any free one)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{section}.host: {host} is not an address of this machine; choose another one: --set {section}.host=HOST"
        )
    return f"{section}.port: can't listen on {host}:{port}: {error.strerror}"


def _user_of(port: int) -> str:
    """Who listens there, as far as the system lets us see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" (by process {connection.pid}, {psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass  # a courtesy, not a need: without privileges others' processes are hidden
    return ""
