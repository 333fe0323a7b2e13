"""The runner of this machine, and the fake that other tests rely on."""

from pathlib import Path

import pytest

from cluster.errors import LaunchError
from deploy.launchers.base import ProcessKind
from deploy.launchers.fake import FakeProcesses
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessSpec
from tests.process.runner_conformance import *  # noqa: F403
from tests.process.runner_conformance import Stage


@pytest.fixture(params=["local", "fake"])
async def stage(request, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "stand_ins"))
    fake = FakeProcesses() if request.param == "fake" else None
    runner = fake or LocalProcesses(tmp_path)
    yield Stage(runner, fake)
    await runner.stop([status.name for status in runner.status()], grace_seconds=0)


async def test_what_cannot_be_started_is_a_launch_error(tmp_path):
    spec = ProcessSpec("a", ProcessKind.DECODE, "bystander", ())
    for runner in (LocalProcesses(tmp_path / "missing"), FakeProcesses(cannot_start=frozenset({"a"}))):
        with pytest.raises(LaunchError, match="a can't be started"):
            await runner.start(spec)
        assert runner.status() == []
