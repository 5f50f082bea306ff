"""From what was typed to what the workbench takes: the text, the recipe, the budgets. Nothing here imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import BadBudget, BadParameter, BadPrompt
from workbench.files.paths import place, regular
from workbench.formatting import quoted
from workbench.recipe_text import parts_of, value_of

if TYPE_CHECKING:
    from workbench.recipe import Recipe
    from workbench.tasks import Task


_LONGEST = 64  # characters of a number


def prompt(text: str | None, text_file: str | None, example: str | None) -> tuple[str, str | None]:
    """The text to read and the question that belongs to it (an example's own, else None). Raises BadPrompt."""
    sources = [
        name
        for name, value in (("--text", text), ("--text-file", text_file), ("--example", example))
        if value is not None
    ]
    if len(sources) != 1:
        also = f", not {' and '.join(sources)} together" if sources else ""
        raise BadPrompt(
            f"give the text as --text TEXT, --text-file PATH ('-' for standard input) or --example NAME{also}"
        )
    if example is not None:
        from workbench.examples import example as ready

        chosen = ready(example)
        return chosen.text, chosen.question
    if text is not None and text != "-":
        if not text.strip():
            raise BadPrompt("the text is empty: there is nothing to read")
        return text, None
    return _decoded(*_bytes(text_file or "-")), None


def _bytes(path: str) -> tuple[bytes, str]:
    if path == "-":
        return sys.stdin.buffer.read(), "standard input"
    try:
        return regular(place(path)).read_bytes(), path
    except OSError as error:
        raise BadPrompt(f"cannot read {quoted(path, 200)}: {getattr(error, 'strerror', None) or error}") from error


def _decoded(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadPrompt(f"{name} is not text in UTF-8: convert it first")
    if not text.strip():
        raise BadPrompt(f"{name} is empty: there is nothing to read")
    return text


def recipes(names: Sequence[str], settings: Sequence[str]) -> list[Recipe]:
    """Each name a recipe as `Recipe.of` reads it, with what `--set` says of its methods.

    A setting is `name=value`, or `method.name=value` where several methods are named. Raises UnknownMethod,
    BadParameter.
    """
    from workbench.recipe import Recipe
    from workbench.registry import find, method

    rows = [parts_of(name) for name in names]
    known = {key: find(key) for row in rows for key, _ in row}
    values: dict[str, dict[str, Any]] = {key: {} for key in known}
    for setting in settings:
        left, equals, right = setting.partition("=")
        owner, dot, name = left.strip().rpartition(".")
        if not equals or not name:
            raise BadParameter(f"--set {quoted(setting)}: write it as name=value, or method.name=value")
        if not dot and len(known) > 1:
            raise BadParameter(
                f"--set {quoted(setting)}: several methods are named, so say whose, as "
                f"{next(iter(known))}.{setting[:_LONGEST]}"
            )
        owner = owner if dot else next(iter(known))
        if owner not in known:
            raise BadParameter(
                f"--set {quoted(setting)}: {owner[:_LONGEST]} is not among the methods named ({', '.join(known)})"
            )
        values[owner][name] = value_of(right.strip())
    return [Recipe.of([method(key, **values[key] | typed) for key, typed in row]) for row in rows]


def task(key: str, length: int | None, settings: Sequence[str]) -> Task:
    """A task by its key, of a length where one is given, with what `--task-set` says of it.

    Raises UnknownTask, BadParameter.
    """
    from workbench.tasks import find

    kind = find(key)
    values: dict[str, Any] = {} if length is None else {"length": length}
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise BadParameter(f"--task-set {quoted(setting)}: write it as name=value")
        values[name] = value if name == "path" else value_of(value)
    return kind(**values)


def values(settings: Sequence[str]) -> dict[str, Any]:
    """What `--set` says, by name. Raises BadParameter."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise BadParameter(f"--set {quoted(setting)}: write it as name=value")
        found[name] = value_of(value)
    return found


def budgets(text: str) -> list[str]:
    """Budgets separated by commas: "0.5,25%,64MiB". Raises BadBudget."""
    from workbench.budget import Budget

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BadBudget("no budget is given: write for instance --budgets 0.5,0.25")
    for part in parts:
        Budget.parse(part)
    return parts


def question(typed: str | None, of_example: str | None) -> str | None:
    """What to ask: what was typed, else the example's question. Raises BadPrompt for an empty one."""
    if typed is not None and not typed.strip():
        raise BadPrompt("the question is empty; leave it out to let the model go on from the text")
    return of_example if typed is None else typed
