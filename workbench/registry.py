"""Methods as immutable, validated descriptions, recipes of several of them, and the registry that finds them by key.

Controls, JSON, URLs, sweeps and cache keys all come from the one description.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import ValidationError

from workbench.budget import Budget, BudgetLike
from workbench.described import Described
from workbench.errors import BadBudget, BadParameter, BadRecipe, InputError, PluginConflict, UnknownMethod
from workbench.formatting import quoted
from workbench.parameters import Parameter, closest, param
from workbench.published import OURS, Fidelity, Preset
from workbench.recipe_text import parts_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "FAMILIES",
    "Family",
    "Fidelity",
    "Method",
    "Paper",
    "Parameter",
    "Preset",
    "Recipe",
    "Spec",
    "find",
    "from_dict",
    "method",
    "methods",
    "param",
    "register",
    "registered",
]

Family = Literal["kv", "weights", "attention", "operator"]
PLUGINS = "workbench.methods"
FAMILIES: tuple[Family, ...] = get_args(Family)
_HOMES = {"operator": "workbench.attention.operators"}  # the others live in a package of their family's name
_JOINED = "a recipe with a budget for all its methods cannot join others; give the budget to the whole"


@dataclass(frozen=True)
class Paper:
    """Where a method comes from: title, first author and year, arXiv number where there is one."""

    title: str
    authors: str
    arxiv: str | None = None

    def __str__(self) -> str:
        number = f", arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.title} ({self.authors}{number})"


class Method(Described):
    """A description of one compression method: family, budget, parameters. Immutable and hashable.

    A subclass sets `key`, `title`, `paper`, `claim`, `fidelity` and `presets`, and declares its parameters with
    `param`. Its docstring's first line says in one sentence what the method does. Unknown or out-of-bounds parameters
    raise BadParameter, a bad budget BadBudget.
    """

    family: ClassVar[Family]
    ring: ClassVar[int] = 1
    paper: ClassVar[Paper | None] = None
    claim: ClassVar[str] = ""
    fidelity: ClassVar[Fidelity | None] = None  # how true it is to its paper; None: a plugin does not say
    presets: ClassVar[tuple[Preset, ...]] = ()  # published values; the first to name a parameter gives its default
    default_budget: ClassVar[float | None] = None
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})  # what subclasses once declared or defined -> its name

    budget: Budget | None = param(None, help="share of the uncompressed bytes, or a size")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for former, name in cls.renamed.items():
            if hasattr(cls, former):  # it would be passed over without a word
                raise TypeError(f"{cls.__name__} defines `{former}`, which is called `{name}` now")

    @classmethod
    def _refusal(cls, error: ValidationError) -> type[InputError]:
        """BadBudget where nothing but the budget is wrong."""
        return BadBudget if all(problem["loc"] == ("budget",) for problem in error.errors()) else BadParameter

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether a budget chooses how much is saved; elsewhere there is nothing to save, or the parameters decide."""
        return True

    @property
    def effective_budget(self) -> Budget | None:
        """The budget given, else the method's default."""
        if self.budget is None and self.default_budget is not None:
            return Budget.parse(self.default_budget)
        return self.budget

    def with_budget(self, budget: BudgetLike | None) -> Self:
        """The same method with another budget."""
        return type(self)(**{**dict(self), "budget": budget})

    def parameter_key(self) -> tuple[Any, ...]:
        """What identifies the method apart from its budget: results that do not depend on the budget are cached under
        it.
        """
        return (type(self), *((name, value) for name, value in self if name != "budget"))

    def __or__(self, other: Method | Recipe) -> Recipe:
        return Recipe((self,)) | other

    def label(self, *, budgeted: bool = True) -> str:
        """A short name with whatever differs from the defaults: `snapkv 0.25 window=16`; the budget if `budgeted`."""
        changed = [f"{name}={value}" for name, value in self if name != "budget" and value != self._default(name)]
        budget = [str(self.effective_budget)] if budgeted and self.effective_budget is not None else []
        return " ".join([self.key, *budget, *changed])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        return {"method": self.key, **self.model_dump(mode="json")}

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """The method's own parameters, without the budget."""
        return tuple(parameter for parameter in super().parameters() if parameter.name != "budget")

    @classmethod
    def preset(cls, name: str) -> Mapping[str, Any]:
        """The values of a preset; "ours": none, all parameters at their defaults. Raises BadParameter."""
        known = {OURS: MappingProxyType({}), **{preset.name: preset.values for preset in cls.presets}}
        if not isinstance(name, str) or name not in known:
            raise BadParameter(f"{cls.key}: preset {quoted(name)}: there are {', '.join(known)}")
        return known[name]

    @classmethod
    def preset_values(cls, name: str) -> dict[str, Any]:
        """All of the method's parameters as a preset has them: its values, and defaults beside. Raises BadParameter."""
        return {**{parameter.name: parameter.default for parameter in cls.parameters()}, **cls.preset(name)}

    @classmethod
    def preset_of(cls, values: Mapping[str, Any]) -> str | None:
        """The preset that gives all of the method's parameters these values, "ours" first; None: they were changed."""
        current = {**cls.preset_values(OURS), **values}
        for name in (OURS, *(preset.name for preset in cls.presets)):
            if current == cls.preset_values(name):
                return name
        return None


