"""Figures of estimates and simulations show what they are given, every iteration and every device."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb
from workbench.cost.serving import Fixed, Policy, Server, Simulation, Workload, simulate
from workbench.cost.targets import targets
from workbench.display import bundles
from workbench.errors import BadParameter
from workbench_widgets import cost_figures


@pytest.fixture(scope="module")
def done() -> Simulation:
    servers = [Server(name, Fixed(reading=0.2, step=0.1), Policy(batch=4)) for name in ("one", "two<b>")]
    return simulate(servers, Workload.poisson(3, 40, 10, 5, seed=1))


def test_each_iteration_is_a_bar_of_its_length_in_its_servers_row(done: Simulation) -> None:
    figure, frame = cost_figures.gantt(done), done.timeline()
    assert sum(len(trace.x) for trace in figure.data) == len(frame)
    assert sum(np.sum(trace.x) for trace in figure.data) == pytest.approx((frame["end"] - frame["start"]).sum())
    assert {trace.name for trace in figure.data} == {"reading", "decoding"}
    assert "two&lt;b&gt;" in str(figure.data[0].y)  # a name is no markup


def test_queues_and_caches_are_those_of_the_timeline(done: Simulation) -> None:
    waiting, decoding = cost_figures.queue(done, dark=True).data
    assert list(waiting.y) == list(done.timeline()["queue"]) and max(decoding.y) <= 4
    caches = cost_figures.occupancy(done)
    assert len(caches.data) == 2
    assert max(max(trace.y) for trace in caches.data) * 2**30 == pytest.approx(done.timeline()["held"].max(), rel=0.3)


def test_memory_has_a_bar_for_each_part() -> None:
    told = wb.cost("workbench-tiny", "kivi", context=100)
    (bars,) = cost_figures.memory(told).data
    assert dict(zip(bars.x, bars.y, strict=True))["KV"] == pytest.approx(told.memory.kv / 2**30)


def test_promises_cost_less_the_longer_they_are() -> None:
    frame = targets("workbench-tiny", {"H100": 7.5, "L40S": 1.9}, (1e-9, 0.001, 0.01), context=1000)
    assert frame["batch"].is_monotonic_increasing or len(set(frame["hardware"])) == 2
    for _, rows in frame.groupby("hardware"):
        assert rows["batch"].iloc[0] == 0 and rows["dollars_per_million"].isna().iloc[0]
        assert rows["dollars_per_million"].iloc[1] >= rows["dollars_per_million"].iloc[2]
        kept = rows[rows["batch"] > 0]
        assert (kept["batch"] / kept["tokens_per_s"] <= kept["promised_s"] * (1 + 1e-9)).all()
    assert len(cost_figures.promises(frame).data) == 2
    with pytest.raises(BadParameter, match="name a device"):
        targets("workbench-tiny", [])


def test_estimates_and_simulations_show_themselves_in_a_notebook(done: Simulation) -> None:
    (first,) = bundles(wb.cost("workbench-tiny", context=100))
    assert "application/vnd.plotly.v1+json" in first and "decode" in first["text/plain"]
    assert len(bundles(done)) == 3
