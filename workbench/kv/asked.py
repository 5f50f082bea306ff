"""The words of a question, without what a chat template puts after them."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.prompt import Prompt


def asked(prompt: Prompt, question: Tensor) -> Tensor:
    """The ids [q] of what is asked in question [q'] of this prompt: the template's own last tokens are left out."""
    templated = prompt.chat and prompt.tokenizer is not None
    after = prompt.question_ids(None, prompt.tokenizer) if templated else question[:0]
    ends = 0 < len(after) < len(question) and torch.equal(question[-len(after) :], after)
    return question[: -len(after)] if ends else question
