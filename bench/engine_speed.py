"""The engine alone, without servers: how near it comes to what the machine can do. Measured by `engine.measure`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec

from bench.machine import Setting
from bench.report import Page, Table, number
from bench.targets import Target, at_least, targets_table
from cluster.engine_speed import EngineSpeed
from cluster.errors import LaunchError

PREFILL_SHARE = 0.5
"""Of the highest rate of products."""
DECODE_SHARE = 0.6
"""Of the speed at which the weights could be read."""


class EngineReport(msgspec.Struct, frozen=True):
    setting: Setting
    speeds: list[EngineSpeed]

    @property
    def page(self) -> Page:
        batches = sorted({batch for speed in self.speeds for batch in speed.decode_tokens_per_second})
        headers = ["", "products, GFLOP/s", "reading, GB/s", "prefill, tok/s", "of peak"]
        headers += [*(f"decode x{batch}, tok/s" for batch in batches), "of reading"]
        return Page("engine", "One engine beside the machine's peaks", [
            Table("Speed", headers, [_row(speed, batches) for speed in self.speeds]),
            targets_table([target for speed in self.speeds for target in _targets(speed)]),
        ], [f"kernels: {', '.join(sorted({speed.kernels for speed in self.speeds}))}"])  # fmt: skip


def measure_engines(
    dtypes: Sequence[str], threads: Sequence[int], kernels: str, tell: Callable[[str], None]
) -> list[EngineSpeed]:
    """One process for each; each is pinned to as many cores as it has threads. Raises `LaunchError`."""
    cores = sorted(os.sched_getaffinity(0))
    speeds = []
    for dtype in dtypes:
        for count in threads:
            speeds.append(_measure(dtype, count, kernels, set(cores[:count])))
            tell(f"{_name(speeds[-1])}: done")
    return speeds


def _measure(dtype: str, threads: int, kernels: str, cores: set[int]) -> EngineSpeed:
    command = [
        sys.executable,
        "-m",
        "engine.measure",
        "--dtype",
        dtype,
        "--threads",
        str(threads),
        "--kernels",
        kernels,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise LaunchError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=EngineSpeed)


def _row(speed: EngineSpeed, batches: Sequence[int]) -> list[str]:
    return [
        _name(speed),
        number(speed.product_flops_per_second / 1e9),
        number(speed.read_bytes_per_second / 1e9),
        number(speed.prefill_tokens_per_second),
        f"{speed.prefill_share_of_peak:.0%}",
        *(number(speed.decode_tokens_per_second.get(batch)) for batch in batches),
        f"{speed.decode_share_of_reading:.0%}",
    ]


def _targets(speed: EngineSpeed) -> list[Target]:
    return [
        at_least(f"prefill / product peak ({_name(speed)})", speed.prefill_share_of_peak, PREFILL_SHARE),
        at_least(f"decode / reading ({_name(speed)})", speed.decode_share_of_reading, DECODE_SHARE),
    ]


def _name(speed: EngineSpeed) -> str:
    return f"{speed.dtype}, {speed.threads} thread{'s' if speed.threads > 1 else ''}"
