"""The simulation of serving: queues are those of queueing theory, nothing is lost, and policies do what they change."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.cost.serving import (
    Alise,
    FastSwitch,
    Fixed,
    FlexLLM,
    LayeredPrefill,
    Lengths,
    Modelled,
    Policy,
    Server,
    Simulation,
    Workload,
    simulate,
)
from workbench.errors import BadParameter, NotApplicable

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1 << 17,
}  # fmt: skip
POLICIES = [
    Policy(), Policy(chunk=512), Alise(), FastSwitch(), FastSwitch(grouped=1, overlap=False, reuse=False),
    LayeredPrefill(), FlexLLM(),
]  # fmt: skip


class Tight(Modelled):
    """The same machine with room for few caches."""

    @property
    def room(self) -> float:  # type: ignore[override]
        return self.nbytes(9000)


@pytest.fixture(scope="module")
def machine() -> Tight:
    return Tight(wb.cost(LLAMA, "full", "H100", 4096))


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload.poisson(8, 60, Lengths(mean=1000, spread=1), Lengths(mean=80, spread=1), seed=3)


def waits(done: Simulation) -> list[float]:
    return list(done.requests()["wait_s"])


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_waits_of_one_server_are_those_of_an_m_d_1_queue(load: float) -> None:
    done = simulate(Fixed(reading=2.0), Workload.poisson(load / 2, 20000, 1, 1, seed=5), Policy(batch=1))
    want = load / (2 * (1 - load)) * 2.0  # rho / (2 mu (1 - rho))
    assert done.requests()["wait_s"].mean() == pytest.approx(want, rel=0.06)
    # And one by one: each waits until the one before it is done.
    free, expected = 0.0, []
    for request in done.workload.requests:
        expected.append(max(free - request.arrival, 0.0))
        free = max(free, request.arrival) + 2.0
    assert waits(done) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda policy: policy.label if hasattr(policy, "label") else policy.key
)
def test_nothing_is_lost_and_nobody_is_served_before_they_come(
    machine: Tight, workload: Workload, policy: Policy
) -> None:
    done = simulate(machine, workload, policy)
    frame = done.requests()
    assert frame["output"].sum() == workload.tokens == done.numbers()["tokens"]
    assert len(done.gaps) == workload.tokens - len(workload.requests) and min(done.gaps) > 0
    assert frame["wait_s"].min() >= 0 and (frame["first_token_s"] > frame["wait_s"]).all()
    assert (frame["done_s"] >= frame["first_token_s"]).all()
    for before, after in zip(done.iterations, done.iterations[1:], strict=False):
        assert before.end <= after.start  # one at a time
    assert max(each.held for each in done.iterations) <= machine.room
    assert simulate(machine, workload, policy).numbers() == done.numbers()  # the same each time


def test_an_iteration_takes_what_the_estimate_says(machine: Tight) -> None:
    cost = machine.cost
    assert machine.iteration(1, 4096) == pytest.approx(cost.decode_s, rel=1e-6)
    assert machine.iteration(0, 0, [(4096, 0)]) == pytest.approx(cost.prefill_s, rel=0.01)
    halves = machine.iteration(0, 0, [(2048, 0)]) + machine.iteration(0, 0, [(2048, 2048)])
    assert halves == pytest.approx(machine.iteration(0, 0, [(4096, 0)]), rel=0.03)


def test_chunks_shorten_the_longest_gap(machine: Tight, workload: Workload) -> None:
    whole, chunked = (simulate(machine, workload, Policy(chunk=chunk)).numbers() for chunk in (None, 256))
    assert chunked["gap_s"]["p99"] < whole["gap_s"]["p99"]


def test_shortest_first_waits_less_on_average_and_worse_predictions_cost() -> None:
    workload = Workload.poisson(0.09, 400, 1, Lengths(mean=10, spread=1.5), seed=2)
    machine = Fixed(step=1.0, room=1e9)
    first, shortest, blind = (
        simulate(machine, workload, policy).requests()["done_s"].mean()
        for policy in (Policy(batch=1), Alise(batch=1, error=0.0, ageing=0.0), Alise(batch=1, error=3.0, ageing=0.0))
    )
    assert shortest < blind < first * 1.3 and shortest < 0.7 * first


def test_large_copies_beside_the_computation_stall_less(machine: Tight, workload: Workload) -> None:
    fast, plain = (
        sum(each.stall for each in simulate(machine, workload, policy).iterations)
        for policy in (FastSwitch(every=0.2), FastSwitch(every=0.2, grouped=1, overlap=False, reuse=False))
    )
    assert 0 <= fast < 0.5 * plain


def test_a_request_that_never_fits_and_a_stage_that_nobody_serves_are_said(machine: Tight) -> None:
    with pytest.raises(NotApplicable, match="request 0 never fits"):
        simulate(machine, Workload.of([(0.0, 9500, 3)]))
    with pytest.raises(BadParameter, match="'read'"):
        simulate([Server("one", machine, Policy(), frozenset({"decode"}))], Workload.of([(0.0, 10, 3)]))
    with pytest.raises(BadParameter, match="rate"):
        Workload.poisson(0, 3, 10, 10)
    with pytest.raises(BadParameter, match="there is none"):
        Workload.of([])


def test_images_are_encoded_first_and_caches_go_from_pool_to_pool(machine: Tight) -> None:
    workload = Workload.poisson(2, 20, 500, 10, images=2)
    pools = [
        Server("encoder", machine, Policy(), frozenset({"encode"}), encoding=0.05),
        Server("prompts", machine, Policy(), frozenset({"read"}), send=lambda nbytes: nbytes / 50e9),
        Server("tokens", machine, Policy(), frozenset({"decode"})),
    ]
    done = simulate(pools, workload)
    assert done.requests()["output"].sum() == workload.tokens
    ran = {name: [each for each in done.iterations if each.server == name] for name in done.servers}
    assert len(ran["encoder"]) == 20 and not any(each.decoding for each in ran["prompts"])
    assert not any(each.reading for each in ran["tokens"])
    assert done.requests()["first_token_s"].min() > 0.1
