"""Sweeps: recipes on tasks, many of each, measured row by row into a folder of results, here or on a cluster.

`wb.sweep(models, recipes, budgets, tasks, seeds)` measures a grid; `Bench` is its unit of work.
"""

from workbench.callable_package import callable_as
from workbench.sweep.bench import Bench
from workbench.sweep.grid import Grid, Item, ModelSpec, Options, grid_of
from workbench.sweep.sweeping import sweep

__all__ = ["Bench", "Grid", "Item", "ModelSpec", "Options", "grid_of", "sweep"]

callable_as(__name__, sweep)
