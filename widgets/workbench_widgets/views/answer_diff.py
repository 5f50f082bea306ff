"""The uncompressed and the compressed answer side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from workbench.errors import BadParameter
from workbench_widgets.views import pictures
from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.view import View
from workbench_widgets.views.wire import pack


class AnswerDiff(View):
    """Two answers as tokens: what they share is dimmed, the first token that differs is marked.

    Click or press Enter to set `selected` to (side, token index), side 0 being the left.
    """

    module: ClassVar[str] = "answer_diff.js"
    left: list[str]
    right: list[str]
    left_label: str = "Uncompressed"
    right_label: str = "Compressed"
    left_odds: bytes = b""  # float32 [tokens]
    right_odds: bytes = b""
    first_difference: int | None = None
    waiting: str = ""  # shown in place of a left answer that is still to come; nothing is compared until then
    selected: tuple[int, int] | None = None

    @classmethod
    def drawings(cls, fields: Mapping[str, Any]) -> Sequence[Drawing]:
        return pictures.answers(fields)

    @classmethod
    def data(
        cls,
        left: Sequence[str],
        right: Sequence[str],
        *,
        left_odds: ArrayLike = (),
        right_odds: ArrayLike = (),
    ) -> dict[str, object]:
        """Field values from two lists of decoded tokens and, for the tooltips, the probability each was given (0..1).

        The first difference is found here (None where the answers are equal); a shorter answer differs where it ends.
        """
        sides = {"left": [str(token) for token in left], "right": [str(token) for token in right]}
        odds = {"left_odds": np.asarray(left_odds, np.float32), "right_odds": np.asarray(right_odds, np.float32)}
        for name, tokens in sides.items():
            if odds[f"{name}_odds"].size not in (0, len(tokens)):
                raise BadParameter(
                    f"AnswerDiff: {len(tokens)} tokens but {odds[f'{name}_odds'].size} probabilities in {name}_odds"
                )
        pairs = enumerate(zip_longest(sides["left"], sides["right"]))
        first = next((i for i, (one, other) in pairs if one != other), None)
        return sides | {name: pack(values) for name, values in odds.items()} | {"first_difference": first}
