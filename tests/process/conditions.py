"""What surrounds the tests, as their environment says; `tests.rdma` sets both for its emulated machine."""

from __future__ import annotations

import os
from typing import Final

from cluster.config import Network

NETWORK: Final = Network(os.environ.get("BATON_TEST_NETWORK", Network.AUTO.value))
"""What transfers must go by."""

PACE: Final = float(os.environ.get("BATON_TEST_PACE", "1"))
"""By how much everything takes longer than on a computer; bounds are multiplied by it."""
