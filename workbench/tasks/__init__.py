"""Tasks: texts with a question and the answer that is expected, to judge a recipe by what it gets right.

`wb.tasks()` lists the kinds, `wb.task("needle", length=1024)` makes one; `Session.evaluate` runs it under recipes.
"""

from workbench.callable_package import callable_as
from workbench.tasks.base import Case, Encode, Generated, Task
from workbench.tasks.catalogue import KINDS, find, task, tasks
from workbench.tasks.scoring import SCORERS, Scorer

__all__ = ["KINDS", "SCORERS", "Case", "Encode", "Generated", "Scorer", "Task", "find", "task", "tasks"]

callable_as(__name__, tasks)
