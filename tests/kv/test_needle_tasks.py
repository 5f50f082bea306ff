"""Needle tasks: where their answers stand, and what they ask."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from workbench.kv.needle_tasks import needle_tasks
from workbench.models import tiny


def test_needles_of_text_stand_where_they_are_said_to(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    for reasoning in (False, True):
        for task in needle_tasks(model, byte_tokenizer, 4, 300, reasoning=reasoning):
            needle = task.ids[task.start : task.start + len(task.answer)]
            assert torch.equal(needle, task.answer)
            assert torch.equal(task.ids[-len(task.answer) + 1 :], task.answer[:-1])
            text = str(byte_tokenizer.decode(task.ids))
            assert text.count("The secret number of the") == (3 if reasoning else 2)
            assert ("older" in text) == reasoning and "\nAnswer:" in text
