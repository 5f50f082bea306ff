"""The method catalogue of the documentation, written from the registry: one page a family, one section a method.

`site_hook.py` calls `pages()` whenever the site is built, so no page of it is kept in the repository.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from docstrings import prose

from workbench.attention import AttentionMethod
from workbench.kv.base import STAGES, KVMethod
from workbench.registry import FAMILIES, Method, Paper, Parameter, registered
from workbench.weights import WeightMethod

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
TITLES = {"kv": "KV cache", "weights": "Weights", "attention": "Attention", "operator": "Attention operators"}
ABOUT = {
    "kv": "What the cache keeps, at what precision, and where. What a budget counts is told in "
    "[What a budget counts](../explanation/budget.md).",
    "weights": "How the model itself is made smaller. Quantisers are as small as their bits and groups make them; "
    "pruning and low rank are as small as their budget says.",
    "attention": "How scores are computed and how far a layer looks back. A budget is the share of the causal score "
    "entries that are computed while the prompt is read.",
    "operator": "Other functions of queries, keys and values than softmax attention. They are studied on a recording, "
    "beside exact attention, and never run in the model: they have no budget and are no part of a recipe.",
}
CODE = {"kv": "wb.kv", "weights": "wb.weights", "attention": "wb.attention", "operator": "wb.attention.operators"}
# Folders of methods, in the field's words.
KINDS = {
    "evict": "Eviction",
    "allocate": "Allocation over layers and heads",
    "merge": "Merging",
    "quantise": "Quantisation",
    "sparse": "Sparse storage",
    "low_rank": "Low rank",
    "offload": "Host memory",
    "select": "Selection on the device",
    "cross_layer": "Shared by layers",
    "chunked": "Chunked prefill in bounded memory",
    "prune": "Pruning",
    "structured": "Structured pruning",
    "any_size": "One compression for every size",
}
DOES = {
    "score": "which positions matter",
    "refine": "what becomes of any scorer's scores",
    "allocate": "how many each layer and head keeps",
    "merge": "what becomes of the dropped",
    "store": "precision and layout",
    "retrieve": "how entries in host memory are found again",
    "select": "what of the device's entries a new token attends to",
    "evict": "who leaves while decoding",
    "place": "whether what is kept closes up",
    "read": "how the prompt is read in bounded memory",
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def pages() -> dict[str, str]:
    """Markdown of every page, by its place under docs/."""
    return {"methods/index.md": _index()} | {f"methods/{family}.md": family_page(family) for family in FAMILIES}


def _index() -> str:
    lines = ["# Methods", ""]
    lines += ["Everything the registry knows, described by the code itself. `wb.methods()` gives the same as a table,"]
    lines += ["`workbench methods` prints it. A method of your own joins it: [Write a method](../plugin.md).", ""]
    for family in FAMILIES:
        lines += [f"- **[{TITLES[family]}]({family}.md)**, {len(registered(family))} methods. {ABOUT[family]}"]
    return "\n".join(lines) + "\n"


def family_page(family: str) -> str:
    """A table of the family's methods, then a section for each: under its kind, where the folders tell one."""
    methods = registered(family)
    parts = [f"# {TITLES[family]}", ABOUT[family], overview(methods)]
    groups: dict[str, list[type[Method]]] = {}
    for method in methods:
        groups.setdefault(kind(method), []).append(method)
    evidence = {"kv": _kv_claims, "weights": _weight_claims}.get(family, dict)()
    for title, members in sorted(groups.items(), key=lambda group: _place(group[0])):
        parts += [f"## {title}"] if title else []
        parts += [section(method, evidence.get(method.key), "###" if title else "##") for method in members]
    return "\n\n".join(parts) + "\n"


def overview(methods: Iterable[type[Method]]) -> str:
    """One row a method: name, key, what it does, paper."""
    rows = [f"| [{m.title}](#{m.key}) | `{m.key}` | {_cell(m.summary())} | {_short(m.paper)} |" for m in methods]
    return "\n".join(["| method | key | what it does | paper |", "| --- | --- | --- | --- |", *rows])


def kind(method: type[Method]) -> str:
    """The heading a method stands under: that of its folder below `methods`, else none."""
    *_, holder, folder, _module = ["", "", *method.__module__.split(".")]
    return KINDS.get(folder, "") if holder == "methods" else ""


def _place(title: str) -> int:
    return list(KINDS.values()).index(title) if title else -1


