"""VQ-Logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.errors import NotApplicable
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import CodebookLinear, codebook_nbytes
from workbench.weights.surgery.linears import output_head
from workbench.weights.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TILE = 64 << 20  # bytes of distances computed together


@register
class VQLogits(WeightMethod):
    """Let the tokens of the output head share a small codebook, so that few logits are computed and handed to many.

    The rows of the head are clustered by k-means; each token keeps the number of its codeword and takes that codeword's
    logit (Shao et al. 2025, section 3). The number of codewords follows from the budget, which is a share of the head's
    own bytes. The paper trains the model with its codebook; here it is only put in place of a trained head, and tokens
    with the same codeword then have the same logit: the earliest of them is what greedy decoding says. A head that is
    tied to the input embedding is refused: its rows are still looked up, and the codebook would come on top. From a
    share of 1 on the head stays as it is.
    """

    key = "vq-logits"
    title = "VQ-Logits"
    paper = Paper(
        "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits",
        "Shao et al. 2025",
        "2505.10202",
    )
    claim = "99 % fewer output parameters at 4 % more perplexity, trained with its codebook"
    fidelity = Fidelity("untrained part of a trained method", "the codebook is put in place of a trained head")
    default_budget = 0.05

    rounds: int = param(10, ge=1, le=100, help="rounds of k-means", own="the paper trains the codebook")
    seed: int = param(0, ge=0, le=2**31 - 1, help="which tokens the clusters begin with", own="any")

    def survey(self, model: nn.Module) -> Survey:
        name, head = _head(model, self.key)
        left = {}
        for other, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2 or module is head:
                    continue
                if parameter is head.weight:
                    raise NotApplicable(
                        f"{self.key}: the head of this {type(model).__name__} is tied to {other}, which looks up "
                        "its rows all the same: with a codebook beside it the model would be larger"
                    )
                left[other if key == "weight" else f"{other}.{key}"] = "not the output head"
        return Survey(self, {name: head}, left)

    def nbytes(self, linear: nn.Linear) -> int:
        count = self._codewords(linear)
        return codebook_nbytes(linear.out_features, linear.in_features, count) if count else self.full_nbytes(linear)

    def _codewords(self, linear: nn.Linear) -> int:
        """The largest number within the budget, at least 1; 0: the head stays as it is."""
        assert self.effective_budget is not None
        outputs, inputs = linear.weight.shape
        full = self.full_nbytes(linear)
        limit = self.effective_budget.nbytes(full)
        if limit is None or limit >= full:
            return 0
        for wide, most in ((4, outputs), (2, 2**15)):  # the index takes 4 bytes a token, or 2 with few codewords
            count = min((limit - wide * outputs) // (2 * inputs), most, outputs)
            if wide == 2 or count > 2**15:
                return max(count, 1)
        return 1

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        for name, head in linears.items():
            count = self._codewords(head)
            if count:
                codewords, index = clusters(head.weight.detach(), count, self.rounds, self.seed, progress)
                with self.naming(name):
                    twin.set_submodule(name, CodebookLinear(codewords.to(head.weight.dtype), index, head.bias))


def _head(model: nn.Module, key: str) -> tuple[str, nn.Linear]:
    """The output head and its name."""
    head = output_head(model)
    for name, module in model.named_modules():
        if module is head and type(module) is nn.Linear:
            return name, module
    raise NotApplicable(f"{key}: {type(model).__name__} has no linear output head that could share a codebook")


def clusters(
    rows: Tensor, count: int, rounds: int, seed: int = 0, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """`count` codewords [c, i], float32, and which of them is nearest to each of rows [v, i], int64 [v] (Lloyd 1982).

    Begins with drawn rows. A codeword that no row is nearest to takes the row that is furthest from its own. Stops
    early once nothing changes. The squared error never grows.
    """
    progress = progress or Progress()
    draw = torch.Generator().manual_seed(seed)
    rows = rows.float()
    codewords = rows[torch.randperm(rows.shape[0], generator=draw)[:count].to(rows.device)]
    index = rows.new_full((rows.shape[0],), -1, dtype=torch.int64)
    for done in range(rounds):
        progress.update("clustering the output head", done, rounds)
        closest, distances = nearest(rows, codewords, progress)
        if torch.equal(closest, index):
            break
        index = closest
        sizes = index.bincount(minlength=count)
        sums = torch.zeros_like(codewords).index_add_(0, index, rows)
        codewords = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], codewords)
        empty = (sizes == 0).nonzero()[:, 0]
        codewords[empty] = rows[distances.topk(empty.numel()).indices]
    return codewords, nearest(rows, codewords, progress)[0]


def nearest(rows: Tensor, codewords: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Of each row [v, i] the nearest codeword of [c, i], the first of several, and its squared distance: [v] each."""
    half = codewords.square().sum(dim=1) / 2
    indices, distances = [], []
    for part in rows.split(max(_TILE // (4 * codewords.shape[0]), 1)):
        progress.check()
        apart, index = torch.addmm(half, part, codewords.T, alpha=-1).min(dim=1)
        indices.append(index)
        distances.append((2 * apart + part.square().sum(dim=1)).clamp_min_(0))
    return torch.cat(indices), torch.cat(distances)
