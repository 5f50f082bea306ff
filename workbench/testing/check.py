"""Checking a method by the promises of its family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.attention.base import AttentionMethod
from workbench.attention.operators.base import Operator
from workbench.kv.base import KVMethod
from workbench.registry import Method
from workbench.testing import attention, every, kv, operators, weights
from workbench.testing.problem import MethodProblem
from workbench.testing.subjects import Subjects
from workbench.weights.base import WeightMethod

Promise = Callable[[Any, Subjects], None]
"""A function of a method, and of what it is checked on, that raises MethodProblem."""

PROMISES: dict[type[Method], tuple[Promise, ...]] = {
    KVMethod: (
        every.describes_itself,
        kv.nothing_is_left_on_the_method_the_model_or_the_trace,
        kv.live_bytes_are_those_planned_and_within_the_budget,
        kv.a_refusal_names_the_smallest_budget_that_works,
        kv.a_whole_budget_is_exact,
        kv.kept_positions_ascend_and_are_positions,
        kv.the_same_prompt_gives_the_same_plan,
        kv.allocation_shares_out_what_there_is,
        kv.merging_changes_only_what_it_must,
        kv.prompts_of_few_tokens_work,
        kv.any_number_of_kv_heads_is_planned_by_kv_head,
        kv.a_bfloat16_model_is_scored_in_float32,
        kv.sliding_layers_stay_exact,
        kv.a_conversation_goes_on_and_repeats_itself,
    ),
    WeightMethod: (
        every.describes_itself,
        weights.the_original_model_is_unchanged,
        weights.compressed_layers_hold_no_more_than_foretold,
        weights.weights_keep_to_the_budget,
        weights.the_same_weights_come_out_twice,
    ),
    AttentionMethod: (
        every.describes_itself,
        attention.a_whole_budget_attends_exactly,
        attention.attention_keeps_to_the_budget,
        attention.what_comes_after_changes_nothing_before,
        attention.decoding_goes_on_as_reading_would,
        attention.decoding_at_a_whole_budget_is_exact,
        attention.decoding_computes_no_more_than_exact_attention,
        attention.reading_twice_gives_the_same,
    ),
    Operator: (
        every.describes_itself,
        operators.chunks_give_what_the_whole_map_gives,
        operators.rows_are_those_of_the_whole_map,
        operators.what_follows_changes_no_output_before,
        operators.outputs_have_the_shape_and_precision_of_the_queries,
        operators.large_inputs_give_finite_outputs,
        operators.each_head_is_by_itself,
        operators.the_same_inputs_give_the_same_output,
        operators.an_operator_takes_no_budget,
    ),
}
"""What methods of each family promise."""


def check_method(method: type[Method], **parameters: Any) -> None:
    """Check that a method keeps every promise of its family. Raises MethodProblem for the first that it breaks.

    method: a KV, weight or attention method, or an operator; it need not be registered. parameters: for all instances
    made of it, for instance a window that suits the short prompts used here (at most 70 tokens); no budget, for the
    checks set it.
    KV methods: the promises hold at every budget, so leave parameters that fix the bytes (a number of bits) at
    their defaults.
    """
    if "budget" in parameters:
        raise TypeError("check_method sets budgets itself: leave `budget` out")
    subjects = Subjects()
    for promise in promises(method):
        check_promise(promise, method, subjects, **parameters)


def promises(method: type[Method]) -> tuple[Promise, ...]:
    """The promises of a method's family. Raises MethodProblem if it has none."""
    for base, kept in PROMISES.items():
        if issubclass(method, base):
            return kept
    bases = ", ".join(base.__name__ for base in PROMISES)
    raise MethodProblem(f"{method.__name__}: a method derives from one of {bases}")


def check_promise(
    promise: Promise, method: type[Method], subjects: Subjects | None = None, /, **parameters: Any
) -> None:
    """Check one promise. Raises MethodProblem, whatever goes wrong in the method.

    subjects: what it is checked on, where several checks share that, which is quicker.
    """
    name = f"{method.key or method.__name__}: {promise.__name__.replace('_', ' ')}"
    subjects = subjects or Subjects()
    try:
        promise(method(**parameters), subjects)
    except MethodProblem as broken:
        subjects.renew()
        raise MethodProblem(f"{name}: {broken}") from broken.__cause__
    except Exception as error:
        subjects.renew()
        raise MethodProblem(f"{name}: {type(error).__name__}: {error}") from error
