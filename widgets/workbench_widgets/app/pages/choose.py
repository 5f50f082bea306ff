"""The Choose page: from a limit of memory and bounds of quality to a recipe, by a search that is watched."""

from __future__ import annotations

import io
import json
from types import MappingProxyType
from typing import Any

import pandas as pd
import panel as pn
import panel_material_ui as pmu

from workbench.errors import Cancelled, WorkbenchError
from workbench.formatting import mib
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.results import Results
from workbench.search import Found, search
from workbench.tasks import tasks
from workbench_widgets import figures
from workbench_widgets.app.elements.table import fill, table
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.pages.links import session_link
from workbench_widgets.app.pages.shell import Shell, heading, paper
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.plain_text import in_markup

_MIB = 2**20
_COLUMNS = MappingProxyType(
    {
        "place": ("#", 44),
        "recipe": ("Recipe", 210),
        "memory_mib": ("MiB", 90),
        "right": ("Right", 80),
        "kl": ("KL", 84),
        "top1": ("Top-1", 78),
        "cases": ("Cases", 66),
        "words": ("In words", 0),
    }
)
_MEMORY = MappingProxyType(
    {
        "Weights, cache and states": "total",
        "…of them on the device": "device",
        "…with plain weights at 16 bits": "deployed",
        "The cache alone": "kv",
    }
)
_NEED_PATH = ("file", "gsm8k", "ruler", "locomo")  # tasks over a person's own files: from Python and the command line
_LENGTHS = (256, 512, 1024, 2048)


