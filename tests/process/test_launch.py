"""`baton` starts real processes (stand-ins for ours, see stand_ins/) and leaves none behind, whatever happens."""

import asyncio
import os
import signal
import socket

import pytest

from cluster.topology import load_topology
from tests.process.baton_command import PATIENCE, Baton

PROCESSES = {"bootstrap", "prefill-0", "decode-0", "decode-1", "router"}


@pytest.fixture
async def baton(tmp_path):
    command = Baton(tmp_path)
    yield command
    if command.process.returncode is None:
        command.process.kill()
        await command.ends()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_up_starts_all_and_a_signal_stops_all_in_order(baton, number):
    await baton.up()
    await baton.says("ready: tiny.gguf at http://127.0.0.1:")
    assert set(baton.left_over()) == PROCESSES

    baton.process.send_signal(number)
    assert await baton.ends() == 0
    assert baton.left_over() == []
    stopped = (baton.run_directory / "stopped").read_text().split()
    assert set(stopped) == PROCESSES
    assert (stopped[0], stopped[-1]) == ("router", "bootstrap")


async def test_without_a_terminal_each_phase_is_a_line(baton):
    await baton.up()
    await baton.says("ready: ")
    phases = [line.split()[2:] for line in baton.output.splitlines() if " s  " in line]
    assert phases[0] == ["bootstrap", "starting"]
    assert {name for name, phase in phases if phase == "ready"} == PROCESSES


async def test_a_worker_that_cannot_start_is_named_with_its_reason(baton):
    await baton.up(decode_1="crash")
    assert await baton.ends() == 1
    assert "error: decode-1 ended (exit code 1): the weights are made of cheese\n" in baton.output
    assert "stopped error=the weights are made of cheese" in baton.output
    assert "Traceback" not in baton.output
    assert baton.left_over() == []


async def test_what_dies_later_is_replaced_beside_the_others(baton):
    await baton.up(prefill_0="crash later")
    await baton.says("ready: ")
    for name, number, end in (
        ("prefill-0", signal.SIGUSR1, "prefill-0 ended (exit code 3)"),
        ("router", signal.SIGKILL, "router was killed (SIGKILL)"),
        ("bootstrap", signal.SIGKILL, "bootstrap was killed (SIGKILL)"),
    ):
        before = {each: baton.pid(each) for each in PROCESSES}
        os.kill(before[name], number)
        await baton.says(f"{end}; starting it anew now\n")
        await baton.successor(name, before[name])
        assert {each for each in PROCESSES if baton.pid(each) != before[each]} == {name}
    os.kill(baton.pid("decode-1"), signal.SIGTERM)
    await baton.says("decode-1 ended as it was asked to\n")
    assert set(baton.left_over()) == PROCESSES - {"decode-1"}
    baton.process.terminate()
    assert await baton.ends() == 0
    assert baton.left_over() == []
    log = (baton.run_directory / "router.log").read_text()
    assert log.count('"starting"') == 2, "what its former life wrote is still there"


async def test_what_dies_too_often_ends_the_cluster_with_its_reason(baton):
    await baton.up("restarts.most=1")
    await baton.says("ready: ")
    pid = baton.pid("router")
    os.kill(pid, signal.SIGKILL)
    os.kill(await baton.successor("router", pid), signal.SIGKILL)
    assert await baton.ends() == 1
    assert (
        "error: router: it has died 2 times within 300 s; the last time:\nrouter was killed (SIGKILL)" in baton.output
    )
    assert baton.left_over() == []


async def test_a_second_signal_kills_what_does_not_listen_and_its_children(baton):
    await baton.up(decode_0="deaf")
    await baton.says("ready: ")
    assert "decode-0.child" in baton.left_over()
    baton.process.terminate()
    await baton.says("stopping")
    baton.process.terminate()
    assert await baton.ends() == 0
    assert baton.left_over() == []


async def test_nothing_outlives_a_killed_launcher(baton):
    await baton.up(prefill_0="deaf")
    await baton.says("ready: ")
    baton.process.kill()
    await baton.ends()

    async def all_gone() -> None:
        while set(baton.left_over()) & PROCESSES:  # noqa: ASYNC110 - not our children: no event tells of their end
            await asyncio.sleep(0.01)

    await asyncio.wait_for(all_gone(), PATIENCE)
    # A grandchild answers for itself (ours do): this one does not.
    os.kill(baton.pid("prefill-0.child"), signal.SIGKILL)


