"""The prompt as running text, each token shaded by what survives of it, or by any number that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from workbench.errors import BadParameter
from workbench_widgets.views import pictures
from workbench_widgets.views.colour_levels import Scale, scale_values
from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.view import View
from workbench_widgets.views.wire import pack


class TokenText(View):
    """Prompt tokens shaded by the share of layers and heads that keep them, by the precision one head keeps them at, or
    by a number each, as the attention they receive.

    Click or press Enter to set `selected` to a token's position (None: nothing selected).
    """

    module: ClassVar[str] = "token_text.js"
    tokens: list[str]
    levels: bytes = b""  # float32 [n] shares in 0..1, or any values where there are knots; or uint8 [n] tiers
    knots: bytes = b""  # float32 [255]: the value of each level of the colour scale
    what: str = ""  # what the values are
    tiers: list[str]
    groups: int = 0
    label: str = "Prompt"
    rows: int = 14
    selected: int | None = None

    @classmethod
    def drawings(cls, fields: Mapping[str, Any]) -> Sequence[Drawing]:
        return [pictures.tokens(fields)]

    @classmethod
    def data(
        cls,
        tokens: Sequence[str],
        shares: ArrayLike | None = None,
        *,
        tier_of: ArrayLike | None = None,
        tiers: Sequence[str] = ("dropped", "kept"),
        groups: int = 0,
        values: ArrayLike | None = None,
        scale: Scale = "log",
    ) -> dict[str, object]:
        """Field values for `n` tokens, already decoded to text.

        `shares` [n] in 0..1: the part of all layers and KV heads that keep each token; `groups` is how many
        layer-head pairs there are, for the readout. Or `tier_of` [n]: for one chosen layer and head, the index into
        `tiers` at which each token is kept (0 is dropped). Or `values` [n], any numbers not below zero, coloured on
        `scale`; the field `what` names them. With none of them the text is plain. Raises `BadParameter` where lengths
        or ranges do not fit.
        """
        if sum(given is not None for given in (shares, tier_of, values)) > 1:
            raise BadParameter("TokenText: give one of shares (all heads), tier_of (one head) and values")
        texts = [str(token) for token in tokens]
        fields: dict[str, object] = {"tokens": texts, "groups": int(groups), "knots": b""}
        if values is not None:
            levels = np.asarray(values, dtype=np.float32)
            if levels.size and not levels.min() >= 0:
                raise BadParameter("TokenText: values must be numbers not below zero")
            fields |= {"tiers": [], "knots": pack(scale_values(levels, scale))}
        elif tier_of is not None:
            tier = np.asarray(tier_of)
            if tier.size and not (tier.min() >= 0 and tier.max() < len(tiers)):
                raise BadParameter(
                    f"TokenText: tier_of must lie in 0..{len(tiers) - 1}, the places in tiers {list(tiers)}"
                )
            levels = tier.astype(np.uint8)
            fields["tiers"] = list(tiers)
        else:
            levels = np.zeros(0, np.float32) if shares is None else np.asarray(shares, dtype=np.float32)
            if levels.size and not (levels.min() >= 0 and levels.max() <= 1):
                raise BadParameter("TokenText: shares must lie in 0..1")
            fields["tiers"] = []
        if levels.size and levels.shape != (len(texts),):
            raise BadParameter(f"TokenText: {len(texts)} tokens but values of shape {levels.shape}: give one a token")
        return fields | {"levels": pack(levels)}