@dataclass(frozen=True)
class Recipe:
    """Methods that are applied together, and optionally one budget for all KV methods in it.

    Without a budget of its own, each method keeps to its own: an eviction method's budget counts what stays at the
    uncompressed precision, and a storage method then shrinks that further. With one, the eviction share is chosen so
    that the stored bytes of all KV methods together meet it.
    """

    methods: tuple[Method, ...]
    budget: Budget | None = None

    def __post_init__(self) -> None:
        operators = [item.key for item in self.methods if item.family == "operator"]
        if operators:
            raise BadRecipe(
                f"{', '.join(operators)}: operators are studied on a recording, not run in the model: "
                f"session.operator({operators[0]!r}, layer, head)"
            )

    @classmethod
    def of(cls, spec: Spec, *, budget: BudgetLike | None = None, **parameters: Any) -> Recipe:
        """Read a recipe from a key, a method, a list of either, a recipe, or a text: "snapkv window=16 + kivi".

        budget: of the method, or with several of all together (None: as `spec` has it). parameters: of the one method,
        and `preset` for published ones. Raises UnknownMethod, BadParameter, BadBudget or BadRecipe.
        """
        changes = dict(parameters) if budget is None else {**parameters, "budget": budget}
        if isinstance(spec, str):
            if spec.strip() in _METHODS or not set(spec) & {"+", "="}:
                return cls((method(spec, **changes),))
            written = [method(key, **values) for key, values in parts_of(spec)]
            return cls.of(written if len(written) > 1 else written[0], **changes)
        if isinstance(spec, Method):
            values = {**type(spec).preset(changes.pop("preset", OURS)), **changes}
            return cls((type(spec)(**{**dict(spec), **values}) if values else spec,))
        if isinstance(spec, Recipe):
            return cls.of(spec.methods, budget=spec.budget if budget is None else budget, **parameters)
        if not isinstance(spec, Sequence):
            raise BadRecipe(f"a recipe is a method's key, a method, or a list of them, not {quoted(spec)}")
        parts = [cls.of(part) for part in spec]
        if any(part.budget is not None for part in parts):
            raise BadRecipe(_JOINED)
        items = [item for part in parts for item in part.methods]
        if not items:
            raise BadRecipe("an empty recipe: name at least one method, for instance 'full'")
        if len(items) == 1:
            return cls.of(items[0], budget=budget, **parameters)
        if parameters:
            raise BadRecipe(
                f"{', '.join(parameters)}: with several methods in a recipe, give parameters to the methods themselves"
            )
        return cls(tuple(items), None if budget is None else Budget.parse(budget))

    def family(self, family: Family) -> tuple[Method, ...]:
        """The methods of one family, in order."""
        return tuple(item for item in self.methods if item.family == family)

    def takes_budget(self) -> bool:
        """Whether one budget for all cache methods means something: whether any of them takes one."""
        return any(item.takes_budget() for item in self.family("kv"))

    @property
    def label(self) -> str:
        """A short name for tables and legends; cache methods whose bytes are the recipe's total name no budget."""
        if self.budget is None:
            return " + ".join(item.label() for item in self.methods)
        return " + ".join(item.label(budgeted=item.family != "kv") for item in self.methods) + f" ({self.budget})"

    def __or__(self, other: Method | Recipe) -> Recipe:
        other = Recipe.of(other)
        if other.budget is not None:
            raise BadRecipe(_JOINED)
        return Recipe.of([*self.methods, *other.methods], budget=self.budget)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        budget = None if self.budget is None else self.budget.to_json()
        return {"methods": [item.to_dict() for item in self.methods], "budget": budget}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> Recipe:
        """Read back what `to_dict` wrote."""
        items = description.get("methods") if isinstance(description, dict) else None
        if not isinstance(items, list):
            raise BadRecipe(f"a recipe's description needs a list under 'methods': {quoted(description)}")
        return cls.of([from_dict(item) for item in items], budget=description.get("budget"))


