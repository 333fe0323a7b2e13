"""What an engine process needs in its environment before it starts. Imports no torch: a control process calls it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

DEFAULTS: Mapping[str, str] = MappingProxyType({"GOMP_SPINCOUNT": "1000"})
"""torch's threads that wait for each other spin for microseconds, then sleep (the native kernels' own team does not
ask). On cores of their own that is as fast as spinning for long, which is libgomp's way; where anything else runs on
one of the cores (a router, a client), long spinning keeps away the very thread that is waited for. A decode step of
the demo model by torch's operators (bfloat16, batch 1) on two cores, in ms, alone and with a busy process on one of
them: 15 and 1,225 by default, 27 and 19 to 45 sleeping at once (OMP_WAIT_POLICY=passive), 17 and 31 with this."""


def engine_environment() -> dict[str, str]:
    """The defaults, unless the user has said how threads are to wait."""
    return {} if {"OMP_WAIT_POLICY", *DEFAULTS} & os.environ.keys() else dict(DEFAULTS)
