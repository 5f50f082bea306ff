"""What every method promises, as checks that anyone's test-suite can call: `check_method(MyMethod)`.

Everything runs on tiny random models made here, in a second or two, without a network and without pytest. A promise
is a function of a method, named after what it promises; `PROMISES` lists them by family.
"""

from workbench.testing.attention import (
    a_whole_budget_attends_exactly,
    attention_keeps_to_the_budget,
    decoding_at_a_whole_budget_is_exact,
    decoding_computes_no_more_than_exact_attention,
    decoding_goes_on_as_reading_would,
    reading_twice_gives_the_same,
    what_comes_after_changes_nothing_before,
)
from workbench.testing.check import (
    PROMISES,
    Promise,
    check_method,
    check_promise,
    promises,
)
from workbench.testing.every import (
    describes_itself,
)
from workbench.testing.kv import (
    a_bfloat16_model_is_scored_in_float32,
    a_conversation_goes_on_and_repeats_itself,
    a_refusal_names_the_smallest_budget_that_works,
    a_whole_budget_is_exact,
    allocation_shares_out_what_there_is,
    any_number_of_kv_heads_is_planned_by_kv_head,
    kept_positions_ascend_and_are_positions,
    live_bytes_are_those_planned_and_within_the_budget,
    merging_changes_only_what_it_must,
    nothing_is_left_on_the_method_the_model_or_the_trace,
    prompts_of_few_tokens_work,
    sliding_layers_stay_exact,
    the_same_prompt_gives_the_same_plan,
)
from workbench.testing.leftovers import (
    fingerprint,
    nothing_left,
)
from workbench.testing.operators import (
    an_operator_takes_no_budget,
    chunks_give_what_the_whole_map_gives,
    each_head_is_by_itself,
    large_inputs_give_finite_outputs,
    outputs_have_the_shape_and_precision_of_the_queries,
    rows_are_those_of_the_whole_map,
    the_same_inputs_give_the_same_output,
    what_follows_changes_no_output_before,
)
from workbench.testing.problem import (
    MethodProblem,
)
from workbench.testing.stores import (
    check_plan,
    live_nbytes,
)
from workbench.testing.subjects import (
    BUDGETS,
    TOKENS,
    Reading,
    Subjects,
    feasible,
    fresh_reading,
    plan_on,
    within,
)
from workbench.testing.weights import (
    compressed_layers_hold_no_more_than_foretold,
    the_original_model_is_unchanged,
    the_same_weights_come_out_twice,
    weights_keep_to_the_budget,
)

__all__ = [
    "BUDGETS",
    "PROMISES",
    "TOKENS",
    "MethodProblem",
    "Promise",
    "Reading",
    "Subjects",
    "a_bfloat16_model_is_scored_in_float32",
    "a_conversation_goes_on_and_repeats_itself",
    "a_refusal_names_the_smallest_budget_that_works",
    "a_whole_budget_attends_exactly",
    "a_whole_budget_is_exact",
    "allocation_shares_out_what_there_is",
    "an_operator_takes_no_budget",
    "any_number_of_kv_heads_is_planned_by_kv_head",
    "attention_keeps_to_the_budget",
    "check_method",
    "check_plan",
    "check_promise",
    "chunks_give_what_the_whole_map_gives",
    "compressed_layers_hold_no_more_than_foretold",
    "decoding_at_a_whole_budget_is_exact",
    "decoding_computes_no_more_than_exact_attention",
    "decoding_goes_on_as_reading_would",
    "describes_itself",
    "each_head_is_by_itself",
    "feasible",
    "fingerprint",
    "fresh_reading",
    "kept_positions_ascend_and_are_positions",
    "large_inputs_give_finite_outputs",
    "live_bytes_are_those_planned_and_within_the_budget",
    "live_nbytes",
    "merging_changes_only_what_it_must",
    "nothing_is_left_on_the_method_the_model_or_the_trace",
    "nothing_left",
    "outputs_have_the_shape_and_precision_of_the_queries",
    "plan_on",
    "promises",
    "prompts_of_few_tokens_work",
    "reading_twice_gives_the_same",
    "rows_are_those_of_the_whole_map",
    "sliding_layers_stay_exact",
    "the_original_model_is_unchanged",
    "the_same_inputs_give_the_same_output",
    "the_same_prompt_gives_the_same_plan",
    "the_same_weights_come_out_twice",
    "weights_keep_to_the_budget",
    "what_comes_after_changes_nothing_before",
    "what_follows_changes_no_output_before",
    "within",
]
