"""The unit of work: one recipe on one case of a task, with one model, as one row of results."""

from __future__ import annotations

import hashlib
import platform
import socket
import time
from collections import OrderedDict
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import Cancelled, WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.results.schema import Row, canonical, key_of
from workbench.runtime.comparison import budget_of, told
from workbench.runtime.run import Question, Run
from workbench.runtime.task_evaluation import Answered, answered, encoding
from workbench.sweep.fingerprint import fingerprint
from workbench.sweep.measured import bytes_of, prompt_hash, quality_of, times_of
from workbench.version import __version__

if TYPE_CHECKING:
    from workbench.session import Session
    from workbench.tasks import Case, Task
    from workbench.trace import Trace

_KEPT_NBYTES = 1 << 30  # of readings by the plain model that are kept


class Bench:
    """A session on which recipes are measured, case by case; each prompt is read once for each weights and attention.

    session: its prompt and runs are replaced. chat, max_new_tokens: as `Session.evaluate` takes them. keep_text: store
    prompts, questions and replies as text; else hashes and token ids alone. study: what the rows belong to. Readings by
    the model as it is are kept up to 1 GiB, so that recipes may come in any order; those under other weights or
    attention for the newest case only, so recipes of the same weights and case should follow each other.
    """

    def __init__(
        self,
        session: Session,
        *,
        chat: bool | None = None,
        max_new_tokens: int | None = None,
        keep_text: bool = True,
        study: str | None = None,
    ) -> None:
        self.session = session
        self.encode = encoding(session.tokenizer)
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.keep_text = keep_text
        self.study = study
        self._cases: dict[tuple[Task, int], Case | WorkbenchError] = {}
        self._read: OrderedDict[tuple[Any, bool | None], Trace] = OrderedDict()

    @property
    def readings(self) -> int:
        """How many times a prompt was read so far, under any weights and attention."""
        return self.session.readings.count

    @cached_property
    def fingerprint(self) -> str:
        """What tells the model from others."""
        return fingerprint(self.session.model, self.session.tokenizer)

    def key(self, recipe: Recipe, task: Task, number: int = 0) -> str:
        """The key of a row, before anything is run: task.case(number) under a recipe, budget included."""
        return key_of(
            {
                "model": self.fingerprint,
                "recipe": recipe.to_dict(),
                "task": task.key,
                "case": self.case_hash(task, number),
                "settings": self._settings,
                "device": self.session.model.device.type,
                "versions": [__version__, torch.__version__.partition("+")[0], _transformers()],
            }
        )

    def case_hash(self, task: Task, number: int = 0) -> str:
        """What tells a case from others: its number and all that is in it, or what is wrong with it."""
        case = self._case(task, number)
        said = str(case) if isinstance(case, WorkbenchError) else asdict(case)
        return key_of({"number": task.seed + number, "case": said})

    def row(self, recipe: Recipe, task: Task, number: int = 0, progress: Progress | None = None) -> Row:
        """Measure a recipe, budget included, on a case. What goes wrong is a row whose `error` says why; raises
        Cancelled only.
        """
        progress, began = progress or Progress(), time.perf_counter()
        row = self.about(recipe, task, number)
        try:
            case = self._case(task, number)
            if isinstance(case, WorkbenchError):
                raise case  # noqa: TRY301  told like whatever else goes wrong
            trace = self._reading(case, progress)
            row |= self._of_case(case, trace)
            done = answered(
                case, trace, self._runner(progress), recipe, self.session.tokenizer, self.max_new_tokens, progress
            )
            row |= self._measured(done) | {"status": "done"}
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001  one that fails must not take the others with it
            row |= {"status": "failed", "error": told(error)}
        return row | {"wall_s": time.perf_counter() - began}

    def about(self, recipe: Recipe, task: Task, number: int = 0) -> Row:
        """What is known of a row before it is measured."""
        session = self.session
        device = session.model.device
        return {
            "key": self.key(recipe, task, number),
            "study": self.study,
            "model": session.source,
            "model_fingerprint": self.fingerprint,
            "recipe": recipe.label,
            "recipe_json": recipe.to_dict(),
            **{name: "+".join(m.key for m in recipe.family(name)) or None for name in ("kv", "attention", "weights")},
            "budget": None if (budget := budget_of(recipe)) is None else str(budget),
            "task": task.label,
            "task_json": {"task": task.key, **task.model_dump(mode="json")},
            "case_number": task.seed + number,
            "settings": self._settings,
            "versions": {
                "workbench": __version__,
                "torch": torch.__version__,
                "transformers": _transformers(),
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "host": socket.gethostname(),
            "started": datetime.now(UTC).replace(tzinfo=None),
        }

    @cached_property
    def _settings(self) -> dict[str, Any]:
        session = self.session
        calibration = session.calibration
        return {
            "kv_dtype": str(session.kv_dtype).removeprefix("torch."),
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
            "graphs": session.graphs,
            "calibration": None if calibration is None else calibration.to_dict(),
        }

    def _case(self, task: Task, number: int) -> Case | WorkbenchError:
        if (task, number) not in self._cases:
            try:
                self._cases[task, number] = task.case(self.encode, number)
            except WorkbenchError as error:
                self._cases[task, number] = error
        return self._cases[task, number]

    def prompt(self, task: Task, number: int = 0) -> Any:
        """What tells the prompt of a case from others, as it is read; None where there is no case."""
        case = self._case(task, number)
        return None if isinstance(case, WorkbenchError) else case.as_read(self.chat)

    def forget(self, prompt: Any) -> None:
        """Let go of a prompt's readings: no other row needs them."""
        self._read.pop(prompt, None)

    def read(self, task: Task, number: int = 0, progress: Progress | None = None) -> Trace:
        """The reading of a case by the model as it is. Raises what is wrong with the case, or its text."""
        case = self._case(task, number)
        if isinstance(case, WorkbenchError):
            raise case
        return self._reading(case, progress or Progress())

    def _reading(self, case: Case, progress: Progress) -> Trace:
        """The reading of a case by the model as it is, with which the session goes on."""
        prompt = case.as_read(self.chat)
        known, there = self._read.get(prompt), self.session.trace
        if known is None:
            known = self.session.read(prompt[0], chat=prompt[1], progress=progress)
            self._read[prompt] = known
            while len(self._read) > 1 and sum(trace.nbytes for trace in self._read.values()) > _KEPT_NBYTES:
                self._read.popitem(last=False)
        if known is not there:
            self.session.restore(known, [])  # what was measured of runs on other prompts goes
        self._read.move_to_end(prompt)
        return known

    def _runner(self, progress: Progress) -> Any:
        def run(recipe: Recipe, question: Question, max_new_tokens: int) -> Run:
            return self.session.run(recipe, question=question, max_new_tokens=max_new_tokens, progress=progress)

        return run

    def _of_case(self, case: Case, trace: Trace) -> Row:
        text = case.text if isinstance(case.text, str) else None
        row: Row = {"prompt_tokens": trace.tokens, "prompt_hash": prompt_hash(trace)}
        if self.keep_text:
            row |= {"prompt": text, "question": case.question, "expected": canonical(case.answers)}
        return row

    def _measured(self, done: Answered) -> Row:
        run, plan, figures = done.run, done.run.plan, done.figures
        kept = hashlib.sha256(str(tuple(plan.tiers.shape)).encode() + plan.tiers.cpu().numpy().tobytes())
        row: Row = {
            **bytes_of(run, self.session.readings.variants),
            **quality_of(figures),
            "kept_hash": kept.hexdigest()[:32],
            "notes": list(run.notes),
            "read_s": plan.read_seconds,
            "plan_s": run.timing.plan_s,
        }
        if done.text is None:
            return row
        row |= {
            "tokens": list(run.tokens),
            "first_divergence": figures.first_divergence,
            "correct": done.right,
            "full_correct": done.full_right,
            "score": done.score,
            "full_score": done.full_score,
            **times_of(run),
        }
        return row | ({"text": done.text, "full_text": done.full_text} if self.keep_text else {})


def _transformers() -> str:
    from importlib.metadata import version

    return version("transformers")
