"""Products come in few sizes, because oneDNN keeps something for each."""

import torch

from engine.linear import EXACT_ROWS, rows_computed

CPU = torch.device("cpu")


def test_a_long_chunk_is_computed_in_one_of_few_sizes():
    computed = {rows: rows_computed(rows, CPU) for rows in range(1, 1025)}
    assert all(0 <= more - rows < 16 for rows, more in computed.items())
    assert len(set(computed.values())) < 100


def test_a_decode_batch_is_computed_as_it_is():
    assert [rows_computed(rows, CPU) for rows in range(1, EXACT_ROWS + 1)] == list(range(1, EXACT_ROWS + 1))


def test_other_devices_compute_what_is_wanted():
    assert rows_computed(500, torch.device("meta")) == 500
