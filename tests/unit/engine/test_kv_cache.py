"""The pool's memory: where a page's bytes are, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigError
from cluster.layout import KVLayout
from engine.kv_cache import ALIGNMENT, KVCache

LAYOUT = KVLayout("model", "float32", page_size=4, layers=3, kv_heads=2, head_dim=8)


def test_a_page_is_one_aligned_range_of_bytes_with_all_layers():
    cache = KVCache(LAYOUT, 5, torch.device("cpu"))
    assert cache.address % ALIGNMENT == 0
    assert cache.nbytes == 5 * LAYOUT.page_bytes == cache.pool.numel() * 4
    for layer in range(3):
        cache.by_token(layer)[:, 2] = 7.0
    flat = cache.pool.view(5, -1)
    assert (flat[2] == 7.0).all()
    assert (flat[[0, 1, 3, 4]] == 0.0).all()


def test_both_views_show_the_same_token():
    cache = KVCache(LAYOUT, 5, torch.device("cpu"))
    cache.by_token(1)[0, 3, 2, 1] = torch.arange(8.0)
    assert cache.by_head(1)[0, 1, 3, 2].tolist() == list(range(8))


def test_clear_empties_the_named_pages_only():
    cache = KVCache(LAYOUT, 5, torch.device("cpu"))
    cache.pool.fill_(1.0)
    cache.clear([0, 3])
    assert cache.pool.amax((1, 2, 3, 4, 5)).tolist() == [0, 1, 1, 0, 1]


def test_a_pool_that_the_machine_has_no_memory_for_is_refused_with_what_fits():
    with pytest.raises(ConfigError, match=r"kv\.pool_tokens: .* GiB left: at most \d+ tokens fit"):
        KVCache(LAYOUT, 1 << 40, torch.device("cpu"))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_the_pool_asks_for_huge_pages():
    cache = KVCache(LAYOUT, 5, torch.device("cpu"))
    mapping = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := mapping.match(line):
            inside = int(found[1], 16) <= cache.address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("the pool is in no mapping of this process")
