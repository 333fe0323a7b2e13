"""A topology is read whole, and each mistake in one is answered with its key, its place and what was expected."""

import re

import pytest

from cluster.config import Dtype, Topology, TransferName
from cluster.errors import ConfigError
from cluster.topology import dump_topology, load_topology

SMALL = "model: {path: some-model}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(text: str) -> str:
        (tmp_path / "t.yaml").write_text(text)
        return "t.yaml"

    return write_file


def test_the_form_of_the_documentation_is_read(write):
    topology = load_topology(
        write(
            """
model:     {path: smollm2-135m-instruct, dtype: float32}
kv:        {page_size: 32, pool_tokens: 4096, transfer: mooncake}
bootstrap: {host: 127.0.0.1, port: 8998, lease_seconds: 4}
router:    {host: 127.0.0.1, port: 8000, policy: least_load}
prefill:   {replicas: 1, chunk_tokens: 256, cpus: [[0]]}
decode:    {replicas: 2, max_running: 64, cpus: [[0], [1, 2]]}
logging:
"""
        )
    )
    assert topology.model.dtype is Dtype.FLOAT32
    assert topology.kv.transfer is TransferName.MOONCAKE
    assert topology.pool_pages == 128
    assert topology.bootstrap.lease_seconds == 4.0
    assert topology.decode.cpus == [[0], [1, 2]]
    assert topology.logging == Topology(model=topology.model).logging
    assert topology.served_model == "smollm2-135m-instruct"


def test_what_is_dumped_is_read_back_as_the_same(write):
    topology = load_topology(write(SMALL + "decode: {cpus: [[1]]}\nbootstrap: {heartbeat_seconds: 0.5}"))
    assert load_topology(write(dump_topology(topology))) == topology


