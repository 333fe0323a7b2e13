"""A topology says which processes there are, and how they end."""

from cluster.config import Decode, Model, Prefill, Topology
from deploy.plan import processes, stop_order


def test_each_replica_is_a_process_that_knows_its_index():
    specs = processes(Topology(model=Model(path="m"), prefill=Prefill(replicas=2), decode=Decode(replicas=1)))
    assert [(spec.name, spec.module, spec.arguments) for spec in specs] == [
        ("bootstrap", "bootstrap", ()),
        ("prefill-0", "prefill_worker", ("--index", "0")),
        ("prefill-1", "prefill_worker", ("--index", "1")),
        ("decode-0", "decode_worker", ("--index", "0")),
        ("router", "router", ()),
    ]
    assert stop_order(specs) == [["router"], ["prefill-0", "prefill-1", "decode-0"], ["bootstrap"]]


def test_a_unified_cluster_has_no_prefill_process():
    specs = processes(Topology(model=Model(path="m"), prefill=Prefill(replicas=0)))
    assert [spec.name for spec in specs] == ["bootstrap", "decode-0", "router"]
