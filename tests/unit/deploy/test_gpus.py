"""Which GPUs the workers of one machine get: no two the same while there are enough, and each its own for long."""

import pytest

from cluster.config import KV, Decode, Device, Model, Prefill, Topology
from cluster.errors import ConfigError
from cluster.messages import Role
from deploy import places
from deploy.gpus import GpuDealer, deal_gpus, memory_note, share_memory, visible_gpus
from deploy.launchers.base import ProcessKind
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessSpec
from deploy.log_files import log_file
from deploy.places import open_place
from deploy.plan import processes, worker


def topology(device=Device.CUDA, **pools):
    return Topology(model=Model(path="m", device=device), **pools)


def dealt(dealer, *workers):
    return {name: dealer.deal(worker(Role(name.partition("-")[0]), int(name.partition("-")[2]))) for name in workers}


def test_gpus_are_dealt_out_over_the_ranks_in_order():
    dealer = GpuDealer(
        topology(prefill=Prefill(replicas=2), decode=Decode(replicas=1, tensor_parallel=2)), ["4", "5", "6", "7"]
    )
    assert dealt(dealer, "prefill-0", "prefill-1", "decode-0") == {
        "prefill-0": ("4",), "prefill-1": ("5",), "decode-0": ("6", "7"),
    }  # fmt: skip
    assert dealer.variables(worker(Role.DECODE, 0)) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert dealer.most_shared == 1


def test_more_workers_than_gpus_share_them_and_that_is_said():
    dealer = GpuDealer(topology(), ["0"])
    assert dealt(dealer, "prefill-0", "decode-0") == {"prefill-0": ("0",), "decode-0": ("0",)}
    assert dealer.story() == ["GPU 0: prefill-0, decode-0, who share it"]
    assert dealer.most_shared == 2


def test_a_newcomer_gets_what_the_fewest_have_and_keeps_it_until_it_ends():
    dealer = GpuDealer(topology(), ["0", "1", "2"])
    assert dealt(dealer, "decode-1", "decode-2") == {"decode-1": ("2",), "decode-2": ("0",)}
    dealer.take_back(["decode-0", "unknown"])
    assert dealt(dealer, "decode-2", "prefill-1") == {"decode-2": ("0",), "prefill-1": ("1",)}


def test_what_the_topology_says_is_done_and_others_keep_away_from_it():
    given = topology(prefill=Prefill(replicas=2), decode=Decode(gpus=[[0]]))
    dealer = GpuDealer(given, ["GPU-a", "GPU-b"])
    assert dealt(dealer, "prefill-0", "decode-0", "decode-1") == {
        "prefill-0": ("GPU-b",), "decode-0": ("GPU-a",), "decode-1": ("GPU-a",),
    }  # fmt: skip
    assert [dealer.variables(spec) for spec in processes(given) if spec.name in ("router", "bootstrap")] == [{}, {}]


@pytest.mark.parametrize(
    ("pools", "gpus", "message"),
    [
        ({}, [], "model.device: cuda, and this machine shows no NVIDIA GPU"),
        ({"decode": Decode(tensor_parallel=2)}, ["0"], "decode: a worker's 2 ranks want a GPU each, .* shows 1"),
        ({"prefill": Prefill(gpus=[[2]])}, ["0", "1"], r"prefill.gpus\[0\]: there is no GPU 2: .* shows 2, counted"),
    ],
)
def test_too_few_gpus_are_said_before_anything_starts(pools, gpus, message):
    with pytest.raises(ConfigError, match=message):
        deal_gpus(topology(**pools), gpus)


@pytest.mark.parametrize(
    ("kv", "gpus", "expected", "note"),
    [
        (KV(), ["0"], KV(memory_fraction=0.45), "each rank takes 45.0% of its GPU's memory"),
        (KV(), ["0", "1"], KV(), "each rank takes 90.0% of its GPU's memory"),
        (KV(memory_fraction=0.3), ["0"], KV(memory_fraction=0.3), "each rank takes 30.0%"),
        (KV(pool_tokens=4096), ["0"], KV(pool_tokens=4096), "a pool of 4,096 tokens"),
    ],
)
def test_who_shares_a_gpu_shares_its_memory_unless_the_topology_says_how(kv, gpus, expected, note):
    given = topology(kv=kv)
    shared = share_memory(given, GpuDealer(given, gpus))
    assert shared.kv == expected
    assert note in memory_note(shared)


def test_shares_that_are_more_than_a_gpu_are_refused_before_anything_starts():
    given = topology(kv=KV(memory_fraction=0.6))
    with pytest.raises(ConfigError, match=r"kv\.memory_fraction: 0\.6 for each of 2 ranks that share a GPU is more"):
        share_memory(given, GpuDealer(given, ["0"]))
    assert share_memory(given, GpuDealer(given, ["0", "1"])) == given


def test_whoever_starts_a_cluster_is_told_who_is_where_and_what_each_takes(monkeypatch):
    monkeypatch.setattr(places, "visible_gpus", lambda environment: ["3"])
    with open_place(topology()) as place:
        assert place.topology.kv.memory_fraction == 0.45
        assert place.notes == [
            "GPU 3: prefill-0, decode-0, who share it",
            "each rank takes 45.0% of its GPU's memory (kv.memory_fraction)",
        ]
    monkeypatch.setattr(places, "visible_gpus", lambda environment: [])
    with open_place(topology(Device.AUTO)) as place:
        assert (place.topology, list(place.notes)) == (topology(Device.AUTO), [])


def test_on_a_cpu_nothing_is_dealt():
    assert deal_gpus(topology(Device.CPU), ["0"]) is None
    assert deal_gpus(topology(Device.AUTO), []) is None
    assert deal_gpus(topology(Device.AUTO), ["0"]) is not None


class Driver:
    """libcuda, as `visible_gpus` knows it."""

    def __init__(self, gpus):
        self.gpus = gpus

    def cuInit(self, flags):  # noqa: N802
        return 0 if self.gpus else 100

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.gpus
        return 0


@pytest.mark.parametrize(
    ("gpus", "environment", "expected"),
    [
        (2, {}, ["0", "1"]),
        (2, {"CUDA_VISIBLE_DEVICES": "3, GPU-a"}, ["3", "GPU-a"]),
        (1, {"CUDA_VISIBLE_DEVICES": "3,99"}, ["3"]),
        (0, {}, []),
    ],
)
def test_a_users_own_choice_is_what_is_dealt_from(monkeypatch, gpus, environment, expected):
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(gpus))
    assert visible_gpus(environment) == expected


async def test_a_worker_sees_its_gpus_and_no_others(tmp_path):
    runner = LocalProcesses(tmp_path, gpus=GpuDealer(topology(), ["0", "1"]))
    show = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"
    await runner.start(ProcessSpec("decode-0", ProcessKind.DECODE, "timeit", ("-n1", "-r1", "-s", show)))
    await runner.next_exit()
    assert "sees 1\n" in log_file(tmp_path, "decode-0").read_text()
