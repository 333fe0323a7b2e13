"""Pictures of results, drawn from their JSON by matplotlib, which is an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Union

import msgspec

from bench.curves.curve import DecodeCurve, PrefillCurve
from bench.goodput.outcome import Outcome
from bench.goodput.report import GoodputReport
from cluster.errors import ConfigError

Drawable = Union[GoodputReport, PrefillCurve, DecodeCurve]

COLOURS = ("#1f6feb", "#d1642a", "#2d8a4e", "#8250df", "#9a6700", "#6e7781")
QUIET = "#6e7781"
FORMATS = (".svg", ".png")
_MILLI = 1e3


def read(path: Path) -> Drawable:
    """A result that can be drawn. Raises `ConfigError` for any other file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Drawable)  # type: ignore[no-any-return]
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: no result that can be drawn: {error}") from error


def draw(result: Drawable, path: Path) -> None:
    """Writes the picture; `path` ends in .svg or .png. Raises `ConfigError` without matplotlib."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: pictures are written as {' or '.join(FORMATS)}")
    matplotlib = _matplotlib()
    # Text stays text: smaller, and sharp in the reader's own font. Without a salt or a date, equal results give equal
    # files.
    style = {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9.5, "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False, "figure.facecolor": "white"}):
        figure = matplotlib.figure.Figure(figsize=(9.0, 3.7), layout="constrained")
        if isinstance(result, GoodputReport):
            _draw_goodput(figure, result)
        elif isinstance(result, PrefillCurve):
            _draw_prefill(figure, result)
        else:
            _draw_decode(figure, result)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)


def _draw_goodput(figure: Any, report: GoodputReport) -> None:
    """Latency over load; where a line crosses the dashed one, requests are late."""
    objective = report.conditions.objective
    left, right = figure.subplots(1, 2)
    _latencies(left, report, lambda one: one.ttft_p90_seconds, objective.first_token_seconds, "s")
    left.set_title("time to first token, p90")
    _latencies(right, report, lambda one: _scaled(one.worst_gap_p90_seconds), objective.gap_seconds * _MILLI, "ms")
    right.set_title("longest gap in an answer, p90")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[1]), frameon=False)


def _latencies(
    axes: Any, report: GoodputReport, value: Callable[[Outcome], float | None], limit: float, unit: str
) -> None:
    for curve, colour in zip(report.curves, COLOURS, strict=False):
        points = [(one.rate, found) for one in curve.outcomes if (found := value(one)) is not None]
        label = f"{curve.name}: goodput {curve.goodput:.2f} requests/s"
        _line(axes, points, colour, label)
        if curve.goodput:
            axes.axvline(curve.goodput, color=colour, linewidth=1, alpha=0.5)
    axes.axhline(limit, color=QUIET, linestyle="--", linewidth=1)
    axes.annotate(
        f"{limit:g} {unit}", (0.99, limit), xycoords=("axes fraction", "data"), color=QUIET, ha="right", va="bottom"
    )
    axes.set_yscale("log")
    _plain(axes.yaxis, 1, 2, 5)
    axes.set_xlabel("requests/s")
    axes.set_ylabel(unit)


def _draw_prefill(figure: Any, curve: PrefillCurve) -> None:
    """Time and rate over the prompt's length, one line for each (cached, prompts)."""
    left, right = figure.subplots(1, 2)
    kinds = sorted({(point.cached_tokens, point.prompts) for point in curve.points})
    for (cached, prompts), colour in zip(kinds, COLOURS, strict=False):
        points = [point for point in curve.points if (point.cached_tokens, point.prompts) == (cached, prompts)]
        label = ("one prompt" if prompts == 1 else f"{prompts} prompts at once") + (
            f" behind {cached:,} cached tokens" if cached else ""
        )
        times = [(point.new_tokens, point.first_token_seconds.median) for point in points]
        _line(left, times, colour, label)
        _line(right, [(tokens, tokens * prompts / seconds) for tokens, seconds in times], colour)
    figure.suptitle(f"One prefill worker alone, {curve.model}")
    left.set_title("seconds to the first token")
    left.set_yscale("log")
    _plain(left.yaxis, 1)
    right.set_title("prompt tokens per second")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        _plain(axes.xaxis)
        axes.set_xlabel("new tokens of a prompt")
    left.legend(frameon=False)


def _draw_decode(figure: Any, curve: DecodeCurve) -> None:
    """Time and rate over the batch, one line for each length of prompts."""
    left, right = figure.subplots(1, 2)
    prompts = sorted({point.prompt_tokens for point in curve.points})
    for prompt, colour in zip(prompts, COLOURS, strict=False):
        points = sorted(
            (point.batch, point.inter_token_seconds.median) for point in curve.points if point.prompt_tokens == prompt
        )
        label = f"prompts of {prompt:,} tokens"
        _line(left, [(batch, seconds * _MILLI) for batch, seconds in points], colour, label)
        _line(right, [(batch, batch / seconds) for batch, seconds in points], colour)
    figure.suptitle(f"One decode worker alone, {curve.model}")
    left.set_title("ms between tokens")
    right.set_title("output tokens per second")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        _plain(axes.xaxis)
        axes.set_xlabel("sequences in the batch")
    left.legend(frameon=False)


def _line(axes: Any, points: Sequence[tuple[float, float]], colour: str, label: str | None = None) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker="o", markersize=4, label=label)


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * _MILLI


def _plain(axis: Any, *steps: float) -> None:
    """1000, not 10^3. `steps` are what is labelled of a decade; without, whatever is labelled anyway."""
    ticker = _matplotlib().ticker
    if steps:
        axis.set_major_locator(ticker.LogLocator(subs=steps))
        axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))


def _matplotlib() -> ModuleType:
    """Without pyplot, whose figures are global."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ConfigError(
            f"pictures need matplotlib ({error}); install it with: make setup-bench, "
            "or pip install 'baton-serving[bench]'"
        ) from error
    found: ModuleType = matplotlib
    return found