async def test_a_port_in_use_is_said_before_anything_starts(baton):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        await baton.start("up", "t.yaml", "--log-dir", "run", "--set", f"router.port={port}")
        assert await baton.ends() == 2
    assert f"error: router.port: {port} is in use on 127.0.0.1 (by process {os.getpid()}, " in baton.output
    assert "--set router.port=PORT" in baton.output
    assert not baton.run_directory.exists()


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("model.path=nowhere", "error: model.path: there is no model 'nowhere'"),
        ("kv.page_sise=3", "error: --set kv.page_sise=3: kv.page_sise: unknown key; did you mean kv.page_size?"),
        ("router.host=192.0.2.1", "error: router.host: 192.0.2.1 is not an address of this machine"),
    ],
)
async def test_a_wrong_setting_is_one_plain_line(baton, setting, error):
    await baton.start("up", "t.yaml", "--set", setting)
    assert await baton.ends() == 2
    assert baton.output.startswith(error)
    assert len(baton.output.splitlines()) == 1


async def test_status_shows_the_workers_of_a_running_cluster(baton, tmp_path_factory):
    await baton.up()
    await baton.says("ready: ")
    other = Baton(tmp_path_factory.mktemp("other"))
    await other.start("status", "--topology", str(baton.run_directory / "topology.yaml"))
    assert await other.ends() == 0
    rows = [line.split() for line in other.output.splitlines()]
    assert [row[0] for row in rows] == ["worker", "prefill-0", "decode-0", "decode-1"]
    assert rows[1][3:] == ["ready", "2", "1", "3/8", "0", "7", "0.5", "s", "ago"]


async def test_status_of_nothing_is_one_plain_line(baton):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        await baton.start("status", "--url", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert await baton.ends() == 1
    assert baton.output.startswith("error: bootstrap at http://127.0.0.1:")
    assert "does not answer" in baton.output
    assert len(baton.output.splitlines()) == 1


async def test_demo_streams_an_answer_shows_its_timings_and_stops(baton):
    await baton.start("demo", "t.yaml", "--log-dir", "run")
    assert await baton.ends() == 0
    assert "Light scatters.\n" in baton.output
    assert "first token" in baton.output and "250.0 ms" in baton.output
    assert baton.left_over() == []


async def test_validate_prints_the_topology_with_its_defaults(baton):
    await baton.start("validate", "t.yaml", "--set", "kv.page_size=32")
    assert await baton.ends() == 0
    (baton.directory / "printed.yaml").write_text(baton.output)
    assert load_topology(baton.directory / "printed.yaml") == load_topology(
        baton.directory / "t.yaml", ["kv.page_size=32"]
    )


async def test_a_running_cluster_is_operated_by_other_commands(baton, tmp_path_factory):
    await baton.up(decode_3="crash")
    await baton.says("ready: ")
    topology = str(baton.run_directory / "topology.yaml")

    async def told(*arguments: str, code: int = 0) -> list[str]:
        command = Baton(tmp_path_factory.mktemp("command"))
        await command.start(*arguments, "--topology", topology)
        assert await command.ends() == code, command.output
        return command.output.splitlines()

    assert await told("scale", "decode=3") == ["starting decode-2", "decode-2 takes work"]
    failure = "\n".join(await told("scale", "decode=4", code=1))
    assert "error: decode-3 ended (exit code 1): the weights are made of cheese" in failure
    assert await told("logs", "decode-2", "--raw") == ['{"event": "starting"}']
    assert await told("drain", "decode-0") == ["decode-0 is draining", "decode-0 has ended"]
    watching = Baton(tmp_path_factory.mktemp("watching"))
    await watching.start("status", "--watch", "--topology", topology)
    await watching.says("decode-2")
    watching.process.send_signal(signal.SIGINT)
    assert await watching.ends() == 0
    assert [line.split()[0] for line in watching.output.splitlines()[:4]] == [
        "worker", "prefill-0", "decode-1", "decode-2",
    ]  # fmt: skip
    assert await told("down") == []
    assert await baton.ends() == 0
    assert baton.left_over() == []
    (refusal,) = await told("scale", "decode=1", code=1)
    assert "no `baton up` of this user on this machine has bootstrap's port" in refusal
