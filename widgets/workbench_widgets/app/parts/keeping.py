"""The page's address, its way back, and its copy on the server: what a reload, Back or a link brings again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from param.parameterized import Event

from workbench.progress import Progress
from workbench_widgets.app.elements.history import History
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.work.records import Record
from workbench_widgets.app.work.saved_page import KeptPages, SavedPage
from workbench_widgets.app.work.workspace import Workspace

if TYPE_CHECKING:
    from bokeh.document import Document
    from bokeh.server.callbacks import TimeoutCallback

KEPT = "session"  # the part of an address that names a page kept on the server
GONE = "The page that this link names is not kept here, or not any more: only what the link itself holds is shown."
_LONG = ("model", "text", "weights", "attention")  # what a link asks a person about (`link_confirmation`)
_AFTER_MS = 400  # the address follows this long after the last change: browsers allow only so many
_SLIDES = frozenset({"budget", "weights_budget", "values", "layer", "head", "tokens"})  # no entries of their own


class Opened(NamedTuple):
    """What a page begins with: its state, its runs, the name of the kept page it comes from, what is wrong with that
    name, and whether all that takes long in it was agreed to when that page was made.
    """

    state: PageState
    records: tuple[Record, ...] = ()
    name: str = ""
    complaint: str = ""
    agreed: bool = False


def from_address(query: Mapping[str, Sequence[bytes]], kept: KeptPages) -> Opened:
    """What an address asks for. It holds all but what is too long for it: that, and the runs, are in the kept page."""
    state = PageState.read(query)
    name = (query.get(KEPT) or [b""])[0].decode("ascii", "replace")
    if not name:
        return Opened(state)
    saved = kept.find(name)
    if saved is None:
        return Opened(state, complaint=GONE)
    missing = [part for part in saved.page.left_out if part not in query]
    state = replace(state, **{part: getattr(saved.page, part) for part in missing})
    agreed = all(getattr(state, part) == getattr(saved.page, part) for part in _LONG)
    return Opened(state, saved.records, name, agreed=agreed)


class Keeping:
    """`state()` is what the page shows; `show(state)` is called when a person went back; `left_out(parts)` with the
    parts of the page that neither address nor server hold.
    """

    def __init__(
        self,
        doc: Document | None,
        workspace: Workspace,
        kept: KeptPages,
        state: Callable[[], PageState],
        show: Callable[[PageState], None],
        left_out: Callable[[list[str]], None],
    ) -> None:
        self._doc, self._workspace, self._kept = doc, workspace, kept
        self._state, self._show, self._left_out = state, show, left_out
        self.history = History(width=0, height=0, margin=0, sizing_mode="fixed")
        self._due: TimeoutCallback | None = None
        self._name, self._mine = "", False  # under which the page is kept, and whether it was made here
        self._saved: tuple[PageState, tuple[Record, ...]] | None = None
        self._possible = True  # whether the server can keep pages
        self._written: tuple[PageState, str] | None = None
        self._states: dict[str, PageState] = {}  # by address: of texts that are too long for one
        self.history.param.watch(self._popped, "popped")

    def begin(self, opened: Opened) -> None:
        """What the page was opened with; the kept page it came from stays as it is."""
        self._saved = (opened.state, opened.records) if opened.name else None
        self._name = opened.name

    def changed(self) -> None:
        """Something changed: the address and the server's copy follow, soon and once."""
        if self._doc is None:
            return
        if self._due is not None:
            self._doc.remove_timeout_callback(self._due)
        self._due = self._doc.add_timeout_callback(self._write, _AFTER_MS)

    def _write(self) -> None:
        self._due = None
        state, records = self._state(), self._workspace.records
        if (records or state.left_out) and self._possible and self._saved != (state, records):
            if self._saved is None or not self._mine:
                self._name, self._mine = self._kept.new_name(), True
            self._saved = (state, records)
            self._keep(self._name, SavedPage(state, records))
        self._left_out([] if self._possible else list(state.left_out))
        query = state.query()
        if self._name and (records or state.left_out):
            query = f"{query}{'&' if query else '?'}{KEPT}={self._name}"
        if self._written is None or self._written[1] != query:
            how = "push" if self._written is not None and _turns(self._written[0], state) else "replace"
            self._written = (state, query)
            self._states[query] = state
            self.history.written = json.dumps([how, query])

    def _keep(self, name: str, saved: SavedPage) -> None:
        def done(kept: bool) -> None:
            self._possible = kept

        def work(_progress: Progress) -> bool:
            return self._kept.keep(name, saved)

        self._workspace.saving.submit(work, done, lambda _error: done(False))

    def _popped(self, event: Event) -> None:
        query = str(json.loads(event.new)[1])
        parts = dict(parse_qsl(query.removeprefix("?"), keep_blank_values=True))
        state = self._states.get(query) or PageState.read(parts)
        self._written = (state, query)
        self._show(state)


def _turns(before: PageState, after: PageState) -> bool:
    """Whether so much is different that Back should lead there."""
    names = (entry.name for entry in fields(PageState) if entry.compare and entry.name not in _SLIDES)
    values: Callable[[PageState, str], Any] = getattr
    return any(values(before, name) != values(after, name) for name in names)