def section(method: type[Method], evidence: str | None = None, head: str = "##") -> str:
    """All that is known of one method."""
    summary, _, rest = inspect.cleandoc(method.__doc__ or "").partition("\n")
    parts = [f"{head} {method.title} {{ #{method.key} }}", f"**{prose(summary)}**", prose(rest.strip())]
    facts = [f"- **Paper**: {_long(method.paper)}"] if method.paper else []
    facts += [f"- **Its claim**: {_cell(method.claim)}"]
    facts += [f"- **Here**: {_cell(str(method.fidelity))}"] if method.fidelity else []
    facts += [f"- **Measured here**: {evidence}"] if evidence else []
    facts += [f'- **Use**: `{CODE[method.family]}.{method.__name__}(...)` or `wb.method("{method.key}", ...)`']
    facts += [f"- **Budget**: {_budget(method)}"] if method.family != "operator" else []
    facts += [f"- **Stages**: {stages(method)}"] if issubclass(method, KVMethod) else []
    parts += [
        "\n".join(facts),
        parameters(method),
        presets(method),
        _weight_rows(method.key) if method.family == "weights" else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _budget(method: type[Method]) -> str:
    if method.default_budget is not None:
        return f"{method.default_budget:g} unless another is given"
    if issubclass(method, AttentionMethod):
        return f"none: all scores are computed{', ' if method.all_scores else ''}{prose(method.all_scores)}"
    if issubclass(method, WeightMethod) and method.takes_budget():
        return "any size"
    return "none by default: its size follows from its parameters"


def stages(method: type[KVMethod]) -> str:
    """Which stages the method contributes, and which it borrows from the class it derives from."""
    instance = method()
    told = [f"`{stage}` ({DOES[stage]})" for stage in STAGES if method.contributes(stage)]
    borrowed = [f"`{s}`" for s in STAGES if instance.supplies(s) and not method.contributes(s)]
    if borrowed:
        told.append(f"borrows {', '.join(borrowed)}, which yields to another method's")
    return "; ".join(told) or "none: everything stays, as it is"


def parameters(method: type[Method]) -> str:
    """A table of the method's own parameters, or a sentence where there are none."""
    rows = [
        f"| `{p.name}` | {_default(p)} | {_bounds(method, p)} | {p.unit or ''} | {_cell(p.help)} |"
        for p in method.parameters()
    ]
    if not rows:
        return "No parameters."
    return "\n".join(["| parameter | default | bounds | unit | what it is |", "| --- | --- | --- | --- | --- |", *rows])


def presets(method: type[Method]) -> str:
    """Where published values of the parameters come from, and why a default is none of them."""
    told = [
        f"- preset `{p.name}` ({_cell(p.source)}): {', '.join(f'`{n}={v!r}`' for n, v in p.values.items())}"
        for p in method.presets
    ]
    told += [f"- `{p.name}` is our own: {_cell(p.own)}" for p in method.parameters() if p.own]
    return "\n".join(told)


def _default(parameter: Parameter) -> str:
    return f"`{parameter.default!r}`"


def _bounds(method: type[Method], parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(f"`{choice!r}`" for choice in parameter.choices)
    field = method.model_fields[parameter.name]
    told = [
        f"{sign} {getattr(rule, name):,g}".replace("e+", "e")
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    extra = cast("dict[str, Any]", field.json_schema_extra or {})
    return ", ".join(told + (["odd"] if extra.get("odd") else []))


def _short(paper: Paper | None) -> str:
    if paper is None:
        return "–"
    where = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.title
    return f"{paper.authors}, {where}"


def _long(paper: Paper) -> str:
    where = f", [arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    return f"{paper.authors}, *{_cell(paper.title)}*{where}"


def _cell(text: str) -> str:
    """Text for a table's cell or a list's item: one line of plain words."""
    return str(prose(" ".join(text.split()))).replace("|", "\\|")


def _kv_claims() -> dict[str, str]:
    """Of each method that benchmarks/results/kv_quality.md has a claim of: what was tested, and what came of it."""
    found = _claims(_text("kv_quality"))
    return {key: f"{told} ([figures](../benchmarks/kv_quality.md#claims))" for key, told in found}


def _weight_claims() -> dict[str, str]:
    """The same of benchmarks/results/weight_quality.md, for each model."""
    told: dict[str, list[str]] = {}
    for model, part in _models():
        for key, claim in _claims(part):
            told.setdefault(key.split()[0], []).append(f"{model}, {claim}")
    figures = "([figures](../benchmarks/weight_quality.md))"
    return {key: f"{'; '.join(claims)} {figures}" for key, claims in told.items()}


def _claims(text: str) -> Iterator[tuple[str, str]]:
    """What a table of claims says of each row that it judges."""
    for cells in _table(text, "method", "the paper claims", "here it is"):
        why = f": {cells[6]}" if cells[6] else ""
        measured = ", ".join(filter(None, (f"*{cells[3]}*" if cells[3] else "", cells[4])))
        yield cells[0].rsplit("`", 2)[1], f"{measured}{': ' if measured else ''}**{cells[5]}**{why}"


def _weight_rows(key: str) -> str:
    """The method's rows of benchmarks/results/weight_quality.md."""
    rows = []
    for model, cells in _weight_quality():
        recipe = cells[0].split()
        if recipe[0] == key:
            rows.append(f"| {model} | {' '.join(recipe[1:]) or 'defaults'} | {cells[1]} | {cells[3]} | {cells[4]} |")
    if not rows:
        return ""
    head = ["Measured here ([figures](../benchmarks/weight_quality.md)):", ""]
    head += ["| model | with | bytes | perplexity | divergence |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + rows)


def _weight_quality() -> Iterator[tuple[str, list[str]]]:
    for model, part in _models():
        yield from ((model, cells) for cells in _table(part, "recipe", "bytes"))


def _models() -> Iterator[tuple[str, str]]:
    """The part of benchmarks/results/weight_quality.md about each model."""
    for part in re.split(r"^## ", _text("weight_quality"), flags=re.MULTILINE)[1:]:
        yield part.split("\n", 1)[0], part


def _text(benchmark: str) -> str:
    return (RESULTS / f"{benchmark}.md").read_text(encoding="utf-8")


def _table(text: str, *head: str) -> Iterator[list[str]]:
    """The rows of the table that begins with these column names."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith(f"| {' | '.join(head)} "):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and set(cells[0]) != {"-"}:
            yield cells
