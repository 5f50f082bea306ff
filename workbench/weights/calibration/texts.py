"""Which text weight methods look at while they compress, and how much of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench import arguments
from workbench.errors import InputError
from workbench.files.paths import place, regular
from workbench.formatting import quoted
from workbench.models import max_positions
from workbench.weights.calibration.sampled_texts import sampled_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED, PYTHON, SAMPLED = "workbench", "python", "sampled"
_LARGEST = 1 << 30  # bytes of a text or a data set


@dataclass(frozen=True)
class Calibration:
    """Texts that stand for what a model will read.

    source: "workbench", the text that ships with the project (prose, dialogue, code and documentation in its own
    words); "python", the running Python's documentation of its topics; "sampled", what the model itself says; or the
    path of a text file, or of a data set: .txt, .md, .jsonl (the field "text" of each line) or .parquet (the column
    "text"). samples: how many stretches, taken evenly from all over the text. tokens: length of each, at most the
    model's positions.
    """

    source: str = SHIPPED
    samples: int = 32
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("samples", 1, 2**20), ("tokens", 8, 2**31 - 1), ("seed", 0, 2**63 - 1)):
            arguments.whole(f"calibration: {name}", getattr(self, name), low, high)

    def text(self) -> str:
        """The whole text. Raises InputError where it cannot be read."""
        if self.source == SHIPPED:
            return (files("workbench.weights.calibration") / "calibration.txt").read_text(encoding="utf-8")
        if self.source == PYTHON:
            try:
                from pydoc_data.topics import topics
            except ImportError as error:
                raise InputError("calibration: this Python comes without its documentation's topics") from error
            return "\n\n".join(topics[name].strip() for name in sorted(topics))
        return _read(self.source)

    def ids(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """Token ids int64 [t, n], on the CPU: `samples` stretches, fewer where the text is shorter.

        Without a tokenizer, or from the source "sampled", they are what the model itself says.
        """
        tokens = min(self.tokens, max_positions(model))
        if tokenizer is None or self.source == SAMPLED:
            return sampled_texts(model, self.samples, tokens, self.seed).cpu().clone()  # no longer an inference tensor
        ids = tokenizer(self.text(), add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        stretches = min(self.samples, ids.numel() // tokens)
        if stretches < 1:
            raise InputError(
                f"calibration: {self.source!r} has {ids.numel()} tokens, fewer than one stretch of {tokens}: give a "
                "longer text or fewer tokens"
            )
        starts = torch.linspace(0, ids.numel() - tokens, stretches, dtype=torch.float64).long()
        stretched: Tensor = ids[starts[:, None] + torch.arange(tokens)]
        return stretched

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; read back by `Calibration(**it)`."""
        return {"source": self.source, "samples": self.samples, "tokens": self.tokens, "seed": self.seed}


def key_of(ids: Tensor) -> str:
    """What names these token ids in the cache."""
    return hashlib.sha256(ids.numpy().tobytes() + str(tuple(ids.shape)).encode()).hexdigest()[:16]


def _read(source: str) -> str:
    try:
        path = regular(place(source), _LARGEST)
        if path.suffix == ".parquet":
            import pandas as pd

            return "\n\n".join(pd.read_parquet(path, columns=["text"])["text"].astype(str))
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            import json

            return "\n\n".join(str(json.loads(line)["text"]) for line in text.splitlines() if line.strip())
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(
            f"calibration: cannot read {quoted(source, 200)} ({reason}); give {SHIPPED!r}, {PYTHON!r}, {SAMPLED!r}, or "
            "a .txt, .md, .jsonl or .parquet file in UTF-8"
        ) from error
    else:
        return text