Spec = Recipe | Method | str | Sequence[Method | str]
"""What a recipe is read from; a text is a key, or several with parameters: "snapkv window=16 + kivi"."""


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
    """All method classes, of one family if given, in the order of the catalogue: by family and key, plugins last."""
    if family is not None and family not in FAMILIES:
        raise UnknownMethod(f"unknown family {quoted(family)}: there are {', '.join(FAMILIES)}")
    for name in FAMILIES:
        import_module(_HOMES.get(name, f"workbench.{name}"))
    _load_plugins()
    return tuple(sorted((cls for cls in _METHODS.values() if family in (None, cls.family)), key=_place))


def _place(cls: type[Method]) -> tuple[int, bool, str]:
    return FAMILIES.index(cls.family), not cls.__module__.startswith("workbench."), cls.key


@cache
def _load_plugins() -> None:
    """Register the methods that other packages offer under the entry point group `workbench.methods`.

    A plugin that is broken, or takes a key of the workbench's own, is left out with a warning. Raises PluginConflict
    where two packages offer methods under the same key: which of them was meant, nobody could tell.
    """
    owners: dict[str, EntryPoint] = {}
    for point in entry_points(group=PLUGINS):
        try:
            owners[register(_loaded(point)).key] = point
        except Exception as error:  # a plugin that is broken must not take the others with it
            if isinstance(error, _KeyTaken) and error.key in owners:
                raise PluginConflict(
                    f"two plugins offer a method under the key {error.key!r}: {_whose(owners[error.key])} and "
                    f"{_whose(point)}; uninstall one of them"
                ) from error
            warnings.warn(f"the plugin {_whose(point)} cannot be used: {error}", stacklevel=2)


def _loaded(point: EntryPoint) -> type[Method]:
    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"{cls!r} is not a subclass of workbench.registry.Method")
    return cls


def _whose(point: EntryPoint) -> str:
    """A plugin as messages name it: the package that brings it, and where the method is."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.name
    return f"{package} ({point.value})"


def find(key: str) -> type[Method]:
    """The method class registered under `key`. Raises UnknownMethod, naming the closest keys."""
    known = {cls.key: cls for cls in registered()}
    if not isinstance(key, str) or key not in known:
        close = closest(key, list(known), 3) if isinstance(key, str) else []
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UnknownMethod(f"unknown method {quoted(key)}: {hint}")
    return known[key]


def method(key: str, *, preset: str = OURS, **parameters: Any) -> Method:
    """Build a method from its key: `method("snapkv", budget=0.25, window=16)`.

    preset: from which published values to begin, for instance "paper"; default: the method's defaults.
    """
    cls = find(key)
    return cls(**{**cls.preset(preset), **parameters})


def from_dict(description: dict[str, Any]) -> Method:
    """Read back what `Method.to_dict` wrote."""
    values = dict(description) if isinstance(description, dict) else {}
    key = values.pop("method", None)
    if not isinstance(key, str):
        raise UnknownMethod(f"a method's description needs its key under 'method': {quoted(description)}")
    return method(key, **values)


def methods(family: str | None = None) -> pd.DataFrame:
    """The catalogue: one row a method, with key, name, family, ring, paper, claim, how true it is to the paper,
    parameters and the names of its presets.
    """
    import pandas as pd

    columns = ["key", "name", "family", "ring", "summary", "paper", "claim", "fidelity", "parameters", "presets"]
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
        "fidelity": str(cls.fidelity or ""),
        "parameters": ", ".join(f"{parameter.name}={parameter.default}" for parameter in cls.parameters()),
        "presets": ", ".join(preset.name for preset in cls.presets),
    }
