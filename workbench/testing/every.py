"""What every method promises."""

from __future__ import annotations

from workbench.registry import Method
from workbench.testing.problem import must
from workbench.testing.subjects import Subjects


def describes_itself(method: Method, subjects: Subjects) -> None:
    """Key, title, claim, one sentence, and for each parameter a default within its bounds and a line of help."""
    for name in ("key", "title", "claim"):
        must(bool(getattr(method, name)), f"it needs a {name}")
    must(bool(type(method).summary()), "it needs a docstring whose first line says what it does")
    must(type(method).parameter_key is Method.parameter_key, "results are cached by parameter_key: leave it alone")
    for parameter in type(method).parameters():
        must(bool(parameter.help), f"the parameter {parameter.name} needs help=")
        if parameter.kind in ("int", "float"):
            must(
                parameter.low is not None and parameter.high is not None,
                f"the parameter {parameter.name} needs bounds (ge=, le=): its control is a slider",
            )
    values = method.to_dict()
    must(values.pop("method") == method.key, "to_dict does not name it by its key")
    twin = type(method)(**values)
    must(twin == method and hash(twin) == hash(method), "what to_dict wrote does not read back as the same")