class ChoosePage:
    """One search at a time; what it measured stays in the folder of results, and the same search goes on there."""

    def __init__(self, offered: OfferedModels, models: LoadedModels, results: Results) -> None:
        self._offered, self._models, self._results = offered, models, results
        self._found: Found | None = None
        self.shell = Shell("choose", self._draw)
        options: dict[str, Any] = {"sizing_mode": "stretch_width", "size": "small", "margin": (8, 0)}
        self.model = TextField(label="Model", value=offered.default, **options)
        self.limit = TextField(
            label="Limit", value="", placeholder="200 MiB", **options,
            description="The most that it may take on any case, as 200 MiB. Empty: the smallest that is good enough",
        )  # fmt: skip
        self.memory = pmu.Select(label="What counts", options=dict(_MEMORY), value="total", **options)
        self.kl = TextField(
            label="KL at most, nats a token", value="", placeholder="0.02", **options,
            description="Empty: no bound",
        )  # fmt: skip
        self.correct = TextField(
            label="Right answers at least, %", value="", placeholder="95", **options,
            description="Of those that the uncompressed model has right. Empty: no bound",
        )  # fmt: skip
        known = [key for key in tasks()["key"] if key not in _NEED_PATH]
        self.tasks = pmu.MultiChoice(
            label="Judged by", options=known, value=["needle", "multi-key"], sizing_mode="stretch_width", margin=(8, 0)
        )
        self.length = pmu.Select(label="Length, tokens", options=list(_LENGTHS), value=512, **options)
        self.cases = pmu.IntInput(label="Cases of each", value=4, start=1, end=64, **options)
        self.minutes = pmu.FloatInput(label="Minutes at most", value=5.0, start=0.1, end=600, step=1, **options)
        self.trials = pmu.IntInput(label="Recipes at most", value=60, start=1, end=2000, **options)
        self.start = pmu.Button(label="Search", icon="search", variant="contained", sizing_mode="stretch_width")
        self.start.on_click(lambda _: self.begin())
        self.best = pn.pane.HTML("", sizing_mode="stretch_width", margin=(2, 4))
        self.export = pmu.FileDownload(
            callback=self._recipe_file, filename="recipe.json", label="Export the best recipe", width=210,
            disabled=True, margin=(6, 0),
        )  # fmt: skip
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=400, visible=False
        )
        self.table: pn.widgets.Tabulator | None = None
        self._table_at = pn.Column(sizing_mode="stretch_width", margin=0)
        self.links = pn.pane.HTML("", sizing_mode="stretch_width", margin=(0, 4))
        side = [
            heading("What you have"), self.model, self.limit, self.memory,
            heading("What must hold"), self.kl, self.correct,
            heading("On what"), self.tasks, self.length, self.cases,
            heading("How long"), self.minutes, self.trials, self.start,
        ]  # fmt: skip
        self.view = self.shell.view(
            paper(heading("The recipe"), self.best, self.export),
            paper(heading("Front"), self.figure),
            paper(heading("All that were tried, best first"), self.links, self._table_at),
            side=side,
        )
        self._tell()

    def begin(self) -> None:
        """Search for what the form says; a search that was stopped goes on."""
        try:
            name = (self.model.value or "").strip()
            self._offered.check(name)
            asked = self._asked()
        except WorkbenchError as error:
            self.shell.task.problem = str(error)
            return
        self._found = None
        self._draw()

        def work(progress: Progress) -> Found:
            model = self._models.get(name, progress)
            return search(model, **asked, progress=progress, on_front=self._seen)

        self.shell.task.do("Searching", work, self._finished, self._stopped)

    def _asked(self) -> dict[str, Any]:
        quality = {}
        if (self.kl.value or "").strip():
            quality["kl"] = _number("KL", self.kl.value)
        if (self.correct.value or "").strip():
            quality["correct"] = _number("The share of right answers", self.correct.value.rstrip(" %")) / 100
        chosen = [str(key) for key in self.tasks.value or ()]
        if not chosen:
            raise WorkbenchError("Choose at least one task to judge recipes by.")
        limit = (self.limit.value or "").strip() or None
        if limit is None and not quality:
            raise WorkbenchError("Give a limit of memory, a bound of quality, or both: else everything serves.")
        return {
            "tasks": [f"{key} length={self.length.value}" for key in chosen],
            "limit": limit,
            "memory": str(self.memory.value),
            "quality": quality or None,
            "cases": int(self.cases.value or 1),
            "minutes": float(self.minutes.value or 1),
            "trials": int(self.trials.value or 1),
            "results": self._results.path,
        }

    # -- what comes of it

    def _seen(self, found: Found) -> None:
        """In the search's thread: show what it has so far."""
        tried = found.tried
        self.shell.task.tell(lambda: self._take(found, tried))

    def _take(self, found: Found, tried: Any) -> None:
        del tried  # of that moment: what is shown is the newest
        self._found = found
        self._draw()

    def _finished(self, found: Found) -> None:
        self._found = found
        self.shell.note.say(f"The search ended: {found.ended}. Search again with more minutes or recipes to go on.")
        self._draw()

    def _stopped(self, error: WorkbenchError) -> None:
        finished = getattr(error, "finished", None)
        if isinstance(error, Cancelled) and isinstance(finished, Found):
            self._finished(finished)

    def _draw(self) -> None:
        self._tell()
        found, dark = self._found, self.shell.task.dark
        ranking = pd.DataFrame() if found is None else found.ranking()
        self.figure.visible = bool(len(ranking)) and bool(ranking["error"].isna().any())
        if found is None or not self.figure.visible:
            return
        able = ranking[ranking["error"].isna()].assign(method=lambda each: each["recipe"].str.split().str[0])
        self.figure.object = figures.pareto(
            able, quality="kl", nbytes="memory_nbytes", title_of_x=f"{found.goal.memory}, MiB", dark=dark,
            title="KL against memory: every recipe so far",
        )  # fmt: skip
        rows = _rows(ranking)
        if self.table is None:
            formats = {"memory_mib": "0,0.00", "kl": "0.0000", "top1": "0.0%"}
            self.table = table(rows, _COLUMNS, formats, dark=dark, right=("place", "right", "cases"))
            self._table_at.objects = [self.table]
        else:
            fill(self.table, rows, dark=dark)

    def _tell(self) -> None:
        """The best recipe in words, and links to it and to those behind it."""
        found = self._found
        self.export.disabled = self._best() is None
        self.links.object = ""
        if found is None:
            words = "Give a limit, bounds, or both, and press <b>Search</b>. What it measures stays under Results."
            self.best.object = f"<div style='font-size: 14px; opacity: .85'>{words}</div>"
            return
        try:
            best = found.best()
        except WorkbenchError as error:
            self.best.object = f"<div style='font-size: 14px'>{in_markup(str(error))}</div>"
        else:
            one = next(each.measured for each in found.finished() if each.recipe == best)
            answers = (
                f"{one.correct} of {one.judged} answers right (uncompressed {one.full_correct}), " if one.judged else ""
            )
            link = in_markup(session_link(best, self._model_name()))
            self.best.object = (
                f"<div style='font-size: 15px'><b>{in_markup(best.label)}</b> takes {mib(one.memory)}: {answers}"
                f'KL {one.kl:.3g} nats a token, on {one.cases} cases. <a href="{link}">Open as session</a></div>'
            )
        ranked = [each for each in found.ranking().head(6).to_dict("records") if each["error"] is None]
        self.links.object = "<div style='font-size: 13px; line-height: 1.8'>Open as session: " + " · ".join(
            f'<a href="{in_markup(session_link(_recipe(each), self._model_name()))}">{in_markup(each["recipe"])}</a>'
            for each in ranked
        ) + "</div>"  # fmt: skip

    def _model_name(self) -> str:
        name = (self.model.value or "").strip()
        return "" if name == self._offered.default else name

    def _best(self) -> Recipe | None:
        try:
            return None if self._found is None else self._found.best()
        except WorkbenchError:
            return None

    def _recipe_file(self) -> io.StringIO:
        best = self._best()
        return io.StringIO("" if best is None else json.dumps(best.to_dict(), indent=2))


def _recipe(row: dict[Any, Any]) -> Recipe:
    return Recipe.from_dict(json.loads(row["recipe_json"]))


def _rows(ranking: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "place": place,
            "recipe": row["recipe"],
            "memory_mib": row["memory_nbytes"] / _MIB,
            "right": f"{row['correct']} of {row['judged']}" if row["judged"] else "–",
            "kl": row["kl"],
            "top1": row["top1"],
            "cases": row["cases"],
            "words": row["error"] or _words(row),
        }
        for place, row in enumerate(ranking.to_dict("records"), 1)
    ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _words(row: dict[Any, Any]) -> str:
    """What a recipe is worth in plain words."""
    lost = row["full_correct"] - row["correct"]
    if not row["judged"]:
        said = f"{row['top1']:.0%} of tokens agree"
    else:
        said = f"loses {lost} of {row['full_correct']} right answers" if lost > 0 else "keeps all right answers"
    return said if row["serves"] else f"{said}; misses the goal"


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise WorkbenchError(f"{what} is a number, not {text.strip()!r}.") from None
