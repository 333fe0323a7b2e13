"""The yardstick of a handoff: a bare loop over a transfer engine really moves the bytes."""

import os

import pytest

from bench.handoff.bare import BareEnd, Start, measure_bare
from cluster.config import TransferName
from cluster.errors import LaunchError
from kv_transfer.backends import backend_environment

PAGE_BYTES = 65_536


@pytest.mark.parametrize("transfer", list(TransferName))
def test_each_repetition_writes_all_batches(transfer):
    environment = os.environ | backend_environment(transfer)
    end = Start(transfer, 16, PAGE_BYTES, ())
    # It raises unless the last repetition's pages are in the other process's memory.
    taken = measure_bare(end, end, [3, 2], 2, environment)
    assert len(taken) == 2 and all(0 < seconds < 10 for seconds in taken)


def test_an_end_that_dies_tells_its_last_words():
    with (
        pytest.raises(LaunchError, match="TypeError: 'str' object"),
        BareEnd(Start(TransferName.NIXL, 16, "wide", ()), dict(os.environ)),
    ):
        pass
