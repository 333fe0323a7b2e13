"""What is said of RDMA devices before a transfer engine starts, and after."""

from __future__ import annotations

import os

import pytest

from cluster.config import KV, Network, TransferName
from cluster.errors import ConfigError
from kv_transfer.backends import open_backend, verbs
from kv_transfer.backends.environment import apply_network
from tests.unit.kv_transfer.world import Pool

RDMA = KV(network=Network.RDMA)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """The kernel's lists: mlx5_0 has two ports that are up, mlx5_1 one, mlx5_2 is down; nothing is open."""
    for folder, module in (("devices", "_DEVICES"), ("files", "_OPEN_FILES"), ("verbs", "_VERBS")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(verbs, module, tmp_path / folder)
    states = {"mlx5_0": ["4: ACTIVE", "4: ACTIVE"], "mlx5_1": ["4: ACTIVE"], "mlx5_2": ["1: DOWN"]}
    for number, (device, ports) in enumerate(states.items()):
        for port, state in enumerate(ports, start=1):
            folder = tmp_path / "devices" / device / "ports" / str(port)
            folder.mkdir(parents=True)
            (folder / "state").write_text(f"{state}\n")
        (tmp_path / "verbs" / f"uverbs{number}").mkdir()
        (tmp_path / "verbs" / f"uverbs{number}" / "ibdev").write_text(f"{device}\n")
    return tmp_path


def opens(kernel, *names: str) -> None:
    for number, name in enumerate(names):
        (kernel / "files" / str(number)).symlink_to(name)


@pytest.mark.parametrize(
    ("kv", "ports"),
    [
        (KV(), ("mlx5_0:1", "mlx5_0:2", "mlx5_1:1")),
        (RDMA, ("mlx5_0:1", "mlx5_0:2", "mlx5_1:1")),
        (KV(network=Network.RDMA, rdma_devices=["mlx5_1"]), ("mlx5_1:1",)),
        (KV(network=Network.TCP), ()),
    ],
)
def test_ports_that_are_up_and_asked_for_are_used(kernel, kv, ports):
    assert verbs.usable_ports(kv) == ports


@pytest.mark.parametrize("device", ["mlx5_2", "mlx4_0"])
def test_a_device_that_is_down_or_not_there_is_an_error_that_names_those_that_are_up(kernel, device):
    with pytest.raises(ConfigError, match=f"{device} is not up; up are: mlx5_0, mlx5_1"):
        verbs.usable_ports(KV(network=Network.RDMA, rdma_devices=[device]))


@pytest.mark.parametrize("transfer", list(TransferName))
def test_rdma_on_a_host_without_a_device_is_an_error_and_never_tcp(monkeypatch, tmp_path, transfer):
    monkeypatch.setattr(verbs, "_DEVICES", tmp_path / "none")
    assert verbs.usable_ports(KV()) == ()
    with pytest.raises(ConfigError, match="no RDMA device is up"):
        open_backend(KV(transfer=transfer, network=Network.RDMA), "agent", Pool(1).memory, "127.0.0.1")


def test_an_engine_that_has_opened_no_device_has_not_kept_its_word(kernel):
    opens(kernel, "/dev/null", "socket:[1234]")
    verbs.require_opened(KV())
    with pytest.raises(ConfigError, match="mooncake has opened no RDMA device"):
        verbs.require_opened(KV(transfer=TransferName.MOONCAKE, network=Network.RDMA))


def test_an_engine_that_has_opened_another_device_than_it_was_told_is_refused(kernel):
    opens(kernel, "/dev/infiniband/uverbs0", "/dev/infiniband/uverbs1", "/dev/infiniband/uverbs1")
    assert verbs.opened_devices() == ("mlx5_0", "mlx5_1")
    verbs.require_opened(RDMA)
    with pytest.raises(ConfigError, match="nixl has opened mlx5_0 too"):
        verbs.require_opened(KV(network=Network.RDMA, rdma_devices=["mlx5_1"]))


@pytest.mark.parametrize(
    ("kv", "ports", "expected"),
    [
        (KV(), ["mlx5_0:1"], {}),
        (RDMA, ["mlx5_0:1", "mlx5_1:1"], {"UCX_TLS": "^tcp", "UCX_NET_DEVICES": "mlx5_0:1,mlx5_1:1"}),
        (
            KV(network=Network.RDMA, rdma_devices=["mlx5_0", "mlx5_1"]),
            ["mlx5_0:1", "mlx5_1:1"],
            {"UCX_TLS": "^tcp", "UCX_NET_DEVICES": "mlx5_0:1,mlx5_1:1", "UCX_MAX_RMA_RAILS": "2"},
        ),
        (KV(network=Network.TCP), [], {"UCX_TLS": "^ib"}),
        (KV(transfer=TransferName.MOONCAKE), ["mlx5_0:1"], {}),
        (KV(transfer=TransferName.MOONCAKE, network=Network.TCP), [], {"MC_FORCE_TCP": "true"}),
    ],
)
def test_the_engine_is_told_of_the_network_unless_the_user_has_told_it(monkeypatch, kv, ports, expected):
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    apply_network(kv, ports)
    assert environment == expected
    environment.update(dict.fromkeys(expected, "mine"))
    apply_network(kv, ports)
    assert environment == dict.fromkeys(expected, "mine")
