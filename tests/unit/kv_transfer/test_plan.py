"""Which pages go out when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ProtocolError
from cluster.messages import Grant
from kv_transfer.plan import Batch, WritePlan
from tests.unit.kv_transfer.world import fence


def test_full_pages_go_out_at_once_and_the_partial_one_at_the_end():
    plan = WritePlan(tokens=10, page_size=4)
    plan.grant(Grant(fence(), [7, 8, 9]))
    assert plan.next_batch() is None

    plan.computed([1], 3)
    assert plan.next_batch() is None, "a page that later tokens change must not go out"

    plan.computed([1, 2], 8)
    assert plan.next_batch() == Batch(0, (1, 2), (7, 8))
    assert plan.next_batch() is None
    assert not plan.complete

    plan.computed([1, 2, 3], 10)
    assert plan.next_batch() == Batch(2, (3,), (9,))
    assert plan.complete


def test_skipped_pages_are_not_sent():
    plan = WritePlan(tokens=10, page_size=4)
    plan.computed([1, 2, 3], 10)
    plan.grant(Grant(fence(), [9], skip_tokens=8))
    assert plan.next_batch() == Batch(0, (3,), (9,))
    assert plan.granted_pages == 1


def test_nothing_to_send_when_all_is_cached_over_there():
    plan = WritePlan(tokens=8, page_size=4)
    plan.grant(Grant(fence(), [], skip_tokens=8))
    assert plan.complete
    plan.computed([1, 2], 8)
    assert plan.next_batch() is None


@pytest.mark.parametrize(
    ("pages", "skip"), [([1, 2], 0), ([1, 2, 3, 4], 0), ([1, 2], 3), ([1], 4), ([], 16), ([1, 2, 2], 0), ([1, 2], -4)]
)
def test_a_grant_that_does_not_fit_is_refused(pages, skip):
    with pytest.raises(ProtocolError):
        WritePlan(tokens=10, page_size=4).grant(Grant(fence(), pages, skip))


@pytest.mark.parametrize(("pages", "tokens"), [([1, 2, 3], 11), ([1], 5), ([5, 2], 8), ([1], 2)])
def test_a_caller_that_contradicts_itself_is_told(pages, tokens):
    plan = WritePlan(tokens=10, page_size=4)
    plan.computed([1], 4)
    with pytest.raises(ValueError):
        plan.computed(pages, tokens)


@given(st.integers(1, 40), st.integers(1, 7), st.data())
def test_each_page_goes_out_once_and_in_order(tokens, page_size, data):
    total = -(-tokens // page_size)
    skipped = data.draw(st.integers(0, total))
    ours, theirs = list(range(100, 100 + total)), list(range(200 + skipped, 200 + total))
    plan = WritePlan(tokens, page_size)
    grant_at = data.draw(st.integers(0, tokens))
    cuts = sorted({*data.draw(st.lists(st.integers(1, tokens))), grant_at, tokens})
    sent = []
    for cut in cuts:
        if cut == grant_at:
            plan.grant(Grant(fence(), theirs, skipped * page_size))
        plan.computed(ours, cut)
        batch = plan.next_batch()
        if batch is not None:
            assert batch.first == len(sent)
            sent += zip(batch.sources, batch.targets, strict=True)
            assert all((source - 99) * page_size <= cut or cut == tokens for source in batch.sources)
    assert sent == list(zip(ours[skipped:], theirs, strict=True))
    assert plan.complete
