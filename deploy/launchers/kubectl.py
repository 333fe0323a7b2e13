"""Kubernetes as `kubectl` reaches it.

The program rather than HTTP: it knows every way to prove who one is (certificates, tokens, the plug-ins of the clouds),
honours KUBECONFIG, proxies and contexts as its user has them set, and its complaints are those that operators know.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncGenerator

from cluster.errors import LaunchError

_LINE_BYTES = 2**20


class Kubectl:
    """One namespace of one Kubernetes."""

    def __init__(self, namespace: str, context: str | None) -> None:
        """`context`: of the user's kubeconfig; None: the current one."""
        self._common = [f"--namespace={namespace}", *([f"--context={context}"] if context else [])]

    async def run(self, *arguments: str, given: str = "") -> bytes:
        """What it prints; `given` is its input. Raises `LaunchError` with its complaint."""
        process = await self._start(*arguments, stdin=PIPE, stderr=PIPE)
        output, complaint = await process.communicate(given.encode())
        if process.returncode != 0:
            raise LaunchError(f"kubectl {arguments[0]}: {complaint.decode(errors='replace').strip()}")
        return output

    async def lines(self, *arguments: str) -> AsyncGenerator[str, None]:
        """What it prints, line by line as it comes, until it ends or nobody listens. Raises `LaunchError`."""
        process = await self._start(*arguments, stdin=DEVNULL, stderr=STDOUT)
        assert process.stdout is not None, "it is a pipe"
        last = ""
        try:
            async for line in process.stdout:
                last = line.decode(errors="replace").rstrip("\n")
                yield last
            if await process.wait() != 0:
                raise LaunchError(f"kubectl {arguments[0]}: {last}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self, *arguments: str, stdin: int, stderr: int) -> Process:
        try:
            return await asyncio.create_subprocess_exec(
                "kubectl", *self._common, *arguments, stdin=stdin, stdout=PIPE, stderr=stderr, limit=_LINE_BYTES
            )
        except FileNotFoundError as error:
            raise LaunchError("kubectl is not installed, or not in PATH; it is what speaks to Kubernetes") from error
