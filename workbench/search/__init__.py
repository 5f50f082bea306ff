"""The search for a recipe: from a limit of memory, or bounds of quality, to what serves best.

`wb.search(model, tasks, limit="200 MiB")` draws recipes by Optuna and measures them on more and more cases.
"""

from workbench.callable_package import callable_as
from workbench.search.found import Found, NothingServes, Tried
from workbench.search.goal import Goal, Measured, Memory
from workbench.search.searching import search

__all__ = ["Found", "Goal", "Measured", "Memory", "NothingServes", "Tried", "search"]

callable_as(__name__, search)
