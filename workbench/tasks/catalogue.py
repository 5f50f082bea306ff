"""The kinds of tasks by their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownTask
from workbench.formatting import quoted
from workbench.parameters import closest
from workbench.tasks.base import Task
from workbench.tasks.kinds.chain import Chain
from workbench.tasks.kinds.code import Code
from workbench.tasks.kinds.common_words import CommonWords
from workbench.tasks.kinds.dialogue import Dialogue
from workbench.tasks.kinds.gsm8k import GSM8K
from workbench.tasks.kinds.locomo import LoCoMo
from workbench.tasks.kinds.multi_key import MultiKey
from workbench.tasks.kinds.multi_value import MultiValue
from workbench.tasks.kinds.needle import Needle
from workbench.tasks.kinds.perplexity import Perplexity
from workbench.tasks.kinds.prompts import Prompts
from workbench.tasks.kinds.questions import Questions
from workbench.tasks.kinds.ruler import RULER
from workbench.tasks.kinds.variable_tracking import VariableTracking

if TYPE_CHECKING:
    import pandas as pd

KINDS: tuple[type[Task], ...] = (
    *(Needle, MultiKey, MultiValue, Chain, VariableTracking, CommonWords, Questions, Dialogue, Code, Perplexity),
    *(Prompts, GSM8K, RULER, LoCoMo),
)


def find(key: str) -> type[Task]:
    """The kind of task under a key. Raises UnknownTask, naming the closest."""
    known = {kind.key: kind for kind in KINDS}
    if not isinstance(key, str) or key not in known:
        close = closest(key, list(known), 3) if isinstance(key, str) else []
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UnknownTask(f"unknown task {quoted(key)}: {hint}")
    return known[key]


def task(key: str, **parameters: Any) -> Task:
    """A task by its key: `task("needle", length=1024, depth=0.5, seed=0)`. Raises UnknownTask, BadParameter."""
    return find(key)(**parameters)


def tasks() -> pd.DataFrame:
    """The kinds of tasks: one row a kind, with key, name, what it is, how replies are scored, paper, parameters."""
    import pandas as pd

    columns = ["key", "name", "summary", "scorer", "paper", "parameters"]
    return pd.DataFrame([_row(kind) for kind in KINDS], columns=columns)


def _row(kind: type[Task]) -> dict[str, Any]:
    return {
        "key": kind.key,
        "name": kind.title,
        "summary": kind.summary(),
        "scorer": kind.scorer,
        "paper": str(kind.paper) if kind.paper else "",
        "parameters": ", ".join(f"{parameter.name}={parameter.default}" for parameter in kind.parameters()),
    }
