"""What a search may try: settings of methods, and recipes whose methods work together."""

from __future__ import annotations

import optuna
import pytest

from workbench.errors import BadParameter, UnknownMethod
from workbench.kv.stages import Stages
from workbench.parameters import Parameter
from workbench.registry import find, registered
from workbench.search.ranges import Range, drawn, settings, tunable
from workbench.search.space import BY_LAYER, Space, WeightOption, at_sizes, chosen_methods


def study(seed: int = 0) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def space(*keys: str, rooms: tuple[int | None, ...] = (1000,), full: int = 4000, layers: int = 4) -> Space:
    chosen = chosen_methods(keys or None, host="counts")
    rtn = tuple(WeightOption(method, 500 - 10 * n) for n, method in enumerate(at_sizes(find("rtn"))))  # type: ignore[arg-type]
    weights = (WeightOption(None, 1000), *rtn)[: len(rooms)]
    return Space(chosen.keep, chosen.beside, chosen.store, chosen.attention, weights, rooms, full, layers)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (Parameter("window", "int", 32, "", low=1, high=1024), Range(8, 128, 1)),
        (Parameter("kernel", "int", 5, "", low=1, high=63, step=2), Range(1, 19, 2)),
        (Parameter("group", "int", 64, "", low=8, high=1024, step=8), Range(16, 256, 8)),
        (Parameter("share", "float", 0.5, "", low=0, high=1), Range(0.125, 1)),
        (Parameter("sinks", "int", 0, "", low=0, high=256), None),
        (Parameter("one", "int", 1, "", low=1, high=1), None),
        (Parameter("bits", "text", "auto", ""), None),
    ],
)
def test_numbers_are_drawn_around_their_default_within_their_bounds(
    parameter: Parameter, expected: Range | None
) -> None:
    assert Range.of(parameter) == expected


@pytest.mark.parametrize("cls", registered("kv"), ids=lambda cls: cls.key)
def test_what_is_drawn_is_valid_or_refused_as_a_whole(cls: type) -> None:
    made = study()
    valid = 0
    for _ in range(12):
        setting, values = drawn(made.ask(), cls)
        assert setting in settings(cls) and set(values) <= set(cls.model_fields)
        try:
            cls(**values)
            valid += 1
        except BadParameter as error:
            assert "multiple of" in str(error)
    assert valid >= 4
    assert not any(parameter.name == "seed" for parameter in tunable(cls))


def test_recipes_that_are_drawn_work_together() -> None:
    made, every = study(), space(rooms=(1000, 1500))
    sizes = set()
    for _ in range(150):
        recipe = every.recipe(made.ask())
        if recipe is None:
            continue
        Stages.of([method for method in recipe.methods if method.family == "kv"])  # type: ignore[misc]
        sizes.add(len(recipe.family("kv")))
    assert sizes == {1, 2, 3}


def test_a_cache_has_the_room_that_the_weights_leave() -> None:
    both = space("snapkv", "rtn", rooms=(1000, 6000))
    assert both.binds(0) and not both.binds(1)
    assert [both.budget(0, size).amount for size in (0, 2, 4)] == [1000, 500, 250]
    assert [both.budget(1, size).amount for size in (0, 2)] == [6000, 2000]
    assert str(space("snapkv", rooms=(None,)).budget(0, 4)) == "0.25"
    assert both.bytes_for_cache({"weights": "rtn 8 bits", "size": 2} | {"weights": both.weights[1].label}) == 2000


def test_the_search_begins_with_every_method_by_itself() -> None:
    begun = list(space("snapkv", "kivi", "kvtuner").beginnings())
    kinds = [(each["keep"], each["store"], each["size"]) for each in begun]
    assert ("snapkv", "as it is", 0) in kinds and ("all tokens", "kivi", 0) in kinds
    assert [each.get("kvtuner: setting") for each in begun if each["store"] == "kvtuner"] == ["ours", BY_LAYER]
    roomy = list(space("snapkv", rooms=(9000,)).beginnings())
    assert roomy[0] == {"weights": "as it is", "keep": "all tokens", "store": "as it is"} and roomy[1]["size"] == 3


def test_what_chooses_is_joined_by_every_store_that_fits() -> None:
    pairs = list(space("snapkv", "h2o", "kivi", "mikv").pairs(["snapkv", "h2o"]))
    assert [(each["keep"], each["store"]) for each in pairs] == [("snapkv", "kivi"), ("snapkv", "mikv")]
    assert all(each["size"] == 0 for each in pairs)


def test_levels_of_layers_become_the_bits_of_a_recipe() -> None:
    made, layered = study(), space("kvtuner")
    levels = {f"level {layer}": layer for layer in range(4)}
    made.enqueue_trial({"keep": "all tokens", "store": "kvtuner", "kvtuner: setting": BY_LAYER, "size": 0, **levels})
    recipe = layered.recipe(made.ask())
    assert recipe is not None and getattr(recipe.methods[0], "bits") == "2/2 4/2 4/4 8/4"  # noqa: B009
    assert recipe.methods[0].budget is not None and recipe.methods[0].budget.amount == 1000


def test_host_memory_counts_unless_it_is_free() -> None:
    counted, free = (chosen_methods(None, host=host) for host in ("counts", "free"))  # type: ignore[arg-type]
    assert "retrievalattention" not in counted.keep and "retrievalattention" in free.keep
    assert chosen_methods(["retrievalattention"], host="counts").keep == ("retrievalattention",)
    with pytest.raises(UnknownMethod):
        chosen_methods(["snapvk"], host="counts")
    with pytest.raises(BadParameter, match="studied on a trace"):
        chosen_methods([registered("operator")[0].key], host="counts")
