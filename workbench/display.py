"""How plans, runs and sessions show themselves in notebooks: as text, and as views where a package provides them.

Nothing here knows the views. A package offers them as entry points of the group `workbench.display`:

- `views`: a function of the thing shown that yields MIME bundles, the view itself first, then figures for `show()`;
- `page`: a function of the thing shown that returns an HTML page of its own;
- `controls`: a function of a session that returns a control panel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import Any

from workbench import arguments
from workbench.errors import InputError, MissingExtra

GROUP = "workbench.display"
NUMBERS = "application/vnd.workbench+json"
_DRAWN_WITH = ("ipywidgets", "anywidget", "plotly")  # of the extra `notebooks`: without it there is the text

Bundle = dict[str, Any]


class Shown:
    """Something that a notebook shows: `summary()` in words, `numbers()` as JSON, and views where there are any."""

    def summary(self) -> str:
        """A few lines of text: the evidence, rounded."""
        raise NotImplementedError

    def numbers(self) -> dict[str, Any]:
        """The same evidence for programs, JSON-able."""
        raise NotImplementedError

    def show(self) -> None:
        """Display everything there is to see here: the views, their figures, and the summary as text.

        Outside a notebook the summary is printed.
        """
        if not in_notebook():
            print(self.summary())  # noqa: T201  what it is asked for outside a notebook
            return
        from IPython.display import display

        for bundle in bundles(self):
            show: Callable[..., object] = display  # which has no types
            show(bundle, raw=True)

    def save_html(self, path: str | Path) -> Path:
        """Write what there is to see here into one HTML file that works offline, its views live; returns its path.

        Raises MissingExtra where no package provides views, InputError where the file cannot be written.
        """
        page = provided("page")
        if page is None:
            raise MissingExtra(
                "a page needs the views, which are not installed: pip install 'inference-workbench[app]'"
            )
        file = arguments.path("path", path)
        text = page(self)
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
        return file

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Bundle:
        if not in_notebook():
            return {"text/plain": self.summary()}
        return next(iter(bundles(self, figures=False)))


def bundles(thing: Shown, *, figures: bool = True) -> list[Bundle]:
    """What to display of `thing`: its view with the evidence as text beside it, then (with `figures`) its figures.

    Without a package that provides views: the text alone.
    """
    views = provided("views")
    made: Iterable[Bundle] = () if views is None else views(thing)
    first, *rest = [*islice(made, None if figures else 1)] or [{}]
    # The text comes last: what a view needed is measured by now, and the summary can tell it.
    return [{**first, "text/plain": thing.summary(), NUMBERS: _rounded(thing.numbers())}, *rest]


def controls(session: Any, **options: Any) -> Any:
    """The control panel for a session. Raises MissingExtra where no package provides one, or widgets are missing."""
    panel = provided("controls")
    if panel is None:
        raise MissingExtra(
            "the control panel needs widgets, which are not installed: pip install 'inference-workbench[notebooks]'"
        )
    return panel(session, **options)


@cache
def provided(name: str) -> Callable[..., Any] | None:
    """What an installed package offers under `name`, or None; also where what it draws with is not installed."""
    for point in entry_points(group=GROUP, name=name):
        try:
            return point.load()  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            if error.name not in _DRAWN_WITH:
                raise
    return None


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, where views can be seen."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None else None
    return hasattr(found, "kernel")


def _rounded(value: Any) -> Any:
    """The same nest with floats at four significant figures: equal on machines that differ in the last bits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
