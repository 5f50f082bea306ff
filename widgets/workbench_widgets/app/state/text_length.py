"""How long a text is, in characters and, about, in tokens; whether it fits a model and a link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.prompt import text_ids
from workbench_widgets.app.state.page_state import TEXT_LIMIT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = 20_000  # characters of which every token is counted
_PIECES = 5  # of a longer text, evenly spread, as long as this together


def about_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens of a text, by themselves; of a long one estimated from pieces of it. Raises BadPrompt."""
    if len(text) <= _WHOLE:
        return int(text_ids(text, tokenizer).shape[0])
    size = _WHOLE // _PIECES
    starts = [i * (len(text) - size) // (_PIECES - 1) for i in range(_PIECES)]
    counted = sum(int(text_ids(text[start : start + size], tokenizer).shape[0]) for start in starts)
    return _round(counted * len(text) / (size * _PIECES))


def _round(number: float) -> int:
    """As precise as an estimate is: two figures."""
    unit = int(10 ** max(0, len(str(int(number))) - 2))
    return int(number) // unit * unit


@dataclass(frozen=True)
class TextLength:
    """tokens: about how many; None where no tokenizer is known. positions: of the model that is to read them."""

    characters: int
    tokens: int | None = None
    positions: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the model has a position for every token, as far as is known."""
        return self.tokens is None or self.positions is None or self.tokens <= self.positions

    def line(self, *, in_link: bool) -> str:
        """What is said below the field. in_link: whether a link has to hold the text itself."""
        if not self.characters:
            return ""
        line = f"{self.characters:,} characters"
        if self.tokens is not None:
            line += f", about {self.tokens:,} tokens"
        if self.positions is not None and self.fits:
            line += f" of {self.positions:,}"
        elif self.tokens and self.positions is not None:
            first = _round(self.characters * self.positions / self.tokens)
            line += f": too long, the model has {self.positions:,} positions. About the first {first:,} characters fit"
        if in_link and self.characters > TEXT_LIMIT:
            line += f". Not in a link to this page, which holds {TEXT_LIMIT:,} characters"
        return line
