"""Immutable, validated descriptions with declared parameters: what methods and tasks are."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from workbench import arguments
from workbench.errors import BadParameter, InputError
from workbench.parameters import Parameter, choices_of, declared, explained, plain_number


class Described(BaseModel):
    """A description whose fields are parameters, each declared with `param`. Immutable and hashable.

    A subclass sets `key` and `title`; its docstring's first line says in one sentence what it is. Unknown or
    out-of-bounds parameters raise BadParameter, in one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    key: ClassVar[str] = ""
    title: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        for name, field in type(self).model_fields.items():
            if isinstance(values.get(name), bool) and (choices := choices_of(field)):  # True is 1 for pydantic
                arguments.choice(f"{self.key}: {name}", values[name], choices)
        try:
            super().__init__(**{name: plain_number(value) for name, value in values.items()})
        except ValidationError as error:
            raise self._refusal(error)(explained(self.key, list(type(self).model_fields), error)) from None
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if declared(field).get("odd") and value % 2 == 0:
                raise BadParameter(f"{self.key}: {name} must be odd, not {value}")

    @classmethod
    def _refusal(cls, error: ValidationError) -> type[InputError]:  # noqa: ARG003  subclasses look at it
        """The class of the error that values which are no description raise."""
        return BadParameter

    @classmethod
    def summary(cls) -> str:
        """What it is or does, in one sentence."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """Its parameters, as controls and help texts need them."""
        return tuple(Parameter.of(name, field) for name, field in cls.model_fields.items())

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.model_fields[name].default
