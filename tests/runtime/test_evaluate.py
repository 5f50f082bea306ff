"""The comparison with the full cache: what it reads, and where it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import workbench as wb
from workbench.core.memo import Memo
from workbench.progress import Progress
from workbench.runtime.decode import Decoder
from workbench.runtime.evaluate import reference, teacher_forcing
from workbench.runtime.greedy import greedy


def read(model: PreTrainedModel) -> wb.Session:
    session = wb.Session((model, None))
    session.read(torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(0)))
    return session


@pytest.mark.parametrize("asked", [[], [7, 3, 9]])
def test_the_reference_is_the_full_answer_as_teacher_forcing_reads_it(
    tiny_llama: PreTrainedModel, asked: list[int]
) -> None:
    session = read(tiny_llama)
    trace, ids = session.trace, torch.tensor(asked, dtype=torch.long)
    assert trace is not None
    plan = session.plan("full")
    made: list[Decoder] = []

    def decoder() -> Decoder:
        made.append(Decoder(session.model, plan.stores(), plan.position))
        return made[-1]

    found = reference(trace, decoder, ids, 9, (), Progress())
    assert len(made) == 1, "read once"
    answer = list(greedy(decoder(), ids, trace.logits, max_new_tokens=9, eos=()))
    assert list(found.tokens) == answer and found.logits.shape[0] == 9
    logits, outputs = teacher_forcing(decoder(), trace.logits, ids, torch.tensor(answer))
    torch.testing.assert_close(found.logits, logits, atol=0, rtol=0)
    assert all(torch.equal(one, other) for one, other in zip(found.outputs, outputs, strict=True))
    end = answer[4]
    short = reference(replace(trace, memo=Memo()), decoder, ids, 9, (end,), Progress())
    assert list(short.tokens) == answer[: answer.index(end) + 1]
    assert len(short.logits) == len(short.tokens)


def test_the_full_cache_is_compared_with_itself_without_a_difference(tiny_llama: PreTrainedModel) -> None:
    session = read(tiny_llama)
    for tokens in (5, 24):  # read by modules, and as fast as the model allows
        run: Any = session.run("full", max_new_tokens=tokens)
        assert run.quality.kl == 0 and run.quality.first_divergence is None
        assert not run.verdict.output_error.any()
