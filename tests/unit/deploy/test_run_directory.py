"""How commands find a `baton up`: by bootstrap's port, in a folder that only its user can enter."""

import stat
import tempfile

import pytest

from cluster.config import Model, Topology
from cluster.errors import LaunchError
from deploy.run_directory import announced, find_running, write_topology


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def run_directory(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    write_topology(directory, Topology(model=Model(path="m")))
    return directory


def test_it_is_found_by_its_port_as_long_as_it_runs(run_directory):
    with announced(8998, run_directory) as running:
        running.socket.touch()
        found = find_running(8998)
        assert found is not None and found.topology_file.read_text().startswith("model:")
        assert find_running(8999) is None
    assert find_running(8998) is None


def test_what_a_killed_one_left_behind_is_replaced(run_directory, tmp_path):
    killed = [announced(port, tmp_path / "gone") for port in (8997, 8998)]  # neither comes to its end
    for each in killed:
        each.__enter__().socket.touch()
    assert find_running(8998) is None, "its run directory is gone"
    with announced(8998, run_directory) as running:
        assert not running.socket.exists()
        assert running.topology_file.exists()
        assert [each.name for each in running.socket.parent.iterdir()] == ["8998"], "of the other, too, nothing is left"


def test_nobody_else_can_look_into_it_and_who_could_is_an_error(run_directory, folder):
    with announced(8998, run_directory) as running:
        own = running.socket.parent
        assert own.parent == folder and stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o755)
    with pytest.raises(LaunchError, match="must be a folder that only its owner"):
        find_running(8998)
