"""Plans, runs, sessions and results as a few lines of HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from workbench.errors import NotRead
from workbench.formatting import mib
from workbench.kv.plan import Plan
from workbench.results import Results
from workbench.runtime.run import Run
from workbench.session import Session
from workbench_widgets import present
from workbench_widgets.colours import LIGHT
from workbench_widgets.plain_text import in_markup

_LONGEST_ANSWER = 160  # characters of an answer in the table of runs
_MOST = 50  # recipes in the table of results


def plan_html(plan: Plan) -> str:
    """A plan's bytes as a bar, and what is kept."""
    return _tiles(_plan_tiles(plan), plan.share)


def plan_line(plan: Plan) -> str:
    """The same in one line of text."""
    return _line(_plan_tiles(plan))


def _plan_tiles(plan: Plan) -> list[tuple[str, str]]:
    kept = float(plan.counts.float().mean())
    return [
        ("method", plan.label),
        ("cache", f"{mib(plan.nbytes)} of {mib(plan.full_nbytes)}"),
        *([("host memory", mib(plan.host_nbytes))] if plan.host_nbytes else []),
        ("kept a head", f"{kept:,.0f} of {plan.trace.tokens:,} tokens"),
    ]


def run_html(run: Run) -> str:
    """A run's cache, quality and speed."""
    tiles, share = _run_tiles(run)
    tiles += [
        ("first token", f"{run.timing.first_token_s:.2f} s"),
        ("speed", f"{run.timing.tokens_per_s:.1f} tokens/s"),
    ]
    notes = "".join(f"<div>{in_markup(note)}</div>" for note in run.notes)
    return _tiles(tiles, share) + notes


def run_line(run: Run) -> str:
    """The recipe, cache and quality in one line of text."""
    return _line(_run_tiles(run)[0])


def _run_tiles(run: Run) -> tuple[list[tuple[str, str]], float]:
    record = run.to_dict(quality=False)
    share = record["kv_share"]
    tiles = [("recipe", run.recipe.label), ("cache", f"{mib(record['kv_nbytes'])} of {mib(record['kv_full_nbytes'])}")]
    if record.get("kv_host_nbytes"):
        tiles.append(("host memory", mib(record["kv_host_nbytes"])))
    with suppress(NotRead):  # loaded from disk, never measured
        quality = run.quality
        tiles += [
            ("KL to full", f"{quality.kl:.3f}"),
            ("same top token", f"{quality.top1_agreement:.0%}"),
            ("perplexity", f"{quality.perplexity:.2f} (full {quality.perplexity_reference:.2f})"),
        ]
    return tiles, share


def session_html(session: Session, *, runs: bool = True) -> str:
    """The model, the prompt's first words and, with `runs`, a table of the runs."""
    trace = session.trace
    tiles = [("model", session.source), ("layers", str(session.facts.layers))]
    words = ""
    if trace is not None:
        tiles += [("prompt", f"{trace.tokens:,} tokens"), ("runs", str(len(session.runs)))]
        tokens = present.prompt_pieces(trace.prompt, 60)
        more = " …" if trace.tokens > len(tokens) else ""
        words = f'<p style="opacity:.75;margin:4px 0">{in_markup("".join(tokens))}{more}</p>'
    return _tiles(tiles) + words + (runs_html(session.runs) if runs else "")


