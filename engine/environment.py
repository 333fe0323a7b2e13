"""What an engine process needs in its environment before it starts. Imports no torch: a control process calls it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

DEFAULTS: Mapping[str, str] = MappingProxyType({"OMP_WAIT_POLICY": "passive"})
"""Compute threads that wait for each other sleep and don't spin. On cores that are theirs alone they lose a little.
Where anything else runs on one of them (a router, a client, another worker), spinning threads keep away the very one
that they wait for: with a busy process on one of two cores, a decode step of the demo model took 1,225 ms spinning and
45 ms asleep."""


def engine_environment() -> dict[str, str]:
    """The defaults that the user has not set."""
    return {name: value for name, value in DEFAULTS.items() if name not in os.environ}
