"""Systems from the literature as models: each runs, says that it is a model, and shows its idea's direction."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workbench.cost import system, systems
from workbench.cost.literature import SYSTEMS, Outcome
from workbench.errors import BadParameter

FEW: dict[str, dict[str, Any]] = {  # smaller than the defaults, for time
    "apex": {"requests": 12},
    "epd": {"requests": 60},
    "polca": {"servers": 3, "requests": 10},
    "runtime-dissection": {"context": 256},
    "serving-hyperparameters": {"requests": 20},
    "idealized-runtime": {"requests": 20},
    "melange": {"slices": 1},
    "meta-accel": {"models": 1},
    "splitwise": {"requests": 30, "rate": 8.0},
    "flexllm": {"requests": 15},
    "layered-prefill": {"requests": 20},
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {}


def run(key: str, outcomes: dict[str, Outcome]) -> Outcome:
    if key not in outcomes:
        outcomes[key] = system(key, **FEW.get(key, {}))
    return outcomes[key]


def figures(found: Outcome) -> dict[str, dict[str, Any]]:
    return {str(row["figure"]): dict(row) for row in found.rows}


@pytest.mark.parametrize("key", list(SYSTEMS))
def test_a_system_runs_and_says_that_it_is_a_model(key: str, outcomes: dict[str, Outcome]) -> None:
    found = run(key, outcomes)
    told = json.loads(json.dumps(found.numbers(), allow_nan=False))
    assert told["kind"] == "model" and told["claim"] == SYSTEMS[key].claim and told["rows"]
    assert "(a model)" in found.summary() and SYSTEMS[key].claim in found.summary()
    assert len(found.frame()) == len(found.rows)


def test_layered_prefill_reads_experts_once_and_answers_sooner(outcomes: dict[str, Outcome]) -> None:
    found = figures(run("layered-prefill", outcomes))
    assert found["experts read for prompts (GB)"]["times"] > 3
    assert found["first_token_s mean"]["times"] > 1.2


def test_switches_in_groups_stall_less(outcomes: dict[str, Outcome]) -> None:
    assert figures(run("fastswitch", outcomes))["stalled by swaps (s)"]["times"] > 5


def test_shortest_first_is_done_sooner_on_average(outcomes: dict[str, Outcome]) -> None:
    assert figures(run("alise", outcomes))["done_s mean"]["times"] > 1


def test_separate_machines_keep_prompts_out_of_decoding(outcomes: dict[str, Outcome]) -> None:
    assert figures(run("epd", outcomes))["gap_s p99"]["times"] > 3


def test_a_mixture_is_never_dearer_than_one_kind(outcomes: dict[str, Outcome]) -> None:
    rows = run("melange", outcomes).rows
    assert all(rows[0]["dollars an hour"] <= row["dollars an hour"] * 1.02 for row in rows[1:])


def test_what_is_learnt_from_other_devices_is_no_worse_than_one_for_all(outcomes: dict[str, Outcome]) -> None:
    best, learnt, one, none = (float(row["all tasks (s)"]) for row in run("meta-accel", outcomes).rows)
    assert best <= learnt <= one < none and one > 1.02 * best  # there is something to choose


def test_a_device_that_asks_a_server_lies_between_the_two(outcomes: dict[str, Outcome]) -> None:
    alone, both, server = (float(row["an answer (s)"]) for row in run("crayon", outcomes).rows)
    assert min(alone, server) < both < max(alone, server)
    assert "MB are blended" in run("crayon", outcomes).note


def test_no_way_is_faster_than_the_bound(outcomes: dict[str, Outcome]) -> None:
    assert [row["over the bound"] >= 1 for row in run("flashformer", outcomes).rows] == [True, True, True]
    rows = run("toploc", outcomes).rows
    assert rows[0]["with"] == 1024 // 32 * 258  # bytes, as the paper has them


def test_a_tree_beats_a_ring_by_more_the_more_devices_there_are(outcomes: dict[str, Outcome]) -> None:
    times = [float(row["times"]) for row in run("tree-attention", outcomes).rows]
    assert times == sorted(times) and times[-1] > 2
    assert all(1 <= float(row["times"]) <= 2 for row in run("burst-attention", outcomes).rows)


def test_unknown_systems_and_parameters_are_said() -> None:
    with pytest.raises(BadParameter, match="did you mean splitwise"):
        system("splitwize")
    with pytest.raises(BadParameter, match="did you mean 'requests'"):
        system("alise", request=3)
    assert set(systems()["key"]) == set(SYSTEMS)
