"""Eigen Attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.core.bisection import boundary
from workbench.kv.base import KVMethod, Study
from workbench.kv.rank_profiles import Profile, profiles_of
from workbench.kv.stores.format import DenseFormat, Format, Shape, stored_nbytes
from workbench.kv.stores.low_rank import LowRankFormat
from workbench.registry import Fidelity, Paper, Preset, param, register

_PUBLISHED = 0.6  # of the uncompressed bytes, the smallest cache in the paper


@register
class EigenAttention(KVMethod):
    """Keep every token as coefficients in a low-rank space, with ranks that cost every layer equally much.

    The space of each KV head is spanned by the leading singular vectors of keys and queries together, that of the
    values by their own; attention runs in them: the query is projected, and the weighted sum of value
    coefficients is projected back. Where a model has rotary positions, the space is that of the keys before rotation,
    and keys leave it and are rotated to their positions when they are attended to (as in the published code, which
    looks at keys alone there and has one space for all heads of a layer; here each has its own).

    A threshold on the share of the singular values gives a layer the ranks of its keys and its values, the largest that
    any of its heads needs, and each layer's threshold falls until its output is off by `error`, the same for all. That
    is the relative error of the decoder layer's output, everything before it exact, averaged over 16 positions of the
    prompt; it is measured at thirteen thresholds and read off between them. A budget sets the error that all layers may
    make, if that is more than `error`; without one, 60 % of the uncompressed cache does, the paper's strongest setting.

    The paper finds bases on calibration texts and merges them into the weights. Ours are found on the prompt itself, so
    they fit it better; they serve the answer too, and their bytes are counted.
    """

    key = "eigen-attention"
    title = "Eigen Attention"
    paper = Paper(
        "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression", "Saxena et al. 2024", "2408.05646"
    )
    claim = "40 % less KV memory, 60 % less attention latency"
    fidelity = Fidelity("deviates", "spaces of the prompt itself, one for each head, in place of calibration texts'")
    presets = (Preset("error budget", "UtkarshSaxena1/EigenAttn, main_eigen_attn.py, 067df77", error=0.025),)

    error: float = param(
        0.0,
        ge=0,
        le=1,
        help="relative error that each layer's output may have; 0: as little as the budget allows",
        own="a budget of bytes decides, as for all methods here; the code's 0.025 is a preset",
    )

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        full = sum(shape.full_nbytes for shape in shapes)
        room = limit if limit is not None else full if self.error else int(_PUBLISHED * full)
        if not self.error and full <= room:
            return DenseFormat(dtype)
        profiles = self._profiles(study)
        everything = torch.tensor([[shape.tokens] * shape.kv_heads for shape in shapes])

        def at(error: float) -> tuple[Format, int]:  # the format, and its bytes
            form = LowRankFormat(dtype, {layer: p.ranks(error) for layer, p in profiles.items()}, queries=True)
            return form, stored_nbytes(form, shapes, everything)

        form, nbytes = at(self.error)
        if nbytes > room:
            worst = max(self.error, *(max(profile.errors) for profile in profiles.values()))
            form, nbytes = at(boundary(lambda error: at(error)[1] <= room, worst, self.error, tolerance=1e-5))
        # On a short prompt the bases may take more than they save.
        return DenseFormat(dtype) if full <= nbytes else form

    def _profiles(self, study: Study) -> dict[int, Profile]:
        """What lower ranks cost, by number of layer; found once a trace, whatever the parameters."""
        return study.trace.once(("eigen-attention", study.model is None), lambda: profiles_of(study))