def test_set_reaches_every_key_and_the_last_one_wins(write):
    topology = load_topology(
        write(SMALL + "kv: {page_size: 8}"),
        [
            "model.dtype=float32",
            "router.port=1",
            "router.port=9000",
            "prefill.cpus=[[0], [1]]",
            "decode={replicas: 3}",
            "logging.json=false",
            "model.name=",
        ],
    )
    assert topology.model.dtype is Dtype.FLOAT32
    assert topology.router.port == 9000
    assert topology.prefill.cpus == [[0], [1]]
    assert topology.decode.replicas == 3
    assert not topology.logging.json
    assert topology.model.name is None
    assert topology.kv.page_size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.yaml: model.path: missing; expected text"),
        ("- a", "t.yaml:1: topology: expected one of the sections: model, kv, .*, found .*a"),
        ("model: {path: ''}", 't.yaml:1: model.path: expected text, found the text ""'),
        ("model: {path: 1}", "t.yaml:1: model.path: expected text, found 1"),
        ("model: {path: a}\nmodel: {path: b}", "t.yaml:2: model: given a second time, first at t.yaml:1"),
        ("model: {", "t.yaml:1: not valid YAML: "),
    ],
)
def test_a_mistake_in_the_file_is_pointed_at(write, text, message):
    with pytest.raises(ConfigError, match="^" + message):
        load_topology(write(text))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("machines: 3", "machines: unknown key; expected one of the sections: model, kv, bootstrap"),
        ("kv: 3", "kv: expected keys of kv: page_size, .*, found 3"),
        (
            "kv: {page_sise: 8}",
            r"kv.page_sise: unknown key; did you mean kv.page_size\? expected keys of kv: page_size",
        ),
        ("kv: {page_size: x}", 'kv.page_size: expected a whole number of at least 1, found the text "x"'),
        ("kv: {page_size: 0}", "kv.page_size: expected a whole number of at least 1, found 0"),
        ("kv: {page_size: '16'}", 'kv.page_size: expected a whole number of at least 1, found the text "16"'),
        ("kv: {page_size: 1, page_size: 2}", "kv.page_size: given a second time, first at t.yaml:3"),
        ("kv: {page_size: !!python/name:os.system }", "kv.page_size: not a value: "),
        ("kv: {page_size: 2026-13-45}", "kv.page_size: not a value: month"),
        ("kv: {page_size: 64, pool_tokens: 63}", "kv.pool_tokens: 63 tokens don't fill one page of 64"),
        (
            "decode: {scheduling: {policy: fastest}}",
            "decode.scheduling.policy: expected one of first_come, shortest_first, .*, found the text .fastest",
        ),
        (
            "decode: {scheduling: {conservativeness: 2}}",
            "decode.scheduling.conservativeness: .* from 0 to 1 or nothing, found 2",
        ),
        (
            "prefill: {scheduling: {conservativeness: 1}}",
            "prefill.scheduling.conservativeness: unknown key; expected keys of prefill.scheduling: policy, ageing",
        ),
        ("kv: {verify_digests: 1}", "kv.verify_digests: expected true or false, found 1"),
        ("kv: {rdma_devices: [mlx5_0]}", "kv.rdma_devices: only with kv.network=rdma, and that is auto"),
        ("kv: {transfer: tcp}", 'kv.transfer: expected one of nixl, mooncake, found the text "tcp"'),
        ("router: {port: 65536}", "router.port: expected a whole number from 0 to 65535, found 65536"),
        ("router: {port: }", "router.port: expected a whole number from 0 to 65535, found nothing"),
        ("router: {port: 8998}", "router.port: 8998 is bootstrap's port too"),
        ("router: {host: 0.0.0.0, port: 8998}", "router.port: 8998 is bootstrap's port too"),
        ("router: {request_timeout_seconds: 0}", "router.request_timeout_seconds: expected a number greater than 0"),
        ("router: {request_timeout_seconds: .nan}", "router.request_timeout_seconds: .* than 0, found nan"),
        (
            "bootstrap: {lease_seconds: 1}",
            r"bootstrap.lease_seconds: expected more than one heartbeat \(1 s\), found 1",
        ),
        ("prefill: {cpus: [[0], [-1]]}", r"prefill.cpus\[.*\]: expected a list, each entry a list, .* of at least 0"),
        (
            "ray: {decode: {resources: {decode: -1}}}",
            r"ray.decode.resources.*: expected a mapping .* number of at least 0",
        ),
        ("decode: {replicas: 2, cpus: [[0]]}", "decode.cpus: expected cores for each of 2 replicas, found 1"),
        (
            "decode: {tensor_parallel: 3, pipeline_parallel: 2, nodes: 4}",
            "decode.nodes: 6 ranks can't be as many on each of 4",
        ),
        ("decode: {replicas: 2, gpus: [[0]]}", "decode.gpus: expected GPUs for each of 2 replicas, found 1"),
        (
            "decode: {tensor_parallel: 2, gpus: [[0, 0]]}",
            r"decode.gpus\[0\]: expected a GPU of its own for each of 2 ranks, found \[0, 0\]",
        ),
        ("prefill: {gpus: [[0]]}\nlaunch: ray", "prefill.gpus: only with launch=local; ray gives workers their GPUs"),
        ("decode: {cpus: [[]]}", r"decode.cpus\[0\]: expected one or more different cores, found \[\]"),
        ("logging: {level: loud}", "logging.level: expected one of debug, info, warning, error"),
    ],
)
def test_a_mistake_in_a_section_is_pointed_at(write, section, message):
    with pytest.raises(ConfigError, match="^t.yaml:3: " + message):
        load_topology(write(SMALL + "\n" + section))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kv.page_size", "--set kv.page_size: expected KEY=VALUE"),
        ("kv.pagesize=8", "--set kv.pagesize=8: kv.pagesize: unknown key; did you mean kv.page_size? "),
        ("kv.page_size=big", "--set kv.page_size=big: kv.page_size: expected a whole number of at least 1, found "),
        ("kv.page_size.x=1", "--set kv.page_size.x=1: kv.page_size has no keys of its own: expected a whole number"),
        ("kv=3", "--set kv=3: kv: expected keys of kv: "),
        ("kv={page: 3}", "--set kv={page: 3}: kv.page: unknown key; did you mean kv.page_size? "),
        ("kv.page_size=[", "--set kv.page_size=[: not valid YAML: "),
        ("=1", "--set =1: : unknown key; expected one of the sections: "),
        ("decode.replicas=2", "--set decode.cpus=[[1]]: decode.cpus: expected cores for each of 2 replicas, found 1"),
    ],
)
def test_a_mistake_in_a_set_is_pointed_at(write, override, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        load_topology(write(SMALL), ["decode.cpus=[[1]]", override])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: the topology can't be read: No such file"):
        load_topology(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not a text file in UTF-8"):
        load_topology(tmp_path / "binary.yaml")
