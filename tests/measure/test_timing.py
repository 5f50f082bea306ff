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


def test_the_watch_adds_up_by_name_even_when_the_work_fails():
    watch = Stopwatch()
    for _ in range(2):
        with watch("plan"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError), watch("read"):
        time.sleep(0.01)
        raise RuntimeError
    assert 0.02 <= watch.seconds["plan"] < 1 and 0.01 <= watch.seconds["read"] < 1


def test_the_watch_waits_for_cuda_only(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with Stopwatch("cpu")("plan"):
        pass
    assert waited == []
    with Stopwatch("cuda:1")("plan"):
        pass
    assert waited == [torch.device("cuda:1")] * 2
