"""A task under recipes: one row a case and recipe, each prompt read once.

Every row says what the recipe's reply is worth, and what the uncompressed model's reply to the same case is worth: a
recipe that is wrong where the model itself is wrong has lost nothing, and one that is right there has been lucky.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench import arguments
from workbench.errors import BadPrompt, Cancelled
from workbench.progress import Progress
from workbench.prompt import text_ids
from workbench.recipe import Recipe
from workbench.runtime.comparison import COLUMNS, Comparison, failed_row, row_of
from workbench.tasks import Case, Encode, Task, find

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from workbench.measure.quality import Quality
    from workbench.prompt import Text
    from workbench.runtime.comparison import Row
    from workbench.runtime.run import Question, Run
    from workbench.trace import Trace

TASK_COLUMNS = (
    *("task", "case", "tokens", "question", "expected", "right", "full_right", "score", "full_score", "full_text"),
    *COLUMNS,
)
_NOTHING = dict.fromkeys(TASK_COLUMNS)


def task_of(task: Task | str, **parameters: Any) -> Task:
    """A task as it stands, or by its key. Raises UnknownTask, BadParameter."""
    return task if isinstance(task, Task) else find(task)(**parameters)


def encoding(tokenizer: PreTrainedTokenizerBase | None) -> Encode:
    """How many tokens a text has and which, as the session's tokenizer reads it by itself. Raises BadPrompt."""
    if tokenizer is None:
        raise BadPrompt("tasks are texts, and this session reads token ids only: give it a tokenizer")
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Answered:
    """A recipe's run on a case, its cache released, and what its reply and the uncompressed model's are worth.

    Where a given text is predicted in place of a reply there are neither replies nor verdicts.
    """

    run: Run
    figures: Quality
    text: str | None = None
    full_text: str | None = None
    right: bool | None = None
    full_right: bool | None = None
    score: float | None = None
    full_score: float | None = None


def answered(
    case: Case,
    trace: Trace,
    run: Callable[[Recipe, Question, int], Run],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    reply_tokens: int | None,
    progress: Progress,
) -> Answered:
    """Run a recipe on a case that was read into `trace`, and compare it with the uncompressed model.

    run: of a recipe, with what is asked and the longest reply. reply_tokens: the longest reply (None: the case's own).
    """
    if case.continuation:
        finished = run(recipe, None, 1)
        figures = finished.measure(torch.tensor(case.continuation), progress=progress).figures
        finished.release()
        return Answered(finished, figures)
    asked = asked_ids(case, trace, tokenizer)
    finished = run(recipe, asked, reply_tokens or case.reply_tokens)
    reference = finished.measure(progress=progress).reference
    finished.release()
    plain = "" if tokenizer is None else str(tokenizer.decode(list(reference), skip_special_tokens=True))
    verdicts = (case.right(finished.text), case.right(plain), case.score(finished.text), case.score(plain))
    return Answered(finished, finished.quality, finished.text, plain, *verdicts)


@dataclass(frozen=True)
class TaskEvaluation:
    """What is evaluated: cases of a task, under each of a comparison's recipes at its budgets.

    numbers: of the cases. chat: whether texts are wrapped in the chat template (None: where there is one, but for texts
    that the reply continues). reply_tokens: the longest reply (None: as the task says).
    """

    task: Task
    comparison: Comparison
    numbers: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None
    chat: bool | None = None
    reply_tokens: int | None = None

    @classmethod
    def of(
        cls,
        task: Task | str,
        comparison: Comparison,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        cases: int | None = None,
        chat: bool | None = None,
        max_new_tokens: int | None = None,
    ) -> TaskEvaluation:
        """cases: as `Task.count` reads it. Raises UnknownTask, BadParameter, BadPrompt."""
        chosen = task_of(task)
        encoding(tokenizer)
        if chat is not None:
            arguments.flag("chat", chat)
        if max_new_tokens is not None:
            arguments.whole("max_new_tokens", max_new_tokens, 1, arguments.MOST_TOKENS)
        return cls(chosen, comparison, tuple(range(chosen.count(cases))), tokenizer, chat, max_new_tokens)

    def rows(
        self,
        read: Callable[[Text, bool | None], Trace],
        run: Callable[[Recipe, Question, int], Run],
        progress: Progress,
    ) -> Iterator[Row]:
        """One row a case and recipe, as soon as it is measured; of what fails its `error` says why.

        read: takes a prompt in, with or without its chat template. run: a recipe on it, with what is asked and the
        longest reply. A text that follows itself, as in conversations with many questions, is read once.
        """
        encode, reading = encoding(self.tokenizer), _Reading(read)
        recipes = self.comparison.cases
        for done, number in enumerate(self.numbers):
            about: Row = {"task": self.task.label, "case": self.task.seed + number}
            progress.update("evaluating", done, len(self.numbers))
            try:
                case = self.task.case(encode, number)
                trace = reading.of(case, self.chat)
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001  one case that fails must not take the others with it
                yield from ({**_NOTHING, **about, **failed_row(*each, error)} for each in recipes)
                continue
            about |= {"tokens": trace.tokens, "question": case.question, "expected": ", ".join(case.answers) or None}
            for recipe, budget in recipes:
                try:
                    row = self._row(case, trace, run, Recipe.of(recipe, budget=budget), progress)
                except Cancelled:
                    raise
                except Exception as error:  # noqa: BLE001  nor one recipe
                    row = failed_row(recipe, budget, error)
                yield {**_NOTHING, **about, **row}
        progress.update("evaluating", len(self.numbers), len(self.numbers))

    def _row(
        self, case: Case, trace: Trace, run: Callable[[Recipe, Question, int], Run], recipe: Recipe, progress: Progress
    ) -> Row:
        done = answered(case, trace, run, recipe, self.tokenizer, self.reply_tokens, progress)
        verdicts = {"right": done.right, "full_right": done.full_right, "score": done.score}
        beside = {"text": done.text, "full_score": done.full_score, "full_text": done.full_text}
        return {**row_of(done.run, done.figures), **verdicts, **beside}


class _Reading:
    """The prompt that was read last."""

    def __init__(self, read: Callable[[Text, bool | None], Trace]) -> None:
        self._read = read
        self._last: tuple[str | tuple[int, ...], bool | None, Trace] | None = None

    def of(self, case: Case, chat: bool | None) -> Trace:
        prompt = case.as_read(chat)
        if self._last is None or self._last[:2] != prompt:
            self._last = None  # it must not outlive a reading that fails
            self._last = (*prompt, self._read(*prompt))
        return self._last[2]


def asked_ids(case: Case, trace: Trace, tokenizer: Any) -> Question:
    """What is read after the text [q]: the question as the chat template or plain text has it, and the reply's lead."""
    if trace.prompt.chat:
        asked = trace.prompt.question_ids(case.question, tokenizer)
        return torch.cat([asked, text_ids(case.lead, tokenizer)]) if case.lead else asked
    if case.goes_on or (case.question is None and not case.lead):
        return None
    question = "" if case.question is None else f"\n\nQuestion: {case.question}\nAnswer:"
    return f"{question} {case.lead}".rstrip()
