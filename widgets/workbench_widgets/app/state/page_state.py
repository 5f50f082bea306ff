"""What a page shows, as text in its address: a link brings it back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from reprlib import Repr
from typing import Annotated, Any, cast, get_type_hints
from urllib.parse import urlencode

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from workbench.budget import Budget
from workbench.errors import BadBudget, BadParameter
from workbench.examples import example
from workbench.registry import Method, registered
from workbench_widgets.app.parts.recipe_form import methods_for

TEXT_LIMIT = 1500  # characters of any part of a page that still fit into a link
TABS = 7
_LONGEST = 100_000  # characters of any part of an address; servers take fewer
_LARGEST = 2**53  # up to here browsers count exactly
_TOLD = 4  # parts that did not fit that are named

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 40
_SHORT.maxlevel = _SHORT.maxdict = _SHORT.maxlist = 2


def _model(name: str) -> str:
    if any(unicodedata.category(sign) == "Cc" for sign in name):
        raise ValueError("a name has no control characters")
    return name


def _budget(text: str) -> str:
    if text:
        try:
            Budget.parse(text)
        except BadBudget:
            raise ValueError("this is no budget, as 25%, 8MiB or 512 tokens are") from None
    return text


def _example(name: str) -> str:
    if name:
        try:
            example(name)
        except BadParameter:
            raise ValueError("there is no example of this name") from None
    return name


def _method(slot: str) -> AfterValidator:
    def known(key: str) -> str:
        if key not in {cls.key for cls in methods_for(slot)} and (key or slot == "kv"):
            raise ValueError("no method of this name stands in this place")
        return key

    return AfterValidator(known)


_Name = Annotated[str, Field(max_length=40)]
_Long = Annotated[str, Field(max_length=_LONGEST)]
_Count = Annotated[int, Field(ge=0, lt=10_000)]


@dataclass(frozen=True)
class PageState:
    """The choices that make a view, each with its default and with what an address may say of it.

    `query` and `read` are inverse to each other.
    """

    model: Annotated[str, Field(max_length=1000), AfterValidator(_model)] = ""
    example: Annotated[_Name, AfterValidator(_example)] = "needle"
    text: _Long = ""
    kv: Annotated[_Name, _method("kv")] = "snapkv"
    allocate: Annotated[_Name, _method("allocate")] = ""
    store: Annotated[_Name, _method("store")] = ""
    retrieve: Annotated[_Name, _method("retrieve")] = ""
    weights: Annotated[_Name, _method("weights")] = ""
    attention: Annotated[_Name, _method("attention")] = ""
    values: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # method key -> parameters that differ from defaults
    budget: Annotated[_Name, AfterValidator(_budget)] = "25%"
    weights_budget: Annotated[_Name, AfterValidator(_budget)] = ""  # empty: the weight method's own
    question: _Long = ""
    tokens: Annotated[int, Field(ge=1, lt=1_000_000)] = 32
    layer: _Count = 0
    head: _Count = 0
    tab: Annotated[int, Field(ge=0, lt=TABS)] = 0
    unread: tuple[str, ...] = field(default=(), compare=False)  # parts of the address that did not fit, and why

    def query(self) -> str:
        """What differs from a fresh page, as `?kv=h2o&budget=10%25`; empty for a fresh page."""
        kept = {name: text for name, text in self._parts().items() if len(text) <= TEXT_LIMIT}
        return f"?{urlencode(kept, errors='replace')}" if kept else ""

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parts that are too long for a link."""
        return tuple(name for name, text in self._parts().items() if len(text) > TEXT_LIMIT)

    @property
    def complaint(self) -> str:
        """What of the address did not fit, in one line; empty where all did."""
        if not self.unread:
            return ""
        more = len(self.unread) - _TOLD
        told = [*self.unread[:_TOLD], *([f"{more} more"] if more > 0 else [])]
        return f"Parts of this link do not fit and are left at their defaults: {'; '.join(told)}."

    @classmethod
    def read(cls, query: Mapping[str, str | Sequence[bytes]]) -> PageState:
        """From the parameters of an address, as text or as a server has them; what does not fit is left at its default
        and named in `unread`.
        """
        given: dict[str, Any] = {}
        unread: list[str] = []
        for name, schema in _schema().items():
            if name not in query:
                continue
            raw: Any = query[name]
            try:
                raw = _text(raw)
                if name == "values":
                    given[name], problems = _values(raw)
                    unread += problems
                else:
                    given[name] = schema.validate_python(raw)
            except ValueError as error:
                unread.append(f"{name}={_SHORT.repr(raw)} ({_reason(error)})")
        return cls(**given, unread=tuple(unread))

    def _parts(self) -> dict[str, str]:
        """What differs from a fresh page, as text."""
        fresh = PageState()
        given = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}
        given = {name: value for name, value in given.items() if value != getattr(fresh, name)}
        return {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in given.items()}


@cache
def _schema() -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(PageState, include_extras=True)
    return {entry.name: TypeAdapter(hints[entry.name]) for entry in fields(PageState) if entry.compare}


def _text(raw: str | Sequence[bytes]) -> str:
    if not isinstance(raw, str):
        if len(raw) != 1:
            raise ValueError("it is there more than once")
        try:
            raw = raw[0].decode()
        except UnicodeDecodeError:
            raise ValueError("this is no text in UTF-8") from None
    if len(raw) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST:,} characters")
    return raw


def _values(raw: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The parameters of methods that fit, and what is wrong with the others. Raises ValueError for what is no JSON."""
    try:
        found = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"this is no JSON: {str(error).partition(' at line')[0]}") from None
    if not isinstance(found, dict):
        raise ValueError('it has to be of the form {"method": {"parameter": value}}')
    known = {cls.key: cls for cls in registered()}
    kept: dict[str, dict[str, Any]] = {}
    problems = []
    for key, given in found.items():
        if key not in known:
            problems.append(f"values of {_SHORT.repr(key)} (there is no such method)")
        elif not isinstance(given, dict):
            problems.append(f"values of {key}={_SHORT.repr(given)} (it has to name parameters)")
        else:
            schema = _parameters(known[key])
            for name, value in given.items():
                try:
                    if name not in schema:
                        raise ValueError("there is no such parameter")
                    if isinstance(value, int) and abs(value) > _LARGEST:
                        raise ValueError("the number is too large")
                    kept.setdefault(key, {})[name] = schema[name].validate_python(value)
                except ValueError as error:
                    problems.append(f"{_SHORT.repr(name)} of {key}={_SHORT.repr(value)} ({_reason(error)})")
    return kept, problems


@cache
def _parameters(cls: type[Method]) -> dict[str, TypeAdapter[Any]]:
    """What each parameter of a method takes by itself; whether they fit each other is the method's to say."""
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    found = {entry.name: cls.model_fields[entry.name] for entry in cls.parameters()}
    return {
        name: TypeAdapter(cast("Any", Annotated[entry.annotation, entry]), config=strict)
        for name, entry in found.items()
    }


def _reason(error: ValueError) -> str:
    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    said = said.removeprefix("Value error, ").partition(", unable to parse")[0]
    return said[:1].lower() + said[1:]
