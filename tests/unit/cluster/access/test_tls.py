"""Real certificates, real handshakes: who may connect to whom, and what is said of files that don't do."""

from __future__ import annotations

import asyncio
import shutil
import subprocess

import aiohttp
import pytest
from aiohttp import web

from cluster.access.tls import client_context, server_context
from cluster.config import ClientCertificates, Tls
from cluster.errors import ConfigError
from cluster.http_server import HttpServer
from tests.certificates import Authority

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with the openssl program")

REQUIRED = ClientCertificates.REQUIRED


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def node(authority):
    return authority.sign("node")


async def ask(server: Tls, client: Tls) -> str:
    """What a client with its settings gets from a server with its own."""

    async def hello(request):
        return web.Response(text=request.scheme)

    app = web.Application()
    app.router.add_get("/", hello)
    port = HttpServer(app, shutdown_seconds=0.1, tls=server_context(server, "security.tls"))
    url = await port.start("127.0.0.1", 0, "")
    connector = aiohttp.TCPConnector(ssl=client_context(client, "security.tls") or True)
    try:
        async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
            return await response.text()
    finally:
        await port.stop()


async def test_those_whom_one_authority_has_signed_speak_to_each_other(authority, node):
    mutual = Tls(certificate=node.certificate, key=node.key, ca=authority.certificate, client_certificates=REQUIRED)
    assert await ask(mutual, mutual) == "https"


async def test_a_client_of_another_authority_or_of_none_is_not_heard(authority, node, tmp_path):
    server = Tls(certificate=node.certificate, key=node.key, ca=authority.certificate, client_certificates=REQUIRED)
    stranger = Authority(tmp_path, "elsewhere").sign("stranger")
    foreign = Tls(
        certificate=stranger.certificate, key=stranger.key, ca=authority.certificate, client_certificates=REQUIRED
    )
    silent = Tls(certificate=node.certificate, ca=authority.certificate)
    for client in (foreign, silent):
        with pytest.raises(aiohttp.ClientError):
            await ask(server, client)


async def test_a_server_of_another_authority_or_another_name_is_not_trusted(authority, node, tmp_path):
    client = Tls(certificate=node.certificate, key=node.key, ca=authority.certificate)
    stranger = Authority(tmp_path, "elsewhere").sign("stranger")
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await ask(Tls(certificate=stranger.certificate, key=stranger.key), client)
    elsewhere = authority.sign("elsewhere", "DNS:worker-7.example")
    server = Tls(certificate=elsewhere.certificate, key=elsewhere.key)
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await ask(server, client)
    assert await ask(server, Tls(certificate=node.certificate, ca=authority.certificate, check_names=False)) == "https"


async def test_renewed_files_are_used_for_the_next_connection_on_both_sides(authority, node, tmp_path):
    """All of the server, the client and their authority change while both run; in between, a broken renewal."""
    files = {name: tmp_path / name for name in ("node.pem", "node.key", "ca.pem")}

    def put(name: str, source: str) -> None:
        shutil.copy(source, tmp_path / "new")
        (tmp_path / "new").replace(files[name])

    for name, source in zip(files, (node.certificate, node.key, authority.certificate), strict=True):
        put(name, source)
    mutual = Tls(*(str(file) for file in files.values()), client_certificates=REQUIRED)
    (tmp_path / "renewed").mkdir()
    new_authority = Authority(tmp_path / "renewed")
    new_node = new_authority.sign("node")

    async def tell(reader, writer):
        writer.write(_serial(writer).encode() + b"\n")
        writer.close()

    server = await asyncio.start_server(tell, "127.0.0.1", 0, ssl=server_context(mutual, "security.tls"))
    context = client_context(mutual, "security.tls")

    async def serials() -> tuple[str, str]:
        """Of the server's certificate and of the client's, as the other side sees them."""
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=context)
        try:
            return _serial(writer), (await reader.readline()).decode().strip()
        finally:
            writer.close()

    try:
        before = await serials()
        put("node.pem", new_node.certificate)
        assert await serials() == before, "without its key it is of no use"
        put("ca.pem", new_authority.certificate)
        put("node.key", new_node.key)
        after = await serials()
        assert after[0] == after[1] != before[0] == before[1]
    finally:
        server.close()


def _serial(writer: asyncio.StreamWriter) -> str:
    return writer.get_extra_info("peercert")["serialNumber"]


def test_without_a_certificate_there_is_no_tls_and_keys_that_would_do_nothing_are_an_error(authority):
    assert server_context(Tls(), "router.tls") is None and client_context(Tls(), "router.tls") is None
    for useless in (Tls(ca=authority.certificate), Tls(key="x"), Tls(client_certificates=REQUIRED)):
        with pytest.raises(ConfigError, match=r"router\.tls\.certificate: missing"):
            server_context(useless, "router.tls")


def test_files_that_don_t_do_are_told_by_setting_and_name(authority, node, tmp_path):
    other = authority.sign("other")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    sealed = tmp_path / "sealed.key"
    command = ["openssl", "ec", "-in", node.key, "-aes128", "-passout", "pass:secret", "-out", str(sealed)]
    subprocess.run(command, check=True, capture_output=True)
    for tls, message in (
        (Tls(certificate="/nowhere.pem"), r"security\.tls\.certificate: /nowhere\.pem can't be read: No such file"),
        (Tls(certificate=node.certificate, key="/none.key"), r"security\.tls\.key: /none\.key can't be read"),
        (Tls(certificate=node.certificate, key=other.key), r"belong to each other"),
        (Tls(certificate=str(text)), r"text\.pem.* don't do"),
        (Tls(certificate=node.certificate, key=str(sealed)), r"without a passphrase"),
        (Tls(certificate=node.certificate, key=node.key, client_certificates=REQUIRED), r"security\.tls\.ca: missing"),
        (
            Tls(certificate=node.certificate, key=node.key, ca=str(text), client_certificates=REQUIRED),
            r"security\.tls\.ca: .*text\.pem has no certificate",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            server_context(tls, "security.tls")
