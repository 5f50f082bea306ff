"""FoldGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from workbench.models.decoder import decoder_layers
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.block_pruner import BlockPruner
from workbench.weights.calibration.block_gates import block_gates
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.surgery.depth import shorten
from workbench.weights.surgery.narrow import linear_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RATE, _TOKENS = 0.02, 256  # of the gates' learning: a step, and how much of each text


def folding(
    importance: Sequence[float], sizes: Sequence[int], kinds: Sequence[object], limit: int, folded: float, group: int
) -> list[int | None]:
    """For each block which block's weights it uses: its own number, an earlier one's, or None where it is removed.

    The least important blocks stop having weights of their own until the rest takes at most `limit` bytes. Of these the
    share `folded`, the more important ones, use those of the nearest earlier block that has its own, is of the same
    kind, and lends them to fewer than `group` - 1 others; the rest are removed. sizes: bytes of each block.
    """
    order = sorted(range(len(sizes)), key=lambda index: importance[index])
    whole, nbytes = set(order), sum(sizes)
    for index in order[:-1]:
        if nbytes <= limit:
            break
        whole.remove(index)
        nbytes -= sizes[index]
    without = [index for index in order if index not in whole]
    folding = set(without[round((1 - folded) * len(without)) :])
    users: list[int | None] = [index if index in whole else None for index in range(len(sizes))]
    for index in sorted(folding):
        earlier = max((other for other in whole if other < index and kinds[other] == kinds[index]), default=None)
        if earlier is not None and users.count(earlier) < group:
            users[index] = earlier
    return users


@register
class FoldGPT(BlockPruner):
    """Remove the blocks that change little, and let groups of others share one block's weights.

    A block's importance is how far open a gate on it stays that is learned, with those of all other blocks, for the
    loss of the next token while every weight stays as it is (`workbench.weights.calibration.block_gates`); so blocks
    that stand in for each other do not both go (Liu et al. 2024). The gates' loss, steps and penalty are chosen here.
    With importance by "similarity" it is one minus the mean cosine between what enters and leaves the block, as in
    ShortGPT. The paper heals what is left by training with distillation from the last layers; that is left out, so that
    much smaller shares can go. Blocks that share keep their own norms and their own part of the cache; shared matrices,
    and their biases, exist once and count once. With a removed block its part of the cache goes too.
    """

    key = "foldgpt"
    title = "FoldGPT"
    paper = Paper(
        "FoldGPT: Simple and Effective Large Language Model Compression Scheme", "Liu et al. 2024", "2407.00928"
    )
    claim = "36 % fewer parameters, with training after folding"
    fidelity = Fidelity(
        "untrained part of a trained method",
        "gates are learned, by a loss chosen here; the training that heals what folding does is left out",
    )
    default_budget = 0.9

    importance: Literal["gates", "similarity"] = param(
        "gates",
        help="by learned gates, or by the cosine of what enters and leaves a block",
        own="as in the abstract; KL of workbench-tiny without one block 1.34, by similarity 2.20; folded 1.88 and 1.43",
    )
    folded: float = param(
        0.5,
        ge=0,
        le=1,
        help="of the blocks without weights of their own, how many use another's",
        own="the abstract gives none; half of them",
    )
    group: int = param(
        3, ge=2, le=32, unit="blocks", help="how many share the same weights at most", own="the abstract gives none"
    )
    steps: int = param(
        64, ge=1, le=10_000, help="how often gates learn from a text", own="the abstract gives none; until they stand"
    )
    penalty: float = param(
        1.0, ge=0, le=100, help="what open gates cost, in nats for all of them", own="the abstract gives none"
    )

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None:
            return
        names = list(decoder_layers(twin))
        importance = self._importance(study, progress)
        sizes = self.block_nbytes(twin, linears)
        kinds = [_kind(name, linears) for name in names]
        users = folding(importance, sizes, kinds, limit, self.folded, self.group)
        steps = progress.track(list(enumerate(users)), f"compressing by {self.key}", len(users))
        for index, other in steps:
            if other is not None and other != index:
                for name in [name for name in linears if name.startswith(f"{names[index]}.")]:
                    lender = linears[names[other] + name.removeprefix(names[index])]
                    twin.set_submodule(name, linear_like(lender, lender.weight, lender.bias))
        shorten(twin, [index for index, other in enumerate(users) if other is not None])

    def _importance(self, study: WeightStudy, progress: Progress) -> list[float]:
        if self.importance == "similarity":
            return [float(1 - cosine) for cosine in study.similarity(progress)]
        learnt = study.once(
            ("gates", self.steps, self.penalty),
            lambda: block_gates(
                study.model,
                study.ids[:, :_TOKENS],
                steps=self.steps,
                rate=_RATE,
                penalty=self.penalty,
                progress=progress,
            ),
        )
        return [float(gate) for gate in learnt]


def _kind(block: str, linears: Mapping[str, nn.Linear]) -> object:
    """What two blocks have to have in common to share weights."""
    inside = {name.removeprefix(block): x.weight.shape for name, x in linears.items() if name.startswith(f"{block}.")}
    return sorted(inside.items())