def runs_html(runs: Sequence[Run]) -> str:
    """A table of runs; quality only where it has been measured already."""
    if not runs:
        return ""
    cell = "padding:2px 12px 2px 0;white-space:nowrap"
    number = cell + ";text-align:right"
    heads = [
        ("recipe", cell),
        ("cache", number),
        ("weights", number),
        ("KL", number),
        ("same top token", number),
        ("tokens/s", number),
    ]
    rows = []
    for run in runs:
        quality = run.quality if run.measured else None
        cells = [
            run.recipe.label,
            f"{run.to_dict(quality=False)['kv_share']:.1%}",
            mib(run.memory.samples[-1].categories.get("weights", 0)),
            "–" if quality is None else f"{quality.kl:.3f}",
            "–" if quality is None else f"{quality.top1_agreement:.0%}",
            f"{run.timing.tokens_per_s:.1f}",
        ]
        styled = zip(cells, (style for _, style in heads), strict=True)
        answer = f'<td style="{cell.replace("nowrap", "normal")}">{in_markup(_short(run.text.strip()))}</td>'
        rows.append(
            "<tr>" + "".join(f'<td style="{style}">{in_markup(c)}</td>' for c, style in styled) + answer + "</tr>"
        )
    top = "".join(f'<th style="{style}">{name}</th>' for name, style in [*heads, ("answer", cell + ";text-align:left")])
    top = top.replace(f'"{cell}"', f'"{cell};text-align:left"', 1)
    return f'<table style="border-collapse:collapse;line-height:1.4"><tr>{top}</tr>{"".join(rows)}</table>'


def results_html(results: Results) -> str:
    """What a folder of results holds, and the means of its recipes, the smallest first."""
    counts = results.numbers()
    tiles = [("results", str(results.path)), ("runs", f"{counts['done']:,}"), ("failed", f"{counts['failed']:,}")]
    tiles += [(name, ", ".join(map(str, counts[name]))) for name in ("models", "tasks") if counts[name]]
    table = results.recipes().sort_values("deployed_nbytes")
    if not len(table):
        return _tiles(tiles)
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "recipe": ("recipe", str),
        "cases": ("cases", str),
        "deployed_nbytes": ("weights and cache", mib),
        "kv_nbytes": ("cache", mib),
        "correct": ("right", "{:.0%}".format),
        "full_correct": ("uncompressed right", "{:.0%}".format),
        "kl": ("KL", "{:.3f}".format),
        "tokens_per_s": ("tokens/s", "{:.1f}".format),
    }
    cell = "padding:2px 12px 2px 0;white-space:nowrap"
    top = "".join(f'<th style="{cell};text-align:left">{title}</th>' for title, _ in columns.values())
    rows = [
        "".join(
            f'<td style="{cell}">{"–" if value is None else in_markup(written(value))}</td>'
            for value, (_, written) in zip(row, columns.values(), strict=True)
        )
        for row in table[list(columns)].astype(object).where(table.notna(), None).head(_MOST).itertuples(index=False)
    ]
    more = f"<div>and {len(table) - _MOST:,} recipes more</div>" if len(table) > _MOST else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'{_tiles(tiles)}<table style="border-collapse:collapse;line-height:1.4"><tr>{top}</tr>{body}</table>{more}'


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_ANSWER else f"{text[:_LONGEST_ANSWER]} …"


def _line(entries: Sequence[tuple[str, str]]) -> str:
    """Named figures in one line."""
    (_, first), *rest = entries
    return " · ".join([first, *(f"{name} {value}" for name, value in rest)])


def _tiles(entries: Sequence[tuple[str, str]], share: float | None = None) -> str:
    """Named figures in a row that wraps, above a bar of the share of the uncompressed bytes."""
    tiles = "".join(
        f'<div><div style="opacity:.7;font-size:12px">{in_markup(name)}</div>'
        f'<div style="font-weight:600">{in_markup(value)}</div></div>'
        for name, value in entries
    )
    row = f'<div style="display:flex;flex-wrap:wrap;gap:4px 24px;line-height:1.35">{tiles}</div>'
    if share is None:
        return row
    label, width = f"{share:.1%} of the uncompressed cache", f"{min(share, 1):.2%}"
    bar = (
        f'<div role="img" aria-label="{label}" title="{label}" '
        'style="height:6px;margin:6px 0;border-radius:3px;background:#80808040">'
        f'<div style="height:6px;border-radius:3px;background:{LIGHT.categories[0]};width:{width}"></div></div>'
    )
    return row + bar
