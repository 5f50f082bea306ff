"""Sweeps written down in YAML: the same words as `wb.sweep` takes, and where it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workbench.errors import BadParameter, InputError
from workbench.files.paths import place, regular
from workbench.formatting import quoted
from workbench.recipe import Recipe
from workbench.registry import Method, from_dict

_LARGEST = 1 << 20  # bytes
Scalar = str | float | int


class Description(BaseModel):
    """A sweep in words: what `wb.sweep` takes, with `workers`, how many processes of this machine compute it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] | str = "smollm2-135m"
    recipes: list[str | list[str] | dict[str, Any]] | str
    budgets: list[Scalar] | Scalar | None = None
    tasks: list[str | dict[str, Any]] | str | dict[str, Any] = "needle"
    seeds: list[int] | int | str = Field(default_factory=lambda: [0])
    cases: int | None = None
    chat: bool | None = None
    max_new_tokens: int | None = None
    device: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    calibration: str | None = None
    threads: int | None = None
    keep_text: bool = True
    study: str | None = None
    retry_failed: bool = False
    results: str = "results"
    executor: str | None = None
    workers: int | None = Field(None, ge=1)

    def arguments(self) -> dict[str, Any]:
        """What `wb.sweep` is called with, without an executor. Raises what is wrong with a recipe or a seed."""
        given = self.model_dump(exclude={"executor", "workers"}, exclude_none=True)
        recipes = [self.recipes] if isinstance(self.recipes, str) else self.recipes
        return given | {"recipes": [_recipe(recipe) for recipe in recipes], "seeds": seeds_of(self.seeds)}


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError, in one line."""
    try:
        text = regular(place(path), _LARGEST).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {quoted(str(path), 200)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = "" if at is None else f", line {at.line + 1}"
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{path}{where}: this is not YAML: {what}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: a sweep is names and values, as 'recipes: [snapkv, kivi]', not {quoted(found)}")
    return {str(name): value for name, value in found.items()}


def described(values: Mapping[str, Any], where: str = "sweep") -> Description:
    """A description of these values. Raises BadParameter naming the first that is wrong."""
    try:
        return Description.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "it"
        known = ", ".join(Description.model_fields)
        wrong = {
            "missing": f"{where}: {name} is missing",
            "extra_forbidden": f"{where}: unknown name {quoted(name)}: there are {known}",
        }.get(problem["type"], f"{where}: {name} is {quoted(values.get(name))}: {problem['msg'].lower()}")
        raise BadParameter(wrong) from None


def seeds_of(given: list[int] | int | str) -> list[int]:
    """Seeds as numbers: 3, [0, 1, 2], "0,1,2" or "0-7". Raises BadParameter."""
    if isinstance(given, int):
        return [given]
    return list(_numbers(given)) if isinstance(given, str) else list(given)


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first) > 18 or len(last) > 18:
            raise BadParameter(f"seeds {quoted(text)}: write them as 0,1,2 or 0-7")
        if dash and not 0 <= int(last) - int(first) < 1_000_000:
            raise BadParameter(f"seeds {quoted(text)}: a range goes from the smaller to the larger, as 0-7")
        yield from range(int(first), int(last) + 1) if dash else [int(first)]


def _recipe(given: str | list[str] | dict[str, Any]) -> Recipe | Method:
    if isinstance(given, dict):
        return from_dict(given) if "method" in given else Recipe.from_dict(given)
    return Recipe.of(given)
