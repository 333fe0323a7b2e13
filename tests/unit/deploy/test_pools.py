"""Sizes are read and checked; who comes and who goes when a pool changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Model, Prefill, Topology
from cluster.errors import ConfigError
from cluster.messages import Role
from deploy.pools import change, parse_sizes, require_sizes

SPLIT = Topology(model=Model(path="m"))
UNIFIED = Topology(model=Model(path="m"), prefill=Prefill(replicas=0))


def test_several_pools_are_read_at_once():
    assert parse_sizes(["decode=4", "prefill=2"]) == {Role.DECODE: 4, Role.PREFILL: 2}


@pytest.mark.parametrize("word", ["decode", "decode=", "decode=-1", "decode=many", "router=2", "=3", "decode=1.5"])
def test_what_is_no_size_is_refused_with_the_form_of_one(word):
    with pytest.raises(ConfigError, match=f"^{word}: expected POOL=WORKERS, such as decode=4"):
        parse_sizes(["prefill=1", word])


def test_a_pool_has_one_size():
    with pytest.raises(ConfigError, match="decode=3: the decode pool is named twice"):
        parse_sizes(["decode=2", "decode=3"])


def test_a_pool_keeps_a_worker_and_a_unified_cluster_has_no_prefill_pool():
    require_sizes(SPLIT, {Role.PREFILL: 1, Role.DECODE: 9})
    require_sizes(UNIFIED, {Role.PREFILL: 0, Role.DECODE: 2})
    for topology, role, size, problem in (
        (SPLIT, Role.PREFILL, 0, "the least is 1"),
        (SPLIT, Role.DECODE, 0, "the least is 1"),
        (UNIFIED, Role.DECODE, 0, "the least is 1"),
        (UNIFIED, Role.PREFILL, 1, "prefill by themselves"),
    ):
        with pytest.raises(ConfigError, match=problem):
            require_sizes(topology, {role: size})


def test_new_workers_take_the_first_free_indices_and_the_youngest_go_first():
    assert change(Role.DECODE, ["decode-0", "decode-2"], [], 4) == ([1, 3], [])
    assert change(Role.DECODE, ["decode-0", "decode-2", "decode-1"], [], 1) == ([], ["decode-1", "decode-2"])
    assert change(Role.DECODE, ["decode-0"], ["decode-0", "decode-1"], 2) == ([2], []), "decode-1 still drains"


@given(st.lists(st.integers(0, 9), unique=True), st.sets(st.integers(0, 9)), st.integers(0, 12))
def test_a_change_leads_to_the_size_and_never_doubles_a_name(present, draining, size):
    names = [f"prefill-{index}" for index in present]
    taken = {*names, *(f"prefill-{index}" for index in draining)}
    start, retire = change(Role.PREFILL, names, sorted(taken), size)
    started = [f"prefill-{index}" for index in start]
    assert len(set(names) - set(retire)) + len(started) == size
    assert not taken & set(started) and len(set(started)) == len(started)
    assert retire == list(reversed(names[size:])) and not (start and retire)
