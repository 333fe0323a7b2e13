"""Contenders have the same means."""

import pytest

from bench.contenders import chunked, split, unified_shapes
from cluster.topology import load_topology


def means(contender):
    """(cores in use, bytes of KV memory in tokens) of a whole cluster."""
    topology = load_topology(contender.topology, contender.settings)
    workers = topology.prefill.replicas + topology.decode.replicas
    cores = [
        core
        for pool in (topology.prefill, topology.decode)
        for replica in pool.cpus[: pool.replicas]
        for core in replica
    ]
    return sorted(cores), workers * topology.kv.pool_tokens


@pytest.mark.parametrize("shape", unified_shapes(), ids=lambda shape: shape.label)
def test_unified_clusters_have_the_cores_and_the_memory_of_the_split_one(shape):
    assert means(shape) == means(split()) == ([0, 1], 131_072)


def test_a_setting_and_a_chunk_size_reach_the_topology():
    for shape in unified_shapes(["kv.page_size=32"]):
        chosen = chunked(shape, 96)
        topology = load_topology(chosen.topology, chosen.settings)
        assert (topology.unified, topology.kv.page_size, topology.decode.chunk_tokens) == (True, 32, 96)
        assert chosen.name == f"{shape.name}/96" and "/" not in chosen.label
