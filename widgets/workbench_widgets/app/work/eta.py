"""How long work will still take, from how long it took so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_TELLS_S = 3.0  # nothing is said of work that took less so far
_LEAST = 0.02  # the share that has to be done before anything can be said


@dataclass
class Remaining:
    """Of one stage at a time: a stage of another name, or one that goes back, begins anew."""

    stage: str = ""
    share: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def seconds(self, stage: str, share: float | None) -> float | None:
        """Seconds that a stage still takes at the pace it had; None where nothing can be said yet."""
        now = time.monotonic()
        if stage != self.stage or share is None or share < self.share:
            self.stage, self.share, self.began = stage, share or 0.0, now
            return None
        self.share = share
        spent = now - self.began
        if spent < _TELLS_S or share < _LEAST:
            return None
        return spent * (1 - share) / share


def in_words(seconds: float | None) -> str:
    """`about 40 s left`, `about 3 min left`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"
