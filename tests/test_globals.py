"""No module holds state: what a name in one is bound to when the module has been read is what it stays."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.testing.module_state import EXCEPTIONS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"workbench": ROOT, "workbench_kernels": ROOT / "kernels", "workbench_widgets": ROOT / "widgets"}
MODULES = {
    ".".join(path.relative_to(folder).with_suffix("").parts): path
    for package, folder in FOLDERS.items()
    for path in sorted((folder / package).rglob("*.py"))
}
CONTAINERS = {"dict", "list", "set", "bytearray", "deque", "OrderedDict", "defaultdict", "Counter"}
STATE = {
    "WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "Lock", "RLock", "Condition", "Event", "Semaphore", "Queue",
    "count", "ExitStack", "local",
}  # fmt: skip
CHANGING = {
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard", "sort",
    "reverse", "appendleft", "popleft", "move_to_end",
}  # fmt: skip
CACHES = {"cache", "lru_cache"}
LIVING = re.compile(r"\b(Tensor|Module|Linear|\w*Model|\w*Trace|Rotation|Session|Store|Decoder|Any|object)\b(?!\])")
CONSTANT = re.compile(r"_*[A-Z][A-Z0-9_]*")


def called(node: ast.expr | None) -> str:
    """The name of what an expression calls, or is a subscript or a literal of."""
    if isinstance(node, ast.Dict | ast.DictComp):
        return "dict"
    if isinstance(node, ast.List | ast.ListComp):
        return "list"
    if isinstance(node, ast.Set | ast.SetComp):
        return "set"
    if isinstance(node, ast.Call):
        return called(node.func)
    if isinstance(node, ast.Subscript):
        return called(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """What names a module or a class binds to literals and calls."""
    for statement in body:
        if isinstance(statement, ast.Assign):
            yield from ((target.id, statement.value) for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            yield from bindings(statement.body)


def changed(tree: ast.Module) -> Iterator[str]:
    """Names that something in a module writes into, or binds anew inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            yield called(node.func.value)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield called(node.value)


def remembering(tree: ast.Module) -> Iterator[str]:
    """Functions whose cache keeps what lives: arguments that are more than plain values, or are not said."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(called(each) in CACHES for each in node.decorator_list):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            kinds = [ast.unparse(each.annotation) if each.annotation else each.arg for each in arguments]
            if any(kind == "self" or LIVING.search(kind) for kind in kinds):
                yield node.name


def state_in(source: str) -> set[str]:
    """What a module holds that may change while it is used."""
    tree = ast.parse(source)
    written = set(changed(tree))
    scopes = [("", tree.body)]
    scopes += [(f"{node.name}.", node.body) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    held = set(remembering(tree))
    instances = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and keeps(node)}
    for scope, body in scopes:
        for name, value in bindings(body):
            kind = called(value)
            if name.startswith("__"):
                continue
            if isinstance(value, ast.Name | ast.Attribute | ast.Subscript):  # another name for something, or a type
                continue
            if kind in CACHES | STATE | instances:
                held.add(scope + name)
            elif kind in CONTAINERS and not scope and (name in written or not CONSTANT.fullmatch(name)):
                held.add(name)
    module = {name for name, _ in bindings(tree.body)}
    return held | {
        name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names if name in module
    }


def keeps(node: ast.ClassDef) -> bool:
    """Whether instances of a class hold containers or locks of their own that they write into."""
    values = [
        statement.value
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None
    ]
    parts = [part for value in values for part in (value.elts if isinstance(value, ast.Tuple) else [value])]
    return any(isinstance(part, ast.Call) and called(part) in STATE for part in parts)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_holds_no_state(module: str) -> None:
    names = {f"{module.removesuffix('.__init__')}.{name}" for name in state_in(MODULES[module].read_text())}
    assert names <= set(EXCEPTIONS), sorted(names - set(EXCEPTIONS))


def test_exceptions_are_there_and_have_a_reason() -> None:
    for name, reason in EXCEPTIONS.items():
        module, _, variable = name.rpartition(".")
        assert variable in state_in(MODULES[module].read_text()), name
        assert len(reason.split()) > 5


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("_seen: WeakKeyDictionary[Model, int] = WeakKeyDictionary()", {"_seen"}),
        ("_lock = threading.RLock()", {"_lock"}),
        ("known = {}", {"known"}),
        ("KNOWN = {}\ndef f(x):\n    KNOWN[x] = 1", {"KNOWN"}),
        ("KNOWN = []\ndef f(x):\n    KNOWN.append(x)", {"KNOWN"}),
        ("KNOWN: dict[str, int] = {'a': 1}\ndef f(x):\n    return KNOWN[x]", set()),
        ("count = 0\ndef f():\n    global count\n    count += 1", {"count"}),
        ("@cache\ndef f(model: PreTrainedModel) -> int: ...", {"f"}),
        ("@lru_cache(maxsize=8)\ndef f(x): ...", set()),
        ("@cache\ndef f(size: int, dtype: torch.dtype) -> Tensor: ...", set()),
        ("class A:\n    @cache\n    def f(self) -> int: ...", {"f"}),
        ("class A:\n    seen = WeakSet()", {"A.seen"}),
        ("class A:\n    def __init__(self):\n        self.lock = Lock()\nA_ = A()", {"A_"}),
        ("reading = cache(fresh_reading)", {"reading"}),
    ],
)
def test_state_is_seen(source: str, names: set[str]) -> None:
    assert state_in(source) == names
