"""What a page shows, as text in its address: a link brings it back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any, cast, get_type_hints
from urllib.parse import urlencode

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from workbench.budget import Budget
from workbench.errors import BadBudget, BadParameter
from workbench.examples import example
from workbench.registry import Method, registered
from workbench_widgets.app.state.recipe_slots import methods_for

TEXT_LIMIT = 1500  # characters of any part of a page that still fit into a link
TABS = 7
_LONGEST = 100_000  # characters of any part of an address; servers take fewer
_LARGEST = 2**53  # up to here browsers count exactly
_NAMED = 4  # parts that did not fit that are named


def _whole_text(text: str) -> str:
    text.encode()  # of half a character: UnicodeEncodeError, a ValueError
    return text


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
_Long = Annotated[str, AfterValidator(_whole_text)]  # an address holds less of it: `_LONGEST`
_Count = Annotated[int, Field(ge=0, lt=10_000)]


@dataclass(frozen=True)
class PageState:
    """The choices that make a view, each with its default and with what an address may say of it.

    `query` and `read` are inverse to each other.
    """

    model: Annotated[str, Field(max_length=1000), AfterValidator(_model)] = ""
    example: Annotated[_Name, AfterValidator(_example)] = "haystack"
    text: _Long = ""
    kv: Annotated[_Name, _method("kv")] = "snapkv"
    refine: Annotated[_Name, _method("refine")] = ""
    allocate: Annotated[_Name, _method("allocate")] = ""
    store: Annotated[_Name, _method("store")] = ""
    retrieve: Annotated[_Name, _method("retrieve")] = ""
    select: Annotated[_Name, _method("select")] = ""
    evict: Annotated[_Name, _method("evict")] = ""
    weights: Annotated[_Name, _method("weights")] = ""
    attention: Annotated[_Name, _method("attention")] = ""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # method key -> parameters unlike their defaults
    budget: Annotated[_Name, AfterValidator(_budget)] = "25%"
    weights_budget: Annotated[_Name, AfterValidator(_budget)] = ""  # empty: the weight method's own
    question: _Long = ""
    expected: _Long | None = None  # the answer; None: the example's own
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
        more = len(self.unread) - _NAMED
        named = [*self.unread[:_NAMED], *([f"{more} more"] if more > 0 else [])]
        return f"Parts of this link do not fit and are left at their defaults: {'; '.join(named)}."

    @classmethod
    def read(cls, query: Mapping[str, str | Sequence[bytes]]) -> PageState:
        """From the parameters of an address, as text or as a server has them; what does not fit is left at its default
        and named in `unread`.
        """
        parts: dict[str, Any] = {}
        unread: list[str] = []
        for name, schema in _SCHEMA.items():
            if name not in query:
                continue
            raw = query[name]
            try:
                raw = _text(raw)
                if name == "values":
                    parts[name], problems = _values(raw)
                    unread += problems
                else:
                    parts[name] = schema.validate_python(raw)
            except ValueError as error:
                unread.append(f"{name}={_shortened(raw)} ({_reason(error)})")
        return cls(**parts, unread=tuple(unread))

    def to_dict(self) -> dict[str, Any]:
        """All that differs from a fresh page, texts of any length too, ready for JSON."""
        fresh = PageState()
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}
        return {name: value for name, value in values.items() if value != getattr(fresh, name)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PageState:
        """What `to_dict` wrote. Raises ValueError for what does not fit."""
        if unknown := next((name for name in data if name not in _SCHEMA), None):
            raise ValueError(f"a page has no {_shortened(unknown)}")
        parts: dict[str, Any] = {name: _SCHEMA[name].validate_python(value) for name, value in data.items()}
        return cls(**parts)

    def _parts(self) -> dict[str, str]:
        """What differs from a fresh page, as text."""
        changed = self.to_dict()
        return {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in changed.items()}


def _schema() -> dict[str, TypeAdapter[object]]:
    hints = get_type_hints(PageState, include_extras=True)
    return {entry.name: TypeAdapter(hints[entry.name]) for entry in fields(PageState) if entry.compare}


_SCHEMA = MappingProxyType(_schema())  # what each part of an address takes


def _shortened(value: object) -> str:
    """What an address said, in a few characters."""
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 40
    brief.maxlevel = brief.maxdict = brief.maxlist = 2
    return brief.repr(value)


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


def _values(raw: str) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The parameters of methods that fit, and what is wrong with the others. Raises ValueError for what is no JSON."""
    try:
        values = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"this is no JSON: {str(error).partition(' at line')[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(  # noqa: TRY004  (of a text: every reason why it does not fit is a ValueError)
            'it has to be of the form {"method": {"parameter": value}}'
        )
    known = {cls.key: cls for cls in registered()}
    kept: dict[str, dict[str, object]] = {}
    problems = []
    for key, parameters in values.items():
        if key not in known:
            problems.append(f"values of {_shortened(key)} (there is no such method)")
        elif not isinstance(parameters, dict):
            problems.append(f"values of {key}={_shortened(parameters)} (it has to name parameters)")
        else:
            schema = _parameters(known[key])
            for name, value in parameters.items():
                try:
                    kept.setdefault(key, {})[name] = _parameter(schema, name, value)
                except ValueError as error:
                    problems.append(f"{_shortened(name)} of {key}={_shortened(value)} ({_reason(error)})")
    return kept, problems


def _parameter(schema: Mapping[str, TypeAdapter[object]], name: str, value: object) -> object:
    if name not in schema:
        raise ValueError("there is no such parameter")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("the number is too large")
    return schema[name].validate_python(value)


def _parameters(cls: type[Method]) -> dict[str, TypeAdapter[object]]:
    """What each parameter of a method takes by itself; whether they fit each other is the method's to say."""
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    entries = {entry.name: cls.model_fields[entry.name] for entry in cls.parameters()}
    return {
        name: TypeAdapter(cast("Any", Annotated[entry.annotation, entry]), config=strict)
        for name, entry in entries.items()
    }


def _reason(error: ValueError) -> str:
    message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    message = message.removeprefix("Value error, ").partition(", unable to parse")[0]
    return message[:1].lower() + message[1:]
