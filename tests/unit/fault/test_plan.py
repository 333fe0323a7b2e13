"""A plan of faults: the whole table, in an order that a seed decides."""

from itertools import product

from tests.fault.plan import OF_THE_HOUSE, OF_WORKERS, Fault, Kind, Lane, Moment, plan_faults

TABLE = {
    *(Fault(*each) for each in product((Lane.PREFILL, Lane.DECODE), OF_WORKERS, Moment)),
    *(Fault(Lane.HOUSE, *each) for each in product(OF_THE_HOUSE, Moment)),
}


def test_each_kind_comes_at_each_moment_to_each_pool():
    plan = plan_faults(7, len(TABLE))
    assert {fault for faults in plan.values() for fault in faults} == TABLE
    assert all(fault.lane is lane for lane, faults in plan.items() for fault in faults)


def test_a_seed_means_one_order():
    assert plan_faults(7, 300) == plan_faults(7, 300) != plan_faults(8, 300)
    assert sum(map(len, plan_faults(7, 300).values())) == 300


def test_a_plan_may_be_of_some_kinds_only():
    plan = plan_faults(7, 20, [Kind.CUT])
    assert {fault.kind for faults in plan.values() for fault in faults} == {Kind.CUT}
