"""The values of a method's parameters that a search tries: its published settings, and others around its defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.parameters import Parameter
from workbench.registry import Method

if TYPE_CHECKING:
    from optuna.trial import Trial

_REACH = 4  # how many times smaller or larger than its default a number may be
TUNED = "tuned"  # the setting in which parameters are drawn one by one


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, on a logarithmic scale, in whole steps from `low` where there is one."""

    low: float
    high: float
    step: int | None = None

    @classmethod
    def of(cls, parameter: Parameter) -> Range | None:
        """Around a parameter's default, within its bounds; None for what is no positive number."""
        default = parameter.default
        if parameter.kind not in ("int", "float") or isinstance(default, bool) or not default or default < 0:
            return None
        low, high = default / _REACH, default * _REACH
        low = low if parameter.low is None else max(low, parameter.low)
        high = high if parameter.high is None else min(high, parameter.high)
        if parameter.kind == "float":
            return cls(low, high) if low < high else None
        step = int(parameter.step or 1)
        start = default - (default - int(low)) // step * step  # values lie in steps around the default
        start = max(start, 1) if step == 1 else start
        last = start + (int(high) - start) // step * step
        return cls(start, last, step) if start < last else None

    def drawn(self, trial: Trial, name: str) -> float | int:
        """A value, as a trial has it under a name."""
        if self.step is None:
            return trial.suggest_float(name, self.low, self.high, log=True)
        if self.step > 1:
            return trial.suggest_int(name, int(self.low), int(self.high), step=self.step)
        return trial.suggest_int(name, int(self.low), int(self.high), log=True)


def choices(parameter: Parameter) -> tuple[Any, ...]:
    """What a parameter may be, where it is one of several; none for others."""
    return (False, True) if parameter.kind == "bool" else parameter.choices or ()


def tunable(cls: type[Method]) -> Iterator[Parameter]:
    """The parameters that are drawn: all but texts, seeds and numbers that are 0 unless somebody wants otherwise."""
    for parameter in cls.parameters():
        if parameter.name != "seed" and (choices(parameter) or Range.of(parameter) is not None):
            yield parameter


def settings(cls: type[Method]) -> list[str]:
    """How a method may be set: "ours", each preset that says something else, "tuned" where there is what to tune."""
    seen: list[Mapping[str, Any]] = []
    names = []
    for name in ("ours", *(preset.name for preset in cls.presets)):
        values = cls.preset_values(name)
        if values not in seen:
            seen.append(values)
            names.append(name)
    return [*names, TUNED] if any(tunable(cls)) else names


def drawn(trial: Trial, cls: type[Method], more: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The setting of a method that a trial has, and the parameters that it gives. more: settings beside the method's
    own, whose parameters whoever names them knows.
    """
    names = [*settings(cls), *more]
    setting = trial.suggest_categorical(f"{cls.key}: setting", names) if len(names) > 1 else names[0]
    if setting in more:
        return setting, {}
    if setting != TUNED:
        return setting, dict(cls.preset(setting))
    values: dict[str, Any] = {}
    for parameter in tunable(cls):
        name, several = f"{cls.key}: {parameter.name}", choices(parameter)
        if several:
            values[parameter.name] = trial.suggest_categorical(name, several)
        else:
            numbers = Range.of(parameter)
            assert numbers is not None
            values[parameter.name] = numbers.drawn(trial, name)
    return setting, values
