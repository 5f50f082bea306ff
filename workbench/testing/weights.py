"""What weight methods promise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.testing.leftovers import nothing_left
from workbench.testing.problem import must
from workbench.testing.subjects import BUDGETS, Subjects, random_ids
from workbench.weights.base import WeightMethod
from workbench.weights.compress import compressed
from workbench.weights.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _compressed(method: WeightMethod, subjects: Subjects) -> PreTrainedModel:
    model, study = subjects.studied()
    return compressed(model, [method], study=lambda *_: study)


def the_original_model_is_unchanged(method: WeightMethod, subjects: Subjects) -> None:
    model, _ = subjects.studied()
    with nothing_left(method, model):
        said = _logits(model)
        method.survey(model)
        twin = _compressed(method, subjects)  # alive until all is compared, so that what is remembered of it shows
        _logits(twin)
        must(torch.equal(_logits(model), said), "the original model answers differently")


def compressed_layers_hold_no_more_than_foretold(method: WeightMethod, subjects: Subjects) -> None:
    model, _ = subjects.studied()
    survey, twin = method.survey(model), _compressed(method, subjects)
    must(bool(_logits(twin).isfinite().all()), "the compressed model's logits are not finite")
    live = _live_nbytes(survey, model, twin)
    must(live <= survey.nbytes, f"{survey.nbytes} bytes foretold, {live} held")


def _live_nbytes(survey: Survey, model: PreTrainedModel, twin: PreTrainedModel) -> int:
    """Live bytes of what stands in the twin for the weights that a method takes; those it left as it counts them."""
    taken = {id(linear.weight) for linear in survey.linears.values()}
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    tensors = [*twin.parameters(), *twin.buffers()]
    left = {id(tensor) for tensor in tensors} & taken
    kept = {id(linear.weight): linear for linear in survey.linears.values() if id(linear.weight) in left}
    return tensor_bytes(t for t in tensors if id(t) not in shared) + sum(map(survey.method.full_nbytes, kept.values()))


def weights_keep_to_the_budget(method: WeightMethod, subjects: Subjects) -> None:
    model, _ = subjects.studied()
    for share in BUDGETS:
        budget, asked = share, method.with_budget(share)
        try:
            twin = _compressed(asked, subjects)
        except BudgetTooSmall as refusal:
            must(share < refusal.smallest, f"the budget {share} is refused, and {refusal.smallest} named")
            if refusal.smallest > 1:
                continue
            budget, asked = refusal.smallest, method.with_budget(refusal.smallest)
            twin = _compressed(asked, subjects)
        survey = asked.survey(model)
        live = _live_nbytes(survey, model, twin)
        must(live <= survey.nbytes, f"a budget of {budget} is foretold to take {survey.nbytes} bytes, and takes {live}")
        must(survey.nbytes <= budget * survey.full_nbytes, f"a budget of {budget} takes {survey.nbytes} bytes")


def the_same_weights_come_out_twice(method: WeightMethod, subjects: Subjects) -> None:
    one, two = _compressed(method, subjects), compressed(tiny("llama"), [type(method)(**dict(method))])
    must(torch.equal(_logits(one), _logits(two)), "compressing the same model twice gives two models")


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(random_ids(12)[None]).logits[0]
    return logits
