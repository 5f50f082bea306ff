"""What methods have in common that choose some of a prompt's tokens and read only those again."""

from __future__ import annotations

from workbench.kv.base import KVMethod
from workbench.registry import param

_NO_NUMBER = "the abstract has no number for it"


class KeyContext(KVMethod):
    """Base of methods that read a key context: the prompt's two ends, and what is chosen of what lies between."""

    query: int = param(
        32, ge=1, le=1024, unit="tokens", help="at the prompt's end: stay, and stand for a question", own=_NO_NUMBER
    )
    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay", own=_NO_NUMBER)
    chunk: int = param(
        256,
        ge=1,
        le=4096,
        unit="tokens",
        help="how many are read at once, at most",
        own="how the prompt is read, not what stays: the budget holds while it is",
    )

    def ends(self, total: int, slide: int) -> tuple[int, int]:
        """How many tokens stay at the beginning and at the end of `total`; layers that slide need the last `slide`."""
        return min(self.sinks, (total - slide) // 4), max(slide, min(self.query, total // 2), 1)
