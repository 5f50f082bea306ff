"""Recipes on tasks, many of each: what is measured, one row at a time, and where that is computed."""

from workbench.sweep.bench import Bench

__all__ = ["Bench"]
