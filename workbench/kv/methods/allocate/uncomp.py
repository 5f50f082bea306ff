"""UNComp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.core.apportion import apportion
from workbench.kv.base import Study
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register


def truncated_entropy(vectors: Tensor, rank: int) -> Tensor:
    """Entropy of the `rank` largest eigenvalues of the covariance of vectors [..., n, d], over log d: float64 [...].

    Vectors are centred and brought to length 1, and the covariance to trace 1, so that the eigenvalues are shares.
    """
    centred = vectors.double() - vectors.double().mean(dim=-2, keepdim=True)
    directions = centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    covariance = directions.mT @ directions  # [..., d, d]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(1e-12)
    shares = torch.linalg.eigvalsh(covariance / trace[..., None, None]).flip(-1)[..., :rank].clamp_min(0)
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum(dim=-1)
    return entropy / math.log(max(vectors.shape[-1], 2))


@register
class UNComp(SnapKV):
    """Give layers and heads room by how much their queries differ from one another: their truncated matrix entropy.

    The entropy of a head is that of the `rank` largest eigenvalues of the trace-normalised covariance of its centred
    queries (section 3.2). Layers form stages by depth: a new one begins where the entropy falls more than `fall` below
    that of the stage so far, and has `decay` of the room. The heads of a layer are put into `groups` equal groups by
    entropy, whose room falls evenly from 1 + `spread` to 1 - `spread` times the layer's average, most for the highest.
    Tokens are chosen by SnapKV's scores, from the last `window` queries.

    Chosen here: the KV part of the paper (the attention method `uncomp-reading` is what it does while reading); queries
    after rotation, as in the authors' code; a layer's entropy is the mean of its heads', which by the paper follows
    that of hidden states; entropies come from the prompt itself and not from a calibration text; a KV head has the mean
    of its query heads; the elbow of the spectrum is a parameter, 32 as in the authors' code. The paper leaves the sizes
    of stages open. Every head keeps the window where the budget allows.
    """

    key = "uncomp"
    title = "UNComp"
    paper = Paper(
        "UNComp: Can Matrix Entropy Uncover Sparsity? A Compressor Design from an Uncertainty-Aware Perspective",
        "Xiong et al. 2024",
        "2410.03090",
    )
    claim = "4.74 % of the cache, 6.4x throughput"
    fidelity = Fidelity("deviates", "stages of layers by a rule of ours; evicting hidden states is `uncomp-reading`")
    presets = (
        Preset(
            "longbench", "menik1126/UNComp, run_longbench.py and uncomp_utils.py: sizes 512 and 256, b3e9f7b",
            window=8, kernel=7, pooling="max", rank=32, groups=2, spread=0.3333,
        ),
        Preset(
            "four-groups", "menik1126/UNComp, uncomp_utils.py: sizes 512, 427, 341 and 256, b3e9f7b",
            groups=4, spread=0.3333,
        ),
        Preset(
            "extreme", "menik1126/UNComp, uncomp_utils.py: sizes 112 and 16, b3e9f7b",
            groups=2, spread=0.75,
        ),
    )  # fmt: skip
    default_budget = 0.5
    head_adaptive = True

    window: int = param(8, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    rank: int = param(32, ge=1, le=512, help="eigenvalues before the elbow of the spectrum")
    groups: int = param(2, ge=1, le=64, help="groups of heads in a layer, at most one a KV head")
    spread: float = param(0.3333, ge=0, lt=1, help="how far the outer groups are from the layer's average room")
    fall: float = param(
        0.02, ge=0, le=1, help="fall of the entropy that begins a new stage of layers",
        own="the code divides the layers of two models by a fall of 1 in another measure of hidden states",
    )  # fmt: skip
    decay: float = param(
        0.9, gt=0, le=1, help="room of a stage, as a share of that of the stage before",
        own="the code has sizes by hand for two models",
    )  # fmt: skip

    def importance(self, study: Study) -> Tensor:
        """The truncated matrix entropy of each KV head's queries, float64 [l, k], 0 to 1."""
        layers = study.trace.compressible
        track = study.progress.track(layers, "entropy of the queries", len(layers))
        entropy = stacked([truncated_entropy(layer.queries, self.rank) for layer in track])  # [l, h]
        by_kv_head: Tensor = entropy.unflatten(1, (layers[0].kv_heads, -1)).mean(dim=2)
        return by_kv_head.cpu()

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        entropy, tokens = ranking.importance, ranking.tokens
        number = ranking.layers * ranking.kv_heads
        total = min(entries, number * tokens)
        certain = max(min(self.window, total // number), 1)
        if entropy is None or total < number:
            return super().allocate(ranking, entries)
        weights = self._stages(entropy.mean(dim=1))[:, None] * self._heads(entropy)
        most = torch.full_like(weights, tokens - certain, dtype=torch.int64)
        return certain + apportion(total - number * certain, weights, most)

    def _stages(self, entropy: Tensor) -> Tensor:
        """The room of each layer [l] against that of the first stage, from layers' entropies [l]."""
        room, weights, reference = 1.0, [], float(entropy[0])
        for value in entropy.tolist():
            if value < reference - self.fall:
                room, reference = room * self.decay, value
            weights.append(room)
        return torch.tensor(weights, dtype=torch.float64)

    def _heads(self, entropy: Tensor) -> Tensor:
        """The room of each head [l, k] against its layer's average, from their entropies [l, k]."""
        heads = entropy.shape[1]
        groups = min(self.groups, heads)
        place = entropy.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)  # 0 the highest
        if groups == 1:
            return torch.ones_like(entropy)
        group = place * groups // heads
        return 1 + self.spread * (1 - 2 * group.double() / (groups - 1))
