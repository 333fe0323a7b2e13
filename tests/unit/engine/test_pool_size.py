"""A pool sized by a fraction of memory: as large as it may be, and whoever can't have one is told why."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

from cluster.config import DEFAULT_MEMORY_FRACTION, DEFAULT_POOL_TOKENS, Dtype, Kernels
from cluster.errors import ConfigError
from engine.device_memory import CudaMemory, HostMemory, MemoryAccount, cgroup_room, full_is_refused
from engine.engine_config import EngineConfig
from engine.group import ThreadGroup, ThreadMeeting
from engine.pool_size import LargestStep, Room, fraction_of, least_of_all, pages_asked_for, room_left
from tests.unit.engine.tiny import MODELS, make_engine, make_model, prompts, run, sequence

MIB = 1 << 20
CPU = torch.device("cpu")


def config(**settings):
    sizes = {"page_size": 16, "max_running": 4, "chunk_tokens": 100}
    return EngineConfig(model_path="m", model_name="m", dtype=Dtype.FLOAT32, **sizes | settings)


@pytest.mark.parametrize(
    ("device", "settings", "fraction"),
    [
        ("cpu", {}, None),
        ("cpu", {"memory_fraction": 0.5}, 0.5),
        ("cpu", {"memory_fraction": 0.5, "pool_pages": 7}, 0.5),
        ("cuda", {}, DEFAULT_MEMORY_FRACTION),
        ("cuda", {"pool_pages": 7}, None),
        ("cuda", {"memory_fraction": 0.3, "pool_pages": 7}, 0.3),
    ],
)
def test_what_decides(device, settings, fraction):
    assert fraction_of(config(**settings), torch.device(device)) == fraction


def test_where_nothing_is_said_on_a_cpu_the_pool_has_its_usual_size():
    assert pages_asked_for(config()) * 16 == DEFAULT_POOL_TOKENS
    assert pages_asked_for(config(pool_pages=7)) == 7


class Memory:
    """1000 MiB, of which the model takes 300, and each computation 50 more."""

    total = 1000 * MIB

    def __init__(self):
        self.most = 0

    def free(self):
        return 650 * MIB

    def held(self):
        return 300 * MIB

    def watch(self):
        self.most = self.held()

    def peak(self):
        return self.most

    def graphs(self):
        return 20 * MIB


class Decoder:
    """Notes the step it is given."""

    def __init__(self, memory):
        self.memory = memory

    def forward(self, step):
        self.step = step
        self.memory.most = 350 * MIB


def room(fraction, page_bytes=MIB):
    memory = Memory()
    decoder = Decoder(memory)
    largest = LargestStep(config(), context=250, vocabulary=MIB // 128)
    return decoder, room_left(memory, fraction, page_bytes, decoder, largest)


def test_the_pool_is_what_the_fraction_leaves_beside_weights_and_two_of_the_largest_steps():
    decoder, found = room(0.8)
    assert found == Room(pages=399, work_space=2 * 50 * MIB + MIB)
    assert len(decoder.step.tokens) == 103
    assert decoder.step.positions[-1] == 249
    assert {page for span in decoder.step.spans for page in span.pages} == {0}


@pytest.mark.parametrize(("fraction", "page_bytes"), [(0.3, MIB), (0.8, 300 * MIB)])
def test_without_room_for_a_page_a_start_is_refused_with_what_is_wanted_and_what_there_is(fraction, page_bytes):
    message = r"kv.memory_fraction: 0\.. of 0\.98 GiB are .* take 0\.29 GiB, a step of 103 tokens 0\.10 GiB: no page"
    with pytest.raises(ConfigError, match=message):
        room(fraction, page_bytes)


def test_where_everything_went_adds_up():
    memory = Memory()
    memory.most = 370 * MIB
    use = MemoryAccount(memory, "cuda:0", weights=150 * MIB, pool=100 * MIB, work_space=0).use()
    assert (use.weights, use.pool, use.graphs, use.runtime) == (150 * MIB, 100 * MIB, 20 * MIB, 30 * MIB)
    assert (use.activations, use.free, use.total) == (70 * MIB, 650 * MIB, 1000 * MIB)


def test_the_smallest_rank_decides_for_all():
    meeting, found = ThreadMeeting(3), {}

    def settle(rank):
        found[rank] = least_of_all((900, 700, 800)[rank], ThreadGroup(meeting, rank), CPU)

    threads = [threading.Thread(target=settle, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 700, 1: 700, 2: 700}
    assert least_of_all(900, None, CPU) == 900


@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.TORCH])
def test_an_engine_that_sizes_its_own_pool_gives_the_same_tokens(kernels, tmp_path):
    make_model(MODELS["llama"]).save_pretrained(tmp_path)
    share = 64 * MIB / HostMemory().total
    engine = make_engine(tmp_path, kernels=kernels, memory_fraction=share)
    asked = [sequence(number, prompt, 5) for number, prompt in enumerate(prompts(40, 3, 17))]
    expected = run(make_engine(tmp_path, kernels=kernels), *asked)
    again = [sequence(number, prompt, 5) for number, prompt in enumerate(prompts(40, 3, 17))]
    assert run(engine, *again) == expected
    assert 8 * MIB < engine.pool_bytes < 64 * MIB
    assert engine.ledger.total + 1 == engine.pool_bytes // engine.page_bytes
    use = engine.memory.use()
    assert use.pool == engine.pool_bytes
    assert 0 < use.weights < use.total
    assert use.activations > 0


@pytest.mark.parametrize(("others", "outside"), [(0.0, 0.5), (40.0, 2.0)])
def test_of_a_gpu_torch_tells_its_own_and_the_driver_the_rest_but_not_other_processes(monkeypatch, others, outside):
    gib, reserved = 1 << 30, [8.0]
    segments = [{"total_size": 3 * gib, "segment_pool_id": (0, 7)}, {"total_size": 5 * gib, "segment_pool_id": (0, 0)}]
    driver = {
        "mem_get_info": lambda device: (int((80 - 0.5 - others - reserved[0]) * gib), 80 * gib),
        "memory_reserved": lambda device: int(reserved[0] * gib),
        "max_memory_reserved": lambda device: int(11 * gib),
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_snapshot": lambda: segments,
    }
    for name, function in driver.items():
        monkeypatch.setattr(torch.cuda, name, function)
    memory = CudaMemory(torch.device("cuda", 0))
    assert (memory.total, memory.held(), memory.graphs()) == (80 * gib, (8 + outside) * gib, 3 * gib)
    memory.watch()
    assert memory.peak() - memory.held() == 3 * gib
    assert memory.free() == (80 - 0.5 - others - 8) * gib


def test_what_a_step_took_for_a_moment_is_seen():
    memory = HostMemory()
    memory.watch()
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        for offset in range(0, 64 * MIB, mmap.PAGESIZE):
            mapping[offset] = 1
        held = memory.held()
    assert held > 0
    assert memory.peak() - memory.held() > 60 * MIB


V2 = {"memory.max": "800\n", "memory.current": "500\n", "memory.stat": "anon 1\ninactive_file 100\n"}
V1 = {"memory.limit_in_bytes": "800\n", "memory.usage_in_bytes": "700\n", "memory.stat": "total_inactive_file 50\n"}


@pytest.mark.parametrize(
    ("groups", "folders", "expected"),
    [
        ("0::/a/b\n", {"a": V2, "a/b": V2 | {"memory.max": "max\n"}}, [400]),
        ("0::/a/b\n", {"a": V2, "a/b": V2 | {"memory.max": "600\n"}}, [200, 400]),
        ("9:name=systemd:/\n4:memory:/x\n0::/\n", {"memory/x": V1}, [150]),
        ("4:memory:/not/seen/here\n", {"memory": V1}, [150]),
        ("0::/\n", {}, []),
    ],
)
def test_a_containers_limit_counts(tmp_path, groups, folders, expected):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for folder, files in folders.items():
        place = tmp_path / "sys" / "fs" / "cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name).write_text(text)
    assert cgroup_room(tmp_path) == expected
    assert HostMemory(tmp_path).free() <= min(expected, default=1 << 60)


def test_a_device_that_is_full_refuses_the_start_with_the_keys_to_turn():
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. If reserved memory is large, ..."
    told = r"full: CUDA .* has 1\.00 GiB free; lower kv\.memory_fraction or"
    with pytest.raises(ConfigError, match=told), full_is_refused():
        raise torch.OutOfMemoryError(words)
