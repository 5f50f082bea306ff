"""Times of an estimate: within 15 % of what was measured, and of the form that what is moved and computed gives."""

from __future__ import annotations

from typing import Any

import pytest

import workbench as wb
from benchmarks import cost_kernels
from workbench.cost import Cost
from workbench.cost.kernels import Step, fit, steps
from workbench.recipe import Recipe

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1 << 20,
}  # fmt: skip


def llama(recipe: Any = "full", hardware: str = "H100", context: int = 32768, **options: Any) -> Cost:
    return wb.cost(LLAMA, recipe, hardware, context, **options)


@pytest.mark.parametrize("step", steps(), ids=lambda step: f"{step.on} {step.what} {step.tokens}")
def test_a_decode_step_is_within_fifteen_percent_of_the_measured_one(step: Step) -> None:
    recipe = Recipe.from_dict({"methods": list(step.recipe)})
    found = wb.cost({**step.model, "max_position_embeddings": step.tokens}, recipe, step.on, step.tokens)
    assert step.tokens >= 32768
    assert found.measured is not None and found.measured.us == step.us
    assert found.measured.error == pytest.approx(found.decode_s * 1e6 / step.us - 1)
    assert abs(found.measured.error) <= 0.15
    assert f"{found.measured.error:+.1%}" in found.explain()


def test_the_kernel_tables_are_those_that_the_measurements_give() -> None:
    assert cost_kernels.DATA.read_text(encoding="utf-8") == cost_kernels.written()


def test_a_line_that_was_measured_without_error_is_found_again() -> None:
    found = fit([1e6, 4e6, 9e7], [5 + x / 2e6 for x in (1e6, 4e6, 9e7)])
    assert found.latency == pytest.approx(5) and found.rate == pytest.approx(2e6) and found.worst < 1e-9
    assert fit([1.0, 2.0], [1.0, 3.0]).latency == 0  # never below zero


def test_a_step_takes_the_time_of_its_terms_and_longer_caches_take_longer() -> None:
    short, long = llama(context=32768), llama(context=131072)
    assert short.decode_s == pytest.approx(sum(term.seconds for term in short.decode))
    slope = (long.decode_s - short.decode_s) / (long.memory.kv - short.memory.kv)
    assert slope == pytest.approx(1 / (0.93 * 3.35e12), rel=1e-3)  # what the attention kernel reaches, of the peak
    assert long.prefill_s > 8 * short.prefill_s  # attention grows with the square
    assert short.tokens_per_s == pytest.approx(1 / short.decode_s)


def test_what_is_not_measured_there_says_so() -> None:
    assert all(term.measured for term in llama().decode)
    other = llama(hardware="A100")
    assert not any(term.measured for term in other.decode) and "estimated from another" in other.explain()
    assert llama(hardware="H200").decode_s < llama().decode_s  # the same chip with faster memory


def test_experts_are_read_as_often_as_tokens_draw_them() -> None:
    sizes = {"model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 4, "num_hidden_layers": 4}
    one, many = (wb.cost(sizes, context=1000, batch=batch) for batch in (1, 1000))
    experts = [each for each in one.architecture.matrices if each.experts == 64]
    assert experts and all(each.share == 4 / 64 for each in experts)
    assert experts[0].read_nbytes(1) == pytest.approx(experts[0].nbytes / 16)
    assert experts[0].read_nbytes(1000) == pytest.approx(experts[0].nbytes)
    assert many.decode_s / one.decode_s < 100  # a thousand sequences share what is read


def test_two_devices_halve_what_is_moved_and_exchange_sums() -> None:
    one, two = llama(), llama(devices=2)
    assert one.decode_s / 2 < two.decode_s < one.decode_s
    assert two.decode[-1].what == "sums over 2 devices" and two.decode[-1].count == 64
    assert two.capacity == 2 * one.capacity


def test_chunks_read_the_weights_again_and_hold_less() -> None:
    whole, chunked = llama(), llama(chunk=512)
    assert chunked.memory.activations < whole.memory.activations / 50
    assert whole.prefill_s < chunked.prefill_s < 1.5 * whole.prefill_s


def test_as_many_fit_as_leave_no_room_for_one_more() -> None:
    found = llama()
    assert found.fits and found.concurrency > 1
    held = llama(batch=found.concurrency).memory
    reading = found.memory.reading - found.memory.weights - found.memory.kv  # one of them is being read
    assert held.weights + held.kv + reading <= found.capacity < held.weights + held.kv + reading + found.sequence_nbytes
    none = llama(hardware="RTX-4090", context=131072)
    assert not none.fits and none.concurrency == 0
    assert llama("kivi").concurrency > 2 * found.concurrency


def test_a_switch_moves_two_caches_over_the_link() -> None:
    found = llama()
    assert found.switch_s == pytest.approx(2 * found.memory.kv / 64e9)
    assert llama(hardware="M4-Max").switch_s is None  # its memory is the host's
