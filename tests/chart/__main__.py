"""`python -m tests.chart [PYTEST ARGUMENTS]`: the chart as Helm and Kubernetes' schemas see it.

Exits with pytest's status; with 0 and a word where the tools can't be had.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.chart.tools import Lacking, tools

TESTS = ("tests/chart",)
OPTIONS = ("-v", "-m", "chart", "-p", "no:cacheprovider")


def main(arguments: list[str]) -> int:
    try:
        environment = {**os.environ, "BATON_TEST_CHART": str(tools())}
    except Lacking as lacking:
        print(f"The tests of the chart lack {lacking}: none was run.")
        return 0
    command = [sys.executable, "-m", "pytest", *OPTIONS, *(arguments or TESTS)]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
