"""What a page shows, as text in its address: a link brings it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import urlencode

TEXT_LIMIT = 1500  # characters of a text of one's own that still fit into a link


@dataclass(frozen=True)
class PageState:
    """The choices that make a view, each with its default; `query` and `read` are inverse to each other."""

    model: str = ""
    example: str = "needle"
    text: str = ""
    kv: str = "snapkv"
    allocate: str = ""
    store: str = ""
    retrieve: str = ""
    weights: str = ""
    attention: str = ""
    values: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # method key -> parameters that differ from defaults
    budget: str = "25%"
    weights_budget: str = ""  # empty: the weight method's own
    question: str = ""
    tokens: int = 32
    layer: int = 0
    head: int = 0
    tab: int = 0

    def query(self) -> str:
        """What differs from a fresh page, as `?kv=h2o&budget=10%25`; empty for a fresh page."""
        fresh = PageState()
        given = {name: value for name, value in asdict(self).items() if value != getattr(fresh, name)}
        if len(self.text) > TEXT_LIMIT:
            del given["text"]
        pairs = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in given.items()}
        return f"?{urlencode(pairs)}" if pairs else ""

    @classmethod
    def read(cls, query: Mapping[str, str]) -> PageState:
        """From the parameters of an address; what cannot be read is left at its default."""
        given: dict[str, Any] = {}
        for entry in fields(cls):
            if entry.name not in query:
                continue
            raw = query[entry.name]
            if entry.name == "values":
                given["values"] = _values(raw)
            elif entry.type == "int":
                given[entry.name] = int(raw) if raw.isdecimal() and len(raw) < 7 else entry.default
            else:
                given[entry.name] = raw
        return cls(**given)


def _values(raw: str) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)}
