"""Methods, recipes and budgets as values: read, written, refused in one clear line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.budget import Budget
from workbench.errors import BadBudget, BadParameter, BadRecipe, InputError, UnknownMethod
from workbench.recipe import Recipe
from workbench.registry import Method, Parameter, find, register, registered

KEYS = [cls.key for cls in registered()]
RUNNABLE = [cls.key for cls in registered() if cls.family != "operator"]
BAD_BUDGETS = [
    0, -1, 2, 1.0001, math.nan, math.inf, -math.inf, True, False, None, [1], 10**400, "", " ", "nan", "inf", "0",
    "-0.5", "1.5",
    "5 parsecs", "0 tokens", "0.5 tokens", "1e400", "1e400 tokens", "1e400 GiB", "0.4 B", "0%", "101%",
    "64 MiB MiB", "0x10",
]  # fmt: skip
NUMBERS = st.floats(0, 1, exclude_min=True, allow_subnormal=False)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- budgets


@pytest.mark.parametrize("value", BAD_BUDGETS, ids=lambda value: str(value)[:12])
def test_a_bad_budget_is_refused_with_the_forms_that_work(value: Any) -> None:
    with pytest.raises(BadBudget) as error:
        Budget.parse(value)
    assert "64MiB" in one_line(error)


@pytest.mark.parametrize(
    "value", [value for value in BAD_BUDGETS if value is not None], ids=lambda value: str(value)[:12]
)
def test_a_method_refuses_a_bad_budget_the_same_way(value: Any) -> None:
    with pytest.raises(BadBudget) as error:
        wb.method("snapkv", budget=value)
    assert one_line(error).startswith("snapkv: budget")


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        (0.25, "share", 0.25),
        (1, "share", 1.0),
        ("25%", "share", 0.25),
        (" 0.25 ", "share", 0.25),
        (".5", "share", 0.5),
        ("1e-3", "share", 0.001),
        ("64MiB", "bytes", 64 * 2**20),
        ("64 mib", "bytes", 64 * 2**20),
        ("1.5 kB", "bytes", 1500),
        ("0.3 KiB", "bytes", 307),
        ("1 GB", "bytes", 10**9),
        ("512 tokens", "tokens", 512),
        ("1 token", "tokens", 1),
    ],
)
def test_a_budget_reads_as_written(text: Any, kind: str, amount: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)


@given(
    st.one_of(
        NUMBERS,
        st.builds("{:.6f}%".format, st.floats(0.01, 100)),
        st.builds(
            "{} {}".format,
            st.floats(1, 1e6, allow_nan=False),
            st.sampled_from(["B", "kB", "KiB", "MB", "MiB", "GB", "GiB"]),
        ),
        st.builds("{} tokens".format, st.integers(1, 10**9)),
    )
)
@settings(max_examples=150, deadline=None)
def test_a_budget_survives_writing_and_reading(value: Any) -> None:
    budget = Budget.parse(value)
    assert Budget.parse(json.loads(json.dumps(budget.to_json()))) == budget
    assert Budget.parse(budget) is budget
    assert str(budget)


@given(NUMBERS, st.integers(1, 10**12))
@settings(max_examples=100, deadline=None)
def test_a_share_never_allows_more_bytes_than_it_says(share: float, full: int) -> None:
    allowed = Budget.parse(share).nbytes(full)
    assert allowed is not None and 0 <= allowed <= share * full


# --- methods


def test_the_catalogue_describes_every_method() -> None:
    table = wb.methods()
    assert list(table.columns) == [
        "key",
        "name",
        "family",
        "ring",
        "summary",
        "paper",
        "claim",
        "fidelity",
        "parameters",
        "presets",
    ]
    assert list(table["key"]) == KEYS and table["key"].is_unique
    assert (table[["name", "summary", "claim"]].map(len) > 0).all().all()
    assert set(wb.methods("kv")["key"]) <= set(KEYS)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UnknownMethod, match="there are kv, weights, attention, operator"):
        wb.methods("kvs")


@pytest.mark.parametrize(
    ("wrong", "right"), [("snapvk", "snapkv"), ("full ", "full"), ("h20", "h2o"), ("KIVI", "kivi")]
)
def test_an_unknown_method_is_refused_with_a_hint(wrong: str, right: str) -> None:
    with pytest.raises(UnknownMethod) as error:
        wb.method(wrong)
    assert right in one_line(error)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"window": 0}, "greater than or equal to 1"),
        ({"window": 10**9}, "less than or equal to"),
        ({"window": 1.5}, "window=1.5"),
        ({"window": None}, "window=None"),
        ({"window": "many"}, "window='many'"),
        ({"window": math.nan}, "window=nan"),
        ({"windw": 3}, "did you mean 'window'"),
        ({"kernel": 4}, "kernel must be odd, not 4"),
        ({"pooling": "median"}, "'avg' or 'max'"),
        ({"window": 0, "pooling": "median"}, "pooling"),
        ({"budget": 0, "window": 0}, "window"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter) as error:
        wb.method("snapkv", **parameters)
    assert says in one_line(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_a_share_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(BadParameter, match="safeguard"):
        wb.method("adakv", safeguard=value)


@pytest.mark.parametrize("key", KEYS)
def test_a_method_is_immutable_hashable_and_equal_by_value(key: str) -> None:  # trap 17
    one, two = wb.method(key), wb.method(key)
    assert one == two and hash(one) == hash(two)
    with pytest.raises(Exception, match="frozen"):
        one.budget = Budget.parse(0.5)
    assert one == two


def test_the_same_key_twice_is_a_programming_error() -> None:
    class Impostor(find("snapkv")):  # type: ignore[misc]
        """Pretend."""

    with pytest.raises(TypeError, match="two methods under the key 'snapkv'"):
        register(Impostor)
    assert find("snapkv") is not Impostor


def _values(parameter: Parameter, cls: type[Method]) -> st.SearchStrategy[Any]:
    extra = cls.model_fields[parameter.name].json_schema_extra or {}
    if parameter.choices:
        return st.sampled_from(parameter.choices)
    if parameter.kind == "bool":
        return st.booleans()
    low, high = parameter.low, parameter.high
    if parameter.kind == "int":
        whole = st.integers(int(low or 0), int(high) if high is not None else 4096)

        return whole.map(lambda n: n | 1).filter(lambda n: high is None or n <= high) if extra.get("odd") else whole  # type: ignore[union-attr]
    return st.floats(low if low is not None else 0.0, high if high is not None else 1e6)


@st.composite
def any_method(draw: st.DrawFn) -> Method:
    cls = find(draw(st.sampled_from(RUNNABLE)))
    chosen = {
        parameter.name: draw(_values(parameter, cls))
        for parameter in cls.parameters()
        if parameter.kind != "text" and draw(st.booleans())
    }
    if cls.key != "full":
        chosen["budget"] = draw(st.one_of(st.none(), NUMBERS, st.just("64 MiB"), st.just("12 tokens")))
    try:
        return cls(**chosen)
    except (BadParameter, BadBudget):  # in bounds one by one but not together, or a size where only a share will do
        return cls()


@given(any_method())
@settings(max_examples=150, deadline=None)
def test_every_method_survives_writing_and_reading(method: Method) -> None:
    recipe = Recipe.of(method)
    written = json.dumps(recipe.to_dict(), allow_nan=False)
    assert Recipe.from_dict(json.loads(written)) == recipe
    assert recipe.label.startswith(method.key)


def test_a_recipes_total_takes_the_place_of_its_cache_methods_own_budgets_in_its_name() -> None:
    methods = [wb.kv.SnapKV(window=16), wb.weights.BitStack(budget=0.3)]
    assert Recipe.of(methods, budget=0.25).label == "snapkv window=16 + bitstack 0.3 (0.25)"
    assert Recipe.of(methods).label == "snapkv 0.5 window=16 + bitstack 0.3"


@given(st.lists(any_method(), min_size=2, max_size=4), st.one_of(st.none(), NUMBERS, st.just("3 MiB")))
@settings(max_examples=80, deadline=None)
def test_every_recipe_survives_writing_and_reading(methods: list[Method], budget: Any) -> None:
    recipe = Recipe.of(methods, budget=budget)
    assert recipe.methods == tuple(methods)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe


# --- recipes


@pytest.mark.parametrize("spec", [None, 5, [5], [None], [], (), {"methods": []}, ["full", 3.0]], ids=str)
def test_what_is_no_recipe_is_refused(spec: Any) -> None:
    with pytest.raises(BadRecipe) as error:
        Recipe.of(spec)
    one_line(error)


@pytest.mark.parametrize(
    "description",
    [
        None,
        5,
        [],
        {},
        {"methods": 5},
        {"methods": [5]},
        {"methods": [{}]},
        {"methods": ["snapkv"]},
        {"methods": [{"method": 3}]},
    ],
    ids=str,
)
def test_a_broken_description_is_refused(description: Any) -> None:
    with pytest.raises(InputError) as error:
        Recipe.from_dict(description)
    one_line(error)


def test_parameters_for_several_methods_at_once_are_refused() -> None:
    with pytest.raises(BadRecipe, match="give parameters to the methods themselves"):
        Recipe.of(["snapkv", "kivi"], window=3)


def test_methods_are_put_together_with_a_bar() -> None:
    snapkv, kivi, adakv = wb.method("snapkv"), wb.method("kivi"), wb.method("adakv")
    assert (snapkv | kivi).methods == (snapkv, kivi)
    assert (Recipe.of([snapkv, kivi], budget=0.5) | adakv) == Recipe.of([snapkv, kivi, adakv], budget=0.5)


def test_the_budget_of_a_part_is_never_silently_lost() -> None:
    part = Recipe.of(["adakv", "kivi"], budget=0.5)
    for join in (
        lambda: Recipe.of([part, "full"]),
        lambda: wb.method("snapkv") | part,
        lambda: Recipe.of("snapkv") | part,
    ):
        with pytest.raises(BadRecipe, match="give the budget to the whole"):
            join()
    assert Recipe.of(part) == part
    assert Recipe.of(part, budget=0.25).budget == Budget.parse(0.25)
