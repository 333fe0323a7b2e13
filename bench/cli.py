"""`python -m bench`: what there is to measure. The commands themselves are in `bench.commands`."""

from __future__ import annotations

import typer

from bench.commands.chatting import chat_command
from bench.commands.comparing import compare_command
from bench.commands.control_plane import control_plane_command
from bench.commands.engine import engine_command
from bench.commands.goodput import goodput_command
from bench.commands.gpu import gpu_command
from bench.commands.handoff import handoff_command
from bench.commands.idling import idle_command
from bench.commands.loading import load_command, memcpy_command
from bench.commands.peers import peers_command
from bench.commands.plotting import plot_command
from bench.commands.profiling import profile_decode_command, profile_prefill_command
from bench.commands.terminal import console
from cluster.errors import BatonError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("chat")(chat_command)
app.command("compare")(compare_command)
app.command("control-plane")(control_plane_command)
app.command("engine")(engine_command)
app.command("goodput")(goodput_command)
app.command("gpu")(gpu_command)
app.command("handoff")(handoff_command)
app.command("idle")(idle_command)
app.command("load")(load_command)
app.command("memcpy")(memcpy_command)
app.command("peers")(peers_command)
app.command("plot")(plot_command)
app.command("profile-decode")(profile_decode_command)
app.command("profile-prefill")(profile_prefill_command)


def main() -> None:
    """Plain words for what is a user's or an environment's fault; 1 is the exit code."""
    try:
        app()
    except BatonError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(1) from error
