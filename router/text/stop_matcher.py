"""Stop strings: found across token boundaries, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string is complete; holds back what may be the beginning of one.

    The stop string that is complete first wins, of several that end together the longest: so the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: not empty strings."""
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The part of all text so far that is safe to show and was not shown. After a match: nothing."""
        if self.matched:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        cut = self._find(text)
        if cut is not None:
            self.matched = True
            self._held = ""
            return text[:cut]
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """At the end without a match: what was held back."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the winning stop string begins."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _partial(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
