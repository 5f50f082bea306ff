"""From a recipe to the session page that shows it."""

from __future__ import annotations

from workbench.recipe import Recipe
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.state.recipe_slots import parts_of


def session_link(recipe: Recipe, model: str = "") -> str:
    """The address of the session page with this recipe and model, relative to the app's own."""
    return PageState(model=model, **parts_of(recipe)).query() or "?page=session"
