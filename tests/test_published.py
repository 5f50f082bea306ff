"""Every default is the value that a named source gives, or says why it is not."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

import workbench as wb
from workbench.errors import BadParameter
from workbench.recipe import Recipe
from workbench.registry import Fidelity, Method, Paper, Preset, param, registered

OWN_METHODS = [cls for cls in registered() if cls.__module__.startswith("workbench.")]


def unaccounted(cls: type[Method]) -> list[str]:
    """The parameters whose default neither a source nor a reason accounts for."""
    found = []
    for parameter in cls.parameters():
        published = [preset.values[parameter.name] for preset in cls.presets if parameter.name in preset.values]
        if (not published or published[0] != parameter.default) and not parameter.own:
            found.append(parameter.name)
    return found


class Windowed(Method):
    """Keeps a window."""

    key, claim, family = "windowed", "nothing", "kv"
    paper = Paper("A window", "Nobody 2020")
    fidelity = Fidelity("deviates", "the window is not learned")
    presets = (Preset("paper", "section 3", window=32), Preset("code", "who/what, run.py, 1234567", window=8, step=2))

    window: int = param(32, ge=1, help="how many stay")
    step: int = param(2, ge=1, help="how far apart")


class Unsaid(Windowed):
    """Keeps another window."""

    window: int = param(16, ge=1, help="how many stay")
    step: int = param(3, ge=1, help="how far apart", own="the code's 2 loses 0.3 nats more on needles")
    sinks: int = param(0, ge=0, help="how many stay at the beginning")


def test_a_default_without_a_source_or_a_reason_is_found() -> None:
    assert unaccounted(Windowed) == []
    assert unaccounted(Unsaid) == ["window", "sinks"]


@pytest.mark.parametrize("cls", OWN_METHODS, ids=lambda cls: cls.key)
def test_every_default_has_its_source(cls: type[Method]) -> None:
    assert cls.fidelity is not None
    assert unaccounted(cls) == []


@pytest.mark.parametrize("cls", OWN_METHODS, ids=lambda cls: cls.key)
def test_every_preset_can_be_chosen_by_its_name(cls: type[Method]) -> None:
    names = [preset.name for preset in cls.presets]
    assert len(set(names)) == len(names)
    for preset in cls.presets:
        assert preset.source and preset.values
        chosen = wb.method(cls.key, preset=preset.name)
        assert {name: getattr(chosen, name) for name in preset.values} == dict(preset.values)
    assert wb.method(cls.key, preset="ours") == cls()


@pytest.mark.parametrize("cls", OWN_METHODS, ids=lambda cls: cls.key)
def test_only_entries_without_a_paper_are_baselines(cls: type[Method]) -> None:
    assert cls.fidelity is not None
    assert cls.paper is not None or cls.fidelity.standing == "baseline"


def test_a_preset_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(BadParameter, match="there are ours, paper, code"):
        Windowed.preset("papr")
    with pytest.raises(BadParameter, match="preset 'papr'"):
        wb.method("snapkv", preset="papr")


def test_a_preset_is_a_beginning_that_others_change() -> None:
    method = Windowed(**{**Windowed.preset("code"), "step": 5})
    assert (method.window, method.step) == (8, 5)
    assert Recipe.of(Windowed(step=7), preset="paper").methods[0] == Windowed(window=32, step=7)
    assert Recipe.of("snapkv", preset="ours", window=16).methods[0] == wb.method("snapkv", window=16)


def test_what_is_not_as_published_says_how() -> None:
    with pytest.raises(TypeError, match="says how"):
        Fidelity("deviates")
    with pytest.raises(TypeError, match="it is one of"):
        Fidelity("nearly")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the preset of the defaults"):
        Preset("ours", "nowhere", window=1)
    with pytest.raises(FrozenInstanceError):
        Fidelity("as published").standing = "baseline"  # type: ignore[misc]


def test_the_catalogue_tells_how_true_each_entry_is() -> None:
    table = wb.methods()
    assert {"fidelity", "presets"} <= set(table.columns)
    said = {cls.key: str(cls.fidelity or "") for cls in registered()}
    assert dict(zip(table["key"], table["fidelity"], strict=True)) == said
