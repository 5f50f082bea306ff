"""Recipes: an ordered list of methods of any family that can be run, used together.

`Recipe` stands beside `Method` in the registry's module: two methods joined by `|` are a recipe, and a recipe finds its
methods by their keys.
"""

from workbench.registry import Recipe, Spec

__all__ = ["Recipe", "Spec"]
