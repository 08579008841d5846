"""Stop strings: what ends a text and is never shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through except stop strings, also when they straddle pieces."""

    def __init__(self, stops: Sequence[str], shown: str = "") -> None:
        """Start after the text `shown`: a stop string that began there still stops."""
        self.stops = [s for s in stops if s]
        self.context = max(map(len, self.stops), default=1) - 1
        self.text = shown[len(shown) - min(len(shown), self.context) :]
        self.num_shown = len(self.text)

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return what can be shown and whether a stop string was completed."""
        before = len(self.text)
        self.text += text
        # A stop string ends in the new piece: one that was shown whole, before it was one, is text.
        starts = (self.text.find(s, max(0, before - len(s) + 1)) for s in self.stops)
        found = [i for i in starts if i >= 0]
        if found:
            return self._show(min(found)), True
        return self._show(len(self.text) - max(map(self._begun, self.stops), default=0)), False

    def finish(self) -> str:
        """Return the text held back because it might have become a stop string."""
        return self._show(len(self.text))

    def _begun(self, stop: str) -> int:
        """Return the length of the longest beginning of `stop`, but not all, that ends the text."""
        i = self.text.find(stop[0], max(0, len(self.text) - len(stop) + 1))
        while i >= 0 and not stop.startswith(self.text[i:]):
            i = self.text.find(stop[0], i + 1)
        return len(self.text) - i if i >= 0 else 0

    def _show(self, end: int) -> str:
        out = self.text[self.num_shown : end]
        end = max(end, self.num_shown)
        drop = max(0, end - self.context)
        self.text, self.num_shown = self.text[drop:], end - drop
        return out
