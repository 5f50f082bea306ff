"""The page: what one tab sees, and how its parts are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any

import panel as pn
import panel_material_ui as pmu
from panel.io.document import hold
from panel.io.resources import LOCAL_DIST
from panel.io.state import set_curdoc
from panel.util.parameters import edit_readonly
from panel_material_ui.template.base import Page as MaterialPage
from param.parameterized import Event
from tornado.ioloop import IOLoop

from workbench.errors import BadRecipe, InputError, WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.results import Results
from workbench.runtime.comparison import Comparison
from workbench.weights.base import WeightMethod
from workbench_widgets import present
from workbench_widgets.app.elements.notice import Notice
from workbench_widgets.app.elements.theme import EXTENSIONS, HEADING_STYLE, theme_config
from workbench_widgets.app.pages.choose import ChoosePage
from workbench_widgets.app.pages.cost import CostPage
from workbench_widgets.app.pages.results import ResultsPage
from workbench_widgets.app.pages.shell import navigation
from workbench_widgets.app.panels import (
    AttentionPanel,
    HeadErrorPanel,
    MemoryPanel,
    OutliersPanel,
    Panel,
    RunsPanel,
    TokensPanel,
    WeightsPanel,
)
from workbench_widgets.app.parts.answer import Answer
from workbench_widgets.app.parts.budget_bar import BudgetBar
from workbench_widgets.app.parts.code_dialog import CodeDialog
from workbench_widgets.app.parts.keeping import Keeping, from_address
from workbench_widgets.app.parts.link_confirmation import LinkConfirmation, awaits_consent
from workbench_widgets.app.parts.prompt_form import PromptForm
from workbench_widgets.app.parts.recipe_form import RecipeForm
from workbench_widgets.app.parts.share_dialog import ShareDialog
from workbench_widgets.app.parts.status_line import StatusLine
from workbench_widgets.app.server.address import Address, choose_theme
from workbench_widgets.app.server.connection import tell_when_gone
from workbench_widgets.app.state.page_state import TEXT_LIMIT, PageState
from workbench_widgets.app.state.recipe_slots import RECIPE_SLOTS
from workbench_widgets.app.state.snippet import snippet
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.notebook import notebook
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.app.work.records import Asked, Record, differences
from workbench_widgets.app.work.report import report
from workbench_widgets.app.work.saved_page import KeptPages, SavedPage
from workbench_widgets.app.work.workspace import Workspace

if TYPE_CHECKING:
    from bokeh.document import Document

_GLANCE_S = 0.1  # how often a page that was sent looks for its browser


def page(
    offered: OfferedModels, models: LoadedModels, results: str | Path = "results", pages: KeptPages | None = None
) -> MaterialPage:
    """A fresh page for one tab: the one that its address names, in the state that it describes.

    results: the folder of stored results; visitors from other machines each have their own, gone with their tab.
    pages: where pages are kept as people work (None: in the user's cache).
    """
    if pn.state.curdoc is not None:
        Address.take_over(pn.state.curdoc)
        choose_theme()
    pn.extension(*EXTENSIONS)
    if pn.state.curdoc is not None:
        _style_sheets_at_home(pn.state.curdoc)
        tell_when_gone(pn.state.curdoc)
    asked = (pn.state.session_args or {}).get("page", [b""])[0].decode(errors="replace")
    if asked == "cost":
        return CostPage(offered).view
    if asked in ("results", "choose"):
        kept = Results(results) if offered.anything else _own_results()
        return ResultsPage(kept).view if asked == "results" else ChoosePage(offered, models, kept).view
    return Page(offered, models, pages).view


def _own_results() -> Results:
    """A folder of one tab."""
    folder = TemporaryDirectory(prefix="workbench-results-")
    pn.state.on_session_destroyed(lambda _: folder.cleanup())
    return Results(folder.name)


def _style_sheets_at_home(doc: Document) -> None:
    """Panel learns where its style sheets lie when it sends the page as HTML. Where a browser was so slow that its
    session is made anew for the socket alone, it would look for them in the internet.
    """
    home = f"{pn.state.rel_path}/{LOCAL_DIST}" if pn.state.rel_path else LOCAL_DIST
    doc.template_variables.setdefault("dist_url", home)


class Page:
    """One tab: builds the parts, joins them to the workspace, keeps the address up to date.

    A request for the page computes nothing. When its browser has connected, the text is read, unless the address asks
    for more than everybody gets (`awaits_consent`): that waits for a person.
    """

    def __init__(self, offered: OfferedModels, models: LoadedModels, kept: KeptPages | None = None) -> None:
        self._doc = pn.state.curdoc
        self._early: list[Callable[[], None]] | None = None  # what waits until the page is drawn
        self._drawing = Lock()  # of that list: lanes post from threads of their own
        self._default_model = model = offered.default
        self._begun = False  # whether anything was read, or nothing shall be any more
        kept = kept or KeptPages()
        opened = from_address(pn.state.session_args or {}, kept)
        state = opened.state
        self.workspace = workspace = Workspace(self._post, models, offered)
        if pn.state.location is not None:
            pn.state.on_session_destroyed(lambda _: self.close())
        self._left_out: list[str] = []  # parts of the page that neither its address nor the server holds
        self.keeping = Keeping(self._doc, workspace, kept, lambda: self.state, self.go_back, self._tell_left_out)
        self.keeping.begin(opened)

        self.prompt = PromptForm(workspace, state, state.model or model, self.read)
        self.recipe = RecipeForm(
            {slot: getattr(state, slot) for slot in RECIPE_SLOTS}, state.values, self._recipe_changed
        )
        self.budget = BudgetBar(
            workspace, state.budget, state.weights_budget, lambda: self.plan(interrupt=False), self._weights_moved
        )
        self.answer = Answer(
            workspace,
            state.question or self.prompt.question,
            state.tokens,
            self.run,
            self._update_address,
            expected=self.prompt.answer if state.expected is None else state.expected,
        )
        self.status = StatusLine(workspace)
        self.link = Notice(
            f"{state.complaint} {opened.complaint}".strip(), severity="warning", closeable=True, margin=(0, 0, 12, 0)
        )
        self.code = CodeDialog(self.python)
        self.share = ShareDialog(self.saved, self.notebook, self.open, self.make_report)
        self.confirmation = LinkConfirmation(
            requests := [] if opened.agreed else awaits_consent(state, model), self.read
        )
        self.panels: list[Panel] = [
            TokensPanel(workspace),
            AttentionPanel(workspace),
            HeadErrorPanel(workspace),
            OutliersPanel(workspace),
            MemoryPanel(workspace),
            RunsPanel(workspace, self.compare, self.restore, self._recipe),
            WeightsPanel(workspace),
        ]
        self.tabs = pmu.Tabs(
            *((panel.title, panel.body) for panel in self.panels),
            active=min(state.tab, len(self.panels) - 1),
            dynamic=True,
            sizing_mode="stretch_width",
            margin=0,
        )
        self.tabs.param.watch(self._tab_changed, "active")
        workspace.param.watch(self._was_read, "reading")
        workspace.param.watch(lambda _: self._update_address(), "selected")
        workspace.param.watch(self._follow, "plan")
        workspace.param.watch(self._tell_old, ["shown", "dirty"])
        self.answer.follows.param.watch(self._follow, "value")
        self._linked_head = (state.layer, state.head)
        workspace.set_records(opened.records)
        workspace.param.watch(lambda _: self._update_address(), "records")
        self._offer()
        self._tab_changed()
        self.view = self._layout()
        if self._doc is not None and self.prompt.text and not requests:
            # The text is read while the browser still draws the page. What comes of it waits until the page is drawn:
            # components that are changed while they are being made send back what they were.
            self._early = []
            pn.state.onload(self._drawn)
            workspace.announce("Reading")
            self._begin_when_connected()

    def _layout(self) -> MaterialPage:
        title = pn.pane.HTML("<h2>Recipe</h2>", stylesheets=[HEADING_STYLE], margin=(14, 4, 0, 4))
        details = pmu.Paper(
            self.tabs,
            variant="outlined",
            elevation=0,
            sizing_mode="stretch_width",
            margin=0,
            sx={"padding": "0 16px 12px"},
        )
        view = MaterialPage(
            title="Inference workbench",
            header=[navigation("session"), self.status.body, self.share.button, self.code.button],
            sidebar=[pn.Column(self.prompt.body, title, self.recipe.body, sizing_mode="stretch_width", margin=(6, 12))],
            main=[
                pn.Column(
                    self.link,
                    self.confirmation.body,
                    self.status.problem,
                    self.budget.body,
                    self.answer.body,
                    details,
                    self.code.dialog,
                    self.share.dialog,
                    self.keeping.history,
                    sizing_mode="stretch_width",
                    margin=(14, 16),
                )
            ],
            sidebar_width=350,
            busy_indicator=None,
            theme_toggle=True,
            theme_config=theme_config(),
            dark_theme=pn.config.theme == "dark",
        )
        with edit_readonly(view):
            # Each page's own follows `pn.state.busy`, which outlives all pages and would keep every one of them.
            view.busy = self.workspace.param.working
        self.workspace.dark = view.dark_theme
        view.param.watch(lambda event: setattr(self.workspace, "dark", event.new), "dark_theme")
        return view

    def close(self) -> None:
        """The tab is gone: its work stops, and nothing that stays refers to it."""
        self._begun = True
        self.workspace.close()
        self.code.close()
        self.share.close()
        # Panel has just asked for a collection of all there is, in the event loop. What is unlinked goes without it.
        with suppress(KeyError):
            pn.state.cancel_task("gc.collect")

    def begin(self) -> None:
        """A browser has connected: read, if nothing was read yet."""
        if not self._begun:
            self._begun = True
            self.workspace.read(self.prompt.model, self.prompt.text)

    def _begin_when_connected(self) -> None:
        """Begin as soon as the page's socket is open: nobody is told of that, and a page is drawn seconds later."""
        context: Any = None if self._doc is None else self._doc.session_context  # one of a server has a session
        if context is None or self._begun:
            return
        if context.session is not None and context.session.connection_count:
            self.begin()
        else:
            IOLoop.current().call_later(_GLANCE_S, self._begin_when_connected)

    # -- what a person does

    def read(self) -> None:
        """Read what the form holds."""
        self._begun = True
        self.confirmation.close()
        self.workspace.read(self.prompt.model, self.prompt.text)
        self._update_address()

    def plan(self, *, interrupt: bool) -> None:
        """Plan the recipe at the budget, and show it when it is there."""
        self._update_address()
        self.workspace.stop_following()
        recipe = self._recipe()
        if recipe is not None:
            self.workspace.recipe = recipe
            self.workspace.make_plan(recipe, interrupt=interrupt)

    def run(self, follow: bool) -> None:
        """Answer the question; follow: the one that goes on from the last run's cache.

        A prompt that was changed is read first: what is answered is what stands on the page.
        """
        recipe = self._recipe()
        field = self.answer.follow if follow else self.answer.question
        question = field.value.strip() or None
        if follow and question is None:
            self.workspace.problem = "Write a question first: it is asked on the cache of the last run."
        elif recipe is None:
            self.workspace.problem = f"Nothing was run: {self.workspace.refusal}"
        elif follow:
            self.workspace.ask_on(self._asked(question, expected=""))
            field.value = ""
        elif self.workspace.dirty:
            self.confirmation.close()
            self.workspace.read(self.prompt.model, self.prompt.text, lambda: self.run(follow=False))
        else:
            self.workspace.generate(recipe, self._asked(question))

    def compare(self, recipes: Sequence[Recipe], budgets: Sequence[str], added: Sequence[Recipe]) -> None:
        """Run recipes at every budget, and others as they are, and show what each costs."""
        try:
            cases = Comparison.of(recipes, budgets or ["100%"]).cases if recipes else ()
            every = [*(Recipe.of(recipe, budget=budget) for recipe, budget in cases), *added]
            if not every or (recipes and not budgets):
                raise BadRecipe("choose at least one method and one budget to compare")
        except WorkbenchError as error:
            self.workspace.problem = str(error)
            return
        if self.workspace.dirty:
            self.workspace.read(self.prompt.model, self.prompt.text, lambda: self.compare(recipes, budgets, added))
            return
        self.workspace.compare(every, self._asked(self.answer.question.value.strip() or None))

    def restore(self, record: Record) -> None:
        """The prompt, recipe and question of a run again; its text is read where another one was."""
        self.show(record.page)
        if self.prompt.dirty:
            self.read()
        else:
            self.plan(interrupt=True)

    def show(self, state: PageState) -> None:
        """Set every control as a state of the page says; what is to be read waits for who asked."""
        self.prompt.show(state, state.model or self._default_model)
        self.recipe.show({slot: getattr(state, slot) for slot in RECIPE_SLOTS}, state.values)
        self._offer()
        self.budget.show(state.budget, state.weights_budget)
        self.answer.question.value = state.question or self.prompt.question
        self.answer.expected.value = self.prompt.answer if state.expected is None else state.expected
        self.answer.tokens.value = state.tokens
        self.tabs.active = min(state.tab, len(self.panels) - 1)

    def go_back(self, state: PageState) -> None:
        """A person went back, or forth, to another entry of the browser's history."""
        self.show(state)
        if self.workspace.reading is not None and self.prompt.dirty:
            self.read()
        else:
            self.plan(interrupt=True)

    def saved(self) -> str:
        """The page as a file."""
        return SavedPage(self.state, self.workspace.records).to_text()

    def open(self, name: str, content: bytes) -> None:
        """Show the page of a file beside what there is; it is read when a person says so."""
        try:
            saved = SavedPage.from_text(content.decode("utf-8", "replace"))
        except InputError as error:
            self.workspace.problem = f"{name}: {error}"
            return
        self.workspace.main.cancel()
        self.workspace.set_records(saved.records, shown=None, run=None, turns=())
        self.show(saved.page)
        self.plan(interrupt=True)

    def notebook(self) -> str:
        """The page as a notebook that runs as it is."""
        return notebook(self.workspace.records, self._default_model, self.python())

    def make_report(self) -> None:
        """Begin a report; its dialog hands it over."""
        workspace, reading = self.workspace, self.workspace.reading
        if reading is None:
            workspace.problem = "Read a prompt first: a report shows what a recipe keeps of it."
            return
        self.share.show_report("")
        recipe, records = self._recipe(), workspace.records

        def work(progress: Progress) -> str:
            return report(reading.session, reading.tokens, recipe, records, reading.model, progress)

        def failed(error: WorkbenchError) -> None:
            self.share.allow_report()
            workspace.problem = str(error)

        workspace.reporting.submit(work, self.share.show_report, failed)

    def python(self) -> str:
        """The state of the page as Python."""
        recipe = self._recipe()
        if recipe is None:
            return "\n".join(f"# {line}" for line in self.workspace.refusal.splitlines())
        return snippet(
            model=self.prompt.model,
            example=self.prompt.example,
            text=self.prompt.text,
            recipe=recipe,
            question=self.answer.question.value.strip() or None,
            max_new_tokens=self._tokens(),
        )

    # -- how the parts are joined

    def _recipe(self) -> Recipe | None:
        try:
            return self.recipe.recipe(self.budget.value, self.budget.weights)
        except WorkbenchError as error:
            self.workspace.refuse(str(error))
            return None

    def _recipe_changed(self) -> None:
        self._offer()
        self.plan(interrupt=True)

    def _offer(self) -> None:
        self.budget.enable(self.recipe.takes_budget)
        self.budget.offer(self.recipe.weights)

    def _weights_moved(self) -> None:
        """Compressing to a size that is no longer wanted is given up, unless what it makes serves every size."""
        method = self.recipe.weights
        every = method is not None and issubclass(method, WeightMethod) and method.every_size
        self.plan(interrupt=not every)

    def _follow(self, *events: Event) -> None:
        """Answer anew under the plan that has just been made, where that is wanted."""
        recipe = self._recipe() if self.answer.follows.value and self.workspace.plan is not None else None
        if recipe is not None:
            self.workspace.follow(recipe, self._asked(self.answer.question.value.strip() or None))

    def _was_read(self, event: Event) -> None:
        if event.new is None:
            return
        facts, numbers = event.new.session.facts, event.new.trace.numbers
        layer, head = self._linked_head
        self._linked_head = (0, 0)
        self.workspace.selected = cell = (present.nearest(layer, numbers), min(head, facts.heads - 1))
        if cell != (layer, head):
            note = f"{facts.name} has no layer {layer}, head {head}: layer {cell[0]}, head {cell[1]} is shown."
            self.link.say(f"{self.link.object} {note}".strip())
        if self.prompt.question and self.prompt.fresh:
            self.answer.question.value = self.prompt.question
            self.answer.expected.value = self.prompt.answer
        self.plan(interrupt=True)

    def _tab_changed(self, *events: Event) -> None:
        for number, panel in enumerate(self.panels):
            panel.show(number == self.tabs.active)
        self._update_address()

    def _tokens(self) -> int:
        return 32 if self.answer.tokens.value is None else int(self.answer.tokens.value)

    def _asked(self, question: str | None, *, expected: str | None = None) -> Asked:
        """What a run answers now. expected: in place of what the page expects."""
        said = self.answer.expected.value.strip() if expected is None else expected
        return Asked(question, self._tokens(), said, self.state)

    def _tell_old(self, *events: Event) -> None:
        """Say of the answer in view where it was made with other settings than those on screen."""
        record = self.workspace.shown
        self.answer.tell_old("" if record is None else differences(record, self.state))

    @property
    def state(self) -> PageState:
        """What a link to this page says."""
        selected = self.workspace.selected or self._linked_head
        question = self.answer.question.value
        return PageState(
            model="" if self.prompt.model == self._default_model else self.prompt.model,
            example=self.prompt.example or "",
            text="" if self.prompt.example else self.prompt.text,
            **self.recipe.keys(),  # type: ignore[arg-type]  # the slots are fields of text
            values=self.recipe.values(),
            budget=self.budget.value,
            weights_budget=self.budget.weights,
            question="" if question == self.prompt.question else question,
            expected=None if self.answer.expected.value == self.prompt.answer else self.answer.expected.value,
            tokens=self._tokens(),
            layer=selected[0],
            head=selected[1],
            tab=self.tabs.active,
        )

    def _update_address(self) -> None:
        """Bring the address up to date, soon and once: browsers allow only so many changes."""
        if hasattr(self, "view"):
            self._tell_old()
            self.keeping.changed()

    def _tell_left_out(self, parts: list[str]) -> None:
        parts = [part for part in parts if part != "text"]  # its field says it
        if parts != self._left_out:
            self._left_out = parts
            note = f"A link to this page does not hold {' and '.join(parts)}: more than {TEXT_LIMIT:,} characters."
            self.link.say(note if parts else "", severity="info")

    def _post(self, show: Callable[[], None]) -> None:
        """Run `show` in the page's own thread, as one message to the browser."""
        doc = self._doc
        if doc is None:
            show()
            return
        with self._drawing:
            if self._early is not None:
                self._early.append(show)
                return

        def apply() -> None:
            with set_curdoc(doc), hold(doc):
                show()

        doc.add_next_tick_callback(apply)

    def _drawn(self) -> None:
        with self._drawing:
            early, self._early = self._early or [], None
        for show in early:
            self._post(show)
        self.begin()
        self._update_address()
