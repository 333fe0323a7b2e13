"""What a topology becomes on Ray: addresses that nodes reach, what each rank reserves, a secret that is in no file."""

from cluster.config import Bootstrap, Decode, Model, Router, Security, Topology
from cluster.launch_config import Ray, RayPool
from cluster.messages import Role
from cluster.topology import dump_topology, load_topology
from deploy.launchers.ray_topology import Need, needs_of, parcel_of, with_addresses

SECRET = "a secret of sufficient length"


def test_addresses_of_one_machine_give_way_but_for_the_router_and_those_that_were_chosen():
    topology = Topology(model=Model(path="m"), bootstrap=Bootstrap(host="0.0.0.0"), decode=Decode(host="node.example"))
    found = with_addresses(topology, "10.0.0.7")
    assert (found.bootstrap.host, found.prefill.host, found.decode.host) == ("10.0.0.7", "10.0.0.7", "node.example")
    assert found.router == Router() and found.model == topology.model
    assert with_addresses(found, "10.0.0.7") == found


def test_a_model_that_is_here_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    found = with_addresses(Topology(model=Model(path="weights")), "10.0.0.7")
    assert found.model.path == str(tmp_path / "weights")


def test_each_rank_reserves_what_its_pool_says():
    ray = Ray(decode=RayPool(cpus=2, gpus=1, resources={"decode": 0.5}), prefill=RayPool(cpus=0))
    needs = needs_of(Topology(model=Model(path="m"), ray=ray, decode=Decode(tensor_parallel=4)))
    assert needs[Role.DECODE] == Need({"CPU": 2, "GPU": 1, "decode": 0.5}, ranks=4)
    assert str(needs[Role.DECODE]) == "a node with 2 CPU and 1 GPU and 0.5 decode free, 4 times"
    assert needs[Role.PREFILL] == Need({}, ranks=1)


def test_a_worker_on_several_nodes_reserves_on_each_what_its_ranks_there_need():
    ray = Ray(decode=RayPool(cpus=2, gpus=1))
    needs = needs_of(Topology(model=Model(path="m"), ray=ray, decode=Decode(tensor_parallel=8, nodes=2)))
    assert needs[Role.DECODE].bundles == [{"CPU": 8, "GPU": 4}] * 2
    assert str(needs[Role.DECODE]) == "2 nodes with 8 CPU and 4 GPU free on each"
    assert Need({"CPU": 1}, ranks=3).bundles == [{"CPU": 1}] * 3


def test_the_nodes_get_the_secret_as_a_variable_and_the_topology_without_it(tmp_path):
    file = tmp_path / "secret"
    file.write_text(f"# ours\n{SECRET}\n{SECRET}, the old one\n")
    topology = Topology(model=Model(path="m"), security=Security(secret_file=str(file)))
    parcel = parcel_of(topology)
    assert parcel.environment == {"BATON_CLUSTER_SECRET": f"{SECRET}\n{SECRET}, the old one"}
    assert SECRET not in parcel.topology and str(file) not in parcel.topology
    (tmp_path / "t.yaml").write_text(parcel.topology)
    assert dump_topology(load_topology(tmp_path / "t.yaml")) == parcel.topology
