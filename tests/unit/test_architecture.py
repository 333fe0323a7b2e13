"""ARCHITECTURE.md tells the truth where a machine can check it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.state_tables import ARCHITECTURE, MACHINES, replaced, written

ROOT = Path(__file__).parents[2]


def test_the_state_tables_are_those_of_the_code():
    assert written() == replaced(written()), "run `make docs`"


def test_every_state_machine_is_in_it():
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("*/*_state.py")}
    assert {machine.__module__.replace(".", "/") + ".py" for machine in MACHINES} == files


def test_every_path_that_it_names_exists():
    named = set(re.findall(r"`([a-z_]+/[a-z_/]+(?:\.py|\.yaml|/))`", ARCHITECTURE.read_text()))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
