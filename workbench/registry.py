"""Methods as immutable, validated descriptions, and the registry that finds them.

Controls, JSON, URLs, sweeps and cache keys all come from the one description.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from workbench import arguments
from workbench.budget import Budget
from workbench.errors import BadBudget, BadParameter, PluginConflict, UnknownMethod
from workbench.formatting import quoted

if TYPE_CHECKING:
    import pandas as pd

    from workbench.recipe import Recipe

Family = Literal["kv", "weights", "attention", "operator"]
PLUGINS = "workbench.methods"
_PARTS = 5  # of what is wrong with a method's parameters that a message tells
_NAME = 64  # characters of an unknown name that are compared with those that are known
FAMILIES: tuple[Family, ...] = get_args(Family)
_HOMES = {"operator": "workbench.attention.operators"}  # the others live in a package of their family's name


@dataclass(frozen=True)
class Paper:
    """Where a method comes from: title, first author and year, arXiv number where there is one."""

    title: str
    authors: str
    arxiv: str | None = None

    def __str__(self) -> str:
        number = f", arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.title} ({self.authors}{number})"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as controls and help texts need it."""

    name: str
    kind: Literal["int", "float", "bool", "choice", "text"]
    default: Any
    help: str
    unit: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    step: float | None = None  # values lie this far apart, counted from `low`: 2 for odd ones


def param(default: Any, *, help: str, unit: str | None = None, odd: bool = False, **bounds: Any) -> Any:
    """Declare a method's parameter: its default, bounds (`ge`, `gt`, `le`, `lt`), unit and one line of help."""
    return Field(default, description=help, json_schema_extra={"unit": unit, "odd": odd}, **bounds)


class Method(BaseModel):
    """A description of one compression method: family, budget, parameters. Immutable and hashable.

    A subclass sets `key`, `title`, `paper` and `claim`, and declares its parameters with `param`. Its docstring's first
    line says in one sentence what the method does. Unknown or out-of-bounds parameters raise BadParameter, a bad budget
    BadBudget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    family: ClassVar[Family]
    key: ClassVar[str] = ""
    title: ClassVar[str] = ""
    ring: ClassVar[int] = 1
    paper: ClassVar[Paper | None] = None
    claim: ClassVar[str] = ""
    default_budget: ClassVar[float | None] = None

    budget: Budget | None = param(None, help="share of the uncompressed bytes, or a size")

    def __init__(self, **values: Any) -> None:
        for name, field in type(self).model_fields.items():
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            if isinstance(values.get(name), bool) and choices:  # True is 1 for pydantic
                arguments.choice(f"{self.key}: {name}", values[name], choices)
        try:
            super().__init__(**{name: _plain(value) for name, value in values.items()})
        except ValidationError as error:
            budget_only = all(problem["loc"] == ("budget",) for problem in error.errors())
            raise (BadBudget if budget_only else BadParameter)(_explain(type(self), error)) from None
        for name, field in type(self).model_fields.items():
            extra = cast("dict[str, Any]", field.json_schema_extra or {})
            value = getattr(self, name)
            if extra.get("odd") and value % 2 == 0:
                raise BadParameter(f"{self.key}: {name} must be odd, not {value}")

    @property
    def effective_budget(self) -> Budget | None:
        """The budget given, else the method's default."""
        if self.budget is None and self.default_budget is not None:
            return Budget.parse(self.default_budget)
        return self.budget

    def with_budget(self, budget: Any) -> Self:
        """The same method with another budget."""
        return type(self)(**{**dict(self), "budget": budget})

    def parameter_key(self) -> tuple[Any, ...]:
        """What identifies the method apart from its budget: results that do not depend on the budget are cached under
        it.
        """
        return (type(self), *((name, value) for name, value in self if name != "budget"))

    def __or__(self, other: Method | Recipe) -> Recipe:
        from workbench.recipe import Recipe

        return Recipe((self,)) | other

    def label(self, *, budgeted: bool = True) -> str:
        """A short name with whatever differs from the defaults: `snapkv 0.25 window=16`; the budget if `budgeted`."""
        own = [f"{name}={value}" for name, value in self if name != "budget" and value != self._default(name)]
        budget = [str(self.effective_budget)] if budgeted and self.effective_budget is not None else []
        return " ".join([self.key, *budget, *own])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        return {"method": self.key, **self.model_dump(mode="json")}

    @classmethod
    def summary(cls) -> str:
        """What the method does, in one sentence."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """The method's own parameters, without the budget."""
        return tuple(_parameter(name, field) for name, field in cls.model_fields.items() if name != "budget")

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.model_fields[name].default


