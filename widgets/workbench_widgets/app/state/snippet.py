"""The state of a page as Python: the same model, prompt and recipe in five lines."""

from __future__ import annotations

from workbench.recipe import Recipe
from workbench.registry import Method


def snippet(
    *, model: str, example: str | None, text: str, recipe: Recipe, question: str | None, max_new_tokens: int
) -> str:
    """Python that runs `recipe` on the example of that name, or on `text`."""
    prompt = f"example({example!r}).text" if example else repr(text)
    imports = "import workbench as wb" + ("\nfrom workbench.examples import example" if example else "")
    methods = ", ".join(map(_method, recipe.methods))
    budget = "" if recipe.budget is None else f", budget={recipe.budget.to_json()!r}"
    asked = "" if question is None else f", question={question!r}"
    return "\n".join(
        [
            imports,
            "",
            f"s = wb.Session({model!r})",
            f"s.read({prompt})",
            f"run = s.run([{methods}]{budget}{asked}, max_new_tokens={max_new_tokens})",
            "print(run.text, run.plan.share, run.quality)",
            "",
        ]
    )


def _method(method: Method) -> str:
    values = {p.name: getattr(method, p.name) for p in method.parameters()}
    arguments = [f"{p.name}={values[p.name]!r}" for p in method.parameters() if values[p.name] != p.default]
    if method.budget is not None:
        arguments.insert(0, f"budget={method.budget.to_json()!r}")
    return f"wb.method({', '.join([repr(method.key), *arguments])})"
