"""What can't be started is said before anything is."""

import socket

import msgspec
import pytest

from cluster.config import Bootstrap, Decode, Model, Prefill, Router, Security, Topology
from cluster.errors import ConfigError, ModelError
from deploy.preflight import prepare


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return Model(path=str(tmp_path))


def test_port_0_becomes_a_free_one_and_the_rest_stays(model):
    before = Topology(model=model, bootstrap=Bootstrap(port=0, lease_seconds=7), router=Router(port=0))
    after = prepare(before)
    assert after.bootstrap.port and after.router.port
    assert after.bootstrap.lease_seconds == 7
    assert after.model == model
    assert before.router.port == 0


def test_a_missing_model_is_said():
    with pytest.raises(ModelError, match="no model '/nowhere'"):
        prepare(Topology(model=Model(path="/nowhere")))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("192.0.2.1", r"bootstrap\.host: 192\.0\.2\.1 is not an address of this machine"),
        ("not a host", r"bootstrap\.host: 'not a host' is not an address"),
    ],
)
def test_a_host_that_is_not_ours_is_said(model, host, message):
    with pytest.raises(ConfigError, match=message):
        prepare(Topology(model=model, bootstrap=Bootstrap(host=host, port=0)))


def test_a_lingering_connection_of_a_former_server_is_no_obstacle(model):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
    accepted.close()  # closes first: the port stays in TIME_WAIT on the server's side
    client.close()
    assert prepare(Topology(model=model, bootstrap=Bootstrap(port=0), router=Router(port=port))).router.port == port


@pytest.mark.parametrize("section", ["bootstrap", "router", "prefill", "decode"])
def test_a_cluster_that_strangers_could_join_is_not_started(model, section):
    sections = {"bootstrap": Bootstrap(port=0), "router": Router(port=0), "prefill": Prefill(), "decode": Decode()}
    sections[section] = msgspec.structs.replace(sections[section], host="0.0.0.0")
    with pytest.raises(ConfigError, match=rf"{section}\.host: 0\.0\.0\.0 can be reached by other machines"):
        prepare(Topology(model=model, **sections))
    assert prepare(Topology(model=model, security=Security(allow_insecure=True), **sections)).router.port


def test_a_key_file_that_is_not_there_is_said_before_anything_starts(model, tmp_path):
    router = Router(port=0, api_keys_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"router\.api_keys_file: .*none can't be read"):
        prepare(Topology(model=model, bootstrap=Bootstrap(port=0), router=router))