def _parameter(name: str, field: FieldInfo) -> Parameter:
    extra = cast("dict[str, Any]", field.json_schema_extra or {})
    bounds: dict[str, float] = {}
    for rule in field.metadata:
        for bound in ("ge", "gt", "le", "lt", "multiple_of"):
            value = getattr(rule, bound, None)
            if value is not None:
                bounds[bound] = value
    annotation = field.annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else None
    kinds = {int: "int", float: "float", bool: "bool"}
    kind = "choice" if choices else kinds.get(cast(Any, annotation), "text")
    return Parameter(
        name=name,
        kind=cast(Any, kind),
        default=field.default,
        help=field.description or "",
        unit=extra.get("unit"),
        low=bounds.get("ge", bounds.get("gt")),
        high=bounds.get("le", bounds.get("lt")),
        choices=choices,
        step=2 if extra.get("odd") else bounds.get("multiple_of"),
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's own; everything else as it is, for text is no number and a bool is none either."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value


def _explain(cls: type[Method], error: ValidationError) -> str:
    """One line for everything that is wrong with the parameters."""
    names = list(cls.model_fields)
    parts = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name[:_NAME], names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            parts.append(f"unknown parameter {quoted(name)}{hint} It takes {', '.join(names)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            parts.append(message if name == "budget" else f"{name}={quoted(problem['input'])}: {message}")
    return f"{cls.key}: " + "; ".join(parts[:_PARTS]) + ("; and more" if len(parts) > _PARTS else "")


_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


class _KeyTaken(TypeError):
    """Two classes under one key."""

    def __init__(self, key: str, first: type[Method], second: type[Method]) -> None:
        super().__init__(f"two methods under the key {key!r}: {first.__name__} and {second.__name__}")
        self.key = key


def register(cls: M) -> M:
    """Class decorator: put a method into the registry under its key."""
    if not cls.key or not cls.claim or not cls.summary():
        raise TypeError(f"{cls.__name__} needs a key, a claim and a docstring to be registered")
    if _METHODS.get(cls.key, cls) is not cls:
        raise _KeyTaken(cls.key, _METHODS[cls.key], cls)
    _METHODS[cls.key] = cls
    return cls


def registered(family: str | None = None) -> tuple[type[Method], ...]:
    """All method classes, of one family if given, in the order of the catalogue."""
    if family is not None and family not in FAMILIES:
        raise UnknownMethod(f"unknown family {quoted(family)}: there are {', '.join(FAMILIES)}")
    for name in FAMILIES:
        import_module(_HOMES.get(name, f"workbench.{name}"))
    _load_plugins()
    return tuple(cls for cls in _METHODS.values() if family in (None, cls.family))


@cache
def _load_plugins() -> None:
    """Register the methods that other packages offer under the entry point group `workbench.methods`.

    A plugin that is broken, or takes a key of the workbench's own, is left out with a warning. Raises PluginConflict
    where two packages offer methods under the same key: which of them was meant, nobody could tell.
    """
    owners: dict[str, EntryPoint] = {}
    for point in entry_points(group=PLUGINS):
        try:
            cls = point.load()
            if not (isinstance(cls, type) and issubclass(cls, Method)):
                raise TypeError(f"{cls!r} is not a subclass of workbench.registry.Method")
            owners[register(cls).key] = point
        except Exception as error:  # a plugin that is broken must not take the others with it
            if isinstance(error, _KeyTaken) and error.key in owners:
                raise PluginConflict(
                    f"two plugins offer a method under the key {error.key!r}: {_whose(owners[error.key])} and "
                    f"{_whose(point)}; uninstall one of them"
                ) from error
            warnings.warn(f"the plugin {_whose(point)} cannot be used: {error}", stacklevel=2)


def _whose(point: EntryPoint) -> str:
    """A plugin as messages name it: the package that brings it, and where the method is."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.name
    return f"{package} ({point.value})"


def find(key: str) -> type[Method]:
    """The method class registered under `key`. Raises UnknownMethod, naming the closest keys."""
    known = {cls.key: cls for cls in registered()}
    if not isinstance(key, str) or key not in known:
        close = difflib.get_close_matches(key[:_NAME], known, n=3) if isinstance(key, str) else []
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UnknownMethod(f"unknown method {quoted(key)}: {hint}")
    return known[key]


def method(key: str, **parameters: Any) -> Method:
    """Build a method from its key: `method("snapkv", budget=0.25, window=16)`."""
    return find(key)(**parameters)


def from_dict(description: dict[str, Any]) -> Method:
    """Read back what `Method.to_dict` wrote."""
    values = dict(description) if isinstance(description, dict) else {}
    key = values.pop("method", None)
    if not isinstance(key, str):
        raise UnknownMethod(f"a method's description needs its key under 'method': {quoted(description)}")
    return method(key, **values)


def methods(family: str | None = None) -> pd.DataFrame:
    """The catalogue: one row a method, with key, name, family, ring, paper, claim and parameters."""
    import pandas as pd

    columns = ["key", "name", "family", "ring", "summary", "paper", "claim", "parameters"]
    return pd.DataFrame([_row(cls) for cls in registered(family)], columns=columns)


def _row(cls: type[Method]) -> dict[str, Any]:
    return {
        "key": cls.key,
        "name": cls.title,
        "family": cls.family,
        "ring": cls.ring,
        "summary": cls.summary(),
        "paper": str(cls.paper) if cls.paper else "",
        "claim": cls.claim,
        "parameters": ", ".join(_describe(cls.parameters())),
    }


def _describe(parameters: Iterable[Parameter]) -> Iterable[str]:
    return (f"{p.name}={p.default}" for p in parameters)
