"""Timing: what the figures mean, and that the watch adds up."""

from __future__ import annotations

import json
import time

import pytest
import torch

from workbench.measure import Stopwatch, Timing


def test_speed_counts_the_tokens_after_the_first():
    timing = Timing(read_s=2.0, plan_s=0.01, first_token_s=0.1, decode_s=0.5, tokens=11)
    assert timing.tokens_per_s == pytest.approx(20.0)
    assert json.loads(json.dumps(timing.to_dict()))["tokens_per_s"] == pytest.approx(20.0)


@pytest.mark.parametrize("timing", [Timing(), Timing(tokens=1), Timing(tokens=5)])
def test_nothing_decoded_has_no_speed(timing):
    assert timing.tokens_per_s == 0.0


def test_the_watch_adds_up_by_name_even_when_the_work_fails(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(2):
        with watch("plan"):
            pass
    with pytest.raises(RuntimeError), watch("read"):
        raise RuntimeError
    assert watch.seconds == {"plan": 3.0, "read": 4.0}


def test_the_watch_waits_for_cuda_only(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with Stopwatch("cpu")("plan"):
        pass
    assert waited == []
    with Stopwatch("cuda:1")("plan"):
        pass
    assert waited == [torch.device("cuda:1")] * 2
