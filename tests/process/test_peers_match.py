"""A match against a peer that is a real program, as stubborn as some are."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from bench.peers.match import MEMORY, level, run_match
from bench.peers.match_report import OUTPUT
from bench.peers.program import Program
from bench.peers.words import Words
from cluster.errors import LaunchError

SERVER = Path(__file__).parent / "stand_ins" / "peer.py"
PATIENCE = 20.0


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stand_in(mode):
    return Program(
        name="stand-in",
        environment=Path(sys.prefix),
        packages=["aiohttp"],
        variables={"MODE": mode},
        command=[sys.executable, str(SERVER), "PORT"],
        needs=[SERVER],
        model="tiny",
        options={},
        takes_text=True,
        says_done=False,
        stop_seconds=0.3,
    )


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_match_measures_each_round_and_leaves_no_process(tmp_path):
    words = Words(1000, {400: " in", 401: " it"})
    levels = [msgspec.structs.replace(level(2, 8, 4), warm_up_seconds=0.1, seconds=0.3)]
    told, pids = [], []
    ours = children()
    """Clusters of other tests may be up."""

    class Watched:
        """A program that remembers what it started."""

        program = stand_in("answers")
        card = program.card

        @contextmanager
        def serve(self, log_dir):
            with self.program.serve(log_dir) as endpoint:
                pids.extend(children() - ours)
                yield endpoint

    (standing,) = run_match([Watched()], levels, words, 2, 0, tmp_path, told.append)
    assert standing.name == "stand-in" and standing.streams == 2 and len(standing.rounds) == 2
    assert [one.errors for one in standing.rounds] == [[], []]
    assert standing.figures[OUTPUT].least > 0 and standing.figures[MEMORY].median > 0.01
    assert standing.figures["cpu_per_thousand_tokens"].median > 0
    assert sum("2 at a time" in line for line in told) == 2
    assert len(set(pids)) == 4 and not any(alive(pid) for pid in pids)


def test_a_peer_that_does_not_start_or_answer_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"stand-in ended with 3:\nno memory"), stand_in("fails").serve(tmp_path):
        pass
    with pytest.raises(LaunchError, match="stand-in does not answer: HTTP 500"):
        run_match([stand_in("refuses")], [level(1, 8, 4)], Words(1000, {400: " in"}), 1, 0, tmp_path, print)


def test_a_peer_does_not_outlive_a_killed_match(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from bench.peers.program import Program\n"
        "words = [sys.executable, sys.argv[1], 'PORT']\n"
        "peer = Program('peer', Path(sys.prefix), [], {'MODE': 'is alone'}, words, [], 'tiny', {})\n"
        "with peer.serve(Path(sys.argv[2])) as endpoint:\n"
        "    print(next(iter(endpoint.tree.resident_bytes())), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(SERVER), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    pid = int(killed.stdout.rpartition("/")[2])
    deadline = time.monotonic() + PATIENCE
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
