"""What promises are checked on: tiny random models, and what they record of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from workbench.errors import BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench.kv.plan import Plan
from workbench.models import facts, tiny
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read
from workbench.testing.problem import MethodProblem, must
from workbench.trace import Trace
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.compress import SHORT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.budget import BudgetLike

K = TypeVar("K", bound=KVMethod)

BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)
TOKENS = 70  # of the usual prompt: longer than a tiny model's sliding window (16), short enough for plain loops
_ROOM = 0.9  # for methods that read in pieces of their room: with a tenth of it, a short prompt takes 100 passes


class Reading(NamedTuple):
    """A tiny model and what it recorded of a prompt."""

    model: PreTrainedModel
    trace: Trace


class Subjects:
    """Readings and a calibrated model, made when first asked for and shared by the promises checked with them."""

    def __init__(self) -> None:
        self._readings: dict[tuple[str, int, torch.dtype], Reading] = {}
        self._studied: tuple[PreTrainedModel, WeightStudy] | None = None

    def reading(self, architecture: str = "llama", tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Reading:
        """A prompt of random tokens, the same for each length, read by a tiny model; to be left as it is."""
        key = (architecture, tokens, dtype)
        if key not in self._readings:
            self._readings[key] = fresh_reading(*key)
        return self._readings[key]

    def studied(self) -> tuple[PreTrainedModel, WeightStudy]:
        """A tiny model and its calibration, which all weight methods share as those of a session do."""
        if self._studied is None:
            model = tiny("llama")
            self._studied = model, WeightStudy(model, calibration=SHORT)
        return self._studied

    def renew(self) -> None:
        """Forget all of them: whatever a method did to them, the next one is checked on sound ones."""
        self._readings, self._studied = {}, None


def fresh_reading(architecture: str = "llama", tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Reading:
    """The same as `Subjects.reading`, by a model of its own."""
    model = tiny(architecture)
    nn.Module.to(model, dtype)
    return Reading(model, read(model, facts(model), Prompt(random_ids(tokens), chat=False)))


def random_ids(tokens: int, seed: int | None = None) -> Tensor:
    """Token ids [tokens] int64 that a tiny model knows; by default the same for each length."""
    return torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(seed or tokens))


def plan_on(
    reading: Reading, method: KVMethod, budget: BudgetLike | None = None, dtype: torch.dtype = torch.bfloat16
) -> Plan:
    """The method's plan, by its own budget where none is given or it takes none; a method that reads gets more room."""
    if budget is None:
        asked = feasible(reading, method.with_budget(_ROOM) if method.supplies("read") else method, dtype)
    else:
        asked = method.with_budget(budget) if method.takes_budget() else method
    return make_plan(reading.trace, [asked], dtype, model=reading.model)


def feasible(reading: Reading, method: K, dtype: torch.dtype = torch.bfloat16) -> K:
    """The method, with the smallest budget in place of its own where this prompt is too short for that."""
    try:
        make_plan(reading.trace, [method], dtype, model=reading.model)
    except BudgetTooSmall as refusal:
        return method.with_budget(refusal.smallest)
    return method


def within(reading: Reading, method: KVMethod, budget: float, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The plan at this budget, or at the smallest one that the refusal names, which has to work."""
    try:
        plan = plan_on(reading, method, budget, dtype)
    except BudgetTooSmall as refusal:
        smallest = refusal.smallest
        must(budget < smallest <= 1, f"the budget {budget} is refused, and {smallest} named as the smallest")
        try:
            plan = plan_on(reading, method, smallest, dtype)
        except BudgetTooSmall as again:
            raise MethodProblem(f"the budget {smallest}, named as the smallest, is refused too: {again}") from again
        budget = smallest
    if method.supplies("select"):  # nothing is saved, and what it selects by comes on top
        return plan
    if not method.takes_budget():
        budget = 1.0
    taken = f"{plan.nbytes} of {plan.full_nbytes} bytes"
    must(plan.nbytes <= budget * plan.full_nbytes, f"a budget of {budget} is planned to take {taken}")
    return plan
