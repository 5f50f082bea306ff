"""Which recipes a search may try: methods that work together, their settings, sizes, and levels of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from workbench.budget import Budget
from workbench.errors import BadParameter, BadRecipe
from workbench.kv.base import KVMethod, Stages
from workbench.kv.layerwise import LayerwiseMethod
from workbench.recipe import Recipe
from workbench.registry import Method, find, registered
from workbench.search.ranges import choices, drawn
from workbench.weights.base import WeightMethod

if TYPE_CHECKING:
    from optuna.trial import Trial

WEIGHTS = ("rtn", "hqq")  # weight methods that are tried where nobody names any: both take seconds
BY_LAYER = "by layer"  # the setting of a method in which each layer's level is drawn
SIZES = 9  # of a cache: all the room there is, and in steps of the square root of 2 a sixteenth of it
_ALL, _NONE, _PLAIN = "all tokens", "nothing", "as it is"
_ONLY_STORES = frozenset({"store"})


@dataclass(frozen=True)
class WeightOption:
    """A way to hold the weights. nbytes: what the model's weights take then, as the search counts them."""

    method: Method | None
    nbytes: int

    @property
    def label(self) -> str:
        return _PLAIN if self.method is None else self.method.label()


@dataclass(frozen=True)
class Space:
    """What a search may choose from.

    keep: KV methods that choose what stays, beside: those that divide or merge it, store: those that hold it in fewer
    bytes; each by key. attention: methods of reading. weights: options, in the order they are tried in. room: bytes
    for the cache, by the place of the weights' option (None: no limit). full: bytes of the largest uncompressed cache.
    layers: how many layers may be compressed.
    """

    keep: tuple[str, ...]
    beside: tuple[str, ...]
    store: tuple[str, ...]
    attention: tuple[str, ...]
    weights: tuple[WeightOption, ...]
    room: tuple[int | None, ...]
    full: int
    layers: int

    def budget(self, option: int, size: int) -> Budget:
        """The budget of the cache at a size, 0 the largest: of the room that a weights' option leaves, or as a share
        of the uncompressed cache.
        """
        share, room = 2 ** (-size / 2), self.room[option]
        if room is None:
            return Budget("share", round(share, 4))
        return Budget("bytes", float(max(int(share * min(room, self.full)) if size else room, 1)))

    def binds(self, option: int) -> bool:
        """Whether a weights' option leaves less room than the uncompressed cache needs."""
        room = self.room[option]
        return room is not None and room < self.full

    def recipe(self, trial: Trial) -> Recipe | None:
        """The recipe that a trial stands for; None for parameters that do not go together.

        Layers' levels are parameters of the trial called "level 0", "level 1" and so on.
        """
        option = self._weights(trial)
        attention = trial.suggest_categorical("attention", [_NONE, *self.attention]) if self.attention else _NONE
        kinds = self._kinds(trial)
        budget = None
        if any(cls.takes_budget() for cls in kinds):
            budget = self.budget(option, trial.suggest_int("size", 0, SIZES - 1))
        try:
            cache: list[Method] = [self._method(trial, cls, alone=len(kinds) == 1) for cls in kinds]
        except BadParameter:
            return None
        others = [method for method in (self.weights[option].method,) if method is not None]
        if attention != _NONE:
            others.append(find(attention)(**drawn(trial, find(attention))[1]))
        return Recipe.of([*(cache or [find("full")()]), *others], budget=budget)

    def _weights(self, trial: Trial) -> int:
        labels = [option.label for option in self.weights]
        return labels.index(trial.suggest_categorical("weights", labels)) if len(labels) > 1 else 0

    def _kinds(self, trial: Trial) -> list[type[KVMethod]]:
        """The KV methods that a trial names, without those that cannot join the first."""
        keep = trial.suggest_categorical("keep", [_ALL, *self.keep])
        store = trial.suggest_categorical("store", [_PLAIN, *self.store])
        if keep == _ALL:
            return [] if store == _PLAIN else [_kv(store)]
        beside = trial.suggest_categorical("beside", [_NONE, *self.beside])
        chosen = [_kv(keep)]
        for key in (beside, store):
            if key not in (_NONE, _PLAIN, keep) and fit([*chosen, _kv(key)]):
                chosen.append(_kv(key))
        return chosen

    def _method(self, trial: Trial, cls: type[KVMethod], *, alone: bool) -> KVMethod:
        setting, values = drawn(trial, cls, (BY_LAYER,) if self.layers > 1 and issubclass(cls, LayerwiseMethod) else ())
        method = cls(**values)
        if setting != BY_LAYER or not alone or not isinstance(method, LayerwiseMethod):
            return method
        levels = [trial.suggest_int(f"level {layer}", 0, method.levels - 1) for layer in range(self.layers)]
        return method.at_levels(levels)

    def beginnings(self) -> Iterator[dict[str, Any]]:
        """Parameters of the trials that come first: the uncompressed cache under each of the weights' options that
        leaves room for it, then every method by itself as it is by default, and layer by layer.
        """
        for number, option in enumerate(self.weights):
            if not self.binds(number):
                yield {"weights": option.label, "keep": _ALL, "store": _PLAIN}
        shared = self._begin()
        for key in self.store:
            alone = {**shared, "keep": _ALL, "store": key}
            yield {**alone, f"{key}: setting": "ours"}
            if self.layers > 1 and issubclass(find(key), LayerwiseMethod):
                yield {**alone, f"{key}: setting": BY_LAYER}
        for key in self.keep:
            yield {**shared, "keep": key, "store": _PLAIN, f"{key}: setting": "ours"}

    def _begin(self) -> dict[str, Any]:
        """What the first trials have in common: weights that leave room for the cache, where any do, and its size."""
        first = next((number for number, _ in enumerate(self.weights) if not self.binds(number)), None)
        size = 0 if first is None else 3  # where everything fits, what a third of the cache would do
        return {"weights": self.weights[first or 0].label, "size": size, "attention": _NONE, "beside": _NONE}

    def pairs(self, keep: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Parameters of trials in which each of some methods that choose what stays is joined by every store."""
        shared = {key: value for key, value in self._begin().items() if key != "store"}
        for chosen in keep:
            for key in self.store:
                if fit([_kv(chosen), _kv(key)]):
                    settings = {f"{each}: setting": "ours" for each in (chosen, key)}
                    yield {**shared, "keep": chosen, "store": key, **settings}

    def bytes_for_cache(self, parameters: Mapping[str, Any]) -> int:
        """The bytes that a trial with these parameters has for its cache."""
        labels = [option.label for option in self.weights]
        option = labels.index(parameters.get("weights", labels[0]))
        return self.budget(option, parameters.get("size", 0)).nbytes(self.full) or 0


def _kv(key: str) -> type[KVMethod]:
    cls = find(key)
    assert issubclass(cls, KVMethod)
    return cls


def fit(kinds: Sequence[type[KVMethod]]) -> bool:
    """Whether KV methods, as they are by default, work together."""
    try:
        Stages.of([cls() for cls in kinds])
    except BadRecipe:
        return False
    return True


def at_sizes(cls: type[WeightMethod]) -> Iterator[WeightMethod]:
    """A weight method at the sizes that are tried, largest first: all its bits, or shares of its default budget."""
    widths = next((choices(each) for each in cls.parameters() if each.name == "bits"), ())
    if widths:
        for bits in sorted(widths, reverse=True):
            values: dict[str, Any] = {"bits": bits}
            yield cls(**values)
    elif cls.default_budget is not None:
        yield from (cls().with_budget(round(cls.default_budget * part, 4)) for part in (1.0, 0.75, 0.5))
    else:
        yield cls()


@dataclass(frozen=True)
class Chosen:
    """Methods by what they are in a recipe, each by key."""

    keep: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    store: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


def chosen_methods(keys: Sequence[str] | None, *, host: Literal["counts", "free"]) -> Chosen:
    """Methods by what they are in a recipe: those under these keys, or those that a search tries by itself, which are
    all KV methods and the `WEIGHTS`.

    host: whether host memory counts; where it does, methods that move the cache there save nothing and are left out.
    Raises UnknownMethod, BadParameter.
    """
    classes = [*registered("kv"), *map(find, WEIGHTS)] if keys is None else [find(key) for key in dict.fromkeys(keys)]
    found = Chosen()
    for cls in classes:
        if cls.family == "operator":
            raise BadParameter(f"{cls.key} is studied on a trace and cannot be part of a recipe")
        if not issubclass(cls, KVMethod):
            kind = "attention" if cls.family == "attention" else "weights"
            found = replace(found, **{kind: (*getattr(found, kind), cls.key)})
            continue
        if cls.key == "full" or (keys is None and host == "counts" and cls.contributes("retrieve")):
            continue
        for kind in _roles(cls):
            found = replace(found, **{kind: (*getattr(found, kind), cls.key)})
    return found


def _roles(cls: type[KVMethod]) -> Iterator[str]:
    """What a KV method is in a recipe."""
    if cls.contributed <= _ONLY_STORES:
        yield "store"
        return
    if fit([cls]):
        yield "keep"
    if cls.contributes("allocate") or cls.contributes("merge"):
        yield "beside"
