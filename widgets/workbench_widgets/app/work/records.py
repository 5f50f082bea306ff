"""What a page remembers of its runs: figures in the columns of `workbench.results`, answers, pages they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.recipe import Recipe
from workbench.runtime.comparison import budget_of, told
from workbench.runtime.run import Run
from workbench.session import Session
from workbench.sweep.measured import bytes_of, prompt_hash, quality_of, times_of
from workbench.tasks.base import Case
from workbench_widgets import present
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.state.recipe_slots import RECIPE_SLOTS, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP = ("model", "prompt_hash", "question")  # only what these have in common can be compared
COLUMNS = (
    *(
        "run",
        "name",
        "status",
        "model",
        "prompt",
        "prompt_hash",
        "prompt_tokens",
        "question",
        "turn",
        "after",
        "recipe",
    ),
    *("recipe_json", "kv", "attention", "weights", "budget", "kv_nbytes", "kv_full_nbytes", "kv_share"),
    *("kv_host_nbytes", "state_nbytes", "weight_nbytes", "weight_deployed_nbytes", "total_nbytes"),
    *("deployed_nbytes", "peak_nbytes", "score_share", "kl", "kl_max", "top1", "nll", "nll_reference"),
    *("nll_difference", "perplexity", "first_divergence", "first_token_s", "decode_s", "tokens_per_s"),
    *("expected", "correct", "full_correct", "text", "full_text", "error", "pinned", "note"),
)
_TITLE = 60  # characters of a text by which a person knows it


@dataclass(frozen=True)
class Asked:
    """What a run answers, and how it is judged: question (None: the text goes on), expected answer, longest reply.

    page: the state of the page that asks.
    """

    question: str | None
    max_new_tokens: int
    expected: str = ""
    page: PageState = field(default_factory=PageState)

    def under(self, recipe: Recipe) -> Asked:
        """The same, asked of another recipe than the page's."""
        return replace(self, page=replace(self.page, **parts_of(recipe)))

    def right(self, reply: str) -> bool | None:
        """Whether a reply holds the expected answer, whatever its case; None where none is expected."""
        return Case("", answers=(self.expected,)).right(reply) if self.expected else None


@dataclass(frozen=True)
class Record:
    """A run as the page keeps it.

    row: `COLUMNS`. answers: the uncompressed one and the recipe's, as text token by token. page: by which it can be had
    again. run: the run itself as long as its prompt is the one that was read last.
    """

    row: Mapping[str, Any]
    page: PageState
    answers: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    run: Run | None = None

    @property
    def number(self) -> int:
        return int(self.row["run"])

    @property
    def label(self) -> str:
        """What it is called: its own name, or its recipe."""
        return str(self.row["name"] or self.row["recipe"])

    @property
    def group(self) -> tuple[str, str, str]:
        """What a run must share with this one to be compared with it."""
        model, prompt, question = (str(self.row[name] or "") for name in GROUP)
        return model, prompt, question

    def changed(self, **values: Any) -> Record:
        """The same with other values of the row."""
        return replace(self, row={**self.row, **values})

    def beside(self, own: Run, tokenizer: PreTrainedTokenizerBase | None, asked: Asked) -> Record:
        """The same beside what the uncompressed model answered after its own earlier answers."""
        changed = self.changed(full_text=own.text, full_correct=asked.right(own.text))
        answers = (tuple(present.pieces(tokenizer, own.tokens)), self.answers[1])
        parts = next((i for i, (a, b) in enumerate(zip_longest(*answers)) if a != b), None)
        return replace(changed.changed(first_divergence=parts), answers=answers)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"row": dict(self.row), "page": self.page.to_dict(), "answers": [list(part) for part in self.answers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """What `to_dict` wrote. Raises KeyError, TypeError or ValueError for what is none."""
        row = {name: data["row"].get(name) for name in COLUMNS}
        uncompressed, compressed = (tuple(map(str, part)) for part in data["answers"])
        Recipe.from_dict(row["recipe_json"])
        int(row["run"])
        return cls(row, PageState.from_dict(data["page"]), (uncompressed, compressed))


def _title(page: PageState, text: str) -> str:
    from workbench.examples import example

    if page.example:
        return example(page.example).title
    line = " ".join(text.split())
    return line if len(line) <= _TITLE else f"{line[:_TITLE]} …"


def _about(session: Session, model: str, asked: Asked, recipe: Recipe) -> dict[str, Any]:
    trace = session.readings.of_prompt()
    budget = budget_of(recipe)
    return dict.fromkeys(COLUMNS) | {
        "model": model,
        "prompt": _title(asked.page, asked.page.text),
        "prompt_hash": prompt_hash(trace),
        "prompt_tokens": trace.tokens,
        "question": asked.question or "",
        "turn": 1,
        "recipe": recipe.label,
        "recipe_json": recipe.to_dict(),
        **{name: "+".join(m.key for m in recipe.family(name)) or None for name in ("kv", "attention", "weights")},
        "budget": None if budget is None else str(budget),
        "expected": asked.expected,
        "pinned": False,
    }


def record_of(session: Session, model: str, asked: Asked, run: Run, before: Record | None = None) -> Record:
    """A measured run on what `session` has read. before: the record of the run that it goes on from."""
    evaluation = run.verdict
    tokenizer = session.tokenizer
    full = "" if tokenizer is None else str(tokenizer.decode(list(evaluation.reference), skip_special_tokens=True))
    row = _about(session, model, asked, run.recipe) | {
        "status": "done",
        **bytes_of(run, session.readings.variants),
        **quality_of(evaluation.figures),
        **times_of(run),
        "first_divergence": evaluation.figures.first_divergence,
        "text": run.text,
        "full_text": full,
        "correct": asked.right(run.text),
        "full_correct": asked.right(full),
    }
    if before is not None:  # what was asked before is a part of what is asked
        row["turn"], row["after"] = before.row["turn"] + 1, before.number
        row["question"] = f"{before.row['question']} → {row['question']}"
    pieces = partial(present.pieces, tokenizer)
    return Record(row, asked.page, (tuple(pieces(evaluation.reference)), tuple(pieces(run.tokens))), run)


def failed(session: Session, model: str, asked: Asked, recipe: Recipe, error: Exception) -> Record:
    """Why there is no run of a recipe."""
    return Record(_about(session, model, asked, recipe) | {"status": "failed", "error": told(error)}, asked.page)


def frame_of(records: Sequence[Record]) -> pd.DataFrame:
    """The records as a table, a row each."""
    return pd.DataFrame([record.row for record in records], columns=list(COLUMNS))


def differences(record: Record, page: PageState) -> str:
    """What of a page's settings is other than when a run was made, in one sentence; empty where nothing is."""
    made = record.page
    prompt = (made.model, made.example, made.text) != (page.model, page.example, page.text)
    names = (*RECIPE_SLOTS, "values", "budget", "weights_budget")
    recipe = any(getattr(made, name) != getattr(page, name) for name in names)
    other = []
    if prompt:
        other.append(f"another text or model ({record.row['prompt']}, {record.row['model']})")
    if recipe:
        other.append(record.row["recipe"])
    if made.question != page.question:
        other.append(f"the question “{record.row['question']}”" if record.row["question"] else "no question")
    if made.tokens != page.tokens:
        other.append(f"at most {made.tokens:,} tokens")
    return f"This answer was made with {' and '.join(other)}." if other else ""
