"""What all tabs share: they are brought up to date only while they are in view."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import panel as pn

from workbench_widgets.app.work.workspace import Workspace

T = TypeVar("T")

UNFINISHED = "This was not finished. It begins again when another tab, and then this one, is chosen."
_HINT = "p { margin: 24px 4px; font-size: 14px; opacity: .75; }"


class Panel:
    """One tab. A subclass names what it depends on in `needs`, fills `body` and says in `refresh` how it is updated."""

    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    body: pn.viewable.Viewable

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._shown = False
        self._stale = True
        workspace.param.watch(lambda *_: self.stale(), [*self.needs, "dark"])

    def refresh(self) -> None:
        """Bring what is shown up to date."""
        raise NotImplementedError

    def stale(self) -> None:
        """Something this tab depends on has changed."""
        self._stale = True
        if self._shown:
            self._update()

    def show(self, shown: bool) -> None:
        """Whether the tab is in view from now on."""
        self._shown = shown
        if shown and self._stale:
            self._update()

    def in_view(self, show: Callable[[T], None], missed: Callable[[], None] = lambda: None) -> Callable[[T], None]:
        """`show`, for a result that comes later: dropped, and `missed` called, if the tab has been left by then.

        It is brought up to date when it is next in view. (Panel writes the addresses of its style sheets anew with
        each update of a pane, and wrongly for one that is on no page.)
        """

        def arrived(result: T) -> None:
            if self._shown:
                show(result)
            else:
                self._stale = True
                missed()

        return arrived

    def _update(self) -> None:
        self._stale = False
        self.refresh()


def hint(text: str) -> pn.pane.HTML:
    """What an empty tab says."""
    return pn.pane.HTML(f"<p>{text}</p>", stylesheets=[_HINT], sizing_mode="stretch_width")
