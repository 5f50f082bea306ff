"""The prompt: a ready example or a text of one's own, and the model that reads it."""

from __future__ import annotations

from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.errors import BadParameter, WorkbenchError
from workbench.examples import example, examples
from workbench.progress import Progress
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.elements.text_field import TextArea, TextField
from workbench_widgets.app.elements.theme import HEADING_STYLE, NOTE_STYLE
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.state.text_length import TextLength, about_tokens
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_markup

_USER_TEXT = ""


class PromptForm:
    """`read()` is called when something is to be read: an example at once, a text of one's own at a button's press."""

    def __init__(self, workspace: Workspace, state: PageState, model: str, read: Callable[[], None]) -> None:
        self._workspace = workspace
        self._read = read
        self.dirty = False  # whether what the form holds was not read yet
        self._quiet = Quiet()
        self.fresh = not state.question  # the example's own question is to be asked
        key, text = _start(state)
        wide: dict[str, object] = {"size": "small", "sizing_mode": "stretch_width", "margin": (8, 4, 4, 4)}
        self.choice = pmu.Select(
            label="Text",
            options={entry.title: entry.key for entry in examples()} | {"A text of your own": _USER_TEXT},
            value=key,
            **wide,
        )
        self.area = TextArea(
            label="",
            value=text,
            rows=7,
            max_rows=7,
            placeholder="Paste a text here, then press Read.",
            size="small",
            sizing_mode="stretch_width",
            margin=(4, 4),
            resizable=False,
        )
        self.model_name = TextField(
            label="Model",
            value=model,
            description="A packaged name (smollm2-135m), a hub id (org/name), or a folder with safetensors or GGUF.",
            **wide,
        )
        self.button = pmu.Button(
            label="Read", icon="menu_book", variant="outlined", margin=(8, 4), sizing_mode="stretch_width"
        )
        self.file = pmu.FileInput(
            label="Open or drop a text file",
            accept=".txt,.md,.py,.json,.csv,.html,.tex,.log,text/*",
            variant="outlined",
            size="small",
            margin=(2, 4),
            sizing_mode="stretch_width",
        )
        self._count()
        self._note = pn.pane.HTML("", stylesheets=[NOTE_STYLE], margin=(0, 6), sizing_mode="stretch_width")
        self.choice.param.watch(self._chosen, "value")
        self.area.param.watch(self._edited, "value_input")
        self.area.param.watch(self._edited, "value")
        self.area.param.watch(self._count, ["value_input", "value"])
        self.choice.param.watch(self._count, "value")
        self.model_name.param.watch(self._count, "value")
        workspace.param.watch(self._count, "loaded")
        self.model_name.param.watch(lambda _: None if self._quiet else read(), "value")
        self.button.on_click(lambda _: read())
        workspace.param.watch(self._note_reading, "reading")
        workspace.param.watch(self._mark, "reading")
        self.area.param.watch(self._mark, ["value_input", "value"])
        self.model_name.param.watch(self._mark, ["value_input", "value"])
        self.choice.param.watch(self._mark, "value")
        self.file.param.watch(self._opened, "value")
        title = pn.pane.HTML("<h2>Prompt</h2>", stylesheets=[HEADING_STYLE], margin=(4, 4, 0, 4))
        self.body = pn.Column(
            title,
            self.choice,
            self.area,
            self.file,
            self.model_name,
            self.button,
            self._note,
            sizing_mode="stretch_width",
            margin=0,
        )

    @property
    def model(self) -> str:
        return str(self.model_name.value).strip()

    @property
    def example(self) -> str | None:
        """The name of the example; None for a text of one's own."""
        return self.choice.value or None

    @property
    def text(self) -> str:
        return str(self.area.value_input or self.area.value or "")

    @property
    def answer(self) -> str:
        """The answer that the example expects; empty for a text of one's own."""
        return (example(self.example).answer or "") if self.example else ""

    @property
    def question(self) -> str:
        """The question that belongs to the example; empty for a text of one's own."""
        return example(self.example).question if self.example else ""

    def _chosen(self, event: Event) -> None:
        if self._quiet:
            return
        self.fresh = True
        if event.new == _USER_TEXT:
            self._fill("")
            return
        self._fill(example(event.new).text)
        self._read()

    def _fill(self, text: str) -> None:
        with self._quiet.setting():
            self.area.param.update(value=text, value_input=text)

    def _edited(self, event: Event) -> None:
        """A changed example is a text of one's own."""
        if self._quiet or self.example is None or self.text == example(self.example).text:
            return
        with self._quiet.setting():
            self.choice.value = _USER_TEXT

    def _opened(self, event: Event) -> None:
        """A file that was opened or dropped is a text of one's own."""
        if not event.new:
            return
        try:
            text = bytes(event.new).decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            self._workspace.problem = f"{self.file.filename or 'This file'} is no text in UTF-8."
            return
        with self._quiet.setting():
            self.choice.value = _USER_TEXT
        self._fill(text)

    def _mark(self, *events: Event) -> None:
        """Say whether something else stands here than what was read."""
        reading = self._workspace.reading
        self.dirty = reading is not None and (reading.text, reading.model) != (self.text, self.model)
        self.button.param.update(
            label="Read (changed)" if self.dirty else "Read", variant="contained" if self.dirty else "outlined"
        )
        self._workspace.dirty = self.dirty

    def show(self, state: PageState, model: str) -> None:
        """The prompt of a page's state, which is read when somebody says so."""
        key, text = _start(state)
        with self._quiet.setting():
            self.choice.value = key
            self.model_name.param.update(value=model, value_input=model)
        self.fresh = False  # whoever shows a state shows its question too
        self._fill(text)
        self._mark()

    def _note_reading(self, event: Event) -> None:
        reading = event.new
        if reading is None:
            return
        trace, name = reading.trace, in_markup(reading.session.facts.name)
        self._note.object = f"<div>{trace.tokens:,} tokens read in {trace.read_seconds:.1f} s by {name}.</div>"

    def _count(self, *events: Event) -> None:
        """Say below the field how long the text is; the tokens are counted elsewhere, for that may take a while."""
        text, session = self.text, self._workspace.session_of(self.model)
        tokenizer = None if session is None else session.tokenizer
        if session is None or tokenizer is None or not text:
            self._workspace.counting.drop()
            self._show_length(TextLength(len(text)))
            return

        def count(_progress: Progress) -> TextLength:
            return TextLength(len(text), about_tokens(text, tokenizer), session.facts.max_positions)

        def uncounted(_error: WorkbenchError) -> None:  # a broken character: reading it says which
            self._show_length(TextLength(len(text)))

        self._workspace.counting.submit(count, self._show_length, uncounted, interrupt=True)

    def _show_length(self, length: TextLength) -> None:
        self.area.param.update(helper_text=length.line(in_link=self.example is None), error_state=not length.fits)


def _start(state: PageState) -> tuple[str, str]:
    """The example's key and the text to begin with."""
    if state.text:
        return _USER_TEXT, state.text
    try:
        return state.example, example(state.example).text if state.example else ""
    except BadParameter:
        first = examples()[0]
        return first.key, first.text
